from __future__ import annotations

import pytest

from enginesmith.compiler.diagnosis.found import compared, step_of

FP32 = "onnxruntime-cpu-fp32"


def step(rung, what, ratio=None, *, target="onnxruntime-cpu", status="kept", reason="", against=FP32, p50_ms=1.0):
    speed = {"against": against, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1} if ratio else None
    return {
        "target": target, "step": rung, "what": what, "candidate": "", "status": status, "reason": reason,
        "ratio": speed, "p50_ms": p50_ms if ratio else None,
    }  # fmt: skip


def ladder(*steps):
    return {"steps": list(steps)}


def estimate(text, saves_ms):
    return {"action": text, "node": "", "nodes": [], "saves_ms": saves_ms, "why": "", "found": "", "found_ms": None}


STEPS = ladder(
    step("captured graph", "onnxruntime-cpu", status="start"),
    step("quantization", "int8 quantize-static:scheme=onnxruntime", 3.0),
    step("quantization", "int8-dynamic quantize-dynamic", 0.5, status="reverted", p50_ms=2.0),
    step("precision", "bf16", 1.5, target="openvino", against="openvino-fp32"),
    step(
        "alignment", "align:multiple=16", status="skipped", reason="it changes nothing: every dimension is a multiple"
    ),
    step("pruning", "prune:macs=0.75", status="reverted", reason="not close enough: top1"),
    step("fuse-embeddings", "fuse-embeddings", 1.3),
    step("threads within an operator", "threads=2", 1.1, against="onnxruntime-cpu-int8"),
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("--precision int8", "int8 quantize-static:scheme=onnxruntime"),
        ("--precision int8-dynamic", "int8-dynamic quantize-dynamic"),
        ("--target openvino --precision bf16", "bf16"),
        ("--align 16", "align:multiple=16"),
        ("--prune macs=0.75", "prune:macs=0.75"),
        ("--target onnxruntime-cpu:threads=2", "threads=2"),
        ("--target onnxruntime-cpu:threads=4", "threads=2"),
        ("--target onnxruntime-cpu:arena=false", None),
        ("--precision bf16", None),
        ("--sparsify 2:4", None),
        ("--pass fuse-embeddings", "fuse-embeddings"),
        ("--pass fuse-transformer:scheme=onnxruntime-cpu", None),
        ("larger batches: batch=64", None),
        ("keep inputs and outputs on the GPU (DLPack tensors)", None),
    ],
)
def test_the_step_that_did_what_an_action_says(text, what):
    found = step_of(text, STEPS, "onnxruntime-cpu")
    assert (found and found["what"]) == what


def test_found_is_what_was_measured_and_the_summary_counts_what_can_be_compared():
    estimates = [
        estimate("--precision int8", 1.5), estimate("--precision int8-dynamic", 0.5), estimate("--align 16", 0.1),
        estimate("--target onnxruntime-cpu:threads=2", 0.2), estimate("larger batches: batch=64", 0.3),
    ]  # fmt: skip
    told, summary = compared(estimates, STEPS, "onnxruntime-cpu", FP32)
    assert [action["found_ms"] for action in told] == [pytest.approx(2.0), -1.0, None, pytest.approx(0.1), None]
    assert told[0]["found"] == f"kept: saved 2 ms (3.00 times as fast as {FP32}, 2.90 to 3.10)"
    assert told[1]["found"].startswith("reverted: cost 1 ms")
    assert told[2]["found"] == "skipped: it changes nothing: every dimension is a multiple"
    assert told[4]["found"] == ""
    assert summary == (
        "the ladder checked 2 estimates against this engine: 1 of them saved time; estimated 2 ms in all, measured 1 ms"
    )


def test_without_a_comparison_there_is_no_summary():
    assert compared([estimate("--precision int8", 1.0)], STEPS, "onnxruntime-cpu", "another")[1] == ""
    assert compared([], ladder(), "onnxruntime-cpu", FP32) == ([], "")
