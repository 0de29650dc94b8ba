from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from enginesmith.compiler.capture import capture
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.quantization.patch import Patch
from enginesmith.compiler.signature import Signature, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context, PassResult

ATTENTION = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,S,8] x, float[B,1,S,S] mask) => (float[B,S,8] y)
    <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float half = {0.5}, float one = {1},
     float root = {1.4142135}, float[8] g, float[8] b> {
    qs = Reshape(x, split)  q = Transpose <perm = [0, 2, 1, 3]> (qs)  k = Transpose <perm = [0, 2, 3, 1]> (qs)
    m = MatMul(q, k)  s = Add(m, mask)  [softmax] p = Softmax <axis = -1> (s)  o = MatMul(p, q)
    t = Transpose <perm = [0, 2, 1, 3]> (o)  r = Reshape(t, join)
    d = Div(r, root)  e = Erf(d)  a = Add(e, one)  w = Mul(r, a)  z = Mul(w, half)
    f = Add(z, x)  y = LayerNormalization(f, g, b) }"""


def spoil(monkeypatch: pytest.MonkeyPatch, operator: str, **wrong: object) -> None:
    """Gives the fused operator other attributes than it should have."""
    add = Patch.add

    def spoiled(patch, name, inputs, outputs, attributes=None, **options):
        if name == operator:
            attributes = {**(attributes or {}), **wrong}
        return add(patch, name, inputs, outputs, attributes, **options)

    monkeypatch.setattr(Patch, "add", spoiled)


def test_each_scheme_fuses_what_its_runtime_needs(fill, context):
    found = {}
    for scheme in ("onnx", "onnxruntime-cpu", "onnxruntime-cuda"):
        graph = fill(ATTENTION)
        found[scheme] = dict(parse_pass(f"fuse-transformer:scheme={scheme}")(graph, context(graph)).changes)
    assert found == {
        "onnx": {},
        "onnxruntime-cpu": {"attention fused": 1},
        "onnxruntime-cuda": {"GELU fused": 1, "attention fused": 1, "sum and LayerNormalization fused": 1},
    }


def test_a_region_that_computes_something_else_is_reverted(fill, context, monkeypatch):
    spoil(monkeypatch, "MultiHeadAttention", scale=1.1)
    graph = fill(ATTENTION)
    before = graph.fingerprint()
    result = parse_pass("fuse-transformer")(graph, context(graph))
    assert not result.modified
    assert graph.fingerprint() == before
    (refusal,) = result.refusals
    assert refusal.node == "softmax"
    assert refusal.reason.startswith("attention stays as it was: fused, tensor 'r' changes: relative L2 ")
    assert refusal.reason.endswith(", allowed 1e-04")


def test_the_other_regions_stay_fused(fill, context, monkeypatch):
    spoil(monkeypatch, "SkipLayerNormalization", epsilon=1.0)
    graph = fill(ATTENTION)
    result = parse_pass("fuse-transformer:scheme=onnxruntime-cuda")(graph, context(graph))
    assert result.changes == {"GELU fused": 1, "attention fused": 1}
    assert [refusal.node for refusal in result.refusals] == ["y"]
    assert graph.operators()["LayerNormalization"] == 1


def test_what_does_not_run_is_reverted(fill, context, monkeypatch):
    spoil(monkeypatch, "MultiHeadAttention", num_heads=3)
    graph = fill(ATTENTION)
    result = parse_pass("fuse-transformer:scheme=onnxruntime-cuda")(graph, context(graph))
    assert result.changes == {"GELU fused": 1, "sum and LayerNormalization fused": 1}
    assert "attention stays as it was: ONNX Runtime does not run it fused" in result.refusals[0].reason


def test_what_cannot_be_run_is_not_checked(fill, context):
    graph = fill(ATTENTION.replace("[B,S,8] x", "[B,7,8] x").replace("{0, 0, 2, 4}", "{0, 0, 2, 4}"))
    result = parse_pass("fuse-transformer")(graph, context(graph))
    assert not result.modified
    assert "the result cannot be checked: ONNX Runtime cannot run the graph" in result.refusals[0].reason


def test_refuses_unknown_schemes():
    with pytest.raises(RecipeError, match="option 'scheme' of 'fuse-transformer' has an unknown value"):
        parse_pass("fuse-transformer:scheme=openvino")


class Encoder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, **options: object) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]


class Images(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels)[0]


def bert(attention: str) -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        attn_implementation=attention,
    )
    return Encoder(transformers.BertModel(config, add_pooling_layer=False))


def gpt2(attention: str) -> torch.nn.Module:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return Encoder(transformers.GPT2Model(config), use_cache=False)


def vit(attention: str) -> torch.nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        attn_implementation=attention,
    )
    return Images(transformers.ViTModel(config, add_pooling_layer=False))


class Answers(torch.nn.Module):
    """An encoder and a decoder that attends to it, on texts of different lengths."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=answer, use_cache=False
        )[0]


def bloom(attention: str) -> torch.nn.Module:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, attn_implementation=attention)
    return Encoder(transformers.BloomModel(config), use_cache=False)


