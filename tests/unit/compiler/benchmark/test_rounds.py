import numpy as np
import pytest

from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, batch_sizes, benchmark, slices
from enginesmith.compiler.benchmark import rounds as module
from enginesmith.compiler.benchmark.gpu_monitor import GpuUse
from enginesmith.compiler.signature import parse_inputs
from enginesmith.errors import BuildError, RecipeError, UnknownNameError, UsageError

INPUTS = [SizedInputs({"batch": 4}, 4, {"x": np.zeros((4, 2), np.float32)})]
SETTINGS = Settings(rounds=8, slice_s=0.1, warmup_s=0.01)
LAST_PART = 9
"""A slice of 100 calls runs as 7 parts of 13 and one of 9."""


class FakeRunner:
    """Pretends each call takes what `pattern` says, in turn; noted in a log shared between runners."""

    def __init__(self, name="fake", pattern=(1.0,), *, device=None, log=None, fails=None):
        self.name, self.pattern, self.device = name, np.asarray(pattern), device
        self.log = [] if log is None else log
        self.fails = fails
        self.closed = self.resets = self.calls = 0

    def run(self, inputs):
        return {"y": inputs["x"]}

    def bind(self, inputs):
        if self.fails and len(inputs["x"]) == self.fails:
            raise BuildError("no kernel for this size")
        return self

    def timed(self, iterations):
        self.log.append((self.name, iterations))
        times = np.resize(np.roll(self.pattern, -self.calls), iterations).tolist()
        self.calls += iterations
        return times, [self.device] * iterations if self.device else None

    def reset(self):
        self.resets += 1

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """Nobody else uses the processors."""
    monkeypatch.setattr(module.ForeignCpu, "share", lambda self: 0.0)


def run(runners, inputs=INPUTS, settings=SETTINGS, baseline="torch"):
    return benchmark([Candidate(n, r) for n, r in runners.items()], inputs, baseline=baseline, protocol=settings)


def test_a_candidate_is_compared_with_its_sibling_beside_the_baseline():
    runners = {"torch": FakeRunner(pattern=[4.0]), "dense": FakeRunner(pattern=[2.0]), "sparse": FakeRunner()}
    candidates = [Candidate(name, runner) for name, runner in runners.items()]
    siblings = {"sparse": "dense", "dense": "absent"}
    result = benchmark(candidates, INPUTS, baseline="torch", protocol=SETTINGS, siblings=siblings)
    found = {timing["candidate"]: (timing["speed_up"], timing["against_sibling"]) for timing in result["timings"]}
    assert found["torch"] == (None, None)
    assert found["dense"][1] is None
    assert found["sparse"][0]["ratio"] == pytest.approx(4)
    assert found["sparse"][1] == {
        "against": "dense",
        "ratio": pytest.approx(2),
        "low": pytest.approx(2),
        "high": pytest.approx(2),
    }


def test_percentiles_mean_and_throughput_are_of_single_calls():
    timing = run({"torch": FakeRunner(pattern=[1.0] * 97 + [5.0, 6.0, 7.0])})["timings"][0]
    assert (timing["p50_ms"], timing["p90_ms"]) == (1.0, 1.0)
    assert 5.0 <= timing["p99_ms"] <= 7.0
    assert timing["mean_ms"] == pytest.approx(1.15, rel=0.01)
    assert timing["requests_per_s"] == pytest.approx(1000 / timing["mean_ms"])
    assert timing["samples_per_s"] == pytest.approx(4 * timing["requests_per_s"])
    assert timing["iterations"] == 8 * 100
    assert timing["steady"]
    assert timing["device_mean_ms"] is None
    assert timing["gpu_utilization_percent"] is None


def test_speed_up_is_against_the_baseline_and_none_for_itself():
    result = run({"torch": FakeRunner(pattern=[3.0]), "engine": FakeRunner(pattern=[2.0])})
    by_name = {timing["candidate"]: timing for timing in result["timings"]}
    assert by_name["torch"]["speed_up"] is None
    assert by_name["engine"]["speed_up"]["against"] == result["baseline"] == "torch"
    assert by_name["engine"]["speed_up"]["ratio"] == pytest.approx(1.5)


