from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from enginesmith.compiler.calibration import CalibrationSettings, limits
from enginesmith.compiler.calibration import observe as module
from enginesmith.compiler.calibration.observe import DEFAULTS, observe
from enginesmith.compiler.calibration.reductions import Reduced
from enginesmith.compiler.graph import probe
from enginesmith.errors import DataError

NET = "g (float[N,2] x) => (float[N,2] y) <float k = {2}> { a = Mul(x, k)  i = Cast <to = 7> (a)  y = Sqrt(a) }"
MASKED = """g (float[N,3] x, bool[N,3] c) => (float[N,3] y) <float zero = {0}, float low = {LOW}> {
    m = Where(c, zero, low)  s = Add(x, m)  y = Softmax(s) }"""
GENERATOR = np.random.default_rng(0)


def batch(*rows: object) -> dict[str, np.ndarray]:
    return {"x": np.array(rows, np.float32).reshape(-1, 2)}


def ranges(statistics) -> dict[str, tuple[float, float]]:
    return {name: (tensor.low, tensor.high) for name, tensor in statistics.everything().items()}


def test_ranges_over_all_samples_and_empty_batches(read):
    graph = read(NET)
    before = graph.fingerprint()
    found = observe(graph, [batch((2, 8)), batch((0, 2), (3, 4)), batch()])
    assert ranges(found) == {"x": (0, 8), "a": (0, 16), "y": (0, 4)}
    assert found.samples == 3
    assert graph.fingerprint() == before


def test_ranges_of_finite_values_only(read):
    graph = read("g (float[N,2] x) => (float[N,2] y) { r = Sqrt(x)  b = IsNaN(r)  y = Where(b, x, r) }")
    found = observe(graph, [batch((-2, -1)), batch((4, 9))])
    assert set(found) == {"x", "y"}
    assert ranges(found)["r"] == (2, 3)
    assert found.left_out["r"].masked == 2
    assert observe(graph, [batch((-2, -1))]).empty == {"r"}


@pytest.mark.parametrize("low", ["-inf", "-3.4028235e38"])
def test_masks_are_left_out_and_told(read, low):
    text = MASKED.replace("LOW", low)
    inputs = {"x": np.float32([[1, 2, 3]]), "c": np.array([[True, False, True]])}
    found = observe(read(text), [inputs], detail="full")
    assert set(found) == {"x", "y"}
    assert set(found.left_out) == {"m", "s"}
    assert found.left_out["s"].histogram.counts.sum() == 2
    texts = {str(finding) for finding in found.findings() if finding.kind == "non-finite"}
    assert "'m' holds NaN, infinity or values beyond 1e30 (33.3% of it): it stays in floating point" in texts


def test_output_that_is_not_finite_names_the_tensor_where_it_begins(read):
    with pytest.raises(DataError, match=r"output 'y' is not finite(.|\n)*NaN first in tensor 'y', made by Sqrt"):
        observe(read(NET), [batch((-1, 1))])
    text = "g (float[N,2] x) => (float[N,2] y) { z = Exp(x)  d = Sub(z, z)  y = Relu(d) }"
    with pytest.raises(DataError, match=r"output 'y' is not finite(.|\n)*NaN first in tensor 'd', made by Sub"):
        observe(read(text), [batch((1, 100))])
    with pytest.raises(DataError, match=r"infinity first in tensor 'z', made by Exp"):
        observe(read("g (float[N,2] x) => (float[N,2] y) { z = Exp(x)  y = Abs(z) }"), [batch((1, 100))])


def test_stops_at_the_batch_that_reaches_the_limit(read):
    settings = CalibrationSettings(max_samples=2)
    found = observe(read(NET), [batch((1, 1)), batch((1, 1), (2, 2)), batch((3, 3))], settings=settings)
    assert (found.samples, found.distinct, found["x"].high) == (3, 2, 2)


CNN = """<ir_version: 8, opset_import: ["": OPSET]>
    g (float[N,3,40,40] x) => (float[N,16,20,20] y, float[N,5] z)
    <float[16,3,3,3] w, float[16,16,1,1] v, float[16,5] u> {
        c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        d = Conv(p, v)  y = Add(d, p)  g = GlobalAveragePool(y)  f = Flatten(g)  z = MatMul(f, u) }"""


