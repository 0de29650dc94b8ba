import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from enginesmith.compiler.capture import capture
from enginesmith.compiler.fusion.cached import CachedFuser
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.quantization.patch import Patch
from enginesmith.compiler.signature import Signature
from enginesmith.compiler.sources import load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))


def graph(text=small["GRAPH"]):
    made = Graph.from_proto(small["model"](text))
    made.infer()
    return made


def fused(text=small["GRAPH"]):
    made = graph(text)
    return made, parse_pass("fuse-attention")(made, Context(small["signature"]()))


def test_attention_over_a_cache_becomes_one_node():
    made, result = fused()
    assert result.changes == {"attention over a cache fused": 1}
    assert result.refusals == ()
    operators = made.operators()
    assert operators["com.microsoft::GroupQueryAttention"] == 1
    assert not operators.keys() & {"Softmax", "ScatterElements", "Where", "LessOrEqual"}
    assert made.output_names == ("logits", "key_out", "value_out")
    (node,) = (node for node in made.model.graph if node.op_type == "GroupQueryAttention")
    assert [value.name for value in node.inputs[3:5]] == ["key", "value"]
    assert [value.name for value in node.outputs[1:]] == ["key_out", "value_out"]
    assert node.attributes["scale"].as_float() == 0.5


def replaced(old, new):
    assert old in small["GRAPH"]
    return small["GRAPH"].replace(old, new)


def filled(past, length):
    """Inputs whose caches hold that many tokens of each row."""
    generator = np.random.default_rng(2)
    rows = len(past)
    shape = (rows, small["HEADS"], small["ROOM"], small["WIDTH"])
    kept = (np.arange(small["ROOM"]) < np.array(past)[:, None])[:, None, :, None]
    return {
        "ids": generator.integers(0, small["VOCABULARY"], (rows, length)),
        "past": np.array(past),
        "count": np.array([1, length][-rows:]),
        **{name: np.where(kept, generator.standard_normal(shape), 0).astype(np.float32) for name in ("key", "value")},
    }


@pytest.mark.parametrize(("past", "length"), [((0, 0), 5), ((3, 11), 1), ((7,), 4)])
def test_numbers_stay_equal_whatever_rows_hold(past, length):
    before, (after, _) = graph(), fused()
    inputs = filled(past, length)
    expected, found = run(before, inputs), run(after, inputs)
    for name, array in expected.items():
        assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-5)


SLOPES = f"float[{small['HEADS']}, 1, 1] slopes = {{-40, 8}}, int64[1] whole = {{-1}}, int64[1] axis0 = {{0}},"


def biased(sum_of, bias="bias = Mul(numbers, slopes)"):
    """The decoder with linear biases: the slope of each head times the position of a key."""
    text = replaced("masked = Add(scores, mask)", f"numbers = Cast<to = 1>(slots)  {bias}  {sum_of}")
    return text.replace("<int64 zero", f"<{SLOPES} int64 zero")


ADDED = "allowed = Add(mask, bias)  masked = Add(scores, allowed)"
BIASES = {
    "a row for each head": biased(ADDED),
    "added the other way round": biased("allowed = Add(bias, mask)  masked = Add(allowed, scores)"),
    "chosen by the mask": biased("allowed = Where(seen, bias, never)  masked = Add(scores, allowed)"),
    "of four axes": biased(ADDED, "bias3 = Mul(numbers, slopes)  bias = Unsqueeze(bias3, axis0)"),
    "of each query": biased(
        ADDED,
        "asked = Cast<to = 1>(spread)  far = Sub(numbers, asked)  bias = Mul(far, slopes)",
    ),
}


@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize(("past", "length"), [((0, 0), 5), ((3, 11), 1), ((7,), 4)])
def test_biases_for_each_head_go_into_the_node(form, past, length):
    before, (after, result) = graph(BIASES[form]), fused(BIASES[form])
    assert result.changes == {"attention over a cache fused": 1}
    assert result.refusals == ()
    (node,) = (node for node in after.model.graph if node.op_type == "GroupQueryAttention")
    assert len(node.inputs) == 11
    inputs = filled(past, length)
    expected, found = run(before, inputs), run(after, inputs)
    for name, array in expected.items():
        assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-5)
    unbiased = run(graph(), inputs)
    assert np.abs(unbiased["logits"] - expected["logits"]).max() > 1


