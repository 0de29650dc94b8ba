"""pipeline.json: the stages of an engine, what passes between them, and how a call is cut into micro-batches."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...compiler.signature import Signature
from ...errors import DataError


class Sized(Protocol):
    """Memory of a known size."""

    @property
    def size_bytes(self) -> int:
        """Bytes."""


FILE = "pipeline.json"
FILL = 4
"""Micro-batches for each stage where their size is not given: then a pipeline stands idle for less than a fifth."""


@dataclasses.dataclass(frozen=True)
class Link:
    """One stage: the folder of its engine, and what it takes and gives by name."""

    folder: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How values flow.

    Attributes:
        outputs: the model's, in its order.
    """

    links: tuple[Link, ...]
    outputs: tuple[str, ...]

    def write(self, directory: Path) -> None:
        """Writes pipeline.json."""
        (directory / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Plan:
        """Reads pipeline.json."""
        value = json.loads((directory / FILE).read_text())
        links = tuple(Link(v["folder"], tuple(v["inputs"]), tuple(v["outputs"])) for v in value["links"])
        return cls(links, tuple(value["outputs"]))

    def needed(self, number: int) -> frozenset[str]:
        """Names that are still wanted once stage `number` has run: by later stages, or by the caller."""
        later = (name for link in self.links[number + 1 :] for name in link.inputs)
        return frozenset((*later, *self.outputs))


class Cutter:
    """Cuts inputs into micro-batches along the batch axis, and puts outputs together.

    Args:
        rows: of a micro-batch; None for `FILL` micro-batches a stage.
    """

    def __init__(self, signature: Signature, stages: int, rows: int | None) -> None:
        axis = signature.batch_axis
        self._axis = axis
        self._bounds = signature.axes[axis] if axis else None
        self._batched = {spec.name for spec in signature.inputs if spec.shape and spec.shape[0] == axis}
        self._outputs = {spec.name for spec in signature.outputs}
        self._rows, self._pieces = rows, FILL * stages
        self.reason = _whole(signature, axis)

    def sizes(self, batch: int) -> list[int]:
        """Rows of each micro-batch, at least as many as the axis takes."""
        assert self._bounds is not None
        rows = max(self._rows or math.ceil(batch / self._pieces), self._bounds.min)
        full, rest = divmod(batch, rows)
        if full == 0 or rest == 0:
            return [rows] * full or [batch]
        if rest >= self._bounds.min:
            return [*[rows] * full, rest]
        small, more = divmod(batch, full)  # the rest is too small to be alone
        return [small + 1] * more + [small] * (full - more)

    def cut(self, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The inputs of each micro-batch, one after the other; a whole call where it cannot be cut."""
        if self.reason:
            return [inputs]
        batch = len(inputs[next(iter(self._batched))])
        pieces: list[Mapping[str, Any]] = []
        start = 0
        for rows in self.sizes(batch):
            own = {n: v[start : start + rows] if n in self._batched else v for n, v in inputs.items()}
            pieces.append(own)
            start += rows
        return pieces

    def batch(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Rows of a call; 1 where it cannot be cut."""
        return 1 if self.reason else int(shapes[next(iter(self._batched))][0])

    def shape(self, name: str, shape: Sequence[int], rows: int) -> tuple[int, ...]:
        """The shape of an input or output with that many rows, of whatever batch it is."""
        return (rows, *shape[1:]) if self._is_cut(name) else tuple(shape)

    def offset(self, name: str, place: Sized, batch: int, start: int) -> int:
        """Where row `start` of the batch begins in an input or output, in bytes."""
        return place.size_bytes // batch * start if self._is_cut(name) else 0

    def _is_cut(self, name: str) -> bool:
        return not self.reason and (name in self._batched or name in self._outputs)

    @staticmethod
    def join(outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The outputs of the call."""
        if len(outputs) == 1:
            return dict(outputs[0])
        return {name: np.concatenate([piece[name] for piece in outputs]) for name in outputs[0]}

    def require(self) -> None:
        """Raises DataError where micro-batches of a size were asked for, and cannot be had."""
        if self._rows is not None and self.reason:
            raise DataError(
                f"micro_batch={self._rows} cannot be had: {self.reason}", hint="leave it out: a call then flows whole"
            )


def _whole(signature: Signature, axis: str | None) -> str:
    """Why a call cannot be cut; empty where it can."""
    if axis is None:
        return "no input has a dynamic batch axis"
    for spec in signature.outputs:
        if not spec.shape or spec.shape[0] != axis:
            return f"output {spec.name!r} does not have the batch axis first"
        if axis in spec.shape[1:]:
            return f"output {spec.name!r} has the batch axis twice"
    for spec in signature.inputs:
        if axis in spec.shape[1:]:
            return f"input {spec.name!r} has the batch axis elsewhere"
    return ""
