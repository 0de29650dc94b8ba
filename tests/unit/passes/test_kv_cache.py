import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import Tapped, run
from enginesmith.compiler.quantization.patch import Patch
from enginesmith.compiler.signature import Signature
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))
SIGNATURE = small["signature"]()
ROWS, LENGTH = 2, 12


class Prompts:
    """Random ones, whole; `caches` is what they begin with."""

    description, random = "prompts", False

    def __init__(self, caches=0.0):
        self.caches = caches

    def __iter__(self):
        generator = np.random.default_rng(0)
        shape = (ROWS, small["HEADS"], small["ROOM"], small["WIDTH"])
        for _ in range(6):
            yield {
                "ids": generator.integers(0, small["VOCABULARY"], (ROWS, LENGTH)),
                "past": np.zeros(ROWS, np.int64),
                "count": np.full(ROWS, LENGTH),
                **dict.fromkeys(("key", "value"), np.full(shape, self.caches, np.float32)),
            }


def graph(text=small["GRAPH"], *, fused=True):
    made = Graph.from_proto(small["model"](text))
    made.infer()
    if fused:
        parse_pass("fuse-attention")(made, Context(SIGNATURE))
    return made


def stored(text="kv-cache:limit=0.5", *, fused=True, prompts=None, made=None):
    made = made or graph(fused=fused)
    context = Context(SIGNATURE, calibration=Calibration(prompts or Prompts()))
    return made, parse_pass(text)(made, context)


def scales(made):
    """By the name of the cache."""
    initializers = made.model.graph.initializers
    return {name: initializers[f"{name}/scale"].const_value.numpy() for name in ("key", "value")}


def largest(made):
    """Magnitudes of the new keys and values on the data: (heads, width) each."""
    run = Tapped(made, ["k", "v"])
    found = [run(batch) for batch in Prompts()]
    return {
        name: np.abs(np.concatenate([one[tensor] for one in found])).max(axis=(0, 2))
        for name, tensor in (("key", "k"), ("value", "v"))
    }


def test_attention_that_is_fused_takes_caches_of_8_bits():
    made, result = stored()
    assert result.changes == {"caches stored in 8 bits": 2}
    assert result.refusals == ()
    (node,) = (node for node in made.model.graph if node.op_type == "GroupQueryAttention")
    assert [node.inputs[place].dtype.name for place in (0, 3, 4)] == ["FLOAT", "INT8", "INT8"]
    assert node.inputs[1:3] == (None, None)  # keys and values are parts of the query
    assert [value.dtype.name for value in node.outputs] == ["FLOAT", "INT8", "INT8"]
    assert node.attributes["kv_cache_bit_width"].as_int() == 8
    assert {node.attributes[f"{which}_quant_type"].as_string() for which in "kv"} == {"PER_CHANNEL"}
    assert made.output_names == ("logits", "key_out", "value_out")
    assert [value.dtype.name for value in made.model.graph.inputs[3:]] == ["FLOAT", "FLOAT"]
    assert set(result.details["errors"]) == {"turned/GroupQueryAttention"}


def test_scales_reach_the_largest_values_of_each_head_and_channel():
    made, _ = stored()
    for name, peaks in largest(graph(fused=False)).items():
        assert scales(made)[name].shape == (1, small["HEADS"], 1, small["WIDTH"])
        assert scales(made)[name][0, :, 0] == pytest.approx(1.25 * peaks / 127, rel=1e-5)


def test_one_scale_for_all_channels():
    made, _ = stored("kv-cache:per_channel=false,headroom=1,limit=0.5")
    for name, peaks in largest(graph(fused=False)).items():
        assert scales(made)[name] == pytest.approx([peaks.max() / 127], rel=1e-5)
    (node,) = (node for node in made.model.graph if node.op_type == "GroupQueryAttention")
    assert node.attributes["k_quant_type"].as_string() == "PER_TENSOR"


def test_caches_that_the_data_begin_with_are_in_the_range():
    made, _ = stored("kv-cache:headroom=1,limit=0.5", prompts=Prompts(caches=-100.0))
    assert all((array == np.float32(100 / 127)).all() for array in scales(made).values())


@pytest.mark.parametrize("fused", [True, False])
def test_numbers_are_those_of_rounded_caches(fused):
    before, (after, _) = graph(fused=fused), stored(fused=fused)
    for inputs in Prompts():
        expected, found = run(before, inputs), run(after, inputs)
        for name in ("key", "value"):
            scale, real = scales(after)[name], expected[f"{name}_out"]
            assert found[f"{name}_out"] == pytest.approx(np.clip(np.rint(real / scale), -128, 127) * scale, abs=1e-4)
        error = np.linalg.norm(found["logits"] - expected["logits"]) / np.linalg.norm(expected["logits"])
        assert 1e-4 < error < 0.2  # weights so large that a near tie between two keys is decided by rounding


