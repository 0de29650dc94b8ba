"""A causal language model of transformers as a module whose calls are those of states.py."""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ....errors import SourceError
from . import alibi, attention

if TYPE_CHECKING:
    import transformers


Layers = list[tuple[tuple[int, int], tuple[int, int]]]
"""Heads and width of the keys and of the values that each layer keeps."""


class Decoder(torch.nn.Module):
    """Runs the model on new tokens and static caches; shares its weights, and leaves it as it was.

    Args:
        model: a causal language model in eval mode.
        max_length: tokens that a cache holds.
        made_for: tokens of the longest text that the model was made for; None where it does not say.

    Raises:
        SourceError: the model does not let its attention be replaced.
    """

    def __init__(self, model: transformers.PreTrainedModel, max_length: int, made_for: int | None = None) -> None:
        super().__init__()
        self.model = _own(model)
        self.max_length = max_length
        self._made_for = made_for
        self._last = _Last()
        own: Any = self.model
        head = own.get_output_embeddings()
        if head is None:
            raise SourceError(f"{type(model).__name__} has no output embeddings", expected="a causal language model")
        head.register_forward_pre_hook(self._last.pick)

    @property
    def positions(self) -> int:
        """Tokens that a text may have, which caches may be shorter than."""
        return max(self._made_for or 0, self.max_length)

    def forward(
        self,
        ids: torch.Tensor,
        past: torch.Tensor,
        count: torch.Tensor,
        key: Sequence[torch.Tensor],
        value: Sequence[torch.Tensor],
        position: torch.Tensor | None = None,
        importance: Sequence[torch.Tensor] = (),
        back: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits of the last token of each row, or of those that `back` says, and the caches with the new tokens in.

        Whatever `past`, `count`, `back` and `position` say, nothing is read or written outside.
        """
        # Bounds come of `new`, and not of shapes: those are on the host, from where a GPU would copy them in each call.
        new = torch.arange(ids.shape[1], device=ids.device)
        end = new[-1:]
        entries = torch.minimum(past[:, None].clamp_min(0), self.max_length - 1 - end) + new
        places = entries
        if position is not None:
            places = torch.minimum(position[:, None].clamp_min(0), self.positions - 1 - end) + new
        numbers = torch.arange(self.max_length, device=ids.device)
        seen = numbers <= entries[:, None, :, None]
        weight = next(self.model.parameters())
        mask = torch.zeros((), dtype=weight.dtype, device=ids.device).masked_fill(~seen, -torch.inf)
        rows = _rows.get()(entries, key, value)
        total = None
        if importance:
            held = (numbers < entries[:, :1])[:, None, :, None]  # what stands beyond is of entries that are gone
            total = attention.Total(new < count[:, None], [torch.where(held, sums, 0.0) for sums in importance])
        last = torch.minimum(count[:, None] - 1, end).clamp_min(0)
        self._last.index = last if back is None else torch.minimum(last - back, end).clamp_min(0)
        try:
            with attention.over(rows, total):
                logits = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=rows, use_cache=True
                ).logits
        finally:
            self._last.index = None
        logits = logits[:, 0] if back is None else logits
        caches = {"key": tuple(rows.keys), "value": tuple(rows.values)}
        return {"logits": logits, **caches, **({} if total is None else {"importance": tuple(total.sums)})}


class Rows:
    """What transformers' models call a cache. New tokens are written into copies: the given buffers stay."""

    folds = False
    is_compileable = False
    is_updated: dict[int, bool] = {}  # noqa: RUF012  never written: no model with cross-attention is taken

    def __init__(self, positions: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        self.keys = list(keys)
        self.values = list(values)
        self._index = positions[:, None, :, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole caches of a layer, with the new tokens at their positions."""
        self.keys[layer_idx] = self._written(self.keys[layer_idx], key)
        self.values[layer_idx] = self._written(self.values[layer_idx], value)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by models to number positions, which they are given."""
        return 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """None: layers attend as they do."""
        return None

    def _written(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return buffer.scatter(2, self._index.expand(*new.shape), new.to(buffer.dtype))


MakeRows = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], Rows]

_rows: contextvars.ContextVar[MakeRows] = contextvars.ContextVar("enginesmith-rows", default=Rows)


@contextlib.contextmanager
def keeping(rows: MakeRows) -> Iterator[None]:
    """Within it calls of decoders keep their caches so."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


class _Widths(Rows):
    """Notes what each layer would keep, and keeps nothing."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.found[layer_idx] = key, value
        return key, value


def widths(decoder: Decoder) -> Layers:
    """Heads and width of the keys and of the values that each layer keeps; compressed, where the model keeps them so.

    Raises:
        SourceError: a layer keeps something else.
    """
    model, noted = decoder.model, _Widths()
    device = next(model.parameters()).device
    mask = torch.zeros(1, 1, 2, 2, device=device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(
            input_ids=ids, attention_mask=mask, position_ids=torch.arange(2, device=device)[None],
            past_key_values=noted, use_cache=True,
        )  # fmt: skip
    if sorted(noted.found) != list(range(len(noted.found))) or not noted.found:
        raise SourceError(
            f"layers of {type(model).__name__} keep something else than keys and values",
            expected="each layer to write keys and values into the cache",
            found=f"layers {', '.join(map(str, sorted(noted.found))) or 'none'} do",
        )
    return [
        tuple((int(tensor.shape[1]), int(tensor.shape[3])) for tensor in noted.found[layer])  # type: ignore[misc]
        for layer in range(len(noted.found))
    ]


class _Last:
    """Before the output embeddings: of each row only the states at `index` go on, to spare the largest product.

    Attributes:
        index: places (batch, kept) among the new tokens.
    """

    index: torch.Tensor | None = None

    def pick(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self.index is None:
            return None
        (states,) = arguments
        index = self.index[:, :, None].expand(-1, -1, states.shape[-1])
        return (states.gather(1, index),)


def _own(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy that shares the weights, with our attention, and experts that can be captured."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    own: transformers.PreTrainedModel = copy.deepcopy(model, shared)
    if alibi.is_biased(own):
        alibi.replace(own)
        return own
    attention.register()
    own.set_attn_implementation(attention.NAME)
    if own.config.get_text_config()._attn_implementation != attention.NAME:
        raise SourceError(
            f"the attention of {type(model).__name__} cannot be replaced",
            expected="a model that calls transformers' AttentionInterface",
            hint="compile it without its cache: declare its inputs with --input",
        )
    if _has_experts(own):
        own.set_experts_implementation("batched_mm")  # the others choose rows by values, which no graph can
    return own


def _has_experts(model: torch.nn.Module) -> bool:
    return any(type(part).__name__.endswith("Experts") for part in model.modules())
