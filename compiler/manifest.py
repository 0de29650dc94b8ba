"""The records that a bundle's manifest.json holds. They are plain JSON, so that loading needs no library to read them.

Units are in the names. A number that does not exist is None (an SNR of equal arrays, device time on a CPU).
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

FORMAT = 1
"""Version of the manifest's layout; a bundle of another version is refused."""


class Tolerance(TypedDict):
    """What an output may differ by; every bound must hold."""

    relative_l2: float
    max_abs: float
    cosine: float
    top1: float


class OutputMetrics(TypedDict):
    """How one output differs from the reference over all samples, the worst sample deciding.

    relative_l2 is ||y - r|| / ||r||; max_abs is max|y - r| / max|r|; snr_db is 20 log10(||r|| / ||y - r||), None where
    equal; top1 and top5 are the share of rows whose best class agrees, None where the output is not logits.
    """

    output: str
    relative_l2: float | None
    max_abs: float | None
    cosine: float | None
    snr_db: float | None
    nan: int
    inf: int
    top1: float | None
    top5: float | None
    passed: bool
    failures: list[str]


class TaskMetric(TypedDict):
    """The user's own metric over the data, with its 95 % bootstrap interval, beside the reference's.

    `perplexity` is exp(-value), where the metric is the ln p of tokens.
    """

    name: str
    value: float
    low: float
    high: float
    reference: float
    samples: int
    perplexity: NotRequired[float]
    perplexity_of_reference: NotRequired[float]


class BudgetRecord(TypedDict):
    """What a budget bounds, as measured; `value` is None where it is not finite. `problem` says what broke it."""

    text: str
    value: float | None
    holds: bool
    problem: str


class Validation(TypedDict):
    """Verdict on one engine; `budget` is None for engines in full precision, and where none was given."""

    engine: str
    passed: bool
    samples: int
    tolerance: Tolerance
    outputs: list[OutputMetrics]
    noise_floor: list[OutputMetrics]
    noise_floor_of: str
    metric: TaskMetric | None
    budget: BudgetRecord | None


class SpeedUp(TypedDict):
    """Ratio of the baseline's time to this candidate's, above 1 where faster, with its bootstrap 95 % interval."""

    against: str
    ratio: float
    low: float
    high: float


class Timing(TypedDict):
    """One candidate at one size of the dynamic axes. Times are of the host, synchronised; device_* by device events.

    `speed_up` is against the baseline, `against_sibling` against the engine that this one has to beat.
    """

    candidate: str
    sizes: dict[str, int]
    batch: int
    iterations: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples_per_s: float
    requests_per_s: float
    device_mean_ms: float | None
    device_p50_ms: float | None
    device_p99_ms: float | None
    speed_up: SpeedUp | None
    against_sibling: SpeedUp | None
    gpu_utilization_percent: float | None
    gpu_memory_bytes: int | None
    sm_clock_mhz: float | None
    steady: bool


class Protocol(TypedDict):
    """How a benchmark was run."""

    rounds: int
    slice_s: float
    warmup_s: float
    order: str
    transfers: bool
    seed: int
    threads: int
    description: str


class Benchmark(TypedDict):
    """All candidates, at all sizes, in one interleaved run."""

    protocol: Protocol
    baseline: str
    timings: list[Timing]
    skipped: dict[str, str]


class PassRecord(TypedDict):
    """One pass on one variant of the graph: "all" before the engines part, then the names of the engines it is for.

    `refusals` are {"reason", "node"}; `details` are tables and series.
    """

    variant: str
    engines: list[str]
    text: str
    seconds: float
    modified: bool
    changes: dict[str, int]
    refusals: list[dict[str, str]]
    details: dict[str, Any]
    nodes_before: int
    nodes_after: int


class CalibrationRecord(TypedDict):
    """Statistics of the activations of one graph, in `file`. `findings` are {"tensor", "kind", "text", "severe"}."""

    data: str
    random: bool
    samples: int
    tensors: int
    digest: str
    file: str
    findings: list[dict[str, Any]]


class Attempt(TypedDict):
    """One exporter tried at capture; `reason` says why it failed and is empty where it did not."""

    exporter: str
    succeeded: bool
    seconds: float
    reason: str


class CaptureRecord(TypedDict):
    """How the graph was captured and checked. `checks` are {"sizes": {...}, "relative_l2": float}."""

    exporter: str | None
    opset: int | None
    attempts: list[Attempt]
    checks: list[dict[str, Any]]


class EngineRecord(TypedDict):
    """One engine that was asked for, built or not. `size_bytes` counts the files of its folder.

    `sibling` names the engine without the optional step that this one has, None where it has none; `dropped` says why
    it is not worth that step, and is empty where it is, or where that is not known.
    """

    name: str
    target: str
    precision: str
    status: Literal["ready", "built", "failed", "unavailable"]
    reason: str
    to_do: str
    build_s: float | None
    size_bytes: int
    cached: bool
    details: dict[str, Any]
    validation: Validation | None
    sibling: str | None
    dropped: str


class LadderStep(TypedDict):
    """One step that the ladder tried on a target.

    `step` is its rung, as "simplify", "precision" or "threads within an operator"; `what` are its passes or options as
    text. `ratio` is the incumbent's time to the candidate's, or the quotient of rates or sizes where that is the
    objective. `status` is "start" for the engine that the ladder begins with, "not measured" for one that is kept as it
    was asked for and cannot be timed here, "skipped" where there was no time or nothing to try. `resumed` tells that
    the numbers are of an earlier compile, which was interrupted or had the same step.
    """

    target: str
    step: str
    what: str
    candidate: str
    status: Literal["start", "kept", "reverted", "failed", "skipped", "not measured"]
    reason: str
    ratio: SpeedUp | None
    p50_ms: float | None
    samples_per_s: float | None
    size_bytes: int
    relative_l2: float | None
    budget: BudgetRecord | None
    seconds: float
    resumed: bool