def test_a_bias_of_something_else_is_found_out():
    alike = "each = Mul(numbers, slopes)  bias = ReduceSum<keepdims = 1>(each, axis0)"
    _, result = fused(biased(ADDED, alike))
    assert not result.modified
    (refusal,) = result.refusals
    assert refusal.reason.startswith("attention over a cache stays as it was: fused, tensor 'turned' changes")


def captured(tmp_path, model, exporter):
    """The graph of a language model and its signature."""
    source = load_model(model, decoder={"max_length": 24, "batch": 3})
    found = capture(
        source, exporter=exporter, opset_range=(9, 20), samples=None, seed=0, directory=tmp_path, log=lambda line: None,
        required=True,
    ).graph  # fmt: skip
    return found, source.signature


@pytest.mark.parametrize(("family", "exporter"), [("Bloom", "dynamo"), ("Mpt", "torchscript")])
def test_models_with_linear_biases_are_fused(tmp_path, family, exporter):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(vocab_size=43, bos_token_id=0, eos_token_id=1, **sizes)
    found, signature = captured(tmp_path, getattr(transformers, f"{family}ForCausalLM")(config), exporter)
    for name in ("simplify", "dedupe", "fuse-attention"):
        result = parse_pass(name)(found, Context(signature))
    assert result.changes == {"attention over a cache fused": 2}
    assert "Softmax" not in found.operators()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("family", "turns"), [("GPT2LMHeadModel", 0), ("LlamaForCausalLM", 1), ("Qwen2ForCausalLM", 1)]
)
def test_attention_is_found_as_both_exporters_write_it(tmp_path, family, turns, exporter):
    torch.manual_seed(0)
    kind = getattr(transformers, family).config_class
    config = kind(
        vocab_size=43, bos_token_id=None, eos_token_id=None, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3,
        **({"num_key_value_heads": 2} if turns else {}),
    )  # fmt: skip
    found, signature = captured(tmp_path, getattr(transformers, family)(config), exporter)
    for name in ("simplify", "dedupe", "fuse-attention"):
        result = parse_pass(name)(found, Context(signature))
    assert result.changes == {"attention over a cache fused": 2}
    assert result.refusals == ()
    nodes = [node for node in found.model.graph if node.op_type == "GroupQueryAttention"]
    assert {node.attributes.get_int("do_rotary", 0) for node in nodes} == {turns}
    assert {node.attributes["kv_num_heads"].as_int() for node in nodes} == {4 // (1 + turns)}


@pytest.mark.parametrize(("past", "length"), [((0, 0), 5), ((3, 11), 1), ((7,), 4), ((0,), 6), ((0, 9), 1)])
def test_for_a_gpu_nothing_that_is_read_on_the_host_comes_of_positions(past, length):
    before, after = graph(), graph()
    parse_pass("fuse-attention:scheme=onnxruntime-cuda")(after, Context(small["signature"]()))
    (node,) = (node for node in after.model.graph if node.op_type == "GroupQueryAttention")
    above, values = set(), [node.inputs[6]]
    while values:
        made = values.pop().producer()
        if made is not None:
            above.add(made.op_type)
            values += [] if made.op_type == "Shape" else [value for value in made.inputs if value is not None]
    assert above == {"Shape", "Gather", "ReduceMin", "Greater", "Where", "Cast"}
    inputs = {
        "ids": np.random.default_rng(3).integers(0, small["VOCABULARY"], (len(past), length)),
        "past": np.array(past),
        "count": np.full(len(past), length),
        **{name: filled_up_to(past) for name in ("key", "value")},
    }
    expected, found = run(before, inputs), run(after, inputs)
    for name, array in expected.items():
        assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-5)


def filled_up_to(past):
    shape = (len(past), small["HEADS"], small["ROOM"], small["WIDTH"])
    filled = (np.arange(small["ROOM"]) < np.array(past)[:, None])[:, None, :, None]
    return np.where(filled, np.random.default_rng(2).standard_normal(shape), 0).astype(np.float32)


def test_twice_changes_nothing():
    made, _ = fused()
    before = made.fingerprint()
    assert not parse_pass("fuse-attention")(made, Context(small["signature"]())).modified
    assert made.fingerprint() == before


