"""The samples hold what their pages say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import enginesmith
from enginesmith.compiler.recipe import PERPLEXITY, read_recipe
from enginesmith.passes import parse_pass
from enginesmith.targets import parse_target

SAMPLES = Path(__file__).parents[2] / "samples"
DIGITS = SAMPLES / "digits"
CHARACTERS = SAMPLES / "characters"
RECOMMENDATION = SAMPLES / "recommendation"
TEXT = SAMPLES / "text"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def held_out() -> dict[str, np.ndarray]:
    with np.load(DIGITS / "test.npz", allow_pickle=False) as file:
        return dict(file)


def test_digits_reads_as_many_images_as_its_page_says(held_out: dict[str, np.ndarray]) -> None:
    model = module(DIGITS / "model.py").digits().eval()
    model.load_state_dict(load_file(DIGITS / "digits.safetensors"))
    with torch.inference_mode():
        logits = model(torch.from_numpy(held_out["image"])).numpy()
    right = module(DIGITS / "metric.py").accuracy({"output": logits}, held_out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    page = " ".join((DIGITS / "README.md").read_text().split())
    assert f"{parameters:,} parameters" in page
    assert f"reads {int(right.sum())} of the {len(right)} held-out images right ({100 * right.mean():.2f} %)" in page
    assert right.mean() >= 0.98


def test_digits_data_are_images_of_the_set_that_training_leaves_out(held_out: dict[str, np.ndarray]) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    digit_of = {
        (image / 16).astype(np.float32).tobytes(): digit for image, digit in zip(data.images, data.target, strict=True)
    }
    assert held_out["image"].shape == (360, 1, 8, 8)
    assert [digit_of[image.tobytes()] for image in held_out["image"]] == held_out["label"].tolist()
    assert len({image.tobytes() for image in held_out["image"]}) == 360


def test_the_metric_counts_right_rows() -> None:
    accuracy = module(DIGITS / "metric.py").accuracy
    assert accuracy({"y": np.eye(3)}, {"label": np.array([0, 2, 2])}).tolist() == [1, 0, 1]


def test_characters_guesses_as_many_as_its_page_says() -> None:
    model = module(CHARACTERS / "model.py").characters().eval()
    model.load_state_dict(load_file(CHARACTERS / "characters.safetensors"))
    with np.load(CHARACTERS / "test.npz", allow_pickle=False) as file:
        tokens = file["tokens"]
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)).numpy()
    right = module(CHARACTERS / "metric.py").accuracy({"output": logits}, {"tokens": tokens})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    page = " ".join((CHARACTERS / "README.md").read_text().split())
    assert f"{parameters:,} parameters" in page
    assert f"{100 * right.mean():.2f} % of the {right.size * 127:,} characters" in page
    assert right.mean() >= 0.59


@pytest.mark.slow
def test_characters_in_int8_is_small_and_as_good(tmp_path: Path, own_cache: Path) -> None:
    recipe = CHARACTERS / "recipe.yaml"
    bundle = enginesmith.compile(recipe=recipe, output=tmp_path / "bundle", benchmark=False)
    fp32, int8 = bundle.manifest["engines"]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8-dynamic")
    assert int8["details"]["operators"]["DynamicQuantizeLSTM"] == 1
    assert int8["size_bytes"] < 0.4 * fp32["size_bytes"]
    for engine in (fp32, int8):
        metric = engine["validation"]["metric"]
        assert engine["validation"]["passed"]
        assert metric["value"] > metric["reference"] - 0.003


def test_characters_holds_text_and_none_of_it_on_both_sides() -> None:
    alphabet = module(CHARACTERS / "model.py").ALPHABET
    lines = []
    for name in ("calibration", "test"):
        with np.load(CHARACTERS / f"{name}.npz", allow_pickle=False) as file:
            text = ["".join(alphabet[token] for token in window) for window in file["tokens"]]
        lines.append({line for window in text for line in window.split("\n")[1:-1] if len(line) > 20})
    assert all(len(found) > 50 for found in lines)
    assert not lines[0] & lines[1]
    assert any(" the " in line for line in lines[1])


def test_the_metric_counts_right_characters() -> None:
    accuracy = module(CHARACTERS / "metric.py").accuracy
    guesses = np.eye(3)[[[1, 2, 0], [0, 0, 0]]]
    assert accuracy({"y": guesses}, {"tokens": np.array([[0, 1, 2], [2, 0, 1]])}).tolist() == [1, 0.5]


@pytest.fixture(scope="module")
def impressions() -> dict[str, np.ndarray]:
    with np.load(RECOMMENDATION / "test.npz", allow_pickle=False) as file:
        return dict(file)


def test_recommendation_ranks_as_well_as_its_page_says(impressions: dict[str, np.ndarray]) -> None:
    model = module(RECOMMENDATION / "model.py").recommender().eval()
    model.load_state_dict(load_file(RECOMMENDATION / "recommender.safetensors"))
    with torch.inference_mode():
        numbers, categories = (torch.from_numpy(impressions[name]) for name in ("numbers", "categories"))
        predicted = model(numbers, categories).numpy()
    auc = module(RECOMMENDATION / "metric.py").auc
    reached, best = (auc({"y": scores}, impressions).mean() for scores in (predicted, impressions["probability"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    page = " ".join((RECOMMENDATION / "README.md").read_text().split())
    assert f"{parameters:,} parameters" in page
    assert f"On {len(predicted):,} held-out impressions the network reaches an AUC of {reached:.4f}" in page
    assert f"the true probabilities {best:.4f}" in page
    assert best - 0.01 < reached < best


def test_recommendation_knows_the_probabilities_of_its_clicks(impressions: dict[str, np.ndarray]) -> None:
    made = module(RECOMMENDATION / "clicks.py").clicks(8192, seed=2)
    assert all((made[name] == impressions[name]).all() for name in ("numbers", "categories", "click"))
    probability, click = impressions["probability"], impressions["click"]
    assert np.allclose(made["probability"], probability)
    for part in np.array_split(np.argsort(probability), 8):
        assert abs(click[part].mean() - probability[part].mean()) < 0.06


def test_the_metric_is_the_area_under_the_curve() -> None:
    auc = module(RECOMMENDATION / "metric.py").auc
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    scores, click = random.integers(0, 20, 300) / 20, random.integers(0, 2, 300)
    assert auc({"y": scores}, {"click": click}).mean() == pytest.approx(metrics.roc_auc_score(click, scores))
    assert auc({"y": np.array([0.1, 0.7, 0.9])}, {"click": np.array([0, 1, 0])}).tolist() == [1, 0.5, 0]
    with pytest.raises(ValueError, match="a batch needs rows with a click and rows without one"):
        auc({"y": scores}, {"click": np.ones(300)})


@pytest.mark.slow
def test_recommendation_becomes_an_engine_that_ranks_as_well(tmp_path: Path, own_cache: Path) -> None:
    recipe = RECOMMENDATION / "recipe.yaml"
    bundle = enginesmith.compile(recipe=recipe, output=tmp_path / "bundle", precisions=("fp32",), benchmark=False)
    (engine,) = bundle.manifest["engines"]
    metric = engine["validation"]["metric"]
    assert engine["validation"]["passed"]
    assert metric["samples"] == 8192
    assert metric["value"] == pytest.approx(metric["reference"], abs=1e-5)


@pytest.mark.parametrize(
    "path",
    sorted([*SAMPLES.glob("*/recipe.yaml"), TEXT / "small.yaml"]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_recipes_name_files_passes_and_targets_that_exist(path: Path) -> None:
    recipe = read_recipe(path)
    model = Path(recipe.model.partition(":")[0])
    named = [
        model / "config.json" if model.is_dir() else model,
        recipe.weights,
        recipe.data,
        recipe.calibration_data,
        "" if recipe.metric in (None, PERPLEXITY) else recipe.metric.partition(":")[0],
    ]
    assert all(Path(name).is_file() for name in named if name)
    for text in recipe.passes:
        assert str(parse_pass(text)) == text
    for text in recipe.targets:
        assert str(parse_target(text)) == text


@pytest.mark.parametrize("path", sorted(SAMPLES.rglob("*.safetensors")), ids=lambda path: path.name)
def test_checkpoints_are_small(path: Path) -> None:
    assert path.stat().st_size < (5_000_000 if TEXT in path.parents else 1_000_000)


@pytest.mark.parametrize("folder", sorted(path for path in SAMPLES.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_a_page_names_every_file_of_its_folder(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))


def test_text_is_as_good_as_its_page_says() -> None:
    from enginesmith.compiler.sources.decoders.causal import open_folder

    model = open_folder(TEXT / "gpt").eval()
    with np.load(TEXT / "test.npz", allow_pickle=False) as file:
        ids, following = file["ids"], file["next"]
    page = " ".join((TEXT / "README.md").read_text().split())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters" in page
    assert f"{len(ids)} windows of 64 tokens" in page
    text = torch.from_numpy(ids.reshape(-1)[: ids.size // 128 * 128].reshape(-1, 128))  # the windows stand in a row
    with torch.inference_mode():
        logits = model(text).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert f"a perplexity of {float(loss.exp()):.2f} a token" in page
    right = module(TEXT / "metric.py").accuracy({"logits": logits[:, 63].numpy()}, {"next": text[:, 64].numpy()})
    assert right.shape == (len(text),)
    assert np.array_equal(following[:-1], ids[1:, 0])


def test_text_is_calibrated_on_none_of_what_it_is_judged_by() -> None:
    windows = []
    for name in ("calibration", "test"):
        with np.load(TEXT / f"{name}.npz", allow_pickle=False) as file:
            windows.append(file["ids"])
    assert [found.shape for found in windows] == [(128, 64), (176, 64)]
    parts = [{tuple(row[at : at + 24]) for row in found.tolist() for at in range(41)} for found in windows]
    assert all(len(found) > 5000 for found in parts)
    assert not parts[0] & parts[1]


@pytest.mark.slow
def test_text_in_few_bits_keeps_its_perplexity(tmp_path: Path, own_cache: Path) -> None:
    bundle = enginesmith.compile(
        recipe=TEXT / "small.yaml",
        output=tmp_path / "bundle",
        precisions=["fp32", "int4-weights"],
        max_samples=16,
        benchmark=False,
    )
    assert bundle.passed, bundle.manifest["verdict"]["reasons"]
    with np.load(TEXT / "test.npz", allow_pickle=False) as file:
        texts = file["ids"][::24]
    fp32, small = bundle.manifest["engines"]
    with bundle.load(fp32["name"]) as engine:
        perplexity = engine.perplexity(texts)
    # Five in each layer, as keys and values are narrow, and the head.
    assert small["details"]["operators"]["MatMulNBits"] == 21
    assert small["details"]["operators"]["GroupQueryAttention"] == 4
    assert small["details"]["in_place"]
    assert small["size_bytes"] < 0.4 * fp32["size_bytes"]
    assert small["validation"]["budget"]["holds"]
    with bundle.load(small["name"]) as engine:
        assert perplexity / 1.02 < engine.perplexity(texts) < 1.02 * perplexity


@pytest.mark.slow
def test_text_goes_on_as_transformers_does(tmp_path: Path, own_cache: Path) -> None:
    from enginesmith.compiler.sources.decoders.causal import open_folder

    bundle = enginesmith.compile(recipe=TEXT / "recipe.yaml", output=tmp_path / "bundle", benchmark=False)
    assert bundle.passed
    (engine,) = bundle.manifest["engines"]
    assert engine["details"]["operators"]["GroupQueryAttention"] == 4
    assert engine["details"]["in_place"]
    with np.load(TEXT / "test.npz", allow_pickle=False) as file:
        prompts = file["ids"][[0, 50, 100], :40]
    model = open_folder(TEXT / "gpt").eval()
    ids = torch.from_numpy(prompts)
    model.generation_config.eos_token_id = None
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False, pad_token_id=0
    )
    with bundle.load() as opened:
        assert opened.generate(prompts, 256) == expected[:, 40:].tolist()


def test_the_folder_of_text_is_small_and_has_a_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert sum(path.stat().st_size for path in (TEXT / "gpt").iterdir()) < 5e6
    tokenizer = tokenizers.Tokenizer.from_file(str(TEXT / "gpt/tokenizer.json"))
    text = "The \N{EURO SIGN} is a currency.\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with np.load(TEXT / "test.npz", allow_pickle=False) as file:
        assert " the " in tokenizer.decode(file["ids"].reshape(-1).tolist())
