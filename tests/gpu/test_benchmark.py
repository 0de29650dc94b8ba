import numpy as np
import pytest
import torch

from enginesmith.compiler.benchmark import Settings, SizedInputs, benchmark
from enginesmith.compiler.benchmark.baselines import torch_baselines
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.compiler.sources import Model

pytestmark = pytest.mark.gpu


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)

    def forward(self, x):
        return (self.layer(x).relu(),)


class Reference:
    def run(self, inputs):
        raise AssertionError("a baseline runs the module")

    def reset(self):
        pass


SIGNATURE = Signature((TensorSpec("x", "float32", (64, 256)),), (TensorSpec("y", "float32", (64, 256)),))
INPUTS = {"x": np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)}


@pytest.fixture(scope="module")
def candidates():
    model = Model("module", Reference(), SIGNATURE, Net().eval(), None, "fingerprint", 0)
    return torch_baselines(model, device="cuda", precisions=("fp32", "fp16"), compiled=True), model


def test_baselines_on_the_gpu_agree_with_the_cpu(candidates):
    baselines, model = candidates
    with torch.inference_mode():
        (expected,) = model.module(torch.from_numpy(INPUTS["x"]))
    for candidate in baselines:
        bound = candidate.runner().bind(INPUTS)
        bound.timed(4)  # CUDA graphs are recorded at the second call and replayed from the third
        tolerance = 2e-2 if "fp16" in candidate.name else 1e-2
        np.testing.assert_allclose(bound.outputs()["y"], expected.numpy(), atol=tolerance, err_msg=candidate.name)


def test_device_times_utilisation_memory_and_clock_are_recorded(candidates):
    baselines, _ = candidates
    settings = Settings(rounds=6, slice_s=0.05, warmup_s=0.2)
    result = benchmark(baselines[:1], [SizedInputs({}, 64, INPUTS)], baseline="torch", protocol=settings)
    (timing,) = result["timings"]
    assert not result["skipped"]
    assert 0 < timing["device_p50_ms"] <= timing["p50_ms"]
    assert 0 < timing["gpu_utilization_percent"] <= 100
    assert timing["gpu_memory_bytes"] is None or timing["gpu_memory_bytes"] > 0
    assert timing["sm_clock_mhz"] > 100
