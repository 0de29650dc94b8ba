"""Finds a Triton Inference Server that can run here: in PATH, in /opt/tritonserver, or in the wheel nvidia-pytriton.

The wheel's server is started directly, without PyTriton's API, and the wheel is never imported. What makes that work:

- the Python backend starts a stub that is linked to libpython of one version; the wheel holds a stub for each;
- the stub must load the libpython of this interpreter, not one that the system has beside it (its functions and this
  interpreter's standard library would not fit), so a folder with a link to that library alone comes first in
  LD_LIBRARY_PATH;
- the stub looks for its standard library by the first python3 in PATH, so this interpreter's folder comes first there.

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from ..errors import TargetUnavailableError

WHEEL = "nvidia-pytriton"
WHEEL_VERSION = "0.7.0"
"""The one whose files are known; what lies where in it is no promise of its makers'."""

WHEEL_TRITON = "2.51.0"
GLIBC = (2, 35)
INSTALLED = Path("/opt/tritonserver")
STUB = "triton_python_backend_stub"
STUB_TIMEOUT_S = 60
"""How long loading a model may take before the server gives it up: reading the engine is a part of it."""

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclasses.dataclass(frozen=True)
class Triton:
    """A server that can run the Python backend with this interpreter.

    Attributes:
        origin: where it was found, for people.
        version: of the server; empty where nothing tells it before it runs.
        backends: folder with one folder for each backend.
        environment: all variables that the server is to be started with.
    """

    origin: str
    binary: Path
    version: str
    backends: Path
    environment: Mapping[str, str]

    def command(
        self,
        repository: Path,
        *flags: str,
        address: str = "127.0.0.1",
        port: int = 8001,
        metrics_address: str = "127.0.0.1",
        metrics_port: int | None = None,
        http_port: int | None = None,
    ) -> list[str]:
        """Starts it on a model repository, with gRPC, and with HTTP and metrics where they are given a port.

        The addresses stand here because the server's own defaults listen on every interface.
        """
        command = [str(self.binary), "--model-repository", str(repository), "--backend-directory", str(self.backends)]
        command += ["--grpc-address", address, "--grpc-port", str(port)]
        if http_port is None:
            command += ["--allow-http", "false"]
        else:
            command += ["--http-address", address, "--http-port", str(http_port)]
        if metrics_port is None:
            command += ["--allow-metrics", "false"]
        else:
            command += ["--metrics-address", metrics_address, "--metrics-port", str(metrics_port)]
        return [*command, "--backend-config", f"python,stub-timeout-seconds={STUB_TIMEOUT_S}", *flags]

    def has_backend(self, name: str) -> bool:
        """Whether it has the backend of that name, for instance "onnxruntime"."""
        return (self.backends / name).is_dir()


def find(scratch: Path) -> Triton:
    """The first server that can run here, made ready.

    Args:
        scratch: an existing folder for links to what the server loads. It must stay as long as the server runs.

    Raises:
        TargetUnavailableError: none can, with the reason of each.
    """
    reasons = {}
    for origin, look in (("PATH", _in_path), (str(INSTALLED), _installed), (WHEEL, _in_wheel)):
        found = look(scratch)
        if isinstance(found, Triton):
            return found
        reasons[origin] = found
    raise TargetUnavailableError(
        "no Triton Inference Server can run here",
        expected=f"tritonserver in PATH, {INSTALLED}, or the package {WHEEL}=={WHEEL_VERSION}",
        found="; ".join(f"{origin}: {reason}" for origin, reason in reasons.items()),
        hint="pip install 'enginesmith[serve]' (Linux with glibc 2.35, Python 3.10 to 3.13), "
        "or run the official container on what enginesmith export-triton writes",
    )


def _in_path(scratch: Path) -> Triton | str:
    path = shutil.which("tritonserver")
    return _native(Path(path).resolve(), scratch) if path else "no tritonserver"


def _installed(scratch: Path) -> Triton | str:
    path = INSTALLED / "bin" / "tritonserver"
    return _native(path, scratch) if path.is_file() else "not there"


