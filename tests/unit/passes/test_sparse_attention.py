"""Which layers attend sparsely, and why the others do not."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.sparse_attention.judge import Judge, longest
from enginesmith.compiler.sparse_attention.kinds import Window
from enginesmith.compiler.sparse_attention.rewrite import rewrite
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.passes.sparse_attention import SparseAttention

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))
NODE = "turned/GroupQueryAttention"


class Texts:
    """Prompts, or tokens behind filled caches."""

    description = "texts.npz"

    def __init__(self, time: int = 14, past: int = 0, *, random: bool = False) -> None:
        self.random, self._time, self._past = random, time, past

    def __iter__(self):
        generator = np.random.default_rng(5)
        for _ in range(3):
            shape = (2, small["HEADS"], small["ROOM"], small["WIDTH"])
            filled = (np.arange(small["ROOM"]) < self._past)[:, None]
            caches = {n: (filled * generator.standard_normal(shape)).astype(np.float32) for n in ("key", "value")}
            yield {
                "ids": generator.integers(0, small["VOCABULARY"], (2, self._time)),
                "past": np.full(2, self._past),
                "count": np.array([self._time, max(self._time - 3, 1)]),
                **caches,
            }


def fused() -> Graph:
    graph = Graph.from_proto(small["model"]())
    graph.infer()
    assert parse_pass("fuse-attention")(graph, Context(small["signature"]())).modified
    return graph


def applied(text: str, samples=None, graph: Graph | None = None):
    made = graph or fused()
    calibration = Calibration(samples or Texts(), CalibrationSettings(allow_random=True))
    return made, parse_pass(text)(made, Context(small["signature"](), calibration=calibration))


def reasons(result) -> list[str]:
    assert not result.modified
    return [refusal.reason for refusal in result.refusals]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("window=4", "window of 4"),
        ("window=3,sinks=1", "window of 3 and 1 sinks"),
        ("top_k=1", "top 1"),
        ("blocks=1,block=4", "1 blocks of 4"),
    ],
)
def test_a_large_budget_takes_every_layer(options, told):
    before = fused()
    made, result = applied(f"sparse-attention:{options},budget=1000")
    assert result.changes == {f"layers with {told}": 1, "layers that stay dense": 0}
    assert result.refusals == ()
    assert made.operators()["If"] == 1
    (row,) = result.details["sparse_attention"]
    assert (row["layer"], row["kind"], row["chosen"]) == (NODE, told, True)
    assert row["tokens"] > 2
    assert row["relative_l2"] > 1e-3
    together = {key: row[key] for key in ("error", "change", "relative_l2", "tokens")}
    assert result.details["together"] == together
    inputs = next(iter(Texts()))
    assert not np.allclose(run(made, inputs)["logits"], run(before, inputs)["logits"], rtol=1e-3)


def test_a_budget_of_nothing_takes_none_and_says_what_it_would_cost():
    made, result = applied("sparse-attention:window=4,top_k=3,budget=0")
    assert "GroupQueryAttention" in str(made.operators())
    (reason,) = reasons(result)
    assert result.refusals[0].node == NODE
    assert reason.startswith("attention stays dense: top 3 alone changes the mean ln p of ")
    assert reason.endswith(", the budget is 0")
    assert [row["chosen"] for row in result.details["sparse_attention"]] == [False, False]
    assert result.details["together"] is None


def test_the_kind_that_reads_least_is_taken_where_several_keep_the_budget():
    _, result = applied("sparse-attention:top_k=3,window=4,budget=1000")
    assert [row["kind"] for row in result.details["sparse_attention"] if row["chosen"]] == ["window of 4"]


def test_where_the_first_breaks_the_budget_the_next_is_taken():
    _, result = applied("sparse-attention:window=1,top_k=8,budget=1000")
    errors = {row["kind"]: row["error"] for row in result.details["sparse_attention"]}
    assert errors["top 8"] < errors["window of 1"]
    between = (errors["top 8"] + errors["window of 1"]) / 2
    _, result = applied(f"sparse-attention:window=1,top_k=8,budget={between}")
    assert [row["kind"] for row in result.details["sparse_attention"] if row["chosen"]] == ["top 8"]


def test_without_a_kind_a_window_of_an_eighth_with_sinks():
    _, result = applied("sparse-attention:budget=1000")
    assert result.changes == {"layers with window of 2 and 4 sinks": 1, "layers that stay dense": 0}


def test_single_tokens_are_judged_by_their_logits():
    _, result = applied("sparse-attention:window=4,budget=1e-6", Texts(1, 12))
    (reason,) = reasons(result)
    assert "window of 4 alone changes the logits by a relative L2 of " in reason
    (row,) = result.details["sparse_attention"]
    assert (row["change"], row["tokens"]) == (None, 0)
    assert row["error"] == row["relative_l2"] > 0


@pytest.mark.parametrize(
    ("text", "samples", "reason"),
    [
        ("sparse-attention:window=4", Texts(random=True), "errors on texts.npz say nothing about text"),
        (
            "sparse-attention:window=14", Texts(),
            "what window of 14 changes is not known: the longest text of the data has 14 tokens, "
            "of which window of 14 sees 14",
        ),
        ("sparse-attention:top_k=16", Texts(), "top 16 is all that a cache of 16 tokens holds"),
        ("sparse-attention:window=4,keep=turned*", Texts(), "kept by 'turned*'"),
    ],
)  # fmt: skip
def test_what_is_refused(text, samples, reason):
    graph, result = applied(text, samples)
    assert reasons(result) == [reason]
    assert graph.fingerprint() == fused().fingerprint()


def test_attention_that_is_not_fused_stays():
    graph = Graph.from_proto(small["model"]())
    graph.infer()
    _, result = applied("sparse-attention:window=4", graph=graph)
    assert reasons(result) == [
        "there is no fused attention over a cache; fuse-attention, before this pass, makes it"
    ]  # fmt: skip


def test_attention_with_a_bias_stays_and_says_so():
    graph = fused()
    (node,) = (node for node in graph.model.graph if node.op_type == "GroupQueryAttention")
    node.resize_inputs(11)
    bias = ir.Value(name="bias", const_value=ir.tensor(np.zeros((1, small["HEADS"], 1, 1), np.float32), name="bias"))
    graph.model.graph.register_initializer(bias)
    node.replace_input_with(10, bias)
    before = graph.fingerprint()
    _, result = applied("sparse-attention:window=4", graph=graph)
    assert [(refusal.reason, refusal.node) for refusal in result.refusals] == [
        ("its scores have a bias, as ALiBi has, which sparse attention does not add", NODE)
    ]
    assert graph.fingerprint() == before


def test_an_old_opset_stays():
    graph = fused()
    graph.model.opset_imports[""] = 12
    result = SparseAttention(window=4).apply(graph, Context(small["signature"](), calibration=Calibration(Texts())))
    assert reasons(result) == ["opset 12 is too old; opset 13 is the first"]


def test_a_second_time_changes_nothing():
    graph, result = applied("sparse-attention:window=4,budget=1000")
    assert result.modified
    before = graph.fingerprint()
    _, result = applied("sparse-attention:top_k=3,budget=1000", graph=graph)
    assert reasons(result) == ["attention was made sparse already, by sparse-attention:window=4,budget=1000.0"]
    assert graph.fingerprint() == before


def test_it_needs_data():
    assert SparseAttention().calibrates
    with pytest.raises(RecipeError, match="sparse-attention needs calibration data, to see what it changes"):
        parse_pass("sparse-attention")(fused(), Context(small["signature"]()))


def test_nodes_to_keep_must_exist():
    with pytest.raises(RecipeError, match=r"no node matches 'layer\*'"):
        applied("sparse-attention:window=4,keep=layer*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("window=0", "window is at least 1, found 0"),
        ("top_k=-1", "top_k is at least 1, found -1"),
        ("blocks=2,block=0", "block is at least 1, found 0"),
        ("calls=0", "calls is at least 1, found 0"),
        ("window=4,sinks=-1", "sinks is at least 0, found -1"),
        ("blocks=-1", "blocks is at least 0, found -1"),
        ("budget=-0.5", "budget is at least 0, found -0.5"),
        ("sinks=4", "sinks are for a window, and there is none"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(f"sparse-attention:{options}")


def test_options_print_back():
    text = "sparse-attention:window=512,sinks=4,top_k=256,blocks=8,block=32,budget=0.02,calls=16,keep=a+b*"
    assert str(parse_pass(text)) == text
    assert str(SparseAttention()) == "sparse-attention"


def test_the_change_is_that_of_ln_p_of_the_tokens_that_follow():
    dense = flattened(fused())
    sparse = dense.clone()
    rewrite(sparse, {NODE: Window(3)})
    assert longest(Texts()) == 14
    judge = Judge(dense, Texts(), beyond=3, calls=3)
    found = judge.measure(sparse)
    changes = []
    for batch in Texts():
        counts = batch["count"] - 1  # the first cut leaves the last token out
        outputs = [run(graph, {**batch, "count": counts})["logits"].astype(np.float64) for graph in (sparse, dense)]
        for row, token in enumerate(batch["ids"][np.arange(2), counts]):
            a, b = (logits[row][token] - np.log(np.exp(logits[row]).sum()) for logits in outputs)
            changes.append(a - b)
    assert (found.tokens, judge.calls) == (6, 3)
    assert found.change == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-5)
    assert found.deviation == pytest.approx(np.std(changes, ddof=1) / 6**0.5, rel=1e-3, abs=1e-5)
    assert found.value == pytest.approx(abs(np.mean(changes)) + found.deviation, rel=1e-3, abs=1e-5)
    assert judge.measure(dense).value == 0


def test_only_tokens_with_more_before_them_than_is_seen_are_asked_for():
    dense = flattened(fused())
    assert Judge(dense, Texts(), beyond=12, calls=99).measure(dense).tokens == 3  # of the longer rows, the last
    assert Judge(dense, Texts(), beyond=4, calls=99).measure(dense).tokens == 4 * 6


def test_logits_that_are_no_numbers_break_every_budget():
    spoilt = Graph.from_proto(small["spoilt"]())
    spoilt.infer()
    found = Judge(flattened(fused()), Texts(), beyond=4, calls=3).measure(flattened(spoilt))
    assert found.value == np.inf
    assert found.record()["error"] is None
