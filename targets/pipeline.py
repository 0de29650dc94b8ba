"""A model in stages, one after the other, each an engine of another target: on several GPUs, or several cores."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from ..compiler.machine.environment import gpus
from ..errors import BuildError, DataError, RecipeError
from ._onnxruntime import OPSET
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile
from .stages.inner import device_of, joined, parse_inner
from .stages.plan import FILE, Cutter, Link, Plan

if TYPE_CHECKING:
    from ..compiler.partition.split import Stage
    from .cuda.onnxruntime import DeviceRunner

STAGES = "stages"
"""Folder of an engine that holds those of its stages, numbered from 0."""


@dataclasses.dataclass(frozen=True)
class Pipeline(Target):
    """A model cut into stages, for models that one GPU does not hold, and for throughput. Each stage is an engine of
    the target `of`, on a device of its own; micro-batches flow through them, so that all work at a time. The pass
    `partition` chooses where to cut. Outputs are those of the whole engine.

    Attributes:
        of: target that builds and runs the stages, its options joined by ``+``.
        stages: how many.
        devices: where the stages run, as ``cuda:0+cuda:1``, one for each or one for all; none for GPUs 0, 1, ... where
            `of` runs on GPUs, and otherwise the CPU, whose cores they share.
        micro_batch: rows of a micro-batch; None for four micro-batches a stage.
        memory_mib: most that weights and activations of a stage may take; None for all of the smallest GPU where each
            stage has one of its own, and else for no limit.
        slack: share by which the slowest stage may be slower than in the best cut, where less has to pass.
    """

    of: str = "onnxruntime-cpu"
    stages: int = 2
    devices: tuple[str, ...] = ()
    micro_batch: int | None = None
    memory_mib: int | None = None
    slack: float = 0.05

    name: ClassVar[str] = "pipeline"
    summary: ClassVar[str] = "stages of a model, each an engine of another target"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=("fp32", "fp16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "mixed", "mixed-fp16"),
        devices=("cpu", "cuda"),
        opset=OPSET,
    )

    def __post_init__(self) -> None:
        self.require_at_least(2, "stages")
        self.require_at_least(1, "micro_batch", "memory_mib")
        inner = parse_inner(self.of)
        if inner.name == self.name or inner.capabilities.consumes != "graph":
            raise RecipeError(
                f"stages cannot be engines of {inner.name}",
                expected="a target that builds from a graph",
                found=self.of,
            )
        if len(self.devices) not in (0, 1, self.stages):
            raise RecipeError(
                "a pipeline has another number of devices than of stages",
                expected=f"{self.stages}, or one for all",
                found=", ".join(self.devices),
            )
        for number in range(self.stages):
            device_of(inner, self.devices, number)
        precisions = tuple(p for p in inner.capabilities.precisions if not p.endswith("bf16"))
        can = dataclasses.replace(inner.capabilities, precisions=precisions)
        object.__setattr__(self, "capabilities", can)  # what the stages' target can

    def availability(self) -> Availability:
        """That of the stages' target, on the device of each."""
        for number in range(self.stages):
            state = self.stage_target(number).availability()
            if not (state.build and state.run):
                return state
        return state

    def part(self) -> Target:
        """That of the stages."""
        return self._inner

    def opset_range(self) -> tuple[int, int] | None:
        """As the stages' target."""
        return self._inner.opset_range()

    def lowering(self, precision: str) -> tuple[str, ...]:
        """That of the stages' target, and then the cut."""
        options = {"stages": self.stages, "on": joined(self.of), "precision": precision, "slack": self.slack}
        if (most := self._most_mib()) is not None:
            options["memory_mib"] = most
        text = ",".join(f"{name}={value}" for name, value in options.items())
        return (*self._inner.lowering(precision), f"partition:{text}")

    def _most_mib(self) -> int | None:
        """What a stage may take; CUDA numbers GPUs as NVML does where it sees all of them."""
        if self.memory_mib is not None or "CUDA_VISIBLE_DEVICES" in os.environ:
            return self.memory_mib
        known = {f"cuda:{number}": gpu["memory_bytes"] for number, gpu in enumerate(gpus())}
        devices = {device_of(self._inner, self.devices, number) for number in range(self.stages)}
        if len(devices) < self.stages or not devices <= known.keys():
            return None
        return int(min(known[device] for device in devices)) >> 20

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """As the stages' target."""
        return self._inner.rewrites(precision)

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """The size of micro-batches."""
        sizes = tuple({"micro_batch": rows} for rows in (1, 4, 16, 64) if rows != self.micro_batch)
        return (Tuning("rows of a micro-batch", sizes),)

    def refusals(self) -> Mapping[str, str]:
        """Those of the stages' target, and bfloat16, which arrays between stages cannot hold."""
        own = "tensors of bfloat16 cannot pass between stages, as arrays cannot hold them; fp16 can"
        return {**self._inner.refusals(), "bf16": own, "mixed-bf16": own}

    def versions(self) -> Mapping[str, str]:
        """As the stages' target."""
        return self._inner.versions()

    def build(self, request: BuildRequest) -> EngineInfo:
        """Builds each stage into a folder of its own, on what the stages before it give for the sample."""
        from ..compiler.partition.split import marked, split

        assert request.graph is not None
        if marked(request.graph) != self.stages:
            raise BuildError(
                f"the graph is not cut into {self.stages} stages",
                found=f"{marked(request.graph)} stages",
                hint=f"run the pass partition:stages={self.stages} before",
            )
        stages = split(request.graph, request.signature)
        plan = Plan(
            tuple(
                Link(f"{STAGES}/{number}", *(tuple(s.name for s in specs) for specs in (own.inputs, own.outputs)))
                for number, own in enumerate(stage.signature for stage in stages)
            ),
            tuple(spec.name for spec in request.signature.outputs),
        )
        plan.write(request.directory)
        _check_cut(self, request)
        infos = list(self._built(request, stages, plan))
        details = {
            "stages": [
                {"device": device_of(self._inner, self.devices, number), "inputs": list(link.inputs),
                 "outputs": list(link.outputs), **info.details}
                for number, (link, info) in enumerate(zip(plan.links, infos, strict=True))
            ]
        }  # fmt: skip
        requires = {key: value for info in infos for key, value in info.requires.items()}
        return self.info(request, FILE, infos[0].versions, requires=requires, details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Loads all stages."""
        from .stages.flow import FlowRunner

        plan = Plan.read(directory)
        cutter = Cutter(info.signature, self.stages, self.micro_batch)
        with ExitStack() as opened:
            runners = []
            for number in range(self.stages):
                runner = self.stage_runner(directory / plan.links[number].folder, number)
                opened.callback(runner.close)
                runners.append(runner)
            chained = self._chained(directory, plan, runners)
            opened.pop_all()
        if chained:
            from .cuda.chain import ChainRunner

            return ChainRunner(plan, chained, cutter)
        return FlowRunner(plan, runners, cutter)

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """The layers of all stages, one stage after the other, each measured by its runtime."""
        plan = Plan.read(directory)
        values, found = dict(inputs), list[Profile]()
        for number, link in enumerate(plan.links):
            folder = directory / link.folder
            own = EngineInfo.read(folder)
            taken = {name: np.asarray(values[name]) for name in link.inputs}
            profile = self.stage_target(number, own.options).profile(folder, own, taken)
            if isinstance(profile, str):
                return profile
            found.append(profile)
            runner = self.stage_runner(folder, number)
            try:
                values |= runner.run(taken)
            finally:
                runner.close()
        return Profile(
            layers=tuple(layer for profile in found for layer in profile.layers),
            how=found[0].how,
            calls=min(profile.calls for profile in found),
            shapes={name: shape for profile in found for name, shape in profile.shapes.items()},
            notes=tuple(dict.fromkeys(note for profile in found for note in profile.notes)),
            complete=all(profile.complete for profile in found),
        )

    def stage_target(self, number: int, options: Mapping[str, Any] | None = None) -> Target:
        """The target of a stage, on its device."""
        from . import get_target

        inner = self._inner if options is None else get_target(self._inner.name, options)
        device = device_of(inner, self.devices, number)
        if device != "cpu" and "device_id" in inner.options():
            return dataclasses.replace(inner, device_id=int(device.removeprefix("cuda:")))  # type: ignore[call-arg]
        if getattr(inner, "threads", 0) is None and device == "cpu":
            from ..compiler.machine.environment import cores

            return dataclasses.replace(inner, threads=max(1, cores() // self.stages))  # type: ignore[call-arg]
        return inner

    @property
    def _inner(self) -> Target:
        return parse_inner(self.of)

    def _chained(self, directory: Path, plan: Plan, runners: Sequence[Runner]) -> Sequence[DeviceRunner]:
        """The runners where their stages can pass values from GPU to GPU; empty where they go by the host.

        Buffers on GPUs are made beforehand, so the shapes of what passes have to follow from those of the inputs.
        """
        if self._inner.name != "onnxruntime-cuda":
            return ()
        for link in plan.links:
            signature = EngineInfo.read(directory / link.folder).signature
            if any("?" in spec.shape for spec in signature.outputs):
                return ()
        return cast("Sequence[DeviceRunner]", runners)

    def _built(self, request: BuildRequest, stages: Sequence[Stage], plan: Plan) -> Iterator[EngineInfo]:
        values: dict[str, np.ndarray] = dict(request.sample)
        for number, (stage, link) in enumerate(zip(stages, plan.links, strict=True)):
            folder = request.directory / link.folder
            folder.mkdir(parents=True)
            request.progress(number / len(stages), f"stage {number}")
            sample = {name: values[name] for name in link.inputs}
            own = dataclasses.replace(
                request, graph=stage.graph, signature=stage.signature, sample=sample, directory=folder
            )
            info = self.stage_target(number).build(own)
            # The share of threads is that of the machine which loads it.
            info = dataclasses.replace(info, name=f"stage {number}", options=self._inner.options())
            info.write(folder)
            request.log(f"stage {number}: {len(link.inputs)} inputs, {len(link.outputs)} outputs")
            runner = self.stage_runner(folder, number)
            try:
                values |= runner.run(sample)
            finally:
                runner.close()
            yield info

    def stage_runner(self, folder: Path, number: int, device: int | None = None) -> Runner:
        """Loads the engine of a stage; `device` is the GPU in place of its own."""
        own = EngineInfo.read(folder)
        target = self.stage_target(number, own.options)
        if device is not None and "device_id" in target.options():
            target = dataclasses.replace(target, device_id=device)  # type: ignore[call-arg]
        return target.runner(folder, dataclasses.replace(own, options=target.options()))


def staged(target: Target, stages: int | None, devices: str | None, micro_batch: int | None) -> Target:
    """A pipeline of a target, where it builds from a graph and is none already; else the target itself.

    Raises:
        RecipeError: devices or micro-batches, and no stages.
    """
    if stages is None:
        for name, given in (("stage_devices", devices), ("micro_batch", micro_batch)):
            if given is not None:
                raise RecipeError(f"{name} is given, and no stages", found=given, hint="say how many: --stages 2")
        return target
    if target.name == Pipeline.name or target.capabilities.consumes != "graph":
        return target
    names = tuple(filter(None, (devices or "").replace(" ", "").split(",")))
    return Pipeline(of=joined(str(target)), stages=stages, devices=names, micro_batch=micro_batch)


def all_staged(
    targets: Sequence[Target], stages: int | None, devices: str | None, micro_batch: int | None
) -> tuple[Target, ...]:
    """As `staged`, of all targets; those that take the module stay whole beside pipelines.

    Raises:
        RecipeError: stages, and no target that builds from a graph; devices or micro-batches, and no stages.
    """
    found = tuple(staged(target, stages, devices, micro_batch) for target in targets)
    if stages is not None and not any(target.name == Pipeline.name for target in found):
        raise RecipeError(
            "stages are cut from a graph, and no target builds from one",
            found=", ".join(map(str, targets)),
            hint="add --target onnxruntime-cpu, onnxruntime-cuda, openvino or tensorrt",
        )
    return found


def _check_cut(target: Pipeline, request: BuildRequest) -> None:
    """Raises BuildError where micro-batches were asked for that cannot be had."""
    try:
        Cutter(request.signature, target.stages, target.micro_batch).require()
    except DataError as error:
        raise BuildError(error.message, hint=error.hint) from error
