import dataclasses

import pytest

from enginesmith.compiler.ladder.objective import Objective, held_bytes
from enginesmith.compiler.manifest import SpeedUp
from enginesmith.compiler.signature import parse_inputs
from enginesmith.errors import RecipeError, UnknownNameError


@pytest.mark.parametrize("text", ["latency", "throughput", "size", "size=0.25"])
def test_an_objective_prints_back_as_it_was_written(text):
    assert str(Objective.parse(text)) == text


def test_what_is_no_objective():
    with pytest.raises(UnknownNameError, match="unknown objective 'speed'"):
        Objective.parse("speed")
    for text in ("size=2", "size=", "size=0", "latency=3"):
        with pytest.raises(RecipeError, match=f"objective '{text}' cannot be read"):
            Objective.parse(text)


def test_caches_of_all_rows_count_as_size():
    caches = [f"{name}:2x4x16x8:{dtype}" for name, dtype in (("key", "float32"), ("value", "int8"))]
    plain = parse_inputs(["ids:2x3:int64", *caches], ["ids:0=b@1..2..5", "key:0=b@1..2..5", "value:0=b@1..2..5"])
    decoder = dataclasses.replace(plain, states={"key": "key_out", "value": "value_out"})
    engine = {"size_bytes": 1000, "details": {}}
    assert held_bytes(engine, plain) == 1000
    assert held_bytes(engine, decoder) == 1000 + 5 * (4 * 16 * 8) * (4 + 1)
    assert held_bytes({**engine, "details": {"cache_row_bytes": 7}}, decoder) == 1000 + 5 * 7


def test_what_shrinks_is_said():
    gain = Objective("size", 0.25).gain("a", 100, 40, None)
    assert Objective("size").describe(gain, "size with the caches of 8 rows") == (
        "40% of the size with the caches of 8 rows of a"
    )


def test_throughput_is_measured_at_the_largest_batch():
    signature = parse_inputs(["x:2x3"], ["x:0=1..2..16"])
    (axis,) = signature.axes
    assert Objective("latency").sizes(signature) == {axis: 2}
    assert Objective("throughput").sizes(signature) == {axis: 16}
    assert Objective("throughput").sizes(parse_inputs(["x:2x3"])) == {}


@pytest.mark.parametrize(("low", "reached"), [(1.019, False), (1.02, False), (1.021, True)])
def test_the_whole_interval_has_to_lie_above_the_threshold(low, reached):
    gain = SpeedUp(against="a", ratio=1.5, low=low, high=2.0)
    assert Objective("latency").gain("a", 1, 1, gain) is gain
    assert Objective("latency").reached(gain) is reached


@pytest.mark.parametrize(("own", "reached"), [(76, False), (75, True), (10, True)])
def test_an_engine_has_to_shrink_by_the_share(own, reached):
    objective = Objective("size", 0.25)
    gain = objective.gain("a", 100, own, None)
    assert gain is not None
    assert objective.reached(gain) is reached
    assert objective.describe(gain) == f"{own}% of the size of a"
