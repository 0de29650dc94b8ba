"""The process that runs shards on one device. It answers requests as `targets._worker` describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EngineError, EnginesmithError
from ..targets import _serve
from .job import Choice, Job, Shards, describe, to_json


def command() -> list[str]:
    """The command of the worker."""
    return _serve.command(__name__)


class Commands:
    """Every public method is a command, and its arguments are the request's."""

    def __init__(self) -> None:
        self._shards: Shards | None = None

    def open(self, choice: Mapping[str, Any], described: bool) -> dict[str, Any]:
        """Loads the engine, and describes it where that is asked for."""
        try:
            engine = Choice(**choice).load()
            self._shards = Shards(engine)
            return describe(engine) if described else {}
        except EnginesmithError as error:
            return {"error": to_json(error)}

    def run(self, job: Mapping[str, Any], shard: int, spans: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """Runs a shard."""
        if self._shards is None:
            raise EngineError("no engine is loaded")
        return self._shards.run(Job(**job), shard, spans)

    def close(self) -> dict[str, Any]:
        """Lets go of the engine."""
        if self._shards is not None:
            self._shards.close()
        return {}


def main() -> None:
    """Answers requests until the parent closes stdin."""
    _serve.serve(Commands())
