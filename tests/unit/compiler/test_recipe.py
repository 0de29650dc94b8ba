import json
import re
from pathlib import Path

import pytest
import yaml

from enginesmith.compiler.generation.likelihood import log_likelihood
from enginesmith.compiler.recipe import PERPLEXITY, Recipe, make_recipe, read_recipe, schema
from enginesmith.compiler.trial import load_metric
from enginesmith.errors import RecipeError, UnknownNameError


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: model.py:net\nweights: net.pt\ndata: /abs/data.npz\n")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.model == str(tmp_path / "model.py:net")
    assert recipe.weights == str(tmp_path / "net.pt")
    assert recipe.data == "/abs/data.npz"


def test_overrides_take_the_place_of_fields(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"$schema": "x", "model": "m.onnx", "seed": 1}))
    assert read_recipe(tmp_path / "recipe.json", {"seed": 2}).seed == 2


def test_dump_is_read_back(tmp_path):
    recipe = make_recipe(
        {"model": "/m.py:net", "inputs": ["a:1"], "tolerances": {"fp16": {"cosine": 0.9}}, "rounds": 7}
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert "slice_s" not in yaml.safe_load(recipe.dump())


@pytest.mark.parametrize("text", ["2:4", "'2:4'"])
def test_a_pattern_needs_no_quotes(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(f"model: m.onnx\nsparsify: {text}\n")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.sparsify == "2:4"
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("16", "16"), ("'64'", "64"), ("auto", "auto")])
def test_align_as_yaml_reads_it(tmp_path, text, value):
    (tmp_path / "recipe.yaml").write_text(f"model: m.onnx\nalign: {text}\n")
    assert read_recipe(tmp_path / "recipe.yaml").align == value


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"target": ["a"]}, UnknownNameError, r"unknown field of the recipe 'target'(.|\n)*did you mean 'targets'"),
        ({"rounds": 1}, RecipeError, r"field 'rounds' of the recipe is not valid\n.*greater than or equal to 6\n.*1"),
        ({"exporter": "onnx"}, RecipeError, r"field 'exporter'(.|\n)*'auto', 'dynamo' or 'torchscript'"),
        ({"align": 12}, RecipeError, r"field 'align'(.|\n)*'auto', '8', '16', '32', '64', '128' or 'off'"),
        ({"sparse_attention": "wide=4"}, UnknownNameError, "unknown option of 'sparse-attention' 'wide'"),
        ({"sparse_attention": "sinks=4"}, RecipeError, "sinks are for a window, and there is none"),
        ({"sparse_attention": "window"}, RecipeError, "option 'window' of 'sparse-attention' has no value"),
        ({"sparsify": "1:4"}, RecipeError, r"field 'sparsify'(.|\n)*'2:4'"),
        ({"tolerances": {"fp16": {"l2": 1}}}, UnknownNameError, "unknown tolerance 'l2'"),
        ({"tolerances": {"fp16": {"cosine": "high"}}}, RecipeError, "field 'tolerances.fp16.cosine'"),
    ],
)
def test_wrong_fields(values, error, message):
    with pytest.raises(error, match=message):
        make_recipe(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML or JSON"),
        ("- a\n- b", r"holds no fields\n.*field: value\n.*list"),
        ("", "holds no fields"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_schema_describes_every_field():
    properties = schema()["properties"]
    assert set(properties) == set(Recipe.model_fields)
    assert all(field["description"] for field in properties.values())
    assert schema()["additionalProperties"] is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"precisions": ["fp33"]},
            r"unknown precision 'fp33'\n.*one of auto, bf16, fp16, fp32, .*\n.*did you mean 'fp32'",
        ),
        ({"precisions": "int7"}, r"unknown precision 'int7'\n(.*\n)*.*did you mean 'int8'"),
        ({"keep": {"int8": ["*"]}}, r"unknown precision to keep nodes in 'int8'\n.*one of bf16, fp16, fp32"),
        ({"tolerances": {"fp33": {"cosine": 1}}}, "unknown precision 'fp33'"),
    ],
)
def test_precisions_that_do_not_exist(values, message):
    with pytest.raises(UnknownNameError, match=message):
        make_recipe(values)


def test_nodes_are_kept_by_any_spelling_of_a_precision():
    recipe = make_recipe({"keep": {"float32": "a", "fp32": ["b", "c*"], "half": ["d"]}})
    assert recipe.keep == {"fp32": ("a", "b", "c*"), "fp16": ("d",)}


