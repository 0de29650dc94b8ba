"""Puts one node in the place of each pattern. The value that a pattern gives keeps its name."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.schemas import MICROSOFT
from ..graph.selection import label
from ..quantization.patch import Attributes, Patch, Patcher
from .attending import Attending, Form
from .attention import attention
from .gelu import Gelu, gelu
from .gemms import biased, split
from .liveness import outlives
from .lookups import Lookup, lookup
from .normalization import Normalization, Skip, normalization, rms_skip, skip
from .patterns import pairs, producer, rank, size

Found = TypeVar("Found")

_CONTRIBUTED = {"exact": "Gelu", "tanh": "FastGelu", "sigmoid": "QuickGelu"}
_BIASED = {"exact": "BiasGelu", "tanh": "FastGelu"}


@dataclasses.dataclass(frozen=True)
class Operators:
    """Which fused operators a runtime is given.

    Attributes:
        attention: what the operator of a whole attention takes; None where there is none.
        gelu: ONNX's own operator, or those of ONNX Runtime; None where the runtime finds GELU itself.
        bias_gelu, skip, rms_skip: whether the sum before GELU, LayerNormalization and RMSNorm goes into them.
    """

    attention: Form | None = None
    gelu: Literal["onnx", "microsoft"] | None = None
    bias_gelu: bool = False
    skip: bool = False
    rms_skip: bool = False


@dataclasses.dataclass(frozen=True)
class Region:
    """What was fused: its kind, the node it goes by, and the tensor that it gives, the same before and after."""

    kind: str
    node: str
    tensor: str


class Fuser:
    """Rewrites a flat graph.

    Args:
        left_out: tensors of regions that stay as they are.

    Attributes:
        regions: what was fused.
        refusals: what was not, though it looks alike.
    """

    def __init__(self, graph: Graph, operators: Operators, left_out: Collection[str] = ()) -> None:
        self.regions: list[Region] = []
        self.refusals: list[Refusal] = []
        self._graph = graph
        self._main = graph.model.graph
        self._operators = operators
        self._left_out = frozenset(left_out)
        self._patcher = Patcher(graph)

    @property
    def changes(self) -> dict[str, int]:
        """Regions by kind."""
        return dict(collections.Counter(f"{region.kind} fused" for region in self.regions))

    def run(self) -> None:
        """Fuses all that the operators allow."""
        self._lookups()
        self._normalizations()
        self._biases()
        self._gelus()
        self._attentions()
        self._skips()
        if self.regions:
            self._main.sort()

    def _patch(self, kind: str, result: ir.Value, node: ir.Node) -> Patch | None:
        """Begins to replace a region, named by `node`; None where it is to stay."""
        last, name = result.producer(), result.name or ""
        if last is None or name in self._left_out:
            return None
        self.regions.append(Region(kind, label(node), name))
        return Patch(self._patcher, last)

    def _found(self, match: Callable[[ir.Node], Found | None]) -> Iterator[Found]:
        """Matches, each looked for when those before have been replaced."""
        for node in list(self._main):
            if node.graph is not None and (found := match(node)) is not None:
                yield found

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self.refusals.append(Refusal(reason, label(node)))

    def _single(
        self,
        patch: Patch,
        operator: str,
        inputs: Sequence[ir.Value],
        result: ir.Value,
        attributes: Attributes,
        domain: str = "",
    ) -> None:
        """Replaces a region by one node."""
        output = (f"{patch.title}/fused", result.dtype or ir.DataType.FLOAT, result.shape)
        patch.apply(*patch.add(operator, inputs, [output], attributes, domain=domain, main=True))

    def _lookups(self) -> None:
        for found in self._found(lookup) if self._graph.opset >= 13 else ():  # before, axes are attributes
            if (patch := self._patch("mask lookup", found.node.outputs[0], found.node)) is not None:
                self._read(patch, found)

    def _read(self, patch: Patch, found: Lookup) -> None:
        result, values = found.node.outputs[0], found.mask
        dtype = found.mask.dtype or ir.DataType.BOOL
        if found.keys is not None:
            keys = self._patcher.initializer(f"{patch.title}/keys", found.keys)
            shape = None if found.mask.shape is None else ir.Shape((found.mask.shape[0], len(found.keys)))
            (values,) = patch.add("Gather", [values, keys], [(f"{patch.title}/read", dtype, shape)], {"axis": 1})
        axes = self._patcher.initializer(f"{patch.title}/axes", np.array([1, 2]))
        self._single(patch, "Unsqueeze", [values, axes], result, {})

    def _normalizations(self) -> None:
        for norm in self._found(normalization):
            if self._graph.opset < 17:
                self._refuse(norm.node, f"opset {self._graph.opset} has no LayerNormalization; opset 17 is the first")
            elif (patch := self._patch("LayerNormalization", norm.result, norm.node)) is not None:
                self._normalize(patch, norm)

    def _normalize(self, patch: Patch, norm: Normalization) -> None:
        scale = norm.scale
        if scale is None:
            dtype = (norm.x.dtype or ir.DataType.FLOAT).numpy()
            scale = self._patcher.initializer(f"{patch.title}/scale", np.ones(norm.length, dtype))
        inputs = [norm.x, scale, *([norm.bias] if norm.bias is not None else [])]
        attributes: Attributes = {"axis": -1, "epsilon": norm.epsilon}
        self._single(patch, "LayerNormalization", inputs, norm.result, attributes)

    def _biases(self) -> None:
        """No regions of their own: what they give goes up in the regions that take the bias."""
        if self._operators.bias_gelu and self._operators.skip:
            for found in self._found(biased):
                split(self._patcher, Patch(self._patcher, found.last), found)

    def _gelus(self) -> None:
        if self._operators.gelu is None:
            return
        for found in self._found(gelu):
            bias = self._bias_of(found)
            if found.node.op_type == "Gelu" and bias is None:
                continue
            if (reason := self._why_no_gelu(found)) is not None:
                self._refuse(found.node, reason)
            elif (patch := self._patch("GELU", found.result, found.node)) is not None:
                self._activate(patch, found, bias)

    def _why_no_gelu(self, gelu: Gelu) -> str | None:
        if self._operators.gelu == "microsoft":
            return None
        if gelu.form == "sigmoid":
            return "ONNX has no operator for x * sigmoid(a * x)"
        return f"opset {self._graph.opset} has no Gelu; opset 20 is the first" if self._graph.opset < 20 else None

    def _activate(self, patch: Patch, gelu: Gelu, bias: tuple[ir.Value, ir.Value] | None) -> None:
        if bias is not None:
            self._single(patch, _BIASED[gelu.form], bias, gelu.result, {}, MICROSOFT)
        elif self._operators.gelu == "microsoft":
            attributes: Attributes = {"alpha": gelu.alpha} if gelu.form == "sigmoid" else {}
            self._single(patch, _CONTRIBUTED[gelu.form], [gelu.x], gelu.result, attributes, MICROSOFT)
        else:
            attributes = {"approximate": "tanh" if gelu.form == "tanh" else "none"}
            self._single(patch, "Gelu", [gelu.x], gelu.result, attributes)

    def _bias_of(self, gelu: Gelu) -> tuple[ir.Value, ir.Value] | None:
        """The value and the constant vector whose sum goes to a GELU alone."""
        if not self._operators.bias_gelu or gelu.form not in _BIASED or outlives([gelu.x], gelu.result):
            return None
        for value, bias in pairs(producer(gelu.x, "Add")):
            if is_constant(bias) and rank(bias) == 1 and size(bias, 0) == size(value, -1):
                return value, bias
        return None

    def _attentions(self) -> None:
        if self._operators.attention is None:
            return
        attending = Attending(self._patcher, self._operators.attention)
        for node in list(self._main):
            axes = rank(node.outputs[0])
            if node.op_type != "Softmax" or node.domain or axes not in (3, 4):
                continue
            found = attention(node)
            reason = found if isinstance(found, str) else attending.why_not(found)
            if isinstance(found, str) or reason:
                if axes == 4:  # of three axes, probabilities of classes are more common
                    self._refuse(node, f"no attention to fuse: {reason}")
            elif (patch := self._patch("attention", found.result, node)) is not None:
                attending.apply(patch, found)

    def _skips(self) -> None:
        kinds = (
            (self._operators.skip, "sum and LayerNormalization", skip),
            (self._operators.rms_skip, "sum and RMSNorm", rms_skip),
        )
        for wanted, kind, match in kinds:
            for found in self._found(match) if wanted else ():
                if (patch := self._patch(kind, found.result, found.node)) is not None:
                    self._skip(patch, found)

    def _skip(self, patch: Patch, found: Skip) -> None:
        result = found.result
        inputs: list[ir.Value | None] = [found.x, found.skip, *found.weights, found.bias]
        while inputs[-1] is None:
            inputs.pop()
        dtype = result.dtype or ir.DataType.FLOAT
        names = ("fused",) if found.total is None else ("fused", "mean", "deviation", "sum")
        outputs = [(f"{patch.title}/{name}", dtype, result.shape) for name in names]
        attributes: Attributes = {"epsilon": found.epsilon}
        fused, *others = patch.add(found.operator, inputs, outputs, attributes, domain=MICROSOFT, main=True)
        for left_out in others[:2]:
            left_out.name = ""
        patch.apply(fused)
        if found.total is not None:
            name, total = found.total.name, others[-1]
            found.total.replace_all_uses_with(total, replace_graph_outputs=True)
            found.total.name = self._patcher.name(f"{name}/unfused")
            total.name = name
