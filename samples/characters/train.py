"""Trains the sample's network on Python's reference manual: `python samples/characters/train.py [FOLDER]`.

The text is `pydoc_data.topics` of the standard library, so it differs a little from one version of Python to the next.
Writes characters.safetensors, calibration.npz (text that training saw) and test.npz (text that it never saw). The same
seed on the same text gives the same weights.
"""

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from metric import accuracy
from model import ALPHABET, characters
from safetensors.torch import save_file
from torch.nn import functional

SEED = 0
EPOCHS = int(os.environ.get("EPOCHS", "12"))  # fewer for a trial
BATCH = 32
LENGTH = 128


def load() -> tuple[np.ndarray, np.ndarray]:
    """Tokens (windows, LENGTH) to train on and, from every tenth topic, to test on; no long line is in twice."""
    index = {character: token for token, character in enumerate(ALPHABET)}
    known: set[str] = set()
    parts: tuple[list[int], list[int]] = ([], [])
    for number, topic in enumerate(sorted(topics)):
        for line in topics[topic].splitlines():
            if len(line) > 20 and line in known:  # topics quote each other
                continue
            known.add(line)
            parts[number % 10 == 0].extend([index[c] for c in line + "\n" if c in index])
    train, test = (np.array(part[: len(part) // LENGTH * LENGTH]).reshape(-1, LENGTH) for part in parts)
    return train, test


def train(windows: torch.Tensor) -> torch.nn.Module:
    model = characters().train()
    steps = EPOCHS * (len(windows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(windows))[: len(windows) // BATCH * BATCH]
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            logits = model(windows[batch])[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1), windows[batch][:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.use_deterministic_algorithms(True)
    windows, test = load()
    model = train(torch.from_numpy(windows))
    with torch.inference_mode():
        logits = model(torch.from_numpy(test)).numpy()
    right = accuracy({"logits": logits}, {"tokens": test})
    save_file(model.state_dict(), folder / "characters.safetensors")
    np.savez_compressed(folder / "calibration.npz", tokens=windows[:: len(windows) // 64][:64])
    np.savez_compressed(folder / "test.npz", tokens=test)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {right.mean():.2%} of {right.size} x {LENGTH - 1} characters right")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
