from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

import pytest

from enginesmith.errors import TargetUnavailableError
from enginesmith.serving import triton
from enginesmith.serving.triton import find


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine without any server."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(triton, "INSTALLED", tmp_path / "opt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(triton, "_libpython", lambda: write(tmp_path / "libpython.so.1.0"))
    (tmp_path / "scratch").mkdir()
    return tmp_path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def installation(root: Path, python: str = triton.PYTHON) -> Path:
    """A folder like those of the official containers."""
    write(root / "backends" / "python" / triton.STUB, f"...libpython{python}.so.1.0...")
    write(root / "TRITON_VERSION", "2.60.0\n")
    return write(root / "bin" / "tritonserver")


def wheel(root: Path, monkeypatch, version: str = triton.WHEEL_VERSION) -> Path:
    """The files of the wheel that matter."""
    package = root / "site" / "pytriton"
    write(package / "__init__.py")
    write(package / "tritonserver" / "bin" / "tritonserver")
    write(package / "tritonserver" / "backends" / "python" / "libtriton_python.so")
    write(package / "tritonserver" / "python_backend_stubs" / triton.PYTHON / triton.STUB)
    (root / "site" / "nvidia_pytriton.libs").mkdir()
    spec = importlib.machinery.ModuleSpec("pytriton", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    return package


def test_without_any_server_one_message_names_every_place(machine):
    with pytest.raises(TargetUnavailableError, match="no Triton Inference Server can run here") as refused:
        find(machine / "scratch")
    assert (
        refused.value.found == f"PATH: no tritonserver; {triton.INSTALLED}: not there; nvidia-pytriton: not installed"
    )
    assert "enginesmith[serve]" in str(refused.value.hint)
    assert refused.value.exit_code == 4


def test_a_server_in_path_comes_first(machine, monkeypatch):
    binary = installation(machine / "container")
    (machine / "bin").mkdir()
    (machine / "bin" / "tritonserver").symlink_to(binary)
    wheel(machine, monkeypatch)
    found = find(machine / "scratch")
    assert (found.binary, found.version) == (binary, "2.60.0")
    assert found.backends == machine / "container" / "backends"
    assert found.has_backend("python")
    assert not found.has_backend("onnxruntime")


def test_an_installed_server_comes_before_the_wheel(machine, monkeypatch):
    binary = installation(machine / "opt")
    wheel(machine, monkeypatch)
    assert find(machine / "scratch").binary == binary


def test_a_server_for_another_python_is_passed_over_with_the_reason(machine):
    binary = installation(machine / "opt", python="3.7")
    with pytest.raises(TargetUnavailableError, match=f"{binary} runs Python 3.7, and this is Python {triton.PYTHON}"):
        raise_as_text(machine / "scratch")


def test_a_server_without_its_python_backend_is_passed_over(machine):
    binary = write(machine / "opt" / "bin" / "tritonserver")
    with pytest.raises(TargetUnavailableError, match=f"{binary} has no Python backend"):
        raise_as_text(machine / "scratch")


def test_the_wheel_gets_its_stub_and_this_interpreters_library_first(machine, monkeypatch):
    package = wheel(machine, monkeypatch)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    found = find(machine / "scratch")
    assert found.binary == package / "tritonserver" / "bin" / "tritonserver"
    assert sorted(path.name for path in (found.backends / "python").iterdir()) == sorted(
        ("libtriton_python.so", triton.STUB)
    )
    libraries = found.environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert libraries == [str(machine / "scratch" / "lib"), str(machine / "site" / "nvidia_pytriton.libs"), "/elsewhere"]
    assert [path.name for path in Path(libraries[0]).iterdir()] == ["libpython.so.1.0"]
    assert found.environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setattr("platform.libc_ver", lambda: ("glibc", "2.31")), "it needs glibc 2.35.* is glibc 2.31"),
        (lambda m: m.setattr("platform.libc_ver", lambda: ("", "")), "it needs Linux with glibc, .* another C library"),
        (lambda m: m.setattr(triton, "_libpython", lambda: None), "this Python has no shared library"),
        (lambda m: m.setattr(triton, "PYTHON", "3.99"), "it has no Python backend for Python 3.99"),
        (lambda m: m.setattr("importlib.metadata.version", lambda name: "0.5"), "version 0.5 is .*only 0.7.0"),
    ],
)  # fmt: skip
def test_the_wheel_is_refused_where_it_cannot_run(machine, monkeypatch, change, reason):
    wheel(machine, monkeypatch)
    change(monkeypatch)
    with pytest.raises(TargetUnavailableError, match=r"(?s)can run here.*nvidia-pytriton: " + reason):
        raise_as_text(machine / "scratch")


def test_a_broken_wheel_says_what_is_missing(machine, monkeypatch):
    package = wheel(machine, monkeypatch)
    (package / "tritonserver" / "bin" / "tritonserver").unlink()
    with pytest.raises(
        TargetUnavailableError, match=r"bin/tritonserver is missing; install nvidia-pytriton==0.7.0 again"
    ):
        raise_as_text(machine / "scratch")


def raise_as_text(scratch: Path) -> None:
    """Raises with all of the message, so that `match` sees it."""
    try:
        find(scratch)
    except TargetUnavailableError as error:
        raise TargetUnavailableError(str(error)) from error


def test_a_command_listens_on_loopback_without_http_and_metrics(machine, monkeypatch):
    wheel(machine, monkeypatch)
    command = find(machine / "scratch").command(Path("/repository"), "--exit-on-error", "true", port=1)
    text = " ".join(command)
    assert "--grpc-address 127.0.0.1 --grpc-port 1 --allow-http false --allow-metrics false" in text
    assert text.endswith("--exit-on-error true")


def test_http_and_metrics_listen_where_they_are_told(machine, monkeypatch):
    wheel(machine, monkeypatch)
    command = find(machine / "scratch").command(Path("/r"), address="1.2.3.4", port=1, metrics_port=2, http_port=3)
    text = " ".join(command)
    assert "--http-address 1.2.3.4 --http-port 3 --metrics-address 127.0.0.1 --metrics-port 2" in text
