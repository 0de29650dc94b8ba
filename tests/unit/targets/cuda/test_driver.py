import ctypes

import pytest

from enginesmith.errors import EngineError
from enginesmith.targets.cuda import driver
from enginesmith.targets.cuda.stream import Stream
from enginesmith.targets.trt import driver as library


class FakeDriver:
    """libcuda.so.1 with one device, or failing at one call."""

    def __init__(self, fails=None, devices=1):
        self.fails = fails
        self.devices = devices
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            answer = getattr(FakeDriver, f"_{name}", None)
            return 999 if name == self.fails else answer(self, *arguments) if answer else 0

        return call

    def _cuDeviceGetCount(self, pointer):  # noqa: N802
        pointer._obj.value = self.devices
        return 0

    def _cuDriverGetVersion(self, pointer):  # noqa: N802
        pointer._obj.value = 13020
        return 0

    def _cuDeviceGetAttribute(self, pointer, attribute, device):  # noqa: N802
        pointer._obj.value = {75: 9, 76: 0}[attribute]
        return 101 if device >= self.devices else 0

    def _cuStreamCreate(self, pointer, flags):  # noqa: N802
        pointer._obj.value = 0xABC
        return 0

    def _cuEventElapsedTime(self, pointer, start, end):  # noqa: N802
        pointer._obj.value = 1.5
        return 0

    def _cuGetErrorString(self, code, pointer):  # noqa: N802
        pointer._obj.value = b"no CUDA-capable device is detected"
        return 0


@pytest.fixture
def use(monkeypatch):
    def install(fake):
        monkeypatch.setattr(library, "_library", fake if callable(fake) else lambda: fake)
        monkeypatch.setattr(driver, "_driver", library.Driver)
        return fake

    return install


def no_library():
    raise OSError("libcuda.so.1: cannot open shared object file")


def test_a_machine_without_a_driver_says_so(use):
    use(no_library)
    assert driver.problem() == "the NVIDIA driver cannot be loaded: libcuda.so.1: cannot open shared object file"
    assert driver.compute_capability() is None
    with pytest.raises(EngineError, match="the NVIDIA driver cannot be loaded"):
        Stream()


def test_the_driver_explains_its_errors(use):
    use(FakeDriver(fails="cuInit"))
    expected = "cuInit of the NVIDIA driver failed: no CUDA-capable device is detected (999)"
    assert driver.problem() == expected
    assert driver.compute_capability() is None


def test_facts_of_the_driver(use):
    use(FakeDriver())
    assert driver.problem() == ""
    assert driver.count() == 1
    assert driver.compute_capability() == "9.0"
    assert driver.compute_capability(1) is None
    assert driver.driver_version() == "13.2"


def test_a_stream_works_in_its_own_context(use):
    fake = use(FakeDriver())
    stream = Stream()
    assert stream.handle == 0xABC
    with stream.current():
        start, end = stream.event(), stream.event()
        stream.record(start)
        stream.copy(1 << 40, 2 << 40, 64)
        stream.record(end)
        stream.synchronize()
        assert end.milliseconds_since(start) == 1.5
    stream.close()
    stream.close()
    names = [name for name, _ in fake.calls]
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 3
    assert names.count("cuStreamDestroy_v2") == names.count("cuDevicePrimaryCtxRelease_v2") == 1
    copy = next(arguments for name, arguments in fake.calls if name == "cuMemcpyAsync")
    assert [argument.value for argument in copy] == [1 << 40, 2 << 40, 64, 0xABC]
    assert isinstance(copy[0], ctypes.c_uint64)


def test_the_context_is_put_back_after_an_error(use):
    fake = use(FakeDriver(fails="cuStreamSynchronize"))
    stream = Stream()
    with pytest.raises(EngineError, match="cuStreamSynchronize of the NVIDIA driver failed"), stream.current():
        stream.synchronize()
    assert fake.calls[-1][0] == "cuCtxPopCurrent_v2"
