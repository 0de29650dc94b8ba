"""What stands around products is computed within them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import transformers

from enginesmith.targets.inductor import products
from enginesmith.targets.inductor.products import Product


class Feed(torch.nn.Module):
    """Layer norm, two products with an activation between, and what comes around them."""

    def __init__(self, activation: torch.nn.Module, *, read_twice: bool = False) -> None:
        super().__init__()
        self.norm, self.first, self.second = torch.nn.LayerNorm(8), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.activation, self.drop, self.read_twice = activation, torch.nn.Dropout(0.5), read_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        inner = self.activation(self.first(normed))
        outer = x + self.drop(self.second(inner))
        return (outer * normed if self.read_twice else outer) * 2


def traced(model: torch.nn.Module, x: torch.Tensor, *, norms: bool = True) -> tuple[list[str], torch.nn.Module]:
    """The operators of the fused graph, and the graph as a module."""
    products.replace(model)
    with products.fusing(True):
        program = torch.export.export(model, (x,), strict=False)
    products.fuse(program.graph_module.graph, norms=norms)
    program.graph_module.recompile()
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"], program.module()


@pytest.mark.parametrize(
    "activation",
    [
        torch.nn.ReLU(), torch.nn.GELU(approximate="tanh"), transformers.activations.NewGELUActivation(),
        transformers.activations.FastGELUActivation(), torch.nn.GELU(), torch.nn.SiLU(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_norm_activation_and_sum_go_into_products(activation):
    torch.manual_seed(0)
    model, x = Feed(activation).eval(), torch.randn(1, 1, 8)
    expected = model(x)
    found, fused = traced(model, x)
    assert found == ["enginesmith.product.default"] * 2 + ["aten.mul.Tensor"]
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "options", "left"),
    [
        (torch.nn.ReLU(), {"norms": False}, "aten.layer_norm.default"),
        (torch.nn.Mish(), {}, "aten.mish.default"),
    ],
    ids=["norm of several rows", "Mish"],
)
def test_what_the_operator_does_not_compute_stays(activation, options, left):
    model, x = Feed(activation).eval(), torch.randn(1, 1, 8)
    expected = model(x)
    found, fused = traced(model, x, **options)
    assert left in found
    assert found.count("enginesmith.product.default") == 2
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


class Root(torch.nn.Module):
    """A norm with the weight of an RMS norm: it divides by the root of a function of x, plus a small number."""

    def __init__(self, function) -> None:
        super().__init__()
        self.weight, self.function = torch.nn.Parameter(torch.ones(8)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(self.function(x) + 1e-3))


def normed_by(norm, x, dtype=torch.float32):
    """Operators of products behind a norm but for casts, in a graph that gives what the model does."""
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    model = Feed(torch.nn.ReLU())
    model.norm = norm
    model, x = model.to(dtype).eval(), x.to(dtype)
    expected = model(x)
    found, fused = traced(model, x)
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(fused(x), expected, atol=bound, rtol=bound)
    return [name for name in found if name != "aten.to.dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: torch.nn.RMSNorm(8, eps=1e-3),
        lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(8, eps=1e-3),
        lambda: transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm(8, eps=1e-3),
        lambda: Root(lambda x: x.pow(2).mean(-1, keepdim=True)),
    ],
    ids=["torch", "Llama", "OLMo 2", "without casts"],
)
def test_rms_norms_go_into_products(norm, dtype):
    assert normed_by(norm(), torch.randn(1, 1, 8), dtype) == ["enginesmith.product.default"] * 2 + ["aten.mul.Tensor"]


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.pow(2).sum(-1, keepdim=True), "aten.sum.dim_IntList"),
        (lambda x: x.pow(3).abs().mean(-1, keepdim=True), "aten.pow.Tensor_Scalar"),
        (lambda x: x.pow(2).mean(-2, keepdim=True), "aten.mean.dim"),
        (lambda x: (x + 1).pow(2).mean(-1, keepdim=True), "aten.add.Tensor"),
    ],
    ids=["sum", "cubes", "another axis", "of another"],
)
def test_norms_that_are_not_rms_norms_stay(function, left):
    found = normed_by(Root(function), torch.randn(1, 1, 8))
    assert {left, "aten.rsqrt.default"} <= set(found)


def test_what_others_read_stays():
    model, x = Feed(torch.nn.ReLU(), read_twice=True).eval(), torch.randn(1, 1, 8)
    expected = model(x)
    found, fused = traced(model, x)
    assert "aten.layer_norm.default" in found
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


def test_several_rows_in_float32_are_left_to_torch():
    found, _ = traced(Feed(torch.nn.ReLU()).eval(), torch.randn(3, 1, 8))
    assert "enginesmith.product.default" not in found
    assert found.count("aten.linear.default") == 2


def test_layers_of_transformers_are_turned_and_hooks_stay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4), torch.nn.Linear(6, 3)).eval()
    model[1].register_forward_pre_hook(lambda module, arguments: (arguments[0][:1],))
    x = torch.randn(2, 4)
    expected = model(x)
    products.replace(model)
    assert [type(part) for part in model] == [Product, Product]
    assert tuple(model[0].weight.shape) == (6, 4)
    torch.testing.assert_close(model(x), expected)
    assert model(x).shape == (1, 3)


class Around(torch.nn.Module):
    """A product, of which a function makes the output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.norm, self.linear, self.function = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x * 1)


