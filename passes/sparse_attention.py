"""Lets layers of a decoder attend to few of the keys in their caches, where a budget allows it.

    softmax(scale * q k^T + mask) v         the scores of keys that are not seen become minus infinity

Kinds are a window with attention sinks, the top k of each head, and blocks, see `compiler.sparse_attention.kinds`. A
call of one token a row gathers what it sees, and reads no more of the cache than that (a window) or than its keys (top
k and blocks); a prompt is masked likewise, so that an answer does not depend on how its text was read.

Layers are chosen by the error that they are measured to make on data: see `compiler.sparse_attention.choice`. What it
refuses: attention that fuse-attention has not fused, data that are made up, texts no longer than what a kind sees, and
layers that break the budget.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.selection import select
from ..compiler.sparse_attention.choice import choose
from ..compiler.sparse_attention.found import Layer, layers, others
from ..compiler.sparse_attention.judge import Judge, longest
from ..compiler.sparse_attention.kinds import Blocks, Kind, TopK, Window, refusal
from ..compiler.sparse_attention.rewrite import rewrite
from .base import Context, Pass, PassResult, Refusal

SHARE = 8
"""Where no kind is given, a window of this part of the cache, with `SINKS`."""

SINKS = 4

MARK = "enginesmith.sparse_attention"
"""Metadata of a graph whose layers were chosen: the others are not tried again."""

LEAST_OPSET = 13


@dataclasses.dataclass(frozen=True)
class SparseAttention(Pass):
    """Sparse attention of decoders on ONNX Runtime's CPU, chosen by layer.

    Where several kinds are given, each layer takes the one that reads least and keeps the budget.

    Attributes:
        window: a token sees so many last tokens, itself among them.
        sinks: and so many first ones of the text. None: 4 where no kind is given, else none.
        top_k: or so many keys of each head, those with the largest scores.
        blocks: or so many blocks of keys of each head beside its own, those with the largest scores of their mean key.
        block: keys of a block.
        budget: the mean ln p of held-out tokens changes by less, or the relative L2 of logits where the data have none;
            0.01 of ln p is 1 % of perplexity.
        calls: of the model on data, for one measurement.
        keep: names or globs of nodes that stay dense.
    """

    name: ClassVar[str] = "sparse-attention"
    window: int | None = None
    sinks: int | None = None
    top_k: int | None = None
    blocks: int | None = None
    block: int = 64
    budget: float = 0.01
    calls: int = 64
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "block", "calls"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name} is at least 1, found {given}")
        for name in ("sinks", "blocks", "budget"):
            given = getattr(self, name)
            if given is not None and not given >= 0:
                raise ValueError(f"{name} is at least 0, found {given:g}")
        if self.sinks is not None and self.window is None:
            raise ValueError("sinks are for a window, and there is none")

    @property
    def calibrates(self) -> bool:
        """Errors are measured on data."""
        return True

    def kinds(self, length: int) -> tuple[Kind, ...]:
        """What is allowed, for a cache of that many tokens."""
        found: list[Kind] = []
        if self.window is not None:
            found.append(Window(self.window, self.sinks or 0))
        if self.top_k is not None:
            found.append(TopK(self.top_k))
        if self.blocks is not None:
            found.append(Blocks(self.block, self.blocks))
        return tuple(found) or (Window(max(length // SHARE, 1), SINKS),)

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Rewrites in place what the budget allows.

        Raises:
            RecipeError: there are no data; `keep` has a pattern that matches no node.
            GraphError: ONNX Runtime refuses the graph or the data.
            TargetUnavailableError: ONNX Runtime is not installed.
        """
        samples = context.require_calibration(self.name, "to see what it changes").samples
        if earlier := graph.model.metadata_props.get(MARK):
            return _refused(f"attention was made sparse already, by {earlier}")
        if samples.random:
            return _refused(f"errors on {samples.description} say nothing about text")
        if graph.opset < LEAST_OPSET:
            return _refused(f"opset {graph.opset} is too old; opset {LEAST_OPSET} is the first")
        work = flattened(graph)
        found = layers(work)
        refusals = [Refusal(reason, name) for name, reason in others(work).items()]
        if not found and refusals:
            return PassResult(modified=False, refusals=tuple(refusals))
        if not found:
            return _refused("there is no fused attention over a cache; fuse-attention, before this pass, makes it")
        kept = select(work, self.keep)
        tried = [layer for layer in found if layer.name not in kept]
        refusals += [Refusal(f"kept by {kept[layer.name]!r}", layer.name) for layer in found if layer.name in kept]
        length = min(layer.length for layer in found)
        kinds = self._possible(length, longest(samples), refusals)
        if not kinds or not tried:
            return PassResult(modified=False, refusals=tuple(refusals))
        judge = Judge(work, samples, max(kind.sees for kind in kinds), self.calls)

        def make(chosen: Mapping[str, Kind]) -> Graph:
            made = work.clone()
            rewrite(made, chosen)
            return made

        names = [layer.name for layer in tried]
        choice = choose(make, names, kinds, judge, self.budget, length=length, progress=context.progress)
        refusals += choice.refusals
        details = {"budget": self.budget, "data": samples.description, "calls": judge.calls, **choice.record()}
        if not choice.kinds:
            return PassResult(modified=False, refusals=tuple(refusals), details=details)
        graph.model = make(choice.kinds).model
        graph.model.metadata_props[MARK] = str(self)
        return PassResult(True, _counted(choice.kinds, found), tuple(refusals), details)

    def _possible(self, length: int, text: int, refusals: list[Refusal]) -> list[Kind]:
        """The kinds that leave something out, of the cache and of the texts that errors are measured on."""
        possible = []
        for kind in self.kinds(length):
            if reason := refusal(kind, length):
                refusals.append(Refusal(reason))
            elif kind.sees >= text:
                refusals.append(
                    Refusal(
                        f"what {kind} changes is not known: the longest text of the data has {text} tokens, "
                        f"of which {kind} sees {kind.sees}"
                    )
                )
            else:
                possible.append(kind)
        return possible


def _counted(kinds: Mapping[str, Kind], found: list[Layer]) -> dict[str, int]:
    counts = collections.Counter(f"layers with {kind}" for kind in kinds.values())
    return {**counts, "layers that stay dense": len(found) - len(kinds)}


def _refused(reason: str) -> PassResult:
    return PassResult(modified=False, refusals=(Refusal(reason),))
