"""What would help, estimated on layers whose times are made up."""

from __future__ import annotations

import dataclasses

import pytest

from enginesmith.compiler.diagnosis import actions as module
from enginesmith.compiler.diagnosis.actions import batching, cuda_graph, placement, preparation, rank, threads
from enginesmith.compiler.diagnosis.bounds import Measured, Roof
from enginesmith.compiler.diagnosis.fusing import fusing
from enginesmith.compiler.diagnosis.mapping import nodes_of
from enginesmith.compiler.diagnosis.reading import Reading
from enginesmith.compiler.diagnosis.rewrites import alignment, precisions, pruning, sparsity
from enginesmith.compiler.diagnosis.situation import Situation, action
from enginesmith.compiler.graph.work import Workload
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.targets import parse_target
from enginesmith.targets.base import EngineInfo
from enginesmith.targets.profile import LayerTime

SIGNATURE = Signature((TensorSpec("x", "float32", ("N", 30)),), axes={"N": AxisRange(1, 64, 256)})

NET = """g (float[N,30] x) => (float[N,16] y) <float[30,100] w, float[100,512] v, float[512,16] u> {
    [small] a = MatMul(x, w)  [relu] b = Relu(a)  [large] c = MatMul(b, v)  [gelu] d = Relu(c)
    [last] y = MatMul(d, u) }"""


def situation(fill, ceilings, text=NET, target="onnxruntime-cpu", precision="fp32", *, layers=None, **more):
    """An engine whose layers each are one node, and reach half of what they could."""
    workload = Workload(fill(text), {"N": 64})
    own = parse_target(target)
    options = more.pop("options", own.options())
    info = EngineInfo("e", own.name, precision, "", SIGNATURE, options, details=more.pop("details", {}))
    roof = Roof(ceilings, 1e6, more.pop("graphed", False))
    told = layers or [LayerTime(n.name, n.op_type, 0.0, ceilings.device) for n in workload.nodes()]
    measured = []
    for layer, nodes in zip(told, nodes_of(workload.graph, told), strict=True):
        work = workload.of(nodes) if nodes else None
        limit_ms = roof.limit_ms(work) if work else None
        ms = layer.ms or 2 * (limit_ms or 0.0)
        measured.append(Measured(layer, nodes, ms, work, limit_ms, roof.bound(layer, work)))
    total_ms = more.pop("total_ms", sum(layer.ms for layer in measured))
    return Situation(own, info, roof, tuple(measured), workload, SIGNATURE, {"N": 64}, total_ms, **more)


def made(rule, given):
    return {found["action"]: found for found in rule(given) if found}


def test_an_action_names_where_it_saves_most(fill, cpu):
    given = situation(fill, cpu)
    small, _, large, *_ = given.layers
    found = action("--x", "why", {small: 1.0, large: 2.0, given.layers[1]: -0.5}, beside_ms=0.25)
    assert (found["node"], found["nodes"], found["saves_ms"]) == ("large", ["large", "small"], 2.75)
    assert action("--x", "why", {small: -1.0}) is None
    assert action("--x", "why", {}) is None


def test_lower_precisions_save_by_the_ratio_of_ceilings(fill, cpu):
    given = situation(fill, cpu)
    found = made(precisions, given)
    assert {"--precision int8", "--precision int8-dynamic"} <= set(found)
    assert "--precision fp16" not in found, "ONNX Runtime computes it in fp32 on a CPU"
    large = given.layers[2]
    before = 2 * 64 * 100 * 512 / 100e9 * 1e3
    assert large.limit_ms == pytest.approx(before + 0.001)
    only = dataclasses.replace(given, layers=(large,), total_ms=large.ms)
    assert made(precisions, only)["--precision int8"]["saves_ms"] == pytest.approx(2 * 3 / 4 * before, rel=0.02)
    assert found["--precision int8"]["node"] == "large"
    assert "int8 products reach 4.0 times the rate of fp32 here" in found["--precision int8"]["why"]


def test_another_target_is_named_for_what_the_own_does_not_build(fill, cpu, monkeypatch):
    pytest.importorskip("openvino")
    from enginesmith.targets import openvino

    monkeypatch.setattr(openvino, "has_bf16", lambda: True)
    found = made(precisions, situation(fill, cpu))
    assert found["--target openvino --precision bf16"]["saves_ms"] > 0
    assert "--target openvino --precision int8" not in found, "the own target builds it"


def test_what_has_as_few_bits_already_is_not_lowered_again(fill, cpu):
    given = situation(fill, cpu)
    narrow = [
        dataclasses.replace(layer, work=layer.work.scaled(precision="int8")) if layer.work.heavy else layer
        for layer in given.layers
    ]
    found = made(precisions, dataclasses.replace(given, layers=tuple(narrow)))
    assert not [name for name in found if name.startswith("--precision int")]


