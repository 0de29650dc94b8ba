"""``file.py:factory`` and modules made in Python."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import RecipeError, SourceError
from ..signature import Signature
from . import Model
from .flat import arrange, describe, flat_module, python_parameters
from .guard import Log
from .probe import describe as probe
from .reference import TorchReference, snapshot
from .user_code import check_call, load_symbol, running
from .weights import check_values, load_weights, module_tensors, read_weights, tensor_digest


def load_factory(source: str, arguments: Mapping[str, Any], log: Log) -> torch.nn.Module:
    """Runs ``file.py:factory``, with random weights drawn from seed 0.

    Raises:
        SourceError: the file or the factory fails, or gives no module.
        RecipeError: no function or class, or one that does not take these arguments.
        UnknownNameError: the file has no such factory, or the factory no such parameter.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        factory = load_symbol(source, log=log)
        if isinstance(factory, torch.nn.Module):
            if arguments:
                found = ", ".join(arguments)
                raise RecipeError(f"{source} is a module already and takes no arguments", found=found)
            return factory
        check_call(factory, source, kind="factory", keywords=arguments, error=RecipeError)
        with running(Path(source.rpartition(":")[0]).absolute(), log):
            made = factory(**arguments)
    if not isinstance(made, torch.nn.Module):
        raise SourceError(
            f"{source} gives no module",
            expected="a torch.nn.Module",
            found=f"{type(made).__module__}.{type(made).__qualname__}",
        )
    return made


def load(
    module: torch.nn.Module,
    *,
    weights: Path | None,
    inputs: Signature | None,
    constants: Mapping[str, Any],
    sample: Mapping[str, np.ndarray] | None,
    device: str,
    identity: str,
) -> Model:
    """A module with its weights, put into eval mode; it is changed in place, not copied.

    `constants` are arguments of forward that are no inputs; `identity` tells code and arguments apart in the cache.
    """
    parameters, any_keyword = python_parameters(module)
    if inputs is None or not inputs.inputs:
        raise RecipeError(
            "the inputs of the model are not known",
            expected="an input for each parameter of " + describe(parameters),
            hint="pass --input name:1x3x224x224[:dtype] for each, and --dynamic name:axis=min..opt..max",
        )
    names = [spec.name for spec in inputs.inputs]
    arrangement = arrange(parameters, names, constants, any_keyword=any_keyword)
    if weights is not None:
        load_weights(module, read_weights(weights), weights)
    tensors = module_tensors(module)
    check_values(tensors, parameters=frozenset(dict(module.named_parameters())))
    fingerprint = hashlib.sha256(f"{identity}{_code(module)}{tensor_digest(tensors)}".encode()).hexdigest()
    module.eval().to(device)
    flat = flat_module(module, arrangement, names)
    reference = TorchReference(flat, inputs, device, snapshot(module))
    signature, stateful = probe(reference, inputs, sample)
    return Model(
        kind="module",
        reference=reference,
        signature=signature,
        module=flat,
        onnx_path=None,
        fingerprint=fingerprint,
        parameter_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        stateful=stateful,
    )


def _code(module: torch.nn.Module) -> str:
    """Structure, and hashes of the files that define the module's classes; torch's own count by version."""
    files = {_source_file(type(part)) for part in module.modules()}
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files) if file]
    return "\n".join([torch.__version__, type(module).__qualname__, repr(module), *hashes])


def _source_file(cls: type) -> str:
    find: Callable[[type], str | None] = inspect.getsourcefile
    if cls.__module__.split(".")[0] == "torch":
        return ""
    try:
        return find(cls) or ""
    except (TypeError, OSError):
        return ""
