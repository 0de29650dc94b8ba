"""The judge for users' own tests is itself judged: it must reject what is wrong, and say where."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch

import enginesmith
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.errors import DataError, RecipeError, SourceError, UnknownNameError, UsageError
from enginesmith.testing import assert_engine_close

small = runpy.run_path(str(Path(__file__).parents[2] / "small_bundles.py"))
X = small["samples"]()[0]
RIGHT = small["network"](X)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.from_numpy(small["W"].copy()))
        self.v = torch.nn.Parameter(torch.from_numpy(small["V"].copy()))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drop(x @ self.w), torch.tanh(x @ self.v)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right engine, and one for each way to be wrong."""
    changes = {"plain": "", **{name: name for name in small["CHANGES"]}}
    return Path(small["write_bundle"](tmp_path_factory.mktemp("close") / "net", changes, times_ms={"plain": 1.0}))


def test_a_right_engine_passes_on_the_record_of_its_bundle_and_gives_the_metrics(bundle: Path) -> None:
    found = assert_engine_close(bundle)
    assert set(found) == {"left", "right"}
    assert found["left"].passed
    assert found["left"].metrics["relative_l2"] < 1e-6
    assert found["left"].metrics["top1"] == 1
    assert found["left"].metrics["nan"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("zeros", r"left: relative_l2 is 1, allowed 0\.0001"),
        ("nan", r"left: 12 NaN where the reference has none"),
        ("swapped", r"left: equals the engine's output 'right': outputs are swapped"),
        ("flipped", r"left +DIFFERS +\S+ +\S+ +\S+ +0 +0 +sample \d, \[\d, 1\]: expected "),
        ("scaled", r"left: relative_l2 is 0\.2, allowed 0\.0001"),
    ],
)
@pytest.mark.parametrize("given", ["record", "module", "function", "arrays"])
def test_a_wrong_engine_fails(bundle: Path, change: str, message: str, given: str) -> None:
    reference: Any = {"record": None, "module": Net(), "function": lambda x: (x @ small["W"], np.tanh(x @ small["V"]))}
    inputs = None if given == "record" else {"x": X}
    if given == "record" and change == "nan":
        message = message.replace("12", "36")
    with pytest.raises(AssertionError, match=message) as failed:
        assert_engine_close(f"{bundle}#{change}", reference.get(given, RIGHT), inputs=inputs)
    text = str(failed.value)
    assert text.startswith(f"engine {change} is not close to its reference: ")
    assert "allowed: relative_l2 0.0001, max_abs 0.001, cosine 0.999999, top1 0.999" in text
    assert (re.search(r"^right +ok .* -$", text, re.MULTILINE) is not None) == (change != "swapped")


def test_the_message_names_the_worst_place_of_the_worst_sample(tmp_path: Path) -> None:
    engine = small["write_engine"](tmp_path / "plain")
    outputs = [{name: array.copy() for name, array in small["network"](x).items()} for x in small["samples"]()]
    outputs[1]["left"][2, 1] += 5
    outputs[2]["left"][0, 0] += 0.5
    with pytest.raises(AssertionError, match=r"1 of 2 outputs differ, 3 samples") as failed:
        assert_engine_close(engine, outputs, inputs=[{"x": x} for x in small["samples"]()])
    value = small["network"](small["samples"]()[1])["left"][2, 1]
    assert f"sample 1, [2, 1]: expected {value + 5:.6g}, found {value:.6g}" in str(failed.value)


@pytest.mark.parametrize("kind", ["mapping", "array", "tensors", "npz", "record", "list"])
def test_outputs_that_were_saved_are_a_reference(bundle: Path, tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "outputs.npz", **RIGHT)
    references = {
        "mapping": RIGHT,
        "array": None,
        "tensors": {name: torch.from_numpy(array) for name, array in RIGHT.items()},
        "npz": tmp_path / "outputs.npz",
        "record": bundle / "reference",
        "list": [RIGHT],
    }
    if kind == "array":
        engine = one_output(tmp_path / "one")
        assert assert_engine_close(engine, X * 2, inputs={"x": X})["y"].passed
        with pytest.raises(AssertionError, match=r"y: relative_l2 is 0\.5"):
            assert_engine_close(engine, X * 4, inputs={"x": X})
        return
    inputs = None if kind == "record" else {"x": X}
    assert assert_engine_close(bundle, references[kind], inputs=inputs)["right"].passed
    with pytest.raises(AssertionError, match=r"relative_l2 is 0\.2"):
        assert_engine_close(f"{bundle}#scaled", references[kind], inputs=inputs)


