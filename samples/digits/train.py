"""Trains the sample's network on scikit-learn's digits: `python samples/digits/train.py [FOLDER]`.

Writes digits.safetensors, test.npz, the images that training never saw, and calibration.npz, some of those that it did.
The same seed gives the same weights.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from metric import accuracy
from model import digits
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

SEED = 0
EPOCHS = int(os.environ.get("EPOCHS", "25"))  # fewer for a trial
BATCH = 64
CALIBRATED = 1000


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images to train on and to test on, then their labels; a fifth of the 1,797 is for the test."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    return tuple(
        train_test_split(images, data.target.astype(np.int64), test_size=0.2, stratify=data.target, random_state=SEED)
    )


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The batch moved by up to one pixel each way, which keeps the network from learning places by heart."""
    row, column = torch.randint(0, 3, (2,)).tolist()
    return functional.pad(images, (1, 1, 1, 1))[:, :, row : row + 8, column : column + 8]


def train(images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    model = digits().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))[: len(images) // BATCH * BATCH]
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            logits = model(shifted(images[batch]))
            functional.cross_entropy(logits, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.use_deterministic_algorithms(True)
    images, test_images, labels, test_labels = load()
    model = train(torch.from_numpy(images), torch.from_numpy(labels))
    with torch.inference_mode():
        logits = model(torch.from_numpy(test_images)).numpy()
    right = accuracy({"logits": logits}, {"label": test_labels})
    save_file(model.state_dict(), folder / "digits.safetensors")
    np.savez_compressed(folder / "test.npz", image=test_images, label=test_labels)
    np.savez_compressed(folder / "calibration.npz", image=images[:CALIBRATED])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, test accuracy {right.mean():.2%} ({int(right.sum())} of {len(right)})")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
