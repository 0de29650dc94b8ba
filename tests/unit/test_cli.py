"""The command line: what errors look like, and how they end it."""

import json
import sys

import pytest

from enginesmith.cli import main


@pytest.fixture
def enginesmith(monkeypatch, capsys):
    """Runs the command line in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["enginesmith", *arguments])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["compil"], "UnknownNameError", "unknown command 'compil'"),
        (["--nonsense", "compile"], "UsageError", "No such option"),
        (["compile", "--tarket", "x"], "UsageError", "No such option"),
        (["compile", "--seed", "x"], "UsageError", "not a valid integer"),
        (["compile", "--exporter", "x"], "UsageError", "is not one of"),
        (["validate"], "UsageError", "Missing argument"),
        (["compile"], "RecipeError", "names no model"),
        (["inspect", "absent"], "SourceError", "does not exist"),
    ],
)
def test_every_error_is_json_where_asked_for(enginesmith, arguments, kind, message):
    code, out, err = enginesmith(*arguments, "--json")
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert message in error["message"]
    assert f"enginesmith: error: {error['message']}" in err
    assert enginesmith(*arguments) == (code, "", err)


def test_an_unknown_command_gets_a_suggestion(enginesmith):
    code, _, err = enginesmith("compil", "m.onnx")
    assert code == 2
    assert "did you mean 'compile'?" in err


def test_a_wrong_option_gets_a_suggestion(enginesmith):
    code, _, err = enginesmith("compile", "--tarket", "x")
    assert code == 2
    assert "--target" in err
    assert "see enginesmith compile --help" in err


def test_help_names_every_command(enginesmith):
    code, out, _ = enginesmith("--help")
    assert code == 0
    assert all(name in out for name in ("compile", "validate", "bench", "inspect", "doctor", "schema"))
