"""Trains the sample's network on synthetic clicks: `python samples/recommendation/train.py [FOLDER]`.

Writes recommender.safetensors, test.npz, impressions that training never saw, with their clicks and true probabilities,
and calibration.npz, some of those that it did. The same seed gives the same weights.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from clicks import clicks
from metric import auc
from model import recommender
from safetensors.torch import save_file
from torch.nn import functional

TRAINED, TESTED, CALIBRATED = 600_000, 8192, 2048
EPOCHS = int(os.environ.get("EPOCHS", "3"))  # fewer for a trial
BATCH = 2048


def train(data: dict[str, np.ndarray]) -> torch.nn.Module:
    numbers, categories, click = (torch.from_numpy(data[name]) for name in ("numbers", "categories", "click"))
    model = recommender().train()
    tables = [parameter for name, parameter in model.named_parameters() if name.startswith("tables")]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("tables")]
    for table in tables:
        torch.nn.init.normal_(table, 0, 0.2)
    optimizer = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.01}], lr=1e-3
    )
    steps = EPOCHS * (len(click) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(click))[: len(click) // BATCH * BATCH]
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            predicted = model(numbers[batch], categories[batch])
            functional.binary_cross_entropy(predicted, click[batch].float()).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.use_deterministic_algorithms(True)
    data, test = clicks(TRAINED, seed=1), clicks(TESTED, seed=2)
    model = train(data)
    with torch.inference_mode():
        predicted = model(torch.from_numpy(test["numbers"]), torch.from_numpy(test["categories"])).numpy()
    reached, best = (auc({"click": scores}, test).mean() for scores in (predicted, test["probability"]))
    save_file(model.state_dict(), folder / "recommender.safetensors")
    np.savez_compressed(folder / "test.npz", **test)
    inputs = {name: data[name][:CALIBRATED] for name in ("numbers", "categories")}
    np.savez_compressed(folder / "calibration.npz", **inputs)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, AUC {reached:.4f}, the best that can be had is {best:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
