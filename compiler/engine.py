"""Loads an engine from a bundle. Needs NumPy and the engine's runtime; torch, onnx and the compiler stay out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from ..errors import (
    DataError,
    EngineError,
    EngineMismatchError,
    TargetUnavailableError,
    UnknownNameError,
    UsageError,
)
from ..targets import get_target, is_known, parse_target
from ..targets.base import EngineInfo, Runner, Target
from .batch.choice import best_within
from .ladder.objective import Objective
from .machine.requirements import check_machine, devices
from .manifest import FORMAT, Benchmark, EngineRecord, Manifest
from .ranking import objective_of, ranks
from .signature import Signature
from .storage.files import sha256

if TYPE_CHECKING:
    import numpy as np

    from .generation.continuous import Batcher
    from .generation.eviction import Eviction
    from .generation.prefixes import Prefixes
    from .generation.speculative import Speculation

Device = Literal["cpu", "cuda"]
Result = TypeVar("Result")


def load(
    bundle: str | Path,
    engine: str | None = None,
    *,
    device: Device | None = None,
    verify: bool = True,
    targets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Engine:
    """Loads the best engine of a bundle for this machine, or the one that is named.

    The best is the one with the lowest recorded median latency at the optimum sizes, among those that were built, did
    not fail validation, were not dropped and can run here. Those that were never timed come after those that were. Of a
    bundle that was compiled for throughput it is the one with the lowest latency at the largest batch, of one for size
    the smallest.

    Args:
        bundle: the folder that `compile` wrote.
        engine: name of an engine, a folder below ``engines/``.
        device: only engines that run there.
        verify: whether to compare the engine's files with the hashes in the manifest.
        targets: targets of your own that engines were built for, as ``file.py:Class``; their code runs.
        options: of the engine's target, in place of those that it was built with, where it has them: ``threads`` and
            ``device_id`` say where it runs; others may not fit what was built.

    Raises:
        UsageError: `bundle` is no bundle.
        UnknownNameError: it has no engine of that name.
        EngineMismatchError: a file changed, or the named engine was built for another machine or version.
        EngineError: no engine, or not the named one, can run here.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    for text in targets:
        parse_target(text)
    return _first(root, manifest, engine, lambda record: _open(root, record, device, manifest, options), verify=verify)


def usable(bundle: Path, engine: str | None = None) -> EngineRecord:
    """The engine that `load` gives, as far as can be told without loading it: its files, this machine, the runtime.

    Raises:
        UsageError, UnknownNameError, EngineMismatchError, EngineError: as `load`.
    """

    def check(record: EngineRecord) -> EngineRecord:
        info, target = _prepared(bundle, record, None, None)
        state = target.availability()
        if not state.run:
            raise TargetUnavailableError(
                f"engine {info.name} cannot run here: {state.reason}", hint=state.install or None
            )
        return record

    manifest = read_manifest(bundle)
    return _first(bundle, manifest, engine, check, verify=True)


def _first(
    root: Path, manifest: Manifest, engine: str | None, attempt: Callable[[EngineRecord], Result], *, verify: bool
) -> Result:
    """The result of the first attempt that succeeds, the fastest engine first; of the named one where one is."""
    if engine is not None:
        record = named(manifest, engine)
        if verify:
            check_files(root, engine, manifest)
        return attempt(record)
    reasons = {record["name"]: _excluded(record) for record in manifest["engines"]}
    for record in ranked(manifest):
        if verify:  # a changed file is never passed over in search of another engine
            check_files(root, record["name"], manifest)
        try:
            return attempt(record)
        except EngineError as error:
            reasons[record["name"]] = error.message
    raise EngineError(
        f"no engine of {root} can run here",
        found="; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no engines",
        hint=_rebuild(root),
    )


