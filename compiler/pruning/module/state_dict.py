"""The weights of a pruned graph as a state_dict of the torch module that it was captured from, cut to what is left.

A BatchNorm that was folded into the layer before it is unfolded: of W' and b', the fitted ones,

    f = gamma / sqrt(var + eps)      weight = W' / f      running_mean = bias + (beta - b') / f

with gamma, beta, var and the layer's own bias cut, so that the module gives what the graph does. All tensors of the
state_dict are found in the graph, or nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ....passes.base import Kept, Refusal
from ...graph import Graph
from ...graph.editing import flattened
from ...graph.selection import label
from ...quantization.layers import constant, operand
from ...signature import Signature
from ...sources.flat import FlatModule
from .calls import watch
from .gradients import unused
from .matching import match
from .parameters import LayerMatch, Match, Parameters, arrays, bias_place, epsilon, factor
from .rebuild import RELATIVE_L2, difference, rebuilt
from .recurrent import RecurrentMatch
from .sizes import changed_sizes

FORMAT = 1
"""Version of the layout of mapping.json."""

WEIGHTS, MAPPING = "weights.safetensors", "mapping.json"


class PrunedState:
    """The state_dict of a module as a pruned graph has it.

    Args:
        module: the user's, whole.
        found: where its tensors stand in the whole graph.
        pruned: the graph, whose nodes have the names that they had.
        kept: the positions that are left of its constants.

    Attributes:
        state: the tensors by name.
        refusals: tensors that cannot be told, with the reason; where there are any, `state` is not to be used.
    """

    def __init__(self, module: torch.nn.Module, found: Parameters, pruned: Graph, kept: Kept) -> None:
        self.refusals = [Refusal(reason, key) for key, reason in found.missing.items()]
        self._whole = dict(module.state_dict())
        self._values = arrays(module)
        self._parts = dict(module.named_modules())
        self._nodes = {label(node): node for node in pruned.model.graph}
        self._kept = kept
        self._new: dict[str, np.ndarray] = {}
        self._positions: dict[str, dict[int, np.ndarray]] = {}
        self._groups: dict[str, int] = {}
        self._added: list[str] = []
        self._difference: float | str = "it was not run"
        for single in found.singles:
            self._set(single.key, *self._cut(single))
        for layer in found.layers:
            self._layer(layer)
        for recurrent in found.recurrent:
            self._recurrent(recurrent)
        self.state = {key: self._tensor(key) for key in (*self._whole, *self._added) if self._is_tensor(key)}
        self._check_tied()

    def compare(self, flat: FlatModule, pruned: Graph, signature: Signature, sample: Mapping[str, np.ndarray]) -> None:
        """Runs the module with the new sizes and weights, and refuses these where it gives something else."""
        module = rebuilt(flat.model, self.mapping(), self.state)
        self._difference = difference(flat, module, pruned, signature, sample)
        if not isinstance(self._difference, str) and not self._difference <= RELATIVE_L2:
            what = f"with these weights the module gives something else: relative L2 {self._difference:.2g}"
            self.refusals.append(Refusal(f"{what}, allowed {RELATIVE_L2:g}", type(flat.model).__name__))

    def mapping(self) -> dict[str, Any]:
        """What was cut: tensors with shapes and the positions left on each axis, modules with their new sizes.

        ``check`` tells how far the outputs of the module with these sizes are from the graph's, or why it does not run.
        """
        tensors = {}
        for key, tensor in self.state.items():
            before = list(self._whole[key].shape) if key in self._whole else None
            kept = {str(axis): places.tolist() for axis, places in self._positions.get(key, {}).items()}
            tensors[key] = {"before": before, "after": list(tensor.shape), "kept": kept}
        modules: dict[str, Any] = {}
        for name, part in self._parts.items():
            own = {key.rpartition(".")[2]: t for key, t in self.state.items() if key.rpartition(".")[0] == name}
            sizes = changed_sizes(part, {kind: tuple(t.shape) for kind, t in own.items()}, self._groups.get(name))
            added = f"{name}.bias" in self._added
            if sizes or added:
                modules[name] = {"class": type(part).__name__, "sizes": sizes, "bias_added": added}
        told = isinstance(self._difference, str)
        check = {"relative_l2": None if told else self._difference, "reason": self._difference if told else ""}
        return {"check": check, "tensors": tensors, "modules": modules}

    def _layer(self, layer: LayerMatch) -> None:
        weight, cut = self._cut(layer.weight)
        node, name = self._node(layer.weight.node), layer.name
        if "Conv" in node.op_type:
            self._groups[name] = node.attributes.get_int("group", 1)
        outputs = cut.get(layer.output_axis, np.arange(self._values[layer.weight.key].shape[layer.output_axis]))
        bias = self._bias(layer, node)
        if layer.norm:
            weight = self._unfolded(layer, weight, cut, bias, outputs)
        elif f"{name}.bias" in self._values:
            if layer.bias is not None or f"{name}.bias" not in self._new:
                value = np.zeros(len(outputs)) if bias is None else bias  # adding zeros may have been left out
                self._set(f"{name}.bias", value, {0: outputs} if layer.output_axis in cut else {})
        elif bias is not None:
            self._added.append(f"{name}.bias")
            self._set(f"{name}.bias", bias, {})
        self._set(layer.weight.key, weight, cut)

    def _recurrent(self, layer: RecurrentMatch) -> None:
        """Recurrent weights are cut, not fitted; all layers of a module have one hidden size."""
        places = {index: self._kept.get((label(layer.node), index), {}) for index in (1, 2)}
        for key, value, cut in layer.cut(self._values, places):
            self._set(key, value, cut)
        first, own = (f"{layer.name}.weight_hh_{suffix}" for suffix in ("l0", layer.suffixes[0]))
        if (sizes := [self._new[key].shape[1] for key in (first, own)])[0] != sizes[1]:
            reason = f"its layers would have hidden sizes {sizes[0]} and {sizes[1]}, and the module has one for all"
            self.refusals.append(Refusal(reason, layer.name))

    def _bias(self, layer: LayerMatch, node: ir.Node) -> np.ndarray | None:
        """What a layer adds now; None where nothing, or where what it adds is another's tensor."""
        if layer.bias is not None:
            other, index = layer.bias
            last, span = constant(operand(other, index)).ndim - 1, layer.weight.span
            within = (last, *span[1:]) if span is not None and other is layer.weight.node else None
            return self._cut(Match(f"{layer.name}.bias", other, index, (last,), within))[0]
        if layer.weight.node.op_type == "MatMul" or bias_place(layer.weight.node) is not None:
            return None
        place = bias_place(node)
        return None if place is None else constant(operand(*place))

    def _unfolded(
        self,
        layer: LayerMatch,
        weight: np.ndarray,
        cut: Mapping[int, np.ndarray],
        bias: np.ndarray | None,
        outputs: np.ndarray,
    ) -> np.ndarray:
        """The weight without the BatchNorm, whose tensors are set."""
        norm, values = layer.norm, self._values
        scale = factor(values, norm, epsilon(self._parts.get(norm)))[outputs]
        safe = np.where(scale == 0, 1.0, scale)
        zeros = np.zeros(len(outputs))
        channels = {0: outputs} if layer.output_axis in cut else {}
        own = values[f"{layer.name}.bias"][outputs] if f"{layer.name}.bias" in values else zeros
        beta = values[f"{norm}.bias"][outputs] if f"{norm}.bias" in values else zeros
        folded = zeros if bias is None else bias
        mean = np.where(scale == 0, values[f"{norm}.running_mean"][outputs], own + (beta - folded) / safe)
        self._set(f"{norm}.running_mean", mean, channels)
        for kind in ("weight", "running_var"):
            if f"{norm}.{kind}" in values:
                self._set(f"{norm}.{kind}", values[f"{norm}.{kind}"][outputs], channels)
        if f"{norm}.bias" in values:
            self._set(f"{norm}.bias", np.where(scale == 0, folded, beta), channels)
        if f"{layer.name}.bias" in values:
            self._set(f"{layer.name}.bias", own, channels)
        own_weight = values[layer.weight.key]  # left of channels that the BatchNorm multiplies by 0
        for axis, places in cut.items():
            own_weight = own_weight.take(places, axis)
        shape = [-1 if axis == layer.output_axis else 1 for axis in range(weight.ndim)]
        return np.where(scale.reshape(shape) == 0, own_weight, weight / safe.reshape(shape))

    def _cut(self, one: Match) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """A tensor as it is now, and the positions left on the axes that were cut."""
        array = constant(operand(self._node(one.node), one.index))
        places = dict(self._kept.get((label(one.node), one.index), {}))
        if one.span is not None:
            axis, start, stop = one.span
            left = places.get(axis, np.arange(array.shape[axis]))
            mine = (left >= start) & (left < stop)
            array = array.compress(mine, axis)
            if axis in places:
                places[axis] = left[mine] - start
        value = one.tensor_layout(array)
        cut = {axis: places[own] for axis, own in enumerate(one.axes) if own in places}
        if one.rows is not None:  # those that the graph does not look up stay as they are
            whole = self._values[one.key]
            whole = whole.take(cut[1], 1) if 1 in cut else whole.copy()
            whole[slice(*one.rows)] = value
            return whole, cut
        return value, cut

    def _node(self, node: ir.Node) -> ir.Node:
        return self._nodes[label(node)]

    def _set(self, key: str, value: np.ndarray | None, cut: dict[int, np.ndarray]) -> None:
        assert value is not None
        if key in self._new and not _same(self._new[key], value):
            self.refusals.append(Refusal("it is used more than once, and its uses differ once pruned and fitted", key))
        self._new[key] = value
        self._positions[key] = cut

    def _is_tensor(self, key: str) -> bool:
        return key not in self._whole or isinstance(self._whole[key], torch.Tensor)

    def _tensor(self, key: str) -> torch.Tensor:
        old = self._whole.get(key)
        if key not in self._new:
            assert old is not None
            whole: torch.Tensor = old.detach().cpu().clone()
            return whole
        dtype = old.dtype if old is not None else torch.float32
        return torch.from_numpy(np.array(self._new[key], np.float32)).to(dtype)

    def _check_tied(self) -> None:
        """Two names of one tensor must not differ."""
        first: dict[int, str] = {}
        for key, tensor in self._whole.items():
            if not isinstance(tensor, torch.Tensor) or key not in self._new:
                continue
            twin = first.setdefault(tensor.data_ptr(), key)
            if not _same(self._new[twin], self._new[key]):
                self.refusals.append(Refusal(f"it is tied to {twin}, and the two differ once pruned and fitted", key))


def pruned_state(
    whole: Graph,
    pruned: Graph,
    kept: Kept,
    module: FlatModule,
    signature: Signature,
    sample: Mapping[str, np.ndarray],
) -> PrunedState:
    """The state_dict of a module as a pruned graph has it.

    Args:
        whole: the graph before it was pruned.
        sample: to see in which order the parts of the module run.
    """
    found = match(flattened(whole), module.model, watch(module, signature, sample))
    if found.missing:
        found = found.without(unused(module, found.missing, signature, sample))
    state = PrunedState(module.model, found, pruned, kept)
    if not state.refusals:
        state.compare(module, pruned, signature, sample)
    return state


def write_state(folder: Path, state: PrunedState, engines: Sequence[str], text: str) -> None:
    """Writes weights.safetensors and mapping.json.

    Args:
        engines: whose weights they are.
        text: the pass that pruned.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(save({key: tensor.contiguous() for key, tensor in state.state.items()}))
    mapping: Mapping[str, Any] = {"format": FORMAT, "engines": list(engines), "pass": text, **state.mapping()}
    (folder / MAPPING).write_text(json.dumps(mapping) + "\n")


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-7)
