import json
import sys
import types

import psutil
import pytest

from enginesmith.compiler.machine import environment as module
from enginesmith.compiler.machine.environment import cores, cpu_flags, environment, gpus

CPUINFO = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512_vnni\n\nprocessor : 1\nflags : fpu\n"


class NVMLError(Exception):
    pass


def fail(*arguments):
    raise NVMLError


def fake_nvml(**changes):
    """pynvml with one H100."""
    calls = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=80 << 30),
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
    }
    return types.SimpleNamespace(**{**calls, **changes})


def test_environment_is_plain_json_and_names_this_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"].startswith(f"{sys.version_info.major}.")
    assert "numpy" in found["packages"]
    assert found["cpu"]["cores"] >= 1
    assert all(found.values())


def test_gpu_and_driver_come_from_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    found = environment()
    assert found["gpus"] == [{"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_bytes": 80 << 30}]
    assert found["cuda"] == {"driver": "580.65.06", "driver_supports": "13.0"}


def test_what_is_imported_changes_nothing(monkeypatch):
    torch = types.SimpleNamespace(
        version=types.SimpleNamespace(cuda="13.0"),
        backends=types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 91900)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    with_torch = environment()
    monkeypatch.delitem(sys.modules, "torch")
    assert environment() == with_torch


@pytest.mark.parametrize(
    "nvml", [None, fake_nvml(nvmlInit=fail), fake_nvml(nvmlDeviceGetCount=fail, nvmlSystemGetDriverVersion=fail)]
)
def test_a_machine_without_nvml_has_no_gpus(monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpus() == []
    assert not {"gpus", "cuda"} & set(environment())


def test_flags_are_those_of_the_first_processor(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    monkeypatch.setattr(module, "_CPU_INFO", file)
    assert cpu_flags() == {"fpu", "avx2", "avx512_vnni"}
    assert environment()["cpu"]["model"] == "Some CPU"
    assert environment()["cpu"]["isa"] == ["avx2", "avx512_vnni"]


def test_flags_of_vector_instructions_are_told_from_others(monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(("sse4_2", "fpu", "avx2", "amx_tile", "vme")))
    assert module.simd_flags() == ("amx_tile", "avx2", "sse4_2")


def test_processors_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(module, "_allowed", lambda: 3)
    assert module.processors() == 3
    monkeypatch.setattr(module, "_allowed", lambda: None)
    assert module.processors() == 1


def test_cores_are_physical_ones_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else 8)
    monkeypatch.setattr(module, "_allowed", lambda: 16)
    assert cores() == 8
    monkeypatch.setattr(module, "_allowed", lambda: 3)
    assert cores() == 3
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert cores() == 1


def test_a_system_without_cpuinfo_has_no_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "none")
    assert cpu_flags() == frozenset()
    assert "isa" not in environment()["cpu"]
