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
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ..compiler.signature import Signature, TensorSpec
from ..compiler.states import max_length, vocabulary
from ..compiler.storage.files import exchange
from ..errors import EngineError
from .endpoint import Endpoint
from .launch import Watching
from .layout import layout
from .probe import Probe, ProbeError, Prober
from .repository import Repository, export, renamed
from .server import is_dead
from .settings import Serving
from .watch import TroubleError, Watch

SUFFIX = ".next"
"""Stands behind the model's name, with a number, while the new one is tried."""

NOTICED_S = 5.0
"""Within this time the server says that a process died which loads a model, if it ever does."""


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
        self._settings, self._count = settings, 0
        self._home = served.path / served.name

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
        self._count += 1  # a server that hangs at one of them takes the next all the same
        try:
            self._served, probe = self._in_place(watch, old)
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)
        old.close()
        return probe

    def __str__(self) -> str:
        """What is served, for people."""
        return f"engine {self._served.engine} of {self._bundle}"

    @property
    def _beside(self) -> Path:
        """The folder of the one that is not served, and its name where it is tried."""
        return self._home.with_name(f"{self._served.name}{SUFFIX}{self._count}")

    def _in_place(self, watch: Watch, old: Prober) -> tuple[Repository, Probe]:
        repository, probe = watch.result(self._exported)
        try:
            self._try(watch, probe)
            probe.model = self._served.name
            renamed(self._beside, self._served.name)
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
        except ProbeError:
            probe.close()
            raise
        return dataclasses.replace(repository, name=self._served.name), probe

    def _exported(self) -> tuple[Repository, Probe]:
        """The bundle beside what is served, and what asks it.

        Raises:
            EnginesmithError, OSError: it cannot be served, or not to the same clients.
        """
        bundle = self._bundle.resolve()  # a link that moves meanwhile must not mix two
        settings = dataclasses.replace(self._settings, name=self._beside.name)
        repository = export(bundle, self._served.path, settings, link=True)
        if problem := changed(self._served.signature, repository.signature):
            raise EngineError(f"clients of the old model would fail: {problem}")
        return repository, Probe(bundle, repository.name, self._endpoint, repository.engine)

    def _try(self, watch: Watch, probe: Probe) -> None:
        """Has the server load the new one beside the old one, and answer once.

        Raises:
            ProbeError: it cannot, or the answer is wrong.
        """
        try:
            watch.result(lambda: probe.load(self._watching.start_s), meanwhile=_Loading(watch, probe.model, ProbeError))
            watch.result(lambda: probe(self._watching.timeout_s))
        finally:
            watch.result(lambda: probe.unload(self._watching.timeout_s))

    def _load(self, watch: Watch, probe: Prober) -> None:
        """Has the server load what is in the model's place, and answer once.

        Raises:
            ProbeError: it cannot, or the answer is wrong. That others are first is no reason.
            TroubleError: the server hangs.
        """
        assert watch.server is not None
        watch.server.replace_models()
        hung = functools.partial(TroubleError, alive=False)  # a server that loads it without end loads it no more
        looks = _Loading(watch, self._served.name, hung)
        watch.result(lambda: probe.load(self._watching.start_s), meanwhile=looks)
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
        self._served.touch()


class _Loading:
    """Looks after the processes that load a model: of one that dies early the server may never take notice.

    Args:
        hung: the error to raise then.
    """

    def __init__(self, watch: Watch, model: str, hung: Callable[[str], Exception]) -> None:
        assert watch.server is not None
        self._server, self._model, self._hung = watch.server, model, hung
        self._before = self._server.children()
        self._seen: set[psutil.Process] = set()
        self._since: float | None = None

    def __call__(self) -> None:
        """Raises the error where one has been dead for `NOTICED_S`."""
        self._seen.update(set(self._server.children()).difference(self._before))
        dead = next(filter(is_dead, self._seen), None)
        if dead is None:
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() > self._since + NOTICED_S:
            raise self._hung(f"process {dead.pid}, which was to load model {self._model!r}, died")


def changed(old: Signature, new: Signature) -> str:
    """What clients of the old model would trip over with the new one; empty where nothing.

    The new one may take more sizes than the old one, and give more outputs.
    """
    if old.states or new.states:
        return _another_language_model(old, new)
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


def _another_language_model(old: Signature, new: Signature) -> str:
    """Clients send tokens and get tokens; what the cache is made of is nothing to them."""
    if not (old.states and new.states):
        return f"the old one was {'a' if old.states else 'no'} language model, and the new one is the opposite"
    if vocabulary(old) != vocabulary(new):
        return f"it knew {vocabulary(old)} tokens, and knows {vocabulary(new)}"
    if max_length(new) < max_length(old):
        return f"it had room for {max_length(old)} tokens, and has room for {max_length(new)}"
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