class Ladder(TypedDict):
    """How the best engine of each target was found. `picks` are the engines left, by target; `complete` tells whether
    nothing was skipped for want of time.
    """

    objective: str
    effort: str
    time_limit_s: float
    seconds: float
    complete: bool
    picks: dict[str, str]
    steps: list[LadderStep]


class BatchPoint(TypedDict):
    """One batch size that was tried. Times are None where it does not fit or was not timed; `reason` says why.

    `samples_per_s` is of the median call; `p99_ms` is over `calls` calls, of which a p99 needs 200. `memory_bytes` is
    what it takes with the engine: of the device, or on a CPU the peak of the whole process that ran it.
    """

    batch: int
    fits: bool
    reason: str
    p50_ms: float | None
    p99_ms: float | None
    samples_per_s: float | None
    calls: int
    memory_bytes: int | None
    gpu_utilization_percent: float | None


class BatchCurve(TypedDict):
    """Batch sizes of one engine. `largest` fits in memory, 0 where none does; `largest_is_limit` tells that no larger
    one was asked for. `saturation` is the smallest with 95 % of the highest throughput, `best` the one with the most
    throughput within `p99_limit_ms` (None for no limit). `sizes` are those of the other dynamic axes.
    """

    engine: str
    axis: str
    sizes: dict[str, int]
    device: Literal["cpu", "cuda"]
    points: list[BatchPoint]
    largest: int
    largest_is_limit: bool
    saturation: int | None
    best: int | None
    p99_limit_ms: float | None
    protocol: str


Bound = Literal["compute", "bandwidth", "launch", "cpu-placed", "transfer", "unknown"]


class RooflineNode(TypedDict):
    """One node or fused layer of an engine: what it computes and moves, and what limits it. `share` is of the time.

    `covers` are the nodes of the graph in it, none where its name leads nowhere: then `flops` and `bytes` are what the
    runtime tells, or 0. `limit_ms` is the least that it could take under the ceilings, None where that is not known.
    """

    name: str
    operator: str
    covers: list[str]
    precision: str
    flops: float
    bytes: float
    ms: float
    share: float
    limit_ms: float | None
    bound: Bound


class Action(TypedDict):
    """Something that would help, in the words of the command line, with the time that it would save a call.

    `node` is where most of it is saved, `nodes` are all that it touches. `found` says what the ladder measured of it,
    and is empty where it did not try; `found_ms` is what it saved then, negative where it was slower.
    """

    action: str
    node: str
    nodes: list[str]
    saves_ms: float
    why: str
    found: str
    found_ms: float | None


class Roofline(TypedDict):
    """Where the time of an engine goes, under the ceilings that were measured on this machine.

    `peaks` are the ceilings of all precisions in GFLOP/s, `peak_gflops` that of the one in which most is computed.
    `bounds` are the milliseconds by what limits them; `outside_ms` is the part of `total_ms` that is in no layer, and
    `unmapped_ms` that in layers which no node of the graph was found for. `estimates` says how good the estimates were
    that the ladder checked; empty where it checked none.
    """

    engine: str
    device: str
    precision: str
    sizes: dict[str, int]
    peak_gflops: float
    peaks: dict[str, float]
    bandwidth_gb_s: float
    launch_us: float
    total_ms: float
    outside_ms: float
    unmapped_ms: float
    bounds: dict[str, float]
    nodes: list[RooflineNode]
    actions: list[Action]
    estimates: str
    how: str
    notes: list[str]


def new_engine(name: str, target: str, precision: str, sibling: str | None = None) -> EngineRecord:
    """The record of an engine that nothing is known of yet."""
    return EngineRecord(
        name=name,
        target=target,
        precision=precision,
        status="unavailable",
        reason="",
        to_do="",
        build_s=None,
        size_bytes=0,
        cached=False,
        details={},
        validation=None,
        sibling=sibling,
        dropped="",
    )


class Stage(TypedDict):
    """One named stage of the compile."""

    name: str
    seconds: float
    detail: str


class ServiceRecord(TypedDict):
    """A load test of a service of one engine: what ``enginesmith load-test --json`` gives, and when it was.

    `served` is the engine, `payload` what was sent, in which "rows" are those of a request. `engine` are the engine's
    own times at that batch as the bundle's benchmark has them, None where it has none, and `overhead_ms` is what a
    single client waits longer than that at the median. `closed` and `open` are loops, `knee` and `within_p99` rates of
    the latter.
    """

    created: str
    served: str
    urls: list[str]
    model: str
    payload: dict[str, Any]
    closed: list[dict[str, Any]]
    open: list[dict[str, Any]]
    knee: float | None
    within_p99: float | None
    limits: dict[str, float | None]
    engine: dict[str, Any] | None
    overhead_ms: float | None
    problems: list[str]


class Searches(TypedDict, total=False):
    """What a compile, or a load test of its bundle, finds out where it is asked to; None or empty where it was not."""

    ladder: Ladder | None
    batches: list[BatchCurve]
    roofline: Roofline | None
    services: list[ServiceRecord]


class Manifest(Searches):
    """Content of manifest.json. `files` maps each file of the bundle to its SHA-256, manifest.json left out."""

    format: int
    enginesmith: str
    created: str
    verdict: dict[str, Any]
    source: dict[str, Any]
    signature: dict[str, Any]
    data: dict[str, Any]
    seed: int
    capture: CaptureRecord
    stages: list[Stage]
    calibration: list[CalibrationRecord]
    passes: list[PassRecord]
    engines: list[EngineRecord]
    benchmark: Benchmark | None
    environment: dict[str, Any]
    files: dict[str, str]
