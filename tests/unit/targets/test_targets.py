"""What every target promises of its precisions."""

import dataclasses

import pytest

from enginesmith.passes import parse_pass
from enginesmith.targets import TARGETS, parse_target


@pytest.mark.parametrize("name", TARGETS)
def test_each_precision_is_lowered_by_passes_that_exist(name):
    target = parse_target(name)
    takes_graph = target.capabilities.consumes == "graph"
    for precision in target.capabilities.precisions:
        passes = [text for text in target.lowering(precision) if not text.startswith("partition:")]
        by_itself = name == "openvino" and precision == "bf16"  # it lowers when it loads the graph
        assert bool(passes) == (takes_graph and precision != "fp32" and not by_itself)
        for text in passes:
            parse_pass(text)


@pytest.mark.parametrize("name", TARGETS)
def test_each_rewrite_is_a_pass(name):
    target = parse_target(name)
    for precision in target.capabilities.precisions:
        rewrites = target.rewrites(precision)
        assert bool(rewrites) == (target.capabilities.consumes == "graph")
        assert [str(parse_pass(text)).partition(":")[0] for text in rewrites] == [t.partition(":")[0] for t in rewrites]


@pytest.mark.parametrize("text", [*TARGETS, "torch-inductor:device=cuda"])
def test_each_tuning_changes_options_that_the_target_has(text):
    target = parse_target(text)
    for precision in target.capabilities.precisions:
        tunings = target.tunings(precision)
        assert tunings
        assert len({tuning.what for tuning in tunings}) == len(tunings)
        for tuning in tunings:
            assert tuning.alternatives
            for options in tuning.alternatives:
                other = dataclasses.replace(target, **options)
                assert other != target
                assert parse_target(str(other)) == other


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_quick_is_tried_first(name):
    efforts = [tuning.effort for tuning in parse_target(name).tunings("fp32")]
    order = ("quick", "default", "thorough")
    assert [order.index(effort) for effort in efforts] == sorted(order.index(effort) for effort in efforts)
    assert efforts.count("quick") <= 2


@pytest.mark.parametrize("name", TARGETS)
def test_tensor_cores_take_precisions_that_the_target_builds(name):
    capabilities = parse_target(name).capabilities
    assert set(capabilities.alignment) <= set(capabilities.precisions) - {"fp32"}
    assert bool(capabilities.alignment) == (capabilities.devices == ("cuda",) and capabilities.consumes == "graph")
    assert {capabilities.alignment.get(precision, 16) for precision in ("int8", "fp8", "mixed")} == {16}


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp8"])
def test_onnxruntime_cuda_points_to_tensorrt_for_8_bits(precision):
    target = parse_target("onnxruntime-cuda")
    assert precision not in target.capabilities.precisions
    assert target.refusals()[precision].endswith("slower than in fp16; build it with target tensorrt")


def test_onnxruntime_cpu_has_no_bfloat16():
    assert (
        parse_target("onnxruntime-cpu").refusals()["bf16"].startswith("ONNX Runtime has no bfloat16 kernels for CPUs")
    )


def test_only_tensorrt_has_kernels_for_sparse_weights():
    patterns = {name: parse_target(name).capabilities.sparsity for name in TARGETS}
    assert {name for name, found in patterns.items() if found} == {"tensorrt", "tensorrt-rtx"}
    assert patterns["tensorrt"] == patterns["tensorrt-rtx"] == ("2:4",)
