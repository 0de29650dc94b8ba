"""Command-line options made from the fields of `Recipe`, with the spellings that users of other tools know."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import click
import yaml

from ...errors import RecipeError
from ..recipe import Flag, Recipe
from ..signature import parse_inputs

SHAPES = {
    "min_shapes": ("--min-shapes", "--minShapes", "--trt-min-shapes"),
    "opt_shapes": ("--opt-shapes", "--optShapes", "--trt-opt-shapes", "--shapes"),
    "max_shapes": ("--max-shapes", "--maxShapes", "--trt-max-shapes"),
}
"""trtexec's and Polygraphy's way to give dynamic axes."""

PROVIDERS = {
    "CPUExecutionProvider": "onnxruntime-cpu",
    "CUDAExecutionProvider": "onnxruntime-cuda",
    "TensorrtExecutionProvider": "tensorrt",
}
"""Olive's way to name a target."""


SWITCHES = ("fp16", "bf16", "int8", "fp8")
"""trtexec's and Polygraphy's way to give precisions."""


def recipe_options() -> list[click.Parameter]:
    """All options of `compile`."""
    options = field_options(*Recipe.model_fields)
    for name, spellings in SHAPES.items():
        options.append(click.Option([*spellings, name], multiple=True, metavar="NAME:SHAPE", help=_shape_help(name)))
    for precision in SWITCHES:
        options.append(click.Option([f"--{precision}"], is_flag=True, help=f"The same as --precision {precision}."))
    options.append(
        click.Option(
            ["--provider"], multiple=True, type=click.Choice(list(PROVIDERS)), help="Target, in Olive's words."
        )
    )
    options.append(click.Option(["--model", "-m", "--onnx", "model_option"], help="The same as MODEL."))
    return options


def field_options(*names: str) -> list[click.Parameter]:
    """The options of some fields."""
    hints = typing.get_type_hints(Recipe)
    return [_parameter(name, hints[name]) for name in names]


def _shape_help(name: str) -> str:
    point = {"min": "Smallest", "opt": "Optimum", "max": "Largest"}[name.partition("_")[0]]
    return f"{point} shape of an input, as trtexec and Polygraphy take it."


def _parameter(name: str, hint: Any) -> click.Parameter:
    field = Recipe.model_fields[name]
    flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
    if flag.argument:
        return click.Argument([name], required=False)
    spelling = "--" + (flag.one or name).replace("_", "-")
    help_text = field.description or ""
    if hint is bool:
        return click.Option([f"{spelling}/--no-{spelling[2:]}", name], default=None, help=help_text)
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    several = typing.get_origin(hint) in (tuple, dict)
    kind: Any = str if several else kinds[0]
    if typing.get_origin(hint) is typing.Literal:
        kind = click.Choice(kinds)
    elif typing.get_origin(kinds[0]) is typing.Literal:
        kind = click.Choice(typing.get_args(kinds[0]))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        kind = kinds[0]
    default = field.get_default(call_default_factory=True)
    shown = ", ".join(map(str, default)) if several else default
    return click.Option(
        [spelling, *flag.names, name],
        type=kind,
        nargs=flag.nargs,
        multiple=several,
        default=None,
        metavar=flag.metavar,
        help=f"{help_text} [default: {shown}]" if shown not in (None, "") else help_text,
    )


def overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's fields out of what the command line gave; what was not given is left out.

    Raises:
        RecipeError: a value that cannot be read.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    switched = tuple(name for name in SWITCHES if given.pop(name, False))
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name == "model_option":
            fields["model"] = value
        elif name == "provider":
            fields["targets"] = tuple(PROVIDERS[provider] for provider in value)
        elif name in ("arguments", "decoder", "pruning", "quantization", "tolerances"):
            fields[name] = _assignments(name, value)
        elif name == "keep":
            fields[name] = {high: tuple(node for other, node in value if other == high) for high, _ in value}
        elif name in ("targets", "precisions", "baselines", "require", "passes"):
            fields[name] = tuple(part for text in value for part in ([text] if ":" in text else text.split(",")))
        elif name not in SHAPES:
            fields[name] = value
    if switched:
        fields["precisions"] = (*fields.get("precisions", ()), *switched)
    if shapes := {name: given[name] for name in SHAPES if name in given}:
        for name, items in _from_shapes(shapes).items():
            fields[name] = (*fields.get(name, ()), *items)
    if fields.get("baselines") == ("none",):
        fields["baselines"] = ()
    return fields


def _assignments(name: str, texts: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for text in texts:
        left, equals, right = text.partition("=")
        first, dot, second = left.partition(".")
        if not equals or (name == "tolerances" and not dot):
            expected = "PRECISION.METRIC=VALUE" if name == "tolerances" else "KEY=VALUE"
            raise RecipeError(f"{text!r} cannot be read", expected=expected)
        if name != "tolerances":
            result[left] = _value(left, right)
        else:
            result.setdefault(first, {})[second] = right
    return result


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"argument {key!r} is not valid YAML", expected="KEY=VALUE", found=problem) from error


def _from_shapes(shapes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Inputs and dynamic axes out of smallest, optimum and largest shapes."""
    texts = {name: [part for text in given for part in _split(text)] for name, given in shapes.items()}
    named = {name: {spec.name: spec for spec in parse_inputs(items).inputs} for name, items in texts.items()}
    best = named.get("opt_shapes") or named.get("max_shapes") or named["min_shapes"]
    inputs, dynamic = [], []
    for name, spec in best.items():
        inputs.append(f"{name}:{'x'.join(map(str, spec.shape))}:{spec.dtype}")
        points = [named.get(point, best).get(name, spec).shape for point in ("min_shapes", "opt_shapes", "max_shapes")]
        if len({len(shape) for shape in points}) > 1:
            raise RecipeError(f"shapes of input {name!r} have different ranks", found=points)
        for axis, (low, middle, high) in enumerate(zip(*points, strict=True)):
            if not low == middle == high:
                dynamic.append(f"{name}:{axis}={low}..{middle}..{high}")
    return {"inputs": tuple(inputs), "dynamic": tuple(dynamic)}


def _split(text: str) -> list[str]:
    """``a:1x3,b:1x4`` are two inputs; the commas of ``a:[1,3]`` and ``a:1,3`` part dimensions."""
    parts: list[str] = []
    for part in text.split(","):
        if ":" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    return parts
