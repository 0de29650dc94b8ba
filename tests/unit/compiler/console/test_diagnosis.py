from __future__ import annotations

import pytest

from enginesmith.compiler.console import diagnosis as module
from enginesmith.compiler.console.diagnosis import show_diagnosed
from enginesmith.compiler.diagnosis.diagnosed import Diagnosed
from enginesmith.compiler.diagnosis.eager import Eager, Row
from enginesmith.compiler.diagnosis.reading import Reading
from enginesmith.compiler.diagnosis.use import Use


def node(name, ms, bound, **more):
    plain = {"operator": "Conv", "covers": [name], "precision": "fp16", "flops": 2e9, "bytes": 1e6, "limit_ms": ms / 2}
    return {"name": name, "ms": ms, "share": ms / 10, "bound": bound, **plain, **more}


NODES = [
    node("conv[1]", 4.0, "compute", covers=["conv", "relu"]), node("copy", 2.0, "transfer", limit_ms=None, covers=[]),
    node("mask", 1.0, "cpu-placed", flops=0.0), node("last", 0.0, "launch", bytes=0.0),
]  # fmt: skip

ACTION = {
    "action": "--precision int8", "node": "conv[1]", "nodes": ["conv[1]"], "saves_ms": 2.0, "why": "because",
    "found": "kept: saved 1.5 ms (1.18 times as fast)", "found_ms": 1.5,
}  # fmt: skip

ROOFLINE = {
    "engine": "onnxruntime-cuda-fp16", "device": "a GPU (cuda)", "precision": "fp16", "sizes": {"batch": 4},
    "peak_gflops": 700e3, "peaks": {"fp16": 700e3}, "bandwidth_gb_s": 3000.0, "launch_us": 4.0, "total_ms": 10.0,
    "outside_ms": 3.0, "unmapped_ms": 2.0, "bounds": {"compute": 4.0, "transfer": 2.0, "cpu-placed": 1.0},
    "nodes": NODES, "actions": [ACTION], "estimates": "the ladder checked 1 estimate", "how": "it",
    "notes": ["odd [x]"],
}  # fmt: skip

USE = Use(
    10.0, 10.5, 100, 0.25, 0.5, gpu=0.4, gpu_memory_bytes=2_000_000_000,
    fragmentation={"allocated_bytes": 1e9, "reserved_bytes": 2e9, "share": 0.25},
)  # fmt: skip


@pytest.fixture
def shown(capsys, monkeypatch):
    """What is printed of these findings, on a wide page."""
    console = module._console
    monkeypatch.setattr(module, "_console", lambda: (made := console(), setattr(made, "width", 220))[0])

    def show(top=15, **fields):
        show_diagnosed(Diagnosed("model", "model", **fields), top)
        return capsys.readouterr().out

    return show


def test_an_engine_on_a_gpu(shown):
    text = shown(engines=((ROOFLINE, USE),), reading=Reading("data.npz", 3, 30.0, 40.0), missing={"torch": "no module"})
    assert "onnxruntime-cuda-fp16 on a GPU (cuda): 10 ms a call at batch=4, by it" in text
    assert "time by bound: compute 40%, transfer 20%, cpu-placed 10%, outside of layers 30%" in text
    assert "20% of the time is in layers that no node was found for" in text
    assert "conv[1]" in text
    assert "conv relu" in text
    assert "25% of the processors in use, GPU 40% in use, 2.00 GB of its memory" in text
    assert "torch holds 2.00 GB for 1.00 GB of tensors, 25% split and idle" in text
    assert "other processes took 50%" in text
    assert "data.npz takes 30 ms a batch, 75% of reading and running it: input-bound" in text
    assert "the ladder on --precision int8: kept: saved 1.5 ms" in text
    assert "the ladder checked 1 estimate" in text
    assert "note: odd [x]" in text
    assert "torch: no module" in text


def test_tables_end_at_the_top_rows(shown):
    text = shown(1, engines=(({**ROOFLINE, "actions": []}, USE),))
    assert "and 3 more, 3 ms together" in text
    assert "mask" not in text
    assert "nothing that enginesmith knows would save 1 % of a call" in text


def test_a_model_in_torch(shown):
    rows = (Row("aten::conv2d", 3.0, 2, 6e9), Row("aten::relu", 1.0, 2, 0.0))
    eager = Eager("cpu", 12, Use(5.0, 5.0, 10, 0.9, 0.0), rows, (Row("net.conv", 4.0, 2, 6e9),))
    text = shown(engines=(), eager=eager)
    assert "torch eager on cpu: 5 ms a call" in text
    assert "aten::conv2d" in text
    assert "75%" in text
    assert "net.conv" in text
