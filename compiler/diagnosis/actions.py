"""Actions that change how the engine is run, and the list of all actions, the best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..machine.environment import cores
from ..manifest import Action
from .bounds import Measured
from .fusing import fusing
from .rewrites import alignment, precisions, pruning, sparsity
from .situation import Situation, action

LEAST = 0.01
"""Share of a call that an action has to save to be worth a line."""


def rank(situation: Situation) -> list[Action]:
    """What would help, by what it saves. Estimates overlap, and do not add up."""
    found = (made for rule in RULES for made in rule(situation))
    worth = [made for made in found if made is not None and made["saves_ms"] >= LEAST * situation.total_ms]
    return sorted(worth, key=lambda made: -made["saves_ms"])


def placement(situation: Situation) -> Iterator[Action | None]:
    """Nodes of an engine for a GPU that run on the CPU, with the copies that they make necessary."""
    stray = [layer for layer in situation.layers if layer.bound == "cpu-placed"]
    copies = [layer for layer in situation.layers if layer.bound == "transfer"]
    if stray:
        savings = {layer: layer.ms - (layer.limit_ms or 0.0) for layer in stray} | {copy: copy.ms for copy in copies}
        found = sorted({layer.layer.operator for layer in stray})
        why = (
            f"{', '.join(found)} on the CPU: the GPU would take what the roofline says, and {len(copies)} copies would "
            "go; a cast to a type that the GPU has kernels for is mostly enough"
        )
        yield action("move nodes to the GPU (--pass simplify, or --target tensorrt)", why, savings)
    elif copies:
        why = "copies between host and device take this long"
        yield action("keep inputs and outputs on the GPU (DLPack tensors)", why, {copy: copy.ms for copy in copies})


def batching(situation: Situation) -> Iterator[Action | None]:
    """More samples a call: launches, what is outside of layers, and weights are paid once a call."""
    name = situation.signature.batch_axis
    if name is None or situation.signature.axes[name].max <= situation.sizes[name]:
        return
    now, largest = situation.sizes[name], situation.signature.axes[name].max
    times = largest / now
    savings: dict[Measured, float] = {}
    for layer in situation.layers:
        if layer.work is not None and layer.limit_ms:
            more = situation.roof.limit_ms(layer.work.scaled(flops=times, moved=times))
            savings[layer] = layer.ms * (1 - more / layer.limit_ms / times)
    outside_ms = situation.outside_ms * (1 - 1 / times)
    fixed = sum(layer.ms for layer in situation.layers if layer.bound == "launch") + situation.outside_ms
    why = (
        f"a call of {now} takes {fixed:.3g} ms of launches and outside of layers, and reads all weights; "
        f"saved for every {now} samples, at a longer latency of the call"
    )
    yield action(f"larger batches: {name}={largest}", why, savings, beside_ms=outside_ms)


def cuda_graph(situation: Situation) -> Iterator[Action | None]:
    """Launches replayed as a CUDA graph."""
    within = situation.roof.ceilings.graph_launch_us
    if not situation.on_gpu or "cuda_graph" not in situation.info.options or situation.roof.graphed or within is None:
        return
    each_ms = (situation.roof.ceilings.launch_us - within) / 1000
    refused = (situation.info.details.get("cuda_graph") or {}).get("reason", "")
    savings = {layer: min(each_ms, layer.ms) for layer in situation.layers if layer.bound == "launch"}
    why = f"{len(savings)} kernels are bound by their launch, which takes {within:.2g} us less within a graph"
    if refused and situation.info.options["cuda_graph"]:
        yield action("make the CUDA graph possible", f"{why}; it was refused: {refused}", savings)
    else:
        yield action(f"--target {situation.target.name}:cuda_graph=true", why, savings)


def threads(situation: Situation) -> Iterator[Action | None]:
    """All cores, where the engine was told to use fewer."""
    used, available = situation.info.options.get("threads"), cores()
    if situation.on_gpu or not isinstance(used, int) or used >= available:
        return
    busy = [layer for layer in situation.layers if layer.bound in ("compute", "bandwidth")]
    savings = {layer: layer.ms * (1 - used / available) for layer in busy}
    why = f"the engine uses {used} of {available} cores; as if what compute or bandwidth bounds went with their number"
    yield action(f"--target {situation.target.name}:threads={available}", why, savings)


def preparation(situation: Situation) -> Iterator[Action | None]:
    """Data that are read and prepared while the engine waits."""
    reading = situation.reading
    if reading is None:
        return
    run_ms = situation.total_ms
    saved = min(reading.read_ms, run_ms)
    share = reading.share(run_ms)
    if reading.is_bound(run_ms):
        text = "prepare the data beforehand, or in several processes"
        why = (
            f"a batch takes {reading.read_ms:.3g} ms to read, {run_ms:.3g} ms to run: the engine waits for {share:.0%}"
        )
    else:
        text = "read the next batch while this one runs"
        why = f"reading takes {reading.read_ms:.3g} ms a batch, {share:.0%} of the time where it does not overlap"
    yield action(text, why, {}, beside_ms=saved)


RULES: tuple[Callable[[Situation], Iterator[Action | None]], ...] = (
    placement, fusing, precisions, alignment, pruning, sparsity, batching, cuda_graph, threads, preparation,
)  # fmt: skip
