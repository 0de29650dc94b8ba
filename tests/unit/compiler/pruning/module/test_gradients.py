from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.pruning.importance import by_gradients
from enginesmith.compiler.pruning.module import gradients_of
from enginesmith.compiler.pruning.module.gradients import gradients
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

UNTOUCHED = "prune:ratio=0.01,multiple=64"
"""Prunes nothing: the fixture is used for the captured graph."""


def taken(found, seed: int = 0) -> list[dict[str, np.ndarray]]:
    graph = flattened(found.whole)
    return list(gradients(graph, found.model.module, found.model.signature, found.samples, seed=seed))


def products(found, module: nn.Module, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """w dL/dw by the name of the parameter, batch by batch, as autograd has it without our code."""
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    results = []
    for sample in found.samples:
        module.zero_grad()
        outputs = module(torch.from_numpy(sample["input"]))
        (outputs * torch.randn(outputs.shape, generator=generator)).sum().backward()
        results.append({name: (p * p.grad).detach() for name, p in module.named_parameters()})
    return results


def test_a_linear_layer_has_its_products_in_the_layout_of_the_graph(prune):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    found = prune(module, (5, 12), text=UNTOUCHED)
    weights = [node.inputs[1].name for node in found.whole.model.graph if node.op_type == "MatMul"]
    ours, theirs = taken(found), products(found, module)
    assert len(ours) == len(found.samples)
    for mine, other in zip(ours, theirs, strict=True):
        for name, key in zip(weights, ("0.weight", "2.weight"), strict=True):
            np.testing.assert_allclose(mine[name], other[key].T, rtol=1e-4, atol=1e-4)
        biases = [value for node in found.whole.model.graph if node.op_type == "Add" for value in node.inputs]
        names = [value.name for value in biases if value.const_value is not None]
        for name, key in zip(names, ("0.bias", "2.bias"), strict=True):
            np.testing.assert_allclose(mine[name], other[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_folded_normalization_leaves_the_products_as_they_are(exporter, network, prune):
    module, shape = network("resnet")
    found = prune(module, shape, exporter=exporter, text=UNTOUCHED)
    first = next(node for node in found.whole.model.graph if node.op_type == "Conv")
    mine, other = taken(found)[0], products(found, module)[0]
    weight, bias = (mine[first.inputs[index].name] for index in (1, 2))
    np.testing.assert_allclose(weight, other["0.weight"], rtol=1e-3, atol=1e-3)
    # Both are what scaling the channel behind the normalization changes.
    wanted = other["1.weight"] + other["1.bias"]
    np.testing.assert_allclose(weight.sum(axis=(1, 2, 3)) + bias, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["transformer", "words"])
def test_what_multiplies_a_position_does_not_count_twice(name, network, prune):
    module, shape = network(name)
    found = prune(module, shape, text=UNTOUCHED)
    norms = [node for node in found.whole.model.graph if node.op_type == "LayerNormalization"]
    assert norms
    assert not {value.name for node in norms for value in node.inputs[1:]} & set(taken(found)[0])


def test_weights_side_by_side_have_products_side_by_side(network, prune):
    module, shape = network("transformer")
    found = prune(module, shape, exporter="dynamo", text=UNTOUCHED)
    other = products(found, module)[0]
    wanted = torch.cat([other[f"1.{name}.weight"] for name in ("q", "k", "v")]).T
    found_sizes = {name: array for name, array in taken(found)[0].items() if array.shape == tuple(wanted.shape)}
    assert any(np.allclose(array, wanted, rtol=1e-3, atol=1e-3) for array in found_sizes.values())


@pytest.mark.parametrize("name", ["lstm, both ways", "gru"])
def test_recurrent_weights_have_products_in_the_order_of_the_graph(name, network, prune):
    module, shape = network(name)
    found = prune(module, shape, text=UNTOUCHED)
    node = next(node for node in found.whole.model.graph if node.op_type in ("LSTM", "GRU"))
    mine, other = taken(found)[0], products(found, module)[0]
    gates = (0, 3, 1, 2) if node.op_type == "LSTM" else (1, 0, 2)
    blocks = other["rnn.weight_hh_l0"].chunk(len(gates))
    np.testing.assert_allclose(
        mine[node.inputs[2].name][0], torch.cat([blocks[gate] for gate in gates]), rtol=1e-3, atol=1e-3
    )


def test_a_program_has_gradients_too(network, prune, tmp_path):
    module, shape = network("resnet")
    found = prune(module, shape, exporter="dynamo", text=UNTOUCHED)
    example = torch.from_numpy(found.samples[0]["input"])
    torch.export.save(torch.export.export(module.eval(), (example,)), tmp_path / "program.pt2")
    program = load_model(tmp_path / "program.pt2")
    takes = gradients_of(program, Calibration(found.samples), 0)
    assert takes is not None
    mine, other = next(iter(takes(flattened(found.whole)))), taken(found)[0]
    weights = [node.inputs[1].name for node in found.whole.model.graph if node.op_type in ("Conv", "Gemm")]
    assert len(weights) == 7
    for name in weights:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-3, atol=1e-3)


def test_parameters_that_the_user_froze_stay_frozen(prune):
    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    found = prune(module, (5, 12), text=UNTOUCHED)
    assert all(np.abs(array).sum() > 0 for array in taken(found)[0].values())
    assert not any(parameter.requires_grad for parameter in found.model.module.parameters())


def test_a_module_that_autograd_cannot_follow_is_refused(prune):
    class Detached(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).detach()

    found = prune(Detached(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 12), text=UNTOUCHED)
    with pytest.raises(
        RecipeError, match="importance=taylor needs gradients, and the torch module gives none"
    ) as error:
        taken(found)
    assert error.value.found == "no output depends on a weight: forward runs under no_grad, or detaches"


def test_squares_are_taken_batch_by_batch(prune):
    found = prune(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 12), text=UNTOUCHED)
    dimensions = Dimensions(flattened(found.whole))
    groups = [group for group in dimensions.groups if group.of("writes") and group.size == 8]
    (group,), name = groups, groups[0].of("writes")[0].value.name
    once = np.zeros((12, 8), np.float32)
    once[0] = np.arange(8)
    ranked, without = by_gradients(groups, [{name: once}, {name: -once}])
    assert not without
    assert list(ranked[group.name].order) == list(range(8))
    np.testing.assert_allclose(np.diff(ranked[group.name].loss), np.arange(8) ** 2 / 140)
    assert by_gradients(groups, [{}]) == ({}, [group.name])


def test_neurons_that_nothing_reads_go_first(prune):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    silent = [1, 4, 5, 8, 9, 12, 14, 15]
    with torch.no_grad():
        module[2].weight[:, silent] = 0
    found = prune(module, (5, 12), text=UNTOUCHED)
    calibration = Calibration(found.samples)
    takes = gradients_of(found.model, calibration, 0)
    assert takes is not None
    context = Context(found.model.signature, found.samples, calibration, gradients=takes)
    result = parse_pass("prune:ratio=0.5,multiple=8,importance=taylor")(found.whole, context)
    (places,) = {tuple(axes[axis]) for axes in result.kept.values() for axis in axes}
    assert sorted(set(range(16)) - set(places)) == silent


def test_gradients_need_a_module_and_data(prune):
    found = prune(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 12), text=UNTOUCHED)
    assert gradients_of(found.model, None, 0) is None
    assert gradients_of(found.model.without_weights(), Calibration(found.samples), 0) is None
