import collections
import dataclasses

import pytest
import torch

from enginesmith.compiler.sources.flat import Parameter, arrange, flat_module, python_parameters
from enginesmith.compiler.sources.outputs import flatten_outputs
from enginesmith.errors import RecipeError, SourceError, UnknownNameError

A, B = torch.zeros(1), torch.ones(2)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None


Pair = collections.namedtuple("Pair", "values indices")


@pytest.mark.parametrize(
    ("value", "names", "structure"),
    [
        (A, ["output"], None),
        ((A, B), ["output.0", "output.1"], {"tuple": ["output.0", "output.1"]}),
        ([A], ["output.0"], {"list": ["output.0"]}),
        ({"logits": A, "past": [A, (B,)]}, ["logits", "past.0", "past.1.0"],
         {"dict": {"logits": "logits", "past": {"list": ["past.0", {"tuple": ["past.1.0"]}]}}}),
        (Result(A, (B,)), ["logits", "hidden.0"], {"dict": {"logits": "logits", "hidden": {"tuple": ["hidden.0"]}}}),
        (Result(A), ["logits"], {"dict": {"logits": "logits"}}),
        (Pair(A, B), ["values", "indices"], {"tuple": ["values", "indices"]}),
        ((A, None, B), ["output.0", "output.2"], {"tuple": ["output.0", None, "output.2"]}),
        ({"state": [None, A], "none": None}, ["state.1"], {"dict": {"state": {"list": [None, "state.1"]}}}),
        ({"image": A}, ["image_out"], {"dict": {"image": "image_out"}}),
    ],
)  # fmt: skip
def test_outputs_keep_their_names_and_nesting(value, names, structure):
    tensors, found = flatten_outputs(value, taken=["image"])
    assert list(tensors) == names
    assert found == structure


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ((A, 3), r"output 'output.1' of the model is no tensor(?s:.*)builtins.int(?s:.*)wrap the model"),
        ({"loss": 1.0}, "output 'loss' of the model is no tensor"),
        ((), "the model returns no tensor"),
        (None, "is no tensor"),
        (A.to(torch.complex64), "is of a kind that engines do not have(?s:.*)complex64"),
        (B.to_sparse(), "is of a kind that engines do not have(?s:.*)sparse"),
    ],
)
def test_other_outputs_are_refused(value, match):
    with pytest.raises(SourceError, match=match):
        flatten_outputs(value)


def parameters(forward):
    module = torch.nn.Module()
    module.forward = forward
    return python_parameters(module)


def call(forward, names, constants=None):
    found, any_keyword = parameters(forward)
    arguments, keywords = arrange(found, names, constants or {}, any_keyword=any_keyword)(list(range(len(names))))
    return forward(*arguments, **keywords)


def test_inputs_are_put_where_forward_wants_them():
    assert call(lambda x, y=None: (x, y), ["y", "x"]) == (1, 0)
    assert call(lambda x, state: (x, state), ["x", "state.0", "state.1"]) == (0, (1, 2))
    assert call(lambda state: state, ["state.h", "state.c.1", "state.c.0"]) == {"h": 0, "c": (2, 1)}
    assert call(lambda *xs: xs, ["xs.1", "xs.0"]) == (1, 0)
    assert call(lambda x, /, **more: (x, more), ["x", "mask"]) == (0, {"mask": 1})
    assert call(lambda x, rate: (x, rate), ["x"], {"rate": {8: 16000}}) == (0, {8: 16000})


def test_a_parameter_annotated_as_list_gets_a_list():
    def forward(state: list[torch.Tensor]):
        return state

    assert call(forward, ["state.0"]) == [0]


def test_an_unknown_input_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown parameter of the model's forward 'imge'(?s:.*)mean 'image'"):
        arrange([Parameter("image", required=True)], ["imge"], {})


def test_a_misspelt_input_is_not_taken_for_a_keyword():
    with pytest.raises(UnknownNameError, match="did you mean 'input_ids'"):
        call(lambda input_ids=None, **more: None, ["input_idz"])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["x"],
            r"forward needs 'mask', which no input gives(?s:.*)forward\(x, mask, scale \(optional\)\)(?s:.*)--input",
        ),
        (["x", "mask.0", "mask.2"], r"items of 'mask' leave gaps(?s:.*)mask.0, mask.1(?s:.*)mask.0, mask.2"),
        (["x", "mask", "mask.0"], "'mask.0' is given twice"),
        (["x", "mask.0", "mask"], "'mask' is given twice"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(names, match):
    found = [Parameter("x", required=True), Parameter("mask", required=True), Parameter("scale", required=False)]
    with pytest.raises(RecipeError, match=match):
        arrange(found, names, {})


def test_flat_module_takes_tensors_and_returns_a_tuple():
    class Cell(torch.nn.Module):
        def forward(self, x, state):
            return {"y": x + state[0], "state": [state[1]]}

    module = Cell()
    found, _ = python_parameters(module)
    names = ["x", "state.0", "state.1"]
    flat = flat_module(module, arrange(found, names, {}), names)
    outputs = flat(torch.ones(1), torch.ones(1), torch.zeros(1))
    assert [tensor.item() for tensor in outputs] == [2, 0]
    assert not flat.train().training
    traced = torch.export.export(
        flat, (torch.ones(3), torch.ones(3), torch.zeros(1)), dynamic_shapes=({0: torch.export.Dim("n")},) * 2 + ({},)
    )
    assert list(traced.graph_signature.user_inputs) == ["x", "state_0", "state_1"]
