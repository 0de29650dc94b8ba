# ruff: noqa: N802, N815 - the names are the driver's
"""Sessions over stand-ins for TensorRT and the CUDA driver that keep the device's memory on the host."""

import contextlib
import ctypes
import sys
import types

import numpy as np
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError, EngineMismatchError
from enginesmith.targets.trt import driver as driver_module
from enginesmith.targets.trt import runner as runner_module
from enginesmith.targets.trt import session as session_module
from enginesmith.targets.trt.binding import convert
from enginesmith.targets.trt.driver import Driver, Failure, allocate
from enginesmith.targets.trt.runner import SessionRunner
from enginesmith.targets.trt.session import BINDINGS, Session

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "int64", ("batch", 2)),),
    outputs=(TensorSpec("y", "int64", ("batch", 2)),),
    axes={"batch": AxisRange(1, 4, 8)},
)


class HostDriver:
    """Does on the host what the driver does on the device, and counts its calls."""

    def __init__(self, device=0):
        self.device, self.calls, self.memory, self.refuse = ctypes.c_int(device), [], {}, {}

    def __call__(self, function, *arguments):
        self.calls.append(function)
        if function in self.refuse:
            raise Failure("failed", f"{function} failed: {self.refuse[function]}")
        handle = getattr(self, function, None)
        if handle:
            handle(*arguments)

    def cuStreamCreate(self, stream, _flags):
        stream._obj.value = 7

    def cuMemAlloc_v2(self, pointer, size):
        buffer = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(buffer)
        self.memory[pointer._obj.value] = buffer

    def cuMemFree_v2(self, pointer):
        del self.memory[pointer.value]

    def cuMemcpyHtoDAsync_v2(self, to, source, size, _stream):
        ctypes.memmove(to.value, source.value, size.value)

    def cuMemcpyDtoHAsync_v2(self, to, source, size, _stream):
        ctypes.memmove(to.value, source.value, size.value)

    cuMemcpyDtoDAsync_v2 = cuMemcpyHtoDAsync_v2

    def cuEventElapsedTime(self, result, _before, _after):
        result._obj.value = 0.25


def member(name):
    return types.SimpleNamespace(name=name)


class Context:
    """y = 2 x on the memory whose addresses it is given."""

    active_optimization_profile = -1

    def __init__(self, engine):
        self.engine, self.addresses, self.shapes, self.runs = engine, {}, {}, 0

    def set_optimization_profile_async(self, index, _stream):
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape[1] == 2

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return (-1, 2) if self.engine.data_dependent else self.shapes["x"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_output_allocator(self, name, allocator):
        self.allocator = allocator

    profiler = None

    def execute_async_v3(self, _stream):
        self.runs += 1
        if self.profiler is not None:
            for name in ("double", "copy", "double"):
                self.profiler.report_layer_time(name, 0.25 * self.runs)
        shape = self.shapes["x"]
        count = int(np.prod(shape))
        y = self.addresses.get("y")
        if self.engine.data_dependent:
            y = self.allocator.reallocate_output("y", 0, count * 4, 256)
            self.allocator.notify_shape("y", shape)
        x = np.ctypeslib.as_array(ctypes.cast(self.addresses["x"], ctypes.POINTER(ctypes.c_int32)), (count,))
        np.ctypeslib.as_array(ctypes.cast(y, ctypes.POINTER(ctypes.c_int32)), (count,))[:] = 2 * x
        return True


class RuntimeConfig:
    """Keeps a cache whose content grows by a letter with each session."""

    def create_runtime_cache(self):
        self.cache = types.SimpleNamespace(content=b"")
        self.cache.deserialize = lambda content: setattr(self.cache, "content", content)
        self.cache.serialize = lambda: self.cache.content + b"k"
        return self.cache

    def set_runtime_cache(self, cache):
        assert cache is self.cache


class Engine:
    num_io_tensors = 2
    data_dependent = False

    def __init__(self, ranges=((1, 4, 8),)):
        self.ranges, self.contexts = ranges, []
        self.num_optimization_profiles = len(ranges)

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return {"x": "in", "y": "out"}[name]

    def get_tensor_dtype(self, name):
        return member("INT32")

    def get_tensor_location(self, name):
        return "device"

    def get_tensor_shape(self, name):
        return (-1, 2)

    def get_tensor_profile_shape(self, name, index):
        return [(size, 2) for size in self.ranges[index]]

    def create_runtime_config(self):
        return RuntimeConfig()

    num_layers = 1

    def create_engine_inspector(self):
        return types.SimpleNamespace(get_layer_information=lambda index, form: '{"Name": "double"}')

    def create_execution_context(self, config=None):
        assert config is None or config.cache.content is not None
        self.contexts.append(Context(self))
        return self.contexts[-1]


@pytest.fixture
def open_session(tmp_path, monkeypatch):
    """Opens a session on an engine; None stands for a plan that TensorRT refuses."""

    def open_session(engine, **options):
        severities = {name: member(name) for name in ("INTERNAL_ERROR", "ERROR", "WARNING")}
        logger = type("ILogger", (), severities)

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, plan):
                if engine is None:
                    self.logger.log(logger.ERROR, "expecting library version 8.6.0 got 8.6.1")
                return engine

        trt = types.SimpleNamespace(
            __name__="tensorrt", __version__="8.6.0", ILogger=logger, Runtime=Runtime, IOutputAllocator=object,
            IProfiler=object, LayerInformationFormat=types.SimpleNamespace(JSON="json"),
            TensorIOMode=types.SimpleNamespace(INPUT="in"), TensorLocation=types.SimpleNamespace(HOST="host"),
        )  # fmt: skip
        monkeypatch.setattr(session_module, "Driver", HostDriver)
        (tmp_path / "model.plan").write_bytes(b"plan")
        return Session(trt, str(tmp_path / "model.plan"), **options)

    return open_session