def mpt(attention: str) -> torch.nn.Module:
    config = transformers.MptConfig(
        vocab_size=50, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, attn_implementation=attention
    )
    return Encoder(transformers.MptModel(config), use_cache=False)


def t5(attention: str) -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, attn_implementation=attention
    )
    return Answers(transformers.T5Model(config))


def bart(attention: str) -> torch.nn.Module:
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return Answers(transformers.BartModel(config))


TOKENS = (
    ("input_ids:2x16:int64", "attention_mask:2x16:int64"),
    ("input_ids:0=1..2..4", "attention_mask:0=1..2..4", "input_ids:1=4..16..32", "attention_mask:1=4..16..32"),
)
TWO_TEXTS = (
    (*TOKENS[0], "answer:2x6:int64"),
    (*TOKENS[1], "answer:0=1..2..4", "answer:1=2..6..12"),
)
PIXELS = (("pixels:2x3x32x32",), ("pixels:0=1..2..4",))


class One(list):
    description = "made up"
    random = False


def captured(make, attention: str, exporter: str, folder) -> tuple[Graph, Signature, One]:
    torch.manual_seed(0)
    model = make(attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros, which would be simplified away
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = {vit: PIXELS, t5: TWO_TEXTS, bart: TWO_TEXTS}.get(make, TOKENS)
    source = load_model(model, inputs=parse_inputs(*inputs))
    random = np.random.default_rng(0)
    mask = np.ones((2, 16), np.int64)
    mask[0, 9:] = 0
    sample = {"input_ids": random.integers(1, 50, (2, 16)), "attention_mask": mask}
    if make is vit:
        sample = {"pixels": random.standard_normal((2, 3, 32, 32)).astype(np.float32)}
    if inputs is TWO_TEXTS:
        sample["answer"] = random.integers(1, 50, (2, 6))
    samples = One([sample])
    found = capture(
        source,
        exporter=exporter,
        opset_range=(9, 20),
        samples=samples,
        seed=0,
        directory=folder,
        log=lambda line: None,
        required=True,
    )
    assert found.graph is not None
    for name in ("simplify", "dedupe"):
        parse_pass(name)(found.graph, Context(source.signature, samples))
    return found.graph, source.signature, samples


def fuse(graph: Graph, scheme: str, signature: Signature, samples: One) -> tuple[Graph, PassResult]:
    work = graph.clone()
    result = parse_pass(f"fuse-transformer:scheme={scheme}")(work, Context(signature, samples))
    for name, array in probe.run(graph, samples[0]).items():
        np.testing.assert_allclose(probe.run(work, samples[0])[name], array, rtol=1e-4, atol=1e-5)
    return work, result


@pytest.mark.parametrize(
    ("make", "sums", "exporter", "attention"),
    [
        (bert, 5, "dynamo", "sdpa"),
        (bert, 5, "torchscript", "sdpa"),
        (gpt2, 5, "dynamo", "eager"),
        (gpt2, 5, "torchscript", "sdpa"),
        (vit, 4, "dynamo", "sdpa"),
        (vit, 4, "torchscript", "eager"),
    ],
)
def test_fuses_transformers_as_both_exporters_write_them(tmp_path, make, sums, exporter, attention):
    graph, signature, samples = captured(make, attention, exporter, tmp_path)
    on_cpu, result = fuse(graph, "onnxruntime-cpu", signature, samples)
    lookups = {"mask lookup fused": 1} if exporter == "dynamo" and make is not vit else {}
    assert result.changes == {**lookups, "attention fused": 2}
    assert not result.refusals
    assert "Softmax" not in on_cpu.operators()
    on_cuda, result = fuse(graph, "onnxruntime-cuda", signature, samples)
    assert result.changes == {
        **lookups, "GELU fused": 2, "attention fused": 2, "sum and LayerNormalization fused": sums,
    }  # fmt: skip
    assert on_cuda.operators()["com.microsoft::Attention"] == 2
    parse_pass("cast:to=fp16")(on_cuda, Context(signature, samples))
    halves = {n.outputs[0].dtype.name for n in on_cuda.nodes() if n.domain and n.outputs[0].dtype is not None}
    assert halves == {"FLOAT16"}


@pytest.mark.parametrize(
    ("make", "count", "exporter", "attention"),
    [
        (bloom, 2, "dynamo", "eager"),
        (bloom, 2, "torchscript", "eager"),
        (mpt, 2, "dynamo", "eager"),
        (t5, 3, "dynamo", "sdpa"),
        (bart, 3, "torchscript", "sdpa"),
    ],
)
def test_fuses_biases_of_positions_and_attention_to_another_text(tmp_path, make, count, exporter, attention):
    graph, signature, samples = captured(make, attention, exporter, tmp_path)
    work, result = fuse(graph, "onnxruntime-cpu", signature, samples)
    assert result.changes["attention fused"] == count
    assert not result.refusals
    assert "Softmax" not in work.operators()
    biases = [node.inputs[5] for node in work.nodes() if node.op_type == "MultiHeadAttention" and len(node.inputs) > 5]
    assert biases
