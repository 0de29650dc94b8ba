"""What removing positions of a dimension costs, in the order in which they would go.

    l1, l2       sum of |w|, of w^2, over the weights that make a position
    activation   sum of w^2 of the weights that read it, times the mean square of what they read
    hessian      the same with the second moments between the places of a kernel: tr(W_j H_jj W_j^T)
    obs          what is left when the readers' other weights make up for it: tr(W_j [H^-1]_jj^-1 W_j^T), with H
                 and W brought up to date after each step (Hassibi and Stork 1993, "Optimal Brain Surgeon", for
                 whole columns)
    taylor       (sum of w dL/dw)^2 over the weights and biases that make it, squared for each batch of data
                 (Molchanov et al. 2019), from the torch module (see `module.gradients`)

Costs of readers are shares of what the reader gives, tr(W H W^T), so that dimensions can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from ..dimensions import Group, Member
from ..dimensions.layout import owners
from ..quantization.layers import constant
from .readers import Reader

Importance = Literal["l1", "l2", "activation", "hessian", "obs", "taylor"]
MEASURED = frozenset(("activation", "hessian", "obs"))
"""Methods that look at activations."""

DAMPING = 0.01
"""Part of the mean of the diagonal of second moments that is added to it."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The positions of a dimension in the order in which they go.

    Attributes:
        order: (size,) positions, the least important first.
        loss: (size + 1,) what removing the first k costs.
    """

    order: np.ndarray
    loss: np.ndarray

    def kept(self, count: int) -> np.ndarray:
        """The positions that stay where `count` do, in their old order."""
        return np.sort(self.order[len(self.order) - count :])


def by_weights(group: Group, method: Importance) -> Ranking:
    """By l1 or l2 norms of what makes each position; as shares of the norm of all."""
    scores = np.zeros(group.size)
    for member in group.of("writes"):
        array = np.moveaxis(np.abs(constant(member.value).astype(np.float64)), member.axis, 0)
        array = array.reshape(len(array), -1)
        norms = array.sum(axis=1) if method == "l1" else np.square(array).sum(axis=1)
        scores += _summed(norms, owners(member.term, group.dim), group.size)
    return _ranked(scores / max(scores.sum(), np.finfo(float).tiny))


def by_gradients(
    groups: Sequence[Group], batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[dict[str, Ranking], list[str]]:
    """By first-order Taylor expansion, squared batch by batch; as shares of the sum over all positions.

    Args:
        batches: for each, weight times gradient by the name of the initializer, in its layout.

    Returns rankings by the name of the group, and the names of those that no weight with a gradient makes.
    """
    scores = {group.name: np.zeros(group.size) for group in groups}
    seen: set[str] = set()
    for products in batches:
        for group in groups:
            made = [m for m in (*group.of("writes"), *group.of("follows")) if m.value.name in products]
            sums = sum((_by_position(group, m, products[m.value.name or ""]) for m in made), np.zeros(group.size))
            scores[group.name] += np.square(sums)
            seen.update([group.name] if made else [])
    ranked = {name: _ranked(own / max(own.sum(), np.finfo(float).tiny)) for name, own in scores.items() if name in seen}
    return ranked, [name for name in scores if name not in seen]


def _by_position(group: Group, member: Member, product: np.ndarray) -> np.ndarray:
    rows = np.moveaxis(product, member.axis, 0).reshape(product.shape[member.axis], -1)
    return _summed(rows.sum(axis=1, dtype=np.float64), owners(member.term, group.dim), group.size)


def by_moments(group: Group, own: Sequence[tuple[Reader, np.ndarray]], method: Importance, *, step: int = 1) -> Ranking:
    """By what readers lose.

    Args:
        own: readers, and the second moments of what they read.
        step: how many positions "obs" removes before it looks again.
    """
    if method == "obs":
        return _surgeon(group.size, [_Part(reader, moments) for reader, moments in own], step)
    scores = np.zeros(group.size)
    for reader, moments in own:
        for weight, moment in zip(reader.weight, moments, strict=True):
            total = max(_energy(weight, moment), np.finfo(float).tiny)
            scores += _diagonal(weight, moment, reader.owner, group.size, blocks=method == "hessian") / total
    return _ranked(scores)


def _summed(values: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    mine = owner >= 0
    return np.bincount(owner[mine], weights=values[mine], minlength=size)


def _ranked(scores: np.ndarray) -> Ranking:
    order = np.argsort(scores, kind="stable")
    return Ranking(order, np.concatenate([[0.0], np.cumsum(scores[order])]))


def _energy(weight: np.ndarray, moment: np.ndarray) -> float:
    return float(np.einsum("oi,oi->", weight @ moment, weight))


def _diagonal(weight: np.ndarray, moment: np.ndarray, owner: np.ndarray, size: int, *, blocks: bool) -> np.ndarray:
    if not blocks:
        return _summed(np.square(weight).sum(axis=0) * np.diag(moment), owner, size)
    own = np.where((owner[:, None] == owner[None, :]) & (owner >= 0)[:, None], moment, 0.0)
    return _summed(np.einsum("oi,oi->i", weight @ own, weight), owner, size)


class _Part:
    """A reader on its way: each of its groups with weights and inverse moments that follow what was removed."""

    def __init__(self, reader: Reader, moments: np.ndarray) -> None:
        self.places = [np.flatnonzero(reader.owner == position) for position in range(reader.owner.max() + 1)]
        self.weights = [weight.astype(np.float64) for weight in reader.weight]
        self.totals = [max(_energy(w, h), np.finfo(float).tiny) for w, h in zip(reader.weight, moments, strict=True)]
        self.inverses = [_inverse(moment) for moment in moments]

    def costs(self, size: int, gone: np.ndarray) -> np.ndarray:
        """Of removing each position alone; infinite for those that are gone."""
        found = np.where(gone, np.inf, 0.0)
        lengths = np.array([0 if gone[p] else len(self.places[p]) for p in range(size)])
        for length in set(lengths[lengths > 0]):
            which = np.flatnonzero(lengths == length)
            at = np.stack([self.places[position] for position in which])
            for weight, inverse, total in zip(self.weights, self.inverses, self.totals, strict=True):
                block = np.linalg.inv(inverse[at[:, :, None], at[:, None, :]])
                columns = weight[:, at].transpose(1, 0, 2)
                found[which] += np.einsum("poi,poi->p", columns @ block, columns) / total
        return found

    def remove(self, positions: np.ndarray) -> float:
        """Removes positions together, and lets the rest make up for them; what that costs."""
        at = np.concatenate([self.places[position] for position in positions])
        cost = 0.0
        for number, (weight, inverse, total) in enumerate(zip(self.weights, self.inverses, self.totals, strict=True)):
            block = np.linalg.inv(inverse[np.ix_(at, at)])
            lost = weight[:, at] @ block
            cost += float(np.einsum("oi,oi->", lost, weight[:, at])) / total
            across = inverse[at]
            self.weights[number] = weight - lost @ across
            inverse = inverse - across.T @ (block @ across)
            inverse[at, at] = 1.0  # gone; keeps the blocks that are never asked for again invertible
            self.inverses[number] = inverse
        return cost


def _surgeon(size: int, parts: Sequence[_Part], step: int) -> Ranking:
    gone = np.zeros(size, bool)
    order: list[int] = []
    loss = [0.0]
    while len(order) < size:
        costs = np.sum([part.costs(size, gone) for part in parts], axis=0) if parts else np.where(gone, np.inf, 0.0)
        chosen = np.argsort(costs, kind="stable")[: min(step, size - len(order))]
        if len(order) + len(chosen) == size:  # what is left last has nothing that makes up for it
            cost = float(costs[chosen].sum())
        else:
            cost = sum(part.remove(chosen) for part in parts)
        single = costs[chosen] / max(costs[chosen].sum(), np.finfo(float).tiny)
        loss.extend(loss[-1] + cost * np.cumsum(single))
        order.extend(int(position) for position in chosen)
        gone[chosen] = True
    return Ranking(np.array(order), np.array(loss))


def _inverse(moment: np.ndarray) -> np.ndarray:
    damped = moment.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * max(
        float(np.diag(damped).mean()), float(np.finfo(np.float32).tiny)
    )
    return np.linalg.inv(damped)
