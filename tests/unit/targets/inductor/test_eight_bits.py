"""Linear layers in FP8: what they compute, and what they are made from."""

from __future__ import annotations

import pytest
import torch

from enginesmith.targets.inductor.eight_bits import quantize


class Network(torch.nn.Module):
    """Two layers that read the same, one without a bias, and one of a size that FP8 does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = torch.nn.Linear(32, 48), torch.nn.Linear(32, 48, bias=False)
        self.out = torch.nn.Linear(48, 32)
        self.head = torch.nn.Linear(32, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        y = torch.nn.functional.gelu(self.query(x)) * self.key(x)
        found: torch.Tensor = self.head(x + self.out(y))
        return found


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


def exported(network: torch.nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    dynamic = {0: torch.export.Dim("batch", max=8)}
    return torch.export.export(network, (x,), dynamic_shapes=(dynamic,), strict=False).module()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_layers_multiply_in_fp8_those_that_read_the_same_as_one(network: Network) -> None:
    x = torch.randn(3, 4, 32)
    wanted = network(x)
    network.calls.zero_()
    module = exported(network, x)
    assert quantize(module, [(x,), (x,)]) == 3
    assert 1e-4 < error(module(x), wanted) < 0.03
    state = module.state_dict()
    assert state["calls"] == 1  # of the one call here, and none of calibration
    narrow = {name: tuple(value.shape) for name, value in state.items() if value.dtype is torch.float8_e4m3fn}
    assert narrow == {"fp8_0_weight": (96, 32), "fp8_1_weight": (32, 48)}
    assert {name for name, _ in module.named_parameters()} == {"head.weight", "head.bias"}
    again = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},), strict=False)
    torch.testing.assert_close(again.module()(x[:2]), module(x)[:2])
    products = [node for node in again.graph.nodes if node.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == 2


def test_rounded_weights_do_not_shift_the_mean() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(8, 32, 64) + 3
    module = exported(torch.nn.Sequential(layer), x)
    quantize(module, [(x,)])
    shift = (module(x) - layer(x)).mean((0, 1))
    narrow = (layer.weight / layer.weight.abs().max() * 448).to(torch.float8_e4m3fn).float()
    lost = (layer.weight - narrow * layer.weight.abs().max() / 448) @ x.mean((0, 1))
    assert float(shift.norm()) < 0.2 * float(lost.norm())


def test_what_is_larger_than_in_the_samples_is_the_largest(network: Network) -> None:
    x = torch.randn(2, 4, 32)
    module = exported(torch.nn.Sequential(network.query), x)
    quantize(module, [(x,)])
    torch.testing.assert_close(module(100 * x), module((100 * x).clamp(-x.abs().max(), x.abs().max())))
    again = torch.export.export(module, (x,), strict=False)  # casts of older versions of torch do not saturate
    assert any(node.target is torch.ops.aten.clamp.default for node in again.graph.nodes)


def test_a_layer_may_read_another(network: Network) -> None:
    x = torch.randn(2, 32)
    both = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 48)).requires_grad_(False)
    module = exported(both, x)
    assert quantize(module, [(x,)]) == 2
    assert 1e-4 < error(module(x), both(x)) < 0.1


def test_a_layer_that_reads_no_row_stays() -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.some = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.all(x).sum() + self.some(x[x.sum(1) > 0]).sum()

    x = -torch.ones(2, 16)
    module = exported(Routed().requires_grad_(False), x)
    assert quantize(module, [(x,)]) == 1
    module = exported(Routed().requires_grad_(False), x)
    assert quantize(module, [(x,), (-x,)]) == 2


@pytest.mark.parametrize("weights", ["zero", "computed"])
def test_other_weights_stay(weights: str) -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(16, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight if weights == "zero" else self.weight + 1
            return torch.nn.functional.linear(x, weight)

    x = torch.randn(2, 32)
    module = exported(Other(), x)
    assert quantize(module, [(x,)]) == 0
    assert "weight" in dict(module.named_parameters())


def test_zeros_are_zeros(network: Network) -> None:
    module = exported(torch.nn.Sequential(network.query), torch.ones(2, 32))
    quantize(module, [(torch.zeros(2, 32),)])
    torch.testing.assert_close(module(torch.zeros(2, 32)), network.query.bias.expand(2, 48))


def test_what_cannot_be_calibrated_is_told(network: Network) -> None:
    x = torch.randn(2, 4, 32)
    with pytest.raises(ValueError, match="there are no samples to see the ranges of activations in"):
        quantize(exported(network, x), [])
    for value in ("inf", "nan"):
        with pytest.raises(ValueError, match="what a linear layer reads is not finite"):
            quantize(exported(network, x), [(x,), (torch.full((2, 4, 32), float(value)),), (x,)])
