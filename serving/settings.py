"""How a bundle is served: what `enginesmith serve` and `enginesmith export-triton` take as options."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ..errors import RecipeError

STALLS = (
    "Triton may let a request wait for half a second now and then where the queue is bounded and the model has one "
    "instance: take --instances 2, or leave out --max-queue, --timeout-ms and --priorities"
)


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a bundle is served. The help of each field is that of its option.

    Raises:
        RecipeError: a value that makes no sense, or two that do not go together.
    """

    engine: str | None = _option(None, "Engine to serve. Default: the best.")
    name: str | None = _option(None, "Name of the model. Default: that of the bundle's folder.")
    max_batch: int | None = _option(None, "Largest batch that requests are merged to. Default: the engine's largest.")
    preferred: tuple[int, ...] = _option(
        (), "Batches to merge requests to where it can be had. Default: the batch search's best."
    )
    merge: bool = _option(True, "Merge requests that wait at the same time to one batch.")
    queue_delay_us: int = _option(0, "Microseconds that a request may wait for others to be merged with.")
    max_queue: int | None = _option(
        None,
        "Requests that may wait, of each priority; more are UNAVAILABLE, and those beyond a deadline of their own too.",
    )
    timeout_ms: float | None = _option(
        None, "Milliseconds that a request may wait, where it does not say so itself; then it is rejected."
    )
    priorities: int = _option(0, "Levels of priority that requests may have, 1 being the highest; 0 for none.")
    instances: int = _option(1, "Copies of the engine, on each GPU where there are any.")
    prefix_mib: int | None = _option(
        None, "MiB of what a language model may keep of prompts, for those that begin alike. Default: none."
    )
    evict: str | None = _option(
        None, "What a full cache of a language model keeps, window or importance; texts may be longer. Default: all."
    )
    draft: str | None = _option(
        None, "Bundle whose engine proposes tokens to a greedy request that is alone. Default: no draft."
    )
    draft_engine: str | None = _option(None, "Engine of the draft. Default: the best of its bundle.")
    gpus: tuple[int, ...] = _option((), "GPUs to use, with an instance on each. Default: all that the server has.")

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "queue_delay_us": 0, "max_queue": 1, "priorities": 0, "instances": 1, "prefix_mib": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise RecipeError(f"{name} is too small", expected=f"{minimum} or more", found=value)
        if self.draft_engine is not None and self.draft is None:
            raise RecipeError(
                "draft_engine names an engine of a draft, and there is none", expected="draft, a bundle, beside it"
            )
        if self.timeout_ms is not None and self.timeout_ms <= 0:
            raise RecipeError("timeout_ms is too small", expected="more than 0", found=self.timeout_ms)
        for name in ("preferred", "gpus"):
            values = getattr(self, name)
            if len({*values}) < len(values) or any(value < (name == "preferred") for value in values):
                raise RecipeError(f"{name} cannot be served", expected="different numbers", found=_join(values))
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise RecipeError(
                "the model cannot have this name", expected="letters, digits, _, . and -", found=repr(self.name)
            )
        if not self.merge and (given := self.of_the_queue()):
            raise RecipeError(f"{given[0]} needs requests to be merged", expected="it, or --no-merge, but not both")

    @property
    def bounds_queue(self) -> bool:
        """Whether requests may be rejected for having to wait, or overtake others."""
        return self.max_queue is not None or self.timeout_ms is not None or self.priorities > 0

    @property
    def stalls(self) -> bool:
        """Whether Triton may let a request wait for half a second although the model is idle.

        Its batcher sleeps for up to 500 ms unless it is woken. Where the queue is bounded it fetches none ahead, and
        a request that comes just before the only instance is free again does not wake it. Seen on Triton 2.51 with one
        client, for one request in a few hundred; never without bounds, nor with two instances.
        """
        return self.merge and self.bounds_queue and self.instances == 1 and len(self.gpus) < 2

    def of_the_queue(self) -> list[str]:
        """Fields that were changed and that only merging has a use for."""
        return self._changed("preferred", "queue_delay_us", "max_queue", "timeout_ms", "priorities")

    def of_triton(self) -> list[str]:
        """Fields that were changed and that nothing but Triton heeds."""
        queue = [name for name in self.of_the_queue() if name != "max_queue"]
        return queue + self._changed("max_batch", "instances", "gpus")

    def _changed(self, *names: str) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if f.name in names and getattr(self, f.name) != f.default]


def _join(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
