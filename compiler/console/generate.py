"""The options of `generate`, and what it writes as the tokens come."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from .numbers import parse_numbers

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation.eviction import Eviction
    from ..generation.speculative import Speculation


def generate_options() -> list[click.Parameter]:
    """All options of `generate`."""
    return [
        click.Argument(["text"], required=False),
        click.Option(["--ids"], metavar="N,N,...", help="Prompt as token numbers, in place of a text."),
        click.Option(
            ["--max-new-tokens", "-n"], type=click.IntRange(1), default=128, show_default=True, help="Tokens at most."
        ),
        click.Option(["--sample", "do_sample"], is_flag=True, help="Draw tokens by chance, not the likeliest always."),
        click.Option(["--temperature"], type=float, help="Of --sample: below 1 likely tokens become more likely."),
        click.Option(["--top-k"], type=int, help="Of --sample: draw from so many of the likeliest tokens."),
        click.Option(
            ["--top-p"], type=float, help="Of --sample: draw from the likeliest with this probability together."
        ),
        click.Option(["--stop"], metavar="N,N", help="Tokens that end the text. Default: those that the model tells."),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Seed of --sample."),
        click.Option(["--engine", "-e"], help="Engine to run. Default: the fastest that runs here."),
        click.Option(
            ["--draft"],
            type=click.Path(path_type=Path),
            metavar="BUNDLE",
            help="Bundle of a faster model with the same tokens, which proposes some for each call of the engine.",
        ),
        click.Option(["--draft-engine"], help="Engine of --draft. Default: the fastest that runs here."),
        click.Option(
            ["--evict"], metavar="POLICY", help="What a full cache keeps: window or importance. Default: all."
        ),
        click.Option(["--sinks"], type=int, help="Of --evict: so many of the first tokens stay always. Default: 4."),
    ]


def generate_text(
    bundle: Path,
    *,
    text: str | None,
    ids: str | None,
    stop: str | None,
    engine: str | None,
    draft: Path | None,
    draft_engine: str | None,
    evict: str | None,
    sinks: int | None,
    show: bool,
    **options: Any,
) -> dict[str, Any]:
    """Goes on with a text, or with tokens, and writes what comes to stdout where `show`.

    Raises:
        UsageError: not exactly one of text and tokens is given, or the bundle has no tokenizer; an engine of no draft.
    """
    from ..engine import load
    from ..generation.speculative import Speculation
    from ..generation.tokens import Writer, ends_of, open_tokenizer

    if (text is None) == (ids is None):
        raise UsageError(
            "the prompt is given twice" if text is not None else "there is no prompt",
            expected="a text, or --ids 1,2,3",
            found="both" if text is not None else "neither",
        )
    if draft is None and draft_engine is not None:
        raise UsageError("--draft-engine names an engine of a draft, and there is none", expected="--draft BUNDLE")
    eviction = _eviction(evict, sinks)
    tokenizer = open_tokenizer(bundle) if text is not None else None
    prompt = list(tokenizer.encode(text).ids) if tokenizer is not None else list(parse_numbers("--ids", ids))
    ends = parse_numbers("--stop", stop) if stop is not None else ends_of(bundle)

    def write(part: str) -> None:
        if show:
            click.echo(part, nl=False)

    writer = Writer(tokenizer, write) if tokenizer is not None else None
    times = [time.perf_counter()]

    def stream(row: int, token: int) -> None:
        times.append(time.perf_counter())
        if writer is None:
            write(f"{',' if len(times) > 2 else ''}{token}")
        elif token not in ends:
            writer(token)

    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(load(bundle, engine))
        drafted = Drafted(stack.enter_context(load(draft, draft_engine)), Speculation()) if draft is not None else None
        if drafted is not None:
            options |= {"draft": drafted.engine, "speculation": drafted.counts}
        times[0] = time.perf_counter()
        (tokens,) = opened.generate([prompt], stop=ends, stream=stream, eviction=eviction, **options)
    if writer is not None:
        writer.close()
    if show:
        click.echo()
        if drafted is not None:
            click.echo(f"enginesmith: {drafted}", err=True)
    later = times[-1] - times[1]
    return {
        "engine": opened.name,
        "prompt": prompt,
        "tokens": tokens,
        "text": writer.text if writer is not None else None,
        "first_token_ms": (times[1] - times[0]) * 1e3,
        "token_ms": later * 1e3 / (len(tokens) - 1) if len(tokens) > 1 else None,
        "draft": drafted.to_json() if drafted is not None else None,
    }


@dataclasses.dataclass(frozen=True)
class Drafted:
    """An engine that proposes tokens, and what it brought."""

    engine: Engine
    counts: Speculation

    def __str__(self) -> str:
        counts = self.counts
        if not counts.proposed:
            return f"draft {self.engine.name} proposed nothing"
        said = f"{counts.accepted} of {counts.proposed} tokens that draft {self.engine.name} proposed were taken"
        return f"{said}, {counts.tokens_per_call:.2f} tokens a call"

    def to_json(self) -> dict[str, Any]:
        """A form for JSON."""
        return {
            "engine": self.engine.name,
            **dataclasses.asdict(self.counts),
            "tokens_per_call": self.counts.tokens_per_call,
        }


def _eviction(policy: str | None, sinks: int | None) -> Eviction | None:
    from ..generation.eviction import Eviction

    if policy is None:
        if sinks is not None:
            raise UsageError(
                "--sinks is of what a full cache drops, and nothing is", expected="--evict window beside it"
            )
        return None
    return Eviction(policy) if sinks is None else Eviction(policy, sinks)
