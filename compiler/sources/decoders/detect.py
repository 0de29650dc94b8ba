"""Tells causal language models of transformers from other modules, without importing transformers for nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs


def is_folder(path: Path) -> bool:
    """Whether a model is a folder as transformers' `save_pretrained` writes it."""
    return (path / "config.json").is_file()


def is_causal(module: torch.nn.Module) -> TypeIs[PreTrainedModel]:
    """Whether a module is a causal language model of transformers: one that is has imported it."""
    if "transformers" not in sys.modules:
        return False
    import transformers

    if not isinstance(module, transformers.PreTrainedModel) or not module.can_generate():
        return False
    config = module.config
    return not (getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))


def require_transformers(path: Path) -> None:
    """Raises SourceError where transformers, which loads the folder, is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"model {str(path)!r} is a folder of transformers, which cannot be imported: {error}",
            hint="pip install 'enginesmith[text]'",
        ) from error
