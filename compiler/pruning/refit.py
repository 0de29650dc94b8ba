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
from .padding import unpadded

ROWS = 16384
"""Rows that a layer is fitted on, or eight times its inputs where that is more."""

STAGES = 12
"""How many times the pruned model is run over the data: layers of one stage are fitted on the same run."""

HELD_BYTES = 1 << 29
"""Bytes of moments that are held at a time."""

_PLACES = 256
"""Places of an image that are looked at."""
_TESTED = 2048
"""Rows that are held out."""
_HELD_OUT = 5
"""Every so many-th row is held out, up to that number."""
_DAMPINGS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_TINY = float(np.finfo(np.float32).tiny)


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
        seed: of the places that are looked at.

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
        task = _task(pruned, before[name], after[name], kept, seed)
        if isinstance(task, str):
            refusals.append(Refusal(f"not fitted: {task}", name))
        else:
            tasks.append(task)
    fits: list[Fit] = []
    stages = _stages(tasks)
    for number, stage in enumerate(stages):
        progress(number / len(stages))
        _collect(whole, pruned, stage, samples)
        fits.extend(task.solve(pruned) for task in stage if not task.reason)
        refusals.extend(Refusal(f"not fitted: {task.reason}", task.pruned.name) for task in stage if task.reason)
    return fits, refusals


def _task(graph: Graph, old: ir.Node, new: ir.Node, kept: np.ndarray, seed: int) -> _Task | str:
    whole, pruned = as_layer(old), as_layer(new)
    if whole is None or pruned is None:
        return "it is no Conv, Gemm or MatMul with constant float32 weights"
    if is_shared(pruned.weight):
        return "its weights are shared"
    if whole.groups != pruned.groups:
        return "its groups changed"
    shifts = add_to_bias(graph, pruned, np.zeros(len(pruned.load()), np.float32)) is None
    return _Task(whole, pruned, kept, [seed, zlib.crc32(label(new).encode())], shifts=shifts)


