import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.engine import load
from enginesmith.compiler.generation.likelihood import log_likelihood, log_likelihoods, log_probabilities
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.errors import DataError, EngineError, RecipeError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
TEXTS = [[3, 1, 4, 1, 5], [1, 0], [5, 9, 2, 6, 5, 3, 5, 8], [7, 7, 7], [2, 7, 1, 8]]
"""One more than the engine takes at once."""


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    with load(small["write_bundle"](folder, details={"in_place": request.param})) as engine:
        yield engine


def expected(text: list[int]) -> list[float]:
    """Of each token but the first, without a cache."""
    found = []
    for at in range(1, len(text)):
        powers = np.exp(small["logits_after"](text[:at]).astype(np.float64))
        found.append(float(np.log(powers[text[at]] / powers.sum())))
    return found


def test_each_token_is_judged_by_those_before_it(engine):
    found = engine.log_likelihoods(TEXTS)
    assert [len(values) for values in found] == [len(text) - 1 for text in TEXTS]
    for values, text in zip(found, TEXTS, strict=True):
        assert values == pytest.approx(expected(text), abs=1e-3)
    assert engine.log_likelihoods(TEXTS[2])[0] == pytest.approx(found[2], abs=1e-4)


def test_perplexity_is_of_all_tokens_alike(engine):
    values = [value for text in TEXTS for value in expected(text)]
    assert engine.perplexity(TEXTS) == pytest.approx(np.exp(-np.mean(values)), rel=1e-3)


def test_a_text_may_fill_the_cache(engine):
    text = [at % small["VOCABULARY"] for at in range(small["ROOM"])]
    assert engine.log_likelihoods(text)[0] == pytest.approx(expected(text), abs=1e-3)


def test_probabilities_of_large_logits_do_not_overflow():
    logits = np.array([[1000, 1000, -np.inf], [0, 0, 0]], np.float32)
    assert log_probabilities(logits, np.array([1, 2])) == pytest.approx(np.log([1 / 2, 1 / 3]))
    assert log_probabilities(logits, np.array([2, 0]))[0] == -np.inf


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1, 2], [3]], r"(?s)text 1 has one token, and nothing stands before it.*at least two tokens.*found: 1"),
        ([1] * 17, r"(?s)text 0 is longer than the cache.*at most 16 tokens.*found: 17"),
        ([[1, 2], [2, 11]], r"(?s)text 1 holds a token that the model does not know.*0 to 10.*found: 11"),
        ([], "there are no prompts"),
    ],
)
def test_texts_that_do_not_fit_are_refused(engine, texts, message):
    with pytest.raises(DataError, match=message):
        engine.log_likelihoods(texts)


def test_logits_that_are_no_numbers_are_an_error(tmp_path):
    with (
        load(small["write_bundle"](tmp_path, small["spoilt"]())) as engine,
        pytest.raises(EngineError, match=r"(?s)logits that are no numbers, after token 1 of a text.*found: nan"),
    ):
        engine.perplexity([1, 2])


def test_an_engine_without_a_cache_is_refused():
    plain = Signature(inputs=(TensorSpec("image", "float32", (1, 3)),))
    with pytest.raises(EngineError, match="the engine has no cache"):
        log_likelihoods(None, plain, [[1, 2]])  # type: ignore[arg-type]


def test_the_metric_of_perplexity_is_the_mean_cross_entropy():
    logits, following = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 9, np.array([6, 0, 3, 3, 1])
    found = log_likelihood({"logits": logits}, {"ids": following, "next": following})
    powers = np.exp(logits.astype(np.float64))
    assert found == pytest.approx(np.log(powers[np.arange(5), following] / powers.sum(1)))
    even = log_likelihood({"logits": np.full((2, 7), 1e4, np.float32)}, {"next": np.array([0, 6])})
    assert np.exp(-even.mean()) == pytest.approx(7)


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        ({"y": (2, 7)}, {"next": [0, 1]}, r"metric perplexity is of a language model\n.*logits of .*\n.*y \(2, 7\)"),
        ({"logits": (2, 3, 7)}, {"next": [0, 1]}, "is of a language model"),
        (
            {"logits": (2, 7)},
            {"ids": [0, 1]},
            r"needs the token that follows each\b.*\n.*next .*\n.*: ids\n.*--data",
        ),
        ({"logits": (2, 7)}, {"next": [0, 7]}, r"cannot read next in the data\n.*2 whole numbers from 0 to 6"),
        ({"logits": (2, 7)}, {"next": [-1, 0]}, "cannot read next in the data"),
        ({"logits": (2, 7)}, {"next": [1]}, "cannot read next in the data"),
        ({"logits": (2, 7)}, {"next": [0.5, 1]}, r"cannot read next.*\n.*\n.*float64 of shape \(2,\)"),
    ],
)
def test_the_metric_of_perplexity_says_what_it_needs(outputs, inputs, message):
    made = {name: np.zeros(shape, np.float32) for name, shape in outputs.items()}
    with pytest.raises(RecipeError, match=message):
        log_likelihood(made, {name: np.array(values) for name, values in inputs.items()})