def test_the_same_engine_twice_gives_an_interval_that_contains_one():
    noise = np.random.default_rng(3)
    pair = {name: FakeRunner(pattern=noise.lognormal(0, 0.1, 3001)) for name in ("torch", "same")}
    speed_up = run(pair)["timings"][1]["speed_up"]
    assert speed_up["low"] < 1 < speed_up["high"]


def rounds_of(seed):
    log = []
    names = ["torch", "b", "c"]
    run({n: FakeRunner(n, log=log) for n in names}, settings=Settings(8, 0.1, 0.01, seed=seed))
    slices = [name for name, iterations in log if iterations == LAST_PART]
    return [slices[i : i + 3] for i in range(0, len(slices), 3)]


def test_every_round_runs_every_candidate_once_in_an_order_drawn_by_the_seed():
    rounds = rounds_of(1)
    assert len(rounds) == 8
    assert all(sorted(names) == ["b", "c", "torch"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2
    assert rounds == rounds_of(1)
    assert rounds != rounds_of(2)


def test_warm_up_that_never_settles_is_recorded():
    timing = run({"torch": FakeRunner(pattern=[1.0, 9.0, 3.0, 27.0, 5.0, 2.0, 40.0])})["timings"][0]
    assert not timing["steady"]


def test_short_slices_shorten_the_warm_up():
    for slice_s, longest_s, calls in ((0.08, 0.3, 50), (0.01, 0.08, 13)):
        runner = FakeRunner()  # of 1 ms a call
        result = run({"torch": runner}, settings=Settings(rounds=6, slice_s=slice_s))
        assert result["protocol"]["warmup_s"] == longest_s
        assert runner.log[:5] == [("fake", 1), ("fake", 1), *[("fake", calls)] * 3]


def test_a_candidate_that_fails_to_load_or_at_a_size_is_skipped_with_the_reason():
    def broken():
        raise BuildError("driver too old", hint="update it")

    small = SizedInputs({"batch": 1}, 1, {"x": np.zeros((1, 2), np.float32)})
    result = run({"torch": FakeRunner(), "picky": FakeRunner(fails=4), "broken": broken}, inputs=[small, *INPUTS])
    measured = [(timing["candidate"], timing["batch"]) for timing in result["timings"]]
    assert measured == [("torch", 1), ("picky", 1), ("torch", 4)]
    assert result["skipped"] == {
        "broken": "driver too old\n  to do: update it",
        "picky batch=4": "no kernel for this size",
    }


def test_a_slice_ends_early_where_the_machine_gets_busy(monkeypatch):
    class Busy(FakeRunner):
        def timed(self, iterations):
            nonlocal now
            now += 0.15 if iterations > 1 else 0  # seconds a part, where the warm-up promised 13 ms
            return super().timed(iterations)

    now = 0.0
    monkeypatch.setattr(slices.time, "perf_counter", lambda: now)
    taken, _ = slices.Slices(Busy(), slice_s=0.1, warmup_s=0.01).take()
    assert len(taken) == 2 * 13


def test_a_candidate_that_fails_between_rounds_is_skipped_and_the_rest_goes_on():
    class Mortal(FakeRunner):
        def timed(self, iterations):
            if self.calls > 300:
                raise RuntimeError("device lost")
            return super().timed(iterations)

    result = run({"torch": FakeRunner(), "mortal": Mortal()})
    assert [timing["candidate"] for timing in result["timings"]] == ["torch"]
    assert result["timings"][0]["iterations"] == 800
    assert result["skipped"] == {"mortal batch=4": "device lost"}


def test_without_its_baseline_a_size_has_no_speed_up():
    result = run({"torch": FakeRunner(fails=4), "engine": FakeRunner()})
    assert [timing["speed_up"] for timing in result["timings"]] == [None]


def test_what_the_benchmark_opened_it_closes_and_nothing_else():
    mine, theirs = FakeRunner(), FakeRunner()
    run({"torch": lambda: mine, "given": theirs})
    assert (mine.closed, theirs.closed) == (1, 0)
    assert (mine.resets, theirs.resets) == (1, 1)


def test_with_transfers_whole_calls_are_timed():
    log = []
    result = run({"torch": FakeRunner(log=log)}, settings=Settings(6, 0.002, 0.002, transfers=True))
    assert log == []
    assert result["protocol"]["transfers"]
    assert result["timings"][0]["mean_ms"] != 1.0
    assert "with transfers" in result["protocol"]["description"]


def test_disturbed_rounds_are_repeated_a_bounded_number_of_times(monkeypatch):
    monkeypatch.setattr(module.ForeignCpu, "share", lambda self: 0.5)
    log = []
    result = run({"torch": FakeRunner(log=log)})
    assert sum(iterations == LAST_PART for _, iterations in log) == 8 + 4
    assert result["timings"][0]["iterations"] == 800
    assert "4 repeated, 8 kept" in result["protocol"]["description"]


def test_slow_calls_get_fewer_rounds(monkeypatch):
    monkeypatch.setattr(module, "SLOW_FACTOR", 0)
    assert run({"torch": FakeRunner(pattern=[400.0])})["timings"][0]["iterations"] == module.SLOW_ROUNDS


def test_gpu_candidates_have_device_times_memory_use_and_clock(monkeypatch):
    readings = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(module.GpuMonitor, "memory_bytes", lambda self: next(readings))
    monkeypatch.setattr(module.Slices, "gpu_use", lambda self, gpu: GpuUse(85.0, 1980.0))
    timing = run({"torch": FakeRunner(device=0.5)})["timings"][0]
    assert (timing["device_mean_ms"], timing["device_p50_ms"], timing["device_p99_ms"]) == (0.5, 0.5, 0.5)
    assert (timing["gpu_utilization_percent"], timing["sm_clock_mhz"]) == (85.0, 1980.0)
    assert timing["gpu_memory_bytes"] == 2 * 10**6


def test_progress_ends_at_one():
    seen = []
    benchmark(
        [Candidate("torch", FakeRunner())],
        INPUTS,
        baseline="torch",
        protocol=SETTINGS,
        on_progress=lambda fraction, phase: seen.append((fraction, phase)),
    )
    assert seen == [(0.0, "load torch"), (0.0, "benchmark batch=4"), (1.0, "benchmark")]


def test_a_baseline_that_is_no_candidate_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown baseline 'troch'(?s:.)*did you mean 'torch'"):
        run({"torch": FakeRunner()}, baseline="troch")


def test_two_candidates_of_one_name_are_refused():
    with pytest.raises(UsageError, match="two candidates of a benchmark have the same name"):
        benchmark([Candidate("torch", FakeRunner())] * 2, INPUTS, baseline="torch")


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="too few rounds for an interval"):
        Settings(rounds=5)
    with pytest.raises(RecipeError, match="a slice and the warm-up must last"):
        Settings(slice_s=0)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ("1..8..64", [1, 4, 8, 16, 64]),
        ("1..1..8", [1, 4, 8]),
        ("3..5..5", [3, 4, 5]),
        ("2..2..2", [2]),
    ],
)
def test_batch_sizes_hold_the_ends_the_optimum_and_powers_of_four(bounds, expected):
    signature = parse_inputs(["x:1x7"], [f"x:0={bounds}", "x:1=2..5..9"])
    sizes = batch_sizes(signature)
    assert [size["batch"] for size in sizes] == expected
    assert {size["dim1"] for size in sizes} == {5}


def test_batch_sizes_without_a_batch_axis_are_the_optimum():
    assert batch_sizes(parse_inputs(["x:1x7"])) == [{}]
    assert batch_sizes(parse_inputs(["x:1x7"], ["x:1=2..5..9"])) == [{"dim1": 5}]


def test_a_candidate_may_have_a_slice_of_its_own():
    log = []
    candidates = [Candidate("short", FakeRunner("short", log=log)), Candidate("long", FakeRunner("long", log=log), 0.4)]
    result = benchmark(candidates, INPUTS, baseline="short", protocol=SETTINGS)
    found = {timing["candidate"]: timing["iterations"] for timing in result["timings"]}
    assert found == {"short": 8 * 100, "long": 8 * 400}