def _stages(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Cuts the layers, in order, into stages of about equal number whose moments fit into memory."""
    share = HELD_BYTES // math.ceil(max(len(tasks), 1) / STAGES)
    named = {task.pruned.name: task for task in tasks}
    lots = chunks({name: max(task.bytes, share) for name, task in named.items()}, HELD_BYTES)
    return [[named[name] for name in lot] for lot in lots]


def _collect(whole: Graph, pruned: Graph, stage: Sequence[_Task], samples: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Runs both graphs, and adds up what the layers read."""
    reads = [[operand(task.nodes[side], 0).name or "" for task in stage] for side in (0, 1)]
    taps = [Tapped(graph, names, optimized=True) for graph, names in zip((whole, pruned), reads, strict=True)]
    for sample in samples:
        found = [tap(sample) for tap in taps]
        for task, *names in zip(stage, *reads, strict=True):
            before, after = (arrays[name] for arrays, name in zip(found, names, strict=True))
            if task.whole.node.op_type != "Conv":
                before, after = unpadded(before, sample), unpadded(after, sample)
            task.add(before, after)
        if all(task.full for task in stage):
            return


class _Task:
    """A layer to fit, with the moments of its inputs in the pruned graph and of its outputs in the whole one."""

    def __init__(self, whole: Layer, pruned: Layer, kept: np.ndarray, seed: Sequence[int], *, shifts: bool) -> None:
        self.whole = whole
        self.pruned = pruned
        self.rows = 0
        self._shifts = shifts
        self._fault = ""
        self._generators = [np.random.default_rng(seed) for _ in range(2)]
        self._tests: list[tuple[np.ndarray, np.ndarray]] = []
        weight = _matrix(whole)
        outputs = kept.reshape(whole.groups, -1) % weight.shape[1]
        self._weight = np.take_along_axis(weight, outputs[:, :, None], axis=1)
        self._moments: list[_Moments] = []

    @property
    def nodes(self) -> tuple[ir.Node, ir.Node]:
        """The layer's node in the whole graph and in the pruned one."""
        return self.whole.node, self.pruned.node

    @property
    def bytes(self) -> int:
        """How many bytes its moments take."""
        groups, out, length = _matrix(self.pruned).shape
        return 8 * int(groups * length * (length + out))

    @property
    def reason(self) -> str:
        """Why it cannot be fitted; empty where it can."""
        few = f"{self.rows} rows of data are too few" if self.rows < _HELD_OUT else ""
        return self._fault or few

    @property
    def full(self) -> bool:
        """Whether it has seen enough."""
        return bool(self._fault) or self.rows >= max(ROWS, 8 * int(_matrix(self.pruned).shape[2]))

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Takes rows of what the layer reads in the whole graph and, at the same places, in the pruned one."""
        if self.full or not before.size:
            return
        axis = self.whole.channel_axis(before.ndim)
        if before.shape[:axis] != after.shape[:axis]:
            self._fault = "other axes of what it reads were pruned too"
            return
        inputs, given = (
            positions(layer, x, generator, _PLACES)
            for layer, x, generator in zip((self.whole, self.pruned), (before, after), self._generators, strict=True)
        )
        inputs, given = (rows.reshape(len(rows), self.whole.groups, -1).transpose(1, 0, 2) for rows in (inputs, given))
        wanted = inputs @ self._weight.transpose(0, 2, 1)
        if not np.isfinite(given).all() or not np.isfinite(wanted).all():
            self._fault = "what it reads or gives on the data is not finite"
            return
        test = (self.rows + np.arange(given.shape[1])) % _HELD_OUT == _HELD_OUT - 1
        test &= self.rows < _TESTED * _HELD_OUT
        self._tests.append((given[:, test], wanted[:, test]))
        if not self._moments:
            self._moments = [_Moments(given.shape[2], wanted.shape[2]) for _ in given]
        for moments, x, y in zip(self._moments, given[:, ~test], wanted[:, ~test], strict=True):
            moments.add(x, y)
        self.rows += given.shape[1]

    def solve(self, graph: Graph) -> Fit:
        """Fits the layer in the graph."""
        x, y = (np.concatenate(arrays, axis=1) for arrays in zip(*self._tests, strict=True))
        old = _matrix(self.pruned)
        solved = [m.solve(old[g], x[g], y[g], shifts=self._shifts) for g, m in enumerate(self._moments)]
        self._moments, self._tests = [], []
        self.pruned.store(np.stack([one.weight for one in solved]).reshape(self.pruned.load().shape))
        if self._shifts:
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


class _Moments:
    """Sums over rows of inputs x (n,) and outputs y (out,)."""

    def __init__(self, length: int, out: int) -> None:
        self._count = 0
        self._x, self._y = np.zeros(length), np.zeros(out)
        self._xx, self._yx = np.zeros((length, length)), np.zeros((out, length))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes rows (rows, n) and (rows, out)."""
        self._count += len(x)
        self._x += x.sum(axis=0)
        self._y += y.sum(axis=0)
        self._xx += x.T @ x
        self._yx += y.T @ x

    def solve(self, old: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, shifts: bool) -> _Solved:
        """Weights (out, n) and, where the layer can have one, a shift (out,): the best on rows that are held out."""
        count = max(self._count, 1)
        mean_x, mean_y = self._x / count * shifts, self._y / count * shifts
        moment = self._xx - count * np.outer(mean_x, mean_x)
        cross = self._yx - count * np.outer(mean_y, mean_x) - old @ moment
        scale = max(float(np.diag(moment).mean()), _TINY)
        candidates = [(old, np.zeros(len(old))), (old, mean_y - old @ mean_x)]
        for damping in _DAMPINGS:
            weight = old + np.linalg.solve(moment + damping * scale * np.eye(len(moment)), cross.T).T
            candidates.append((weight, mean_y - weight @ mean_x))
        errors = [float(np.square(test_y - test_x @ weight.T - shift).sum()) for weight, shift in candidates]
        best = int(np.argmin(errors))
        weight, shift = candidates[best]
        energy = max(float(np.square(test_y - test_y.mean(axis=0)).sum()), _TINY)
        return _Solved(weight.astype(np.float32), shift.astype(np.float32), errors[0], errors[best], energy)


def _matrix(layer: Layer) -> np.ndarray:
    """(groups, out/groups, in/groups x kernel)."""
    weight = layer.load()
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
