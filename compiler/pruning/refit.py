"""Fits the weights that are left so that layers give what they gave before: least squares on calibration data.

For a layer y = W x + b of the whole model and the inputs x' that it gets in the pruned one,

    W', b' = argmin  sum over rows |y - W' x' - b'|^2 + damping |W' - W|^2

with W at the positions that are left. Layers are fitted in the order of the graph, so that each makes up for the errors
of those before it. The damping is chosen on rows that take no part in the fit; where no fit is better there than the
weights as they are, these stay.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.probe import Tapped, chunks
from ..graph.selection import label
from ..quantization.bias import add_to_bias
from ..quantization.hessians import positions
from ..quantization.layers import Layer, as_layer, is_shared, operand

ROWS = 8192
"""Rows that a layer is fitted on, or four times its inputs where that is more."""

STAGES = 12
"""How many times the pruned model is run over the data: layers of one stage are fitted on the same run."""

HELD_BYTES = 1 << 29
"""Bytes of rows that are held at a time."""

_DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 5
"""Every so many-th row takes no part in the fit."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a fit did to a layer: its relative squared error on rows that were held out, before and after."""

    layer: str
    before: float
    after: float

    def record(self) -> dict[str, object]:
        """As JSON."""
        return dataclasses.asdict(self)


def refit(
    whole: Graph,
    pruned: Graph,
    outputs: Mapping[str, np.ndarray],
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[list[Fit], list[Refusal]]:
    """Fits layers of the pruned graph, in place, to what they give in the whole one.

    Args:
        outputs: by the label of each layer to fit, in the order of the graph: which of its outputs are left.
        samples: gone through once for each stage.
        seed: of the positions that are looked at.

    Returns the fits, and the layers that were left with the reason.

    Raises:
        GraphError: ONNX Runtime refuses a graph or the samples.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    before = {label(node): node for node in whole.model.graph}
    after = {label(node): node for node in pruned.model.graph}
    tasks: list[_Task] = []
    refusals: list[Refusal] = []
    for name, kept in outputs.items():
        task = _task(before[name], after[name], kept, seed)
        if isinstance(task, str):
            refusals.append(Refusal(f"not fitted: {task}", name))
        else:
            tasks.append(task)
    fits: list[Fit] = []
    stages = _stages(tasks)
    for number, stage in enumerate(stages):
        progress(number / len(stages))
        _collect(whole, pruned, stage, samples)
        fits.extend(task.solve(pruned) for task in stage if task.rows)
    return fits, refusals


def _task(old: ir.Node, new: ir.Node, kept: np.ndarray, seed: int) -> _Task | str:
    whole, pruned = as_layer(old), as_layer(new)
    if whole is None or pruned is None:
        return "it is no layer with constant float weights"
    if is_shared(pruned.weight):
        return "its weights are shared"
    if whole.groups != pruned.groups:
        return "its groups changed"
    return _Task(whole, pruned, kept, [seed, zlib.crc32(label(new).encode())])


def _stages(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Cuts the layers, in order, into stages of about equal number whose rows fit into memory."""
    most = math.ceil(len(tasks) / STAGES)
    cost = {task.pruned.name: max(task.bytes, HELD_BYTES // max(most, 1)) for task in tasks}
    named = {task.pruned.name: task for task in tasks}
    return [[named[name] for name in lot] for lot in chunks(cost, HELD_BYTES)]


def _collect(whole: Graph, pruned: Graph, stage: Sequence[_Task], samples: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Runs both graphs, and keeps rows of what the layers read."""
    taps = [Tapped(graph, [operand(n, 0).name or "" for n in nodes], optimized=True) for graph, nodes in (
        (whole, [task.whole.node for task in stage]),
        (pruned, [task.pruned.node for task in stage]),
    )]  # fmt: skip
    for sample in samples:
        found = [tap(sample) for tap in taps]
        for task in stage:
            task.add(*(found[side][operand(node, 0).name or ""] for side, node in enumerate(task.nodes)))
        if all(task.full for task in stage):
            return


class _Task:
    """A layer to fit, with rows of its inputs in both graphs."""

    def __init__(self, whole: Layer, pruned: Layer, kept: np.ndarray, seed: Sequence[int]) -> None:
        self.whole = whole
        self.pruned = pruned
        self.rows = 0
        self._generators = [np.random.default_rng(seed) for _ in range(2)]
        self._wanted: list[np.ndarray] = []
        self._given: list[np.ndarray] = []
        weight = _matrix(whole)
        outputs = kept.reshape(whole.groups, -1) % weight.shape[1]
        self._weight = np.take_along_axis(weight, outputs[:, :, None], axis=1)

    @property
    def nodes(self) -> tuple[ir.Node, ir.Node]:
        """The layer's node in the whole graph and in the pruned one."""
        return self.whole.node, self.pruned.node

    @property
    def most(self) -> int:
        """How many rows it wants."""
        return max(ROWS, 4 * math.prod(self.pruned.load().shape[1:]))

    @property
    def bytes(self) -> int:
        """How many bytes these take."""
        shape: tuple[int, ...] = self.pruned.load().shape
        return 4 * self.most * (self.pruned.groups * math.prod(shape[1:]) + shape[0])

    @property
    def full(self) -> bool:
        """Whether it has seen enough."""
        return self.rows >= self.most

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Takes rows of what the layer reads in the whole graph and, at the same places, in the pruned one."""
        if self.full or not before.size:
            return
        inputs = positions(self.whole, before, self._generators[0])
        grouped = inputs.reshape(len(inputs), self.whole.groups, -1)
        outputs = np.einsum("rgi,goi->rgo", grouped, self._weight, optimize=True)
        self._wanted.append(outputs)
        given = positions(self.pruned, after, self._generators[1])
        self._given.append(given.reshape(len(given), self.pruned.groups, -1))
        self.rows += len(given)

    def solve(self, graph: Graph) -> Fit:
        """Fits the layer in the graph."""
        wanted, given = np.concatenate(self._wanted), np.concatenate(self._given)
        self._wanted, self._given = [], []
        old = _matrix(self.pruned)
        shifts = add_to_bias(graph, self.pruned, np.zeros(old.shape[0] * old.shape[1], np.float32)) is None
        solved = [_solve(given[:, g], wanted[:, g], old[g], shifts=shifts) for g in range(len(old))]
        self.pruned.store(np.stack([one.weight for one in solved]).reshape(self.pruned.load().shape))
        if shifts:
            add_to_bias(graph, self.pruned, np.concatenate([one.shift for one in solved]))
        before, after, energy = (sum(getattr(one, key) for one in solved) for key in ("before", "after", "energy"))
        return Fit(self.pruned.name, before / energy, after / energy)


@dataclasses.dataclass(frozen=True)
class _Solved:
    weight: np.ndarray
    shift: np.ndarray
    before: float
    after: float
    energy: float


def _solve(given: np.ndarray, wanted: np.ndarray, old: np.ndarray, *, shifts: bool) -> _Solved:
    """Weights (out, n) and, where the layer can have one, a shift (out,) from inputs (rows, n) and outputs (rows, out)."""
    held = np.arange(len(given)) % _HELD_OUT == _HELD_OUT - 1
    x, y = given[~held].astype(np.float64), wanted[~held].astype(np.float64)
    test_x, test_y = (given[held], wanted[held]) if held.any() else (x, y)
    mean_x, mean_y = x.mean(axis=0) * shifts, y.mean(axis=0) * shifts
    centred = x - mean_x
    residual = (y - mean_y) - centred @ old.T
    moment, cross = centred.T @ centred, residual.T @ centred
    scale = max(float(np.diag(moment).mean()), float(np.finfo(np.float32).tiny))
    energy = float(np.square(test_y - test_y.mean(axis=0)).sum()) or float(np.finfo(np.float32).tiny)

    def error(weight: np.ndarray, shift: np.ndarray) -> float:
        return float(np.square(test_y - test_x @ weight.T - shift).sum())

    zero = np.zeros(len(old))
    candidates = [(old, zero), (old, mean_y - old @ mean_x)]
    for damping in _DAMPINGS:
        damped = moment + damping * scale * np.eye(len(moment))
        weight = old + np.linalg.solve(damped, cross.T).T
        candidates.append((weight, mean_y - weight @ mean_x))
    errors = [error(*candidate) for candidate in candidates]
    best = int(np.argmin(errors))
    weight, shift = candidates[best]
    return _Solved(weight.astype(np.float32), shift.astype(np.float32), errors[0], errors[best], energy)


def _matrix(layer: Layer) -> np.ndarray:
    """(groups, out/groups, in/groups x kernel)."""
    weight = layer.load()
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
