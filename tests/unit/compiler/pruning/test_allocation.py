import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.dimensions import Dim, Group
from enginesmith.compiler.pruning.allocation import Candidate, by_ratio, to_cost, to_share
from enginesmith.compiler.pruning.importance import Ranking


def candidate(name, scores, multiple=1, least=None, **options):
    """A dimension whose positions are worth these."""
    order = np.argsort(scores, kind="stable")
    loss = np.concatenate([[0.0], np.cumsum(np.asarray(scores, float)[order])])
    group = Group(name, Dim(len(scores)), (), frozenset())
    return Candidate(group, Ranking(order, loss), multiple, multiple if least is None else least, **options)


class Weighted:
    """Costs so much a position."""

    def __init__(self, costs):
        self._costs = costs

    def total(self, sizes):
        return sum(cost * sizes.get(dim, dim.size) for dim, cost in self._costs.items())

    def touched(self, dim, sizes):
        return self._costs[dim] * sizes[dim]


def named(candidates, sizes):
    return {c.group.name: sizes[c.group.dim] for c in candidates}


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [(32, 8, [32, 24, 16, 8]), (30, 8, [30, 24, 16, 8]), (9, 8, [9, 8]), (3, 1, [3, 2, 1]), (8, 8, [8])],
)
def test_sizes_are_multiples_and_never_none(size, multiple, expected):
    assert candidate("a", np.ones(size), multiple).sizes() == expected


@pytest.mark.parametrize(("wanted", "found"), [(20, 24), (19, 16), (0, 8), (40, 32), (29, 32)])
def test_the_nearest_size_and_the_larger_of_two(wanted, found):
    assert candidate("a", np.ones(32), 8).nearest(wanted) == found


def test_each_loses_its_share():
    candidates = [candidate("a", np.ones(32), 8), candidate("b", np.ones(64), 8), candidate("c", np.ones(16), 8)]
    sizes = by_ratio(candidates, {"a": 0.5, "b": 0.75, "c": 0.0})
    assert named(candidates, sizes) == {"a": 16, "b": 16, "c": 16}


def test_all_together_lose_the_least_important():
    candidates = [candidate("dead", np.full(32, 1e-6)), candidate("alive", np.ones(32))]
    assert named(candidates, to_share(candidates, 0.75)) == {"dead": 16, "alive": 32}
    assert named(candidates, to_share(candidates, 0.25)) == {"dead": 1, "alive": 15}


def test_what_saves_more_for_the_same_loss_goes_first():
    candidates = [candidate("cheap", np.ones(8)), candidate("dear", np.ones(8))]
    cheap, dear = (c.group.dim for c in candidates)
    sizes = to_cost(candidates, Weighted({cheap: 1.0, dear: 10.0}), 48)
    assert named(candidates, sizes) == {"cheap": 8, "dear": 4}


def test_a_step_looks_beyond_the_next_size():
    """The first position is dear, those after it are free: it pays to take them all at once."""
    far = candidate("far", np.ones(4))
    object.__setattr__(far.ranking, "loss", np.array([0.0, 2.0, 2.0, 2.0, 9.0]))
    near = candidate("near", np.ones(4))
    costs = Weighted({far.group.dim: 1.0, near.group.dim: 1.0})
    assert named([far, near], to_cost([far, near], costs, 5)) == {"far": 1, "near": 4}


def test_where_the_goal_cannot_be_reached_all_are_smallest():
    candidates = [candidate("a", np.ones(32), 8)]
    assert named(candidates, to_cost(candidates, Weighted({candidates[0].group.dim: 1.0}), 1)) == {"a": 8}


def test_what_saves_nothing_stays():
    candidates = [candidate("a", np.ones(8)), candidate("free", np.zeros(8))]
    a, free = (c.group.dim for c in candidates)
    assert named(candidates, to_cost(candidates, Weighted({a: 1.0, free: 0.0}), 4)) == {"a": 4, "free": 8}


def test_a_measured_error_scales_the_loss():
    one = candidate("a", np.ones(8), alone=0.2, tried=6)
    assert one.loss(6) == pytest.approx(0.04)
    assert one.loss(4) == pytest.approx(0.08)


def test_dead_positions_do_not_make_the_others_priceless():
    one = candidate("a", [0.0] * 4 + [1.0] * 4, alone=1e-7, tried=6)
    assert one.loss(6) == 0
    assert one.loss(3) == pytest.approx(1.0)


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=40), min_size=1, max_size=4),
    st.integers(1, 8),
    st.floats(0.1, 0.99),
)
def test_goals_hold_at_any_sizes(scores, multiple, share):
    candidates = [candidate(str(n), s, multiple) for n, s in enumerate(scores) if len(s) > multiple]
    model = Weighted({c.group.dim: n + 1.0 for n, c in enumerate(candidates)})
    whole = model.total({})
    sizes = to_cost(candidates, model, share * whole)
    smallest = {c.group.dim: c.sizes()[-1] for c in candidates}
    assert model.total(sizes) <= max(share * whole * (1 + 1e-9), model.total(smallest))
    for c in candidates:
        size = sizes[c.group.dim]
        assert size == c.group.size or (size % multiple == 0 and size >= multiple)
