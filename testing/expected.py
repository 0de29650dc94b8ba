"""What an engine should give: samples with the outputs of a reference of any kind, one at a time."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.comparison.place import Place
from ..compiler.data import as_declared, open_data
from ..compiler.engine import Engine
from ..compiler.signature import Signature
from ..compiler.validation.reference import OUTPUTS, Recorded, ReferenceOutputs
from ..errors import DataError

Arrays = Mapping[str, np.ndarray]


def pairs(
    engine: Engine, place: Place | None, reference: Any, inputs: Any, max_samples: int, seed: int
) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs, as the engine declares them, and what the reference makes of them.

    Raises:
        DataError: inputs or outputs that do not fit the engine, or none.
    """
    record = _record(engine, place, reference, max_samples)
    if record is not None and inputs is None:
        for recorded in record:
            yield as_declared(recorded.inputs, engine.signature), recorded.outputs
        return
    given = _inputs(engine.signature, place, inputs, max_samples, seed)
    if record is not None:
        reference = [sample.outputs for sample in record if not sample.probe]
    if reference is None:
        raise DataError(
            f"engine {engine.name} has no record of a reference", hint="give a reference, or a bundle in place of it"
        )
    if (saved := _saved(reference, engine.signature)) is not None:
        yield from _together(given, saved, engine.signature)
        return
    with _running(reference, engine, place, given) as run:
        for sample in given:
            yield as_declared(sample, engine.signature), run(sample)


def _record(engine: Engine, place: Place | None, reference: Any, max_samples: int) -> Iterable[Recorded] | None:
    """The bundle's record where there is no other reference, or the record in a folder that was named."""
    if reference is None:
        return place.reference(max_samples) if place else None
    if isinstance(reference, (str, Path)) and (Path(reference) / OUTPUTS).is_file():
        return ReferenceOutputs(Path(reference), engine.signature, max_samples=max_samples)
    return None