def array(rows, dtype=np.int64):
    return np.arange(rows * 2, dtype=dtype).reshape(rows, 2)


def test_a_run_converts_types_and_keeps_buffers_by_shape(open_session):
    engine = Engine()
    runner = SessionRunner(open_session(engine), SIGNATURE)
    for rows in (3, 5, 3):
        outputs = runner.run({"x": array(rows)})
        np.testing.assert_array_equal(outputs["y"], 2 * array(rows))
        assert outputs["y"].dtype == np.int64
    assert len(engine.contexts) == 2
    assert all(context.active_optimization_profile == 0 for context in engine.contexts)


def test_the_shapes_used_longest_ago_lose_their_buffers(open_session):
    engine = Engine()
    session = open_session(engine)
    for rows in range(1, BINDINGS + 2):
        session.run({"x": array(rows)})
    assert len(session.driver.memory) == 2 * BINDINGS
    session.run({"x": array(1)})
    assert len(engine.contexts) == BINDINGS + 2
    session.close()
    session.close()
    assert session.driver.memory == {}
    assert session.driver.calls.count("cuCtxPushCurrent_v2") == session.driver.calls.count("cuCtxPopCurrent_v2")
    with pytest.raises(Failure, match="the engine is closed"):
        session.run({"x": array(1)})


def test_the_runtime_cache_is_read_and_saved(open_session, tmp_path):
    cache = tmp_path / "engine.cache"
    for content in (b"k", b"kk"):
        session = open_session(Engine(), runtime_cache=str(cache))
        session.run({"x": array(2)})
        session.close()
        assert cache.read_bytes() == content
    session = open_session(Engine(), runtime_cache=str(tmp_path / "nowhere" / "engine.cache"))
    session.close()


def test_the_second_launch_is_captured_and_later_ones_are_replays(open_session):
    engine = Engine()
    session = open_session(engine)
    for _ in range(4):
        session.run({"x": array(3)})
    assert engine.contexts[0].runs == 2
    assert session.driver.calls.count("cuGraphLaunch") == 3


def test_a_graph_that_cannot_be_captured_is_left_with_the_reason(open_session):
    engine = Engine()
    runner = SessionRunner(open_session(engine), SIGNATURE)
    runner._session.driver.refuse["cuStreamEndCapture"] = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)"
    bound = runner.bind({"x": array(3)})
    host, device = bound.timed(2)
    assert len(host) == 2
    assert device == [0.25, 0.25]
    assert "CAPTURE_INVALIDATED" in bound.graph_refusal
    np.testing.assert_array_equal(bound.outputs()["y"], 2 * array(3))


def test_cuda_graphs_can_be_switched_off(open_session):
    session = open_session(Engine(), cuda_graph=False)
    for _ in range(3):
        session.run({"x": array(3)})
    assert "cuGraphLaunch" not in session.driver.calls


