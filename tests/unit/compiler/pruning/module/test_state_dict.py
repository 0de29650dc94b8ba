from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from enginesmith.compiler.graph import probe
from enginesmith.compiler.pruning.module.rebuild import RELATIVE_L2
from enginesmith.compiler.pruning.module.state_dict import PrunedState, pruned_state, write_state
from enginesmith.compiler.quantization.layers import assign_input, constant, operand
from enginesmith.compiler.sources.module import load_factory
from enginesmith.compiler.sources.weights import load_weights, read_weights

NAMES = (
    "resnet",
    "mixed convolutions",
    "mlp",
    "transformer",
    "words",
    "lstm, both ways",
    "lstm, two layers",
    "gru",
)


def state_of(found) -> PrunedState:
    kept = found.result.kept
    return pruned_state(found.whole, found.graph, kept, found.model.module, found.model.signature, found.samples[0])


def reasons(state: PrunedState) -> list[str]:
    return [f"{refusal.node}: {refusal.reason}" for refusal in state.refusals]


def error(module: nn.Module, found) -> float:
    """Largest difference from the pruned graph, as part of the largest output."""
    module.eval()
    with torch.no_grad():
        outputs = module(torch.from_numpy(found.samples[1]["input"])).numpy()
    (wanted,) = probe.run(found.graph, found.samples[1]).values()
    assert outputs.shape == wanted.shape
    return float(np.abs(outputs - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_the_new_sizes_gives_what_the_pruned_graph_gives(
    name, exporter, network, prune, with_sizes, tmp_path
):
    module, shape = network(name)
    found = prune(module, shape, exporter=exporter)
    state = state_of(found)
    assert not reasons(state)
    write_state(tmp_path / "written", state, ["an-engine"], "prune:ratio=0.5")
    mapping = json.loads((tmp_path / "written/mapping.json").read_text())
    tensors = load_file(tmp_path / "written/weights.safetensors")
    rebuilt = with_sizes(network(name)[0], mapping)
    rebuilt.load_state_dict(tensors, strict=True)
    assert sum(t.numel() for t in tensors.values()) < 0.8 * sum(t.numel() for t in module.state_dict().values())
    assert error(rebuilt, found) < 1e-5
    assert mapping["check"]["relative_l2"] <= RELATIVE_L2
    assert mapping["engines"] == ["an-engine"]
    assert mapping["pass"] == "prune:ratio=0.5"


def test_the_sample_of_digits_is_pruned_and_built_again(prune, with_sizes, pytestconfig):
    folder = pytestconfig.rootpath / "samples/digits"
    module = load_factory(f"{folder / 'model.py'}:digits", {}, lambda line: None)
    load_weights(module, read_weights(folder / "digits.safetensors"), folder)
    images = np.load(folder / "test.npz")["image"].astype(np.float32)[:64]
    found = prune(Renamed(module), (1, 8, 8), exporter="dynamo", arrays=images)
    state = state_of(found)
    assert not reasons(state)
    rebuilt = with_sizes(Renamed(copy.deepcopy(module)), state.mapping())
    rebuilt.load_state_dict(state.state, strict=True)
    assert error(rebuilt, found) < 1e-5


class Renamed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.inner(input)


def test_the_mapping_tells_what_is_left_of_tensors_and_modules(network, prune):
    module, shape = network("resnet")
    found = prune(module, shape)
    state = state_of(found)
    mapping = state.mapping()
    whole = module.state_dict()
    told = mapping["tensors"]["3.conv1.weight"]
    assert (told["before"], told["after"]) == ([16, 16, 3, 3], [8, 8, 3, 3])
    assert set(told["kept"]) == {"0", "1"}
    assert mapping["tensors"]["3.conv1.weight"]["kept"]["0"] == mapping["tensors"]["3.bn1.weight"]["kept"]["0"]
    assert mapping["modules"]["3.bn1"]["sizes"] == {"num_features": {"before": 16, "after": 8}}
    assert mapping["modules"]["3.conv1"]["sizes"]["in_channels"] == {"before": 16, "after": 8}
    assert not any(told["bias_added"] for told in mapping["modules"].values())
    kept = mapping["tensors"]["3.bn1.weight"]["kept"]["0"]
    assert torch.equal(state.state["3.bn1.weight"], whole["3.bn1.weight"][kept])
    cut = whole["3.conv1.weight"][told["kept"]["0"]][:, told["kept"]["1"]]
    assert not torch.allclose(state.state["3.conv1.weight"], cut, rtol=1e-3), "the weights are the fitted ones"
    assert mapping["tensors"]["7.bias"]["kept"] == {}


def test_channels_that_a_normalization_multiplies_by_zero_keep_their_weights(network, prune, with_sizes):
    module, shape = network("resnet")
    with torch.no_grad():
        module[3].bn2.weight[::2] = 0  # as many train residual networks from the start
    found = prune(module, shape)
    state = state_of(found)
    assert not reasons(state)
    told = state.mapping()["tensors"]["3.conv2.weight"]["kept"]
    silent = [place for place, channel in enumerate(told["0"]) if channel % 2 == 0]
    whole = module[3].conv2.weight[told["0"]][:, told["1"]]
    assert silent
    assert torch.equal(state.state["3.conv2.weight"][silent], whole[silent])
    rebuilt = with_sizes(network("resnet")[0], state.mapping())
    rebuilt.load_state_dict(state.state, strict=True)
    assert error(rebuilt, found) < 1e-5


def test_a_bias_that_fitting_added_is_told(prune, with_sizes):
    found = prune(Convolutions(), (3, 8, 8))
    state = state_of(found)
    mapping = state.mapping()
    assert not reasons(state)
    assert [name for name, told in mapping["modules"].items() if told["bias_added"]] == ["second"]
    assert mapping["tensors"]["second.bias"] == {"before": None, "after": [4], "kept": {}}
    rebuilt = with_sizes(Convolutions(), mapping)
    rebuilt.load_state_dict(state.state, strict=True)
    assert error(rebuilt, found) < 1e-5


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(input).relu())


class Doubled(nn.Module):
    """Computes its weight from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(12, 16), nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(input).relu() @ (self.root * 2)).relu())


def test_a_parameter_that_the_graph_does_not_hold_is_named(prune):
    state = state_of(prune(Doubled(), (5, 12)))
    assert reasons(state) == ["root: no constant of the graph has its values"]


def test_what_no_output_depends_on_stays_whole(prune):
    class Unused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))
            self.auxiliary = nn.Sequential(nn.Linear(32, 7), nn.BatchNorm1d(7))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](input)))

    module = Unused()
    state = state_of(prune(module, (24,)))
    assert not reasons(state)
    assert torch.equal(state.state["auxiliary.0.weight"], module.auxiliary[0].weight)
    assert torch.equal(state.state["auxiliary.1.running_var"], module.auxiliary[1].running_var)
    assert state.mapping()["modules"]["0"]["sizes"] == {"out_features": {"before": 32, "after": 16}}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_rows_that_are_not_looked_up_and_biases_of_zero_are_cut_too(exporter, prune, with_sizes):
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.places, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
            self.first, self.mix, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            nn.init.zeros_(self.first.bias)
            nn.init.zeros_(self.mix.bias)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.first(input) + self.places(torch.arange(2, 7)))
            return self.last(self.mix(x).relu() + x)

    found = prune(Places(), (5, 12), exporter=exporter)
    state = state_of(found)
    assert not reasons(state)
    assert state.state["mix.bias"].shape == (8,)
    told = state.mapping()["tensors"]["places.weight"]
    assert told["after"] == [9, 8]
    whole = Places().places.weight[:, told["kept"]["1"]]
    assert torch.equal(state.state["places.weight"], whole)
    rebuilt = with_sizes(Places(), state.mapping())
    rebuilt.load_state_dict(state.state, strict=True)
    assert error(rebuilt, found) < 1e-5


def test_tied_tensors_that_come_apart_are_named(prune):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
            self.out.weight = self.words.weight

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.out(self.mix(self.words((4 * input).long().clamp(0, 19))).relu())

    state = state_of(prune(Tied(), (6,)))
    assert "out.weight: it is tied to words.weight, and the two differ once pruned and fitted" in reasons(state)


def test_uses_that_come_apart_are_named(prune):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.last(self.same(self.same(self.first(input).relu()).relu()).relu())

    found = prune(Twice(), (5, 12))
    assert not reasons(state_of(found))
    second = [node for node in found.graph.model.graph if node.op_type == "Add"][2]
    index = next(place for place, value in enumerate(second.inputs) if value.const_value is not None)
    assign_input(second, index, constant(operand(second, index)) + 1, found.graph)
    assert reasons(state_of(found)) == [
        "same.bias: it is used more than once, and its uses differ once pruned and fitted"
    ]


def test_layers_of_a_recurrent_module_must_have_one_hidden_size(network, prune):
    module, shape = network("lstm, two layers")
    text = "prune:ratio=0.5,multiple=4,sensitivity=false,ratios=*LSTM_1*:0.25"
    state = state_of(prune(module, shape, text=text))
    assert reasons(state) == ["rnn: its layers would have hidden sizes 8 and 12, and the module has one for all"]


def test_weights_that_give_something_else_are_refused(network, prune):
    module, shape = network("mlp")
    found = prune(module, shape)
    state = state_of(found)
    state.state["0.weight"] *= 2
    state.compare(found.model.module, found.graph, found.model.signature, found.samples[0])
    assert any("with these weights the module gives something else: relative L2" in why for why in reasons(state))


def test_a_module_whose_code_holds_sizes_is_written_with_the_reason_why_it_was_not_run(prune):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(input).reshape(-1, 5, 16).relu())

    state = state_of(prune(Fixed(), (5, 12)))
    assert not reasons(state)
    check = state.mapping()["check"]
    assert check["relative_l2"] is None
    assert "shape" in check["reason"]


def test_equal_layers_are_told_apart_by_their_order(prune, with_sizes):
    def made() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        nn.init.zeros_(layer.bias)
        copies = [copy.deepcopy(layer) for _ in range(3)]
        return nn.Sequential(
            nn.Linear(24, 16), *(part for one in copies for part in (nn.ReLU(), one)), nn.Linear(16, 3)
        )

    found = prune(made(), (24,))
    state = state_of(found)
    assert not reasons(state)
    rebuilt = with_sizes(made(), state.mapping())
    rebuilt.load_state_dict(state.state, strict=True)
    assert error(rebuilt, found) < 1e-5
