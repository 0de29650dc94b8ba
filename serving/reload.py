"""Puts a bundle that changed in the place of the one that is served, without a request lost or answered wrongly.

    exported beside ──> loaded under another name ──> answers its own sample ──> takes the name ──> answers again
          │                        │                            │                                        │
          └─ cannot be served      └─ does not load             └─ no answer, or a wrong one             └─ no answer
             or other clients'
                                    the old one was never touched                                   it is loaded again

Triton loads a model that changed beside the one that it has: new requests go to the new one once it is ready, and the
old one is let go when it has answered its own (model control "explicit"). What it does not do is to ask whether the
answers are right. So the new one is tried under a name of its own first, on the same server and with the same settings.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from ..compiler.signature import Signature, TensorSpec
from ..compiler.storage.files import exchange
from ..errors import EngineError
from .endpoint import Endpoint
from .launch import Watching
from .layout import layout
from .probe import Probe, ProbeError, Prober
from .repository import Repository, export, renamed
from .settings import Serving
from .watch import TroubleError, Watch

SUFFIX = ".next"
"""Stands behind the model's name while the new one is tried."""


class Reloader:
    """Bundles that take the place of each other at one path.

    Args:
        served: what the server has loaded.
        settings: how that was exported; the next are too.
        watching: how long loading and answers may take.
    """

    def __init__(
        self, bundle: Path, served: Repository, settings: Serving, endpoint: Endpoint, watching: Watching
    ) -> None:
        self._bundle, self._served, self._endpoint, self._watching = bundle, served, endpoint, watching
        self._settings = dataclasses.replace(settings, name=f"{served.name}{SUFFIX}")
        self._home, self._beside = (served.path / name for name in (served.name, f"{served.name}{SUFFIX}"))

    def replaced(self, watch: Watch, old: Prober) -> Prober:
        """Has the bundle, as it is now, served in the place of the old one.

        Args:
            old: what asks the model that is served.

        Returns:
            What asks the new one.

        Raises:
            EnginesmithError, OSError: it cannot be served, or not to the same clients; it does not load, or does not
                answer rightly. The old one is served as before.
            StoppedError, TroubleError: before that was known, or where the old one could not be loaded again.
        """
        try:
            self._served, probe = self._in_place(watch, old)
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)
        old.close()
        return probe

    def __str__(self) -> str:
        """What is served, for people."""
        return f"engine {self._served.engine} of {self._bundle}"

    def _in_place(self, watch: Watch, old: Prober) -> tuple[Repository, Probe]:
        repository, probe = watch.result(self._tried)
        self._exchange()
        try:
            self._load(watch, probe)
        except TroubleError:
            self._exchange()  # another server begins with the old one
            raise
        except ProbeError:
            self._exchange()
            self._load_old(watch, old)
            raise
        return repository, probe

    def _tried(self) -> tuple[Repository, Probe]:
        """The bundle exported beside what is served, with its new name, once the server has loaded it and it answered.

        Raises:
            EnginesmithError, OSError: it cannot be served, or not to the same clients; no answer, or a wrong one.
        """
        bundle = self._bundle.resolve()  # a link that moves meanwhile must not mix two
        repository = export(bundle, self._served.path, self._settings, link=True)
        if problem := changed(self._served.signature, repository.signature):
            raise EngineError(f"clients of the old model would fail: {problem}")
        probe = Probe(bundle, repository.name, self._endpoint, repository.engine)
        try:
            probe.load(self._watching.start_s)
            probe(self._watching.timeout_s)
        finally:
            probe.unload(self._watching.timeout_s)
        probe.model = self._served.name
        renamed(self._beside, self._served.name)
        return dataclasses.replace(repository, name=self._served.name), probe

    def _load(self, watch: Watch, probe: Prober) -> None:
        """Has the server load what is in the model's place, and answer once.

        Raises:
            ProbeError: it cannot, or the answer is wrong. That others are first is no reason.
        """
        assert watch.server is not None
        watch.server.replace_models()
        watch.result(lambda: probe.load(self._watching.start_s))
        try:
            watch.result(lambda: probe(self._watching.timeout_s))
        except ProbeError as error:
            if not error.busy:
                raise
        watch.server.watch_models()

    def _load_old(self, watch: Watch, old: Prober) -> None:
        try:
            self._load(watch, old)
        except ProbeError as error:
            raise TroubleError(
                f"what was served before could not be loaded again: {error.message}", alive=False
            ) from error

    def _exchange(self) -> None:
        """Puts what lies beside in the model's place, and the other way round."""
        exchange(self._beside, self._home)
        os.utime(self._served.config)  # a model whose files are not newer would be left as it is


def changed(old: Signature, new: Signature) -> str:
    """What clients of the old model would trip over with the new one; empty where nothing.

    The new one may take more sizes than the old one, and give more outputs.
    """
    before, after = ({spec.name: spec for spec in signature.inputs} for signature in (old, new))
    if added := [name for name in after if name not in before]:
        return f"it takes another input, {str(after[added[0]])!r}"
    for name in before:
        if name not in after:
            return f"it has no input {name!r}"
        if not _takes(old, before[name], new, after[name]):
            return f"input {name!r} was {_words(old, before[name])}, and is {_words(new, after[name])}"
    found = {spec.name: spec for spec in new.outputs}
    for spec in old.outputs:
        if spec.name not in found:
            return f"it has no output {spec.name!r}"
        if not _gives(spec, found[spec.name]):
            return f"output {spec.name!r} was {_words(old, spec)}, and is {_words(new, found[spec.name])}"
    if (layout(old).max_batch > 0) != (layout(new).max_batch > 0):
        return f"requests were {'' if layout(old).max_batch else 'not '}merged before, and now the opposite holds"
    return ""


def _takes(old: Signature, before: TensorSpec, new: Signature, after: TensorSpec) -> bool:
    """Whether the new input takes all that the old one took."""
    if before.dtype != after.dtype or len(before.shape) != len(after.shape):
        return False
    for one, other in zip(before.shape, after.shape, strict=True):
        (low, high), (least, most) = _range(old, one), _range(new, other)
        if low < least or high > most:
            return False
    return True


def _gives(before: TensorSpec, after: TensorSpec) -> bool:
    """Whether the new output looks like the old one; sizes that are not fixed follow from the inputs."""
    fixed = [[size if isinstance(size, int) else None for size in spec.shape] for spec in (before, after)]
    return before.dtype == after.dtype and fixed[0] == fixed[1]


def _range(signature: Signature, dim: int | str) -> tuple[int, int]:
    axis = dim if isinstance(dim, int) else signature.axes[dim]
    return (axis, axis) if isinstance(axis, int) else (axis.min, axis.max)


def _words(signature: Signature, spec: TensorSpec) -> str:
    return f"{spec.dtype} {signature.describe(spec)}"
