"""The whole search of one engine on a made-up machine: its memory ends, and its calls take, as it is told."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginesmith.compiler.batch import search
from enginesmith.compiler.batch.largest import Probe
from enginesmith.compiler.batch.search import best_of_targets, check_searchable, notes, search_batches
from enginesmith.compiler.ladder.objective import LATENCY
from enginesmith.compiler.manifest import BatchCurve
from enginesmith.compiler.recipe import Recipe
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import RecipeError
from enginesmith.targets.base import EngineInfo

made = runpy.run_path(str(Path(__file__).with_name("points.py")))
point, curve = made["point"], made["curve"]

SIGNATURE = Signature(
    inputs=(TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("scale", "float32", ())),
    axes={"batch": AxisRange(1, 4, 64), "length": AxisRange(1, 128, 512)},
)
SAMPLE = {"ids": np.zeros((4, 128), np.int64), "scale": np.float32(1)}


@dataclasses.dataclass
class Machine:
    """Stands in for `Processes`.

    Attributes:
        ms: what a call takes, by batch.
        fits: the largest batch that fits.
        noise: times are off by that share at most.
        probed: batch and whether it ran alone, in turn. timed: the sizes of each run.
    """

    ms: Callable[[int], float]
    fits: int = 10**9
    noise: float = 0.0
    seed: int = 0
    memory: Callable[[int], int] = lambda batch: 100 + batch
    room: int = 10**9
    tail: float = 1.2
    iterations: int = 240
    probed: list[tuple[int, bool]] = dataclasses.field(default_factory=list)
    timed: list[dict[int, float]] = dataclasses.field(default_factory=list)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    untimed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def __call__(self, subject: Any) -> Machine:
        self.subject = subject
        return self

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def probe(self, batch: int, *, alone: bool) -> Probe:
        self.probed.append((batch, alone))
        if batch > self.fits:
            return Probe(batch, False, "out of memory: bad_alloc")
        return Probe(batch, True, ms=self.ms(batch), memory_bytes=self.memory(batch))

    def time(self, slices_s: dict[int, float], settings: Mapping[str, Any]) -> tuple[dict[int, Any], dict[int, str]]:
        self.timed.append(slices_s)
        self.settings = settings
        timings = {}
        for batch in slices_s.keys() - set(self.untimed):
            p50 = self.ms(batch) * (1 + self.noise * self.random.uniform(-1, 1))
            timings[batch] = {"p50_ms": p50, "p99_ms": p50 * self.tail, "iterations": self.iterations}
            timings[batch]["gpu_utilization_percent"] = None
        return timings, {batch: "bad_alloc" for batch in self.untimed if batch in slices_s}

    def room_bytes(self) -> int:
        return self.room


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BatchCurve]:
    def run(machine: Machine, signature: Signature = SIGNATURE, **fields: Any) -> BatchCurve:
        directory = tmp_path / "engines" / "cpu-fp32"
        directory.mkdir(parents=True, exist_ok=True)
        EngineInfo("cpu-fp32", "onnxruntime-cpu", "fp32", "model.onnx", signature).write(directory)
        monkeypatch.setattr(search, "Processes", machine)
        engines: list[Any] = [{"name": "cpu-fp32", "status": "ready"}, {"name": "away", "status": "built"}]
        told: list[float] = []
        recipe = Recipe(**fields)
        found = search_batches(tmp_path, engines, SAMPLE, signature, recipe, lambda fraction, _: told.append(fraction))
        assert told == sorted(told)
        assert all(0 <= fraction < 1 for fraction in told)
        (only,) = found
        return only

    return run


def linear(batch: int) -> float:
    """A fixed cost of 1 ms and 0.1 ms a sample: throughput rises for ever, towards 10,000 samples a second."""
    return 1.0 + 0.1 * batch


def falling(batch: int) -> float:
    """As `linear` up to 16; beyond, caches overflow and a sample takes five times as long."""
    return linear(batch) if batch <= 16 else 5 * linear(batch)


def test_the_axis_ends_before_memory_does(searched: Any) -> None:
    found = searched(machine := Machine(linear))
    assert (found["largest"], found["largest_is_limit"], found["axis"], found["device"]) == (64, True, "batch", "cpu")
    assert found["sizes"] == {"length": 128}
    assert machine.subject.sizes == {"length": 128}
    assert machine.probed == [(1, False), (2, False), (4, False), (8, True), (16, True), (32, True), (64, True)]
    assert (found["best"], found["p99_limit_ms"]) == (64, None)
    # 64 in 7.4 ms are 8649 a second; of the sizes that are measured next, 48 has 95.7 % of that and 40 has 92.5 %.
    assert found["saturation"] == 48
    assert [p["batch"] for p in found["points"]] == [1, 2, 4, 8, 16, 32, 40, 48, 56, 64]
    assert [sorted(sizes) for sizes in machine.timed] == [[1, 2, 4, 8, 16, 32, 64], [32, 40, 48, 56, 64]]


def test_beyond_the_axis_where_it_is_asked_for(searched: Any) -> None:
    found = searched(machine := Machine(linear), max_batch=300)
    assert (found["largest"], found["largest_is_limit"]) == (300, True)
    assert [batch for batch, _ in machine.probed] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert searched(Machine(linear), max_batch=10)["largest"] == 10


def test_memory_ends_first(searched: Any) -> None:
    found = searched(machine := Machine(linear, fits=23))
    assert (found["largest"], found["largest_is_limit"]) == (23, False)
    assert [batch for batch, _ in machine.probed][-5:] == [32, 24, 20, 22, 23]
    assert all(alone for batch, alone in machine.probed if batch > 4)
    by_batch = {p["batch"]: p for p in found["points"]}
    assert (by_batch[32]["fits"], by_batch[32]["reason"]) == (False, "out of memory: bad_alloc")
    assert by_batch[32]["p50_ms"] is by_batch[32]["p99_ms"] is by_batch[32]["samples_per_s"] is None
    assert max(batch for sizes in machine.timed for batch in sizes) == 23
    assert (by_batch[22]["fits"], by_batch[22]["p50_ms"], by_batch[22]["reason"]) == (True, None, "")


def test_throughput_that_falls_again(searched: Any) -> None:
    found = searched(Machine(falling))
    assert (found["largest"], found["best"]) == (64, 16)
    assert found["saturation"] == 16  # 14 samples give 93 %


@pytest.mark.parametrize(("limit", "found"), [("9ms", 64), ("5ms", 28), ("0.003s", 14), ("1.4ms", 1)])
def test_the_best_within_a_limit(searched: Any, limit: str, found: int) -> None:
    """p99 is 1.2 times 1 ms + 0.1 ms a sample: 31.7 samples fit in 5 ms, 15 in 3 ms, and 28 and 14 are measured."""
    result = searched(Machine(linear), p99=limit)
    assert result["best"] == found
    assert result["p99_limit_ms"] == pytest.approx({"9ms": 9, "5ms": 5, "0.003s": 3, "1.4ms": 1.4}[limit])
    by_batch = {p["batch"]: p for p in result["points"]}
    assert by_batch[found]["p99_ms"] <= result["p99_limit_ms"]


def test_a_limit_that_no_size_keeps(searched: Any) -> None:
    result = searched(Machine(linear), p99="1ms")
    assert result["best"] is None
    assert result["largest"] == 64
    assert result["saturation"] is not None


@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_decisions_little(searched: Any, seed: int) -> None:
    """With times off by up to 2 %, the saturation stays at the knee of a curve, and the best within 5 ms."""

    def knee(batch: int) -> float:
        return 1.0 + 0.01 * batch if batch <= 16 else 1.16 * batch / 16

    result = searched(Machine(knee, noise=0.02, seed=seed), p99="5ms")
    assert 14 <= result["saturation"] <= 20
    by_batch = {p["batch"]: p for p in result["points"]}
    assert by_batch[result["best"]]["p99_ms"] <= 5
    assert by_batch[result["best"]]["samples_per_s"] >= 0.95 * max(p["samples_per_s"] for p in result["points"])


def test_nothing_fits(searched: Any) -> None:
    result = searched(machine := Machine(linear, fits=0))
    assert (result["largest"], result["largest_is_limit"], result["saturation"], result["best"]) == (0, False) + (
        None,
    ) * 2
    assert machine.timed == []
    assert notes([result]) == ["cpu-fp32 runs at no batch size that was searched: out of memory: bad_alloc"]


def test_sizes_too_large_to_be_timed_with_others_are_timed_apart(searched: Any) -> None:
    searched(machine := Machine(linear, room=70))
    assert [sorted(sizes) for sizes in machine.timed] == [[1, 2, 4, 8, 16, 32], [64], [32], [40], [48], [56], [64]]


def test_a_size_that_cannot_be_timed_says_why(searched: Any) -> None:
    result = searched(Machine(linear, untimed=(64,)))
    last = result["points"][-1]
    assert (last["batch"], last["fits"], last["reason"], last["p99_ms"], last["calls"]) == (
        64,
        True,
        "bad_alloc",
        None,
        0,
    )
    assert result["largest"] == 64
    assert result["best"] == 32


def test_slow_sizes_are_given_the_time_that_a_p99_needs_and_share_it(searched: Any) -> None:
    def slow(batch: int) -> float:
        return 4.0 * batch

    searched(machine := Machine(slow), rounds=10)
    first = machine.timed[0]
    assert first[1] == pytest.approx(250 * 4 / 1e3 / 10)
    assert first[8] == pytest.approx(250 * 32 / 1e3 / 10)
    assert sum(first.values()) * 10 <= search.CALLS_S + 0.01
    assert first[64] < 250 * 256 / 1e3 / 10
    searched(machine := Machine(slow), p99="20ms", rounds=10, slice_s=0.05)
    assert machine.timed[0][16] == machine.timed[0][64] == 0.05  # 64 ms is far beyond
    assert machine.settings == {"rounds": 10, "slice_s": 0.05, "transfers": False, "seed": 0}


def signature_of(*shapes: tuple[int | str, ...], **axes: AxisRange) -> Signature:
    return Signature(tuple(TensorSpec(f"x{n}", "float32", shape) for n, shape in enumerate(shapes)), axes=axes)


@pytest.mark.parametrize(
    ("signature", "fields", "message"),
    [
        (signature_of((1, 8)), {}, r"no batch size to search: no input has a dynamic first axis\n.*\n  found: x0:1x8"),
        (signature_of((1, "n"), n=AxisRange(1, 2, 4)), {}, r"no input has a dynamic first axis"),
        (signature_of((), (3,)), {}, r"no input has a dynamic first axis"),
        (
            signature_of(("n",), n=AxisRange(8, 8, 8)),
            {},
            r"axis 'n' has the one size 8\n  found: 8..8..8\n  to do: comp",
        ),
        (signature_of(("n",), n=AxisRange(8, 8, 64)), {"max_batch": 4}, r"below the smallest of the axis\n.*8 or more"),
        (signature_of(("n",), n=AxisRange(8, 8, 64)), {"max_batch": 8}, r"axis 'n' has the one size 8"),
    ],
)
def test_what_cannot_be_searched_is_refused(signature: Signature, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_searchable(signature, Recipe(**fields))


def test_a_fixed_axis_may_be_searched_beyond() -> None:
    signature = signature_of((3,), ("n", 2), n=AxisRange(8, 8, 8))
    assert check_searchable(signature, Recipe(max_batch=64)) == ("n", 64)


def test_the_best_engine_of_each_target_is_searched() -> None:
    def record(name: str, target: str, **changes: Any) -> Any:
        made = {"name": name, "target": target, "status": "ready", "reason": "", "validation": None, "dropped": ""}
        return {**made, **changes}

    engines = [
        record("a-slow", "a"),
        record("a-fast", "a"),
        record("a-wrong", "a", validation={"passed": False}),
        record("a-dropped", "a", dropped="it is not faster"),
        record("b-untimed", "b"),
        record("c-away", "c", status="built"),
        record("d-broken", "d", status="failed"),
    ]
    times = {"a-slow": 2.0, "a-fast": 1.0, "a-wrong": 0.1, "a-dropped": 0.2}
    sizes = SIGNATURE.sizes()
    benchmark: Any = {"timings": [{"candidate": n, "sizes": sizes, "p50_ms": ms} for n, ms in times.items()]}
    assert [e["name"] for e in best_of_targets(engines, benchmark, SIGNATURE, LATENCY)] == ["a-fast", "b-untimed"]
    assert [e["name"] for e in best_of_targets(engines, None, SIGNATURE, LATENCY)] == ["a-slow", "b-untimed"]


def test_an_engine_that_misses_the_limit_is_noted_where_another_keeps_it() -> None:
    slow = curve([point(1, 7.3)], p99_limit_ms=5.0)
    fast = curve([point(1, 3.0)], p99_limit_ms=5.0, best=1, engine="gpu-fp16")
    assert notes([slow, fast]) == ["cpu-fp32: no batch size keeps a p99 of 5 ms, the smallest, 1, takes 7.3 ms"]
    assert notes([slow]) == []  # the verdict says it