def test_a_model_without_caches_stays_as_it_is():
    made = graph()
    result = parse_pass("fuse-attention")(made, Context(Signature(small["signature"]().inputs)))
    assert not result.modified
    assert [refusal.reason for refusal in result.refusals] == ["the model has no caches to attend over"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (replaced("masked = Add(scores, mask)", "masked = Mul(scores, mask)"), "its scores are no sum"),
        (
            replaced("sums = MatMul(weights, value_out)", "half = Mul(weights, scale)  sums = MatMul(half, value_out)"),
            "its weights are not multiplied with values alone",
        ),
        (
            replaced("kt = Transpose<perm = [0, 1, 3, 2]>(key_out)",
                     "kn = Neg(key_out)  kt = Transpose<perm = [0, 1, 3, 2]>(kn)"),
            "its keys or values are no cache",
        ),
        (
            replaced("value_out = ScatterElements<axis = 2>(value, index, v)",
                     "same = Add(positions, zero)  spread2 = Unsqueeze(same, axes13)  index2 = Expand(spread2, kshape) "
                     "value_out = ScatterElements<axis = 2>(value, index2, v)"),
            "keys and values are written to different positions",
        ),
        (
            replaced("turned = Transpose<perm = [0, 2, 1, 3]>(sums)  joined = Reshape(turned, join)",
                     "turned = Transpose<perm = [0, 2, 3, 1]>(sums)  joined = Reshape(turned, join)"),
            "its heads are put together in another way",
        ),
    ],
)  # fmt: skip
def test_what_is_something_else_stays_with_the_reason(text, reason):
    made, result = fused(text)
    assert not result.modified
    (refusal,) = result.refusals
    assert refusal.node == "softmax"
    assert refusal.reason.startswith("no attention over a cache to fuse: ")
    assert reason in refusal.reason
    assert made.operators()["Softmax"] == 1


def test_heads_of_another_width_stay():
    signature = small["signature"]()
    made = graph()
    for value in made.model.graph.inputs:
        if value.name in ("key", "value"):
            value.shape = ir.Shape([*value.shape[:3], 4])
    fuser = CachedFuser(made, signature.states)
    fuser.run()
    assert [refusal.reason for refusal in fuser.refusals] == [
        "no attention over a cache to fuse: a width of 4 is no multiple of 8, which GroupQueryAttention asks for"
    ]


def test_a_mask_that_is_not_causal_is_found_out():
    _, result = fused(replaced("seen = LessOrEqual(slots, spread)", "seen = Less(slots, length)"))
    assert not result.modified
    (refusal,) = result.refusals
    assert refusal.reason.startswith("attention over a cache stays as it was: fused, tensor 'turned' changes")


def test_a_node_that_computes_something_else_is_reverted(monkeypatch):
    add = Patch.add

    def spoilt(patch, operator, inputs, outputs, attributes=None, **options):
        if operator == "GroupQueryAttention":
            attributes = {**attributes, "scale": 0.7}
        return add(patch, operator, inputs, outputs, attributes, **options)

    monkeypatch.setattr(Patch, "add", spoilt)
    _, result = fused()
    assert not result.modified
    assert "fused, tensor 'turned' changes: relative L2 " in result.refusals[0].reason


@pytest.mark.parametrize(("past", "length"), [(0, 5), (7, 4), (12, 4)])
def test_a_decoder_that_checks_drafts_is_fused_too(past, length):
    before, after = graph(small["LOOKING_BACK"]), graph(small["LOOKING_BACK"])
    result = parse_pass("fuse-attention")(after, Context(small["signature"](3)))
    assert result.changes == {"attention over a cache fused": 1}
    generator = np.random.default_rng(2)
    shape = (1, small["HEADS"], small["ROOM"], small["WIDTH"])
    filled = (np.arange(small["ROOM"]) < past)[None, None, :, None]
    inputs = {
        "ids": generator.integers(0, small["VOCABULARY"], (1, length)),
        "past": np.array([past]),
        "count": np.array([length]),
        "back": np.array([3, 2, 1, 0]),
        **{name: np.where(filled, generator.standard_normal(shape), 0).astype(np.float32) for name in ("key", "value")},
    }
    expected, found = run(before, inputs), run(after, inputs)
    assert expected["logits"].shape == (1, 4, small["VOCABULARY"])
    for name, array in expected.items():
        assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-5)
