"""The CUDA target without a GPU: its session and its device are those of the CPU, its driver is a fake."""

import dataclasses
import runpy
import threading
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import BuildError, DataError, EngineError, RecipeError, TargetUnavailableError
from enginesmith.targets import onnxruntime_cuda, parse_target
from enginesmith.targets._onnxruntime import Session
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.cuda import dlpack, driver
from enginesmith.targets.cuda import onnxruntime as device
from enginesmith.targets.onnxruntime_cuda import OnnxRuntimeCuda

torch = pytest.importorskip("torch")
FakeStream = runpy.run_path(str(Path(__file__).parents[2] / "host_device.py"))["Stream"]

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[N, 2] x, bool flip) => (float[N, 2] y, float[N] total)
{
  minus = Neg(x)
  y = Where(flip, minus, x)
  axes = Constant<value = int64[1] {1}>()
  total = ReduceSum<keepdims = 0>(y, axes)
}
"""
CONVOLVING = MODEL.replace(
    "minus = Neg(x)",
    """ends = Constant<value = int64[1] {2}>()
  column = Unsqueeze(x, ends)  one = Constant<value = float[2, 2, 1] {1, 0, 0, 1}>()
  same = Conv(column, one)  narrow = Squeeze(same, ends)
  minus = Neg(x)""",
).replace("Where(flip, minus, x)", "Where(flip, minus, narrow)")
SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("N", 2)), TensorSpec("flip", "bool", ())),
    outputs=(TensorSpec("y", "float32", ("N", 2)), TensorSpec("total", "float32", ("N",))),
    axes={"N": AxisRange(1, 2, 64)},
)
SAMPLE = {"x": np.array([[1, -1], [0, 2]], np.float32), "flip": np.array(True)}


@pytest.fixture
def on_cpu(monkeypatch):
    """Makes the host's memory the device."""
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(dlpack, "CUDA_KINDS", (1,))


@pytest.fixture
def make(on_cpu, tmp_path):
    def runner(*, graphs, text=MODEL):
        onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
        session = Session().open(tmp_path / "model.onnx")
        return device.DeviceRunner(session, FakeStream(), ["y", "total"], graphs=graphs)

    return runner


def check(outputs, x, flip):
    y = -x if flip else x
    np.testing.assert_array_equal(outputs["y"], y)
    np.testing.assert_array_equal(outputs["total"], y.sum(axis=1))