@pytest.mark.parametrize("node", ["a,b", "a+b", ""])
def test_nodes_that_cannot_be_kept(node):
    with pytest.raises(RecipeError, match=f"node '{re.escape(node)}' cannot be kept"):
        make_recipe({"keep": {"fp32": [node]}})


def test_a_budget_is_read_and_checked():
    assert make_recipe({"budget": "top1 = 0.990"}).budget == "top1=0.99"
    with pytest.raises(UnknownNameError, match=r"unknown budget 'top2'\n.*\n.*did you mean 'top[15]'"):
        make_recipe({"budget": "top2=0.9"})
    with pytest.raises(RecipeError, match="budget 'top1' has a bound that cannot be"):
        make_recipe({"budget": "top1=2"})


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -1, ".nan"])
def test_tolerances_that_are_no_bounds(bound):
    with pytest.raises(RecipeError, match=r"tolerance 'cosine' is not a bound|field 'tolerances\.fp16\.cosine'"):
        make_recipe({"tolerances": {"fp16": {"cosine": bound}}})


def test_precisions_have_several_spellings():
    recipe = make_recipe(
        {"precisions": ["float16", "FP32", "half", "fp16"], "tolerances": {"float16": {"cosine": 0.5}}}
    )
    assert recipe.precisions == ("fp16", "fp32")
    assert recipe.tolerances == {"fp16": {"cosine": 0.5}}


@pytest.mark.parametrize("name", ["weights", "data", "metric"])
def test_an_empty_path_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match=rf"field '{name}' of the recipe is empty\n.*a path\n.*leave it out"):
        make_recipe({name: ""})
    (tmp_path / "recipe.yaml").write_text(f"model: m.onnx\n{name}: ''\n")
    with pytest.raises(RecipeError, match=rf"field '{name}' of the recipe recipe.yaml is empty"):
        read_recipe(tmp_path / "recipe.yaml")


def test_perplexity_is_a_metric_and_no_path(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m.onnx\nmetric: perplexity\n")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.metric == make_recipe({"metric": "perplexity"}).metric == PERPLEXITY
    assert load_metric(recipe) is log_likelihood
    with pytest.raises(UnknownNameError, match=r"unknown metric 'perplexty'\n.*FILE.py:FUNCTION, perplexity\n.*mean"):
        load_metric(make_recipe({"metric": "perplexty"}))
    (tmp_path / "again.yaml").write_text(f"model: m.onnx\nmetric: {PERPLEXITY}\n")
    assert read_recipe(tmp_path / "again.yaml").metric == PERPLEXITY


def test_paths_and_single_items_of_the_python_api():
    recipe = make_recipe(
        {"data": Path("d.npz"), "weights": Path("w.pt"), "metric": Path("m.py:f"), "inputs": "x:1x8", "targets": "a"}
    )
    assert (recipe.data, recipe.weights, recipe.metric) == ("d.npz", "w.pt", "m.py:f")
    assert (recipe.inputs, recipe.targets) == (("x:1x8",), ("a",))


def test_schema_has_a_title():
    assert schema()["title"] == "enginesmith recipe"


def test_a_p99_is_read_and_asks_for_the_search():
    recipe = make_recipe({"p99": "0.1 s"})
    assert (recipe.p99, recipe.searches_batches) == ("100ms", True)
    assert make_recipe({"max_batch": 8}).searches_batches
    assert make_recipe({"batch_search": True}).searches_batches
    assert not make_recipe({}).searches_batches
    with pytest.raises(RecipeError, match="latency '5' cannot be read"):
        make_recipe({"p99": "5"})


def test_options_of_a_decoder_are_checked():
    recipe = make_recipe({"model": "gpt", "decoder": {"max_length": 64}})
    assert recipe.decoder == {"max_length": 64}
    assert make_recipe(yaml.safe_load(recipe.dump())) == recipe
    with pytest.raises(
        UnknownNameError, match=r"(?s)unknown option of 'decoder' 'max_lenght'.*did you mean 'max_length'"
    ):
        make_recipe({"decoder": {"max_lenght": 64}})
    with pytest.raises(RecipeError, match=r"(?s)option 'batch' of 'decoder' has the wrong type.*expected: int"):
        make_recipe({"decoder": {"batch": "many"}})
