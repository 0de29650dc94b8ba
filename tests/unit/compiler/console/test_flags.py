import click
import pytest

from enginesmith.compiler.console.flags import overrides, recipe_options
from enginesmith.compiler.recipe import Recipe, make_recipe
from enginesmith.errors import RecipeError


def parse(*arguments: str) -> dict:
    command = click.Command("compile", params=recipe_options(), callback=lambda **values: overrides(values))
    return command.main(list(arguments), standalone_mode=False)


def test_every_field_has_an_option_and_the_reverse():
    others = {"min_shapes", "opt_shapes", "max_shapes", "fp16", "bf16", "int8", "fp8", "provider", "model_option"}
    assert {option.name for option in recipe_options()} == set(Recipe.model_fields) | others


def test_only_what_was_given_becomes_a_field():
    assert parse() == {}
    assert parse("model.onnx", "--seed", "0", "--no-benchmark") == {
        "model": "model.onnx",
        "seed": 0,
        "benchmark": False,
    }


def test_lists_and_mappings():
    fields = parse(
        "m.py:net", "--input", "a:1x3", "--input", "b:1x4:int64", "--dynamic", "a:0=1..2..4", "--argument", "width=8",
        "--tolerance", "fp16.cosine=0.9", "--target", "onnxruntime-cpu,torchscript", "--target", "tensorrt:tf32=true",
        "--keep", "fp32", "a*", "--keep", "fp16", "b", "--keep", "fp32", "c", "--quantization", "bias_correction=false",
    )  # fmt: skip
    recipe = make_recipe(fields)
    assert recipe.inputs == ("a:1x3", "b:1x4:int64")
    assert recipe.arguments == {"width": 8}
    assert recipe.keep == {"fp32": ("a*", "c"), "fp16": ("b",)}
    assert recipe.quantization == {"bias_correction": False}
    assert recipe.tolerances == {"fp16": {"cosine": 0.9}}
    assert recipe.targets == ("onnxruntime-cpu", "torchscript", "tensorrt:tf32=true")


def test_a_choice_that_may_be_left_out():
    assert parse("--sparsify", "2:4") == {"sparsify": "2:4"}
    assert make_recipe({}).sparsify is None
    with pytest.raises(click.BadParameter, match="'1:4' is not '2:4'"):
        parse("--sparsify", "1:4")


def test_spellings_of_trtexec_polygraphy_and_olive():
    fields = parse(
        "--onnx=m.onnx", "--minShapes=a:1x3,b:1x4", "--optShapes=a:8x3,b:8x4", "--trt-max-shapes", "a:[16,3]",
        "--maxShapes=b:16,4", "--fp16", "--provider", "CUDAExecutionProvider", "--load-inputs", "data.json",
    )  # fmt: skip
    assert fields == {
        "model": "m.onnx",
        "inputs": ("a:8x3:float32", "b:8x4:float32"),
        "dynamic": ("a:0=1..8..16", "b:0=1..8..16"),
        "precisions": ("fp16",),
        "targets": ("onnxruntime-cuda",),
        "data": "data.json",
    }


def test_a_static_shape_of_trtexec():
    assert parse("--shapes=a:1x3,b:1x4") == {"inputs": ("a:1x3:float32", "b:1x4:float32"), "dynamic": ()}


def test_shapes_add_to_inputs_and_ranges():
    fields = parse("--input", "a:1x3", "--dynamic", "a:0=1..2", "--shapes", "b:1x4")
    assert fields == {"inputs": ("a:1x3", "b:1x4:float32"), "dynamic": ("a:0=1..2",)}


@pytest.mark.parametrize(
    ("arguments", "precisions"),
    [
        (["--fp16"], ("fp16",)),
        (["--precision", "fp32", "--fp16"], ("fp32", "fp16")),
        (["--fp16", "--dtype", "float16"], ("fp16",)),
        (["--precision", "half"], ("fp16",)),
        (["--precision", "fp32,fp16"], ("fp32", "fp16")),
    ],
)
def test_spellings_of_precisions(arguments, precisions):
    assert make_recipe(parse(*arguments)).precisions == precisions


def test_no_baseline():
    assert parse("--baseline", "none") == {"baselines": ()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "cosine=1"], r"'cosine=1' cannot be read\n.*PRECISION.METRIC=VALUE"),
        (["--argument", "width"], r"'width' cannot be read\n.*KEY=VALUE"),
        (["--argument", "size=[1"], r"argument 'size' is not valid YAML\n.*KEY=VALUE\n.*found: expected ',' or ']'"),
        (["--minShapes", "a:1x3", "--optShapes", "a:1x3x4"], "shapes of input 'a' have different ranks"),
    ],
)
def test_values_that_cannot_be_read(arguments, message):
    with pytest.raises(RecipeError, match=message):
        parse(*arguments)


def test_unknown_option_gets_a_suggestion():
    with pytest.raises(click.NoSuchOption, match="--tarket") as caught:
        parse("--tarket", "x")
    assert "--target" in caught.value.format_message()