@pytest.mark.parametrize("graphs", [False, True])
class TestRunner:
    def test_arrays_give_arrays(self, make, graphs):
        runner = make(graphs=graphs)
        for rows, flip in ((2, True), (3, False), (2, False)):
            x = np.random.default_rng(rows).random((rows, 2), np.float32)
            outputs = runner.run({"x": x, "flip": np.bool_(flip)})
            assert all(isinstance(value, np.ndarray) for value in outputs.values())
            check(outputs, x, flip)

    def test_tensors_of_the_device_give_tensors_of_the_device(self, make, graphs):
        x = torch.tensor([[1.0, 2.0]])
        outputs = make(graphs=graphs).run({"x": x, "flip": torch.tensor(True)})
        assert outputs["y"].shape == (1, 2)
        assert str(outputs["y"].dtype) == "float32"
        assert outputs["y"].__dlpack_device__() == (1, 0)
        check({name: torch.from_dlpack(value) for name, value in outputs.items()}, x.numpy(), flip=True)
        np.testing.assert_array_equal(outputs["y"].numpy(), [[-1, -2]])
        np.testing.assert_array_equal(np.asarray(outputs["y"], dtype=np.float64), [[-1, -2]])

    def test_an_output_is_an_input_again_but_shares_its_own_memory_only(self, make, graphs):
        runner = make(graphs=graphs)
        once = runner.run({"x": torch.ones(1, 2), "flip": torch.tensor(True)})["y"]
        twice = runner.run({"x": once, "flip": torch.tensor(True)})["y"]
        np.testing.assert_array_equal(np.from_dlpack(twice), [[1, 1]])
        for wish in ({"copy": True}, {"dl_device": (2, 0)}):
            with pytest.raises(BufferError, match="only the memory itself can be shared"):
                once.__dlpack__(**wish)

    def test_arrays_and_tensors_may_be_mixed(self, make, graphs):
        x = torch.tensor([[1.0, 2.0]])
        check(make(graphs=graphs).run({"x": x, "flip": np.array(False)}), x.numpy(), flip=False)

    def test_outputs_are_not_overwritten_by_the_next_call(self, make, graphs):
        runner = make(graphs=graphs)
        first, second = torch.ones(1, 2), torch.zeros(1, 2)
        kept = runner.run({"x": first, "flip": torch.tensor(False)})
        arrays = runner.run({"x": first.numpy(), "flip": np.array(False)})
        runner.run({"x": second, "flip": torch.tensor(False)})
        check(kept, first.numpy(), flip=False)
        check(arrays, first.numpy(), flip=False)

    def test_outputs_outlive_the_runner(self, make, graphs):
        runner = make(graphs=graphs)
        tensor = torch.from_dlpack(runner.run({"x": torch.ones(1, 2), "flip": torch.tensor(True)})["y"])
        runner.close()
        assert tensor.tolist() == [[-1, -1]]

    def test_strided_arrays_are_copied(self, make, graphs):
        x = np.arange(4, dtype=np.float32).reshape(2, 2).T
        check(make(graphs=graphs).run({"x": x, "flip": np.array(False)}), x, flip=False)

    def test_strided_tensors_are_refused(self, make, graphs):
        with pytest.raises(DataError, match="input 'x' is not contiguous"):
            make(graphs=graphs).run({"x": torch.zeros(2, 2).T, "flip": torch.tensor(True)})

    def test_a_failing_run_is_an_engine_error(self, make, graphs):
        with pytest.raises(EngineError, match="ONNX Runtime failed to run the engine"):
            make(graphs=graphs).run({"x": np.zeros((1, 3), np.float32), "flip": np.array(True)})

    def test_bind_times_host_and_device(self, make, graphs):
        bound = make(graphs=graphs).bind(SAMPLE)
        bound.run()
        bound.synchronize()
        host, device = bound.timed(3)
        assert len(host) == 3
        assert device == [0.25] * 3
        check(bound.outputs(), SAMPLE["x"], flip=True)

    def test_two_bindings_keep_their_own_inputs(self, make, graphs):
        runner = make(graphs=graphs)
        first, second = runner.bind(SAMPLE), runner.bind({**SAMPLE, "x": SAMPLE["x"] + 1})
        first.run()
        second.run()
        check(first.outputs(), SAMPLE["x"], flip=True)
        check(second.outputs(), SAMPLE["x"] + 1, flip=True)

    def test_threads_take_turns(self, make, graphs):
        runner = make(graphs=graphs)
        right = []

        def work(value):
            x = np.full((2, 2), value, np.float32)
            right.append(all((runner.run({"x": x, "flip": np.array(False)})["y"] == value).all() for _ in range(30)))

        threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 4

    def test_a_closed_runner_says_so(self, make, graphs):
        runner = make(graphs=graphs)
        bound = runner.bind(SAMPLE)
        runner.reset()
        runner.close()
        assert runner.stream.closed
        for call in (lambda: runner.run(SAMPLE), bound.run):
            with pytest.raises(EngineError, match=r"the engine is closed\n.*load it again"):
                call()

    def test_a_session_with_graphs_is_called_from_one_thread_only(self, make, graphs):
        runner = make(graphs=graphs)
        names = {runner.turn(lambda: threading.current_thread().name) for _ in range(3)}
        assert names == {"cuda-graph_0" if graphs else threading.current_thread().name}


def test_a_tensor_of_another_device_is_refused(make, monkeypatch):
    monkeypatch.setattr(device, "cuda_device", lambda value: 3)
    with pytest.raises(DataError, match=r"input 'x' lies on another device\n.*cuda:0\n.*cuda:3"):
        make(graphs=False).run(SAMPLE)


def test_every_binding_has_a_graph_of_its_own_and_shapes_beyond_the_limit_none(make, monkeypatch):
    monkeypatch.setattr(device, "MAX_GRAPHS", 2)
    asked = []
    real = device.run_options
    monkeypatch.setattr(device, "run_options", lambda graph, **more: asked.append(graph) or real(graph, **more))
    runner = make(graphs=True)
    runner.bind(SAMPLE)
    for rows in (1, 2, 3, 1):
        x = np.ones((rows, 2), np.float32)
        check(runner.run({"x": x, "flip": np.array(False)}), x, flip=False)
    # Each new set of buffers runs once without a graph, then has its own number; three rows come too late for one.
    assert asked == [-1, 1, -1, 2, -1, 3, -1]


@dataclasses.dataclass
class SavedGraph:
    text: str

    def save(self, path: Path) -> None:
        onnx.save(onnx.parser.parse_model(self.text), path)


