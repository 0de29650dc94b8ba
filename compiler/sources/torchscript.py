"""TorchScript: archives (.pt, .jit), and ScriptModules made in Python."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import RecipeError, SourceError
from ..signature import Signature
from ..storage.files import sha256
from . import Model
from .flat import Parameter, arrange, describe, flat_module
from .guard import first_line
from .probe import describe as probe
from .reference import TorchReference
from .weights import check_values, module_tensors, tensor_digest


def load(
    source: Path | torch.jit.ScriptModule,
    *,
    inputs: Signature | None,
    constants: Mapping[str, Any],
    sample: Mapping[str, np.ndarray] | None,
    device: str,
) -> Model:
    """Loads an archive; `constants` are arguments of forward that are no tensors, such as a sampling rate.

    Raises:
        SourceError: the archive is damaged, has no forward, or cannot be run.
        RecipeError: forward needs inputs or constants that were not given.
    """
    script = open_archive(source, device) if isinstance(source, Path) else source
    parameters, plain = forward_parameters(script)
    if inputs is None or not inputs.inputs:
        raise RecipeError(
            "the inputs of the TorchScript model are not known",
            expected="an input for each parameter of " + describe(parameters),
            hint="pass --input name:1x3x224x224[:dtype] for each, and --dynamic name:axis=min..opt..max",
        )
    names = [spec.name for spec in inputs.inputs]
    for name, kind in plain.items():
        required = any(p.name == name and p.required for p in parameters)
        if name in names or (required and name not in constants):
            raise RecipeError(
                f"parameter {name!r} of the model's forward takes no tensor",
                expected=f"an argument of type {kind}",
                found="an input" if name in names else "nothing",
                hint=f"give it as an argument, {name}=VALUE",
            )
    arrangement = arrange(parameters, names, constants)
    tensors = {**module_tensors(script), **_constants(script)}
    check_values(tensors, parameters=frozenset(dict(script.named_parameters())))
    identity = sha256(source) if isinstance(source, Path) else tensor_digest(tensors) + str(script.inlined_graph)
    script.eval()
    restore = _restorer(source, device)
    flat = flat_module(script, arrangement, names)
    reference = TorchReference(flat, inputs, device, restore)
    signature, stateful = probe(reference, inputs, sample)
    return Model(
        kind="torchscript",
        reference=reference,
        signature=signature,
        module=flat,
        onnx_path=None,
        fingerprint=hashlib.sha256(f"{identity}{sorted(constants.items())!r}".encode()).hexdigest(),
        parameter_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        stateful=stateful,
    )


def open_archive(path: Path, device: str = "cpu") -> torch.jit.ScriptModule:
    """Loads an archive.

    Raises:
        SourceError: it is damaged, or uses operators that this torch does not have.
    """
    try:
        script: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise SourceError(
            f"TorchScript archive {str(path)!r} cannot be loaded",
            found=first_line(error),
            hint="it is damaged, or uses operators that this torch does not have",
        ) from error
    return script


def _restorer(source: Path | torch.jit.ScriptModule, device: str) -> Callable[[], torch.nn.Module]:
    if isinstance(source, Path):
        return lambda: open_archive(source, device).eval()
    saved = copy.deepcopy(
        source
    )  # a copy of the weights too; given back as soon as the model turns out to be stateless
    return lambda: copy.deepcopy(saved)


def forward_parameters(script: torch.jit.ScriptModule) -> tuple[list[Parameter], dict[str, str]]:
    """Parameters of forward, and the types of those that take no tensors."""
    if not script._c._has_method("forward"):
        raise SourceError("the TorchScript model has no forward", found=", ".join(script._c._method_names()))
    parameters, plain = [], {}
    for argument in script._c._get_method("forward").schema.arguments[1:]:
        kind = str(argument.type)
        parameters.append(
            Parameter(
                argument.name,
                required=not argument.has_default_value(),
                container=list if kind.startswith(("List[", "Optional[List[")) else tuple,
            )
        )
        if "Tensor" not in kind:
            plain[argument.name] = kind
    return parameters, plain


def _constants(script: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    """Tensors in the code itself, where torch.jit.freeze puts the weights."""
    found = {}
    graph: Any = script.inlined_graph  # must outlive its nodes
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            found[f"constant {node.output().debugName()}"] = node.t("value")
    return found