def test_weights_alone_help_where_bandwidth_bounds_the_product(fill, cpu):
    text = "g (float[1,512] x) => (float[1,512] y) <float[512,512] w> { [p] y = MatMul(x, w) }"
    roof_far = dataclasses.replace(cpu, bandwidths=((1e3, 1.0), (1e9, 1.0)))
    found = made(precisions, situation(fill, roof_far, text))
    eight, four = found["--precision int8-weights"]["saves_ms"], found["--precision int4-weights"]["saves_ms"]
    total = 2 * (4 * 512 * 512 / 1e6 + 0.001)
    assert 0.6 * total < eight < four < 0.9 * total


def test_a_recurrent_layer_is_quantized_dynamically_alone(fill, cpu):
    text = """g (float[64,N,64] x) => (float[64,1,N,64] y) <float[1,256,64] w, float[1,256,64] r> {
        [lstm] y = LSTM<hidden_size = 64>(x, w, r) }"""
    found = made(precisions, situation(fill, cpu, text))
    assert found["--precision int8-dynamic"]["node"] == "lstm"
    assert "--precision int8" not in found
    assert "--precision int8-weights" not in found


def test_alignment_saves_the_rate_that_unaligned_products_lack(fill, gpu):
    ceilings = gpu(gflops={"fp32": 50.0, "fp16": 700.0}, unaligned_gflops={"fp16": 140.0})
    text = """g (float16[N,64] x) => (float16[N,16] y) <float16[64,1001] w = {W}, float16[1001,16] v = {V}> {
        [first] a = MatMul(x, w)  [relu] b = Relu(a)  [second] y = MatMul(b, v) }"""
    ones = {"W": 64 * 1001, "V": 1001 * 16}
    for name, count in ones.items():
        text = text.replace(f"{{{name}}}", "{" + ",".join(["1"] * count) + "}")
    given = situation(fill, ceilings, text, target="tensorrt", precision="fp16")
    (found,) = made(alignment, given).values()
    assert found["action"] == "--align 8"
    assert found["node"] == "first"
    assert set(found["nodes"]) == {"first", "second"}
    assert "1001 to 1008" in found["why"]
    assert "fp16 20%" in found["why"]
    aligned = dataclasses.replace(ceilings, unaligned_gflops={})
    assert made(alignment, situation(fill, aligned, text, target="tensorrt", precision="fp16")) == {}


def test_pruning_takes_what_may_shrink(fill, cpu):
    (found,) = made(pruning, situation(fill, cpu)).values()
    assert found["action"] == "--prune macs=0.75"
    assert found["node"] == "large"
    held = """g (float[N,30] x) => (float[N,16] y) <float[30,16] w> { [only] y = MatMul(x, w) }"""
    assert made(pruning, situation(fill, cpu, held)) == {}, "an output and an input are what they are"


def test_sparsity_is_for_targets_with_kernels(fill, cpu, gpu):
    assert made(sparsity, situation(fill, cpu)) == {}
    found = made(sparsity, situation(fill, gpu(), target="tensorrt"))
    assert found["--sparsify 2:4"]["saves_ms"] > 0


def test_larger_batches_share_what_a_call_pays_once(fill, cpu):
    given = situation(fill, cpu)
    slow = dataclasses.replace(given, total_ms=given.total_ms + 1.0)
    (found,) = made(batching, slow).values()
    (plain,) = made(batching, given).values()
    assert found["action"] == "larger batches: N=256"
    assert found["saves_ms"] - plain["saves_ms"] == pytest.approx(0.75), "three quarters of what is outside of layers"
    unseen = dataclasses.replace(slow, complete=False)
    assert made(batching, unseen)["larger batches: N=256"]["saves_ms"] == pytest.approx(plain["saves_ms"])
    largest = dataclasses.replace(given, sizes={"N": 256})
    assert made(batching, largest) == {}


TINY = "g (float[N,30] x) => (float[N,30] y) { [one] a = Relu(x)  [two] y = Exp(a) }"


def test_launches_within_a_cuda_graph(fill, gpu):
    options = {"cuda_graph": False}
    (found,) = made(cuda_graph, situation(fill, gpu(), TINY, "onnxruntime-cuda", options=options)).values()
    assert found["action"] == "--target onnxruntime-cuda:cuda_graph=true"
    assert found["saves_ms"] == pytest.approx(2 * 0.003)
    details = {"cuda_graph": {"used": False, "reason": "a node on the CPU"}}
    refused = situation(fill, gpu(), TINY, "onnxruntime-cuda", options={"cuda_graph": True}, details=details)
    (found,) = made(cuda_graph, refused).values()
    assert found["action"] == "make the CUDA graph possible"
    assert "a node on the CPU" in found["why"]
    assert made(cuda_graph, situation(fill, gpu(), TINY, "onnxruntime-cuda", graphed=True)) == {}


