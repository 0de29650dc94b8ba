"""Second moments of what layers read, H = sum x x^T over positions of the data: the Hessian of their squared error.

Tokens that only fill a batch up count like the others: data without such filling serves better.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..graph import Graph
from ..graph.probe import Tapped, chunks, sizes
from .layers import Layer, operand

POSITIONS = 32
"""Positions (tokens, places in an image) that are looked at in each item of a batch."""

ROWS = 8192
"""Positions after which a layer has seen enough, or twice its inputs where that is more."""

BUDGET_BYTES = 1 << 29
"""Bytes of Hessians and of tensors that lead to them in one pass over the data; at least one layer is in a pass."""


def hessians(
    graph: Graph, layers: Sequence[Layer], samples: Iterable[Mapping[str, np.ndarray]], *, seed: int = 0
) -> Iterator[tuple[list[Layer], np.ndarray]]:
    """Yields layers that read the same, with their Hessian (groups, n, n), n = in/groups x kernel.

    As many Hessians are held at once as `BUDGET_BYTES` has room for; the data is gone through for each lot of them.

    Raises:
        GraphError: ONNX Runtime refuses the graph or the samples.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    alike: dict[str, list[Layer]] = {}
    for layer in layers:
        alike.setdefault(_key(layer), []).append(layer)
    read = {key: operand(group[0].node, 0).name or "" for key, group in alike.items()}
    first = next(iter(samples), None)
    if first is None or not alike:
        return
    taken = sizes(graph, read.values(), first)
    cost = {key: 8 * _shape(group[0])[0] * _shape(group[0])[1] ** 2 + taken[read[key]] for key, group in alike.items()}
    for lot in chunks(cost, BUDGET_BYTES):
        sums = {key: _Sum(alike[key][0], [seed, zlib.crc32(key.encode())]) for key in lot}
        tapped = Tapped(graph, [read[key] for key in lot], optimized=True)
        for sample in samples:
            found = tapped(sample)
            for key in lot:
                sums[key].add(found[read[key]])
            if all(one.full for one in sums.values()):
                break
        for key in lot:
            yield alike[key], sums.pop(key).total


class _Sum:
    """The Hessian of one layer, added up batch by batch."""

    def __init__(self, layer: Layer, seed: list[int]) -> None:
        groups, length = _shape(layer)
        self.total = np.zeros((groups, length, length), np.float32)
        self.full = False
        self._layer = layer
        self._rows = 0
        self._generator = np.random.default_rng(seed)

    def add(self, x: np.ndarray) -> None:
        if self.full or not x.size:
            return
        rows = positions(self._layer, x, self._generator)
        grouped = rows.reshape(len(rows), len(self.total), -1).transpose(1, 0, 2)
        self.total += grouped.transpose(0, 2, 1) @ grouped
        self._rows += len(rows)
        self.full = self._rows >= max(ROWS, 2 * self.total.shape[1])


def positions(layer: Layer, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What the layer reads (rows, in x kernel) at positions that are drawn from a batch."""
    return inputs_at(layer, x, drawn(layer, x, generator, POSITIONS))


def drawn(layer: Layer, x: np.ndarray, generator: np.random.Generator, each: int) -> np.ndarray:
    """Positions (rows,) of the layer's output, its channels left out, for a batch: up to `each` of an item."""
    if layer.node.op_type != "Conv":
        count = math.prod(x.shape[:-1])
    else:
        count = len(x) * math.prod(_windows(layer, x).shape[2 : x.ndim])
    wanted = min(count, each * len(x))
    return np.arange(count) if wanted >= count else generator.choice(count, wanted, replace=False)


def inputs_at(layer: Layer, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What the layer reads (rows, in x kernel) at positions, in the order of the weights: channels, then the kernel."""
    if layer.node.op_type != "Conv":
        return np.asarray(x.reshape(-1, x.shape[-1])[chosen])
    windows = _windows(layer, x)
    place = np.unravel_index(chosen, (len(x), *windows.shape[2 : x.ndim]))
    seen = np.moveaxis(windows, 1, x.ndim - 1)[place]  # without the move, NumPy would put channels where it likes
    return np.ascontiguousarray(seen).reshape(len(chosen), -1)


def outputs_at(layer: Layer, y: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What the layer gives (rows, out), or another tensor of that shape, at positions."""
    last = y if layer.node.op_type != "Conv" else np.moveaxis(y, 1, -1)
    return np.asarray(last.reshape(-1, last.shape[-1])[chosen])


def _windows(layer: Layer, x: np.ndarray) -> np.ndarray:
    """What the kernel sees at each output position: (N, in, *out, *kernel), a view of the padded input."""
    kernel = layer.load().shape[2:]
    axes = len(kernel)
    attributes = layer.node.attributes
    strides = list(attributes.get_ints("strides", [1] * axes))
    dilations = list(attributes.get_ints("dilations", [1] * axes))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(layer, x.shape[2:], spans, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + axes)))
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    return view[(slice(None), slice(None), *steps)]


def _pads(layer: Layer, size: Sequence[int], spans: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    attributes = layer.node.attributes
    mode = attributes.get_string("auto_pad", "NOTSET")
    axes = len(size)
    if mode in ("NOTSET", "VALID"):
        given = list(attributes.get_ints("pads", [0] * 2 * axes)) if mode == "NOTSET" else [0] * 2 * axes
        return list(zip(given[:axes], given[axes:], strict=True))
    whole = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, spans, strides, strict=True)]
    upper = mode == "SAME_UPPER"
    return [(w // 2, w - w // 2) if upper else (w - w // 2, w // 2) for w in whole]


def _shape(layer: Layer) -> tuple[int, int]:
    """Groups, and inputs of each."""
    return layer.groups, math.prod(layer.load().shape[1:])


def _key(layer: Layer) -> str:
    """Equal for layers that read the same numbers at the same positions."""
    geometry = ""
    if layer.node.op_type == "Conv":
        given: Mapping[str, object] = {k: a.value for k, a in sorted(layer.node.attributes.items())}
        geometry = f" {given} {layer.load().shape[2:]}"
    return f"{operand(layer.node, 0).name}{geometry}"
