"""Weights from files and into modules, without running anything that a file holds."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import SourceError
from .guard import first_line, quiet

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training loops put the state_dict in a checkpoint."""

PREFIXES = ("module.", "_orig_mod.")
"""Put before every key by DistributedDataParallel and by torch.compile."""


def read_weights(path: Path) -> dict[str, Any]:
    """A state_dict from .safetensors, or from .pt/.pth with ``weights_only=True``; tensors stay mapped to the file.

    Raises:
        SourceError: the file is missing, truncated, holds code, or holds no state_dict.
    """
    if not path.is_file():
        raise SourceError(f"weights {str(path)!r} are no file", hint="check --weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    checkpoint = _read_torch(path)
    for key in NESTED:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not any(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        found = f"keys {', '.join(map(str, list(checkpoint)[:8]))}" if isinstance(checkpoint, Mapping) else None
        raise SourceError(
            f"weights {str(path)!r} hold no state_dict",
            expected="tensors by name, possibly under " + ", ".join(NESTED),
            found=found or type(checkpoint).__name__,
        )
    return {str(key): value for key, value in checkpoint.items()}


def load_weights(module: torch.nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Puts a state_dict into the module in place of its tensors, in the module's own dtypes.

    Raises:
        SourceError: keys or shapes do not fit.
    """
    own = module.state_dict(keep_vars=True)
    given = _strip_prefixes(state, own)
    for key, tensor in own.items():  # one of two names of a shared tensor is enough
        if key not in given and isinstance(tensor, torch.Tensor):
            twin = next((k for k in given if own.get(k) is tensor), None)
            if twin is not None:
                given[key] = given[twin]
    _check_keys(given, own, path)
    for key, tensor in own.items():
        if isinstance(tensor, torch.Tensor) and given[key].dtype != tensor.dtype:
            given[key] = given[key].to(tensor.dtype)
    module.load_state_dict(given, assign=True)


def check_values(tensors: Mapping[str, torch.Tensor], *, parameters: frozenset[str]) -> None:
    """Refuses NaN anywhere and infinity in parameters (a buffer may be a mask of minus infinity).

    Raises:
        SourceError: the first bad tensor.
    """
    for name, tensor in tensors.items():
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise SourceError(
                f"weight {name!r} has no values (meta device or lazy module)",
                hint="give --weights, or fill it in the factory",
            )
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        low, high = torch.aminmax(tensor.detach())
        bad = "NaN" if low.isnan() else "infinity" if name in parameters and low.isinf() + high.isinf() else None
        if bad:
            raise SourceError(
                f"weight {name!r} holds {bad}",
                expected="finite numbers",
                found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite",
                hint="the checkpoint comes from a training run that diverged, or from a damaged file",
            )


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, struct.error, OSError) as error:
        raise SourceError(
            f"weights {str(path)!r} cannot be read as safetensors",
            found=first_line(error),
            hint="the file is truncated or of another kind; copy it again",
        ) from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    try:
        with quiet():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise _damaged(path, error) from error
        raise SourceError(
            f"weights {str(path)!r} hold pickled code, which is never run",
            expected="a state_dict, saved by torch.save(model.state_dict(), path)",
            found=_reason(error),
            hint="load it where you trust it, and save its state_dict",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> SourceError:
    return SourceError(
        f"weights {str(path)!r} cannot be read",
        expected="a state_dict in .pt, .pth or .safetensors",
        found=first_line(error),
        hint="the file is truncated, damaged or of another kind; copy it again",
    )


def _reason(error: BaseException) -> str:
    """The line of torch's long message that names the class or function it refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = (line for line in lines if "Unsupported" in line or "GLOBAL" in line)
    return next(telling, first_line(error))[:200]


def _strip_prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(state)
    while given and not any(key in own for key in given):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in given)), None)
        if prefix is None:
            break
        given = {key.removeprefix(prefix): value for key, value in given.items()}
    return given


def _check_keys(given: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    problems = []
    if missing := [key for key in own if key not in given]:
        problems.append(f"{len(missing)} missing: {_first(missing)}")
    if unexpected := [key for key in given if key not in own]:
        problems.append(f"{len(unexpected)} unexpected: {_first(unexpected)}")
    shapes = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if isinstance(tensor, torch.Tensor)
        and isinstance(given.get(key), torch.Tensor)
        and given[key].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {_first(shapes)}")
    if values := [k for k, v in own.items() if isinstance(v, torch.Tensor) and not hasattr(given.get(k, v), "shape")]:
        problems.append(f"{len(values)} no tensor: {_first(values)}")
    if problems:
        raise SourceError(
            f"weights {str(path)!r} do not fit the module",
            expected=f"{len(own)} tensors as in the module's state_dict",
            found="; ".join(problems),
            hint="the checkpoint is of another architecture or size; check the factory's arguments",
        )


def _first(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
