from __future__ import annotations

import pytest

from enginesmith.compiler.diagnosis.bounds import Measured, Roof
from enginesmith.compiler.diagnosis.roofline import excess
from enginesmith.compiler.graph.work import Work
from enginesmith.targets.profile import LayerTime

LAYER = LayerTime("conv", "Conv", 1.0, "cpu")
COMPUTE = Work(flops=1e8, heavy=1e8, moved_bytes=1e5)
BANDWIDTH = Work(flops=1e4, moved_bytes=1e8)
TINY = Work(flops=10, moved_bytes=80)


@pytest.mark.parametrize(("work", "bound"), [(COMPUTE, "compute"), (BANDWIDTH, "bandwidth"), (TINY, "launch")])
def test_what_limits_a_layer_is_the_largest_part(cpu, work, bound):
    roof = Roof(cpu, 1e8)
    assert roof.bound(LAYER, work) == bound
    parts = roof.parts_ms(work)
    assert roof.limit_ms(work) == pytest.approx(max(parts["compute"], parts["bandwidth"]) + 0.001)


def test_weights_are_as_far_away_as_a_call_is_large(cpu):
    weights = Work(flops=1e6, heavy=1e6, weight_bytes=1e6)
    assert Roof(cpu, 1e6).bound(LAYER, weights) == "compute" or Roof(cpu, 1e6).limit_ms(weights) < 0.02
    assert Roof(cpu, 1e8).bound(LAYER, weights) == "bandwidth"
    assert Roof(cpu, 1e8).limit_ms(weights) == pytest.approx(0.1 + 0.001)


def test_where_a_layer_ran_comes_first(cpu, gpu):
    copy = LayerTime("m", "MemcpyToHost", 1.0, "cuda", transfer=True)
    assert Roof(gpu(), 1e6).bound(copy, COMPUTE) == "transfer"
    assert Roof(gpu(), 1e6).bound(LAYER, COMPUTE) == "cpu-placed"
    assert Roof(cpu, 1e6).bound(LAYER, COMPUTE) == "compute"


def test_without_its_work_only_a_short_layer_is_classified(cpu):
    roof = Roof(cpu, 1e6)
    assert roof.bound(LAYER, None) == "unknown"
    assert roof.bound(LayerTime("r", "Reorder", 0.001, "cpu"), None) == "launch"


def test_a_cuda_graph_has_cheaper_launches(gpu):
    assert Roof(gpu(), 1e6).parts_ms(TINY)["launch"] == 0.004
    assert Roof(gpu(), 1e6, graphed=True).parts_ms(TINY)["launch"] == 0.001


def test_savings_keep_the_share_of_the_ceiling(cpu):
    roof = Roof(cpu, 1e8)
    slow = Measured(LAYER, (), 4 * roof.limit_ms(COMPUTE), COMPUTE, roof.limit_ms(COMPUTE), "compute")
    narrow = COMPUTE.scaled(moved=0.25, precision="int8")
    saved = slow.saved_ms(roof, narrow)
    assert saved == pytest.approx(4 * (roof.limit_ms(COMPUTE) - roof.limit_ms(narrow)))
    assert slow.saved_ms(roof, COMPUTE.scaled(flops=2)) < 0
    assert slow.saved_ms(roof, COMPUTE, aligned_before=False) == pytest.approx(slow.ms * (1 - 1.001 / 2.001))
    assert Measured(LAYER, (), 1.0, None, None, "unknown").saved_ms(roof, narrow) == 0.0


@pytest.mark.parametrize(
    ("times", "call_ms", "expected"),
    [
        ([1.0, 2.0], 4.0, (0.0, 1.0)),
        ([1.0, 2.0, 4.0], 4.0, (1.0, 1.0)),
        ([1.0, 2.0, 4.0], 5.5, (0.5, 1.0)),
        ([1.0, 2.0, 4.0], 2.0, (1.0, 0.5)),
        ([], 1.0, (0.0, 1.0)),
        ([2.0, 2.0], 1.0, (1.5, 1.0)),
    ],
)
def test_what_a_profiler_adds(times, call_ms, expected):
    assert excess(times, call_ms) == pytest.approx(expected)
    each_ms, scale = expected
    assert sum((ms - each_ms) * scale for ms in times) <= call_ms or sum(times) <= call_ms
