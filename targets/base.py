"""The contract of a target: declared limits, `availability`, `build`, and `runner` to execute what was built.

Loading an engine imports this file, so it needs the standard library and NumPy only.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from ..compiler.options import render
from ..compiler.signature import Signature
from ..errors import RecipeError
from .profile import Profile

if TYPE_CHECKING:
    from ..compiler.graph import Graph
    from ..compiler.sources import Model

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a target takes and needs, readable without importing its runtime.

    Attributes:
        consumes: "graph" for an ONNX graph, "module" for the torch module itself.
        opset: lowest and highest ONNX opset that the target parses; None where it takes no graph.
        precisions: variants that it builds.
        devices: where its engines run.
        gpu_to_build: whether building needs a GPU.
        minimum: lowest version of each package that it needs.
        channels: multiple that its kernels take channels in.
        sparsity: patterns of zeros in weights that it has kernels for.
        alignment: multiple that its Tensor Cores take the dimensions of products in, by precision; those that are
            left out use none.
        calibrated: precisions for which `build` itself reads calibration data; a graph's passes do that by themselves.
    """

    consumes: Literal["graph", "module"]
    precisions: tuple[str, ...]
    devices: tuple[Literal["cpu", "cuda"], ...]
    opset: tuple[int, int] | None = None
    gpu_to_build: bool = False
    minimum: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sparsity: tuple[Literal["2:4"], ...] = ()
    alignment: Mapping[str, int] = dataclasses.field(default_factory=dict)
    channels: int = 8
    calibrated: tuple[str, ...] = ()


