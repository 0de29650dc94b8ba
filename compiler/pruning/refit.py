"""Fits the weights that are left so that layers give what they gave before: least squares on calibration data.

For a layer y = W x + b of the whole model and the inputs x' that it gets in the pruned one,

    W', b' = argmin  sum over rows |y - W' x' - b'|^2 + damping |W' - W|^2

with W at the positions that are left. Layers are fitted in the order of the graph, so that each makes up for the errors
of those before it. Where y is added to something else, as at the end of a residual branch, the sum is what counts: the
error of the other term, s - s', is added to y. The damping is chosen on rows that take no part in the fit; where no fit
is better there than the weights as they are, these stay.
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
from ..quantization.hessians import drawn, inputs_at, outputs_at
from ..quantization.layers import Layer, as_layer, is_shared, operand
from .least_squares import Moments
from .padding import unpadded
from .sums import other_term

ROWS = 16384
"""Rows that a layer is fitted on, or eight times its inputs where that is more."""

STAGES = 12
"""About how many times the pruned model is run over the data: layers of one stage are fitted on the same run."""

HELD_BYTES = 1 << 29
"""Bytes of moments that are held at a time."""

_PLACES = 256
"""Places of an image that are looked at."""
_TESTED = 2048
"""Rows that are held out."""
_HELD_OUT = 5
"""Every so many-th row is held out, up to that number."""


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
    terms = other_term(old), other_term(new)
    task = _Task(whole, pruned, kept, [seed, zlib.crc32(label(new).encode())], shifts=shifts)
    if terms[0] is not None and terms[1] is not None:
        task.terms = terms[0].name or "", terms[1].name or ""
    return task


def _stages(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Cuts the layers, in order, into stages of about equal number whose moments fit into memory.

    The end of a residual branch is a stage of its own: it makes up for what is before it, and what is behind it for it.
    """
    share = HELD_BYTES // math.ceil(max(len(tasks), 1) / STAGES)
    named = {task.pruned.name: task for task in tasks}
    lots = chunks({name: HELD_BYTES if t.terms else max(t.bytes, share) for name, t in named.items()}, HELD_BYTES)
    return [[named[name] for name in lot] for lot in lots]


def _collect(whole: Graph, pruned: Graph, stage: Sequence[_Task], samples: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Runs both graphs, and adds up what the layers read."""
    taps = [
        Tapped(graph, [name for task in stage for name in task.names(side)], optimized=True)
        for side, graph in enumerate((whole, pruned))
    ]
    for sample in samples:
        found = [tap(sample) for tap in taps]
        for task in stage:
            arrays = [[found[side][name] for name in task.names(side)] for side in (0, 1)]
            if task.whole.node.op_type != "Conv":
                arrays = [[unpadded(array, sample) for array in side] for side in arrays]
            task.add(*arrays)
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
        self.terms: tuple[str, str] | None = None
        """What the layer's result is added to, in the whole graph and in the pruned one."""
        self._kept = kept
        self._generator = np.random.default_rng(seed)
        self._tests: list[tuple[np.ndarray, np.ndarray]] = []
        weight = _matrix(whole)
        outputs = kept.reshape(whole.groups, -1) % weight.shape[1]
        self._weight = np.take_along_axis(weight, outputs[:, :, None], axis=1)
        self._moments: list[Moments] = []

    def names(self, side: int) -> list[str]:
        """The tensors to look at: what the layer reads and, where there is such, the other term of a sum."""
        node = (self.whole, self.pruned)[side].node
        return [operand(node, 0).name or "", *(self.terms[side : side + 1] if self.terms else ())]

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

    def add(self, whole: Sequence[np.ndarray], pruned: Sequence[np.ndarray]) -> None:
        """Takes rows of what `names` tell in the whole graph and, at the same places, in the pruned one."""
        before, after = whole[0], pruned[0]
        if self.full or not before.size:
            return
        axis = self.whole.channel_axis(before.ndim)
        if before.shape[:axis] != after.shape[:axis]:
            self._fault = "other axes of what it reads were pruned too"
            return
        chosen = drawn(self.whole, before, self._generator, _PLACES)
        inputs = self._grouped(inputs_at(self.whole, before, chosen))
        given = self._grouped(inputs_at(self.pruned, after, chosen))
        wanted = inputs @ self._weight.transpose(0, 2, 1)
        if self.terms:
            terms = outputs_at(self.whole, whole[1], chosen)[:, self._kept], outputs_at(self.pruned, pruned[1], chosen)
            wanted = wanted + self._grouped(terms[0] - terms[1])
        if not np.isfinite(given).all() or not np.isfinite(wanted).all():
            self._fault = "what it reads or gives on the data is not finite"
            return
        test = (self.rows + np.arange(given.shape[1])) % _HELD_OUT == _HELD_OUT - 1
        test &= self.rows < _TESTED * _HELD_OUT
        self._tests.append((given[:, test], wanted[:, test]))
        if not self._moments:
            self._moments = [Moments(given.shape[2], wanted.shape[2]) for _ in given]
        for moments, x, y in zip(self._moments, given[:, ~test], wanted[:, ~test], strict=True):
            moments.add(x, y)
        self.rows += given.shape[1]

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        """(groups, rows, n) of (rows, groups x n)."""
        return rows.reshape(len(rows), self.whole.groups, -1).transpose(1, 0, 2)

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


def _matrix(layer: Layer) -> np.ndarray:
    """(groups, out/groups, in/groups x kernel)."""
    weight = layer.load()
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
