"""Packages that TorchInductor made, opened and called by torch's runtime.

`torch._inductor.aoti_load_package` does the same by way of the compiler: importing it takes seconds, so do the programs
by which it learns, for a warning, which vector instructions the processor has, and each call parses how the arguments
were nested. Ours are flat, and an engine says itself what it requires of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Package:
    """A program on tensors, which gives its outputs in order. It checks nothing: see `Signature.check`.

    Args:
        single_threaded: whether calls come one at a time; only such calls can be captured as CUDA graphs.
        device_index: the GPU; -1 for the current one, and on a CPU.

    Raises:
        RuntimeError: the file is no package, or of another version of torch.
    """

    def __init__(self, file: Path, *, single_threaded: bool = False, device_index: int = -1) -> None:
        self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", single_threaded, 1, device_index)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a call."""
        outputs: list[torch.Tensor] = self._loader.boxed_run(list(tensors))
        return outputs

    def constants(self) -> list[str]:
        """The names of the weights that it reads."""
        names: list[str] = self._loader.get_constant_fqns()
        return names

    def refer_to(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Reads these weights from now on, all that it has, where they are: they have to stay."""
        inactive, all_of_them, user_managed = False, True, True
        self._loader.load_constants(dict(constants), inactive, all_of_them, user_managed)
