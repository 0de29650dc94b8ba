"""Cuts that move until the stages take the same time."""

from __future__ import annotations

import pytest

from enginesmith.compiler.partition.balance import EVEN, balanced
from enginesmith.compiler.partition.cut import Limits, choose
from enginesmith.compiler.partition.line import Crossing, Line

NODES = 24
LINE = Line(tuple(map(str, range(NODES))), tuple(Crossing(f"t{n}", n, n + 1, 8, "") for n in range(NODES - 1)), ())
LIMITS = Limits(slack=0.0)


def timer(truth):
    """Measures stages by what their nodes really take, and keeps the cuts that it saw."""

    def measure(pieces):
        measure.cuts.append([piece.nodes for piece in pieces])
        return [sum(truth[slice(*piece.nodes)]) for piece in pieces]

    measure.cuts = []
    return measure


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_become_even_where_nodes_were_misjudged(stages):
    truth = [5.0] * 6 + [1.0] * 18  # and a profiler that takes all nodes for the same
    measure = timer(truth)
    pieces, cuts = balanced(LINE, [1.0] * NODES, stages, LIMITS, measure, 8)
    best = max(piece.ms for piece in choose(LINE, truth, stages, LIMITS))
    assert max(piece.ms for piece in pieces) <= 1.05 * best
    assert [piece.ms for piece in pieces] == [sum(truth[slice(*piece.nodes)]) for piece in pieces]
    assert cuts == len(measure.cuts) > 1


def test_what_is_even_is_timed_once():
    measure = timer([1.0 + EVEN / 2] * 12 + [1.0] * 12)
    _, cuts = balanced(LINE, [1.0] * NODES, 2, LIMITS, measure, 8)
    assert cuts == 1


def test_the_best_of_the_cuts_is_kept():
    times = iter([[3.0, 1.0], [1.0, 9.0]])
    pieces, cuts = balanced(LINE, [1.0] * NODES, 2, LIMITS, lambda pieces: next(times), 2)
    assert [piece.ms for piece in pieces] == [3.0, 1.0]
    assert cuts == 2


def test_nodes_without_a_time_share_that_of_their_stage():
    pieces, _ = balanced(LINE, [0.0] * NODES, 2, LIMITS, timer([1.0] * NODES), 8)
    assert [piece.ms for piece in pieces] == [12.0, 12.0]