def test_the_error_that_is_told_is_that_of_the_attention():
    before, (after, result) = graph(), stored()
    old, new = Tapped(before, ["joined"]), Tapped(after, ["joined"])
    worst = 0.0
    for batch, _ in zip(Prompts(), range(4), strict=False):
        expected, found = old(batch)["joined"], new(batch)["joined"]
        worst = max(worst, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    assert result.details["errors"] == {"turned/GroupQueryAttention": pytest.approx(worst, rel=1e-3)}


def test_caches_that_a_scatter_writes_are_stored_too():
    made, result = stored(fused=False)
    assert result.changes == {"caches stored in 8 bits": 2}
    scatters = [node for node in made.model.graph if node.op_type == "ScatterElements"]
    assert [node.inputs[place].dtype.name for node in scatters for place in (0, 2)] == ["INT8"] * 4
    assert set(result.details["errors"]) == {"key_out", "value_out"}
    assert scales(made)["key"].shape == (1, small["HEADS"], 1, small["WIDTH"])


def test_twice_changes_nothing():
    made, _ = stored()
    before = made.fingerprint()
    _, result = stored(made=made)
    assert not result.modified
    assert made.fingerprint() == before


def test_what_changes_too_much_stays_and_says_by_how_much():
    made, result = stored("kv-cache:limit=0.001")
    assert not result.modified
    (refusal,) = result.refusals
    assert refusal.node == "turned/GroupQueryAttention"
    assert refusal.reason.startswith("its caches stay float: in 8 bits its result changes by relative L2 ")
    assert refusal.reason.endswith(", allowed 0.001")
    assert made.fingerprint() == graph().fingerprint()


def test_a_runtime_without_such_attention_leaves_the_caches(monkeypatch):
    add = Patch.add

    def unknown(patch, operator, inputs, outputs, attributes=None, **options):
        if operator == "GroupQueryAttention":
            attributes = {**attributes, "k_quant_type": "PER_ROW"}
        return add(patch, operator, inputs, outputs, attributes, **options)

    made = graph()
    monkeypatch.setattr(Patch, "add", unknown)
    _, result = stored(made=made)
    assert not result.modified
    assert result.refusals[0].reason.startswith(
        "the caches stay float: this ONNX Runtime does not run them in 8 bits: [ONNXRuntimeError]"
    )


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_no_scale_reaches_stays():
    text = small["GRAPH"].replace("k0 = MatMul(h, wk)", "k00 = MatMul(h, wk)  k0 = Mul(k00, huge)")
    text = text.replace("float open = {0}", "float open = {0}, float huge = {1e32}")
    made = graph(text, fused=False)
    made.model.graph.outputs[0:1] = [next(v for n in made.model.graph for v in n.outputs if v.name == "q0")]
    _, result = stored(made=made)
    assert result.changes == {"caches stored in 8 bits": 1}
    assert [refusal.node for refusal in result.refusals] == ["key_out"]
    assert "'k', which is written, is not finite on the data, or beyond 1e30" in result.refusals[0].reason


def test_a_cache_that_something_else_writes_stays():
    text = small["GRAPH"].replace("value_out = ScatterElements<axis = 2>(value, index, v)",
                                  "old = Neg(value)  value_out = ScatterElements<axis = 2>(old, index, v)")  # fmt: skip
    _, result = stored(made=graph(text, fused=False))
    assert result.changes == {"caches stored in 8 bits": 1}
    assert [(refusal.node, refusal.reason) for refusal in result.refusals] == [
        (
            "value",
            "a cache stays as it is: it is not written by one node alone, an attention that is fused or a Scatter",
        )
    ]


def test_a_model_without_caches_stays_as_it_is():
    context = Context(Signature(SIGNATURE.inputs), calibration=Calibration(Prompts()))
    result = parse_pass("kv-cache")(graph(), context)
    assert not result.modified
    assert [refusal.reason for refusal in result.refusals] == ["the model has no caches to store"]


def test_without_calibration_it_refuses():
    with pytest.raises(RecipeError, match="kv-cache needs calibration data, to see the ranges of keys and values"):
        parse_pass("kv-cache")(graph(), Context(SIGNATURE))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("limit=0", "limit lies between 0 and 1, not at 0"),
        ("limit=1", "limit lies between 0 and 1, not at 1"),
        ("headroom=0.9", "headroom lies between 1 and 4, not at 0.9"),
        ("headroom=5", "headroom lies between 1 and 4, not at 5"),
    ],
)
def test_options_that_cannot_be(option, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(f"kv-cache:{option}")
