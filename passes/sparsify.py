"""Zeroes two of each four weights, so that sparse Tensor Cores skip them.

    y = W x     ->     y = W' x,  of W'[o, 4 g : 4 g + 4] two at most are not zero

Groups of four lie along the inputs: the channels of a Conv at each place of its kernel, K of Gemm and MatMul. What the
target cannot run sparse stays dense, see `compiler.sparsity.eligible`; so does what is sparse already, or quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler.calibration import Calibration
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.selection import select
from ..compiler.quantization.hessians import hessians
from ..compiler.quantization.layers import Layer
from ..compiler.sparsity.eligible import eligible
from ..compiler.sparsity.methods import METHODS, Method, Sparse, sparsified
from .base import Context, Pass, PassResult, Refusal


@dataclasses.dataclass(frozen=True)
class Sparsify(Pass):
    """Makes the weights of convolutions and products sparse, in float32 and before anything is quantized.

    Attributes:
        pattern: two of each four weights in a row stay.
        method: how they are chosen, see `compiler.sparsity.methods`. None: the one of the least error on the
            calibration data for each layer, and "magnitude" where there are none.
        keep: names or globs of nodes that stay dense.
    """

    name: ClassVar[str] = "sparsify"
    pattern: Literal["2:4"] = "2:4"
    method: Method | None = None
    keep: tuple[str, ...] = ()

    @property
    def calibrates(self) -> bool:
        """For the methods that look at what weights are multiplied with."""
        return self.method in ("sparsegpt", "wanda")

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Makes weights sparse in place.

        Raises:
            RecipeError: `keep` has a pattern that matches no node, or `method` needs calibration and there is none.
            GraphError: the data does not run through the graph.
            TargetUnavailableError: something has to be computed and ONNX Runtime is not installed.
        """
        calibration = context.calibration
        if self.calibrates:
            why = "to see what weights are multiplied with"
            calibration = context.require_calibration(f"method={self.method}", why)
        work = flattened(graph)
        layers, refusals = eligible(work, select(work, self.keep))
        if not layers:
            return PassResult(modified=False, refusals=tuple(refusals))
        methods = METHODS if self.method is None else (self.method,)
        if calibration is None and self.method is None:
            refusals.append(Refusal("chosen by magnitude, without calibration data that say what weights matter"))
        rows: list[dict[str, Any]] = []
        for alike, hessian in _with_hessians(work, layers, calibration if methods != ("magnitude",) else None):
            context.progress(len(rows) / len(layers), alike[0].name)
            dense = alike[0].load()
            found = sparsified(dense, hessian, methods)
            alike[0].store(found.weight)
            rows += [_row(layer, dense, found) for layer in alike]
        order = {layer.name: place for place, layer in enumerate(layers)}
        rows.sort(key=lambda row: order[row["layer"]])
        RemoveUnusedNodesPass()(work.model)
        graph.model = work.model
        zeroed = sum({layer.weight: row["zeroed"] for layer, row in zip(layers, rows, strict=True)}.values())
        changes = {"layers made sparse": len(layers), "weights zeroed": zeroed}
        return PassResult(modified=True, changes=changes, refusals=tuple(refusals), details={"sparse": rows})


def _with_hessians(
    graph: Graph, layers: Sequence[Layer], calibration: Calibration | None
) -> Iterator[tuple[list[Layer], np.ndarray | None]]:
    """Layers of one weight, with the Hessian over all that they read; None without calibration."""
    sharing: dict[Any, list[Layer]] = {}
    for layer in layers:
        sharing.setdefault(layer.weight, []).append(layer)
    if calibration is None:
        yield from ((alike, None) for alike in sharing.values())
        return
    waiting = {weight: len(alike) for weight, alike in sharing.items()}
    sums: dict[Any, np.ndarray] = {}
    # Weights change while the data is gone through again: the copy keeps the dense ones.
    for read, hessian in hessians(graph.clone(), layers, calibration.limited()):
        for layer in read:
            weight = layer.weight
            sums[weight] = sums[weight] + hessian[0] if weight in sums else hessian[0]
            waiting[weight] -= 1
            if not waiting[weight]:
                yield sharing[weight], sums.pop(weight)


def _row(layer: Layer, dense: np.ndarray, found: Sparse) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "operator": layer.node.op_type,
        "method": found.method,
        "outputs": dense.shape[0],
        "inputs": dense.shape[1],
        "zeroed": int(np.count_nonzero(dense) - np.count_nonzero(found.weight)),
        "weight_error": found.weight_error,
        "output_error": found.output_error,
    }
