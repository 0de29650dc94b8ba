"""Calls that are replayed, with what stands for CUDA graphs: a launch that makes the call again."""

from __future__ import annotations

import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError
from enginesmith.targets.base import EngineInfo
from enginesmith.targets.inductor import runners
from enginesmith.targets.inductor.runners import ReplayRunner

INFO = EngineInfo(
    "e", "torch-inductor", "fp16", "model.pt2",
    Signature((TensorSpec("x", "float32", ("n",)),), (TensorSpec("y", "float32", ("n",)),), {"n": AxisRange(1, 2, 20)}),
)  # fmt: skip


class Package:
    """Doubles, into the memory of the last call on such an input, as a graph does."""

    def __init__(self) -> None:
        self.calls = 0
        self.places: dict[int, torch.Tensor] = {}
        self.failing: Callable[[], bool] = lambda: False

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.failing():
            raise RuntimeError(
                "CUDA error: operation not permitted\nCompile with `TORCH_USE_CUDA_DSA` to enable checks"
            )
        self.calls += 1
        place = self.places.setdefault(x.data_ptr(), torch.empty_like(x))
        torch.mul(x, 2, out=place)
        return [place]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a capture is under way, and how many there were."""
    made = [False]

    def captured(_: Any, call: Callable[[], None], *, apart: bool) -> Callable[[], None]:
        assert apart
        call()
        made[0] = True
        try:
            call()
        except EngineError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            made[0] = False
        made.append(True)
        return call

    event = types.SimpleNamespace(wait=lambda: None, record=lambda: None)
    monkeypatch.setattr(runners.Graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return made


def x_of(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)}


def test_results_stay_while_graphs_are_replayed(capturing: list[bool]) -> None:
    runner = ReplayRunner(Package, INFO, "cpu")
    first, other = (runner.run({"x": torch.tensor(values)})["y"] for values in ([1.0, 2.0], [3.0, 4.0]))
    assert (first.tolist(), other.tolist()) == ([2, 4], [6, 8])
    assert len(capturing) - 1 == 1
    assert runner.run(x_of(5))["y"].tolist() == [10]
    assert len(capturing) - 1 == 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: runner.run(x_of(n, n + 1))["y"].tolist(), range(100)))
    assert found == [[2 * n, 2 * n + 2] for n in range(100)]


def test_further_shapes_go_without_a_graph(capturing: list[bool]) -> None:
    runner = ReplayRunner(Package, INFO, "cpu")
    for size in range(1, 20):
        assert runner.run(x_of(*range(size)))["y"].tolist() == [2 * n for n in range(size)]
    assert len(capturing) - 1 == runners.SHAPES


def test_bound_inputs_have_a_graph_of_their_own(capturing: list[bool]) -> None:
    runner = ReplayRunner(Package, INFO, "cpu")
    bound = runner.bind(x_of(1, 2))
    bound.run()
    assert bound.outputs()["y"].tolist() == [2, 4]
    runner.run(x_of(7, 8))
    assert bound.outputs()["y"].tolist() == [2, 4]
    assert len(capturing) - 1 == 2
    with pytest.raises(DataError, match="input 'x' has the wrong shape"):
        runner.bind({"x": np.zeros(30, np.float32)})
    runner.close()
    with pytest.raises(EngineError, match="engine e is closed"):
        bound.run()


def test_what_cannot_be_captured_is_launched_call_by_call(capturing: list[bool]) -> None:
    package = Package()
    package.failing = lambda: capturing[0]
    runner = ReplayRunner(lambda: package, INFO, "cpu")
    assert runner.run(x_of(1, 2))["y"].tolist() == [2, 4]
    assert runner.refusal == "its launches cannot be captured: CUDA error: operation not permitted"
    assert runner.run(x_of(3, 4))["y"].tolist() == [6, 8]
    bound = runner.bind(x_of(5))
    bound.run()
    assert bound.outputs()["y"].tolist() == [10]


def test_a_call_that_fails_by_itself_is_told(capturing: list[bool]) -> None:
    package = Package()
    package.failing = lambda: True
    runner = ReplayRunner(lambda: package, INFO, "cpu")
    with pytest.raises(EngineError, match="engine e failed to run: CUDA error: operation not permitted"):
        runner.run(x_of(1))
    assert not runner.refusal
    package.failing = lambda: False
    assert runner.run(x_of(1))["y"].tolist() == [2]
    runner.close()
    for call in (runner.run, runner.bind):
        with pytest.raises(EngineError, match="engine e is closed"):
            call(x_of(1))
