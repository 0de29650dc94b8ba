"""Diagnosis on a GPU: ceilings, ONNX Runtime's and TensorRT's layers, torch, and nodes that stay on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import torch

import enginesmith as es
from enginesmith.compiler.diagnosis import stopwatch
from enginesmith.compiler.diagnosis.diagnose import diagnose
from enginesmith.compiler.diagnosis.use import fragmentation
from enginesmith.targets import parse_target

pytestmark = pytest.mark.gpu


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(64, 64, 3, padding=1),
            torch.nn.ReLU(),
        )
        self.head = torch.nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image).mean((2, 3)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))


def compiled(folder: Path, *targets: str) -> Path:
    torch.manual_seed(0)
    found = [text for text in targets if parse_target(text).availability().run]
    if not found:
        pytest.skip(f"none of {', '.join(targets)} runs here")
    np.savez(folder / "data.npz", image=np.random.default_rng(0).standard_normal((32, 3, 56, 56)).astype(np.float32))
    es.compile(
        Net(), folder / "out", inputs=["image:1x3x56x56"], dynamic=["image:0=1..16..32"], targets=found,
        data=str(folder / "data.npz"), precisions=["fp32", "fp16"], benchmark=False,
    )  # fmt: skip
    return folder / "out"


def test_ceilings_of_the_gpu():
    found = stopwatch.measure("cuda")
    assert found.gflops["fp16"] > 2 * found.gflops["fp32"] > 1000
    assert found.memory_gb_s > 100
    assert 0.1 < found.graph_launch_us < found.launch_us < 100
    assert found.transfer_gb_s > 1


def check(roofline) -> None:
    assert roofline["device"].endswith("(cuda)")
    assert roofline["unmapped_ms"] < 0.4 * roofline["total_ms"]
    products = [node for node in roofline["nodes"] if node["flops"] > 1e7]
    assert products
    for node in products:
        assert node["flops"] / node["ms"] / 1e6 < 1.3 * max(roofline["peaks"].values())
        assert node["bound"] in ("compute", "bandwidth", "launch")


@pytest.mark.parametrize("target", ["onnxruntime-cuda", "tensorrt"])
def test_layers_of_engines(tmp_path, target):
    out = compiled(tmp_path, target)
    found = diagnose(str(out), [f"{target}-fp32", f"{target}-fp16"])
    assert found.missing.keys() <= {f"graph of {target}-fp32", f"graph of {target}-fp16"}
    for roofline, use in found.engines:
        if not [what for what in found.missing if roofline["engine"] in what]:
            check(roofline)
        assert use.gpu is None or 0 <= use.gpu <= 1
        assert use.gpu_memory_bytes
    wide, half = (roofline for roofline, _ in found.engines)
    if target == "onnxruntime-cuda":
        assert (wide["precision"], half["precision"]) == ("fp32", "fp16")
        assert "--precision fp16" in {action["action"] for action in wide["actions"]}


def test_torch_on_the_gpu(tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))\n"
    )
    found = diagnose(f"{tmp_path}/model.py:net", inputs=["x:8x3x64x64"], reference_device="cuda")
    assert found.eager is not None
    assert found.eager.device == "cuda"
    assert found.eager.operators[0].name == "aten::conv2d"
    assert fragmentation()["reserved_bytes"] > 0


def test_a_node_on_the_cpu_of_a_gpu_engine(tmp_path):
    if not parse_target("onnxruntime-cuda").availability().run:
        pytest.skip("onnxruntime-cuda does not run here")
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[256,256] x) => (float[256,256] y, int64[256,256] n) <float[256,256] w> {
            [mm] a = MatMul(x, w)  [det] d = Unique<sorted = 1>(a)  [shape] s = Size(d)  [cast] f = Cast<to = 1>(s)
            [add] y = Add(a, f)  [int] n = Cast<to = 7>(y) }"""
    proto = onnx.parser.parse_model(text)
    weight = onnx.numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    del proto.graph.value_info[:]
    proto.graph.initializer.append(weight)
    onnx.save(proto, tmp_path / "net.onnx")
    found = diagnose(str(tmp_path / "net.onnx"), targets=["onnxruntime-cuda"])
    ((roofline, _),) = found.engines
    assert {"cpu-placed", "transfer"} & set(roofline["bounds"])
    assert [a for a in roofline["actions"] if a["action"].startswith("move nodes to the GPU")]
