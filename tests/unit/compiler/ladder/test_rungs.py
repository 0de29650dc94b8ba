import dataclasses
from typing import ClassVar

import pytest

from enginesmith.compiler.ladder.rungs import Situation, own_rungs, planners, remaining
from enginesmith.compiler.ladder.trials import difference, new_step
from enginesmith.compiler.recipe import make_recipe
from enginesmith.compiler.variants import make_variants
from enginesmith.passes import parse_pass
from enginesmith.targets import parse_target
from enginesmith.targets.base import Tuning
from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu


def situation(target="onnxruntime-cpu", steps=(), **fields):
    recipe = make_recipe({"data": "data.npz", **fields})
    (start,) = make_variants(recipe, [parse_target(target) if isinstance(target, str) else target])
    return Situation(recipe, start, steps)


def tried(found):
    """Names of candidates by rung."""
    rungs = [planner(found) for planner in planners(found.incumbent.target, found.recipe)]
    return {
        rung.name: [variant.name.removeprefix(found.incumbent.target.name) for variant in rung.candidates]
        for rung in rungs
    }


def left_out(found):
    rungs = [planner(found) for planner in planners(found.incumbent.target, found.recipe)]
    return {what: reason for rung in rungs for what, reason in rung.left_out.items()}


def test_the_precisions_that_are_tried_grow_with_the_effort():
    quick, default, thorough = (tried(situation(effort=effort)) for effort in ("quick", "default", "thorough"))
    assert quick["precision"] == ["-fp16"]
    assert quick["quantization"] == ["-int8"]
    assert default["quantization"] == ["-int8", "-int8-dynamic"]
    assert thorough["quantization"] == ["-int8", "-int8-dynamic", "-int8-weights", "-int4-weights"]
    assert tried(situation(effort="quick", objective="size"))["quantization"] == thorough["quantization"]


def test_without_data_what_calibrates_is_left_out_with_the_reason():
    found = situation(data=None)
    assert tried(found)["quantization"] == ["-int8-dynamic"]
    assert left_out(found)["int8"].startswith("it needs calibration data")
    assert tried(situation(data=None, random_calibration=True))["quantization"] == ["-int8", "-int8-dynamic"]


def test_a_target_that_calibrates_by_itself_needs_data_too(monkeypatch):
    assert tried(situation("torch-inductor"))["quantization"] == []
    target = parse_target("torch-inductor:device=cuda")
    monkeypatch.setattr(type(target), "refusals", lambda _: {})
    assert tried(situation(target)) == {"precision": ["-fp16", "-bf16"], "quantization": ["-fp8"]}
    assert left_out(situation(target, data=None))["fp8"].startswith("it needs calibration data")


def test_mixed_precision_stands_in_for_what_was_not_close_enough():
    step = new_step("onnxruntime-cpu", "quantization", "int8", "onnxruntime-cpu-int8", "reverted", "not close enough")
    assert tried(situation(steps=[step]))["mixed precision"] == ["-mixed"]
    timed = {**step, "ratio": {"against": "a", "ratio": 0.9, "low": 0.8, "high": 1.0}}
    assert tried(situation(steps=[timed]))["mixed precision"] == []
    assert tried(situation(steps=[step], effort="quick"))["mixed precision"] == []


def test_pruning_needs_a_budget_or_to_be_asked_for():
    assert tried(situation())["pruning"] == []
    assert tried(situation(budget="relative_l2=0.1"))["pruning"] == ["-fp32-pruned"]
    assert tried(situation(budget="relative_l2=0.1", effort="quick"))["pruning"] == []
    assert tried(situation(prune="0.3", effort="quick"))["pruning"] == ["-fp32-pruned"]
    blind = situation(budget="relative_l2=0.1", data=None, pruning={"importance": "obs"}, prune="macs=0.7")
    assert left_out(blind)["macs=0.7"].startswith("it needs calibration data")
    assert tried(situation(budget="relative_l2=0.1", data=None))["pruning"] == ["-fp32-pruned"]


def test_sparsity_is_tried_where_there_are_kernels_or_where_it_is_asked_for():
    budget = {"budget": "relative_l2=0.1"}
    assert tried(situation(**budget))["sparsity"] == []
    assert tried(situation("tensorrt-rtx", **budget))["sparsity"] == ["-fp32-sparse"]
    assert "no kernels for 2:4" in left_out(situation(sparsify="2:4"))["onnxruntime-cpu"]


def test_alignment_is_tried_where_there_are_tensor_cores():
    half = dataclasses.replace(situation("tensorrt-rtx").incumbent, precision="fp16", name="tensorrt-rtx-fp16")
    found = dataclasses.replace(situation("tensorrt-rtx"), incumbent=half)
    assert tried(found)["alignment"] == ["-fp16-aligned"]
    off = dataclasses.replace(situation("tensorrt-rtx", align="off"), incumbent=half)
    assert tried(off)["alignment"] == []
    assert tried(situation())["alignment"] == []
    assert tried(situation(align="8"))["alignment"] == ["-fp32-aligned"]


def test_a_target_that_takes_the_module_has_precisions_only():
    assert tried(situation("torch-inductor")) == {"precision": ["-fp16", "-bf16"], "quantization": []}


@dataclasses.dataclass(frozen=True)
class Tunable(OnnxRuntimeCpu):
    """Adds questions of two efforts."""

    name: ClassVar[str] = "tunable"

    def rewrites(self, precision):
        return ()

    def tunings(self, precision):
        return (
            Tuning("threads within an operator", ({"threads": 1}, {"threads": 2}), "quick"),
            Tuning("branches side by side", ({"inter_threads": 2},), "thorough"),
        )


