import runpy
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from enginesmith.compiler.engine import load
from enginesmith.errors import EngineError
from enginesmith.targets._onnxruntime_states import StatesRunner, shares_buffers

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))
STATES = {"key": "key_out", "value": "value_out"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with load(small["write_bundle"](tmp_path_factory.mktemp("decoder"))) as engine:
        yield engine


@pytest.fixture
def runner(engine):
    assert isinstance(engine._runner, StatesRunner)
    return engine._runner


def call(rows=2, length=3, past=0):
    generator = np.random.default_rng(1)
    caches = {
        name: generator.standard_normal((rows, small["HEADS"], small["ROOM"], small["WIDTH"])).astype(np.float32)
        for name in STATES
    }
    return {
        "ids": generator.integers(0, small["VOCABULARY"], (rows, length)),
        "past": np.full(rows, past),
        "count": np.full(rows, length),
        **caches,
    }


def test_caches_are_updated_in_the_buffers_that_they_are_in(runner):
    steps = runner.steps(2)
    buffers = {name: array.ctypes.data for name, array in steps.caches.items()}
    given = call()
    logits = steps(given["ids"], given["past"], given["count"]).copy()
    assert {name: array.ctypes.data for name, array in steps.caches.items()} == buffers
    filled = [bool(steps.caches["key"][:, :, at].any()) for at in range(small["ROOM"])]
    assert filled == [True] * 3 + [False] * (small["ROOM"] - 3)
    before = {name: array.copy() for name, array in steps.caches.items()}
    steps(given["ids"][:, :1], np.full(2, 3), np.ones(2, np.int64))
    for name, array in steps.caches.items():  # one place has changed, and nothing was moved
        assert np.array_equal(np.delete(array, 3, axis=2), np.delete(before[name], 3, axis=2))
        assert array[:, :, 3].any()
    assert logits == pytest.approx(np.stack([small["logits_after"](row) for row in given["ids"]]), rel=1e-4)


def test_a_shape_is_bound_once(runner, monkeypatch):
    steps, bound = runner.steps(1), []
    bind = steps._bound
    monkeypatch.setattr(steps, "_bound", lambda shapes: bound.append(shapes["ids"]) or bind(shapes))
    steps(np.array([[1, 2]]), np.array([0]), np.array([2]))
    for past in range(2, 6):
        steps(np.array([[3]]), np.array([past]), np.array([1]))
    assert bound == [(1, 2), (1, 1)]


def test_a_run_leaves_the_given_caches_alone(runner):
    given = call(past=4)
    before = {name: array.copy() for name, array in given.items()}
    outputs = runner.run(given)
    assert all(np.array_equal(given[name], array) for name, array in before.items())
    for name, output in STATES.items():
        assert np.array_equal(np.delete(outputs[output], [4, 5, 6], axis=2), np.delete(given[name], [4, 5, 6], axis=2))
        assert not np.array_equal(outputs[output], given[name])


def test_bound_runs_give_the_same_each_time(runner):
    given = call(past=4)
    bound = runner.bind(given)
    bound.run()
    first = {name: array.copy() for name, array in bound.outputs().items()}
    assert len(bound.timed(2)[0]) == 2
    expected = runner.run(given)
    for name, array in bound.outputs().items():
        assert np.array_equal(array, first[name])
        assert np.array_equal(array, expected[name])


def test_a_closed_engine_makes_no_calls(tmp_path):
    engine = load(small["write_bundle"](tmp_path))
    runner = engine._runner
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        runner.steps(1)


def test_a_call_that_fails_says_so(runner):
    steps = runner.steps(1)
    with pytest.raises(EngineError, match="ONNX Runtime failed to run the engine"):
        steps(np.array([[99]]), np.array([0]), np.array([1]))


def reader(made):
    made.graph.node.append(onnx.helper.make_node("Neg", ["key"], ["negative"]))


def other_output(made):
    for node in made.graph.node:
        for index, name in enumerate(node.output):
            if name == "value_out":
                node.output[index] = "value_new"
        for index, name in enumerate(node.input):
            if name == "value_out":
                node.input[index] = "value_new"
    made.graph.node.append(onnx.helper.make_node("Identity", ["value_new"], ["value_out"]))


def other_writer(made):
    (node,) = (node for node in made.graph.node if "key_out" in node.output)
    del node.attribute[:]
    node.op_type = "Add"
    node.input[:] = ["key", "k"]


def inner(made):
    body = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["key"], ["deep"])], "body", [], [])
    made.graph.node.append(onnx.helper.make_node("If", ["yes"], ["out"], then_branch=body, else_branch=body))


@pytest.mark.parametrize("spoil", [reader, other_output, other_writer, inner])
def test_a_cache_that_is_read_otherwise_has_no_shared_buffer(tmp_path, spoil):
    made = small["model"]()
    onnx.save(made, tmp_path / "model.onnx")
    assert shares_buffers(tmp_path / "model.onnx", STATES)
    spoil(made)
    onnx.save(made, tmp_path / "model.onnx")
    assert not shares_buffers(tmp_path / "model.onnx", STATES)


def test_logits_of_several_tokens_are_those_that_follow_each(tmp_path):
    with load(small["write_bundle"](tmp_path, drafted=3)) as engine:
        steps, tokens = engine._runner.steps(1), [3, 1, 4, 1, 5]
        steps(np.array([tokens[:2]]), np.array([0]), np.array([2]))
        found = steps(np.array([tokens[2:]]), np.array([2]), np.array([3]), np.array([2, 0]))
        assert found[0] == pytest.approx(np.stack([small["logits_after"](tokens[:n]) for n in (3, 5)]), rel=1e-4)
        found = steps(np.array([tokens[2:]]), np.array([2]), np.array([3]))
        assert found == pytest.approx(small["logits_after"](tokens)[None], rel=1e-4)
        given = {**call(1), "back": np.array([1, 0])}
        assert engine.run(given)["logits"].shape == (1, 2, small["VOCABULARY"])
        bound = engine._runner.bind(given)
        bound.run()
        assert np.array_equal(bound.outputs()["logits"], engine.run(given)["logits"])