@pytest.fixture
def built(on_cpu, monkeypatch, tmp_path):
    """Builds with the CPU's provider under the name of CUDA's; `refuse` is what a graph session answers."""

    def build(text="onnxruntime-cuda", *, precision="fp32", refuse=None, model=MODEL, version="1.31.1"):
        opened = []

        def session(target, options):
            opened.append(options)
            if refuse and options.get("enable_cuda_graph") == "1":
                raise EngineError(refuse)
            return Session()

        monkeypatch.setattr(OnnxRuntimeCuda, "_require", lambda target: {"onnxruntime": version})
        monkeypatch.setattr(OnnxRuntimeCuda, "_session", session)
        monkeypatch.setattr(onnxruntime_cuda, "Stream", FakeStream)
        directory = tmp_path / f"onnxruntime-cuda-{precision}"
        directory.mkdir()
        request = BuildRequest(
            graph=SavedGraph(model),
            model=None,
            signature=SIGNATURE,
            precision=precision,
            sample=SAMPLE,
            directory=directory,
            cache=tmp_path / "cache",
            log=lambda line: None,
        )
        target = parse_target(text)
        return target, directory, target.build(request), opened

    monkeypatch.setattr(onnxruntime_cuda, "CUDA", "CPUExecutionProvider")
    return build


def test_build_records_placement_options_and_graph(built):
    target, directory, info, opened = built(precision="fp16", model=CONVOLVING)
    assert info.details["placement"] == {"CPUExecutionProvider": 6}
    assert info.details["cuda_graph"] == {"used": True, "reason": ""}
    assert info.details["provider_options"] == {
        "device_id": "0",
        "prefer_nhwc": "1",
        "fuse_conv_bias": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "0",
        "arena_extend_strategy": "kNextPowerOfTwo",
    }
    check(target.runner(directory, info).run(SAMPLE), SAMPLE["x"], flip=True)
    assert opened[-1]["enable_cuda_graph"] == "1"


def test_build_without_a_graph_says_why(built):
    target, directory, info, opened = built(refuse="This session cannot use the graph capture feature")
    reason = "This session cannot use the graph capture feature; on the CPU: nothing"
    assert info.details["cuda_graph"] == {"used": False, "reason": reason}
    check(target.runner(directory, info).run(SAMPLE), SAMPLE["x"], flip=True)
    assert opened[-1]["enable_cuda_graph"] == "0"


@pytest.mark.parametrize(("version", "used"), [("1.29.2", False), ("1.30.0", True), ("2.0", True)])
def test_replays_would_read_what_was_overwritten_in_older_versions(built, version, used):
    halves = """one = Where(flip, minus, x)  twice = Concat<axis = 1>(one, minus)
  columns = Constant<value = int64[2] {2, 2}>()  y, rest = Split<axis = 1>(twice, columns)"""
    model = MODEL.replace("y = Where(flip, minus, x)", halves)
    info = built(model=model, version=version)[2]
    assert info.details["cuda_graph"]["used"] is used
    reason = "replays of Concat, Split read what later calls write, before onnxruntime 1.30"
    assert info.details["cuda_graph"]["reason"] == ("" if used else reason)


def test_an_older_version_replays_no_graph_of_a_newer_one(built, monkeypatch):
    twice = "one = Where(flip, minus, x)  both = Concat<axis = 0>(one, x)  y = Identity(both)"
    model = MODEL.replace("y = Where(flip, minus, x)", twice)
    target, directory, info, opened = built(model=model, version="1.30.0")
    assert info.details["cuda_graph"]["used"]
    for version, used in (("1.29.0", "0"), ("1.30.0", "1")):
        monkeypatch.setattr(OnnxRuntimeCuda, "_require", lambda target, version=version: {"onnxruntime": version})
        target.runner(directory, info).close()
        assert opened[-1]["enable_cuda_graph"] == used


def test_a_capture_that_fails_is_recorded(built, monkeypatch):
    def fail(runner, inputs):
        raise EngineError("capture failed")

    monkeypatch.setattr(device.DeviceRunner, "run", fail)
    assert built()[2].details["cuda_graph"] == {"used": False, "reason": "capture failed"}


def test_options_reach_the_provider(built):
    text = (
        "onnxruntime-cuda:cuda_graph=false,prefer_nhwc=true,fuse_conv_bias=false,conv_algo_search=heuristic,"
        "conv_workspace=false,tf32=true,strict_layer_norm=true,memory_limit_mib=64,arena=requested"
    )
    target, _, info, _ = built(text, precision="fp16")
    assert str(target) == text
    assert info.details["cuda_graph"]["reason"] == "turned off by cuda_graph=false"
    assert info.details["provider_options"] == {
        "device_id": "0",
        "prefer_nhwc": "1",
        "fuse_conv_bias": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "use_tf32": "1",
        "enable_skip_layer_norm_strict_mode": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": str(64 << 20),
    }


def test_gelu_by_tanh_is_an_entry_of_the_session():
    entries = parse_target("onnxruntime-cuda:gelu_approximation=true")._session({}).entries
    assert entries == {"optimization.enable_gelu_approximation": "1"}
    assert not parse_target("onnxruntime-cuda")._session({}).entries


