"""Data for `run`, and an engine that dies once; the network is that of `small_bundles`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np

from enginesmith.compiler.storage.files import hashes
from enginesmith.targets.base import EngineInfo

small = runpy.run_path(str(Path(__file__).parent / "small_bundles.py"))

TARGET = """
import dataclasses, os, pathlib, time
import numpy as np
from enginesmith.targets.base import Availability, Capabilities, HostBound, Target

W = np.array({w}, np.float32)
V = np.array({v}, np.float32)
FLAGS = pathlib.Path({flags!r})


class Runner:
    def run(self, inputs):
        if len(inputs["x"]) > 1 and ((FLAGS / "die").exists() or (FLAGS / "always").exists()):
            (FLAGS / "die").unlink(missing_ok=True)
            os._exit(9)
        if (FLAGS / "slow").exists():
            time.sleep(0.1)
        with (FLAGS / "calls").open("a") as stream:
            stream.write(str(len(inputs["x"])) + " ")
        return {{"left": inputs["x"] @ W, "right": np.tanh(inputs["x"] @ V)}}

    def reset(self):
        pass

    def close(self):
        pass


@dataclasses.dataclass(frozen=True)
class Own(Target):
    name = "own"
    summary = "A product in NumPy."
    capabilities = Capabilities(consumes="graph", precisions=("fp32",), devices=("cpu",))

    def availability(self):
        return Availability(build=True, run=True)

    def build(self, request):
        raise NotImplementedError

    def runner(self, directory, info):
        return Runner()
"""
"""It dies at a call of several rows: once where the file `die` is there, and each time where `always` is."""


def rows(count: int) -> np.ndarray:
    """Inputs."""
    return np.random.default_rng(1).standard_normal((count, 4)).astype(np.float32)


def write_own_bundle(root: Path) -> tuple[Path, str, Path]:
    """A bundle whose engine is of a target of the user's; the target's name, and the folder of its flags."""
    flags = root / "flags"
    flags.mkdir(parents=True)
    file = root / "own.py"
    file.write_text(TARGET.format(w=small["W"].tolist(), v=small["V"].tolist(), flags=str(flags)))
    bundle = small["write_bundle"](root / "bundle")
    folder = bundle / "engines" / "plain"
    EngineInfo("plain", "own", "fp32", "model.onnx", small["signature"]()).write(folder)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").unlink()
    manifest["engines"][0]["target"] = "own"
    manifest["files"] = hashes(bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle, f"{file}:Own", flags
