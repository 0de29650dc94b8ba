"""What a compile may find out, as the records of a manifest: ladders short and long, a batch curve, a roofline."""

from __future__ import annotations

import copy
from typing import Any

from enginesmith.compiler.manifest import (
    BatchCurve,
    BatchPoint,
    Ladder,
    LadderStep,
    Manifest,
    Roofline,
    RooflineNode,
    ServiceRecord,
    SpeedUp,
)

CPU = "onnxruntime-cpu"


def step(name: str, what: str, candidate: str, status: Any, ratio: float | None = None, **values: Any) -> LadderStep:
    """A step that was raced, where it has a ratio: within 3 % either way, unless `low` and `high` are given."""
    target, gain = values.pop("target", CPU), None
    low, high = values.pop("low", (ratio or 0) * 0.97), values.pop("high", (ratio or 0) * 1.03)
    if ratio is not None:
        gain = SpeedUp(against=values.pop("against", ""), ratio=ratio, low=low, high=high)
    found: Any = {"target": target, "step": name, "what": what, "candidate": candidate, "status": status}
    found |= {"reason": "", "ratio": gain, "p50_ms": None, "samples_per_s": None, "size_bytes": 0, "relative_l2": None}
    return {**found, "budget": None, "seconds": 4.2, "resumed": False, **values}


def steps() -> list[LadderStep]:
    """A climb on the CPU: four of eight steps are kept, and the whole is 1.04 * 1.9 * 1.3 * 1.1 times as fast."""
    holds = {"text": "top1=0.99", "value": 0.9972, "holds": True, "problem": ""}
    broken = {"text": "top1=0.99", "value": 0.91, "holds": False, "problem": ""}
    slow = "1.01 times the speed of onnxruntime-cpu-int8, 95 % interval 0.98 to 1.04, which has to lie above 1.02"
    return [
        step("captured graph", CPU, f"{CPU}-captured", "start", p50_ms=0.39, relative_l2=2.3e-7, size_bytes=820_000),
        step("simplify", "simplify dedupe", f"{CPU}-fp32", "kept", 1.04, low=0.99, high=1.08, p50_ms=0.375,
             against=f"{CPU}-captured", relative_l2=2.3e-7, size_bytes=819_204,
             reason="1.04 times the speed; it stays, as all later steps build on it"),
        step("precision", "bf16", f"{CPU}-bf16", "failed", reason="onnxruntime has no Conv in bf16"),
        step("quantization", "int8 quantize-static", f"{CPU}-int8", "kept", 1.9, p50_ms=0.197, against=f"{CPU}-fp32",
             relative_l2=0.0129, budget=holds, size_bytes=230_000),
        step("quantization", "int8-dynamic", f"{CPU}-int8-dynamic", "reverted", 0.8, p50_ms=0.469,
             against=f"{CPU}-fp32", relative_l2=0.009, budget=holds, reason="0.80 times the speed", size_bytes=240_000),
        step("pruning", "prune:macs=0.75", f"{CPU}-int8-pruned", "reverted", relative_l2=0.21, budget=broken,
             reason="not close enough: the budget top1=0.99 is exceeded: measured 0.91"),
        step("sparsity", "2:4", "", "skipped", reason="it needs calibration data", seconds=0.0),
        step("threads", "threads=1", f"{CPU}-int8-tuned", "kept", 1.3, p50_ms=0.152, against=f"{CPU}-int8",
             relative_l2=0.0129, budget=holds, size_bytes=230_000, resumed=True),
        step("threads", "threads=2", f"{CPU}-int8-tuned-2", "reverted", 1.01, p50_ms=0.195, against=f"{CPU}-int8",
             relative_l2=0.0129, budget=holds, size_bytes=230_000, reason=slow),
        step("execution", "execution=parallel", f"{CPU}-int8-tuned-2", "kept", 1.1, p50_ms=0.138,
             against=f"{CPU}-int8-tuned", relative_l2=0.0129, budget=holds, size_bytes=230_000),
    ]  # fmt: skip


