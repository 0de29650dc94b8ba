"""`enginesmith generate` on a bundle that is written in milliseconds."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from enginesmith.cli import main
from enginesmith.compiler.storage.files import hashes

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Its words are a to k."""
    folder = small["write_bundle"](tmp_path_factory.mktemp("decoder"))
    words = {chr(97 + number): number for number in range(small["VOCABULARY"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "text").mkdir()
    tokenizer.save(str(folder / "text/tokenizer.json"))
    (folder / "text/generation.json").write_text(json.dumps({"stop": []}))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": hashes(folder)}))
    return str(folder)


@pytest.fixture(scope="module")
def checking(tmp_path_factory):
    """The same model, and it checks drafts of three tokens."""
    return str(small["write_bundle"](tmp_path_factory.mktemp("checking"), drafted=3))


@pytest.fixture
def generate(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["enginesmith", "generate", *arguments])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def words(tokens):
    return " ".join(chr(97 + token) for token in tokens)


def test_text_goes_on_as_text(generate, bundle):
    expected = small["greedy"]([3, 1, 4], 6)
    assert generate(bundle, "d b e", "-n", "6") == (0, f"{words(expected)}\n", "")


def test_tokens_go_on_as_tokens(generate, bundle):
    expected = small["greedy"]([3, 1, 4], 6)
    assert generate(bundle, "--ids", "3,1,4", "-n", "6") == (0, ",".join(map(str, expected)) + "\n", "")


def test_the_json_has_tokens_text_and_times(generate, bundle):
    code, out, _ = generate(bundle, "d b e", "-n", "6", "--json")
    found = json.loads(out)
    expected = small["greedy"]([3, 1, 4], 6)
    assert (code, found["engine"], found["prompt"], found["tokens"]) == (0, "decoder", [3, 1, 4], expected)
    assert found["text"] == words(expected)
    assert found["first_token_ms"] > 0
    assert found["token_ms"] > 0
    assert json.loads(generate(bundle, "--ids", "3", "-n", "1", "--json")[1])["token_ms"] is None


def test_a_stop_token_ends_the_text_and_is_not_shown(generate, bundle):
    tokens = small["greedy"]([3, 1, 4], 6)
    shown = tokens[: tokens.index(tokens[2])]
    assert generate(bundle, "d b e", "-n", "6", "--stop", str(tokens[2])) == (0, f"{words(shown)}\n", "")


def test_quiet_shows_nothing(generate, bundle):
    assert generate(bundle, "d b e", "-n", "2", "--quiet") == (0, "", "")


def test_options_of_sampling_reach_the_engine(generate, bundle):
    drawn = {generate(bundle, "d", "-n", "8", "--sample", "--temperature", "30", "--seed", str(n))[1] for n in range(3)}
    assert len(drawn) > 1
    code, _, err = generate(bundle, "d", "-n", "8", "--top-k", "3")
    assert (code, "top_k says how to sample" in err) == (2, True)


def test_a_draft_says_what_it_brought(generate, bundle, checking):
    tokens = small["greedy"]([3, 1, 4], 9)
    shown = ",".join(map(str, tokens)) + "\n"
    said = "enginesmith: 6 of 6 tokens that draft decoder proposed were taken, 4.00 tokens a call\n"
    prompt = ["--ids", "3,1,4", "-n", "9"]
    assert generate(checking, *prompt, "--draft", bundle) == (0, shown, said)
    assert generate(checking, *prompt, "--draft", bundle, "--quiet") == (0, "", "")
    code, out, err = generate(checking, *prompt, "--draft", bundle, "--draft-engine", "decoder", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"] == tokens
    assert json.loads(out)["draft"] == {
        "engine": "decoder", "proposed": 6, "accepted": 6, "calls": 2, "tokens": 8, "tokens_per_call": 4.0,
    }  # fmt: skip
    assert json.loads(generate(checking, *prompt, "--json")[1])["draft"] is None


def test_a_draft_that_proposes_nothing_says_so(generate, bundle, checking):
    said = "enginesmith: draft decoder proposed nothing\n"
    assert generate(checking, "--ids", "3", "-n", "2", "--draft", bundle)[::2] == (0, said)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--draft-engine", "decoder"], 2, "--draft-engine names an engine of a draft, and there is none"),
        (["--draft", "BUNDLE", "--draft-engine", "decoded"], 2, "did you mean 'decoder'?"),
        (["--draft", "nowhere"], 2, "nowhere is not a bundle"),
        (["--draft", "BUNDLE", "--sample"], 2, "a draft is for greedy search"),
        (["--draft", "BUNDLE"], 4, "the engine checks no drafts"),
    ],
)
def test_a_draft_that_will_not_do_is_an_error(generate, bundle, checking, arguments, code, message):
    target = bundle if code == 4 else checking
    arguments = [bundle if part == "BUNDLE" else part for part in arguments]
    found, _, err = generate(target, "--ids", "3", "-n", "4", *arguments)
    assert found == code
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["d b", "--ids", "1,2"], "the prompt is given twice"),
        (["--ids", "1,x"], "--ids '1,x' cannot be read"),
        (["d b", "--stop", "x"], "--stop 'x' cannot be read"),
        (["--ids", "11"], "prompt 0 holds a token that the model does not know"),
        (["d", "-n", "99"], "prompt 0 leaves no room for 99 new tokens"),
    ],
)
def test_a_prompt_that_will_not_do_is_a_usage_error(generate, bundle, arguments, message):
    code, _, err = generate(bundle, *arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--evict", "window"], 4, "the engine drops nothing from its caches by window"),
        (["--evict", "windows"], 2, "unknown policy of eviction 'windows'"),
        (["--sinks", "2"], 2, "--sinks is of what a full cache drops, and nothing is"),
    ],
)
def test_dropping_what_cannot_be_dropped_is_an_error(generate, bundle, arguments, code, message):
    found, _, err = generate(bundle, "--ids", "3", "-n", "4", *arguments)
    assert found == code
    assert message in err
