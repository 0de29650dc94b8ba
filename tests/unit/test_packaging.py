"""What is shipped, and what importing it needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import enginesmith

ROOT = Path(__file__).parents[2]
PACKAGES = ("compiler", "offline", "passes", "serving", "targets", "testing")

IN_TORCH = ROOT / "targets" / "inductor"
"""Modules that are imported where torch runs the engine; the worker's is imported to start it."""

TARGETS = [
    path
    for path in sorted((ROOT / "targets").rglob("*.py"))
    if path.stem[0] != "_" and (path.parent != IN_TORCH or path.stem == "worker")
]

RUNTIME = [
    "enginesmith",
    "enginesmith.errors",
    *(
        f"enginesmith.compiler.{name}"
        for name in ("engine", "generation.generate", "machine.environment", "manifest", "options", "signature")
    ),
    *(".".join(("enginesmith", *path.relative_to(ROOT).with_suffix("").parts)) for path in TARGETS),
]
"""What loading an engine may import."""

IMPORT = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if blocked(name.partition(".")[0]):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

def blocked(name):
    return CONDITION

sys.meta_path.insert(0, Blocker())
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


def modules() -> list[str]:
    """Every module of the package, from its files."""
    files = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    return sorted(".".join(["enginesmith", *(name for name in names if name != "__init__")]) for names in parts)


def failed_imports(names: list[str], blocked: str) -> dict[str, str]:
    code = IMPORT.replace("CONDITION", blocked)
    run = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=True)
    failed: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return failed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"enginesmith-{enginesmith.__version__}.dist-info/{name}").decode()


def test_a_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"enginesmith", f"enginesmith-{enginesmith.__version__}.dist-info"}
    shipped = {Path(name).with_suffix("").parts for name in wheel.namelist() if name.endswith(".py")}
    assert sorted(".".join(part for part in parts if part != "__init__") for parts in shipped) == modules()


def test_a_wheel_holds_the_types_and_the_files_of_the_report(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if name.startswith("enginesmith/") and not name.endswith(".py")}
    folder = ROOT / "compiler" / "report"
    report = {f"enginesmith/compiler/report/{path.name}" for path in folder.iterdir() if path.suffix in (".j2", ".css")}
    assert report
    assert names == {"enginesmith/py.typed", *report}


def test_a_wheel_has_the_command_the_licence_and_the_version(wheel: zipfile.ZipFile) -> None:
    scripts = ConfigParser()
    scripts.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"enginesmith": "enginesmith.cli:main"}
    headers = Parser().parsestr(metadata(wheel, "METADATA"))
    assert headers["Version"] == enginesmith.__version__
    assert headers["License-Expression"] == "Apache-2.0"
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")


def test_the_package_itself_imports_only_the_standard_library() -> None:
    blocked = "name != 'enginesmith' and name not in sys.stdlib_module_names and not name.startswith('__editable__')"
    assert failed_imports(["enginesmith"], blocked) == {}


def test_loading_an_engine_needs_numpy_only() -> None:
    blocked = "name not in ('enginesmith', 'numpy') and name not in sys.stdlib_module_names"
    assert failed_imports(RUNTIME, blocked) == {}


def test_every_module_imports_without_the_optional_packages() -> None:
    within_a_server = ("enginesmith.serving.backend.model", "enginesmith.serving.backend.decoder")
    of_triton = ("enginesmith.targets.inductor.kernels", "enginesmith.targets.inductor.launches")
    names = [name for name in modules() if name not in ("enginesmith.__main__", *of_triton, *within_a_server)]
    assert (
        failed_imports(
            names, "name in ('onnxruntime', 'ray', 'tensorrt', 'tensorrt_rtx', 'tokenizers', 'transformers')"
        )
        == {}
    )


def test_a_blocked_import_is_noticed() -> None:
    failed = failed_imports(["enginesmith", "numpy"], "name == 'numpy'")
    assert failed == {"numpy": "numpy is blocked"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from enginesmith.cli import cli; cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(run.stdout.splitlines()[-1].split())
    assert imported.isdisjoint({"torch", "onnx", "onnx_ir", "onnxruntime", "polygraphy", "matplotlib", "transformers"})
