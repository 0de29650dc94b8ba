"""Tests of the validator on records and engines small enough to know the answer."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from polygraphy.comparator import Comparator, RunResults

from enginesmith.compiler.data import open_data
from enginesmith.compiler.generation.likelihood import log_likelihood
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.sources import Model
from enginesmith.compiler.validation.metrics import TOLERANCES
from enginesmith.compiler.validation.polygraphy_io import EngineRunner, ReferenceRunner
from enginesmith.compiler.validation.reference import MAX_PROBE_ELEMENTS, ReferenceOutputs, bounded
from enginesmith.compiler.validation.validator import noise_floor, validate
from enginesmith.errors import DataError, EngineError, OutputError, RecipeError, UnknownNameError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))

Arrays = Mapping[str, np.ndarray]
SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 4)),),
    outputs=(TensorSpec("logits", "float32", ("batch", 3)), TensorSpec("best", "int64", ("batch",))),
    axes={"batch": AxisRange(1, 4, 8)},
)
GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 4] x) => (float[batch, 3] logits, int64[batch] best)
<float[4, 3] w = {1, -2, 0.5, 0.25, 3, -1, 2, 1, 0, -0.5, 0.125, 4}>
{
    logits = MatMul(x, w)
    best = ArgMax<axis = 1, keepdims = 0>(logits)
}
"""
WEIGHT = np.array([[1, -2, 0.5], [0.25, 3, -1], [2, 1, 0], [-0.5, 0.125, 4]], np.float32)