def doubled(model, x):
    y = model.linear(x)
    return (y + y) * 2


def late_activation(model, x):
    y = model.linear(x)
    x.add_(1)
    return torch.relu(y) * x


def late_activation_behind_a_view(model, x):
    y = model.linear(x)
    x.view(-1)[:4].zero_()
    return torch.relu(y) * x


def late_sum(model, x):
    y = model.linear(x)
    x.split(4, dim=-1)[1].mul_(3)
    return (x + y) * 2


def late_product(model, x):
    normed = model.norm(x)
    x.transpose(0, 2).copy_(torch.ones_like(x).transpose(0, 2))
    return model.linear(normed) * x


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (doubled, "aten.add.Tensor"),
        (late_activation, "aten.relu.default"),
        (late_activation_behind_a_view, "aten.relu.default"),
        (late_sum, "aten.add.Tensor"),
        (late_product, "aten.layer_norm.default"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_product_does_not_read_itself_nor_what_is_written_meanwhile(function, left):
    torch.manual_seed(0)
    model, x = Around(function).eval(), torch.randn(1, 1, 8)
    expected = model(x)
    found, fused = traced(model, x)
    assert {left, "enginesmith.product.default"} <= set(found)
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


def test_what_is_written_elsewhere_hinders_nothing():
    def function(model, x):
        other = torch.zeros(8)
        y = model.linear(model.norm(x))
        other[2:].add_(y[0, 0, 2:])
        return (torch.relu(model.linear(x)) + x) * other

    torch.manual_seed(0)
    model, x = Around(function).eval(), torch.randn(1, 1, 8)
    expected = model(x)
    found, fused = traced(model, x)
    assert not {"aten.layer_norm.default", "aten.relu.default", "aten.add.Tensor"} & set(found)
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


def scaled(module, arguments, kwargs):
    return tuple(2 * value for value in arguments), kwargs


HOOKS = {
    "behind": lambda part: part.register_forward_hook(lambda module, arguments, output: 2 * output),
    "before, with keywords": lambda part: part.register_forward_pre_hook(scaled, with_kwargs=True),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "part",
    [
        lambda: torch.nn.Linear(4, 4),
        lambda: transformers.pytorch_utils.Conv1D(4, 4),
        transformers.activations.NewGELUActivation,
    ],
    ids=["linear layer", "of transformers", "GELU"],
)
def test_layers_stay_whose_hooks_take_more_than_the_input(part, hook):
    torch.manual_seed(0)
    model = torch.nn.Sequential(part()).eval()
    plain, x = model[0], torch.randn(2, 4)
    HOOKS[hook](plain)
    expected = model(x)
    products.replace(model)
    assert model[0] is plain
    assert torch.equal(model(x), expected)