def _inputs(
    signature: Signature, place: Place | None, inputs: Any, max_samples: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """The samples as arrays; those of the bundle's record where none were given."""
    if inputs is None:
        record = place.reference(max_samples) if place else None
        if record is None:
            raise DataError("there are no inputs to compare on", expected="arrays by the names of the inputs")
        found: Iterable[Any] = [sample.inputs for sample in record]
    elif isinstance(inputs, Mapping):
        found = [inputs]
    elif isinstance(inputs, (str, Path)):
        found = open_data(str(inputs), signature, seed=seed)
    else:
        found = inputs
    samples = []
    for sample in itertools.islice(found, max_samples):
        if not isinstance(sample, Mapping):
            raise DataError(
                "inputs are given by name", expected="a dict of arrays, or a list of dicts", found=type(sample).__name__
            )
        samples.append({name: _array(value, f"input {name!r}") for name, value in sample.items()})
    return samples


def _saved(reference: Any, signature: Signature) -> list[dict[str, np.ndarray]] | None:
    """Outputs that were saved, one dict a sample; None where the reference is something to run."""
    if isinstance(reference, (str, Path)):
        if Path(reference).suffix != ".npz":
            return None
        try:
            with np.load(reference, allow_pickle=False) as file:
                return [dict(file)]
        except (OSError, ValueError) as error:
            raise DataError(f"outputs {str(reference)!r} cannot be read", found=error) from error
    if isinstance(reference, Mapping):
        return [_named(reference, signature)]
    if isinstance(reference, np.ndarray) or (hasattr(reference, "__array__") and not callable(reference)):
        return [_named(reference, signature)]
    if isinstance(reference, Sequence):
        return [_named(sample, signature) for sample in reference]
    return None


def _together(
    given: Sequence[Arrays], saved: Sequence[Arrays], signature: Signature
) -> Iterator[tuple[Arrays, Arrays]]:
    if len(given) != len(saved):
        raise DataError(
            "inputs and saved outputs are not of the same number of samples",
            expected=f"{len(given)}, as there are inputs",
            found=f"{len(saved)} outputs",
        )
    for inputs, outputs in zip(given, saved, strict=True):
        yield as_declared(inputs, signature), outputs


@contextlib.contextmanager
def _running(
    reference: Any, engine: Engine, place: Place | None, samples: Sequence[Arrays]
) -> Iterator[Callable[[Arrays], Arrays]]:
    """A function from inputs to outputs by name."""
    if _is_model(reference):
        with _model(reference, engine, place, samples) as run:
            yield run
    elif callable(reference):
        _check_takes(reference, engine)
        yield lambda inputs: _named(reference(**inputs), engine.signature)
    else:
        raise DataError(
            "the reference is of an unknown kind",
            expected="a torch module, a function, a model file, or saved outputs",
            found=type(reference).__name__,
        )


def _check_takes(function: Callable[..., Any], engine: Engine) -> None:
    """Raises DataError where a function does not take the inputs by their names."""
    names = [spec.name for spec in engine.signature.inputs]
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise DataError(
            "the reference does not take the inputs of the engine by name",
            expected=f"a function of {', '.join(names)}",
            found=error,
        ) from error
    except ValueError:  # a builtin that does not tell
        return


def _is_model(reference: Any) -> bool:
    if isinstance(reference, (str, Path)):
        return True
    return any(cls.__module__.startswith("torch.nn.") and cls.__name__ == "Module" for cls in type(reference).__mro__)


@contextlib.contextmanager
def _model(
    reference: Any, engine: Engine, place: Place | None, samples: Sequence[Arrays]
) -> Iterator[Callable[[Arrays], Arrays]]:
    """A model in torch or ONNX, in eval mode meanwhile, where its parameters are."""
    from ..compiler.sources import load_model

    signature = engine.signature
    if place is not None and place.bundle is not None:
        signature = Signature.from_json(place.bundle.manifest["signature"])
    declared = Signature(inputs=signature.inputs, axes=signature.axes)
    training = [part for part in reference.modules() if part.training] if hasattr(reference, "modules") else []
    devices = {tensor.device.type for tensor in reference.parameters()} if hasattr(reference, "parameters") else set()
    if not samples:
        raise DataError("there are no samples to compare on", expected="at least one", found="none")
    try:
        model = load_model(
            reference,
            inputs=declared,
            device="cuda" if "cuda" in devices else "cpu",
            sample=as_declared(samples[0], declared),
        )

        def run(inputs: Arrays) -> Arrays:
            model.reference.reset()
            return _renamed(model.reference.run(as_declared(inputs, declared)), engine.signature)

        yield run
    finally:
        for part in training:
            part.training = True


def _renamed(outputs: Arrays, signature: Signature) -> Arrays:
    """The names of the engine's outputs, in order, where the model has as many under other names."""
    names = [spec.name for spec in signature.outputs]
    if set(names) == set(outputs) or len(names) != len(outputs):
        return outputs
    return dict(zip(names, outputs.values(), strict=True))


def _named(value: Any, signature: Signature) -> dict[str, np.ndarray]:
    """Flat outputs by name, out of what a function returned or a user saved: by name, or nested as the model nests."""
    names = [spec.name for spec in signature.outputs]
    if isinstance(value, Mapping) and set(value) <= set(names):
        flat = dict(value)
    elif signature.structure is None:
        flat = {names[0]: value}
    else:
        flat = {}
        _unnest(signature.structure, value, flat)
    return {name: _array(array, f"output {name!r} of the reference") for name, array in flat.items()}


def _unnest(structure: Any, value: Any, flat: dict[str, Any]) -> None:
    """The inverse of `Signature.nest`."""
    if structure is None:
        return
    if isinstance(structure, str):
        flat[structure] = value
        return
    ((kind, items),) = structure.items()
    if kind == "dict":
        fits = isinstance(value, Mapping) and set(items) <= set(value)
    else:
        fits = isinstance(value, (tuple, list)) and len(value) == len(items)
    if not fits:
        raise DataError(
            "the reference returns something else than the engine",
            expected=f"a {kind} of {', '.join(items) if kind == 'dict' else len(items)}",
            found=", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__,
        )
    for key, item in items.items() if kind == "dict" else enumerate(items):
        _unnest(item, value[key], flat)


def _array(value: Any, what: str) -> np.ndarray:
    """An array of a NumPy array, a list or a tensor of torch on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} is no array", expected="an array of numbers", found=error) from error
    if array.dtype.hasobject:
        raise DataError(f"{what} is no array", expected="an array of numbers", found=type(value).__name__)
    return array
