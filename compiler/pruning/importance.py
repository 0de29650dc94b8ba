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

DAMPING = 0.001
"""Part of the mean of the diagonal of second moments that is added to it."""

_POOL = 3
"""Times as many positions are looked at as go in one step of "obs"."""


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
        step: how many positions "obs" removes before it looks at all of them again; on the way, it follows those that
            cost the least.
    """
    if method == "obs":
        return _surgeon(group.size, [_part(reader, moments, group.size) for reader, moments in own], step)
    scores = np.zeros(group.size)
    for reader, moments in own:
        for weight, moment in zip(reader.weight, moments, strict=True):
            given = _diagonal(weight, moment, reader.owner, group.size, blocks=method == "hessian")
            scores += given / _energy(weight, moment)
    return _ranked(scores)


def _summed(values: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    mine = owner >= 0
    return np.bincount(owner[mine], weights=values[mine], minlength=size)


def _ranked(scores: np.ndarray) -> Ranking:
    order = np.argsort(scores, kind="stable")
    return Ranking(order, np.concatenate([[0.0], np.cumsum(scores[order])]))


def _energy(weight: np.ndarray, moment: np.ndarray) -> float:
    """What a reader gives; infinite where that is nothing, so that it loses nothing."""
    energy = float(np.einsum("oi,oi->", weight @ moment, weight))
    return energy if energy > np.finfo(np.float32).tiny else np.inf


def _diagonal(weight: np.ndarray, moment: np.ndarray, owner: np.ndarray, size: int, *, blocks: bool) -> np.ndarray:
    if not blocks:
        return _summed(np.square(weight).sum(axis=0) * np.diag(moment), owner, size)
    own = np.where((owner[:, None] == owner[None, :]) & (owner >= 0)[:, None], moment, 0.0)
    return _summed(np.einsum("oi,oi->i", weight @ own, weight), owner, size)


@dataclasses.dataclass
class _Part:
    """A reader on its way: each of its groups with weights and inverse moments that follow what was removed.

    Attributes:
        places: for each position, which of the inputs are its own.
        weights: (out, n) of each group.
        inverses: (n, n) of each group.
        totals: what each group gives.
    """

    places: list[np.ndarray]
    weights: list[np.ndarray]
    inverses: list[np.ndarray]
    totals: list[float]

    def costs(self, positions: np.ndarray) -> np.ndarray:
        """Of removing each of these positions alone."""
        found = np.zeros(len(positions))
        lengths = np.array([len(self.places[position]) for position in positions])
        for length in set(lengths):
            which = np.flatnonzero(lengths == length)
            at = np.stack([self.places[position] for position in positions[which]])
            for weight, inverse, total in zip(self.weights, self.inverses, self.totals, strict=True):
                block = np.linalg.inv(inverse[at[:, :, None], at[:, None, :]])
                columns = weight[:, at].transpose(1, 0, 2)
                found[which] += np.einsum("poi,poi->p", columns @ block, columns) / total
        return found

    def remove(self, positions: np.ndarray) -> None:
        """Removes positions, and lets the rest make up for them."""
        at = np.concatenate([self.places[position] for position in positions])
        for number, (weight, inverse) in enumerate(zip(self.weights, self.inverses, strict=True)):
            block = np.linalg.inv(inverse[np.ix_(at, at)])
            across = inverse[at]
            self.weights[number] = weight - weight[:, at] @ block @ across
            self.inverses[number] = inverse - across.T @ (block @ across)

    def among(self, positions: np.ndarray) -> _Part:
        """The same for some positions alone: what removing one of them does to the others is all in there."""
        at = np.concatenate([self.places[position] for position in positions])
        ends = np.cumsum([len(self.places[position]) for position in positions])
        weights = [weight[:, at] for weight in self.weights]
        inverses = [inverse[np.ix_(at, at)] for inverse in self.inverses]
        return _Part(np.split(np.arange(len(at)), ends[:-1]), weights, inverses, self.totals)


def _part(reader: Reader, moments: np.ndarray, size: int) -> _Part:
    places = [np.flatnonzero(reader.owner == position) for position in range(size)]
    weights = [weight.astype(np.float64) for weight in reader.weight]
    totals = [_energy(weight, moment) for weight, moment in zip(reader.weight, moments, strict=True)]
    return _Part(places, weights, [_inverse(moment) for moment in moments], totals)


def _surgeon(size: int, parts: Sequence[_Part], step: int) -> Ranking:
    """Removes a few positions at a time, the cheapest, each chosen among a pool that follows what went before it.

    One of two equal positions costs nothing, both cost much: it would be wrong to take all of a step at once.
    """
    left = np.arange(size)
    order: list[int] = []
    loss = [0.0]
    while len(left):
        costs = np.sum([part.costs(left) for part in parts], axis=0)
        pool = left[np.argsort(costs, kind="stable")[: _POOL * step]]
        near = [part.among(pool) for part in parts]
        open_ = np.arange(len(pool))
        count = min(step, len(pool))
        for _ in range(count):
            costs = np.sum([part.costs(open_) for part in near], axis=0)
            best = int(np.argmin(costs))
            loss.append(loss[-1] + float(costs[best]))
            order.append(int(pool[open_[best]]))
            for part in near:
                part.remove(open_[best : best + 1])
            open_ = np.delete(open_, best)
        for part in parts:
            part.remove(np.array(order[-count:]))
        left = np.setdiff1d(left, order)
    return Ranking(np.array(order), np.array(loss))


def _inverse(moment: np.ndarray) -> np.ndarray:
    damped = moment.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * max(
        float(np.diag(damped).mean()), float(np.finfo(np.float32).tiny)
    )
    return np.linalg.inv(damped)
