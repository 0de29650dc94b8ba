"""The contract of a pass, checked on every run.

                        graph unchanged     graph changed
    modified is False   as promised         PassContractError
    modified is True    PassContractError   as promised

After a pass the verifier accepts the graph, and a second run changes nothing more.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..compiler.extensions import running
from ..compiler.options import render
from ..errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from ..compiler.budget import Budget
    from ..compiler.calibration import Calibration
    from ..compiler.data import Samples
    from ..compiler.graph import Graph
    from ..compiler.signature import Signature


Kept = Mapping[tuple[str, int], Mapping[int, "np.ndarray"]]
"""By the label of a node and the index of an input, which positions are left of axes of a constant."""


class PassContractError(AssertionError):
    """A pass broke its promise: a bug in the pass, never a user's mistake."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A place where a rule did not fire, and why. `node` is empty where the reason is about the whole graph."""

    reason: str
    node: str = ""


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did to the graph it was given.

    Attributes:
        modified: true exactly when the graph changed.
        changes: counts by kind of change, for people ("nodes removed": 12).
        refusals: places where a rule did not fire.
        details: tables and series for the report, as JSON takes them.
        kept: of constants that were cut, what is left.
    """

    modified: bool
    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Kept = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pass may look at beside the graph.

    Attributes:
        signature: names, dtypes and dynamic axes of the model.
        samples: data to measure ranges or results on; None where the caller has none.
        calibration: statistics of activations, collected over the calibration data; None where the caller has none.
        budget: what a pass that chooses precisions may spend; None for the default of the precision.
        gradients: takes the weights of a flat graph times their gradients from the torch module, by the name of the
            initializer, one batch of data after the other; None where the caller has no module.
        progress: takes the fraction done, 0 to 1, and what is being done, from passes that take long.
    """

    signature: Signature
    samples: Samples | None = None
    calibration: Calibration | None = None
    budget: Budget | None = None
    gradients: Callable[[Graph], Iterable[Mapping[str, np.ndarray]]] | None = None
    progress: Callable[[float, str], None] = lambda fraction, what: None

    def require_calibration(self, who: str, why: str) -> Calibration:
        """The calibration.

        Args:
            who: the pass or option that asks.
            why: what for, as in "to see the ranges of activations".

        Raises:
            RecipeError: the caller has none.
        """
        if self.calibration is None:
            raise RecipeError(
                f"{who} needs calibration data, {why}",
                hint="give --data with 32 to 512 real samples, or --random-calibration",
            )
        return self.calibration


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of a graph in place. The fields of the dataclass are the options of the pass."""

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """``file.py:Class`` where the class is the user's."""

    @abc.abstractmethod
    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Rewrites `graph`; call the pass itself, not this, to have its promise checked."""

    def __call__(self, graph: Graph, context: Context) -> PassResult:
        """Runs the pass and checks what it promised.

        Raises:
            PassContractError: see the table at the top of this file.
            GraphError: the pass was refused, or left a graph that the verifier rejects.
        """
        with running(self.source) if self.source else contextlib.nullcontext():
            result = self._checked(graph, context)
            again = self._checked(graph, context)
            if again.modified:
                raise PassContractError(f"{self}: the second run changed the graph again: {dict(again.changes)}")
            return result

    def _checked(self, graph: Graph, context: Context) -> PassResult:
        before = graph.fingerprint()
        result = self.apply(graph, context)
        if (graph.fingerprint() != before) != result.modified:
            raise PassContractError(f"{self}: modified={result.modified}, but the graph tells otherwise")
        if result.modified:
            graph.verify()
        return result

    @property
    def calibrates(self) -> bool:
        """Whether the pass needs calibration data."""
        return False

    @property
    def differentiates(self) -> bool:
        """Whether the pass needs the torch module, to take gradients."""
        return False

    def __str__(self) -> str:
        return render(self.source or self.name, self)
