"""Pipelines whose stages run on GPUs: values pass from GPU to GPU, and outputs are those of the whole engine."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pynvml
import pytest
import torch

import enginesmith
from enginesmith.compiler.trial import open_runner
from enginesmith.errors import EngineError, TargetUnavailableError
from enginesmith.targets import parse_target
from enginesmith.targets.cuda.chain import ChainRunner

pytestmark = pytest.mark.gpu


def gpus() -> int:
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetCount())


@pytest.fixture(params=["cuda:0", "cuda:0+cuda:1"])
def devices(request) -> str:
    if "+" in request.param and gpus() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    return str(request.param)


class Net(torch.nn.Module):
    """Convolutions with residuals; `scale` is read by the last layer alone, and `early` is given by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(6))
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.table = torch.nn.Embedding(7, 16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, image: torch.Tensor, kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = early = torch.relu(self.first(image))
        for convolution in self.convolutions:
            x = x + torch.relu(convolution(x))
        return self.head(x.mean((2, 3)) + self.table(kind)), early.mean((2, 3))


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "image": random.standard_normal((batch, 3, 24, 24)).astype(np.float32),
        "kind": random.integers(0, 7, batch),
    }


@pytest.fixture
def runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str):
    """The whole engine, and one in stages."""

    def make(precision: str = "fp32", stages: int = 2, of: str = "onnxruntime-cuda"):
        monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
        torch.manual_seed(0)
        where = devices if stages == 2 else "cuda:0"
        bundle = enginesmith.compile(
            Net().eval(),
            tmp_path / "bundle",
            inputs=["image:1x3x24x24", "kind:1:int64"],
            dynamic=["image:0=1..4..32", "kind:0=1..4..32"],
            targets=["onnxruntime-cuda", f"pipeline:of={of},stages={stages},devices={where},micro_batch=4"],
            precisions=[precision],
            benchmark=False,
        )
        engines = bundle.manifest["engines"]
        assert [engine["status"] for engine in engines] == ["ready", "ready"]
        assert bundle.passed, [engine["validation"] for engine in engines]
        opened.extend(open_runner(bundle.path, record) for record in engines)
        return opened

    opened: list = []
    yield make
    for runner in opened:
        runner.close()


def assert_close(found, expected, bound):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.linalg.norm(found[name] - array) <= bound * np.linalg.norm(array)


@pytest.mark.parametrize(("precision", "stages", "bound"), [("fp32", 2, 1e-5), ("fp32", 3, 1e-5), ("fp16", 2, 5e-3)])
def test_stages_give_what_the_whole_engine_gives(runners, precision, stages, bound):
    whole, staged = runners(precision, stages)
    assert isinstance(staged, ChainRunner)
    for batch in (4, 32, 13, 1, 32):
        feed = inputs(batch, seed=batch)
        assert_close(staged.run(feed), whole.run(feed), bound)


def test_bound_inputs_and_runs_that_follow_each_other(runners):
    whole, staged = runners()
    feed, other = inputs(32), inputs(32, seed=1)
    bound, second = staged.bind(feed), staged.bind(other)
    for _ in range(5):
        bound.run()
        second.run()
    bound.synchronize()
    assert_close(bound.outputs(), whole.run(feed), 1e-5)
    assert_close(second.outputs(), whole.run(other), 1e-5)
    assert len(bound.timed(3)[0]) == 3


def test_tensors_on_the_first_device_are_read_in_place(runners):
    whole, staged = runners()
    feed = inputs(8)
    found = staged.run({name: torch.from_numpy(array).cuda() for name, array in feed.items()})
    assert_close(found, whole.run(feed), 1e-5)


def test_calls_from_several_threads(runners):
    whole, staged = runners()
    feeds = [inputs(9, seed) for seed in range(6)]
    expected = [whole.run(feed) for feed in feeds]
    found: dict[int, dict[str, np.ndarray]] = {}

    def call(number: int) -> None:
        found[number] = staged.run(feeds[number])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(feeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs in enumerate(expected):
        assert_close(found[number], outputs, 1e-5)


def test_a_closed_pipeline_is_closed(runners):
    _, staged = runners()
    staged.run(inputs(4))
    staged.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        staged.run(inputs(4))


def test_a_device_that_is_not_there():
    state = parse_target("pipeline:of=onnxruntime-cuda,devices=cuda:0+cuda:99").availability()
    assert "there is no GPU 99" in state.reason
    with pytest.raises(TargetUnavailableError, match="there is no GPU 99"):
        parse_target("pipeline:of=onnxruntime-cuda,devices=cuda:99").stage_target(0)._require()