class Linear:
    """Stands for the reference and, as it runs the same way, for an engine; `error` is added to the logits."""

    def __init__(self, error: float = 0.0, state: bool = False) -> None:
        self.error, self.state = error, state
        self.calls = self.resets = 0
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        self.seen.append((str(inputs["x"].dtype), inputs["x"].shape))
        logits = inputs["x"].astype(np.float32) @ WEIGHT + np.float32(self.error)
        if self.state:
            logits = logits * self.calls
        return {"logits": logits, "best": logits.argmax(axis=1)}

    def reset(self) -> None:
        self.calls = 0
        self.resets += 1

    def bind(self, inputs: Arrays) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to close."""


def make_model(reference: Any, signature: Signature = SIGNATURE) -> Model:
    return Model("module", reference, signature, torch.nn.Identity(), None, "fingerprint", 48)


def samples(count: int = 3, rows: int = 4) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        x = generator.standard_normal((rows, 4)).astype(np.float32)
        yield {"x": x, "label": (x @ WEIGHT).argmax(axis=1)}


@pytest.fixture
def record(tmp_path: Path) -> ReferenceOutputs:
    return ReferenceOutputs.record(make_model(Linear()), samples(), tmp_path)


def accuracy(outputs: Arrays, inputs: Arrays) -> np.ndarray:
    return np.asarray(outputs["logits"].argmax(axis=1) == inputs["label"])


def test_an_engine_like_the_reference_passes(record: ReferenceOutputs) -> None:
    engine = Linear()
    found = validate("twin", engine, record, precision="fp32")
    assert (found["engine"], found["passed"], found["samples"]) == ("twin", True, 3)
    assert [output["output"] for output in found["outputs"]] == ["logits", "best"]
    assert found["outputs"][0]["top1"] == 1
    assert [shape for _, shape in engine.seen] == [(4, 4)] * 3 + [(1, 4), (8, 4)]


def test_an_engine_with_an_error_fails(record: ReferenceOutputs) -> None:
    found = validate("off", Linear(error=0.01), record, precision="fp32")
    assert not found["passed"]
    assert found["outputs"][0]["failures"]
    assert found["outputs"][1]["passed"]


def test_the_user_may_set_a_bound(record: ReferenceOutputs) -> None:
    bounds = {"relative_l2": 0.1, "max_abs": 0.1, "cosine": 0.99}
    found = validate("off", Linear(error=0.01), record, precision="fp32", tolerance=bounds)
    assert found["passed"]
    assert found["tolerance"]["relative_l2"] == 0.1
    with pytest.raises(UnknownNameError, match="unknown tolerance 'l2'"):
        validate("off", Linear(), record, precision="fp32", tolerance={"l2": 1})


def test_an_engine_wrong_only_at_the_largest_batch_fails(record: ReferenceOutputs) -> None:
    class Baked(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            outputs = super().run(inputs)
            outputs["logits"][4:] = 0
            return outputs

    assert not validate("baked", Baked(), record, precision="fp32")["passed"]


def test_an_engine_that_does_not_run_fails_with_its_message(record: ReferenceOutputs) -> None:
    class Limited(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            if len(inputs["x"]) > 4:
                raise EngineError("no profile for batch 8")
            return super().run(inputs)

    found = validate("limited", Limited(), record, precision="fp32")
    assert not found["passed"]
    assert found["samples"] == 3
    assert found["outputs"][0]["failures"] == [
        "the engine failed on sample max (x (8, 4)): no profile for batch 8",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: {"logits": outputs["logits"]}, "is missing"),
        (lambda outputs: {**outputs, "more": outputs["best"]}, "no such output"),
        (lambda outputs: {"logits": outputs["best"], "best": outputs["logits"]}, "outputs are swapped"),
    ],
)
def test_other_outputs_than_those_of_the_model_fail(record: ReferenceOutputs, change: Any, message: str) -> None:
    class Odd(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return dict(change(super().run(inputs)))

    found = validate("odd", Odd(), record, precision="fp32", metric=accuracy)
    assert not found["passed"]
    assert any(message in reason for output in found["outputs"] for reason in output["failures"])


def test_state_starts_afresh_with_every_sample(tmp_path: Path) -> None:
    record = ReferenceOutputs.record(make_model(Linear(state=True)), samples(), tmp_path)
    engine = Linear(state=True)
    assert validate("state", engine, record, precision="fp32")["passed"]
    assert engine.resets == 5


def test_engines_with_their_own_dtypes_are_fed_and_judged_by_them(record: ReferenceOutputs) -> None:
    class Half(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            outputs = super().run(inputs)
            return {**outputs, "logits": outputs["logits"].astype(np.float16)}

    signature = Signature(
        (TensorSpec("x", "float16", ("batch", 4)),),
        (TensorSpec("logits", "float16", ("batch", 3)), SIGNATURE.outputs[1]),
        SIGNATURE.axes,
    )
    engine = Half()
    assert validate("half", engine, record, precision="fp16", signature=signature)["passed"]
    assert {dtype for dtype, _ in engine.seen} == {"float16"}
    assert not validate("half", engine, record, precision="fp16")["passed"]


def test_the_metric_of_the_user_stands_beside_the_references(record: ReferenceOutputs) -> None:
    found = validate("half right", Linear(error=0.0), record, precision="fp32", metric=accuracy)["metric"]
    assert found == {"name": "accuracy", "value": 1, "low": 1, "high": 1, "reference": 1, "samples": 12}

    class Biased(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            outputs = super().run(inputs)
            outputs["logits"][:, 0] += 2
            return outputs

    found = validate("biased", Biased(), record, precision="fp32", metric=accuracy)["metric"]
    assert found is not None
    assert found["low"] < found["value"] < found["high"] <= 1
    assert found["reference"] == 1
    assert validate("biased", Biased(), record, precision="fp32", metric=accuracy)["metric"] == found


def test_perplexity_stands_beside_the_metric_that_it_is_made_of(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sample = {"x": generator.random((4, 4), np.float32), "next": np.array([0, 1, 2, 0])}
    (tmp_path / "record").mkdir()
    labelled = ReferenceOutputs.record(make_model(Linear()), [sample], tmp_path / "record")
    found = validate("even", Linear(), labelled, precision="fp32", metric=log_likelihood)["metric"]
    assert found is not None
    assert found["perplexity"] == pytest.approx(np.exp(-found["value"]))
    assert found["perplexity_of_reference"] == pytest.approx(found["perplexity"], rel=1e-5)


def test_a_perplexity_beyond_all_numbers_is_left_out(tmp_path: Path) -> None:
    class Sure(Linear):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {**super().run(inputs), "logits": np.float32([[0, 3000, 0]] * len(inputs["x"]))}

    sample = {"x": np.ones((4, 4), np.float32), "next": np.array([0, 0, 2, 0])}
    (tmp_path / "record").mkdir()
    record = ReferenceOutputs.record(make_model(Linear()), [sample], tmp_path / "record")
    found = validate("sure", Sure(), record, precision="fp32", metric=log_likelihood)["metric"]
    assert found is not None
    assert found["value"] == -3000
    assert "perplexity" not in found


def test_a_metric_may_give_one_number_a_sample(record: ReferenceOutputs) -> None:
    found = validate("twin", Linear(), record, precision="fp32", metric=lambda o, i: float(o["logits"].shape[0]))
    assert found["metric"] is not None
    assert (found["metric"]["value"], found["metric"]["samples"]) == (4, 3)


def test_a_metric_that_gives_no_numbers_is_refused(record: ReferenceOutputs) -> None:
    with pytest.raises(RecipeError, match="metric '<lambda>' gives something else than numbers"):
        validate("twin", Linear(), record, precision="fp32", metric=lambda o, i: o["logits"])
    with pytest.raises(RecipeError, match="is not finite on the reference's own outputs"):
        validate("twin", Linear(), record, precision="fp32", metric=lambda o, i: float("nan"))


def test_an_engine_whose_metric_is_not_finite_has_none(record: ReferenceOutputs) -> None:
    found = validate("nan", Linear(float("nan")), record, precision="fp32", metric=lambda o, i: o["logits"].sum())
    assert found["metric"] is None
    assert not found["passed"]


def test_saved_results_are_read_by_polygraphy(record: ReferenceOutputs, tmp_path: Path) -> None:
    validate("off", Linear(error=0.01), record, precision="fp32", directory=tmp_path)
    results = RunResults.load(str(tmp_path / "results.json"))
    assert list(results.keys()) == ["reference", "off"]
    np.testing.assert_allclose(results["off"][0]["logits"], results["reference"][0]["logits"] + 0.01, atol=1e-6)

    def polygraphy(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("polygraphy")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    shown = polygraphy("inspect", "data", str(tmp_path / "results.json"), "--all")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "off" in shown.stdout
    assert "(5 iterations)" in shown.stdout
    check = ("check", "accuracy", str(tmp_path / "accuracy.json"), "--compare", "snr", "--snr-threshold")
    assert polygraphy(*check, "20").returncode == 0
    assert polygraphy(*check, "80").returncode == 1


def test_only_the_first_samples_are_saved(
    record: ReferenceOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginesmith.compiler.validation.polygraphy_io.MAX_SAVED_BYTES", 200)
    validate("twin", Linear(), record, precision="fp32", directory=tmp_path)
    results = RunResults.load(str(tmp_path / "results.json"))
    assert [array.shape for iteration in results["twin"] for array in iteration.values()] == [(4, 3), (4,)]


def test_both_runners_work_in_polygraphys_comparator() -> None:
    runners = [ReferenceRunner(Linear(), SIGNATURE), EngineRunner(Linear(), SIGNATURE, "engine")]
    feeds = [{"x": sample["x"]} for sample in samples()]
    results = Comparator.run(runners, data_loader=feeds)
    assert bool(Comparator.compare_accuracy(results))
    assert results["engine"][2]["logits"].shape == (4, 3)
    assert results["engine"][0].runtime > 0


def test_a_record_is_read_as_often_as_wanted(record: ReferenceOutputs) -> None:
    first, again = list(record), list(record)
    assert [sample.key for sample in first] == ["0", "1", "2", "min", "max"] == [sample.key for sample in again]
    assert (len(record), record.description) == (3, "3 samples, and the min and max sizes of the dynamic axes")
    assert list(first[0].labels) == ["label"]
    assert list(first[3].labels) == []
    expected = next(samples())["x"]
    np.testing.assert_array_equal(first[0].inputs["x"], expected)
    np.testing.assert_array_equal(first[3].inputs["x"], expected[:1])
    np.testing.assert_array_equal(first[4].inputs["x"], np.tile(expected, (2, 1)))


def test_a_record_is_copied_up_to_a_size_and_judges_without_the_model(record: ReferenceOutputs, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    record.save(folder, max_bytes=500)
    again = ReferenceOutputs(folder, Signature.from_json(SIGNATURE.to_json()))
    assert [sample.key for sample in again] == ["0", "1", "min"]
    assert validate("twin", Linear(), again, precision="fp32", metric=accuracy)["passed"]
    assert not validate("off", Linear(0.1), again, precision="fp32")["passed"]
    with np.load(folder / "inputs.npz") as inputs:
        assert inputs["0/x"].shape == (4, 4)
    before = (folder / "inputs.npz").read_bytes()
    record.save(folder, max_bytes=500)
    assert (folder / "inputs.npz").read_bytes() == before


def test_the_number_of_samples_is_bounded(tmp_path: Path) -> None:
    reference = Linear()
    record = ReferenceOutputs.record(make_model(reference), samples(9), tmp_path, max_samples=2)
    assert len(record) == 2
    assert len(reference.seen) == 4


def test_probes_stay_below_a_size(tmp_path: Path) -> None:
    signature = Signature(SIGNATURE.inputs, SIGNATURE.outputs, {"batch": AxisRange(4, 4, MAX_PROBE_ELEMENTS)})
    reference = Linear()
    ReferenceOutputs.record(make_model(reference, signature), samples(), tmp_path)
    assert [shape for _, shape in reference.seen] == [(4, 4)] * 3 + [(MAX_PROBE_ELEMENTS // 4, 4)]


@pytest.mark.parametrize(
    ("axis", "rows"), [(AxisRange(1, 4, 64), 2), (AxisRange(3, 4, 64), 3), (AxisRange(1, 1, 1), 1)]
)
def test_large_rows_are_two_at_least_where_there_are_two(axis: AxisRange, rows: int) -> None:
    inputs = (TensorSpec("x", "float32", ("batch", MAX_PROBE_ELEMENTS)),)
    signature = Signature(inputs, SIGNATURE.outputs, {"batch": axis})
    assert bounded(signature, signature.sizes("max")) == {"batch": rows}


class Decoder:
    """Gives a token more its row's sum over the caches, and as many zeros; one that mixes rows up turns them round."""

    def __init__(self, *, mixed: bool = False) -> None:
        self.mixed = mixed
        self.seen: list[dict[str, Any]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.seen.append(dict(inputs))
        sums = inputs["key"].sum(axis=(1, 2, 3)) + inputs["ids"].sum(axis=1) + inputs["past"]
        sums = sums[::-1] if self.mixed and inputs["ids"].shape[1] == 1 else sums
        logits = np.eye(11, dtype=np.float32)[0] * sums[:, None].astype(np.float32)
        return {"logits": logits, **{f"{name}_out": inputs[name] for name in ("key", "value")}}

    def reset(self) -> None:
        """No state."""


def test_a_decoder_that_mixes_rows_up_in_calls_of_one_token_fails(tmp_path: Path) -> None:
    signature, reference = small["signature"](), Decoder()
    data = open_data(None, signature)
    record = ReferenceOutputs.record(make_model(reference, signature), data, tmp_path)
    assert [sample.key for sample in record] == ["0", "1", "max", "rows"]
    assert (len(record), record.description) == (
        2, "2 samples, and the max sizes of the dynamic axes, and one token more of several rows"
    )  # fmt: skip
    assert reference.seen[-1]["ids"].shape == (3, 1)
    assert validate("twin", Decoder(), record, precision="fp32")["passed"]
    assert not validate("mixed", Decoder(mixed=True), record, precision="fp32")["passed"]


def test_rows_of_large_caches_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginesmith.compiler.validation.reference.MAX_PROBE_ELEMENTS", 1)
    signature, reference = small["signature"](), Decoder()
    ReferenceOutputs.record(make_model(reference, signature), open_data(None, signature), tmp_path)
    assert reference.seen[-1]["ids"].shape == (2, 1)


@pytest.mark.parametrize("axes", [{"batch": AxisRange(1, 1, 1)}, {"time": AxisRange(2, 2, 16)}], ids=str)
def test_a_decoder_without_such_calls_is_not_probed_with_them(tmp_path: Path, axes: dict[str, AxisRange]) -> None:
    signature = small["signature"]()
    signature = dataclasses.replace(signature, axes={**signature.axes, **axes})
    data = open_data(None, signature)
    record = ReferenceOutputs.record(make_model(Decoder(), signature), data, tmp_path)
    assert "rows" not in [sample.key for sample in record]


def test_a_record_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no samples to judge engines on"):
        ReferenceOutputs.record(make_model(Linear()), [], tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no record of the reference"):
        ReferenceOutputs(tmp_path, SIGNATURE)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "inputs.npz"))

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        ReferenceOutputs.record(make_model(Linear()), samples(), tmp_path)