@pytest.mark.parametrize(("precision", "first"), [("fp16", (False, True)), ("fp32", (True, True))])
def test_layouts_of_convolutions_are_tried_from_what_the_precision_has(precision, first):
    tunings = {tuning.what: tuning for tuning in parse_target("onnxruntime-cuda").tunings(precision)}
    layouts = tunings["layout of convolutions"].alternatives
    assert (layouts[0]["prefer_nhwc"], layouts[0]["fuse_conv_bias"]) == first
    assert ("TF32 in products of float32" in tunings) == (precision == "fp32")


@pytest.mark.parametrize(("precision", "model"), [("fp32", "convolving"), ("fp16", "plain")])
def test_layouts_stay_in_fp32_and_where_nothing_convolves(built, precision, model):
    options = built(precision=precision, model={"plain": MODEL, "convolving": CONVOLVING}[model])[2].details
    options = options["provider_options"]
    assert (options["prefer_nhwc"], options["fuse_conv_bias"]) == ("0", "0")


def test_a_graph_that_runs_nowhere_on_the_gpu_is_refused(built, monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "CUDA", "CUDAExecutionProvider")
    with pytest.raises(
        BuildError, match=r"no node of model\.onnx runs on CUDAExecutionProvider\n(.*\n)*.*CPUExecution"
    ):
        built()


def test_a_session_that_lost_its_provider_is_refused(tmp_path):
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(EngineError, match=r"opened model\.onnx without CUDAExecutionProvider\n.*\n.*found: CPU"),
    ):
        Session(provider="CUDAExecutionProvider").open(tmp_path / "model.onnx")


class TestAvailability:
    """Each test takes away one thing more than the last."""

    @pytest.fixture(autouse=True)
    def everything(self, monkeypatch):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
        monkeypatch.setattr(driver, "problem", lambda: "")
        monkeypatch.setattr(driver, "count", lambda: 1)
        monkeypatch.setattr(driver, "driver_version", lambda: "13.2")
        monkeypatch.setattr(onnxruntime_cuda, "_preload", lambda: "")

    def test_all_there(self):
        found = OnnxRuntimeCuda().availability()
        assert found.build
        assert found.run
        assert found.versions == {"onnxruntime": onnxruntime.__version__, "cuda": "13.0", "driver_supports": "13.2"}

    def test_library_missing(self, monkeypatch):
        monkeypatch.setattr(onnxruntime_cuda, "_preload", lambda: "libcudnn.so.9: cannot open shared object file")
        found = OnnxRuntimeCuda().availability()
        assert not found.build
        assert found.reason.endswith("cannot load libcudnn.so.9: cannot open shared object file")
        assert found.install == "install CUDA 13 and cuDNN 9, for instance with torch for CUDA 13"

    def test_device_missing(self):
        found = OnnxRuntimeCuda(device_id=1).availability()
        assert found.reason == "there is no GPU 1"

    def test_driver_missing(self, monkeypatch):
        monkeypatch.setattr(driver, "problem", lambda: "the NVIDIA driver cannot be loaded: libcuda.so.1")
        found = OnnxRuntimeCuda().availability()
        assert found.reason == "the NVIDIA driver cannot be loaded: libcuda.so.1"
        assert "driver" in found.install

    def test_wheel_without_cuda(self, monkeypatch):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        found = OnnxRuntimeCuda().availability()
        assert found.reason.endswith("was built without CUDAExecutionProvider, it has CPUExecutionProvider")
        assert "exclude each other" in found.install
        assert "enginesmith[cuda]" in found.install
        with pytest.raises(
            TargetUnavailableError, match=r"built without CUDAExecutionProvider.*\n.*exclude each other"
        ):
            OnnxRuntimeCuda().runner(Path("."), None)


def test_libraries_are_looked_for_in_packages(tmp_path):
    missing = "libenginesmith-test.so.13"
    assert missing in onnxruntime_cuda._load_library(missing, [])
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    (folder / missing).write_bytes(b"no library")
    assert missing in onnxruntime_cuda._load_library(missing, [str(tmp_path)])
    (folder / missing).unlink()
    (folder / missing).symlink_to(next(Path("/").glob("lib*/**/libc.so.6")))
    assert onnxruntime_cuda._load_library(missing, [str(tmp_path)]) == ""


@pytest.mark.parametrize(("option", "value"), [("device_id", -1), ("memory_limit_mib", 0)])
def test_numbers_that_are_too_small_are_refused(option, value):
    with pytest.raises(RecipeError, match=f"{option} of onnxruntime-cuda is too small"):
        OnnxRuntimeCuda(**{option: value})