def ladder(*own: LadderStep, picks: dict[str, str] | None = None, **values: Any) -> Ladder:
    """The climb on the CPU and one that cannot be timed, or these steps."""
    rtx: Any = {"target": "tensorrt-rtx"}
    untimed = "engines of this target cannot be timed on this machine; what you ask for by its own option is kept"
    other = [
        step("captured graph", "tensorrt-rtx", "tensorrt-rtx-fp32", "start", reason="no NVIDIA GPU here", **rtx),
        step("precision", "fp16, bf16", "", "skipped", reason=untimed, seconds=0.0, **rtx),
        step("alignment", "align:multiple=8", "tensorrt-rtx-fp32-aligned", "not measured", **rtx, size_bytes=910_000,
             reason="it cannot be timed on this machine, and was asked for"),
    ]  # fmt: skip
    found: Any = {"objective": "latency", "effort": "default", "time_limit_s": 1200.0, "seconds": 182.4}
    found |= {"complete": True, "steps": list(own) or [*steps(), *other]}
    found["picks"] = picks or {CPU: f"{CPU}-int8-tuned", "tensorrt-rtx": "tensorrt-rtx-fp32-aligned"}
    return {**found, **values}


def long_ladder(count: int = 40) -> Ladder:
    """Many steps with long texts, of which every seventh is kept."""
    found = [step("captured graph", CPU, f"{CPU}-captured", "start", p50_ms=40.0, relative_l2=1e-7)]
    incumbent, p50_ms = f"{CPU}-captured", 40.0
    for index in range(count):
        kept, name = index % 7 == 2, f"{CPU}-trial-{index}"
        ratio = 1.25 if kept else (0.12, 0.97, 1.003, 0.7)[index % 4]
        error = 10 ** -(1 + index % 13 / 2)
        what = f"option_{index}=value with conv_algo_search=EXHAUSTIVE,arena=kSameAsRequested"
        own = step(f"question {index}", what, name, "kept" if kept else "reverted", ratio, against=incumbent,
                   p50_ms=p50_ms / ratio, relative_l2=error, size_bytes=1_000_000)  # fmt: skip
        found.append(own)
        incumbent, p50_ms = (name, p50_ms / ratio) if kept else (incumbent, p50_ms)
    return ladder(*found, picks={CPU: incumbent})


def point(batch: int, samples_per_s: float | None, p99_ms: float | None, reason: str = "") -> BatchPoint:
    """One batch size; without a rate it did not fit."""
    p50_ms = None if samples_per_s is None else 1000 * batch / samples_per_s
    return {
        "batch": batch,
        "fits": samples_per_s is not None,
        "reason": reason,
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "samples_per_s": samples_per_s,
        "calls": 0 if samples_per_s is None else 400,
        "memory_bytes": None if samples_per_s is None else 600_000_000 + 24_000_000 * batch,
        "gpu_utilization_percent": None,
    }


def batch_curve() -> BatchCurve:
    """A curve that saturates at 16, has its best within 5 ms at 8, and ends at 96."""
    rates = {1: 1180, 2: 1990, 4: 2810, 8: 3320, 16: 3610, 32: 3690, 64: 3705, 96: 3712}
    points = [point(batch, rate, 1400 * batch / rate) for batch, rate in rates.items()]
    points.append(point(128, None, None, "out of memory: 4.1 GB were asked for, 3.6 GB were free"))
    return {
        "engine": f"{CPU}-int8-tuned",
        "axis": "batch",
        "sizes": {},
        "device": "cpu",
        "points": points,
        "largest": 96,
        "largest_is_limit": False,
        "saturation": 16,
        "best": 8,
        "p99_limit_ms": 5.0,
        "protocol": "each size ran for 0.5 s after a warm-up",
    }


