"""Finds out what the user gave as a model, and loads it. One file here for each kind of source.

A `Model` is the reference: it runs the model as it was given, and every graph and engine is judged against it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ...errors import RecipeError, SourceError
from ..signature import Signature
from .decoders.detect import is_folder

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        kind: what it was loaded from.
        reference: runs it.
        signature: names, dtypes, shapes, dynamic axes and nesting, of inputs and outputs.
        module: the torch module whose forward takes the inputs as positional tensors in the signature's order and
            returns a flat tuple in the order of the outputs; None for ONNX sources.
        onnx_path: the file of an ONNX source.
        fingerprint: hash of code, weights and factory arguments, part of the cache's key.
        parameter_bytes: size of the weights.
        stateful: whether it carries state from one call to the next, which `reference.reset` clears.
        tokenizer: tokenizer.json of a language model that has one.
        stop: tokens that end a text.
    """

    kind: Literal["module", "torchscript", "exported-program", "onnx"]
    reference: Reference
    signature: Signature
    module: torch.nn.Module | torch.jit.ScriptModule | None
    onnx_path: Path | None
    fingerprint: str
    parameter_bytes: int
    stateful: bool = False
    tokenizer: Path | None = None
    stop: tuple[int, ...] = ()

    def without_weights(self) -> Model:
        """What is known about the model. It cannot run any more; its weights are freed where nobody else holds them."""
        return dataclasses.replace(self, reference=_Freed(), module=None)


class Reference(Protocol):
    """Runs the model as the user gave it."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, on the host, in the model's own precision."""

    def reset(self) -> None:
        """Returns a stateful model to its first state."""