Effort = Literal["quick", "default", "thorough"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Options of a target of which the ladder measures each alternative, and keeps the fastest where it is faster.

    Attributes:
        what: the question in a few words, for instance "threads within an operator".
        alternatives: options that take the place of the present ones, each set tried by itself.
        effort: the least effort at which it is worth its time.
    """

    what: str
    alternatives: tuple[Mapping[str, Any], ...]
    effort: Effort = "default"


@dataclasses.dataclass(frozen=True)
class Availability:
    """Whether this machine can build and run a target.

    Attributes:
        reason: why not, in a sentence; empty where both are possible.
        install: what to install or do about it.
        versions: versions of the packages and drivers found.
    """

    build: bool
    run: bool
    reason: str = ""
    install: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        graph: the graph after all passes, precision included; None for a target that consumes the module, or where
            capture failed.
        model: the model as the user gave it.
        precision: variant to build; a target that consumes a graph finds it expressed in the graph already.
        sample: one sample of real inputs.
        directory: existing empty folder for the engine's files.
        cache: folder that outlives the build, for timing caches and the like.
        log: takes one line for build.log.
        progress: takes the fraction done, 0 to 1, and what is being done, where the builder tells.
        timeout_s: how long a native builder may take.
        calibration: samples to see ranges in, for the target's `calibrated` precisions; None where there are none.
    """

    graph: Graph | None
    model: Model
    signature: Signature
    precision: str
    sample: Arrays
    directory: Path
    cache: Path
    log: Callable[[str], None]
    progress: Callable[[float, str], None] = lambda fraction, phase: None
    timeout_s: float = 3600.0
    calibration: Iterable[Arrays] | None = None


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """Content of engine.json: all that is needed to run an engine and to judge whether it may run here.

    Attributes:
        name: folder of the engine, ``<target>-<variant>``.
        entry: file in the folder that the runtime opens.
        options: resolved options of the target.
        requires: facts that must hold where it runs, for instance ``{"compute_capability": "9.0"}``.
        details: what the build found: placement, layers, timings.
        stateful: whether the engine carries state from one call to the next.
    """

    name: str
    target: str
    precision: str
    entry: str
    signature: Signature
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    requires: Mapping[str, str] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stateful: bool = False

    def write(self, directory: Path) -> None:
        """Writes engine.json."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["signature"] = self.signature.to_json()
        (directory / "engine.json").write_text(json.dumps(value, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> EngineInfo:
        """Reads engine.json."""
        value = json.loads((directory / "engine.json").read_text())
        return cls(**{**value, "signature": Signature.from_json(value["signature"])})


class Bound(Protocol):
    """Inputs that already lie where the engine wants them."""

    def run(self) -> None:
        """Starts one execution; on a GPU it may return before the device is done."""

    def synchronize(self) -> None:
        """Waits until everything started has finished."""

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Runs `iterations` times one after the other: host milliseconds of each, synchronised, and device ones."""

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""


class Runner(Protocol):
    """A loaded engine. Calls may come from several threads."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name. NumPy arrays in give NumPy arrays out; DLPack tensors stay on their device where it can."""

    def bind(self, inputs: Arrays) -> Bound:
        """Places inputs on the engine's device, for repeated runs without transfers."""

    def reset(self) -> None:
        """Returns a stateful engine to its first state; does nothing on others."""

    def close(self) -> None:
        """Gives back memory, devices and worker processes."""


class HostBound:
    """`Bound` over a plain function on the host."""

    def __init__(self, call: Callable[[], dict[str, np.ndarray]]) -> None:
        self._call = call
        self._outputs: dict[str, np.ndarray] = {}

    def run(self) -> None:
        """Runs once."""
        self._outputs = self._call()

    def synchronize(self) -> None:
        """Nothing is left running on a host."""

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Host milliseconds of each run."""
        times = []
        for _ in range(iterations):
            start = time.perf_counter_ns()
            self.run()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times, None

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run."""
        return self._outputs


@dataclasses.dataclass(frozen=True)
class Target(abc.ABC):
    """A place to run a model. The fields of the dataclass are the options of the target."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    """``file.py:Class`` where the class is the user's."""
    capabilities: ClassVar[Capabilities]
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fp32": (),
        "fp16": ("cast:to=fp16",),
        "bf16": ("cast:to=bf16",),
    }

    @abc.abstractmethod
    def availability(self) -> Availability:
        """Looks for the packages, drivers and devices, without building anything."""

    @abc.abstractmethod
    def build(self, request: BuildRequest) -> EngineInfo:
        """Builds an engine into `request.directory` (engine.json itself is written by the caller).

        Raises:
            TargetUnavailableError: see `availability`.
            BuildError: the builder refused, crashed or ran out of time.
        """

    @abc.abstractmethod
    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Loads the engine in `directory`.

        Raises:
            TargetUnavailableError: the runtime or device is missing.
            EngineMismatchError: the engine was built for another machine or version.
        """

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """What each layer of the engine in `directory` takes, or why its runtime cannot tell. Runs the engine.

        Raises:
            EngineError: as `runner`, or the engine fails on the inputs.
        """
        return f"{self.name} does not tell what its layers take"

    def part(self) -> Target:
        """The target that runs parts of an engine by themselves."""
        return self

    def opset_range(self) -> tuple[int, int] | None:
        """Lowest and highest opset that the version found here parses; None where the target takes no graph."""
        return self.capabilities.opset

    def lowering(self, precision: str) -> tuple[str, ...]:
        """The passes, as text and in order, that bring a float32 graph to a precision that the target builds."""
        return self.lowerings.get(precision, ()) if self.capabilities.consumes == "graph" else ()

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """Passes worth measuring each, as text: run after those that cut or grow dimensions, before the lowering."""
        return ()

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """Options worth measuring on this machine for an engine of a precision, in the order in which to try them."""
        return ()

    def built_for(self) -> Mapping[str, str] | None:
        """What decides the engine beside graph, options and precision: one serves all machines where it is equal.

        None: all that is known about a machine, for targets that do not say.
        """
        return None

    def describe(self, info: EngineInfo, request: BuildRequest) -> EngineInfo:
        """What is true on this machine of an engine that another one built, which lies in the request's folder.

        Raises:
            EngineError: it does not work here.
        """
        return info

    def refusals(self) -> Mapping[str, str]:
        """Why precisions that one may expect, or that other versions and devices have, cannot be had; by precision."""
        return {}

    def versions(self) -> Mapping[str, str]:
        """Versions of what would run an engine here, for comparison with what the engine requires."""
        return self.availability().versions

    def info(self, request: BuildRequest, entry: str, versions: Mapping[str, str], **facts: Any) -> EngineInfo:
        """Describes the engine built for `request`; `facts` are further fields."""
        return EngineInfo(
            name=request.directory.name,
            target=self.name,
            precision=request.precision,
            entry=entry,
            signature=request.signature,
            options=self.options(),
            versions=versions,
            **facts,
        )

    def require_at_least(self, least: int, *options: str) -> None:
        """Raises RecipeError where one of these options has a value below `least`."""
        for option in options:
            value = getattr(self, option)
            if value is not None and value < least:
                raise RecipeError(f"{option} of {self.name} is too small", expected=f"{least} or more", found=value)

    def __str__(self) -> str:
        return render(self.source or self.name, self)

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return dataclasses.asdict(self)