def test_threads_where_fewer_than_the_cores_are_used(fill, cpu, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 4)
    (found,) = made(threads, situation(fill, cpu, options={"threads": 1})).values()
    assert found["action"] == "--target onnxruntime-cpu:threads=4"
    given = situation(fill, cpu, options={"threads": 1})
    busy = sum(layer.ms for layer in given.layers if layer.bound in ("compute", "bandwidth"))
    assert found["saves_ms"] == pytest.approx(0.75 * busy)
    assert made(threads, situation(fill, cpu, options={"threads": None})) == {}
    assert made(threads, situation(fill, cpu, options={"threads": 4})) == {}


def test_nodes_on_the_cpu_of_an_engine_for_a_gpu(fill, gpu):
    layers = [
        LayerTime("one", "Relu", 0.5, "cpu"),
        LayerTime("copy", "MemcpyToHost", 0.2, "cuda", transfer=True),
        LayerTime("two", "Exp", 0.01, "cuda"),
    ]
    given = situation(fill, gpu(), TINY, "onnxruntime-cuda", layers=layers)
    (found,) = made(placement, given).values()
    assert found["nodes"] == ["one", "copy"]
    assert found["saves_ms"] == pytest.approx(0.7, rel=0.02)
    assert found["why"].startswith("Relu on the CPU")
    copies = situation(fill, gpu(), TINY, "onnxruntime-cuda", layers=layers[1:])
    assert list(made(placement, copies)) == ["keep inputs and outputs on the GPU (DLPack tensors)"]


def test_data_that_come_slower_than_the_engine_runs(fill, cpu):
    given = situation(fill, cpu, total_ms=2.0, reading=Reading("data", 3, 6.0, 6.0))
    (found,) = made(preparation, given).values()
    assert found["action"] == "prepare the data beforehand, or in several processes"
    assert found["saves_ms"] == 2.0, "what overlapping hides is the shorter of the two"
    assert "the engine waits for 75%" in found["why"]
    overlapping = dataclasses.replace(given, reading=Reading("data", 3, 0.5, 0.5))
    assert made(preparation, overlapping)["read the next batch while this one runs"]["saves_ms"] == 0.5
    assert made(preparation, dataclasses.replace(given, reading=None)) == {}


ATTENTION = """g (float[N,4,64,16] q, float[N,4,16,64] k, float[N,4,64,16] v) => (float[N,4,64,16] y)
<float s = {0.25}> {
    [scores] a = MatMul(q, k)  [scale] b = Mul(a, s)  [softmax] c = Softmax(b)  [values] d = MatMul(c, v)
    [after] y = Relu(d) }"""


def test_attention_in_one_kernel_moves_no_scores(fill, cpu):
    slow = dataclasses.replace(cpu, bandwidths=((1e3, 1.0), (1e9, 1.0)))
    given = situation(fill, slow, ATTENTION)
    (found,) = made(fusing, given).values()
    assert found["action"] == "--pass fuse-transformer:scheme=onnxruntime-cpu"
    assert set(found["nodes"]) == {"scores", "scale", "softmax", "values"}
    scores, inside = 4 * 64 * 4 * 64 * 64, 4 * 64 * 4 * 64 * 16
    apart = (2 * inside + scores) + 2 * scores + 2 * scores + (scores + 2 * inside)
    fused = 4 * inside
    assert found["saves_ms"] == pytest.approx(2 * (apart - fused) / 1e6, rel=0.02)
    assert made(fusing, situation(fill, cpu)) == {}, "there is no attention"
    signature = dataclasses.replace(given.info.signature, states={"past": "present"})
    cached = dataclasses.replace(given, info=dataclasses.replace(given.info, signature=signature))
    assert list(made(fusing, cached)) == ["--pass fuse-attention"]


def test_tables_that_are_read_side_by_side(fill, cpu):
    text = """g (int64[N] i, int64[N] j) => (float[N,8] y, float[N,8] z) <float[100,8] t, float[200,8] u> {
        [first] y = Gather(t, i)  [second] z = Gather(u, j) }"""
    (found,) = made(fusing, situation(fill, cpu, text)).values()
    assert found["action"] == "--pass fuse-embeddings"
    assert set(found["nodes"]) == {"first", "second"}
    one = """g (int64[N] i) => (float[N,8] y) <float[100,8] t> { [only] y = Gather(t, i) }"""
    assert made(fusing, situation(fill, cpu, one)) == {}


def test_the_best_comes_first_and_what_saves_little_is_left_out(fill, cpu):
    found = rank(situation(fill, cpu, reading=Reading("data", 3, 1e-6, 1e-6)))
    savings = [made["saves_ms"] for made in found]
    assert savings == sorted(savings, reverse=True)
    assert found
    assert not [made for made in found if made["action"].startswith("read the next")]
    assert {"action", "node", "nodes", "saves_ms", "why", "found", "found_ms"} == set(found[0])