class _Freed:
    """In the place of a reference that nobody was to run any more."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("the weights of this model were let go")

    def reset(self) -> None:
        """Keeps no state."""


def load_model(
    source: str | Path | torch.nn.Module,
    *,
    weights: Path | None = None,
    inputs: Signature | None = None,
    dynamic: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    device: str = "cpu",
    sample: Mapping[str, np.ndarray] | None = None,
    decoder: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Model:
    """Loads a model from whatever names it: ``file.py:factory``, a module, or a file of TorchScript, .pt2 or ONNX.

    A folder of transformers, and a causal language model of transformers whose inputs are not declared, is loaded with
    its cache (see states.py).

    Args:
        source: what the user gave.
        weights: state_dict for a factory or module (.pt, .pth, .safetensors).
        inputs: names, dtypes, shapes and ranges of the inputs. The kinds that tell them themselves (.pt2, ONNX) need
            only the ranges of their dynamic axes.
        dynamic: those ranges, ``name:axis=min..opt..max``, where `inputs` is None.
        arguments: keyword arguments of the factory; of forward, where a module or TorchScript takes some that are no
            tensors.
        device: where the reference runs; ONNX runs on the CPU always.
        sample: real inputs, for models that refuse random ones.
        decoder: options of the cache of a language model; a module with these has to have one.
        log: takes what the user's code prints.

    Raises:
        SourceError: the source cannot be loaded or run.
        RecipeError: inputs or options that do not fit the source.
        UnknownNameError: a factory or an input that does not exist.
    """
    constants = dict(arguments or {})
    decoding = dict(decoder or {})
    if not isinstance(source, (str, Path)):
        _no_dynamic(dynamic)
        return _load_object(source, weights, inputs, constants, sample, device, decoding)
    if ".py:" in str(source):
        from . import module

        _no_dynamic(dynamic)
        _check_device(device)
        made = module.load_factory(str(source), constants, log)
        file, _, factory = str(source).rpartition(":")
        code = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        identity = f"{code}{factory}{sorted(constants.items())!r}"
        from .decoders.load import load_module

        return load_module(made, weights, inputs, {}, sample, device, identity, decoding)
    if is_folder(Path(source)):
        from .decoders.load import load_folder

        _no_weights(weights, f"{Path(source).name}, which holds its own")
        _check_device(device)
        return load_folder(Path(source), inputs, dynamic, constants, device, decoding)
    _no_decoder(decoding, f"{Path(source).name}")
    return _load_file(Path(source), weights, inputs, dynamic, constants, sample, device, log)


def describe_source(source: str) -> dict[str, Any]:
    """What a source tells about itself without inputs: kind, inputs, operators, precisions of the weights, sizes.

    Raises:
        SourceError: the source cannot be loaded.
    """
    from .description import describe

    return describe(source)


def _load_object(
    source: torch.nn.Module,
    weights: Path | None,
    inputs: Signature | None,
    constants: Mapping[str, Any],
    sample: Mapping[str, np.ndarray] | None,
    device: str,
    decoding: Mapping[str, Any],
) -> Model:
    import torch

    _check_device(device)
    if isinstance(source, torch.jit.ScriptModule):
        from . import torchscript

        _no_weights(weights, "a ScriptModule")
        _no_decoder(decoding, "a ScriptModule")
        return torchscript.load(source, inputs=inputs, constants=constants, sample=sample, device=device)
    if isinstance(source, torch.nn.Module):
        from .decoders.load import load_module

        identity = repr(sorted(constants.items()))
        return load_module(source, weights, inputs, constants, sample, device, identity, decoding)
    raise SourceError(
        "the model is of a type that cannot be loaded",
        expected="a path, file.py:factory, or a torch.nn.Module",
        found=f"{type(source).__module__}.{type(source).__qualname__}",
    )


def _load_file(
    path: Path,
    weights: Path | None,
    inputs: Signature | None,
    dynamic: Sequence[str],
    constants: Mapping[str, Any],
    sample: Mapping[str, np.ndarray] | None,
    device: str,
    log: Callable[[str], None],
) -> Model:
    from .detect import detect

    if path.suffix == ".py":
        from .user_code import definitions

        names = definitions(path) if path.is_file() else []
        raise SourceError(
            f"model {str(path)!r} names no factory",
            expected=f"{path}:factory, a function or class that gives the module",
            found="it defines " + ", ".join(names) if names else None,
            hint=f"for instance {path}:{names[-1]}" if names else None,
        )
    kind = detect(path)
    if kind == "weights":
        raise SourceError(
            f"model {str(path)!r} holds weights only",
            expected="a model with its code",
            hint=f"write a factory that makes the module, and give file.py:factory with --weights {path}",
        )
    _no_weights(weights, f"{path.name}, which holds its own")
    if kind != "onnx":
        _check_device(device)
    if kind == "torchscript":
        from . import torchscript

        _no_dynamic(dynamic)
        return torchscript.load(path, inputs=inputs, constants=constants, sample=sample, device=device)
    if constants:
        raise RecipeError(f"{path.name} takes no arguments", found=", ".join(constants), hint="leave them out")
    if kind == "exported-program":
        from . import exported_program

        return exported_program.load(path, inputs=inputs, dynamic=dynamic, sample=sample, device=device, log=log)
    from . import onnx_file

    return onnx_file.load(path, inputs=inputs, dynamic=dynamic)


def _no_dynamic(dynamic: Sequence[str]) -> None:
    if dynamic:
        raise RecipeError(
            "--dynamic needs --input here: the model does not tell its inputs",
            expected="an input of that name",
            found=", ".join(dynamic),
            hint="pass --input name:1x3x224x224[:dtype] for each input",
        )


def _no_weights(weights: Path | None, what: str) -> None:
    if weights is not None:
        raise RecipeError(f"--weights {weights} does not go with {what}", expected="a file.py:factory as the model")


def _check_device(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("the reference cannot run on a GPU here", found=f"device {device!r}", hint="choose 'cpu'")


def _no_decoder(decoding: Mapping[str, Any], what: str) -> None:
    if decoding:
        raise RecipeError(
            f"--decoder does not go with {what}, a model without a cache",
            expected="a folder of transformers, or a factory that gives a causal language model",
        )
