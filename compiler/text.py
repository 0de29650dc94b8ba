"""What a bundle keeps of a language model beside its engines: tokenizer.json, and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sources import Model

FOLDER, TOKENIZER, GENERATION = "text", "tokenizer.json", "generation.json"


def keep_text(model: Model, bundle: Path) -> None:
    """Puts them into the bundle of a language model; other models have none."""
    if not model.signature.states:
        return
    folder = bundle / FOLDER
    folder.mkdir()
    (folder / GENERATION).write_text(json.dumps({"stop": list(model.stop)}) + "\n")
    if model.tokenizer is not None:
        (folder / TOKENIZER).write_bytes(model.tokenizer.read_bytes())
