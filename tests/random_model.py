"""Language models of transformers with random weights. Read with `runpy.run_path`."""

from __future__ import annotations

import torch
import transformers


def random(make, deviation: float = 0.3) -> transformers.PreTrainedModel:
    """With weights so large that tokens differ, and by no near miss."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, deviation)
    return model
