"""Fuses what transformers are made of: attention, GELU, LayerNormalization, and the sums before these.

    Softmax(scale * q k^T + mask) v     ->  com.microsoft.MultiHeadAttention(q, k, v, mask), or Attention(x, weights);
                                            ONNX's own Attention(q, k, v, mask) from opset 23 on
    x / 2 * (1 + erf(x / sqrt(2)))      ->  Gelu, and by tanh FastGelu, by a sigmoid QuickGelu, after a bias BiasGelu
    d / sqrt(mean(d**2) + e) * g + b    ->  LayerNormalization, after a sum SkipLayerNormalization
    s / sqrt(mean(s**2) + e) * g        ->  RMSNorm of a sum s: SkipSimplifiedLayerNormalization
    GatherND(mask, rows and keys)       ->  the mask itself, or Gather of some keys

What is added to the scores may be of any form: masks, biases of relative positions (T5), linear biases of each head
(ALiBi). Queries may be of another text than keys and values, which is attention across (BART, Whisper). Masks of
padding are read by transformers at numbers of rows, which a runtime counts on the host where a batch may be of any
size, so that there can be no CUDA graph.

What a scheme fuses is what its runtime computes faster so and does not find itself. TensorRT makes one kernel of ONNX's
Attention, in half precision, for which the opset is raised; in an older one it is left to find attention by itself.
ONNX Runtime's CPU fuses GELU by itself, takes longer for SkipLayerNormalization than for the sum and the normalization
(for RMSNorm it does not), and gains nothing by Attention, whose weights are not quantized. It is for a graph in
float32, before that is lowered: in a quantized one rounding moves values to other steps.

Every region is checked on a sample of the data, or on random inputs: where the tensor that it gives changes by more
than rounding, it stays as it was, and the refusal says by how much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from ..compiler.fusion.attending import OPSET
from ..compiler.fusion.check import Check
from ..compiler.fusion.fuser import Fuser, Operators
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.equality import inputs_at_two_sizes
from .base import Context, Pass, PassResult
from .opset import Opset

SCHEMES: Mapping[str, Operators] = {
    "onnx": Operators(attention="onnx", gelu="onnx"),
    "tensorrt": Operators(attention="onnx", gelu="onnx"),
    "onnxruntime-cpu": Operators(attention="operands", rms_skip=True),
    "onnxruntime-cuda": Operators(attention="weights", gelu="microsoft", bias_gelu=True, skip=True, rms_skip=True),
}


@dataclasses.dataclass(frozen=True)
class FuseTransformer(Pass):
    """Fuses attention, GELU and normalizations into single nodes, each checked numerically.

    Attributes:
        scheme: whose operators; onnx has those of ONNX itself alone, of the graph's opset, which every runtime takes.
    """

    name: ClassVar[str] = "fuse-transformer"
    scheme: Literal["onnx", "tensorrt", "onnxruntime-cpu", "onnxruntime-cuda"] = "onnxruntime-cpu"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Fuses in place; what the check refuses stays."""
        operators = SCHEMES[self.scheme]
        work = flattened(graph)
        raised = Opset(least=OPSET).apply(work, context) if self.scheme == "tensorrt" else None
        check = Check(work, lambda made, left_out: Fuser(made, operators, left_out), list(inputs_at_two_sizes(context)))
        result = check.apply(graph, {"scheme": self.scheme})
        return result if raised is None else dataclasses.replace(result, refusals=(*raised.refusals, *result.refusals))
