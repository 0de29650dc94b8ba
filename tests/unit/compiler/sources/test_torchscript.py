import zipfile

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError, SourceError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.seen = 0

    def forward(self, x: torch.Tensor, rate: int, state: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if rate == 16000:
            self.seen += 1
        return self.linear(x) * self.seen, state[0] + state[1]


INPUTS = parse_inputs(["x:1x3", "state.0:2", "state.1:2"], ["x:0=1..2..4"])
ARRAYS = {"x": np.ones((2, 3), np.float32), "state.0": np.ones(2, np.float32), "state.1": np.ones(2, np.float32)}


@pytest.fixture
def archive(tmp_path):
    torch.jit.save(torch.jit.script(Scale().eval()), tmp_path / "scale.pt")
    return tmp_path / "scale.pt"


def test_an_archive_with_state_and_a_constant(archive):
    model = load_model(archive, inputs=INPUTS, arguments={"rate": 16000})
    assert model.kind == "torchscript"
    assert model.stateful
    assert [spec.shape for spec in model.signature.outputs] == [("batch", 2), (2,)]
    assert model.parameter_bytes == 4 * (6 + 2)
    first, second = model.reference.run(ARRAYS)["output.0"], model.reference.run(ARRAYS)["output.0"]
    np.testing.assert_allclose(second, 2 * first)
    model.reference.reset()
    np.testing.assert_array_equal(model.reference.run(ARRAYS)["output.0"], first)


def test_another_constant_is_another_model(archive):
    at_16k = load_model(archive, inputs=INPUTS, arguments={"rate": 16000})
    at_8k = load_model(archive, inputs=INPUTS, arguments={"rate": 8000})
    assert not at_8k.stateful
    assert at_8k.fingerprint != at_16k.fingerprint


def test_a_script_module_made_in_python_can_be_reset():
    model = load_model(torch.jit.script(Scale().eval()), inputs=INPUTS, arguments={"rate": 16000})
    first = model.reference.run(ARRAYS)["output.0"]
    model.reference.reset()
    np.testing.assert_array_equal(model.reference.run(ARRAYS)["output.0"], first)


def test_frozen_weights_are_counted_and_checked(tmp_path):
    linear = torch.nn.Linear(3, 2).eval()

    def freeze():
        return torch.jit.freeze(torch.jit.script(linear))

    assert load_model(freeze(), inputs=parse_inputs(["input:1x3"])).parameter_bytes == 4 * (6 + 2)
    torch.nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(SourceError, match=r"weight 'constant .*' holds NaN"):
        load_model(freeze(), inputs=parse_inputs(["input:1x3"]))


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "match"),
    [
        (None, {}, RecipeError, r"not known(?s:.*)forward\(x, rate, state\)"),
        (INPUTS, {}, RecipeError, "parameter 'rate' .* takes no tensor(?s:.*)type int(?s:.*)rate=VALUE"),
        (parse_inputs(["x:1x3", "rate:1"]), {}, RecipeError, "parameter 'rate' .* takes no tensor(?s:.*)an input"),
        (parse_inputs(["xx:1x3"]), {"rate": 1}, UnknownNameError, "unknown parameter of the model's forward 'xx'"),
        (parse_inputs(["x:1x3"]), {"rate": 1}, RecipeError, "forward needs 'state', which no input gives"),
    ],
)
def test_inputs_that_do_not_fit(archive, inputs, arguments, error, match):
    with pytest.raises(error, match=match):
        load_model(archive, inputs=inputs, arguments=arguments)


def test_a_damaged_archive_is_refused(archive):
    damaged = archive.with_name("damaged.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(damaged, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"class" if name.endswith(".py") else old.read(name))
    with pytest.raises(SourceError, match=r"TorchScript archive .* cannot be loaded"):
        load_model(damaged, inputs=INPUTS)


def test_a_truncated_archive_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(SourceError, match="truncated or damaged archive"):
        load_model(archive, inputs=INPUTS)


def test_a_module_without_forward_is_refused():
    class Other(torch.nn.Module):
        @torch.jit.export
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(SourceError, match=r"has no forward(?s:.*)encode"):
        load_model(torch.jit.script(Other()), inputs=INPUTS)


def test_weights_do_not_go_with_an_archive(archive):
    with pytest.raises(RecipeError, match=r"--weights .* does not go with scale.pt"):
        load_model(archive, weights=archive, inputs=INPUTS)


def test_bare_weights_are_no_model(tmp_path):
    torch.save(Scale().state_dict(), tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"holds weights only(?s:.*)give file.py:factory with --weights"):
        load_model(tmp_path / "w.pt", inputs=INPUTS)


def test_a_range_needs_an_input(archive):
    with pytest.raises(RecipeError, match="--dynamic needs --input here"):
        load_model(archive, dynamic=["x:0=1..2..4"])