def test_options_that_the_target_has_already_are_no_candidates():
    (rung,) = own_rungs(situation(Tunable(threads=1), effort="default"))
    assert rung.name == "threads within an operator"
    (candidate,) = rung.candidates
    assert (candidate.name, candidate.target.threads) == ("tunable-fp32-tuned", 2)
    assert difference(candidate, situation(Tunable(threads=1)).incumbent) == "threads=2"
    assert len(list(own_rungs(situation(Tunable(), effort="thorough")))) == 2


def test_a_rewrite_of_the_target_comes_behind_other_steps_once():
    found = situation("onnxruntime-cpu", effort="quick")
    cached, fuse, *_ = own_rungs(found)
    assert cached.name == "fuse-attention"
    (candidate,) = fuse.candidates
    assert (fuse.name, candidate.name) == ("fuse-transformer", "onnxruntime-cpu-fp32-fused")
    assert [rewrite.name for rewrite in candidate.passes] == ["fuse-transformer"]
    again = dataclasses.replace(found, incumbent=candidate)
    rungs = {rung.name: rung.candidates for rung in own_rungs(again)}
    assert rungs["fuse-transformer"] == ()
    (both,) = rungs["fuse-embeddings"]
    assert both.name == "onnxruntime-cpu-fp32-fused"
    assert [rewrite.name for rewrite in both.passes] == ["fuse-transformer", "fuse-embeddings"]


def test_what_is_ahead_is_counted():
    found = situation(Tunable(), effort="quick")
    assert remaining(planners(found.incumbent.target, found.recipe), found) == len(["fp16", "int8", "1", "2"])


@pytest.mark.parametrize("name", ["-tuned", "-tuned-3"])
def test_a_tuned_engine_is_tuned_once_in_its_name(name):
    tuned = dataclasses.replace(situation(Tunable()).incumbent, name=f"tunable-fp32{name}")
    found = dataclasses.replace(situation(Tunable()), incumbent=tuned)
    (rung,) = own_rungs(found)
    assert {variant.name for variant in rung.candidates} == {"tunable-fp32-tuned"}


def attending(found):
    (rung,) = (rung for rung in own_rungs(found) if rung.name == "sparse attention")
    return rung


def test_sparse_attention_is_tried_behind_fused_attention_where_it_is_asked_for():
    passes = ["simplify", "fuse-attention"]
    assert "sparse attention" not in [rung.name for rung in own_rungs(situation(passes=passes))]
    found = situation(passes=passes, sparse_attention="window=64")
    names = [rung.name for rung in own_rungs(found)]
    assert names.index("sparse attention") > names.index("fuse-attention")
    rung = attending(found)
    (candidate,) = rung.candidates
    assert rung.asked
    assert candidate.name == "onnxruntime-cpu-fp32-sparse-attention"
    assert [str(step) for step in candidate.steps] == ["sparse-attention:window=64"]
    assert attending(dataclasses.replace(found, incumbent=candidate)).candidates == ()


def test_sparse_attention_takes_what_the_ladder_fused():
    found = situation(sparse_attention="window=64")
    (reason,) = attending(found).left_out.values()
    assert "add --pass fuse-attention" in reason
    (fused,) = next(rung for rung in own_rungs(found) if rung.name == "fuse-attention").candidates
    (candidate,) = attending(dataclasses.replace(found, incumbent=fused)).candidates
    assert [step.name for step in candidate.steps] == ["fuse-attention", "sparse-attention"]


def test_sparse_attention_needs_data():
    found = situation(data=None, passes=["fuse-attention"], sparse_attention="window=64")
    assert attending(found).left_out["window=64"].startswith("it needs calibration data")


def caches_of(found, *, decodes=True):
    rungs = own_rungs(dataclasses.replace(found, decodes=decodes))
    return next((rung for rung in rungs if rung.name == "caches"), None)


def test_caches_are_stored_where_size_counts_or_there_is_time():
    for fields in ({"objective": "size", "effort": "quick"}, {"effort": "default"}, {"objective": "size=0.3"}):
        (variant,) = caches_of(situation(**fields)).candidates
        assert (variant.name, variant.sibling) == ("onnxruntime-cpu-fp32-fused-kv-cache", "onnxruntime-cpu-fp32")
        assert [step.name for step in variant.steps] == ["fuse-attention", "kv-cache"]
    (variant,) = caches_of(situation(passes=["simplify", "fuse-attention"])).candidates
    assert (variant.name, len(variant.steps)) == ("onnxruntime-cpu-fp32-kv-cache", 1)
    assert caches_of(situation(effort="quick")).candidates == ()
    assert caches_of(situation(), decodes=False) is None
    assert caches_of(situation(target="openvino")) is None


def test_caches_that_are_stored_already_are_not_again():
    found = situation(objective="size")
    (variant,) = caches_of(found).candidates
    assert caches_of(dataclasses.replace(found, incumbent=variant)).candidates == ()
    assert caches_of(situation(passes=["simplify", "fuse-attention", "kv-cache"])).candidates == ()


def test_caches_need_data_and_dense_attention():
    rung = caches_of(situation(data=None))
    assert rung.left_out["kv-cache"].startswith("it needs calibration data")
    found = situation()
    sparse = found.incumbent.with_step("sparse-attention", parse_pass("sparse-attention:window=8,sinks=1"))
    rung = caches_of(dataclasses.replace(found, incumbent=sparse))
    assert rung.left_out == {"kv-cache": "sparse attention reads caches as they are"}
