"""Programs saved by torch.export . The signature is the file's; ranges of its dynamic axes come from the user."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from ...errors import RecipeError, SourceError
from ..signature import DTYPES, Signature, TensorSpec
from ..storage.files import sha256
from . import Model
from .flat import flat_module
from .guard import Log, discard, first_line, foreign, quiet
from .probe import describe as probe
from .ranges import FileInput, with_ranges
from .reference import TorchReference, snapshot
from .weights import check_values, module_tensors


@dataclasses.dataclass(frozen=True)
class _Unflatten:
    """Puts tensors among the program's constant arguments, and nests them as it was exported."""

    leaves: tuple[Any, ...]
    spec: Any

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.leaves]
        arguments, keywords = torch.utils._pytree.tree_unflatten(leaves, self.spec)
        return tuple(arguments), dict(keywords)


_TENSOR = object()


def load(
    path: Path,
    *,
    inputs: Signature | None,
    dynamic: Sequence[str] = (),
    sample: Mapping[str, np.ndarray] | None,
    device: str,
    log: Log,
) -> Model:
    """Loads a program.

    Raises:
        SourceError: the file is damaged or of another version, or the program cannot be run.
        RecipeError: `inputs` do not fit the program, or leave an axis without range.
    """
    program = open_program(path, log)
    with quiet(log):
        module = program.module()
    for part in module.modules():
        part.training = False  # it was exported in the mode that it has; eval() is not supported on it
    leaves, declared = program_inputs(program)
    signature = with_ranges(declared, inputs, path.name, dynamic=dynamic, keep_names=False)
    _check_ranges(program, declared, signature, path.name)
    tensors = module_tensors(module)
    check_values(tensors, parameters=frozenset(program.graph_signature.parameters))
    module.to(device)
    names = [item.spec.name for item in declared]
    flat = flat_module(module, _Unflatten(leaves, program.call_spec.in_spec), names)
    reference = TorchReference(flat, signature, device, snapshot(module))
    signature, stateful = probe(reference, signature, sample)
    return Model(
        kind="exported-program",
        reference=reference,
        signature=signature,
        module=flat,
        onnx_path=None,
        fingerprint=sha256(path),
        parameter_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        stateful=stateful,
    )


def open_program(path: Path, log: Log = discard) -> torch.export.ExportedProgram:
    """Loads a program, and none of the pickled code that it may hold.

    Raises:
        SourceError: it is damaged, of another version, or holds pickled code.
    """

    def failed(error: BaseException) -> SourceError:
        return SourceError(
            f"exported program {str(path)!r} cannot be loaded",
            found=first_line(error),
            hint="it is damaged, or was saved by another version of torch; export it again",
        )

    with quiet(log), foreign(failed), _no_pickled_code(path):
        return torch.export.load(path)


@contextlib.contextmanager
def _no_pickled_code(path: Path) -> Iterator[None]:
    """Makes torch.export.load refuse pickles that hold code: it reads some members with ``weights_only=False``."""
    with zipfile.ZipFile(path) as archive:
        opaque = [name for name in archive.namelist() if "/opaque_obj_" in name]
    if opaque:
        raise SourceError(
            f"exported program {str(path)!r} holds pickled objects, which are never loaded",
            found=opaque[0],
            hint="export the model without opaque objects",
        )
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def program_inputs(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], list[FileInput]]:
    """The program's flat arguments, tensors marked, and what each tensor is."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    leaves: list[Any] = []
    declared = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
            continue
        value = values[spec.arg.name]
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if not isinstance(spec.arg, TensorArgument) or dtype not in DTYPES.values():
            raise SourceError(
                f"input {spec.arg.name!r} of the exported program is no tensor that engines take",
                expected="a tensor of " + ", ".join(sorted(set(DTYPES.values()))),
                found=dtype,
                hint="export the program with this input as a constant",
            )
        leaves.append(_TENSOR)
        declared.append(FileInput(TensorSpec(spec.arg.name, dtype, ()), tuple(_dimension(dim) for dim in value.shape)))
    return tuple(leaves), declared


def _dimension(dim: int | torch.SymInt) -> int | str:
    return dim if isinstance(dim, int) else str(dim.node.expr)


def _check_ranges(
    program: torch.export.ExportedProgram, declared: Sequence[FileInput], signature: Signature, file: str
) -> None:
    """Refuses ranges beyond those that the program was exported for."""
    bounds = {str(symbol): found for symbol, found in program.range_constraints.items()}
    for item, spec in zip(declared, signature.inputs, strict=True):
        for index, (symbol, dim) in enumerate(zip(item.dims, spec.shape, strict=True)):
            if isinstance(symbol, int) or symbol not in bounds:
                continue
            allowed = bounds[str(symbol)]
            wanted = (signature.axes[dim].min, signature.axes[dim].max) if isinstance(dim, str) else (dim, dim)
            if wanted[0] < allowed.lower or wanted[1] > allowed.upper:
                raise RecipeError(
                    f"axis {index} of input {spec.name!r} goes beyond what {file} was exported for",
                    expected=f"within {allowed.lower}..{allowed.upper}",
                    found=f"{wanted[0]}..{wanted[1]}",
                    hint="narrow --dynamic, or export the program again",
                )