@pytest.mark.parametrize("opset", [9, 13, 17, 18])
def test_images_are_reduced_by_channel_and_sampled(read, opset):
    weights = {"w": (16, 3, 3, 3), "v": (16, 16, 1, 1), "u": (16, 5)}
    text = CNN.replace("OPSET", str(opset))
    for name, shape in weights.items():
        sizes = ",".join(map(str, shape))
        values = ", ".join(f"{v:.4f}" for v in GENERATOR.standard_normal(int(np.prod(shape))))
        text = text.replace(f"float[{sizes}] {name}", f"float[{sizes}] {name} = {{{values}}}")
    graph = read(text)
    samples = [{"x": GENERATOR.standard_normal((8, 3, 40, 40)).astype(np.float32)} for _ in range(6)]
    found = observe(graph, samples, settings=DEFAULTS, detail="full")
    runs = [probe.Tapped(graph, list(found))(sample) for sample in samples]
    for name, tensor in found.items():
        array = np.concatenate([run[name] for run in runs])
        others = (0, 2, 3) if array.ndim == 4 else 0
        assert tensor.count == array.size
        assert tensor.channel_axis == (1 if array.ndim == 4 else -1)
        np.testing.assert_allclose([tensor.low, tensor.high], [array.min(), array.max()], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(tensor.channel_high, array.max(others), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tensor.channel_mean, array.mean(others), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(tensor.histogram.counts.sum(), array.size, rtol=1e-6)
        np.testing.assert_allclose(tensor.rms, np.sqrt(np.mean(array**2)), rtol=0.1)


def test_a_second_run_gives_the_same_statistics(read):
    samples = [{"x": GENERATOR.standard_normal((4, 2)).astype(np.float32) ** 2} for _ in range(3)]
    assert observe(read(NET), samples, detail="full").digest == observe(read(NET), samples, detail="full").digest


RESIDUAL = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,1,1] w = {WEIGHTS}, float[16] b = {BIASES}> {
        c = Conv(x, w, b)  s = Add(c, x)  r = Relu(s)  d = Conv(r, w)  y = Add(r, d) }"""


@pytest.fixture(scope="module")
def residual(read):
    text = RESIDUAL.replace("WEIGHTS", ", ".join(f"{v:.4f}" for v in GENERATOR.standard_normal(256)))
    return read(text.replace("BIASES", ", ".join(f"{v:.4f}" for v in np.linspace(-30, 30, 16))))


def test_extremes_of_images_are_exact_where_all_are_of_one_sign_too(residual):
    samples = [{"x": GENERATOR.standard_normal((4, 16, 8, 8)).astype(np.float32)} for _ in range(20)]
    found = observe(residual, samples, detail="full")
    runs = [probe.Tapped(residual, list(found))(sample) for sample in samples]
    for name in ("c", "d", "y"):
        array = np.concatenate([run[name] for run in runs])
        np.testing.assert_allclose(found[name].channel_low, array.min((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].channel_high, array.max((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert found["c"].channel_high.min() < 0 < found["c"].channel_low.max()


def test_the_order_of_names_changes_nothing(residual):
    names = ["y", "d", "c", "x", "r"]
    make = partial(Reduced, residual, axes={}, sampled=(), images=False, guarded=frozenset(), threads=1)
    assert make(names)._places == make(sorted(names))._places


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_runs_at_a_time_give_what_one_at_a_time_gives(read, at):
    """A tensor that turns out to hold NaN when later batches are on their way already."""
    graph = read("g (float[N,2] x) => (float[N,2] y) { r = Sqrt(x)  b = IsNaN(r)  y = Where(b, x, r) }")
    samples = [batch((4 + i, 9), (1, 16)) for i in range(6)]
    samples[at] = batch((-2, -1), (3, 5))
    one, two = (observe(graph, samples, None, CalibrationSettings(threads=n), "full") for n in (1, 2))
    assert one.digest == two.digest
    assert one.left_out["r"].masked == 2


STRUCTURED = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,3,48,48] x) => (float[N,24,48,48] y) <float[24,3,3,3] w = {WEIGHTS}, float[24] b = {BIASES}> {
        c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  y = Add(r, c)  t = Transpose<perm=[0,2,3,1]>(r)  z = Abs(t) }"""


@pytest.fixture(scope="module")
def structured(read):
    """Channels of sizes far apart, and stripes, a bright border and a bright corner in the images."""
    generator = np.random.default_rng(1)
    weights = generator.standard_normal((24, 27)) * np.geomspace(0.1, 3, 24)[:, None]
    text = STRUCTURED.replace("WEIGHTS", ", ".join(f"{v:.4f}" for v in weights.reshape(-1)))
    images = generator.standard_normal((12, 4, 3, 48, 48)).astype(np.float32)
    images[..., ::4] *= 4
    images[..., ::8, :] -= 3
    images[..., [0, -1], :] += 5
    images[:, :, :, 24:, 24:] *= np.float32(1.5)
    graph = read(text.replace("BIASES", ", ".join(f"{v:.4f}" for v in generator.standard_normal(24))))
    return graph, [{"x": batch} for batch in images]


def quantiles(histogram, shares: tuple[float, ...]) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    return np.interp(np.array(shares) * total[-1], total, histogram.edges)


def rounding_error(array: np.ndarray, low: float, high: float) -> float:
    """Mean square, in 8 bits."""
    step = (high - low) / 255
    least = round(low / step)
    return float(np.mean((np.clip(np.rint(array / step), least, least + 255) * step - array) ** 2))


def test_elements_stand_for_the_whole_tensor(structured, monkeypatch):
    graph, samples = structured
    sampled = observe(graph, samples, detail="full")
    monkeypatch.setattr(module, "SAMPLED", 1 << 20)
    whole = observe(graph, samples, detail="full")
    assert set(sampled) == {"x", "c", "r", "y", "t", "z"}
    for name, own in sampled.items():
        other = whole[name]
        array = np.concatenate([probe.Tapped(graph, [name])(sample)[name] for sample in samples])
        assert other.rms == pytest.approx(np.sqrt(np.mean(array.astype(np.float64) ** 2)), rel=1e-5)
        assert own.rms == pytest.approx(other.rms, rel=0.02)
        assert own.zeros == pytest.approx(other.zeros, rel=0.02)
        shares = (0.01, 0.1, 0.5, 0.9, 0.99)
        found, expected = (quantiles(statistics.histogram, shares) for statistics in (own, other))
        np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.02 * other.rms)
        errors = [rounding_error(array, *limits(statistics, "mse", symmetric=False)) for statistics in (own, other)]
        assert errors[0] < 1.25 * errors[1]  # the tail of a heavy-tailed tensor is known less well


