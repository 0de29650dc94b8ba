from __future__ import annotations

import collections
import runpy
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

import enginesmith
from enginesmith.errors import EngineError, UsageError

_server = runpy.run_path(str(Path(__file__).parents[2] / "inference_server.py"))
Doubling, listening = _server["Doubling"], _server["listening"]
X = np.ones((2, 3), np.float32)


class Fake:
    """A client that answers with its name."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, True

    def __call__(self, inputs, **options):
        return {"y": self.name}

    def close(self) -> None:
        self.open = False


def split(shares, **options) -> enginesmith.Split:
    return enginesmith.Split({name: (Fake(name), share) for name, share in shares.items()}, **options)


def count(made: enginesmith.Split, keys) -> collections.Counter:
    return collections.Counter(made.arm(key) for key in keys)


def test_calls_go_to_the_arms_by_their_shares_and_say_to_which():
    made = split({"old": 9, "new": 1}, seed=0)
    answers = [made({"x": X}) for _ in range(2000)]
    assert all(answer.outputs["y"] == answer.arm for answer in answers)
    results = made.results()
    assert results["new"].share == 0.1
    assert results["new"].calls == sum(answer.arm == "new" for answer in answers)
    assert 150 < results["new"].calls < 250  # 200 with a standard deviation of 13
    assert results["old"].calls + results["new"].calls == 2000


def test_a_seed_draws_the_same_again():
    one, other = split({"a": 1, "b": 1}, seed=7), split({"a": 1, "b": 1}, seed=7)
    assert [one.arm() for _ in range(50)] == [other.arm() for _ in range(50)]


def test_keys_stay_with_their_arm_and_are_shared_out():
    made, again = split({"old": 0.8, "new": 0.2}), split({"old": 0.8, "new": 0.2}, seed=1)
    arms = [made.arm(f"user-{number}") for number in range(5000)]
    assert arms == [again.arm(f"user-{number}") for number in range(5000)]
    assert 850 < arms.count("new") < 1150  # 1000 with a standard deviation of 28
    assert {made(key="user-1").arm for _ in range(20)} == {arms[1]}


def test_a_key_has_the_same_arm_in_every_process():
    script = """if True:
        from enginesmith.serving.split import Split
        made = Split({"a": (None, 1), "b": (None, 1)})
        print([made.arm(key) for key in ("x", "y", 3, "ü")], end="")
    """
    made = enginesmith.Split({"a": (Fake("a"), 1), "b": (Fake("b"), 1)})
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == str([made.arm(key) for key in ("x", "y", 3, "ü")])


def test_a_greater_share_of_the_last_arm_keeps_its_keys():
    few, many = split({"old": 0.9, "new": 0.1}), split({"old": 0.6, "new": 0.4})
    keys = [str(number) for number in range(2000)]
    assert {key for key in keys if few.arm(key) == "new"} < {key for key in keys if many.arm(key) == "new"}


def test_experiments_share_keys_out_each_by_itself():
    one, other = split({"a": 1, "b": 1}, experiment="one"), split({"a": 1, "b": 1}, experiment="other")
    both = sum(one.arm(key) == other.arm(key) for key in range(2000))
    assert 900 < both < 1100  # 1000 with a standard deviation of 22


def test_an_arm_without_a_share_gets_nothing_and_shares_need_not_sum_up():
    assert count(split({"old": 1, "new": 0}), range(500)) == {"old": 500}
    assert count(split({"new": 0, "old": 3}), [None] * 500) == {"old": 500}
    thirds = split(dict.fromkeys("abcdefghij", 0.1))
    assert set(count(thirds, range(500))) == set("abcdefghij")


@pytest.mark.parametrize("shares", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}, {"a": float("inf")}])
def test_shares_that_make_no_sense(shares):
    with pytest.raises(UsageError, match="the shares of the arms make no sense"):
        split(shares)


def test_errors_and_latencies_are_counted_by_arm():
    good, bad = Doubling(), Doubling()
    bad.failures = [(grpc.StatusCode.INTERNAL, "index 7 is out of range")] * 3
    with listening(good) as one, listening(bad) as other:
        arms = {"good": (enginesmith.Client(one, "double"), 1), "bad": (enginesmith.Client(other, "double"), 1)}
        with enginesmith.Split(arms, seed=0) as made:
            keys = {made.arm(key): key for key in range(20)}
            assert (made(x=X, key=keys["good"]).outputs["y"] == 2 * X).all()
            with pytest.raises(EngineError, match="did not answer a call of double"):
                made({"x": X}, key=keys["bad"])
            futures = [made.submit({"x": X}, key=keys["bad"]) for _ in range(5)]
            outcomes = [future.exception() or future.result().arm for future in futures]
            results = made.results()
    assert outcomes.count("bad") == 3
    assert (results["bad"].calls, results["bad"].errors) == (6, {"EngineError": 3})
    assert str(results["good"]).startswith("1 calls, no errors, p50 ")
    assert str(results["bad"]).startswith("6 calls, 3 EngineError, p50 ")
    assert [found.percent for found in results["bad"].percentiles] == [50, 90, 99]


def test_nothing_was_called_yet_and_clients_are_closed():
    made = split({"a": 1})
    assert str(made.results()["a"]) == "0 calls, no errors"
    client = made._arms["a"].client
    made.close()
    assert not client.open