class Engine:
    """A loaded engine. Calls may come from several threads.

    Attributes:
        info: all of engine.json.
        best_batch: the batch size with the most throughput, within the limit on p99 where one was given; None where the
            batch search was not asked for, or found none.
    """

    def __init__(self, info: EngineInfo, runner: Runner, best_batch: int | None = None) -> None:
        self.info = info
        self.best_batch = best_batch
        self._runner: Runner | None = runner
        self._signature = info.signature

    @property
    def name(self) -> str:
        """Name of the engine's folder."""
        return self.info.name

    @property
    def target(self) -> str:
        """Name of the target that built it."""
        return self.info.target

    @property
    def precision(self) -> str:
        """Precision that it computes in."""
        return self.info.precision

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self._signature

    def __call__(self, inputs: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
        """Runs on inputs given by name, and gives the outputs as the model nests them: see `run`."""
        if inputs is not None and not isinstance(inputs, Mapping):
            raise DataError(
                f"inputs of {self.name} are given by name",
                expected=f"engine({self._signature.inputs[0].name}=...)",
                found=type(inputs).__name__,
            )
        return self._signature.nest(self.run({**inputs, **named} if inputs else named))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name.

        NumPy arrays give NumPy arrays. Of DLPack tensors (torch, CuPy, JAX), those on the engine's device are read in
        place, and the outputs stay there: ``torch.from_dlpack(output)`` is a view.

        Raises:
            DataError: inputs whose names, dtypes or shapes do not fit.
            EngineError: the runtime failed, or the engine is closed.
        """
        for name, value in inputs.items():
            if not hasattr(value, "dtype"):
                raise DataError(
                    f"input {name!r} is no array", expected="a NumPy array or DLPack tensor", found=type(value).__name__
                )
        self._signature.check(inputs)
        return self._open_runner().run(inputs)

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 128,
        *,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Iterable[int] = (),
        seed: int = 0,
        stream: Callable[[int, int], Any] | None = None,
        prefixes: Prefixes | None = None,
        draft: Engine | None = None,
        speculation: Speculation | None = None,
        eviction: Eviction | None = None,
    ) -> list[list[int]]:
        """Goes on with prompts, token by token; of engines of language models that were compiled with their cache.

        With a `draft` a call checks several tokens that the draft proposed, and the result is what this engine finds by
        itself: a token that it would not have chosen is replaced. Calls of several tokens round otherwise than calls of
        one, so where two logits are equal up to rounding the other token may come. Where activations are scaled by all
        tokens of a call (int8-dynamic), logits differ by more than rounding.

        Args:
            ids: tokens of a prompt, or of several, which may differ in length.
            max_new_tokens: after so many a row ends.
            do_sample: draw tokens by chance; else each is the most likely one.
            temperature: logits are divided by it before tokens are drawn.
            top_k: draw from so many of the likeliest tokens only.
            top_p: draw from the likeliest tokens that together have this probability only.
            stop: tokens at which a row ends; the token itself is its last.
            seed: of what is drawn. Rows do not depend on each other.
            stream: takes the number of a row and its next token, as soon as it is known.
            prefixes: what earlier prompts left in the caches (`enginesmith.Prefixes`); a prompt that begins alike is
                read from where it differs. For one prompt at a time.
            draft: a faster engine with a cache and the same tokens, a smaller model or the same one in fewer bits. This
                engine has to be compiled with ``speculative_tokens``. For greedy search and one prompt at a time.
            speculation: counts what the draft brought (`enginesmith.Speculation`).
            eviction: what a full cache keeps (`enginesmith.Eviction`), so that a text may be longer than it; of engines
                that were compiled with `--decoder eviction=`. Without it a text that does not fit is refused.

        Returns:
            the new tokens of each row.

        Raises:
            DataError: prompts that do not fit the engine.
            RecipeError: an option that is out of range.
            EngineMismatchError: the engine checks no drafts, or the draft is of another vocabulary.
            EngineError: the engine has no cache, fails, or gives logits that are no numbers.
        """
        from .generation.generate import generate

        return generate(
            self._open_runner(), self._signature, ids, max_new_tokens=max_new_tokens, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, seed=seed, stream=stream, prefixes=prefixes,
            draft=(draft._open_runner(), draft._signature) if draft is not None else None, speculation=speculation,
            eviction=eviction,
        )  # fmt: skip

    def log_likelihoods(self, texts: Any, eviction: Eviction | None = None) -> list[np.ndarray]:
        """How likely each token of a text is after those before it; of engines of language models with their cache.

        Args:
            texts: tokens of a text, or of several, each at most as long as the cache.
            eviction: what a full cache keeps, so that texts may be longer; as in `generate`.

        Returns:
            for each text the natural logarithms of the probabilities of all its tokens but the first.

        Raises:
            DataError: texts that do not fit the engine.
            EngineError: the engine has no cache, fails, or gives logits that are no numbers.
        """
        from .generation.likelihood import log_likelihoods

        return log_likelihoods(self._open_runner(), self._signature, texts, eviction)

    def perplexity(self, texts: Any, eviction: Eviction | None = None) -> float:
        """How many tokens the model wavers between, on the average: exp of minus the mean of `log_likelihoods`.

        Over all tokens of all texts alike; lower is better. Arguments and errors are those of `log_likelihoods`.
        """
        from .generation.likelihood import perplexity

        return perplexity(self._open_runner(), self._signature, texts, eviction)

    def batcher(
        self,
        rows: int | None = None,
        prefixes: Prefixes | None = None,
        eviction: Eviction | None = None,
        draft: Engine | None = None,
        speculation: Speculation | None = None,
    ) -> Batcher:
        """Generates for requests that come and go, which share the calls of the engine.

        Args:
            rows: requests that are under way at the same time, at most; all that the engine takes by default.
            prefixes: what earlier prompts left in the caches.
            eviction: what a full cache keeps, as in `generate`; not beside `prefixes`.
            draft: as in `generate`; it proposes tokens to a greedy request as long as no other is under way. Only the
                batcher may use it.
            speculation: counts what the draft brings.

        Raises:
            EngineError: the engine has no cache.
            EngineMismatchError: it takes one number of rows only, or checks no drafts; the draft is of another
                vocabulary.
        """
        from .generation.continuous import Batcher

        drafted = (draft._open_runner(), draft._signature) if draft is not None else None
        return Batcher(self._open_runner(), self._signature, rows, prefixes, eviction, drafted, speculation)

    def reset(self) -> None:
        """Returns an engine that carries state between calls to its first state."""
        self._open_runner().reset()

    def close(self) -> None:
        """Gives back memory, devices and worker processes; the engine cannot run any more."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _open_runner(self) -> Runner:
        if self._runner is None:
            raise EngineError(f"engine {self.name} is closed", hint="load it again")
        return self._runner

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Engine {self.name}: {', '.join(map(str, self._signature.inputs))}>"


def read_manifest(bundle: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        UsageError: there is none.
        EngineMismatchError: it cannot be read, or is of another version.
    """
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"{bundle} is not a bundle: {error.strerror}",
            expected="a folder with manifest.json",
            hint="enginesmith compile MODEL -o BUNDLE makes one",
        ) from error
    except ValueError as error:
        raise EngineMismatchError(f"{path} is damaged: {error}", hint=_rebuild(bundle)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise EngineMismatchError(
            f"{path} is of another version", expected=f"format {FORMAT}", found=found, hint=_rebuild(bundle)
        )
    return cast("Manifest", manifest)


def ranked(manifest: Manifest) -> list[EngineRecord]:
    """The engines that may be chosen: the best first, those without numbers last."""
    signature, objective = Signature.from_json(manifest["signature"]), objective_of(manifest.get("ladder"))
    return by_merit(manifest["engines"], manifest["benchmark"], signature, objective)


def by_merit(
    engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature, objective: Objective
) -> list[EngineRecord]:
    """Of these engines those that may be chosen, as `ranked`."""
    found = ranks(engines, benchmark, signature, objective)
    return sorted((record for record in engines if not _excluded(record)), key=lambda record: found[record["name"]])


def named(manifest: Manifest, engine: str) -> EngineRecord:
    """The engine of that name.

    Raises:
        UnknownNameError: there is none.
        EngineError: it was not built.
    """
    records = {record["name"]: record for record in manifest["engines"]}
    if engine not in records:
        raise UnknownNameError("engine", engine, records)
    record = records[engine]
    if record["status"] in ("failed", "unavailable"):
        raise EngineError(f"engine {engine} was not built: {record['reason']}", hint=record["to_do"] or None)
    return record


def engine_info(bundle: Path, name: str) -> EngineInfo:
    """The description of an engine, without loading it.

    Raises:
        EngineMismatchError: it cannot be read.
    """
    try:
        return EngineInfo.read(bundle / "engines" / name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineMismatchError(f"engine {name} of {bundle} cannot be read", found=error) from error


def best_batch(info: EngineInfo, manifest: Manifest) -> int | None:
    """The best batch that was found for an engine, of those that it takes; None where it was not searched."""
    axis = info.signature.axes.get(info.signature.batch_axis or "")
    curves = (curve for curve in manifest.get("batches", ()) if curve["engine"] == info.name)
    return next((best_within(curve, axis.max) for curve in curves if axis), None)


def check_files(bundle: Path, engine: str, manifest: Manifest) -> None:
    """Compares an engine's files with their hashes in the manifest.

    Raises:
        EngineMismatchError: a file is missing or changed.
    """
    folder = f"engines/{engine}/"
    files = {name: digest for name, digest in manifest["files"].items() if name.startswith(folder)}
    if not files:
        raise EngineMismatchError(f"{bundle}/manifest.json lists no file of engine {engine!r}", hint=_rebuild(bundle))
    for name, expected in files.items():
        try:
            found = sha256(bundle / name)
        except OSError as error:
            raise EngineMismatchError(
                f"{bundle / name} cannot be read: {error.strerror}", hint=_rebuild(bundle)
            ) from error
        if found != expected:
            raise EngineMismatchError(
                f"{bundle / name} changed after it was written",
                expected=f"SHA-256 {expected}",
                found=found,
                hint=_rebuild(bundle),
            )


def _open(
    root: Path, record: EngineRecord, device: Device | None, manifest: Manifest, options: Mapping[str, Any] | None
) -> Engine:
    info, target = _prepared(root, record, device, options)
    return Engine(info, target.runner(root / "engines" / record["name"], info), best_batch(info, manifest))


def _prepared(
    root: Path, record: EngineRecord, device: Device | None, options: Mapping[str, Any] | None
) -> tuple[EngineInfo, Target]:
    """What opens an engine, once it is seen that it is for this machine."""
    folder = root / "engines" / record["name"]
    try:
        info = EngineInfo.read(folder)
        if not is_known(info.target):
            raise EngineMismatchError(
                f"engine {info.name} cannot be read by this version of enginesmith: unknown target {info.target!r}",
                hint=f"name the file of your own target, load(..., targets=['file.py:Class']); or {_rebuild(root)}",
            )
        target = get_target(info.target, info.options)
        replaced = {name: value for name, value in (options or {}).items() if name in target.options()}
        if replaced:
            info = dataclasses.replace(info, options={**info.options, **replaced})
            target = get_target(info.target, info.options)
    except (OSError, ValueError, TypeError, KeyError, UsageError) as error:
        raise EngineMismatchError(
            f"engine {record['name']} cannot be read by this version of enginesmith: {error}", hint=_rebuild(root)
        ) from error
    if device is not None and device not in (runs_on := devices(info, target)):
        raise TargetUnavailableError(
            f"engine {info.name} does not run on {device}", expected=device, found=" or ".join(runs_on)
        )
    check_machine(info, target, _rebuild(root))
    return info, target


def _excluded(record: EngineRecord) -> str:
    """Why an engine is never chosen unless it is named; empty where it may be."""
    if record["status"] in ("failed", "unavailable"):
        return f"not built: {record['reason']}"
    if record["status"] == "built":
        return "built but never run; name it to load it all the same"
    if record["validation"] is not None and not record["validation"]["passed"]:
        return "failed validation; name it to load it all the same"
    if record.get("dropped"):
        return f"dropped, as {record['dropped']}; name it to load it all the same"
    return ""


def _rebuild(bundle: Path) -> str:
    return f"enginesmith compile --recipe {bundle / 'recipe.yaml'} -o {bundle}"
