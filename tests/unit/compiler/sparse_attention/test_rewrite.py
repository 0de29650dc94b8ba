"""Sparse attention as graphs, against NumPy."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import enginesmith
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.sparse_attention.found import layers, others
from enginesmith.compiler.sparse_attention.kinds import Blocks, TopK, Window, refusal
from enginesmith.compiler.sparse_attention.rewrite import rewrite
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets._onnxruntime_states import shares_buffers

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))

KINDS = [Window(4), Window(3, 2), Window(1, 1), TopK(3), TopK(1), Blocks(4, 1), Blocks(2, 2), Blocks(4, 0)]


@dataclasses.dataclass(frozen=True)
class Sizes:
    heads: int
    shared: int
    width: int
    length: int


SIZES = [Sizes(2, 2, 8, 16), Sizes(6, 2, 16, 32)]


def attention(sizes: Sizes) -> Graph:
    """One node over a cache."""
    wide, narrow = sizes.heads * sizes.width, sizes.shared * sizes.width
    cache = f"float[batch, {sizes.shared}, {sizes.length}, {sizes.width}]"
    graph = Graph.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        one (float[batch, time, {wide}] q, float[batch, time, {narrow}] k, float[batch, time, {narrow}] v,
             {cache} key, {cache} value, int32[batch] last, int32 most)
            => (float[batch, time, {wide}] y, {cache} key_out, {cache} value_out) {{
          [attention] y, key_out, value_out = com.microsoft.GroupQueryAttention
            <num_heads = {sizes.heads}, kv_num_heads = {sizes.shared}, scale = 0.4>(q, k, v, key, value, last, most)
        }}""")
    )
    graph.infer()
    return graph


def sparse(sizes: Sizes, kind) -> Graph:
    graph = attention(sizes)
    rewrite(graph, {"attention": kind})
    graph.verify()
    assert [output.name for output in graph.model.graph.outputs] == ["y", "key_out", "value_out"]
    assert graph.operators()["If"] == 1
    return graph


def call(sizes: Sizes, past: list[int], time: int, *, equal: bool = False) -> dict[str, np.ndarray]:
    """New tokens behind filled caches; what is behind them there is rubbish."""
    generator = np.random.default_rng(len(past) + time)
    shape = (len(past), sizes.shared, sizes.length, sizes.width)
    kinds = (("q", sizes.heads), ("k", sizes.shared), ("v", sizes.shared))
    given = {name: generator.standard_normal((len(past), time, heads * sizes.width)) for name, heads in kinds}
    given |= {name: 9 * generator.standard_normal(shape) for name in ("key", "value")}
    if equal:  # whole numbers, whose sums are the same in any order
        given |= {name: given[name].round() for name in ("q", "key")}
        given["key"][:] = given["key"][:, :, :1]
        given["k"][:] = given["key"][:, :, 0].reshape(len(past), 1, -1)
    last = np.array(past, np.int32) + time - 1
    numbers = {"last": last, "most": np.array(last.max() + 1, np.int32)}
    return {**{name: array.astype(np.float32) for name, array in given.items()}, **numbers}