def test_elements_are_chosen_by_the_seed_and_anew_in_each_batch(structured):
    graph, samples = structured

    def counts(batches: list[dict[str, np.ndarray]], seed: int) -> np.ndarray:
        found = observe(graph, batches, ["c"], CalibrationSettings(seed=seed), "full")
        return found["c"].histogram.counts

    np.testing.assert_array_equal(counts(samples[:2], 3), counts(samples[:2], 3))
    assert not np.array_equal(counts(samples[:1], 3), counts(samples[:1], 4))
    assert not np.array_equal(counts(samples[:1] * 2, 3), 2 * counts(samples[:1], 3))


def test_images_after_the_first_are_looked_at_seldom(read):
    """16 batches of value 2 are told by the last of them, and those of value 3 by their extremes alone."""
    text = "g (float[N,1,2,2] x) => (float[N,2] y) <float[2,1,1,1] w = {1,1}> { c = Conv(x, w)  p = GlobalMaxPool(c) "
    graph = read(text + " y = Flatten(p) }")
    values = [1] * 4 + [2] * 16 + [3] * 5
    found = observe(graph, [{"x": np.full((16, 1, 2, 2), v, np.float32)} for v in values], detail="full")
    image, rest = found["c"], found["y"]
    at = [int(v / image.histogram.width) - image.histogram.first for v in (1, 2)]
    np.testing.assert_allclose(image.histogram.counts[at], np.array([4, 16]) * 128 * 25 / 20)
    assert image.histogram.counts.sum() == pytest.approx(image.count)
    assert (image.low, image.high, *image.channel_high) == (1, 3, 3, 3)
    assert image.channel_mean == pytest.approx(np.full(2, (4 + 16 * 2) / 20))
    assert rest.channel_mean == pytest.approx(np.full(2, np.mean(values)))
    assert rest.histogram.counts.sum() == rest.count == 25 * 32
