import numpy as np
import pytest
import safetensors.torch
import torch

from enginesmith.compiler.signature import TensorSpec, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError, SourceError, UnknownNameError

FACTORY = """
import torch
from torch import nn
from blocks import Block

def build(width=3):
    return nn.Sequential(nn.Linear(4, width), Block())

def broken():
    print("hello from the factory")
    raise KeyError("no such layer")

def number():
    return 3

def leave():
    raise SystemExit(1)

def needy(depth):
    return nn.Linear(4, depth)

nothing = None
instance = nn.Linear(4, 2)
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def forward(self, x):
        return x.relu()
"""
INPUTS = parse_inputs(["input:1x4"], ["input:0=1..4..8"])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "blocks.py").write_text(BLOCKS)
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_factory_with_weights(file, suffix):
    state = {"0.weight": torch.ones(2, 4), "0.bias": torch.tensor([0.5, -10])}
    weights = file.with_suffix(suffix)
    safetensors.torch.save_file(state, weights) if suffix == ".safetensors" else torch.save(state, weights)
    model = load_model(f"{file}:build", weights=weights, inputs=INPUTS, arguments={"width": 2})
    outputs = model.reference.run({"input": np.ones((3, 4), np.float32)})
    np.testing.assert_allclose(outputs["output"], [[4.5, 0]] * 3)
    assert model.kind == "module"
    assert model.signature.outputs == (TensorSpec("output", "float32", ("batch", 2)),)
    assert model.parameter_bytes == 4 * (8 + 2)
    assert not model.stateful
    (flat,) = model.module(torch.ones(1, 4))
    assert flat.tolist() == [[4.5, 0]]


def test_a_module_at_the_top_of_the_file_is_a_factory_too(file):
    assert load_model(f"{file}:instance", inputs=INPUTS).signature.outputs[0].shape == ("batch", 2)


def test_the_fingerprint_tells_weights_code_and_arguments_apart(file):
    def fingerprint(**options):
        return load_model(f"{file}:build", inputs=INPUTS, **options).fingerprint

    first = fingerprint()
    assert fingerprint() == first, "random weights come from a seed"
    torch.save({"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}, file.with_suffix(".pt"))
    others = {fingerprint(arguments={"width": 5}), fingerprint(weights=file.with_suffix(".pt"))}
    file.write_text(FACTORY + "\n# another version")
    others.add(fingerprint())
    assert len(others - {first}) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("broken", {}, SourceError, r"failed at .*net.py:11 in broken(?s:.*)KeyError: 'no such layer'"),
        ("leave", {}, SourceError, "net.py:17 in leave(?s:.*)SystemExit"),
        ("build", {"widht": 3}, UnknownNameError, r"parameter of factory build\(width=3\) 'widht'(?s:.*)mean 'width'"),
        ("needy", {}, RecipeError, r"factory needy\(depth\) does not take the arguments(?s:.*)missing.*'depth'"),
        ("nothing", {}, RecipeError, "net.py:nothing' is no function(?s:.*)of type NoneType"),
        ("instance", {"width": 3}, RecipeError, "net.py:instance is a module already(?s:.*)found: width"),
        ("number", {}, SourceError, "net.py:number gives no module(?s:.*)found: builtins.int"),
        ("", {}, UnknownNameError, "unknown factory in net.py ''"),
        ("biuld", {}, UnknownNameError, "unknown factory in net.py 'biuld'(?s:.*)did you mean 'build'"),
    ],
)
def test_a_factory_that_fails(file, name, arguments, error, match, capsys):
    with pytest.raises(error, match=match):
        load_model(f"{file}:{name}", inputs=INPUTS, arguments=arguments)
    assert capsys.readouterr().out == ""


def test_what_the_users_code_prints_goes_to_the_log(file):
    lines = []
    with pytest.raises(SourceError, match="broken"):
        load_model(f"{file}:broken", inputs=INPUTS, log=lines.append)
    assert lines == ["hello from the factory"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("import torch\nx = = 1", r"net.py:2(?s:.*)SyntaxError"),
        ("\nimport surely_not_installed", r"net.py:2 in <module>(?s:.*)ModuleNotFoundError"),
    ],
)
def test_a_file_that_fails(file, content, match):
    file.write_text(content)
    with pytest.raises(SourceError, match=match):
        load_model(f"{file}:build", inputs=INPUTS)


def test_a_python_file_without_factory(file, tmp_path):
    with pytest.raises(SourceError, match=r"(?s)names no factory.*build, broken, number, leave, needy.*for instance"):
        load_model(file)
    with pytest.raises(SourceError, match=r"does not exist(?s:.*)before the colon"):
        load_model(f"{tmp_path}/none.py:build")


def test_inputs_are_needed():
    class Two(torch.nn.Module):
        def forward(self, image, mask=None):
            return image

    with pytest.raises(
        RecipeError, match=r"inputs of the model are not known(?s:.*)forward\(image, mask \(optional\)\)"
    ):
        load_model(Two())


def test_other_objects_are_no_models():
    with pytest.raises(SourceError, match=r"of a type that cannot be loaded(?s:.*)builtins.dict"):
        load_model({})