def expected(attend, sizes: Sizes, kind, given: dict[str, np.ndarray]) -> np.ndarray:
    rows, time = given["q"].shape[:2]
    keys, values = given["key"].copy(), given["value"].copy()
    result = np.zeros((rows, time, sizes.heads, sizes.width))
    for row in range(rows):
        first = int(given["last"][row]) - time + 1
        for cache, new in ((keys, given["k"]), (values, given["v"])):
            cache[row, :, first : first + time] = new[row].reshape(time, sizes.shared, -1).swapaxes(0, 1)
        for step in range(time):
            query = given["q"][row, step].reshape(sizes.heads, -1)
            for head in range(sizes.heads):
                shared = head * sizes.shared // sizes.heads
                known = (cache[row, shared, : first + step + 1] for cache in (keys, values))
                result[row, step, head] = attend(kind, query[head], *known, 0.4)
    return result.reshape(rows, time, -1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_and_prompts_see_what_the_definition_says(reference, sizes, kind):
    attend, _ = reference
    graph, dense = sparse(sizes, kind), attention(sizes)
    calls = [([0, 3, sizes.length - 1], 1), ([1], 1), ([0, 0], 7), ([0], sizes.length), ([5], 6)]
    for past, time in calls:
        given = call(sizes, past, time)
        found = run(graph, given)
        assert found["y"] == pytest.approx(expected(attend, sizes, kind, given), rel=1e-3, abs=1e-4)
        for name in ("key_out", "value_out"):
            for row, before in enumerate(past):
                written = slice(0, before + time)
                assert np.array_equal(found[name][row, :, written], run(dense, given)[name][row, :, written])


@pytest.mark.parametrize("kind", [TopK(3), Blocks(4, 1)], ids=str)
@pytest.mark.parametrize(("past", "time"), [([9, 12], 1), ([0], 13)])
def test_of_equal_scores_the_first_are_seen(reference, kind, past, time):
    attend, _ = reference
    given = call(SIZES[1], past, time, equal=True)
    found = run(sparse(SIZES[1], kind), given)["y"]
    assert found == pytest.approx(expected(attend, SIZES[1], kind, given), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", [Window(8, 2), TopK(8), Blocks(4, 2)], ids=str)
def test_where_there_are_fewer_keys_nothing_changes(kind):
    graph, dense = sparse(SIZES[0], kind), attention(SIZES[0])
    for past, time in (([6, 2], 1), ([0, 0], 8)):
        given = call(SIZES[0], past, time)
        assert run(graph, given)["y"] == pytest.approx(run(dense, given)["y"], rel=1e-4, abs=1e-5)


def test_layers_that_are_not_named_stay():
    graph = attention(SIZES[0])
    (only,) = layers(graph)
    assert others(graph) == {}
    assert (only.heads, only.shared, only.width, only.length, only.name) == (2, 2, 8, 16, "attention")
    assert only.scale == pytest.approx(0.4)
    rewrite(graph, {})
    assert graph.operators()["com.microsoft::GroupQueryAttention"] == 1


def test_attention_with_other_options_is_none_that_is_known():
    graph = attention(SIZES[0])
    (node,) = graph.model.graph
    node.attributes.add(ir.AttrInt64("local_window_size", 4))
    assert layers(graph) == []
    assert others(graph) == {"attention": "it is no attention over a cache as fuse-attention leaves it"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Window(12, 4), "window of 12 and 4 sinks is all that a cache of 16 tokens holds"),
        (Window(16), "window of 16 is all that a cache of 16 tokens holds"),
        (TopK(16), "top 16 is all that a cache of 16 tokens holds"),
        (Blocks(3, 1), "1 blocks of 3: a cache of 16 tokens has no whole number of them"),
        (Blocks(4, 3), "3 blocks of 4 is all that a cache of 16 tokens holds"),
        (Blocks(4, 2), None),
    ],
)
def test_kinds_that_a_cache_does_not_take(kind, reason):
    assert refusal(kind, 16) == reason


@pytest.mark.parametrize("kind", [Window(4), Window(3, 2), TopK(3), Blocks(4, 1)], ids=str)
def test_generation_continues_as_the_definition_says(reference, kind, tmp_path):
    _, logits_after = reference
    graph = Graph.from_proto(small["model"]())
    graph.infer()
    parse_pass("fuse-attention")(graph, Context(small["signature"]()))
    work = flattened(graph)
    rewrite(work, {layer.name: kind for layer in layers(work)})
    bundle = small["write_bundle"](tmp_path / "bundle", work.to_proto())
    assert shares_buffers(bundle / "engines" / "decoder" / "model.onnx", small["signature"]().states)

    def greedy(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(logits_after(kind, tokens).argmax()))
        return tokens[len(prompt) :]

    prompts = [[3, 1, 4, 1, 5, 9], [2, 7]]
    with enginesmith.load(bundle) as engine:
        assert engine.generate(prompts, 9) == [greedy(prompt, 9) for prompt in prompts]
        (values,) = engine.log_likelihoods([[3, 1, 4, 1, 5, 9, 2, 6]])
    wide = logits_after(kind, [3, 1, 4, 1, 5, 9, 2]).astype(np.float64)
    assert values[-1] == pytest.approx(wide[6] - np.log(np.exp(wide - wide.max()).sum()) - wide.max(), abs=1e-4)
