from __future__ import annotations

import re
from typing import Any

import pytest

from enginesmith.compiler.recipe import make_recipe
from enginesmith.compiler.variants import Variant, make_variants, not_lowered, without_effect
from enginesmith.errors import RecipeError, UnknownNameError
from enginesmith.targets import parse_target


def variants(*targets: str, **fields: Any) -> dict[str, Variant]:
    made = make_variants(make_recipe({"precisions": ["fp32"], **fields}), [parse_target(text) for text in targets])
    return {variant.name: variant for variant in made}


def passes(variant: Variant) -> list[str]:
    return [str(rewrite) for rewrite in variant.passes]


def test_each_target_in_each_precision_with_its_own_passes() -> None:
    found = variants("onnxruntime-cpu", "torchscript", precisions=["fp32", "fp16", "int8"])
    assert {name: passes(variant) for name, variant in found.items()} == {
        "onnxruntime-cpu-fp32": [],
        "onnxruntime-cpu-fp16": ["cast"],
        "onnxruntime-cpu-int8": ["quantize-static"],
        "torchscript-fp32": [],
        "torchscript-fp16": [],
        "torchscript-int8": [],
    }


def test_a_target_that_is_asked_for_twice_is_numbered() -> None:
    found = variants("onnxruntime-cpu", "onnxruntime-cpu:threads=1")
    assert list(found) == ["onnxruntime-cpu-fp32", "onnxruntime-cpu-fp32-2"]


def test_kept_nodes_reach_every_pass_that_lowers_below_their_precision() -> None:
    found = variants(
        "onnxruntime-cpu", precisions=["fp16", "int8"], keep={"fp32": ["head", "*/norm"], "fp16": ["stem"]}
    )
    assert passes(found["onnxruntime-cpu-fp16"]) == ["cast:keep=head+*/norm"]
    assert passes(found["onnxruntime-cpu-int8"]) == ["quantize-static:keep=head+*/norm+stem"]


def test_only_what_stays_in_fp32_is_pinned_where_the_builder_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginesmith.targets.tensorrt._weakly_typed", lambda found: True)
    monkeypatch.setattr("enginesmith.targets.tensorrt.TensorRT.refusals", lambda target: {})
    found = variants("tensorrt", precisions=["int8"], keep={"fp32": ["head"], "fp16": ["stem"]})
    pin, quantize = passes(found["tensorrt-int8"])
    assert pin == "pin:keep=head"
    assert "keep=head+stem" in quantize


def test_options_of_quantization_reach_the_passes_that_have_them() -> None:
    options = {"bias_correction": False, "rounding": "gptq"}
    found = variants("onnxruntime-cpu", precisions=["int8", "int4-weights", "fp16"], quantization=options)
    assert passes(found["onnxruntime-cpu-int8"]) == ["quantize-static:rounding=gptq,bias_correction=false"]
    assert passes(found["onnxruntime-cpu-int4-weights"]) == ["quantize-weights:bits=4,rounding=gptq"]
    assert passes(found["onnxruntime-cpu-fp16"]) == ["cast"]