def one_output(folder: Path) -> Path:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 4] x) => (float[batch, 4] y) { y = Add(x, x) }"""
    described = small["signature"]()
    one = Signature(described.inputs, (TensorSpec("y", "float32", ("batch", 4)),), described.axes)
    small["write_engine"](folder, described=one)
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return folder


def test_a_module_is_run_in_eval_mode_and_left_as_it_was(bundle: Path) -> None:
    net = Net().train()
    assert assert_engine_close(bundle, net)["left"].passed
    assert net.training
    assert net.drop.training


def test_another_engine_is_a_reference(bundle: Path) -> None:
    with enginesmith.load(bundle, "plain") as plain, enginesmith.load(bundle, "flipped") as flipped:
        assert assert_engine_close(plain, plain, inputs={"x": X})["left"].metrics["relative_l2"] == 0
        with pytest.raises(AssertionError, match="engine flipped is not close"):
            assert_engine_close(flipped, plain, inputs={"x": X})
        assert plain.run({"x": X})["left"].shape == (4, 3)  # it stays open


def test_a_model_file_is_a_reference(bundle: Path) -> None:
    model = str(bundle / "engines" / "plain" / "model.onnx")
    assert assert_engine_close(bundle, model)["left"].passed
    with pytest.raises(AssertionError, match=r"left: relative_l2 is 0\.2"):
        assert_engine_close(f"{bundle}#scaled", model)
    with pytest.raises(SourceError, match="does not exist"):
        assert_engine_close(bundle, "absent.onnx")


def test_inputs_may_be_a_file_of_data(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.concatenate(small["samples"]()))
    assert assert_engine_close(bundle, Net(), inputs=tmp_path / "x.npz")["left"].passed
    with pytest.raises(AssertionError, match="3 samples"):
        assert_engine_close(f"{bundle}#scaled", Net(), inputs=tmp_path / "x.npz")


def test_floats_of_another_width_are_adapted(bundle: Path) -> None:
    assert assert_engine_close(bundle, Net(), inputs={"x": X.astype(np.float64)})["left"].passed


def test_the_tolerance_may_be_a_precision_or_bounds(bundle: Path) -> None:
    scaled = f"{bundle}#scaled"
    loose = {"relative_l2": 0.21, "max_abs": 0.21}
    found = assert_engine_close(scaled, tolerance=loose)["left"]
    assert found.passed
    assert (found.metrics["relative_l2"], found.sample) == (pytest.approx(0.2, rel=1e-3), 0)
    assert found.found == pytest.approx(1.2 * (found.expected or 0), rel=1e-5)
    with pytest.raises(AssertionError, match=r"allowed: relative_l2 0\.15"):
        assert_engine_close(scaled, tolerance="int8")
    with pytest.raises(UnknownNameError, match="unknown precision 'fp12'"):
        assert_engine_close(bundle, tolerance="fp12")
    with pytest.raises(UnknownNameError, match="unknown tolerance 'l2'"):
        assert_engine_close(bundle, tolerance={"l2": 1.0})
    with pytest.raises(RecipeError, match="tolerance 'top1' is not a bound"):
        assert_engine_close(bundle, tolerance={"top1": float("nan")})


def test_the_bounds_of_the_bundle_hold_by_default(tmp_path: Path) -> None:
    bundle = small["write_bundle"](tmp_path / "net", {"scaled": "scaled"})
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["engines"][0]["validation"]["tolerance"] |= {"relative_l2": 0.3, "max_abs": 0.3}
    path.write_text(json.dumps(manifest))
    assert assert_engine_close(bundle)["left"].passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": RIGHT, "inputs": []}, "inputs and saved outputs are not of the same number of samples"),
        ({"reference": [RIGHT] * 2, "inputs": {"x": X}}, "inputs and saved outputs are not of the same number"),
        ({"reference": lambda x: (x, x), "inputs": []}, "there are no samples to compare on"),
        ({"reference": Net(), "inputs": []}, "there are no samples to compare on"),
        ({"reference": RIGHT, "inputs": [X]}, "inputs are given by name"),
        ({"reference": RIGHT, "inputs": {"y": X}}, "input 'x' is missing"),
        ({"reference": RIGHT, "inputs": {"x": [object()]}}, "input 'x' is no array"),
        ({"reference": RIGHT, "inputs": {"x": [[1.0], [1.0, 2.0]]}}, "input 'x' is no array"),
        (
            {"reference": lambda y: y, "inputs": {"x": X}},
            "the reference does not take the inputs of the engine by name",
        ),
        ({"reference": lambda x: (x,), "inputs": {"x": X}}, "the reference returns something else than the engine"),
        ({"reference": 3, "inputs": {"x": X}}, "the reference is of an unknown kind"),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_failure(bundle: Path, arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        assert_engine_close(bundle, **arguments)


def test_an_engine_without_a_bundle_needs_a_reference_and_inputs(tmp_path: Path) -> None:
    engine = small["write_engine"](tmp_path / "plain")
    with pytest.raises(DataError, match="there are no inputs to compare on"):
        assert_engine_close(engine, Net())
    with pytest.raises(DataError, match="engine plain has no record of a reference"):
        assert_engine_close(engine, inputs={"x": X})
    with pytest.raises(UsageError, match="is neither a bundle nor an engine"):
        assert_engine_close(tmp_path / "absent")


def test_an_archive_that_cannot_be_read_is_an_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"outputs '.*broken.npz' cannot be read"):
        assert_engine_close(bundle, tmp_path / "broken.npz", inputs={"x": X})


def test_an_output_that_is_missing_fails(bundle: Path) -> None:
    with pytest.raises(AssertionError, match="right: the reference has no such output"):
        assert_engine_close(bundle, {"left": RIGHT["left"]}, inputs={"x": X})
    with pytest.raises(AssertionError, match=r"left: shape is \(4, 3\), expected \(3, 3\)"):
        assert_engine_close(bundle, {**RIGHT, "left": RIGHT["left"][:3]}, inputs={"x": X})


def test_it_needs_neither_torch_nor_click(bundle: Path) -> None:
    code = (
        "import sys; from enginesmith.testing import assert_engine_close, assert_not_slower\n"
        f"assert_engine_close({str(bundle)!r})\n"
        "print(sorted({'torch', 'onnx', 'click', 'pydantic', 'pytest', 'polygraphy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
