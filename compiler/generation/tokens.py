"""Text to tokens and back, by the tokenizer.json in a bundle. Needs the package tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import EngineMismatchError, TargetUnavailableError, UsageError
from ..engine import read_manifest
from ..storage.files import sha256
from ..text import FOLDER, GENERATION, TOKENIZER

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are no whole character yet."""


def open_tokenizer(bundle: Path) -> Any:
    """The tokenizer of a bundle.

    Raises:
        UsageError: the bundle has none.
        EngineMismatchError: its file changed.
        TargetUnavailableError: the package tokenizers is not installed.
    """
    path = bundle / FOLDER / TOKENIZER
    if not path.is_file():
        raise UsageError(
            f"{bundle} has no tokenizer",
            expected=f"{FOLDER}/{TOKENIZER}, from a folder of transformers that holds one",
            hint="give token numbers with --ids 1,2,3",
        )
    _check(bundle, path)
    try:
        import tokenizers
    except ImportError as error:
        raise TargetUnavailableError(
            f"tokenizers cannot be imported: {error}",
            hint="pip install 'enginesmith[text]', or give token numbers with --ids 1,2,3",
        ) from error
    return tokenizers.Tokenizer.from_file(str(path))


def ends_of(bundle: Path) -> tuple[int, ...]:
    """The tokens that end a text, as the model tells them; none where it does not.

    Raises:
        EngineMismatchError: the file changed.
    """
    path = bundle / FOLDER / GENERATION
    if not path.is_file():
        return ()
    _check(bundle, path)
    return tuple(json.loads(path.read_text())["stop"])


class Writer:
    """Writes tokens as text, each character as soon as it is whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        self._show(self.text.rstrip(HALF))

    def close(self) -> None:
        """Writes what is left, whole or not."""
        self._show(self.text)

    @property
    def text(self) -> str:
        """All tokens so far as text."""
        return str(self._tokenizer.decode(self._tokens))

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text


def _check(bundle: Path, path: Path) -> None:
    name = f"{FOLDER}/{path.name}"
    expected, found = read_manifest(bundle)["files"].get(name), sha256(path)
    if found != expected:
        raise EngineMismatchError(
            f"{path} changed after it was written", expected=f"SHA-256 {expected}", found=found,
            hint="compile the model again",
        )  # fmt: skip
