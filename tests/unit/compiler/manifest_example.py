"""A manifest as a compile of the digits sample writes it: engines of every status, two passes, three batch sizes."""

from __future__ import annotations

from typing import Any

from enginesmith.compiler.manifest import (
    EngineRecord,
    Manifest,
    OutputMetrics,
    PassRecord,
    SpeedUp,
    Timing,
    Validation,
)

BASELINE = "torch-eager"


def example() -> Manifest:
    """A fresh copy, for a test to change."""
    return {
        "format": 1,
        "enginesmith": "0.1.0",
        "created": "2026-11-22T23:04:11+00:00",
        "verdict": {"passed": True, "state": "passed", "best": "onnxruntime-cpu-fp32", "reasons": [], "notes": []},
        "source": {
            "kind": "module",
            "model": "samples/digits/model.py:build",
            "weights": "samples/digits/digits.safetensors",
            "parameter_bytes": 814_120,
            "fingerprint": "6e0f5ad4bc7a0fb0a44d7b6f8c14b28a0f7a2b86d8d0a0c2c66e2a5e8f1d9b37",
        },
        "signature": {
            "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}],
            "outputs": [
                {"name": "logits", "dtype": "float32", "shape": ["batch", 10]},
                {"name": "embedding", "dtype": "float32", "shape": ["batch", 64]},
            ],
            "axes": {"batch": {"min": 1, "opt": 8, "max": 64}},
            "structure": {"dict": {"logits": "logits", "embedding": "embedding"}},
        },
        "data": {"description": "samples/digits/data.npz", "random": False, "digest": "9a41c07be2d4"},
        "seed": 0,
        "capture": {
            "exporter": "TorchScript exporter",
            "opset": 17,
            "attempts": [
                {
                    "exporter": "dynamo exporter",
                    "succeeded": False,
                    "seconds": 4.312,
                    "reason": "torch.export failed in DigitsNet.forward (samples/digits/model.py:31)\n"
                    "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 1) "
                    "(unhinted: Eq(u0, 1)).\n  caused by: if mask.sum() == 1:\n"
                    "  hint: use torch._check or torch.cond where the branch depends on values",
                },
                {"exporter": "TorchScript exporter", "succeeded": True, "seconds": 0.871, "reason": ""},
            ],
            "checks": [
                {"sizes": {"batch": 1}, "relative_l2": 2.1e-7},
                {"sizes": {"batch": 3}, "relative_l2": 2.4e-7},
            ],
        },
        "stages": [
            {"name": "load", "seconds": 1.42, "detail": "203,530 parameters"},
            {"name": "capture", "seconds": 5.31, "detail": "TorchScript exporter, opset 17"},
            {"name": "passes", "seconds": 0.94, "detail": "2 passes on 2 variants"},
            {"name": "build", "seconds": 6.87, "detail": "4 engines, 1 from the cache"},
            {"name": "validate", "seconds": 2.05, "detail": "360 samples"},
            {"name": "benchmark", "seconds": 11.6, "detail": "4 candidates at 3 sizes"},
            {"name": "bundle", "seconds": 0.031, "detail": "14 files, 5.1 MB"},
        ],
        "calibration": [
            {
                "data": "images.npz",
                "random": False,
                "samples": 256,
                "tensors": 9,
                "digest": "5e" * 32,
                "file": "calibration-5e5e5e5e5e5e.npz",
                "findings": [
                    {"tensor": "relu_3", "kind": "dead-channels", "text": "has 2 dead channels of 32", "severe": False},
                    {"tensor": "image", "kind": "one-sample", "text": "has one sample to calibrate on", "severe": True},
                ],
            }
        ],
        "passes": [
            _pass("fp32", "simplify", {"nodes removed": 14, "constants folded": 6}, [], 41, 27),
            _pass("fp32", "dedupe", {"initializers merged": 2}, _refusals(2), 27, 27),
            _pass("fp16", "simplify", {"nodes removed": 14, "constants folded": 6}, [], 41, 27),
            _pass("fp16", "dedupe", {}, [], 27, 27),
            _pass("fp16", "cast:to=fp16,keep_io=true", {"nodes in fp16": 24, "casts added": 4}, _refusals(9), 27, 31),
            _pass("mixed", "precision:to=int8", {"Conv": 5}, _refusals(1), 27, 58, _details()[0]),
            _pass("int8", "quantize-static", {"Conv": 5}, _refusals(1), 27, 58, _details()[1]),
        ],
        "engines": [
            _engine(
                "onnxruntime-cpu-fp32",
                details={
                    "nodes": 19,
                    "operators": {"FusedConv": 6, "ReorderInput": 1, "MaxPool": 2, "FusedGemm": 1, "Gemm": 2},
                    "casts": 0,
                    "memcpy": 0,
                    "placement": {"CPUExecutionProvider": 19},
                    "on_cpu": {},
                },
                validation=_validation("onnxruntime-cpu-fp32", 2.3e-7),
            ),
            _engine(
                "onnxruntime-cpu-fp16",
                details={
                    "placement": {"CPUExecutionProvider": 42},
                    "casts": 23,
                    "cpu_nodes": [f"/features/{index}/Conv" for index in range(7)],
                },
                validation=_validation("onnxruntime-cpu-fp16", 6.1e-4, wrong=True),
            ),
            _engine("torchscript-fp32", cached=True, validation=_validation("torchscript-fp32", 1.9e-7)),
            _engine(
                "tensorrt-rtx-fp16",
                status="built",
                reason="no NVIDIA GPU here; the engine targets compute capabilities 8.6, 8.9 and 12.0",
                to_do="run `enginesmith validate BUNDLE` on a machine with such a GPU",
                details={
                    "flags": ["STRONGLY_TYPED"],
                    "profiles": 1,
                    "builder_s": 3.42,
                    "graph_layers": 31,
                    "layers": {
                        "source": "graph before fusion, as no GPU here can open the engine",
                        "count": 31,
                        "types": {f"{kind}Layer": 1 for kind in "ABCDEFGHIJKLMN"},
                        "precisions": {"FP16": 27, "FP32": 4},
                    },
                    "reproduce": "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert model.onnx --convert-to trt "
                    "-o model.plan --trt-min-shapes image:[1,1,8,8] --trt-opt-shapes image:[8,1,8,8]",
                },
            ),
            _engine(
                "tensorrt-fp16",
                status="failed",
                reason="the TensorRT worker ended by signal 11 (SIGSEGV) after 38 s, in phase "
                "'Building engine: timing runners'.\nLast lines of its log:\n"
                "[V] Timing Runner: /features/3/Conv (CaskConvolution)\n"
                "[V] Tactic: 0x9bd98fe2e1c4a5d1 Time: 0.00812\n[E] Error Code 1: Cask (internal)",
                to_do="see engines/tensorrt-fp16/build.log, or build with a smaller --workspace",
            ),
            _engine(
                "onnxruntime-cuda-fp16",
                status="unavailable",
                reason="onnxruntime 1.32 here has no CUDAExecutionProvider",
                to_do="pip uninstall onnxruntime, then pip install 'enginesmith[cuda]'",
            ),
        ],
        "benchmark": {
            "protocol": {
                "rounds": 20,
                "slice_s": 0.05,
                "warmup_s": 0.5,
                "order": "random in each round",
                "transfers": False,
                "seed": 0,
                "threads": 2,
                "description": "Every candidate runs for one time slice in each round, in random order, after a "
                "warm-up that lasts until the median is steady. Intervals are bootstrapped over rounds.",
            },
            "baseline": BASELINE,
            "timings": [
                timing for batch, scale in ((1, 1.0), (8, 3.1), (64, 19.4)) for timing in _timings(batch, scale)
            ],
            "skipped": {"tensorrt-rtx-fp16": "no NVIDIA GPU here", "torch-compile": "no C++ compiler was found"},
        },
        "environment": {
            "os": "Linux-6.1.0-x86_64-with-glibc2.36",
            "python": "3.11.2",
            "packages": {"torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "onnx": "1.23.0", "tensorrt_rtx": "1.7.1"},
            "cpu": {
                "model": "Intel(R) Xeon(R) Platinum 8481C",
                "cores": 2,
                "flags": ["avx2", "avx512_vnni", "amx_int8"],
            },
            "memory_bytes": 16_700_000_000,
            "gpus": [{"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_bytes": 85_520_809_984}],
        },
        "files": {"recipe.yaml": "5c1e", "engines/onnxruntime-cpu-fp32/model.onnx": "77a0"},
    }


def _refusals(count: int) -> list[dict[str, str]]:
    whole = {"reason": "the graph has no functions", "node": ""}
    return [whole, *({"reason": "values pass 65,504 on the data", "node": f"/head/Exp_{i}"} for i in range(count - 1))]


def _pass(
    variant: str,
    text: str,
    changes: dict[str, int],
    refusals: list[dict[str, str]],
    before: int,
    after: int,
    details: dict[str, Any] | None = None,
) -> PassRecord:
    return {
        "variant": variant,
        "engines": [f"onnxruntime-cpu-{variant}"],
        "text": text,
        "seconds": 0.118,
        "modified": bool(changes),
        "changes": changes,
        "refusals": refusals,
        "details": details or {},
        "nodes_before": before,
        "nodes_after": after,
    }


def _engine(
    name: str,
    *,
    status: Any = "ready",
    reason: str = "",
    to_do: str = "",
    cached: bool = False,
    details: dict[str, Any] | None = None,
    validation: Validation | None = None,
) -> EngineRecord:
    target, _, precision = name.rpartition("-")
    return {
        "name": name,
        "target": target,
        "precision": precision,
        "status": status,
        "reason": reason,
        "to_do": to_do,
        "build_s": 1.27 if status in ("ready", "built") else None,
        "size_bytes": 819_204 if status in ("ready", "built") else 0,
        "cached": cached,
        "details": details or {},
        "validation": validation,
        "sibling": None,
        "dropped": "",
    }


def _metrics(output: str, relative_l2: float, failures: list[str]) -> OutputMetrics:
    return {
        "output": output,
        "relative_l2": relative_l2,
        "max_abs": relative_l2 * 1.7,
        "cosine": 1 - relative_l2**2 / 2,
        "snr_db": 132.8,
        "nan": 0,
        "inf": 0,
        "top1": 1.0 if output == "logits" else None,
        "top5": 1.0 if output == "logits" else None,
        "passed": not failures,
        "failures": failures,
    }


def _validation(engine: str, relative_l2: float, *, wrong: bool = False) -> Validation:
    failures = ["relative L2 is 6.1e-4, allowed is 1e-4; worst at sample 217"] if wrong else []
    return {
        "engine": engine,
        "passed": not wrong,
        "samples": 360,
        "tolerance": {"relative_l2": 1e-4, "max_abs": 1e-3, "cosine": 0.99999, "top1": 1.0},
        "outputs": [_metrics("logits", relative_l2, failures), _metrics("embedding", relative_l2 / 2, [])],
        "noise_floor": [_metrics("logits", 1.8e-7, []), _metrics("embedding", 1.1e-7, [])],
        "noise_floor_of": "onnxruntime-cpu-fp32",
        "metric": {
            "name": "accuracy",
            "value": 0.9861,
            "low": 0.9722,
            "high": 0.9972,
            "reference": 0.9861,
            "samples": 360,
        },
        "budget": {"text": "metric=0.003", "value": 0.0, "holds": True, "problem": ""},
    }


def _details() -> tuple[dict[str, Any], dict[str, Any]]:
    def point(nodes: int, cost: float, error: float | None, holds: bool) -> dict[str, Any]:
        return {"kept": nodes, "nodes": nodes, "cost": cost, "error": error, "value": error, "holds": holds}

    limit = {"low": 0.0, "high": 5.1, "scale": 0.02, "minimum": 0.0, "maximum": 6.2, "method": "mse", "group": 1}
    choice = {
        "precision": "int8",
        "budget": "relative_l2=0.02",
        "samples": 4,
        "runs": 31,
        "sensitivity": [
            {
                "unit": f"/features/{unit}/Conv",
                "nodes": [f"/features/{unit}/Conv"],
                "error": 0.02 / 2**unit,
                "cost": 0.2,
            }
            for unit in range(5)
        ],
        "curve": [
            point(0, 0.0, 0.031, False),
            point(1, 0.04, 0.018, True),
            point(2, 0.3, 0.011, True),
            point(4, 0.9, None, False),
            point(5, 1.0, 0.0, True),
        ],
        "chosen": {**point(1, 0.04, 0.018, True), "names": ["/features/0/Conv"]},
    }
    ranges = {
        "trials": [
            {"options": "method=auto,bias_correction=true", "snr_db": 30.1, "kept": True},
            {"options": "method=minmax,bias_correction=true", "snr_db": None, "kept": False},
        ],
        "method": "mse",
        "limits": [{"name": "relu_1", "clipped": 0.002, **limit}, {"name": "<b>relu_2", "clipped": 0.0, **limit}],
        "findings": [{"tensor": "relu_1", "kind": "saturated", "text": "is clipped to 0 .. 5.1", "severe": False}],
    }
    return choice, ranges


def _timings(batch: int, scale: float) -> list[Timing]:
    return [
        _timing(BASELINE, batch, 0.412 * scale, None),
        _timing("onnxruntime-cpu-fp32", batch, 0.121 * scale, 3.41),
        _timing("onnxruntime-cpu-fp16", batch, 0.483 * scale, 0.853),
        _timing("torchscript-fp32", batch, 0.404 * scale, 1.02),
    ]


def _timing(candidate: str, batch: int, p50_ms: float, ratio: float | None) -> Timing:
    speed_up: SpeedUp | None = None
    if ratio is not None:
        speed_up = {"against": BASELINE, "ratio": ratio, "low": ratio * 0.965, "high": ratio * 1.041}
    return {
        "candidate": candidate,
        "sizes": {"batch": batch},
        "batch": batch,
        "iterations": 2400,
        "mean_ms": p50_ms * 1.03,
        "p50_ms": p50_ms,
        "p90_ms": p50_ms * 1.12,
        "p99_ms": p50_ms * 1.41,
        "samples_per_s": 1000 * batch / p50_ms,
        "requests_per_s": 1000 / p50_ms,
        "device_mean_ms": None,
        "device_p50_ms": None,
        "device_p99_ms": None,
        "speed_up": speed_up,
        "against_sibling": None,
        "gpu_utilization_percent": None,
        "gpu_memory_bytes": None,
        "sm_clock_mhz": None,
        "steady": True,
    }