def roofline() -> Roofline:
    """Nodes of every bound; one computes nothing."""
    rows = [
        ("/layer1/0/conv1/Conv", "Conv", 2.3e8, 1.1e6, 1.9, "compute"),
        ("/layer1/1/conv1/Conv", "Conv", 2.3e8, 1.1e6, 1.8, "compute"),
        ("/layer2/0/conv2/Conv", "Conv", 2.1e8, 1.6e6, 1.7, "compute"),
        ("/fc/Gemm", "Gemm", 4.1e6, 8.2e6, 0.82, "bandwidth"),
        ("/layer1/Add", "Add", 2.0e5, 2.4e6, 0.2, "bandwidth"),
        ("/layer1/Add_1", "Add", 2.0e5, 2.4e6, 0.21, "bandwidth"),
        ("/head/Softmax", "Softmax", 5.0e3, 8.0e3, 0.011, "launch"),
        ("/head/TopK", "TopK", 2.0e4, 1.6e4, 0.6, "cpu-placed"),
        ("Memcpy_token_3", "MemcpyToHost", 0.0, 8.0e5, 0.4, "transfer"),
    ]
    total = sum(row[4] for row in rows)
    nodes = [
        RooflineNode(name=name, operator=operator, flops=flops, bytes=moved, ms=ms, share=ms / total, bound=bound)  # type: ignore[typeddict-item]
        for name, operator, flops, moved, ms, bound in rows
    ]
    return {
        "engine": f"{CPU}-int8-tuned",
        "device": "Intel Xeon Platinum 8481C, 2 threads",
        "precision": "int8",
        "peak_gflops": 190.0,
        "bandwidth_gb_s": 13.4,
        "launch_us": 4.2,
        "total_ms": total,
        "nodes": nodes,
        "actions": [
            {
                "action": "--align 8",
                "node": "/fc/Gemm",
                "saves_ms": 0.31,
                "why": "1,001 columns are no multiple of 8",
                "found": "kept: 1.06 times the speed",
            },
            {
                "action": "--precision fp16",
                "node": "/layer1/Add",
                "saves_ms": 0.2,
                "why": "it moves half of the bytes",
                "found": "",
            },
        ],
    }


def loop(clients: int | None, offered: float | None, achieved: float, p50: float, **values: Any) -> dict[str, Any]:
    """One loop of a load test."""
    what = f"{clients} clients" if clients else f"{offered:,.0f} requests/s"
    percentiles = [{"percent": percent, "ms": times * p50, "low": times * p50 * 0.9, "high": None}
                   for percent, times in ((50.0, 1.0), (90.0, 1.5), (99.0, 2.0), (99.9, 3.0))]  # fmt: skip
    server = {"merged": 2.5, "queue_ms": 0.3, "compute_ms": 0.7}
    found = {"what": what, "clients": clients, "offered": offered, "achieved": achieved, "percentiles": percentiles}
    return {**found, "keeps_up": True, "errors": {}, "doubt": "", "server": server, **values}


def service() -> ServiceRecord:
    """Single requests to the engine that was picked, which by itself takes 0.129 ms."""
    return ServiceRecord(
        created="2026-11-27T20:00:00+00:00",
        served=f"{CPU}-int8-tuned",
        urls=["127.0.0.1:8001"],
        model="digits",
        payload={"what": "recorded samples", "requests": 64, "rows": 1, "checked": True},
        closed=[loop(1, None, 1250, 0.78), loop(64, None, 9400, 6.6, errors={"UNAVAILABLE": 3}, doubt="it is behind")],
        open=[loop(None, rate, rate, p50) for rate, p50 in ((1000, 0.8), (5000, 1.4), (9000, 5.5))],
        knee=5000,
        within_p99=None,
        limits={"p99_ms": None, "min_throughput": None},
        engine={"name": f"{CPU}-int8-tuned", "batch": 1, "p50_ms": 0.129, "p99_ms": 0.2, "samples_per_s": 7700.0},
        overhead_ms=0.651,
        problems=[],
    )


def searched(manifest: Manifest) -> Manifest:
    """The manifest with all of it, and with the engines that the ladder picked."""
    plain, pick, benchmark = manifest["engines"][0], f"{CPU}-int8-tuned", manifest["benchmark"]
    validation: Any = copy.deepcopy(plain["validation"])
    validation["outputs"][0]["relative_l2"] = 0.0129
    validation |= {"engine": pick, "budget": {"text": "top1=0.99", "value": 0.9972, "holds": True, "problem": ""}}
    engine: Any = {**plain, "name": pick, "precision": "int8", "validation": validation}
    manifest["engines"].insert(1, engine)
    for timing in [t for t in (benchmark["timings"] if benchmark else ()) if t["candidate"] == plain["name"]]:
        quick: Any = {
            **timing,
            "candidate": pick,
            "p50_ms": timing["p50_ms"] / 2.72,
            "mean_ms": timing["mean_ms"] / 2.72,
        }
        quick["speed_up"] = SpeedUp(against="torch-eager", ratio=9.27, low=9.01, high=9.4)
        assert benchmark
        benchmark["timings"].append(quick)
    manifest["verdict"]["best"] = pick
    return {**manifest, "ladder": ladder(), "batches": [batch_curve()], "roofline": roofline(), "services": [service()]}
