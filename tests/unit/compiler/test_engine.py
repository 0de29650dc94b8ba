import dataclasses
import json
import threading

import numpy as np
import onnx.parser
import pytest

from enginesmith.compiler.engine import Engine, load
from enginesmith.compiler.machine import requirements
from enginesmith.compiler.machine.requirements import check_machine
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.errors import (
    DataError,
    EngineError,
    EngineMismatchError,
    TargetUnavailableError,
    UnknownNameError,
    UsageError,
)
from enginesmith.targets import get_target
from enginesmith.targets.base import EngineInfo

SIGNATURE = Signature(
    inputs=(TensorSpec("image", "float32", ("batch", 3)),),
    outputs=(TensorSpec("logits", "float32", ("batch", 3)), TensorSpec("mean", "float32", ("batch",))),
    axes={"batch": AxisRange(1, 2, 4)},
    structure={"dict": {"logits": "logits", "pair": {"tuple": ["mean", "logits"]}}},
)
MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 3] image) => (float[batch, 3] logits, float[batch] mean) <float scale = {SCALE}> {
  logits = Mul(image, scale)
  axes = Constant<value = int64[1] {1}>()
  mean = ReduceMean<keepdims = 0>(logits, axes)
}
"""
IMAGE = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_engine(bundle, name, scale=2.0, **changes):
    """One engine that multiplies by `scale`, with its record for the manifest."""
    folder = bundle / "engines" / name
    folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(MODEL.replace("SCALE", str(scale))), folder / "model.onnx")
    info = EngineInfo(name, "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, options={"threads": 1})
    dataclasses.replace(info, **changes).write(folder)
    return {
        "name": name,
        "target": info.target,
        "status": "ready",
        "reason": "",
        "to_do": "",
        "validation": {"passed": True},
    }


def timing(candidate, p50_ms, batch=2):
    return {"candidate": candidate, "sizes": {"batch": batch}, "p50_ms": p50_ms}


def write_manifest(bundle, records, timings=(), **changes):
    manifest = {
        "format": 1,
        "signature": SIGNATURE.to_json(),
        "engines": records,
        "benchmark": {"timings": list(timings)},
        "files": hashes(bundle),
        **changes,
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def bundle(tmp_path):
    write_manifest(tmp_path, [write_engine(tmp_path, "only")])
    return tmp_path


def test_a_dropped_engine_is_loaded_by_name_alone(tmp_path):
    records = [write_engine(tmp_path, "dense"), {**write_engine(tmp_path, "sparse"), "dropped": "it is not faster"}]
    write_manifest(tmp_path, records, [timing("dense", 2.0), timing("sparse", 1.0)])
    assert load(tmp_path).name == "dense"
    assert load(tmp_path, "sparse").name == "sparse"
    write_manifest(tmp_path, records[1:])
    with pytest.raises(EngineError, match="sparse: dropped, as it is not faster; name it to load it all the same"):
        load(tmp_path)


@pytest.mark.parametrize(("limit_ms", "found"), [(None, 4), (3.0, 2), (0.5, None)])
def test_the_best_batch_is_read_from_the_manifest(tmp_path, limit_ms, found):
    records = [write_engine(tmp_path, "only"), write_engine(tmp_path, "other")]
    times = {1: 1.0, 2: 1.9, 4: 3.5, 64: 4.0}  # the axis ends at 4
    points = [
        {"batch": n, "p99_ms": ms, "samples_per_s": n / ms, "fits": True, "reason": ""} for n, ms in times.items()
    ]
    curve = {"engine": "only", "points": points, "p99_limit_ms": limit_ms}
    write_manifest(tmp_path, records, batches=[curve])
    assert load(tmp_path, "only").best_batch == load(tmp_path).best_batch == found
    assert load(tmp_path, "other").best_batch is None


def test_call_nests_and_run_is_flat(bundle):
    engine = load(bundle)
    nested = engine(image=IMAGE)
    np.testing.assert_array_equal(nested["logits"], IMAGE * 2)
    np.testing.assert_array_equal(nested["pair"][0], (IMAGE * 2).mean(axis=1))
    assert list(engine.run({"image": IMAGE})) == ["logits", "mean"]
    np.testing.assert_array_equal(engine({"image": IMAGE[:1]})["logits"], IMAGE[:1] * 2)


def test_engine_says_what_it_is(bundle):
    engine = load(str(bundle))
    assert (engine.name, engine.target, engine.precision) == ("only", "onnxruntime-cpu", "fp32")
    assert engine.signature == SIGNATURE
    assert engine.info.options["threads"] == 1
    assert engine.best_batch is None
    assert repr(engine) == "<Engine only: image:batchx3:float32>"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": IMAGE.astype(np.float64)}, "wrong dtype"),
        (
            {"image": np.zeros((5, 3), np.float32)},
            r"wrong shape\n.*expected: \(batch=1\.\.2\.\.4, 3\)\n.*found: \(5, 3\)",
        ),
        ({"picture": IMAGE}, "input 'image' is missing"),
        ({"image": IMAGE, "extra": IMAGE}, "the model has no input 'extra'"),
        ({"image": [[1.0, 2.0, 3.0]]}, r"input 'image' is no array\n.*expected: .*DLPack.*\n.*found: list"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(bundle, inputs, message):
    with pytest.raises(DataError, match=message):
        load(bundle)(inputs)


def test_inputs_need_names(bundle):
    with pytest.raises(
        DataError, match=r"inputs of only are given by name\n.*engine\(image=\.\.\.\)\n.*found: ndarray"
    ):
        load(bundle)(IMAGE)


def test_closed_engine_says_so(bundle):
    with load(bundle) as engine:
        engine.reset()
        engine(image=IMAGE)
    engine.close()
    with pytest.raises(EngineError, match=r"engine only is closed\n.*load it again"):
        engine(image=IMAGE)


def test_options_say_where_an_engine_runs_and_those_of_other_targets_do_not_matter(bundle):
    assert load(bundle).info.options == {"threads": 1}
    engine = load(bundle, options={"threads": 2, "device_id": 3})
    assert engine.info.options == {"threads": 2}
    np.testing.assert_array_equal(engine(image=IMAGE)["logits"], IMAGE * 2)
    with pytest.raises(EngineMismatchError, match="threads of onnxruntime-cpu is too small"):
        load(bundle, "only", options={"threads": 0})


def test_threads_share_an_engine(bundle):
    engine = load(bundle)
    right = []

    def work(value):
        image = np.full((1, 3), value, np.float32)
        right.append(all(np.array_equal(engine(image=image)["logits"], image * 2) for _ in range(50)))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_the_fastest_at_the_optimum_wins(tmp_path):
    records = [write_engine(tmp_path, name) for name in ("untimed", "slow", "fast")]
    timings = [timing("slow", 2.0), timing("slow", 0.1, batch=1), timing("fast", 1.0), timing("torch", 0.5)]
    write_manifest(tmp_path, records, timings)
    assert load(tmp_path).name == "fast"


def test_without_numbers_the_order_of_the_manifest_counts(tmp_path):
    write_manifest(tmp_path, [write_engine(tmp_path, name) for name in ("b", "a")], benchmark=None)
    assert load(tmp_path).name == "b"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"validation": {"passed": False}}, "failed validation"),
        ({"status": "built"}, "built but never run"),
        ({"status": "failed", "reason": "the builder crashed"}, "not built: the builder crashed"),
    ],
)
def test_invalid_engines_are_never_chosen(tmp_path, change, reason):
    bad = {**write_engine(tmp_path, "bad"), **change}
    write_manifest(tmp_path, [bad, write_engine(tmp_path, "good")], [timing("bad", 0.1), timing("good", 1.0)])
    assert load(tmp_path).name == "good"
    write_manifest(tmp_path, [bad])
    with pytest.raises(EngineError, match=rf"no engine of .* can run here\n.*bad: {reason}") as caught:
        load(tmp_path)
    assert f"enginesmith compile --recipe {tmp_path}/recipe.yaml -o {tmp_path}" in str(caught.value)


def test_a_named_engine_is_loaded_even_where_validation_failed(tmp_path):
    bad = {**write_engine(tmp_path, "bad", scale=3.0), "validation": {"passed": False}}
    write_manifest(tmp_path, [bad, write_engine(tmp_path, "good")])
    np.testing.assert_array_equal(load(tmp_path, "bad")(image=IMAGE)["logits"], IMAGE * 3)


def test_a_name_that_does_not_exist_is_answered_with_the_nearest(bundle):
    with pytest.raises(UnknownNameError, match=r"unknown engine 'onyl'\n.*\n.*did you mean 'only'"):
        load(bundle, "onyl")


def test_an_engine_that_was_not_built_gives_its_reason(tmp_path):
    record = {"name": "x", "status": "unavailable", "reason": "no GPU", "to_do": "rent one", "validation": None}
    write_manifest(tmp_path, [record])
    with pytest.raises(EngineError, match=r"engine x was not built: no GPU\n.*rent one"):
        load(tmp_path, "x")


def test_an_engine_of_another_machine_is_passed_over_but_not_when_named(tmp_path, monkeypatch):
    monkeypatch.setattr(requirements.environment, "compute_capability", lambda device=0: "8.9")
    records = [write_engine(tmp_path, "hopper", requires={"compute_capability": "9.0"}), write_engine(tmp_path, "any")]
    write_manifest(tmp_path, records, [timing("hopper", 0.1), timing("any", 1.0)])
    assert load(tmp_path).name == "any"
    message = r"hopper was built for another machine\n.*compute capability 9\.0\n.*found: 8\.9\n.*compile --recipe"
    with pytest.raises(EngineMismatchError, match=message):
        load(tmp_path, "hopper")


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ({"compute_capability": "8.0,9.0"}, r"compute capability 8\.0 or 9\.0\n.*found: 8\.9"),
        ({"machine": "riscv"}, r"another machine\n.*machine riscv"),
        ({"cpu_flags": "fpu avx9000"}, r"cpu flags fpu avx9000\n.*found: fpu"),
        ({"onnxruntime": "1.2"}, r"another version\n.*onnxruntime 1\.2\n.*found: 1\."),
        ({"tensorrt": "8.6"}, r"another version\n.*tensorrt 8\.6\n.*found: none"),
    ],
)
def test_requirements_that_do_not_hold(requires, message, monkeypatch):
    monkeypatch.setattr(requirements.environment, "compute_capability", lambda device=0: "8.9")
    monkeypatch.setattr(requirements.environment, "cpu_flags", lambda: frozenset({"fpu"}))
    info = EngineInfo("e", "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, requires=requires)
    with pytest.raises(EngineMismatchError, match=message):
        check_machine(info, get_target("onnxruntime-cpu"))


def test_requirements_that_hold(monkeypatch):
    monkeypatch.setattr(requirements.environment, "compute_capability", lambda device=0: "9.0")
    monkeypatch.setattr(requirements.environment, "cpu_flags", lambda: frozenset({"fpu", "avx2"}))
    monkeypatch.setattr(requirements.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    requires = {"compute_capability": "8.0,9.0", "machine": "x86_64", "cpu_flags": "avx2", "onnxruntime": "1.31"}
    check_machine(
        EngineInfo("e", "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, requires=requires),
        get_target("onnxruntime-cpu"),
    )


def test_a_device_may_be_demanded(bundle):
    assert load(bundle, device="cpu").name == "only"
    with pytest.raises(EngineError, match="only: engine only does not run on cuda"):
        load(bundle, device="cuda")
    with pytest.raises(TargetUnavailableError, match=r"does not run on cuda\n.*expected: cuda\n.*found: cpu"):
        load(bundle, "only", device="cuda")


@pytest.mark.parametrize("name", [None, "only"])
def test_a_changed_file_is_named(bundle, name):
    model = bundle / "engines/only/model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(
        EngineMismatchError, match=r"model\.onnx changed after it was written\n.*SHA-256(.*\n)*.*compile"
    ):
        load(bundle, name)


def test_a_missing_file_is_named(bundle):
    (bundle / "engines/only/model.onnx").unlink()
    with pytest.raises(EngineMismatchError, match=r"model\.onnx cannot be read: No such file"):
        load(bundle)


def test_an_engine_without_hashes_is_refused(tmp_path):
    write_manifest(tmp_path, [write_engine(tmp_path, "only")], files={})
    with pytest.raises(EngineMismatchError, match="lists no file of engine 'only'"):
        load(tmp_path)
    assert load(tmp_path, verify=False).name == "only"


def test_an_engine_of_a_newer_version_is_refused(tmp_path):
    write_manifest(tmp_path, [write_engine(tmp_path, "only", target="onnxruntime-quantum")])
    with pytest.raises(EngineMismatchError, match=r"cannot be read by this version .*unknown target"):
        load(tmp_path, "only")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match=r"is not a bundle: No such file.*\n.*manifest\.json\n.*enginesmith compile"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, ', "is damaged"),
        ('{"format": 99}', r"another version\n.*format 1\n.*found: 99"),
        ("[]", r"another version\n.*format 1\n.*found: list"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(EngineMismatchError, match=message):
        load(tmp_path)


def test_reset_and_close_reach_the_runner():
    class Counting:
        calls = ()

        def run(self, inputs):
            return {}

        def reset(self):
            self.calls += ("reset",)

        def close(self):
            self.calls += ("close",)

    runner = Counting()
    engine = Engine(EngineInfo("e", "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, stateful=True), runner)
    engine.reset()
    engine.close()
    engine.close()
    assert runner.calls == ("reset", "close")
