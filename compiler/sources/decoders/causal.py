"""Loads causal language models of transformers: from a folder, or as a factory gives them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....errors import RecipeError, SourceError
from ...difference import relative_l2
from ...signature import AxisRange, Signature, TensorSpec
from ...states import BACK, COUNT, IDS, IMPORTANCE, PAST, POSITION
from .. import Model, module
from ..guard import first_line, foreign, quiet
from .alibi import is_biased
from .module import Decoder, Layers, widths
from .options import DecoderOptions

if TYPE_CHECKING:
    import transformers

DEFAULT_LENGTH = 1024
SAME = 1e-4
"""Relative L2 within which the logits with and without cache are the same: sums in another order."""


def open_folder(path: Path) -> transformers.PreTrainedModel:
    """The model in a folder of transformers, in float32. No code and no pickle in it is run, nothing is fetched.

    Raises:
        SourceError: the folder holds no causal language model, or not all of its weights.
    """
    import transformers

    hint = "a folder as save_pretrained writes it: config.json and .safetensors"
    with (
        foreign(
            lambda error: SourceError(
                f"model {str(path)!r} cannot be loaded by transformers", expected=hint, found=first_line(error)
            )
        ),
        quiet(),
    ):
        auto: Any = transformers
        model, loaded = auto.AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    opened: transformers.PreTrainedModel = model
    for key in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, loaded[key])):
            raise SourceError(
                f"the weights in {str(path)!r} do not fit its config.json",
                expected="a tensor for each of the model",
                found=f"{len(wrong)} {key.partition('_')[0]}: {', '.join(wrong[:3])}",
            )
    return opened


def load(
    model: transformers.PreTrainedModel, options: DecoderOptions, *, device: str, identity: str, folder: Path | None
) -> Model:
    """The model with its cache, checked against itself without one.

    Raises:
        SourceError: it computes something else with static caches.
        RecipeError: a cache longer than what the model was made for, or with no room for a token.
    """
    if options.eviction and is_biased(model):
        raise RecipeError(
            f"{type(model).__name__} cannot drop tokens: its bias is computed from where a key stands in its cache",
            expected="no eviction",
            found=f"eviction={options.eviction}",
        )
    model.train(False).to(device)
    made_for = _made_for(model)
    decoder = Decoder(model, _length(made_for, options, type(model).__name__), made_for).eval()
    with foreign(lambda error: _failed(model, error)):
        layers = widths(decoder)
    decoder.max_length = length = _within(options, layers, decoder.max_length)
    signature, states = _signature(layers, length, options)
    _check(model, decoder, layers)
    loaded = module.load(
        decoder,
        weights=None,
        inputs=signature,
        constants={},
        sample=None,
        device=device,
        identity=f"{identity}{length}{options}",
    )
    tokenizer = folder / "tokenizer.json" if folder and (folder / "tokenizer.json").is_file() else None
    return dataclasses.replace(
        loaded,
        signature=dataclasses.replace(
            loaded.signature, states=states, positions=decoder.positions if options.eviction else None
        ),
        tokenizer=tokenizer,
        stop=_stop(model),
    )


def _made_for(model: transformers.PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model was made for, where it says so."""
    config = model.config.get_text_config()
    found: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return found


def _length(made_for: int | None, options: DecoderOptions, model: str) -> int:
    """Tokens that a cache holds, whatever memory that takes."""
    if options.max_length is None:
        length = min(made_for or DEFAULT_LENGTH, DEFAULT_LENGTH)
        options.check_room(length)
        return length
    if made_for and options.max_length > made_for:
        raise RecipeError(
            f"max_length={options.max_length} is more than {model} was made for",
            expected=f"at most {made_for} tokens",
            found=options.max_length,
        )
    return options.max_length


