import json
from pathlib import Path

import pytest

from enginesmith.compiler.generation.tokens import Writer, ends_of, open_tokenizer
from enginesmith.compiler.storage.files import hashes
from enginesmith.errors import EngineMismatchError, TargetUnavailableError, UsageError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a"], trainer)
    return made


@pytest.fixture
def bundle(tmp_path: Path, bytewise) -> Path:
    (tmp_path / "text").mkdir()
    bytewise.save(str(tmp_path / "text/tokenizer.json"))
    (tmp_path / "text/generation.json").write_text(json.dumps({"stop": [3, 5]}))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": hashes(tmp_path)}))
    return tmp_path


def test_a_bundle_gives_its_tokenizer_and_ends(bundle):
    assert open_tokenizer(bundle).encode("ab").tokens == ["a", "b"]
    assert ends_of(bundle) == (3, 5)


def test_a_bundle_without_text_has_no_ends(tmp_path):
    assert ends_of(tmp_path) == ()
    with pytest.raises(UsageError, match=r"(?s)has no tokenizer.*text/tokenizer.json.*--ids 1,2,3"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "read"), [("tokenizer", open_tokenizer), ("generation", ends_of)])
def test_files_that_changed_are_refused(bundle, name, read):
    path = bundle / f"text/{name}.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(EngineMismatchError, match=rf"(?s){name}.json changed after it was written.*SHA-256"):
        read(bundle)


def test_the_package_is_named_where_it_is_missing(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(TargetUnavailableError, match=r"(?s)tokenizers cannot be imported.*enginesmith\[text\]"):
        open_tokenizer(bundle)


def test_characters_are_written_when_they_are_whole(bytewise):
    text, parts = "a\N{EURO SIGN}b", []
    writer = Writer(bytewise, parts.append)
    for token in bytewise.encode(text).ids:
        writer(token)
    assert parts == ["a", "\N{EURO SIGN}", "b"]
    assert writer.text == text


def test_half_a_character_is_written_at_the_end(bytewise):
    parts = []
    writer = Writer(bytewise, parts.append)
    for token in bytewise.encode("a\N{EURO SIGN}").ids[:2]:
        writer(token)
    assert parts == ["a"]
    writer.close()
    assert parts == ["a", "\N{REPLACEMENT CHARACTER}"]
