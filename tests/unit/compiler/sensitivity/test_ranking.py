from __future__ import annotations

import math

import numpy as np
import pytest

from enginesmith.compiler.budget import Budget
from enginesmith.compiler.graph.selection import label
from enginesmith.compiler.sensitivity import Evaluation, choose, rank, split

TEXT = """g (float[N] x) => (float[N] y) { [a] u = Neg(x)  [b] v = Neg(u)  [c] w = Neg(v)  [d] y = Neg(w) }"""


class Samples(list):
    description = "made up"
    random = False


SAMPLES = Samples([{"x": np.float32([1, 2])}, {"x": np.float32([-3, 4])}])
ERRORS = {"a": 0.02, "b": 0.0, "c": 0.5, "d": 0.1}
COSTS = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}


class Harness:
    """Lowering a node puts a factor of 1 + its error behind it; one that is infinite makes NaN."""

    def __init__(self, read, budget: str, errors=ERRORS, batches: int = 2) -> None:
        self.graph = read(TEXT)
        self.read, self.errors = read, errors
        self.evaluation = Evaluation(self.graph, SAMPLES, Budget.parse(budget), batches=batches)
        self.units = split(self.graph, [label(node) for node in self.graph.nodes()])

    def lower(self, kept):
        lines, values = [], iter("uvwy")
        before = "x"
        for name, value in zip("abcd", values, strict=True):
            error = 0.0 if name in kept else self.errors[name]
            operator = f"Mul(t{value}, k{value})" if error else f"Identity(t{value})"
            factor = "nan" if math.isinf(error) else 1 + error
            lines.append(
                f"t{value} = Neg({before})  k{value} = Constant<value_float = {factor}>()  {value} = {operator}"
            )
            before = value
        if set(kept) >= {name for name, error in self.errors.items() if error}:
            return self.graph.clone()
        return self.read(f"g (float[N] x) => (float[N] y) {{ {'  '.join(lines)} }}")

    def cost(self, labels):
        return sum(COSTS[name] for name in labels)

    def rank(self):
        return rank(self.lower, self.units, self.evaluation, self.cost)

    def choose(self):
        return choose(self.lower, self.rank(), self.evaluation, self.cost)


def test_units_are_ranked_by_the_error_that_each_makes_alone(read):
    harness = Harness(read, "relative_l2=0.1")
    ranking = harness.rank()
    assert [entry.unit.name for entry in ranking] == ["c", "d", "a", "b"]
    assert [entry.error for entry in ranking] == pytest.approx([0.5, 0.1, 0.02, 0.0], abs=1e-6)
    assert ranking[0].record() == {"unit": "c", "nodes": ["c"], "error": ranking[0].error, "cost": 0.2}
    assert harness.evaluation.runs == 3  # lowering "b" changes nothing


def test_as_few_stay_as_the_budget_needs(read):
    choice = Harness(read, "relative_l2=0.13").choose()
    assert choice.chosen.kept == {"c"}
    assert choice.chosen.value == pytest.approx(1.02 * 1.1 - 1, abs=1e-6)
    assert [(point.units, point.holds) for point in choice.curve] == [(0, False), (1, True)]
    assert [round(point.cost, 3) for point in choice.curve] == [0, 0.2]
    assert choice.chosen.record()["holds"] is True


def test_nothing_stays_where_the_budget_holds_at_once(read):
    assert Harness(read, "relative_l2=9").choose().chosen.kept == frozenset()


def test_everything_stays_where_nothing_fits(read):
    choice = Harness(read, "relative_l2=0.001").choose()
    assert choice.chosen.kept == {"a", "c", "d"}
    assert choice.chosen.value == 0


def test_cheaper_units_stay_in_place_of_a_dearer_one(read):
    errors = {"a": 0.1, "b": 0.12, "c": 0.09, "d": 0.0}
    choice = Harness(read, "relative_l2=0.13", errors).choose()
    assert choice.chosen.kept == {"a", "c"}  # "b", the worst, costs more than both
    assert [point.units for point in choice.curve if point.units is not None] == [0, 1, 2]


def test_units_are_won_back_where_the_budget_still_holds(read):
    """The second half of the unit is what harms, so that its heavy node is lowered after all."""
    text = """g (float[N,1] x) => (float[N,1] y) <float[1,1] w = {1}, float k = {%s}> {
        [heavy] a = MatMul(x, w)  [light] y = Mul(a, k) }"""
    graph = read(text % 1)
    samples = Samples([{"x": np.float32([[1]])}])
    evaluation = Evaluation(graph, samples, Budget("relative_l2", 0.1), batches=1)
    units = split(graph, ["heavy", "light"])
    assert [unit.nodes for unit in units] == [("heavy", "light")]

    def lower(kept):
        return read(text % (1 if "light" in kept else 1.5))

    def cost(labels):
        return float("heavy" in labels)

    choice = choose(lower, rank(lower, units, evaluation, cost), evaluation, cost)
    assert choice.chosen.kept == {"light"}
    assert choice.chosen.units is None


def test_a_unit_that_makes_nan_stays(read):
    harness = Harness(read, "top1=0", {"a": math.inf, "b": 0.0, "c": 0.0, "d": 0.01})
    assert harness.rank()[0].record()["error"] is None
    harness = Harness(read, "relative_l2=1", {"a": math.inf, "b": 0.0, "c": 0.0, "d": 0.01})
    assert harness.choose().chosen.kept == {"a"}


def test_batches_bound_what_is_measured(read):
    class Endless(Samples):
        def __iter__(self):
            while True:
                yield SAMPLES[0]

    assert Evaluation(read(TEXT), Endless(), Budget("relative_l2", 1), batches=1).runs == 0


def test_labels_reach_the_metric(read):
    class Labelled(Samples):
        def labelled(self):
            for sample in self:
                yield {**sample, "label": np.int64(7)}

    seen = []
    budget = Budget("metric", 0.1, lambda outputs, inputs: seen.append(int(inputs["label"])) or 1.0)
    evaluation = Evaluation(read(TEXT), Labelled(SAMPLES), budget, batches=2)
    assert evaluation.measure(read(TEXT)).holds
    assert set(seen) == {7}
