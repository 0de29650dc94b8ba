from __future__ import annotations

import numpy as np

from enginesmith.compiler.calibration.observe import observe

NET = """g (float[N,4] x) => (float[N,6] y) <float[4,6] w = {W}> { h = MatMul(x, w)  y = Relu(h) }"""
GENERATOR = np.random.default_rng(0)


def collect(read, columns: list[float], x: np.ndarray):
    values = ", ".join(str(number) for _ in range(4) for number in columns)
    return observe(read(NET.replace("W", values)), [{"x": np.asarray(x, np.float32)}], detail="full")


def told(statistics, limits=None) -> dict[tuple[str, str], object]:
    return {(finding.kind, finding.tensor): finding for finding in statistics.findings(limits)}


def test_nothing_to_tell(read):
    assert not told(collect(read, [1, 2, 1, 2, -1, -2], GENERATOR.standard_normal((64, 4))))


def test_dead_and_outlier_channels(read):
    found = told(collect(read, [1, -1, 1, 1, 0, 50], np.abs(GENERATOR.standard_normal((64, 4)))))
    assert str(found["dead-channels", "y"]) == "'y' is zero on all data in 2 of 6 channels (1, 4)"
    assert not found["dead-channels", "y"].severe
    assert (
        str(found["outlier-channels", "h"]) == "'h' reaches 50 times the median of its channels in 1 of 6 channels (5)"
    )
    mostly = told(collect(read, [0, 0, 0, 0, 1, 1], GENERATOR.standard_normal((64, 4))))
    assert mostly["dead-channels", "h"].severe


def test_one_sample_and_constant_inputs(read):
    found = told(collect(read, [1, 2, 1, 2, -1, -2], np.full((3, 4), 2)))
    assert found["one-sample", "x"].severe
    assert str(found["constant-input", "x"]) == "'x' is 2 everywhere in the data"
    assert found["constant-input", "x"].severe
    assert ("constant", "x") in found


def test_saturation_at_the_chosen_limits(read):
    statistics = collect(read, [1, 2, 1, 2, -1, -2], np.linspace(-1, 1, 4000).reshape(-1, 4))
    found = told(statistics, {"x": (-0.5, 1.0), "h": (-100, 100)})
    assert set(found) == {("saturated", "x")}
    assert "is clipped to -0.5 .. 1 in 2" in found["saturated", "x"].text
    np.testing.assert_allclose(statistics["x"].clipped(-0.5, 0.5), 0.5, atol=0.01)
