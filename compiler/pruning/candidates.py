"""Which dimensions may shrink, why others may not, and in which order their positions would go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import RecipeError
from ...passes.base import Context, Refusal
from ..dimensions import Dimensions, Group
from ..dimensions.layout import Dim, Product, Term, resolved
from .allocation import Candidate
from .importance import Importance, Ranking, by_gradients, by_moments, by_weights
from .ratios import matching
from .readers import with_moments


def find(
    dimensions: Dimensions, context: Context, importance: Importance, *, multiple: int, keep: Sequence[str]
) -> tuple[list[Candidate], list[Refusal]]:
    """The dimensions that may shrink, ranked, and the others with reasons.

    Args:
        multiple: what lengths of axes should be multiples of: a head of 64 is one already.
        keep: names or globs of dimensions that stay.

    Raises:
        RecipeError: `keep` matches nothing; the importance needs what the context has not.
        GraphError: ONNX Runtime refuses the graph or the data.
    """
    refusals: list[Refusal] = []
    steps: dict[str, int] = {}
    made = [group for group in dimensions.groups if group.of("writes")]
    free = {group.dim: group for group in made if not group.why_not("shrink")}
    for group in made:
        step = multiple // math.gcd(multiple, inner_size(group))
        if reason := _why_not(group, free, step):
            refusals.append(Refusal(reason, group.name))
        else:
            steps[group.name] = step
    for name in dict.fromkeys(name for pattern in keep for name in matching(list(steps), pattern)):
        refusals.append(Refusal("kept by choice", name))
        del steps[name]
    groups = [group for group in made if group.name in steps]
    rankings, unranked = _rank(dimensions, groups, steps, context, importance)
    found = [Candidate(g, rankings[g.name], steps[g.name], steps[g.name]) for g in groups if g.name in rankings]
    return found, refusals + unranked


def _why_not(group: Group, free: Mapping[Dim, Group], step: int) -> str:
    if reason := group.why_not("shrink"):
        return reason
    if outer := [free[dim] for dim in group.parents if dim in free]:
        return f"it is a part of {outer[0].name}, of which whole ones go"
    return f"its {group.size} positions are not more than {step}" if group.size <= step else ""


def _rank(
    dimensions: Dimensions, groups: Sequence[Group], steps: Mapping[str, int], context: Context, importance: Importance
) -> tuple[dict[str, Ranking], list[Refusal]]:
    if importance == "taylor":
        return _by_taylor(dimensions, groups, context)
    if importance in ("l1", "l2"):
        return {group.name: by_weights(group, importance) for group in groups}, []
    # What only other activations read has no reader whose loss could be told.
    found = {group.name: by_weights(group, "l2") for group in groups if not group.of("reads")}
    refusals = []
    read = [group for group in groups if group.of("reads")]
    samples = context.require_calibration("prune", "to see what its layers read").limited()
    for number, (group, own) in enumerate(with_moments(dimensions.graph, read, samples)):
        context.progress(0.3 * number / len(read), f"ranking {group.name}")
        if all(np.isfinite(moments).all() for _, moments in own):
            found[group.name] = by_moments(group, own, importance, step=steps[group.name])
        else:
            refusals.append(Refusal("what reads it is given numbers on the data that are not finite", group.name))
    return found, refusals


def _by_taylor(
    dimensions: Dimensions, groups: Sequence[Group], context: Context
) -> tuple[dict[str, Ranking], list[Refusal]]:
    if context.gradients is None:
        raise RecipeError(
            "importance=taylor needs gradients, and there is no torch module to take them from",
            expected="a model from file.py:factory or a torch module, with data",
            hint="choose importance=obs",
        )
    found, without = by_gradients(groups, context.gradients(dimensions.graph))
    return found, [Refusal("no weight that makes it is a parameter of the torch module", name) for name in without]


def inner_size(group: Group) -> int:
    """How many positions of an axis of weights one of the group always takes together: a head of 64 takes 64."""
    weights = [*group.of("writes"), *group.of("reads")]
    return math.gcd(*(_inner(member.term, group.dim) for member in weights)) or 1


def _inner(term: Term, dim: Dim) -> int:
    """Positions that lie together for each of the dimension's; 0 where it is not in the term."""
    found = resolved(term)
    if isinstance(found, Dim):
        return int(found is dim)
    sizes = [_inner(part, dim) for part in found.parts]
    if not isinstance(found, Product):
        return math.gcd(*sizes)
    place = next((place for place, size in enumerate(sizes) if size), None)
    return 0 if place is None else sizes[place] * math.prod(part.size for part in found.parts[place + 1 :])
