"""The models of `models.py` with what they take: inputs, arrays for a batch, and the batches they are measured at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
from torch import nn


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model with what it takes: inputs as `--input` has them, for batch 1, and a maker of arrays for a batch."""

    factory: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    arrays: Callable[[int], dict[str, np.ndarray]]
    batches: tuple[int, ...] = (1, 32)

    @property
    def source(self) -> str:
        """The model as the command line takes it."""
        return f"{Path(models.__file__).resolve()}:{self.factory.__name__}"

    def dynamic(self, largest: int, best: int | None = None) -> list[str]:
        """`--dynamic` for batches from 1 to the largest."""
        return [f"{text.partition(':')[0]}:0=1..{best or largest}..{largest}" for text in self.inputs]


IMAGE = ("image:1x3x224x224",)
SENTENCE = (f"input_ids:1x{models.TOKENS}:int64", f"attention_mask:1x{models.TOKENS}:int64")
CLICK = (f"dense:1x{models.DENSE}", f"categories:1x{models.TABLES}:int64")
MODELS = {
    "resnet50": Measured(models.resnet50, IMAGE, models.resnet50_inputs),
    "vit_b16": Measured(models.vit_b16, IMAGE, models.resnet50_inputs),
    "minilm": Measured(models.minilm, SENTENCE, models.minilm_inputs),
    "bert_base": Measured(models.bert_base, SENTENCE, models.minilm_inputs),
    "dlrm": Measured(models.dlrm, CLICK, models.dlrm_inputs, (256, 2048)),
    "lstm_tagger": Measured(models.lstm_tagger, (f"words:1x{models.WORDS}:int64",), models.lstm_tagger_inputs),
}