class Step(torch.nn.Module):
    """Nested inputs and outputs, and a tensor that comes back in another shape."""

    def forward(self, x, state, scale):
        h, c = state
        return {"y": x * scale, "state": (h + 1, None, c), "flat": torch.cat([x, x]).reshape(-1)}


def test_nested_inputs_and_outputs_and_constants():
    inputs = parse_inputs(["x:1x3", "state.0:1x2", "state.1:5:int64"], ["x:0=1..2..4", "state.0:0=1..2..4"])
    model = load_model(Step(), inputs=inputs, arguments={"scale": 2.0})
    assert [str(spec) for spec in model.signature.outputs] == [
        "y:batchx3:float32", "state.0_out:batchx2:float32", "state.2:5:int64", "flat:?:float32",
    ]  # fmt: skip
    arrays = {"x": np.ones((4, 3), np.float32), "state.0": np.zeros((4, 2), np.float32), "state.1": np.arange(5)}
    nested = model.signature.nest(model.reference.run(arrays))
    assert nested["y"].tolist() == [[2.0] * 3] * 4
    assert nested["state"][0].tolist() == [[1.0] * 2] * 4
    assert nested["state"][1] is None
    assert nested["state"][2].tolist() == [0, 1, 2, 3, 4]


def test_nan_weights_are_refused():
    module = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(module.bias, float("nan"))
    with pytest.raises(SourceError, match=r"weight 'bias' holds NaN(?s:.*)2 of 2 values"):
        load_model(module, inputs=INPUTS)


def test_a_model_that_fails_on_its_inputs():
    with pytest.raises(
        SourceError, match=r"failed when it was run(?s:.*)RuntimeError(?s:.*)input \(1, 5\)(?s:.*)--data"
    ):
        load_model(torch.nn.Linear(4, 2), inputs=parse_inputs(["input:1x5"]))


class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2).bfloat16()

    def forward(self, input):
        return self.linear(input.bfloat16())


def test_bfloat16_is_given_back_as_float32():
    model = load_model(Half(), inputs=parse_inputs(["input:1x4"]))
    assert model.signature.outputs[0].dtype == "bfloat16"
    assert model.reference.run({"input": np.ones((1, 4), np.float32)})["output"].dtype == np.float32


@pytest.mark.parametrize("source", ["factory", "object"])
def test_a_range_needs_an_input(file, source):
    model = f"{file}:build" if source == "factory" else torch.nn.Linear(4, 2)
    with pytest.raises(RecipeError, match=r"--dynamic needs --input here(?s:.*)found: input:0=1..2(?s:.*)pass --input"):
        load_model(model, dynamic=["input:0=1..2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(RecipeError, match=r"cannot run on a GPU here(?s:.*)choose 'cpu'"):
        load_model(torch.nn.Linear(4, 2), inputs=INPUTS, device="cuda")


class Counter(torch.nn.Module):
    def __init__(self, where):
        super().__init__()
        self.where = where
        self.register_buffer("count", torch.zeros(()))
        self.last = None

    def forward(self, x):
        if self.where == "buffer":
            self.count += 1
            return x + self.count
        self.last = x if self.last is None else self.last + x
        return self.last


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_state_is_found_and_reset(where):
    model = load_model(Counter(where), inputs=parse_inputs(["x:2"]))
    x = {"x": np.ones(2, np.float32)}
    first, second = model.reference.run(x)["output"], model.reference.run(x)["output"]
    assert model.stateful
    assert not np.array_equal(first, second)
    model.reference.reset()
    assert np.array_equal(model.reference.run(x)["output"], first)


def test_random_outputs_are_refused():
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(SourceError, match=r"gives other outputs each time(?s:.*)torch.rand"):
        load_model(Noise(), inputs=parse_inputs(["x:2"]))


def test_a_real_sample_takes_the_place_of_random_inputs():
    class Picky(torch.nn.Module):
        def forward(self, ids):
            assert ids.min() >= 5, "ids start at 5"
            return torch.ones(10)[ids]

    inputs = parse_inputs(["ids:1x3:int64"], ["ids:0=1..2..4"])
    with pytest.raises(SourceError, match="ids start at 5"):
        load_model(Picky(), inputs=inputs)
    model = load_model(Picky(), inputs=inputs, sample={"ids": np.full((1, 3), 5)})
    assert model.signature.outputs[0].shape == ("batch", 3)


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: x if len(x) == 2 else (x, x), "the outputs of the model depend on the sizes"),
        (lambda self, x: x if len(x) == 2 else x.unsqueeze(0), "the rank of an output depends on the sizes"),
    ],
)
def test_outputs_that_change_with_the_size_are_refused(forward, match):
    module = type("Changing", (torch.nn.Module,), {"forward": forward})()
    with pytest.raises(SourceError, match=match):
        load_model(module, inputs=parse_inputs(["x:2x2"], ["x:0=1..2..4"]))


def test_the_model_is_in_eval_mode():
    model = load_model(torch.nn.Sequential(torch.nn.Dropout()), inputs=parse_inputs(["input:8"]))
    x = np.ones(8, np.float32)
    assert np.array_equal(model.reference.run({"input": x})["output"], x)