def test_the_noise_floor_is_the_captured_graph_without_optimizations(record: ReferenceOutputs, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    what, metrics = noise_floor(record, make_model(Linear()), path)
    assert what == "captured graph in fp32, ONNX Runtime on the CPU without optimizations"
    assert [m["output"] for m in metrics] == ["logits", "best"]
    assert all(m["passed"] for m in metrics)
    found = validate("twin", Linear(), record, precision="fp32", floor=(what, metrics))
    assert (found["noise_floor_of"], found["noise_floor"]) == (what, metrics)


def test_without_a_graph_the_noise_floor_is_the_reference_itself(record: ReferenceOutputs) -> None:
    what, metrics = noise_floor(record, make_model(Linear()), None)
    assert what == "reference, run a second time"
    assert [m["relative_l2"] for m in metrics] == [0, None]


def test_a_graph_that_does_not_run_leaves_the_reference_as_noise_floor(
    record: ReferenceOutputs, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH.replace("batch, 4] x", "batch, 5] x")), path)
    what, metrics = noise_floor(record, make_model(Linear()), path)
    assert what == "reference, run a second time"
    assert all(m["passed"] for m in metrics)


class Rounded(Linear):
    """Computes in another precision."""

    def __init__(self, dtype: str, error: float = 0.0) -> None:
        super().__init__(error)
        self.dtype = dtype

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = super().run(inputs)
        return {**outputs, "logits": outputs["logits"].astype(self.dtype)}


