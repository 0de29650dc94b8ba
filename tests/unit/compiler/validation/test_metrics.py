"""Tests of the judge: it must fail every kind of wrong output, and pass honest rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from enginesmith.compiler.validation.metrics import TOLERANCES, Judge, coarser, compare, resolve_tolerance
from enginesmith.errors import RecipeError, UnknownNameError

Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.asarray(load_digits().images[:64, None] / 16, np.float32)


@pytest.fixture(scope="module")
def network(images: np.ndarray) -> torch.nn.Module:
    """A digits classifier, trained enough to have an opinion."""
    torch.manual_seed(0)
    labels = torch.from_numpy(load_digits().target[:64])
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(torch.from_numpy(images)), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@torch.no_grad()
def run(network: torch.nn.Module, images: np.ndarray) -> Outputs:
    """Two outputs of one shape: the scores, and what stands for a second head."""
    scores = network(torch.from_numpy(images)).numpy()
    return {"logits": scores, "other": np.ascontiguousarray(np.tanh(scores[:, ::-1]))}


def altered(
    network: torch.nn.Module, change: Callable[[torch.nn.Parameter], torch.Tensor], *, only: str = ""
) -> torch.nn.Module:
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if only in name:
                weight.copy_(change(weight))
    return other


def flip_one(weight: torch.Tensor) -> torch.Tensor:
    """Flips the sign of the weight whose magnitude is above nine tenths of the others."""
    flat = weight.clone().flatten()
    flat[flat.abs().argsort()[flat.numel() * 9 // 10]] *= -1
    return flat.reshape(weight.shape)


def judge(reference: Outputs, outputs: Outputs, precision: str = "fp32") -> dict[str, list[str]]:
    """The failures by output."""
    judged = Judge(resolve_tolerance(precision))
    judged.update(reference, outputs)
    return {metrics["output"]: metrics["failures"] for metrics in judged.metrics()}


WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros": np.zeros_like,
    "ones": np.ones_like,
    "noise": lambda r: np.random.default_rng(0).standard_normal(r.shape).astype(r.dtype),
    "nan everywhere": lambda r: np.full_like(r, np.nan),
    "one nan": lambda r: np.where(np.arange(r.size).reshape(r.shape) == 77, np.nan, r).astype(r.dtype),
    "one inf": lambda r: np.where(np.arange(r.size).reshape(r.shape) == 77, np.inf, r).astype(r.dtype),
    "rows permuted": lambda r: np.roll(r, 1, axis=0),
    "first row everywhere": lambda r: np.repeat(r[:1], len(r), axis=0),
    "shifted": lambda r: r + np.float32(0.5) * np.abs(r).max(),
    "scaled by 1.2": lambda r: r * np.float32(1.2),
    "negated": lambda r: -r,
    "half the batch zero": lambda r: np.where(np.arange(len(r))[:, None] < len(r) // 2, r, 0).astype(r.dtype),
    "one row zero": lambda r: np.where(np.arange(len(r))[:, None] == 3, 0, r).astype(r.dtype),
    "classes reversed": lambda r: np.ascontiguousarray(r[:, ::-1]),
}


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_fail_in_every_precision(
    network: torch.nn.Module, images: np.ndarray, wrong: str, precision: str
) -> None:
    reference = run(network, images)
    # One wrong row of 64 is a relative L2 of 0.125, which int8 allows; the worst of 16 small samples decides here.
    parts = np.array_split(np.arange(len(images)), 16)
    for name in reference:
        changed = WRONG[wrong](reference[name])
        judged = Judge(resolve_tolerance(precision))
        for part in parts:
            outputs = {**reference, name: changed}
            judged.update({k: v[part] for k, v in reference.items()}, {k: v[part] for k, v in outputs.items()})
        verdicts = {metrics["output"]: metrics["passed"] for metrics in judged.metrics()}
        assert not verdicts.pop(name), f"{wrong} passed on {name}"
        assert all(verdicts.values())


def test_a_small_shift_fails_in_fp32(network: torch.nn.Module, images: np.ndarray) -> None:
    reference = run(network, images)
    shifted = {name: array + np.float32(1e-3) for name, array in reference.items()}
    assert all(judge(reference, shifted).values())


def test_one_flipped_weight_fails(network: torch.nn.Module, images: np.ndarray) -> None:
    reference = run(network, images)
    for layer in ("0.weight", "3.weight", "6.weight"):
        found = judge(reference, run(altered(network, flip_one, only=layer), images))
        assert any("relative_l2" in reason for reason in found["logits"]), layer


@pytest.mark.parametrize("precision", list(TOLERANCES))
def test_weights_scaled_fail_although_cosine_is_nearly_one(
    network: torch.nn.Module, images: np.ndarray, precision: str
) -> None:
    scaled = run(altered(network, lambda weight: weight * 1.2, only="6."), images)
    reference = run(network, images)
    (reason,) = (r for r in judge(reference, scaled, precision)["logits"] if "relative_l2" in r)
    assert "relative_l2 is 0.2, allowed" in reason
    assert compare(reference["logits"], scaled["logits"]).cosine == pytest.approx(1)


def test_the_reference_and_honest_rounding_pass(network: torch.nn.Module, images: np.ndarray) -> None:
    reference = run(network, images)
    assert not any(judge(reference, reference).values())
    exact = run(copy.deepcopy(network).double(), images.astype(np.float64))
    assert not any(judge(reference, {name: array.astype(np.float32) for name, array in exact.items()}).values())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_low_precision_passes_its_own_tolerance_and_not_that_of_fp32(
    network: torch.nn.Module, images: np.ndarray, precision: str, dtype: torch.dtype
) -> None:
    reference = run(network, images)
    with torch.no_grad():
        scores = copy.deepcopy(network).to(dtype)(torch.from_numpy(images).to(dtype)).float().numpy()
    outputs = {"logits": scores, "other": np.ascontiguousarray(np.tanh(scores[:, ::-1]))}
    assert not any(judge(reference, outputs, precision).values())
    assert any("relative_l2" in reason for reason in judge(reference, outputs)["logits"])


def test_swapped_outputs_fail_and_are_named(network: torch.nn.Module, images: np.ndarray) -> None:
    reference = run(network, images)
    found = judge(reference, {"logits": reference["other"], "other": reference["logits"]})
    assert "equals the engine's output 'other': outputs are swapped" in found["logits"]
    assert "equals the engine's output 'logits': outputs are swapped" in found["other"]


@pytest.mark.parametrize(
    ("outputs", "output", "message"),
    [
        ({}, "y", "is missing; the engine gives nothing"),
        ({"z": np.ones(3, np.float32)}, "y", "is missing; the engine gives z"),
        ({"y": np.ones(3, np.float32), "z": np.ones(3)}, "z", "the reference has no such output"),
        ({"y": np.ones(4, np.float32)}, "y", "shape is (4,), expected (3,)"),
        ({"y": np.ones((3, 1), np.float32)}, "y", "shape is (3, 1), expected (3,)"),
        ({"y": np.ones(3, np.float16)}, "y", "dtype is float16, expected float32"),
        ({"y": np.ones(3, np.int64)}, "y", "dtype is int64, expected float32"),
    ],
)
def test_what_cannot_be_compared_fails_with_a_message(outputs: Outputs, output: str, message: str) -> None:
    assert message in judge({"y": np.ones(3, np.float32)}, outputs)[output]


def test_a_declared_dtype_is_accepted() -> None:
    judged = Judge(resolve_tolerance("fp16"), {"y": "float16"})
    judged.update({"y": np.ones(3, np.float32)}, {"y": np.ones(3, np.float16)})
    assert judged.metrics()[0]["passed"]


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_integers_and_booleans_are_exact(dtype: type) -> None:
    reference: Outputs = {"y": np.array([0, 1, 1, 0], dtype)}
    assert judge(reference, reference) == {"y": []}
    assert judge(reference, {"y": np.array([0, 1, 1, 1], dtype)}) == {"y": ["1 of 4 values differ"]}


def test_equal_nan_and_inf_of_the_reference_are_equal() -> None:
    reference = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    assert judge({"y": reference}, {"y": reference}) == {"y": []}


@pytest.mark.parametrize("values", [[1, 2, np.inf, -np.inf], [1, np.nan, np.inf, np.inf], [1, np.nan, 3, -np.inf]])
def test_other_nan_and_inf_than_those_of_the_reference_fail(values: list[float]) -> None:
    reference = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    found = judge({"y": reference}, {"y": np.array(values, np.float32)})
    assert found["y"][0] == "1 values are not the NaN or Inf that the reference has there"


def test_a_reference_of_nan_judges_nothing() -> None:
    reference = {"y": np.full(3, np.nan, np.float32)}
    assert judge(reference, reference) == {"y": ["the reference holds no finite value, so nothing can be judged"]}


def test_a_zero_reference_is_compared_absolutely() -> None:
    reference = {"y": np.zeros(4, np.float32)}
    assert judge(reference, {"y": np.full(4, 1e-6, np.float32)}) == {"y": []}
    assert judge(reference, {"y": np.full(4, 0.5, np.float32)})["y"] == [
        "relative_l2 is 1, allowed 0.0001",
        "max_abs is 0.5, allowed 0.001",
    ]


def test_a_mask_does_not_drown_the_rest() -> None:
    scores = np.random.default_rng(0).standard_normal((4, 6, 50)).astype(np.float32)
    for mask in (-1e9, np.finfo(np.float32).min):
        reference = {"y": np.where(np.arange(50) < 20, scores, np.float32(mask))}
        assert judge(reference, reference) == {"y": []}
        wrong = {"y": np.where(np.arange(50) < 20, -scores, np.float32(mask))}
        assert any("cosine is -1" in reason for reason in judge(reference, wrong)["y"])


def test_squares_do_not_overflow() -> None:
    reference = np.array([1e300, 2e300], np.float64)
    assert judge({"y": reference}, {"y": reference}) == {"y": []}
    assert compare(reference, reference * 1.2).relative_l2 == pytest.approx(0.2)


def test_complex_outputs_are_compared_by_both_parts() -> None:
    reference = {"y": np.array([1 + 2j, 3 - 1j], np.complex64)}
    assert judge(reference, reference) == {"y": []}
    assert judge(reference, {"y": reference["y"].conj()})["y"]


def test_the_worst_sample_decides() -> None:
    judged = Judge(resolve_tolerance("fp32"))
    good = {"y": np.ones((1, 4), np.float32)}
    for _ in range(50):
        judged.update(good, good)
    judged.update(good, {"y": np.full((1, 4), 1.01, np.float32)})
    (metrics,) = judged.metrics()
    assert metrics["relative_l2"] == pytest.approx(0.01, rel=1e-4)
    assert metrics["snr_db"] == pytest.approx(40, abs=0.01)
    assert not metrics["passed"]


def test_numbers_that_are_not_finite_are_none_in_the_record_and_fail() -> None:
    judged = Judge(resolve_tolerance("int8", {"relative_l2": 1e9, "max_abs": 1e9, "cosine": 0, "top1": 0}))
    judged.update({"y": np.ones(3, np.float32)}, {"y": np.array([1, np.nan, np.inf], np.float32)})
    (metrics,) = judged.metrics()
    assert (metrics["relative_l2"], metrics["cosine"], metrics["nan"], metrics["inf"]) == (None, None, 1, 1)
    assert "relative_l2 is nan, allowed 1e+09" in metrics["failures"]


def test_best_classes_are_counted_and_ties_agree() -> None:
    reference = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    reference[0, 6] = 7  # a tie of classes 6 and 7
    output = reference.copy()
    output[0, 6] += 1e-6
    output[1, 0] = 9
    found = compare(reference, output)
    assert (found.rows, found.top1, found.top5) == (4, 3, 4)
    flat = compare(reference, np.zeros_like(reference))
    assert (flat.top1, flat.top5) == (0, 0)


@pytest.mark.parametrize(
    "reference",
    [
        np.ones((3, 1), np.float32),
        np.ones(3, np.float32),
        np.ones((2, 3, 4), np.float32),
        np.array([[0.6, -0.8], [-1, 0]], np.float32),
    ],
)
def test_what_is_not_class_scores_has_no_best_class(reference: np.ndarray) -> None:
    assert compare(reference, reference).rows == 0


def test_probabilities_have_a_best_class() -> None:
    assert compare(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)).rows == 3


def test_class_scores_of_more_axes_are_known_by_name() -> None:
    reference = np.eye(4, dtype=np.float32).reshape(2, 2, 4)
    output = reference[:, :, [0, 1, 3, 2]]
    for scores, rows, top1 in (((), 0, None), (("logits",), 4, 0.5)):
        judge = Judge(resolve_tolerance("int8"), scores=scores)
        difference = judge.update({"logits": reference}, {"logits": output})["logits"]
        assert difference.rows == rows
        (found,) = judge.metrics()
        assert found["top1"] == top1


def test_a_bound_can_be_replaced() -> None:
    assert resolve_tolerance("fp32", {"max_abs": 0.5}) == {**TOLERANCES["fp32"], "max_abs": 0.5}


def test_unknown_precisions_and_bounds_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown precision 'fp61'"):
        resolve_tolerance("fp61")
    with pytest.raises(UnknownNameError, match="unknown tolerance 'max_ab'") as caught:
        resolve_tolerance("fp32", {"max_ab": 1})
    assert caught.value.hint == "did you mean 'max_abs'?"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "1"])
def test_bounds_that_nothing_can_miss_are_refused(value: float) -> None:
    with pytest.raises(RecipeError, match="tolerance 'relative_l2' is not a bound"):
        resolve_tolerance("fp32", {"relative_l2": value})


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_an_empty_reference_judges_nothing(dtype: type) -> None:
    reference = {"y": np.zeros((0, 3), dtype)}
    assert judge(reference, reference) == {"y": ["the reference is empty, of shape (0, 3), so nothing can be judged"]}


@pytest.mark.parametrize(
    ("precision", "dtypes", "expected"),
    [
        ("fp32", ["float32", "int64"], "fp32"),
        ("fp32", ["float32", "float16"], "fp16"),
        ("fp16", ["bfloat16"], "bf16"),
        ("fp16", ["float32"], "fp16"),
        ("int8", ["float16"], "int8"),
        ("fp32", [], "fp32"),
    ],
)
def test_the_coarser_of_engine_and_reference_sets_the_bounds(precision: str, dtypes: list[str], expected: str) -> None:
    assert coarser(precision, dtypes) == expected