def test_the_narrowest_profile_is_chosen(open_session):
    engine = Engine(ranges=((1, 4, 8), (1, 1, 1), (4, 4, 4)))
    session = open_session(engine)
    for rows in (4, 1, 5):
        session.run({"x": array(rows)})
    assert [context.active_optimization_profile for context in engine.contexts] == [2, 1, 0]
    with pytest.raises(Failure, match=r"no optimization profile of the engine holds the shapes \{'x': \(9, 2\)\}"):
        session.run({"x": array(9)})


def test_a_shape_that_the_engine_refuses_leaves_nothing_behind(open_session):
    runner = SessionRunner(open_session(Engine()), SIGNATURE)
    with pytest.raises(DataError, match=r"the engine refuses shape \(1, 3\) of 'x'"):
        runner.run({"x": np.zeros((1, 3), np.int64)})
    assert runner._session.driver.memory == {}


def test_outputs_whose_shape_depends_on_values(open_session):
    engine = Engine()
    engine.data_dependent = True
    session = open_session(engine)
    for rows in (2, 2, 6):
        np.testing.assert_array_equal(session.run({"x": array(rows)})["y"], 2 * array(rows))
    assert "cuGraphLaunch" not in session.driver.calls


def test_bounds_are_independent_and_freed_when_dropped(open_session):
    runner = SessionRunner(open_session(Engine()), SIGNATURE)
    first, second = runner.bind({"x": array(2)}), runner.bind({"x": array(2) + 1})
    for bound, offset in ((first, 0), (second, 1)):
        bound.run()
        bound.synchronize()
        np.testing.assert_array_equal(bound.outputs()["y"], 2 * (array(2) + offset))
    del first, second, bound
    kept = runner.bind({"x": array(2)})
    assert len(runner._session.driver.memory) == 2
    runner.close()
    assert runner._session.driver.memory == {}
    del kept
    with pytest.raises(EngineError, match="the engine is closed"):
        runner.bind({"x": array(2)})


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_device_memory_of_the_caller(open_session, cuda_graph):
    session = open_session(Engine(), cuda_graph=cuda_graph)
    driver, size = session.driver, 4 * 4
    x, y = (allocate(driver, size) for _ in "xy")
    binding = session.binding({"x": array(2)})
    for step in range(3):
        values = array(2, np.int32) + step
        ctypes.memmove(x.value, values.ctypes.data, size)
        if binding._graph is None:  # the stand-in of a graph computes nothing
            binding.exchange({"x": x.value, "y": y.value}, 0)
            np.testing.assert_array_equal(np.frombuffer(driver.memory[y.value], np.int32), (2 * values).ravel())
    assert driver.calls.count("cuStreamWaitEvent") >= 4
    assert ("cuMemcpyDtoDAsync_v2" in driver.calls) == cuda_graph