def _within(options: DecoderOptions, layers: Layers, length: int) -> int:
    """As many of the tokens as fit into `cache_mib`."""
    if options.cache_mib is None:
        return length
    size = sum(heads * width for layer in layers for heads, width in layer)
    size += sum(map(_rated, layers)) if options.eviction == "importance" else 0
    token_bytes = size * np.dtype(np.float32).itemsize
    room = int(options.cache_mib * 2**20) // token_bytes
    if room < 2:
        raise RecipeError(
            f"cache_mib={options.cache_mib:g} holds no two tokens",
            expected=f"{2 * token_bytes / 2**20:.2g} or more",
            found=options.cache_mib,
        )
    return min(length, room)


def _signature(layers: Layers, length: int, options: DecoderOptions) -> tuple[Signature, dict[str, str]]:
    """The inputs, and the output of each cache by its input."""
    rows: str | int = "batch" if options.batch > 1 else 1
    caches = [
        TensorSpec(f"{kind}.{layer}", "float32", (rows, sizes[which][0], length, sizes[which][1]))
        for which, kind in enumerate(("key", "value"))
        for layer, sizes in enumerate(layers)
    ]
    if options.eviction == "importance":
        caches += [
            TensorSpec(f"{IMPORTANCE}{layer}", "float32", (rows, _rated(sizes), length, 1))
            for layer, sizes in enumerate(layers)
        ]
    numbers = [
        TensorSpec(IDS, "int64", (rows, "time")),
        *(TensorSpec(name, "int64", (rows,)) for name in (PAST, COUNT, *([POSITION] if options.eviction else []))),
    ]
    if options.speculative_tokens:
        numbers.append(TensorSpec(BACK, "int64", ("kept",)))
    axes = {
        "batch": AxisRange(1, 1, options.batch),
        "time": AxisRange(1, 1, length),
        "kept": AxisRange(1, 1, options.speculative_tokens + 1),
    }
    used = {size for spec in numbers for size in spec.shape}
    axes = {name: axis for name, axis in axes.items() if name in used}
    return Signature(inputs=(*numbers, *caches), axes=axes), {spec.name: f"{spec.name}_out" for spec in caches}


def _rated(layer: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """Heads that drop entries each by itself: those of the caches, where keys and values have as many."""
    (of_keys, _), (of_values, _) = layer
    return of_keys if of_keys == of_values else 1


def _check(model: transformers.PreTrainedModel, decoder: Decoder, layers: Layers) -> None:
    """Compares with the model as it was given: a prompt of two rows, one padded, and the token after; at two sizes."""
    generator = np.random.default_rng(0)
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    for size in sorted({min(4, decoder.max_length), min(33, decoder.max_length)}):
        ids = torch.from_numpy(generator.integers(0, vocabulary, (2, size))).to(device)
        counts = torch.tensor([size - 1, max(size // 2, 1)], device=device)
        key, value = (
            [torch.zeros(2, sizes[which][0], decoder.max_length, sizes[which][1], device=device) for sizes in layers]
            for which in (0, 1)
        )
        rows = torch.arange(2, device=device)
        with torch.no_grad(), foreign(lambda error: _failed(model, error)):
            expected = model(input_ids=ids, use_cache=False).logits
            first = decoder(ids[:, :-1], torch.zeros_like(counts), counts, key, value)
            second = decoder(ids[rows, counts][:, None], counts, torch.ones_like(counts), first["key"], first["value"])
        for found, at in ((first["logits"], counts - 1), (second["logits"], counts)):
            difference = relative_l2(found.float().cpu().numpy(), expected[rows, at].float().cpu().numpy())
            if not difference <= SAME:
                raise SourceError(
                    f"{type(model).__name__} computes something else with a static cache",
                    expected=f"logits within a relative L2 of {SAME:g} of those without, at {size} tokens",
                    found=f"{difference:.2g}",
                    hint="its attention is of a kind that is not supported; declare its inputs with --input",
                )


def _stop(model: transformers.PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text."""
    settings: Any = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    return tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)


def _failed(model: torch.nn.Module, error: BaseException) -> SourceError:
    return SourceError(
        f"{type(model).__name__} does not run with static caches",
        expected="a causal language model that keeps keys and values alone",
        found=first_line(error),
        hint="compile it without its cache: declare its inputs with --input",
    )
