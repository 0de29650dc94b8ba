"""Linear layers in FP8 (E4M3), with the ranges of what they read from calibration.

    x8 = fp8(x / s_x)        s_x = max |x| over the samples / 448
    W8 = fp8(W / s_W)        s_W = max |W| / 448
    y = s_x s_W x8 W8^T + b + (W - s_W W8) mean(x)

The last term takes back what rounding the weights shifts the mean of the outputs by (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2). Layers that read the same tensor become
one. What is not a linear layer stays in the module's own dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

LARGEST = 448.0
"""The largest number of FP8 E4M3."""
MULTIPLE = 16
"""Of both sizes of a weight, that FP8 products of a GPU take."""

_LINEAR = torch.ops.aten.linear.default


@dataclasses.dataclass
class _Read:
    """What the layers that read one tensor see of it: the largest magnitude, and the sum over rows (k)."""

    largest: float = 0.0
    total: torch.Tensor | None = None
    rows: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds a tensor (..., k)."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        largest = float(rows.abs().amax())
        self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)
        total = rows.sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.rows += len(rows)


def quantize(module: torch.fx.GraphModule, samples: Iterable[Sequence[torch.Tensor]]) -> int:
    """Puts products in FP8 in the place of a module's linear layers, where sizes let it.

    Args:
        module: the module of an exported program that changes no tensor in place, on the device that the samples are
            on. What it holds in buffers is the same afterwards.
        samples: its inputs, in their order.

    Returns:
        How many layers now compute in FP8. Those that read no row of the samples do not.

    Raises:
        ValueError: there is no sample, or a layer reads what is not finite.
    """
    groups: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in module.graph.nodes:
        if node.target is _LINEAR and _fits(module, node):
            groups.setdefault(node.args[0], []).append(node)
    reads = _observed(module, groups, samples)
    for number, (x, layers) in enumerate(groups.items()):
        if reads[x].rows:
            _replace(module, f"fp8_{number}", layers, reads[x])
    module.graph.eliminate_dead_code()
    _forget_unused(module)
    module.recompile()
    return sum(len(layers) for x, layers in groups.items() if reads[x].rows)


def _fits(module: torch.fx.GraphModule, layer: torch.fx.Node) -> bool:
    """Whether weight and bias are constants, of sizes that FP8 products take."""
    weight, *bias = layer.args[1:]
    constants = [argument for argument in (weight, *bias) if argument is not None]
    if not all(isinstance(argument, torch.fx.Node) and argument.op == "get_attr" for argument in constants):
        return False
    held = _held(module, weight)
    return held.dim() == 2 and not any(size % MULTIPLE for size in held.shape) and bool(held.any())


def _held(module: torch.fx.GraphModule, node: Any) -> torch.Tensor:
    """The tensor that a node reads from the module."""
    owner, _, name = node.target.rpartition(".")
    held: torch.Tensor = getattr(module.get_submodule(owner), name)
    return held.detach()


def _observed(
    module: torch.fx.GraphModule, wanted: Iterable[torch.fx.Node], samples: Iterable[Sequence[torch.Tensor]]
) -> dict[torch.fx.Node, _Read]:
    reads = {node: _Read() for node in wanted}

    class Observer(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            made = super().run_node(n)
            if n in reads:
                reads[n].add(made)
            return made

    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    number = 0
    with torch.no_grad():
        for number, sample in enumerate(samples, start=1):  # noqa: B007, their number
            Observer(module).run(*sample)
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
    if not number:
        raise ValueError("there are no samples to see the ranges of activations in")
    for node, read in reads.items():
        if read.largest == math.inf:
            raise ValueError(f"what a linear layer reads is not finite: {node.name}")
    return reads


def _replace(module: torch.fx.GraphModule, prefix: str, layers: Sequence[torch.fx.Node], read: _Read) -> None:
    """Layers that read the same tensor become one product in FP8, of which each has its slice."""
    weights = [_held(module, layer.args[1]) for layer in layers]
    whole = torch.cat(weights)
    scale = (whole.float().abs().amax() / LARGEST).reshape(())
    narrow = (whole.float() / scale).to(torch.float8_e4m3fn)
    assert read.total is not None
    lost = (whole.double() - narrow.double() * scale.double()) @ (read.total / read.rows)
    biases = [_bias(module, layer, len(weight)) for layer, weight in zip(layers, weights, strict=True)]
    step = max(read.largest, torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    constants = {
        "weight": narrow,
        "scale": scale,
        "x_scale": torch.full((), step, device=whole.device),
        "bias": (torch.cat(biases) + lost).to(whole.dtype),
    }
    for name, tensor in constants.items():
        module.register_buffer(f"{prefix}_{name}", tensor)
    graph = module.graph
    with graph.inserting_before(layers[0]):
        arguments = [graph.get_attr(f"{prefix}_{name}") for name in constants]
        y = graph.call_function(_product(1 / step), (layers[0].args[0], *arguments))  # a product where that was a layer
        begin = 0
        for layer, weight in zip(layers, weights, strict=True):
            end = begin + len(weight)
            part = y if len(layers) == 1 else graph.call_function(torch.narrow, (y, -1, begin, len(weight)))
            layer.replace_all_uses_with(part)
            begin = end
    for layer in layers:
        graph.erase_node(layer)


def _forget_unused(module: torch.fx.GraphModule) -> None:
    """Takes out the parameters that no node reads any more, which would go into the engine."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        if name not in read:
            owner, _, own_name = name.rpartition(".")
            delattr(module.get_submodule(owner), own_name)


def _bias(module: torch.fx.GraphModule, layer: torch.fx.Node, size: int) -> torch.Tensor:
    if len(layer.args) > 2 and layer.args[2] is not None:
        return _held(module, layer.args[2]).double()
    return torch.zeros(size, dtype=torch.float64, device=_held(module, layer.args[1]).device)


def _product(inverse: float) -> Callable[..., torch.Tensor]:
    """The product of x (..., k), rounded to FP8 after its multiplication with `inverse`, and a weight (n, k)."""

    def product(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, x_scale: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        narrow = (x.float() * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            narrow.reshape(-1, weight.shape[1]), weight.t(), scale_a=x_scale, scale_b=scale, bias=bias,
            out_dtype=bias.dtype, use_fast_accum=narrow.is_cuda,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], weight.shape[0])

    return product
