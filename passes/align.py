"""Grows dimensions to the multiples that Tensor Cores take, weights with zeros at compile time.

    x @ W1 (a, 770) -> f -> @ W2 (770, b)    ->    x @ [W1 0] (a, 776) -> f -> @ [W2; 0] (776, b)

A dimension grows wherever it stands, so that nothing is padded or cut at run time between layers. One Slice cuts off
what is new at an output of the model, and before what looks at all positions at its end, as Softmax and ArgMax do. What
new positions hold is followed through the graph (`compiler.alignment.lanes`): where a sum, a norm or a quotient could
see it, the dimension is refused. So are inputs of the model, and what would add too many multiply-adds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ..compiler.alignment.cuts import Cuts
from ..compiler.alignment.evaluate import unsafe
from ..compiler.alignment.plan import Growth, Plan, make_plan, products_by_dim
from ..compiler.alignment.rewrites import flatten_products, pad_stems
from ..compiler.alignment.share import aligned_share
from ..compiler.alignment.tables import tie_again, untie
from ..compiler.dimensions import Dimensions
from ..compiler.dimensions.resize import resize
from ..compiler.graph import Graph
from ..compiler.graph.cost import costs
from ..compiler.graph.selection import label, select
from ..compiler.quantization.candidates import prepared, taken_over
from .base import Context, Pass, PassResult, Refusal

_QUANTIZED = ("DynamicQuantizeLSTM", "MatMulNBits", "QLinearConv", "QLinearMatMul")
"""Products whose weights have layouts of their own."""

_ROUNDS = 8
"""Most times that a graph is looked at: where channels are shuffled, sizes that grew show others that have to."""


@dataclasses.dataclass(frozen=True)
class Align(Pass):
    """Grows what MatMul, Gemm, Conv and recurrent layers sum over and make to a multiple.

    Attributes:
        multiple: 8 for fp16 and bf16, 16 for INT8 and FP8; 64 or 128 where that measures better. Dimensions that would
            waste too much so get a multiple of 8.
        waste: largest share of multiply-adds that this may add to the products of a dimension.
        flatten: make products of more than two axes two-dimensional, their bias within, for runtimes that do not do so
            by themselves as ONNX Runtime does.
        stem: channels that a Conv on the input of the model gets, by a Pad at run time: 4 or 8 for images; 0 for none.
        keep: names or globs of nodes whose weights stay.
    """

    name: ClassVar[str] = "align"
    multiple: int = 8
    waste: float = 0.1
    flatten: bool = False
    stem: int = 0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.multiple < 2 or self.multiple & (self.multiple - 1):
            raise ValueError(f"multiple is a power of two, not {self.multiple}")
        if not self.waste > 0:
            raise ValueError(f"waste is above 0, not {self.waste:g}")
        if self.stem < 0:
            raise ValueError(f"stem is 0 or more, not {self.stem}")

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Aligns in place.

        Raises:
            RecipeError: `keep` has a pattern that matches no node.
            TargetUnavailableError: a weight has to be computed and ONNX Runtime is not installed.
        """
        run = _Run(prepared(graph), self, context.signature.sizes())
        for _ in range(_ROUNDS):
            if not run.grow():
                break
        run.rewrite()
        refusals = [*_not_followed(graph), *run.refusals]
        if not run.changes:
            return PassResult(modified=False, refusals=tuple(refusals) or (Refusal(run.why_nothing()),))
        result = taken_over(graph, run.graph, run.changes, refusals)
        return dataclasses.replace(result, details={**result.details, **run.details()})


class _Run:
    def __init__(self, graph: Graph, options: Align, sizes: dict[str, int]) -> None:
        self.graph = graph
        self.changes: dict[str, int] = {}
        self.refusals: list[Refusal] = []
        self._options = options
        self._sizes = sizes
        self._keep = select(graph, options.keep)
        self._before = costs(graph, sizes)
        self._share = aligned_share(graph, options.multiple, sizes)
        self._rows: list[tuple[Growth, set[str]]] = []

    def grow(self) -> bool:
        """Grows what can be, and says why the rest does not. Returns whether anything grew."""
        ties = untie(self.graph, self._options.multiple)
        cuts = Cuts(self.graph)
        dimensions, plan = self._plan()
        if cuts.open(dimensions, plan.held):
            dimensions, plan = self._plan()
        changes = unsafe(dimensions, [growth.group.dim for growth in plan.growths])
        growths = [growth for growth in plan.growths if growth.group.dim not in changes]
        refused = {**plan.refusals, **{dimensions.group(dim): reason for dim, reason in changes.items()}}
        self.refusals = [Refusal(f"size {group.size}: {reason}", group.name) for group, reason in refused.items()]
        at_outputs, inside = cuts.close(dimensions, [growth.group.dim for growth in growths])
        products = products_by_dim(dimensions)
        self._rows += [(growth, products[growth.group.dim]) for growth in growths]
        padded = resize(dimensions, {growth.group.dim: _positions(growth) for growth in growths}) if growths else {}
        self._count("dimensions grown", len(growths))
        self._count("constants padded", len({(member.value, member.index and member.node) for member in padded}))
        self._count("slices at outputs", at_outputs)
        self._count("slices before what looks at all positions", inside)
        self._count("tables copied", tie_again(self.graph, ties))
        return bool(growths)

    def _count(self, what: str, count: int) -> None:
        if count:
            self.changes[what] = self.changes.get(what, 0) + count

    def rewrite(self) -> None:
        """Does what is asked for beside."""
        if self._options.flatten:
            self._note("products flattened", *flatten_products(self.graph))
        if self._options.stem:
            self._note("stems padded", *pad_stems(self.graph, self._options.stem))

    def _note(self, what: str, count: int, refusals: list[Refusal]) -> None:
        self.refusals += refusals
        self._count(what, count)
        if count:
            self.graph.infer()

    def why_nothing(self) -> str:
        """What to say of a graph with nothing to do."""
        if self._share == 1:
            return f"every dimension of its products is a multiple of {self._options.multiple}"
        return f"no dimension of its products comes nearer to a multiple of {self._options.multiple} by growing"

    def _plan(self) -> tuple[Dimensions, Plan]:
        dimensions = Dimensions(self.graph)
        return dimensions, make_plan(dimensions, self._options.multiple, self._options.waste, self._keep)

    def details(self) -> dict[str, Any]:
        """What grew, by group, and how much of the work is aligned."""
        after = costs(self.graph, self._sizes)
        rows = [
            {
                "group": growth.group.name,
                "before": growth.group.size,
                "after": growth.size,
                "macs_before": sum(self._before[name].macs for name in products),
                "macs_after": sum(after[name].macs for name in products),
            }
            for growth, products in self._rows
        ]
        share = aligned_share(self.graph, self._options.multiple, self._sizes)
        return {"aligned": rows, "aligned_share": {"before": self._share, "after": share}}


def _not_followed(graph: Graph) -> list[Refusal]:
    reason = "{} is not followed: align before quantizing"
    return [Refusal(reason.format(node.op_type), label(node)) for node in graph.nodes() if node.op_type in _QUANTIZED]


def _positions(growth: Growth) -> np.ndarray:
    """The old ones, and new ones behind them."""
    return np.concatenate([np.arange(growth.group.size), np.full(growth.size - growth.group.size, -1)])
