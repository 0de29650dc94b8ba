"""Runs the commands of samples/pipeline, as GitHub and GitLab would, with a forge that is a folder."""

from __future__ import annotations

import http.server
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
form = runpy.run_path(str(ROOT / "tests" / "junit_form.py"))
GITHUB: Any = yaml.safe_load((ROOT / "samples/pipeline/github-actions.yml").read_text())
GITLAB: Any = yaml.safe_load((ROOT / "samples/pipeline/gitlab-ci.yml").read_text())
QUICK = "--precision fp32 --target onnxruntime-cpu --rounds 6 --slice-s 0.01"
GH = """#!/bin/bash
set -euo pipefail
case "$1 $2" in
  "release list") if [ -f "$FORGE/tag" ]; then cat "$FORGE/tag"; fi ;;
  "release download") test "$3" = "$(cat "$FORGE/tag")"; cp "$FORGE/${5}" "$7" ;;
  "release create") echo "$3" > "$FORGE/tag"; cp "$4" "$FORGE" ;;
  *) exit 1 ;;
esac
"""
"""What the workflow needs of GitHub's command line."""


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where releases lie."""
    return tmp_path_factory.mktemp("forge")


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory, commands: Path) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    (folder / "enginesmith").symlink_to(commands / "enginesmith")
    for name, text in (("gh", GH), ("pip", "#!/bin/sh\nexit 0\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    (folder / "captures").symlink_to(shared_cache / "captures")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    return tmp_path


@pytest.fixture
def registry(forge: Path) -> Iterator[str]:
    """A package registry over HTTP in that folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(forge))

        def do_GET(self) -> None:
            if self.headers["JOB-TOKEN"] != "secret":
                self.send_error(401)
            elif "broken" in self.path:
                self.send_error(500)
            else:
                super().do_GET()

        def do_PUT(self) -> None:
            target = forge / self.path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(201)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def shortened(script: str) -> str:
    """The same commands, with one engine and a short benchmark that cannot fail by noise."""
    script = re.sub(r"enginesmith compile\b", rf"enginesmith compile {QUICK}", script)
    quick = "--rounds 6 --slice-s 0.01 --sizes batch=8 --tolerance-speed 20"
    return re.sub(r"enginesmith compare\b", f"enginesmith compare {quick}", script)


def run(
    script: str, checkout: Path, bin_folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", shortened(script)],
        cwd=checkout,
        env={**os.environ, **environment, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def workflow(checkout: Path, bin_folder: Path, environment: Mapping[str, str]) -> list[str]:
    """The steps of the workflow that ran, as on a tag; an expression of GitHub's is not for a shell."""
    ran = []
    for step in GITHUB["jobs"]["engine"]["steps"]:
        if "run" not in step:
            continue
        assert "${{" not in step["run"]
        done = run(step["run"], checkout, bin_folder, {**GITHUB["env"], **environment})
        assert done.returncode == 0, done.stdout + done.stderr
        ran.append(step["name"])
    return ran


def verdicts(checkout: Path) -> dict[str, int]:
    """The number of test cases in each file, all of which passed."""
    found = {}
    for path in sorted((checkout / "build" / "junit").glob("*.xml")):
        root = form["check_form"](path)
        assert (root.attrib["failures"], root.attrib["errors"]) == ("0", "0")
        found[path.stem] = int(root.attrib["tests"])
    return found


@pytest.mark.slow
def test_the_workflow_compiles_publishes_and_compares_the_next_time(
    checkout: Path, bin_folder: Path, forge: Path, cache: Path
) -> None:
    environment = {"FORGE": str(forge), "GITHUB_REF_NAME": "v1", "ENGINESMITH_CACHE": str(cache)}
    assert "Publish" in workflow(checkout, bin_folder, environment)
    assert set(verdicts(checkout)) == {"compile", "validate"}
    assert (forge / "tag").read_text() == "v1\n"
    shutil.rmtree(checkout / "build")
    workflow(checkout, bin_folder, {**environment, "GITHUB_REF_NAME": "v2"})
    assert verdicts(checkout)["compare"] >= 4
    assert (forge / "tag").read_text() == "v2\n"
    assert (checkout / "build" / "model" / "report.html").is_file()


@pytest.mark.slow
def test_the_jobs_compile_publish_and_compare_the_next_time(
    checkout: Path, bin_folder: Path, registry: str, cache: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    environment = {
        "RECIPE": GITLAB["variables"]["RECIPE"],
        "LAST": GITLAB["variables"]["LAST"].replace("$CI_API_V4_URL", registry).replace("$CI_PROJECT_ID", "7"),
        "CI_JOB_TOKEN": "secret",
        "ENGINESMITH_CACHE": str(cache),
    }
    engine = "\n".join([*GITLAB["engine"]["before_script"], *GITLAB["engine"]["script"]])
    first = run(engine, checkout, bin_folder, environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "nothing was published yet" in first.stdout
    assert set(verdicts(checkout)) == {"compile", "validate"}
    published = run("\n".join(GITLAB["publish"]["script"]), checkout, bin_folder, environment)
    assert published.returncode == 0, published.stderr
    second = run(engine, checkout, bin_folder, environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert verdicts(checkout)["compare"] >= 4

    fetching = "\n".join(GITLAB["engine"]["script"][2:])
    down = run(fetching, checkout, bin_folder, {**environment, "LAST": f"{registry}/broken"})
    assert (down.returncode, "the last release cannot be fetched: HTTP 500" in down.stdout) == (1, True)
    (checkout / "build/last/model/recipe.yaml").unlink()
    worse = run(
        "enginesmith compare build/last/model build/model --junit build/junit/compare.xml",
        checkout,
        bin_folder,
        environment,
    )
    assert worse.returncode == 2, worse.stderr


def test_both_keep_report_and_verdicts_of_runs_that_failed() -> None:
    steps = {step["uses"].partition("@")[0]: step for step in GITHUB["jobs"]["engine"]["steps"] if "uses" in step}
    kept = steps["actions/upload-artifact"]
    assert kept["if"] == steps["mikepenz/action-junit-report"]["if"] == "always()"
    assert kept["with"]["path"].split() == ["build/model", "build/junit"]
    assert steps["mikepenz/action-junit-report"]["with"]["report_paths"] == "build/junit/*.xml"
    artifacts = GITLAB["engine"]["artifacts"]
    assert (artifacts["when"], artifacts["reports"]["junit"]) == ("always", "build/junit/*.xml")
    assert artifacts["paths"] == ["build/model", "build/junit"]


def test_both_keep_the_cache_where_the_commands_look_for_it() -> None:
    job = GITHUB["jobs"]["engine"]
    cached = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    assert job["env"]["ENGINESMITH_CACHE"].endswith("/" + cached["with"]["path"])
    assert GITLAB["variables"]["ENGINESMITH_CACHE"] == f"$CI_PROJECT_DIR/{GITLAB['engine']['cache']['paths'][0]}"