def test_a_model_in_half_precision_is_judged_by_its_own_bounds(tmp_path: Path) -> None:
    logits, best = SIGNATURE.outputs
    half = dataclasses.replace(SIGNATURE, outputs=(dataclasses.replace(logits, dtype="float16"), best))
    record = ReferenceOutputs.record(make_model(Rounded("float16"), half), samples(), tmp_path)
    found = validate("twin", Rounded("float16", error=2e-3), record, precision="fp32")
    assert found["passed"]
    assert found["tolerance"] == TOLERANCES["fp16"]
    assert not validate("off", Rounded("float16", error=0.1), record, precision="fp32")["passed"]


def test_bfloat16_is_compared_as_float32(tmp_path: Path) -> None:
    logits, best = SIGNATURE.outputs
    brain = dataclasses.replace(SIGNATURE, outputs=(dataclasses.replace(logits, dtype="bfloat16"), best))
    record = ReferenceOutputs.record(make_model(Rounded("bfloat16"), brain), samples(), tmp_path)
    assert {str(sample.outputs["logits"].dtype) for sample in record} == {"float32"}
    found = validate("twin", Rounded("bfloat16"), record, precision="fp32")
    assert found["passed"]
    assert found["tolerance"] == TOLERANCES["bf16"]


def test_fewer_samples_may_be_judged(record: ReferenceOutputs) -> None:
    fewer = ReferenceOutputs(record.directory, record.signature, max_samples=1)
    assert [sample.key for sample in fewer] == ["0", "min", "max"]
    assert (len(fewer), fewer.description) == (1, "1 sample, and the min and max sizes of the dynamic axes")
    assert validate("twin", Linear(), fewer, precision="fp32")["samples"] == 1
