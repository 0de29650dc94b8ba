import pytest

from enginesmith.compiler.pruning.goal import parse_goal
from enginesmith.compiler.pruning.ratios import check_ratios, matching, parse_ratio, ratios_of
from enginesmith.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("0.3", {"ratio": "0.3"}),
        ("ratio=0.3", {"ratio": "0.3"}),
        ("macs=0.7", {"macs": "0.7"}),
        ("macs = 0.7x", {"macs": "0.7"}),
        ("latency=0.7x", {"latency": "0.7"}),
    ],
)
def test_goals(text, option):
    assert parse_goal(text) == option


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "1.5", "nan", "abc", "30%", "", "macs=", "macs=2x", "flops=0.5"])
def test_no_goal(text):
    with pytest.raises(RecipeError, match="is no goal of pruning") as caught:
        parse_goal(text)
    assert repr(text) in str(caught.value)
    assert "0.3 (removed), macs=0.7 or latency=0.7x (left)" in str(caught.value)


def test_a_glob_has_a_ratio():
    assert parse_ratio("layer:1/*:0.25") == ("layer:1/*", 0.25)
    check_ratios(("a:0", "b:0.9"))


@pytest.mark.parametrize("text", ["a", "a:", ":0.5", "a:1", "a:-0.1", "a:nan", "a:half"])
def test_no_ratio(text):
    with pytest.raises(ValueError, match=f"'{text}' is no glob:ratio with a ratio from 0 to below 1"):
        check_ratios((text,))


def test_the_first_glob_that_matches_counts():
    names = ["stem", "block/a", "block/b", "[odd]"]
    found = ratios_of(names, 0.5, ("block/b:0.1", "block/*:0.2", "[odd]:0.3"))
    assert found == {"stem": 0.5, "block/a": 0.2, "block/b": 0.1, "[odd]": 0.3}


def test_a_glob_that_matches_nothing():
    with pytest.raises(RecipeError, match="no dimension that can be pruned matches 'blok\\*'") as caught:
        ratios_of(["stem", "block"], 0.5, ("blok*:0.1",))
    assert "2 dimensions, among them 'stem', 'block'" in str(caught.value)
    with pytest.raises(RecipeError, match="0 dimensions, among them none"):
        matching([], "head")
