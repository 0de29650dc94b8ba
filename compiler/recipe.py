"""What to compile, and how: one model of fields serves recipes (YAML, JSON), the command line and the Python API.

The command line makes its options from these fields, so that an option without a field, or the reverse, cannot exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from ..errors import RecipeError, UnknownNameError
from .batch.latency import parse_latency
from .budget import Budget
from .extensions import anchored
from .ladder.objective import Objective
from .options import build
from .pruning.goal import parse_goal
from .sources.decoders.options import DecoderOptions
from .sparse_attention.asked import pass_text
from .validation.metrics import resolve_tolerance

PATHS = ("model", "weights", "data", "calibration_data", "metric")
"""Fields that name files, relative to the recipe that holds them."""

PERPLEXITY = "<perplexity>"
"""The metric of language models that needs no file; users write it without the brackets."""

LISTS = ("inputs", "dynamic", "targets", "precisions", "require", "passes", "baselines")

PRECISIONS = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "single": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp8": "fp8", "float8": "fp8", "float8e4m3fn": "fp8",
    "int8": "int8", "int8-dynamic": "int8-dynamic",
    "int8-weights": "int8-weights", "int4-weights": "int4-weights", "int4": "int4-weights",
    "mixed": "mixed", "mixed-fp16": "mixed-fp16", "mixed-bf16": "mixed-bf16",
    "auto": "auto",
}  # fmt: skip
"""The precisions of engines, by all their spellings."""

AUTO = "auto"
"""In place of a precision: the ladder finds it."""

HIGH = ("fp32", "fp16", "bf16")
"""The precisions that nodes may be kept in."""


class Flag:
    """How the command line spells a field: `one` names a single item of a list, `names` are further spellings.

    An item of a list takes `nargs` words.
    """

    def __init__(
        self, one: str | None = None, *names: str, metavar: str | None = None, argument: bool = False, nargs: int = 1
    ) -> None:
        self.one = one
        self.names = names
        self.metavar = metavar
        self.argument = argument
        self.nargs = nargs


class Recipe(BaseModel):
    """A compile, in full. Every field is an option of `enginesmith compile`, and the reverse."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: Annotated[str, Flag(argument=True)] = ""
    """Model: file.py:factory, TorchScript archive, .pt2 program, ONNX file, or folder of transformers."""
    weights: Annotated[str | None, Flag(None, "-w")] = None
    """Weights for file.py:factory: a state_dict as .pt/.pth, or .safetensors."""
    arguments: Annotated[dict[str, Any], Flag("argument", metavar="KEY=VALUE")] = Field(default_factory=dict)
    """Keyword argument of the factory."""
    inputs: Annotated[tuple[str, ...], Flag("input", "--input-shape", metavar="NAME:SHAPE[:DTYPE]")] = ()
    """Input, for instance image:1x3x224x224 or ids:1x128:int64."""
    dynamic: Annotated[tuple[str, ...], Flag(metavar="NAME:AXIS=MIN..OPT..MAX")] = ()
    """Dynamic axis of an input, for instance image:0=1..8..64."""
    decoder: Annotated[dict[str, Any], Flag(metavar="OPTION=VALUE")] = Field(default_factory=dict)
    """Option of a language model's cache: max_length=1024, the tokens that it holds, batch=8, the most rows that are
    generated at the same time, speculative_tokens=4, the most tokens of a draft that one call checks, eviction=window
    or importance, what a full cache drops, or cache_mib=64, the memory of a row's caches at most."""
    data: Annotated[str | None, Flag(None, "--load-inputs")] = None
    """Samples: .npz by input name, .npy, folder of .npz, Polygraphy .json, or file.py:function."""
    calibration_data: Annotated[str | None, Flag(None, "--calibration-data-path")] = None
    """Samples that quantization takes its ranges from, of the same kinds. Default: those of --data."""
    calibration_samples: int = Field(default=512, ge=1)
    """Samples that calibration reads at most."""
    random_calibration: bool = False
    """Let quantization take its ranges from random inputs, where there are no data."""
    metric: str | None = None
    """Task metric, file.py:function(outputs, inputs), for instance metric.py:accuracy; or perplexity: of a language
    model, by the token that follows each prompt, next in the data."""
    targets: Annotated[tuple[str, ...], Flag("target", "-t", metavar="NAME[:OPTION=VALUE,...]")] = ()
    """Target with its options, for instance tensorrt:builder_level=4, or file.py:Class for one of your own. Default:
    what this machine runs best."""
    precisions: Annotated[tuple[str, ...], Flag("precision", "--dtype")] = (AUTO,)
    """Precision of the engines: fp32, fp16, bf16, fp8, int8, int8-dynamic, int8-weights, int4-weights,
    mixed (8 bits), mixed-fp16 or mixed-bf16; auto: the ladder finds the best engine of each target, trying precisions,
    graph rewrites and options of the target, and keeps what is measured faster and right (fp32 where nothing is to be
    measured)."""
    objective: Annotated[str, Flag(metavar="latency|throughput|size[=SHARE]")] = "latency"
    """What the ladder improves: latency at the usual sizes, throughput at the largest batch, or the size of the engine,
    which a step has to shrink by that share."""
    effort: Literal["quick", "default", "thorough"] = "default"
    """How much the ladder tries."""
    time_limit_s: Annotated[float | None, Flag("time-limit", metavar="SECONDS")] = Field(default=None, gt=0)
    """Seconds after which the ladder begins no further step. Default: by effort, 240, 1200 or 7200."""
    budget: Annotated[str | None, Flag(metavar="MEASURE=BOUND")] = None
    """What lower precisions may cost: relative_l2=0.01, top1=0.995, or metric=0.003 below the reference's."""
    keep: Annotated[dict[str, tuple[str, ...]], Flag(metavar="PRECISION NODE", nargs=2)] = Field(default_factory=dict)
    """Node that stays in a precision, by name or glob, for instance fp32 '*/attention/*'."""
    quantization: Annotated[dict[str, Any], Flag(metavar="OPTION=VALUE")] = Field(default_factory=dict)
    """Option of the quantization pass, for instance method=entropy or rounding=gptq."""
    prune: Annotated[str | None, Flag(metavar="RATIO|macs=SHARE|latency=SHARE")] = None
    """Build each engine with fewer channels, neurons and heads too: 0.3 removes that share of each, macs=0.7 leaves
    that share of the multiply-adds, latency=0.7x of the time. It is dropped where it is not faster. --budget bounds
    what it may cost."""
    pruning: Annotated[dict[str, Any], Flag(metavar="OPTION=VALUE")] = Field(default_factory=dict)
    """Option of the pass prune, for instance importance=hessian or keep=head."""
    pruned_weights: bool = False
    """Write the weights of each pruned engine as a state_dict of the torch module too, and a mapping that tells what
    was cut, for training on and compiling again."""
    sparsify: Literal["2:4"] | None = None
    """Build each engine with 2:4 sparse weights too, where its target has kernels for them, and drop it where it is not
    faster. --budget bounds what it may cost."""
    sparse_attention: Annotated[str | None, Flag(metavar="auto|OPTION=VALUE,...")] = None
    """Build each engine of a decoder with attention to few keys too, with options of the pass sparse-attention, for
    instance window=512,sinks=4, top_k=256 or blocks=8; each layer has to keep the pass' budget of ln p, and the engine
    is dropped where it is not faster."""
    align: Literal["auto", "8", "16", "32", "64", "128", "off"] | None = None
    """Build each engine with dimensions grown to a multiple too, and drop it where it is not faster; auto: the multiple
    that the target's Tensor Cores take. The ladder tries that by itself, unless it is off."""
    stages: int | None = Field(default=None, ge=2)
    """Cut each engine that is built from a graph into this many stages of a pipeline, for models that one GPU does not
    hold, and for throughput: each target then stands for pipeline:of=TARGET."""
    stage_devices: Annotated[str | None, Flag(metavar="cuda:0,cuda:1")] = None
    """Devices of the stages, one for each. Default: GPUs 0, 1, ... where the target runs on GPUs, else the CPU."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows of a batch that flow through the stages together. Default: a batch is cut into four a stage."""
    require: tuple[str, ...] = ()
    """Target without whose engine the compile fails (exit code 4)."""
    passes: Annotated[tuple[str, ...], Flag("pass", metavar="NAME[:OPTION=VALUE,...]")] = ("simplify", "dedupe")
    """Pass over the graph with its options, or file.py:Class for one of your own, in this order; "none" for no pass."""
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    """Exporter that captures the graph."""
    opset: int | None = Field(default=None, ge=9, le=26)
    """ONNX opset of the captured graph. Default: the highest that all targets take."""
    tolerances: Annotated[dict[str, dict[str, float]], Flag("tolerance", metavar="PRECISION.METRIC=VALUE")] = Field(
        default_factory=dict
    )
    """Bound on an error, for instance fp16.relative_l2=0.01."""
    max_samples: int = Field(default=32, ge=1)
    """Batches of data that every engine is validated on."""
    benchmark: bool = True
    """Measure the engines' speed."""
    baselines: Annotated[tuple[str, ...], Flag("baseline")] = ("torch",)
    """What the engines are measured against: torch, torch.compile, or "none"."""
    rounds: int = Field(default=10, ge=6)
    """Interleaved rounds of the benchmark."""
    slice_s: float = Field(default=0.08, gt=0, le=10)
    """Seconds that a candidate runs in one round."""
    with_transfers: bool = False
    """Include copies between host and device in the times."""
    batch_search: bool = False
    """Search the batch sizes of the best engine of each target: the largest that fits in memory, where throughput
    saturates, and the one with the most."""
    p99: Annotated[str | None, Flag(metavar="TIME")] = None
    """Latency that 99 % of calls must keep, for instance 5ms: search the batch size with the most throughput within.
    Where no engine keeps it at any size, the verdict is negative."""
    max_batch: int | None = Field(default=None, ge=1)
    """Search batch sizes up to this, beyond the axis' declared range where an engine takes them."""
    reference_device: Literal["cpu", "cuda"] = "cpu"
    """Device on which the reference is computed."""
    seed: int = 0
    """Seed of everything that is random."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that a native builder may take for one engine."""

    @pydantic.field_validator(*PATHS, mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @pydantic.field_validator("metric")
    @classmethod
    def _perplexity_is_no_path(cls, value: str | None) -> str | None:
        return PERPLEXITY if value == PERPLEXITY.strip("<>") else value

    @pydantic.field_validator(*LISTS, mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.field_validator("precisions")
    @classmethod
    def _precisions_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name.lower() not in PRECISIONS:
                raise UnknownNameError("precision", name, set(PRECISIONS.values()))
        return tuple(dict.fromkeys(PRECISIONS[name.lower()] for name in names))

    @pydantic.field_validator("objective")
    @classmethod
    def _objective_is_known(cls, text: str) -> str:
        return str(Objective.parse(text))

    @pydantic.field_validator("align", mode="before")
    @classmethod
    def _yaml_reads_numbers_and_off(cls, value: Any) -> Any:
        return "off" if value is False else str(value) if isinstance(value, int) else value

    @pydantic.field_validator("prune", mode="before")
    @classmethod
    def _goal_is_known(cls, value: Any) -> Any:
        if value is not None:
            parse_goal(str(value))
        return None if value is None else str(value)

    @pydantic.field_validator("sparsify", mode="before")
    @classmethod
    def _pattern_is_no_time(cls, value: Any) -> Any:
        return "2:4" if value == 2 * 60 + 4 else value  # as YAML 1.1 reads it without quotes, in base 60

    @pydantic.field_validator("sparse_attention")
    @classmethod
    def _options_are_those_of_the_pass(cls, text: str | None) -> str | None:
        if text is not None:
            from ..passes import parse_pass

            parse_pass(pass_text(text))
        return text

    @pydantic.field_validator("budget")
    @classmethod
    def _budget_is_known(cls, text: str | None) -> str | None:
        return None if text is None else str(Budget.parse(text))

    @pydantic.field_validator("decoder")
    @classmethod
    def _decoder_is_known(cls, options: dict[str, Any]) -> dict[str, Any]:
        build(DecoderOptions, options, "decoder")
        return options

    @pydantic.field_validator("p99")
    @classmethod
    def _p99_is_a_time(cls, text: str | None) -> str | None:
        return None if text is None else f"{parse_latency(text):.15g}ms"

    @pydantic.field_validator("keep", mode="before")
    @classmethod
    def _kept_precisions_are_known(cls, keep: Any) -> Any:
        if not isinstance(keep, dict):
            return keep
        named: dict[str, Any] = {}
        for precision, nodes in keep.items():
            if PRECISIONS.get(str(precision).lower()) not in HIGH:
                raise UnknownNameError("precision to keep nodes in", str(precision), HIGH)
            known, given = PRECISIONS[str(precision).lower()], (nodes,) if isinstance(nodes, str) else tuple(nodes)
            for node in given:
                if not node or set(node) & set(",+"):
                    raise RecipeError(f"node {node!r} cannot be kept", expected="a name or glob without , and +")
            named[known] = (*named.get(known, ()), *given)
        return named

    @pydantic.field_validator("tolerances")
    @classmethod
    def _tolerances_are_known(cls, tolerances: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        named = {PRECISIONS.get(precision.lower(), precision): bounds for precision, bounds in tolerances.items()}
        for precision, bounds in named.items():
            resolve_tolerance(precision, bounds)
        return named

    @property
    def climbs(self) -> bool:
        """Whether the ladder is to find the engines."""
        return AUTO in self.precisions and self.benchmark

    @property
    def searches_batches(self) -> bool:
        """Whether any field asks for the batch search."""
        return self.batch_search or self.p99 is not None or self.max_batch is not None

    @property
    def explains(self) -> bool:
        """Whether to find out where the time of the best engine goes."""
        return self.climbs and self.effort != "quick"

    def dump(self) -> str:
        """YAML text of the fields that differ from their defaults."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120)


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Checks fields and makes a recipe of them.

    Raises:
        UnknownNameError: a field that does not exist, with the nearest that does.
        RecipeError: a field with a wrong value.
    """
    for name in PATHS[1:]:
        if values.get(name) == "":
            raise RecipeError(f"field {name!r} of the {where} is empty", expected="a path", hint="leave it out")
    try:
        return Recipe(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UnknownNameError(f"field of the {where}", field, Recipe.model_fields) from error
        raise RecipeError(
            f"field {field!r} of the {where} is not valid", expected=first["msg"], found=repr(first["input"])
        ) from error


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe; files that it names are relative to its folder. `overrides` take the place of its fields.

    Raises:
        RecipeError: a file that is missing, not YAML or JSON, or has wrong fields.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read", found=error) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} is not valid YAML or JSON", found=error) from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {str(path)!r} holds no fields", expected="field: value", found=type(values).__name__)
    values.pop("$schema", None)
    for name in PATHS:
        value = values.get(name)
        if isinstance(value, str) and value and not value.startswith("<") and value != PERPLEXITY.strip("<>"):
            values[name] = str(path.parent / value)
    for name in ("passes", "targets"):
        if isinstance(given := values.get(name), (str, list)):
            listed = [given] if isinstance(given, str) else given
            values[name] = [anchored(item, path.parent) if isinstance(item, str) else item for item in listed]
    return make_recipe({**values, **(overrides or {})}, f"recipe {path.name}")


def schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors and pipelines."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "enginesmith recipe",
    }