class GpuTensor:
    """A stand-in of torch's CUDA tensors, whose memory is that of an array."""

    def __init__(self, array, device=0):
        self.array, self.shape, self.dtype, self.device = array, array.shape, f"torch.{array.dtype}", device

    def __dlpack_device__(self):
        return (2, self.device)

    def __dlpack__(self, *, stream):
        assert stream == 7
        return self.array.__dlpack__()

    def data_ptr(self):
        return self.array.ctypes.data

    def to(self, dtype):
        return self.array.astype(dtype)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tensors_on_the_gpu_give_tensors_on_the_gpu(open_session, monkeypatch, cuda_graph):
    devices, stream = [], types.SimpleNamespace(cuda_stream=0)
    torch = types.SimpleNamespace(
        int32=np.int32, int64=np.int64,
        empty=lambda shape, dtype, device: devices.append(device) or GpuTensor(np.zeros(shape, dtype)),
        cuda=types.SimpleNamespace(current_stream=lambda device: devices.append(device) or stream),
        as_tensor=lambda array, device: devices.append(device) or ("copied", array),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    runner = SessionRunner(open_session(Engine(), cuda_graph=cuda_graph), SIGNATURE)
    np.testing.assert_array_equal(runner.run({"x": GpuTensor(array(2, np.int32))})["y"], 2 * array(2))
    monkeypatch.setattr(runner_module, "_fetched", lambda name, value: value.array)
    kind, values = runner.run({"x": GpuTensor(array(2))})["y"]  # int64, which this engine does not take
    assert kind == "copied"
    assert set(devices) == {"cuda:0"}
    np.testing.assert_array_equal(values, 2 * array(2))
    monkeypatch.delitem(sys.modules, "torch")
    np.testing.assert_array_equal(runner.run({"x": GpuTensor(array(3))})["y"], 2 * array(3))


def test_a_tensor_on_another_gpu_is_refused(open_session):
    runner = SessionRunner(open_session(Engine()), SIGNATURE)
    with pytest.raises(DataError, match=r"(?s)input 'x' lies on another device.*expected: cuda:0.*found: cuda:1"):
        runner.run({"x": GpuTensor(array(2, np.int32), device=1)})


def test_a_tensor_that_cannot_be_fetched_leaves_no_stream(monkeypatch):
    closed = []
    stream = types.SimpleNamespace(handle=7, current=contextlib.nullcontext, close=lambda: closed.append(True))
    monkeypatch.setattr(runner_module, "Stream", lambda device: stream)
    with pytest.raises(DataError, match="input 'x' is not contiguous"):
        runner_module._fetched("x", GpuTensor(np.ones((2, 3)).T))
    assert closed


def test_the_gpu_is_the_one_that_was_chosen(monkeypatch, open_session):
    assert open_session(Engine(), device=1).driver.device.value == 1
    asked = []

    def get(pointer, number):
        asked.append(number)
        return 0 if number < 2 else 101

    library = types.SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGet=get,
        cuGetErrorString=lambda status, text: setattr(text._obj, "value", b"invalid device ordinal"),
    )  # fmt: skip
    monkeypatch.setattr(driver_module, "_library", lambda: library)
    Driver(1)
    assert asked == [1]
    with pytest.raises(
        Failure, match=r"cuDeviceGet of the NVIDIA driver failed: invalid device ordinal \(101\)"
    ) as caught:
        Driver(2)
    assert caught.value.kind == "unavailable"


def test_a_plan_that_tensorrt_refuses(open_session):
    message = "tensorrt 8.6.0 cannot open the engine: expecting library version 8.6.0 got 8.6.1"
    with pytest.raises(EngineMismatchError, match=message), runner_module._translated():
        open_session(None)


def test_a_session_that_cannot_be_opened_gives_the_gpu_back(open_session, monkeypatch):
    drivers = []
    monkeypatch.setattr(Engine, "get_tensor_dtype", lambda self, name: member("BF16"))
    monkeypatch.setattr(HostDriver, "cuDevicePrimaryCtxRelease_v2", lambda *args: drivers.append(args), raising=False)
    with pytest.raises(Failure, match="'x' of the engine is BF16, which NumPy cannot hold"):
        open_session(Engine())
    assert len(drivers) == 1


def test_an_execution_that_fails(open_session, monkeypatch):
    runner = SessionRunner(open_session(Engine()), SIGNATURE)
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(EngineError, match="the engine could not be executed: TensorRT gave no reason"):
        runner.run({"x": array(1)})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array(3), "int32"),
        (np.ones((2, 3)).T, "float32"),
        (np.zeros(0, np.int64), "int32"),
        (np.ones(2, bool), "bool"),
    ],
)
def test_convert_keeps_values_and_makes_them_contiguous(value, dtype):
    converted = convert("x", value, np.dtype(dtype))
    np.testing.assert_array_equal(converted, value)
    assert converted.dtype == dtype
    assert converted.flags.c_contiguous


def test_integers_that_do_not_fit():
    with pytest.raises(Failure, match="input 'x' holds integers that do not fit int32, the engine's type"):
        convert("x", np.array([1 << 31]), np.dtype("int32"))


def test_a_profile_has_the_times_of_each_layer_in_each_run(open_session):
    engine = Engine()
    runner = SessionRunner(open_session(engine), SIGNATURE)
    runs, layers = runner.profile({"x": array(3)}, 2)
    assert runs == [{"double": 1.0, "copy": 0.5}, {"double": 1.5, "copy": 0.75}]
    assert layers == [{"Name": "double"}]
    assert runner._session.driver.memory == {}, "its buffers are freed"
    assert runner._session.driver.calls.count("cuGraphLaunch") == 0
