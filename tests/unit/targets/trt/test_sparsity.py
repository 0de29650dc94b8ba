import pytest

from enginesmith.targets.trt.sparsity import sparse_layers

TOLD = {
    "8.6": [
        "(Sparsity) Layers eligible for sparse math: Conv_0 + Relu_1, Conv_257 + Add_263 + Relu_264, MatMul_51",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: Conv_0 + Relu_1",
    ],
    "10": [
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics",
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: Conv_0 + Relu_1, "
        "Conv_257 + Add_263 + Relu_264, MatMul_51",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: Conv_0 + Relu_1",
    ],
}
"""What each version logs of one engine."""


@pytest.mark.parametrize("version", TOLD)
def test_layers_that_could_run_sparse_and_those_that_do(version):
    assert sparse_layers(["Total Activation Memory: 0", *TOLD[version]]) == {
        "eligible": ["Conv_0 + Relu_1", "Conv_257 + Add_263 + Relu_264", "MatMul_51"],
        "picked": ["Conv_0 + Relu_1"],
        "source": "log of the build",
    }


@pytest.mark.parametrize(
    "picked",
    [
        "(Sparsity) TRT inference plan picked sparse implementation for layers:",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: ",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
        "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
    ],
)
def test_nothing_was_picked(picked):
    found = sparse_layers([TOLD["8.6"][0], picked])
    assert len(found["eligible"]) == 3
    assert found["picked"] == []


def test_a_layer_that_several_parts_of_the_network_name_counts_once():
    assert len(sparse_layers(TOLD["8.6"] * 2)["eligible"]) == 3


def test_a_count_without_names_is_told_as_it_is():
    told = ["(Sparsity) Found 39 layer(s) eligible to use sparse tactics", "(Sparsity) Chose 0 layer(s) using sparse"]
    assert sparse_layers(told)["eligible"] == ["39 layers, which the log does not name"]


@pytest.mark.parametrize(
    "messages",
    [[], ["Layers eligible for sparse math: quoted"], ["(Sparsity) Please provide sparse weights to refit"]],
)
def test_a_log_that_says_nothing(messages):
    assert sparse_layers(messages) == {
        "eligible": [],
        "picked": [],
        "source": "none, the log of the build says nothing of sparse kernels",
    }