def _native(binary: Path, scratch: Path) -> Triton | str:
    """A server with its backends beside its folder, as the official containers have them."""
    root = binary.parent.parent
    stub = root / "backends" / "python" / STUB
    if not stub.is_file():
        return f"{binary} has no Python backend ({stub} is missing)"
    wanted = _python_of(stub)
    if wanted not in ("", PYTHON):
        return f"{binary} runs Python {wanted}, and this is Python {PYTHON}"
    library = _libpython()
    version = root / "TRITON_VERSION"
    return Triton(
        origin=str(binary),
        binary=binary,
        version=version.read_text().strip() if version.is_file() else "",
        backends=root / "backends",
        environment=_environment([_link(library, scratch / "lib")] if library else []),
    )


def _in_wheel(scratch: Path) -> Triton | str:
    spec = importlib.util.find_spec("pytriton")  # does not import it
    if spec is None or spec.origin is None:
        return "not installed"
    if problem := _unfit():
        return problem
    package = Path(spec.origin).parent
    root, libraries = package / "tritonserver", package.parent / "nvidia_pytriton.libs"
    parts = {name: root / name for name in ("bin/tritonserver", "backends/python/libtriton_python.so")}
    parts["libraries"] = libraries
    if missing := [str(path) for path in parts.values() if not path.exists()]:
        return f"{missing[0]} is missing; install {WHEEL}=={WHEEL_VERSION} again"
    stub = root / "python_backend_stubs" / PYTHON / STUB
    if not stub.is_file():
        return f"it has no Python backend for Python {PYTHON}"
    library = _libpython()
    if library is None:
        return (
            f"this Python has no shared library {sysconfig.get_config_var('INSTSONAME')!r}, which the Python backend "
            "loads; use one that was built with --enable-shared, or install its library (Debian: libpython3)"
        )
    backend = scratch / "backends" / "python"
    for path in (*(root / "backends" / "python").iterdir(), stub):
        _link(path, backend)
    return Triton(
        origin=f"{WHEEL} {WHEEL_VERSION}",
        binary=parts["bin/tritonserver"],
        version=WHEEL_TRITON,
        backends=backend.parent,
        environment=_environment([_link(library, scratch / "lib"), libraries]),
    )


def _unfit() -> str:
    """Why the wheel's server cannot run on this system; empty where it can."""
    try:
        version = importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    if version != WHEEL_VERSION:
        return f"version {version} is installed, and only {WHEEL_VERSION} is known to work"
    libc, number = platform.libc_ver()
    if sys.platform != "linux" or libc != "glibc":
        return f"it needs Linux with glibc, and this is {sys.platform} with {libc or 'another C library'}"
    if tuple(int(part) for part in number.split(".")[:2]) < GLIBC:
        return f"it needs glibc {GLIBC[0]}.{GLIBC[1]}, and this is glibc {number}"
    return ""


def _libpython() -> Path | None:
    """This interpreter's shared library; None where it has none."""
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    if ".so" not in name:
        return None
    folders = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib", sysconfig.get_config_var("LIBPL")]
    paths = (Path(folder) / name for folder in folders if folder)
    return next((path for path in paths if path.is_file()), None)


def _python_of(stub: Path) -> str:
    """The version of Python that a stub is linked to, for instance "3.12"; empty where it does not say."""
    found = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return found.group(1).decode() if found else ""


def _link(path: Path, folder: Path) -> Path:
    """Links a file into a folder, which is made where it is missing, and gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / path.name
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return folder


def _environment(libraries: list[Path]) -> dict[str, str]:
    """This process's, with these libraries and this interpreter before all others."""

    def before(first: list[str], name: str) -> str:
        return os.pathsep.join([*first, *filter(None, [os.environ.get(name)])])

    return {
        **os.environ,
        "LD_LIBRARY_PATH": before([str(folder) for folder in libraries], "LD_LIBRARY_PATH"),
        "PATH": before([str(Path(sys.executable).parent)], "PATH"),
    }
