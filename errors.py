"""Everything that enginesmith raises for a user's mistake or a machine's limit.

    EnginesmithError
    ├── VerdictError                1  the engine is wrong, or misses its goal
    ├── UsageError                  2  the request cannot be understood or served
    │   ├── RecipeError               a recipe or an option value
    │   ├── UnknownNameError          a target, pass, option or engine that does not exist
    │   ├── DataError                 data whose names, shapes or dtypes do not fit the model
    │   ├── OutputError               an output folder that cannot be used
    │   └── ArchiveError              an archive of the cache that is damaged, or is none
    ├── ModelError                  3  the model could not be loaded or captured
    │   ├── SourceError               the file or factory
    │   ├── CaptureError              from torch to a graph
    │   └── GraphError                a graph that breaks a rule of ONNX or of the verifier
    └── EngineError                 4  no engine could be built or run
        ├── TargetUnavailableError    a package, driver or device is missing
        ├── BuildError                the builder refused, crashed, hung or ran out of memory
        ├── EngineMismatchError       a bundle changed on disk, or made for another machine
        └── StorageError              the disk is full or failed while writing

The number is the exit code of the command line; anything else that escapes is a bug and shows a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EnginesmithError(Exception):
    """What failed and where, with what was expected, what was found and what to do, where known."""

    exit_code = 1

    def __init__(self, message: str, *, expected: object = None, found: object = None, hint: str | None = None) -> None:
        self.message = message
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        details = (("expected", self.expected), ("found", self.found), ("to do", self.hint))
        return "\n".join([self.message, *(f"  {key}: {value}" for key, value in details if value is not None)])


class VerdictError(EnginesmithError):
    """An engine failed its validation, or a goal was missed."""

    exit_code = 1


class UsageError(EnginesmithError):
    """The request cannot be understood or served."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or an option has a wrong value."""


class UnknownNameError(UsageError):
    """A name that is not known, answered with the nearest one that is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        super().__init__(
            f"unknown {kind} {name!r}",
            expected="one of " + ", ".join(names) if names else None,
            hint=f"did you mean {near[0]!r}?" if near else None,
        )


class DataError(UsageError):
    """Data whose names, shapes, dtypes or values do not fit the model."""


class OutputError(UsageError):
    """The output folder cannot be used."""


class ArchiveError(UsageError):
    """An archive of the cache is damaged, or is something else."""


class ModelError(EnginesmithError):
    """The model could not be loaded or captured."""

    exit_code = 3


class SourceError(ModelError):
    """A model or weights file, or a factory, could not be loaded."""


class CaptureError(ModelError):
    """The model could not be captured as a graph that reproduces it."""


class GraphError(ModelError):
    """A graph breaks a rule of ONNX or of the verifier."""


class EngineError(EnginesmithError):
    """No engine could be built or run."""

    exit_code = 4


class TargetUnavailableError(EngineError):
    """A target cannot be used on this machine."""


class BuildError(EngineError):
    """A builder refused the graph, crashed, hung or ran out of memory."""


class EngineMismatchError(EngineError):
    """A bundle whose files changed, or that was built for another GPU or version."""


class StorageError(EngineError):
    """The disk is full or failed while writing."""