@pytest.mark.parametrize("option", ["scheme", "dtype", "to", "bits", "keep", "keep_io", "least"])
def test_what_makes_a_precision_is_not_to_be_chosen(option: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown option of quantization '{option}'"):
        variants("onnxruntime-cpu", precisions=["int8", "fp16"], quantization={option: "x"})


def record(text: str, engine: str, *, modified: bool, variant: str = "its own") -> Any:
    refusals = [{"reason": "no such node", "node": ""}]
    return {"variant": variant, "engines": [engine], "text": text, "modified": modified, "refusals": refusals}


def test_engines_that_nothing_was_lowered_in() -> None:
    made = list(variants("onnxruntime-cpu", precisions=["fp32", "int8", "fp16"]).values())

    records = [
        record("simplify", "onnxruntime-cpu-int8", modified=True, variant="all"),
        record("quantize-static", "onnxruntime-cpu-int8", modified=False),
        record("cast", "onnxruntime-cpu-fp16", modified=True),
    ]
    assert not_lowered(made, records) == [
        "onnxruntime-cpu-int8 is as in full precision, nothing was lowered: no such node"
    ]


@pytest.mark.parametrize("precision", ["int8", "mixed"])
@pytest.mark.parametrize("modified", [True, False])
def test_engines_that_nothing_was_quantized_in(
    monkeypatch: pytest.MonkeyPatch, precision: str, *, modified: bool
) -> None:
    monkeypatch.setattr("enginesmith.targets.tensorrt._weakly_typed", lambda found: True)
    monkeypatch.setattr("enginesmith.targets.tensorrt.TensorRT.refusals", lambda target: {})
    (variant,) = variants("tensorrt", precisions=[precision]).values()
    texts = passes(variant)
    records = [record(texts[0], variant.name, modified=True), record(texts[1], variant.name, modified=modified)]
    told = f"tensorrt-{precision} is as in fp16, nothing was quantized: no such node"
    assert not_lowered([variant], records) == ([] if modified else [told])


def test_an_engine_with_sparse_weights_stands_behind_each_dense_one() -> None:
    targets = ("tensorrt-rtx:compute_capabilities=8.9", "tensorrt-rtx", "onnxruntime-cpu")
    found = variants(*targets, precisions=["fp16"], sparsify="2:4")
    assert {name: (variant.sibling, passes(variant), variant.refusal) for name, variant in found.items()} == {
        "tensorrt-rtx-fp16": (None, ["cast"], ""),
        "tensorrt-rtx-fp16-sparse": ("tensorrt-rtx-fp16", ["sparsify", "cast"], ""),
        "tensorrt-rtx-fp16-2": (None, ["cast"], ""),
        "tensorrt-rtx-fp16-2-sparse": ("tensorrt-rtx-fp16-2", ["sparsify", "cast"], ""),
        "onnxruntime-cpu-fp16": (None, ["cast"], ""),
        "onnxruntime-cpu-fp16-sparse": (
            "onnxruntime-cpu-fp16", [], "onnxruntime-cpu has no kernels for 2:4 sparse weights",
        ),
    }  # fmt: skip


def test_weights_are_zeroed_before_anything_is_lowered() -> None:
    found = variants("tensorrt-rtx:compute_capabilities=8.9", precisions=["fp32", "int8"], sparsify="2:4")
    assert passes(found["tensorrt-rtx-fp32-sparse"]) == ["sparsify"]
    assert passes(found["tensorrt-rtx-int8-sparse"]) == ["sparsify", *passes(found["tensorrt-rtx-int8"])]
    assert passes(found["tensorrt-rtx-int8"])[1].startswith("quantize-static")


def test_a_precision_that_the_target_does_not_build_is_not_made_sparse() -> None:
    found = variants("tensorrt-rtx", precisions=["fp8"], sparsify="2:4")
    assert passes(found["tensorrt-rtx-fp8-sparse"]) == []
    assert found["tensorrt-rtx-fp8-sparse"].refusal == ""


def test_an_engine_that_nothing_was_made_sparse_in_is_named() -> None:
    made = list(variants("tensorrt-rtx", precisions=["fp16"], sparsify="2:4").values())
    refusals = [{"reason": "already 2:4 sparse, and kept", "node": "conv"}]
    record: Any = {
        "variant": "x", "text": "sparsify", "engines": ["tensorrt-rtx-fp16-sparse"], "modified": False,
        "refusals": refusals,
    }  # fmt: skip
    cast: Any = {**record, "text": "cast:to=fp16", "modified": True, "refusals": []}
    assert without_effect(made, [record, cast]) == [
        "tensorrt-rtx-fp16-sparse is as tensorrt-rtx-fp16, nothing was made sparse: already 2:4 sparse, and kept"
    ]
    assert without_effect(made, [cast, cast]) == []


@pytest.mark.parametrize(
    ("target", "precision", "align", "expected"),
    [
        ("tensorrt-rtx", "fp16", "auto", ["align", "cast"]),
        ("tensorrt-rtx", "fp32", "auto", None),
        ("onnxruntime-cuda", "bf16", "auto", ["align", "cast:to=bf16"]),
        ("onnxruntime-cuda", "int8", "8", None),
        ("onnxruntime-cpu", "fp16", "auto", None),
        ("onnxruntime-cpu", "fp32", "64", ["align:multiple=64"]),
        ("onnxruntime-cpu", "fp16", "off", None),
        ("torchscript", "fp32", "8", None),
    ],
)
def test_an_engine_with_aligned_dimensions_stands_behind_each_plain_one(target, precision, align, expected) -> None:
    found = variants(target, precisions=[precision], align=align)
    plain = f"{target}-{precision}"
    assert list(found) == [plain] + [f"{plain}-aligned"] * (expected is not None)
    if expected is not None:
        assert passes(found[f"{plain}-aligned"]) == expected
        assert found[f"{plain}-aligned"].sibling == plain


def test_8_bits_are_aligned_to_16_before_they_are_quantized() -> None:
    found = variants("tensorrt-rtx:compute_capabilities=8.9", precisions=["int8"], align="auto", sparsify="2:4")
    assert passes(found["tensorrt-rtx-int8-aligned"]) == ["align:multiple=16", *passes(found["tensorrt-rtx-int8"])]
    assert list(found) == ["tensorrt-rtx-int8", "tensorrt-rtx-int8-sparse", "tensorrt-rtx-int8-aligned"]


def test_an_engine_that_nothing_was_aligned_in_is_named() -> None:
    made = list(variants("onnxruntime-cpu", align="8").values())
    refusals = [{"reason": "every dimension of its products is a multiple of 8", "node": ""}]
    record: Any = {"variant": "x", "engines": ["onnxruntime-cpu-fp32-aligned"], "modified": False, "refusals": refusals}
    assert without_effect(made, [record]) == [
        "onnxruntime-cpu-fp32-aligned is as onnxruntime-cpu-fp32, nothing was aligned: "
        "every dimension of its products is a multiple of 8"
    ]


def test_options_that_no_pass_has() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown option of quantization 'rouding'\n(.*\n)*.*mean 'rounding'"):
        variants("onnxruntime-cpu", precisions=["int8"], quantization={"rouding": "gptq"})
    with pytest.raises(RecipeError, match="option 'rounding' of 'quantize-static' has an unknown value"):
        variants("onnxruntime-cpu", precisions=["int8"], quantization={"rounding": "up"})


def test_pruned_engines_stand_beside_whole_ones_with_sizes_that_the_target_likes() -> None:
    found = variants("onnxruntime-cpu", "torchscript", precisions=["fp32", "int8"], prune="macs=0.7")
    assert list(found) == [
        "onnxruntime-cpu-fp32",
        "onnxruntime-cpu-fp32-pruned",
        "onnxruntime-cpu-int8",
        "onnxruntime-cpu-int8-pruned",
        "torchscript-fp32",
        "torchscript-int8",
    ]
    assert passes(found["onnxruntime-cpu-fp32-pruned"]) == ["prune:macs=0.7,multiple=16"]
    assert passes(found["onnxruntime-cpu-int8-pruned"]) == ["prune:macs=0.7,multiple=16", "quantize-static"]
    assert found["onnxruntime-cpu-int8-pruned"].sibling == "onnxruntime-cpu-int8"


def test_latency_is_meant_on_the_target_of_the_engine() -> None:
    found = variants("onnxruntime-cpu:threads=1", prune="latency=0.7x")
    (step,) = found["onnxruntime-cpu-fp32-pruned"].passes
    assert str(step) == "prune:latency=0.7,multiple=16,on=onnxruntime-cpu:threads=1"


def test_options_of_pruning_come_from_the_recipe_as_they_are() -> None:
    options = {"importance": "hessian", "multiple": 4, "keep": ["head", "*/a"], "refit": False}
    found = variants("onnxruntime-cpu", prune=0.3, pruning=options)
    assert passes(found["onnxruntime-cpu-fp32-pruned"]) == [
        "prune:ratio=0.3,importance=hessian,refit=false,multiple=4,keep=head+*/a"
    ]
    with pytest.raises(UnknownNameError, match="unknown option of 'prune' 'importence'"):
        variants("onnxruntime-cpu", prune=0.3, pruning={"importence": "l1"})
    with pytest.raises(RecipeError, match="options of pruning are given, and nothing is to be pruned"):
        variants("onnxruntime-cpu", pruning=options)


def test_a_pruned_engine_gets_its_own_sparse_and_aligned_ones() -> None:
    found = variants("tensorrt-rtx", precisions=["fp16"], prune=0.3, sparsify="2:4", align="8")
    assert set(found) >= {f"tensorrt-rtx-fp16{end}" for end in ("", "-pruned", "-pruned-sparse", "-pruned-aligned")}
    sparse, aligned = (found[f"tensorrt-rtx-fp16-pruned-{end}"] for end in ("sparse", "aligned"))
    assert sparse.sibling == aligned.sibling == "tensorrt-rtx-fp16-pruned"
    assert [text.split(":")[0] for text in passes(sparse)][:2] == ["prune", "sparsify"]
    assert [text.split(":")[0] for text in passes(aligned)][:2] == ["prune", "align"]


DECODING = {"passes": ["simplify", "fuse-attention"], "precisions": ["fp32"]}


def test_an_engine_with_sparse_attention_stands_beside_the_one_with_fused_attention() -> None:
    found = variants("onnxruntime-cpu", **DECODING, sparse_attention="window=512,sinks=4", prune=0.3, align="8")
    assert list(found) == [
        f"onnxruntime-cpu-fp32{end}"
        for end in ("", "-sparse-attention", "-aligned", "-pruned", "-pruned-sparse-attention", "-pruned-aligned")
    ]
    sparse = found["onnxruntime-cpu-fp32-sparse-attention"]
    assert (sparse.sibling, sparse.refusal) == ("onnxruntime-cpu-fp32", "")
    assert passes(sparse) == ["sparse-attention:window=512,sinks=4"]
    assert passes(found["onnxruntime-cpu-fp32-pruned-sparse-attention"])[1:] == passes(sparse)
    (auto,) = passes(variants("onnxruntime-cpu", **DECODING, sparse_attention="auto")[sparse.name])
    assert auto == "sparse-attention"


@pytest.mark.parametrize(
    ("target", "fields", "reason"),
    [
        ("onnxruntime-cpu", {"passes": ["simplify"]}, "attention is not fused, .* add --pass fuse-attention"),
        ("openvino", {}, "openvino has no operator for attention over a cache"),
        ("torchscript", {}, "torchscript has no operator for attention over a cache"),
    ],
)
def test_where_sparse_attention_has_nothing_to_be_made_of(target, fields, reason) -> None:
    found = variants(target, **{**DECODING, **fields}, sparse_attention="auto")
    assert list(found) == [f"{target}-fp32", f"{target}-fp32-sparse-attention"]
    sparse = found[f"{target}-fp32-sparse-attention"]
    assert passes(sparse) == []
    assert re.match(reason, sparse.refusal)


def test_an_engine_without_a_layer_that_attends_sparsely_is_named() -> None:
    made = list(variants("onnxruntime-cpu", **DECODING, sparse_attention="auto").values())
    refusals = [{"reason": "attention stays dense: it costs too much", "node": "layer"}]
    engines = ["onnxruntime-cpu-fp32-sparse-attention"]
    record: Any = {"variant": "x", "engines": engines, "modified": False, "refusals": refusals}
    assert without_effect(made, [record]) == [
        "onnxruntime-cpu-fp32-sparse-attention is as onnxruntime-cpu-fp32, nothing was attended to sparsely: "
        "attention stays dense: it costs too much"
    ]
