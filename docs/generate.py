"""Writes the pages that are made from the code: `python docs/generate.py`; with --check it compares them instead."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from enginesmith.compiler.console.flags import PROVIDERS, SHAPES, SWITCHES, field_options
from enginesmith.compiler.recipe import LISTS, PATHS, Recipe
from enginesmith.passes import PASSES
from enginesmith.targets import TARGETS

DOCS = Path(__file__).parent
MADE = "<!-- Made by docs/generate.py (`make docs`) from the code; changes here are lost. -->\n"


def recipes() -> str:
    """The fields of `Recipe`, and their options."""
    rows = [_field(name) for name in Recipe.model_fields]
    shapes = ", ".join(f"`{spellings[1]}`" for spellings in SHAPES.values())
    return f"""{MADE}
# Recipes

A recipe says what to compile and how, in YAML or JSON. Each field is an option of `enginesmith compile` and an argument
of `enginesmith.compile`, and the reverse. The bundle holds the recipe that made it, as `recipe.yaml`.

```yaml
model: model.py:digits
weights: digits.safetensors
inputs: image:1x1x8x8
dynamic: image:0=1..8..64
data: test.npz
metric: metric.py:accuracy
targets: [onnxruntime-cpu, "torchscript:optimize=false"]
precisions: [fp32, int8]
calibration_data: calibration.npz
budget: metric=0.003
```

```bash
enginesmith compile --recipe samples/digits/recipe.yaml -o build/digits    # options beside it precede its fields
enginesmith schema > build/recipe.schema.json                              # for editors
```

The fields {_listed(PATHS)} name files, relative to the recipe that holds them; so do the files of passes and targets of
your own. The fields {_listed(LISTS)} take one text or several; on the command line an option is given again for each.
An unknown field is an error that names the nearest.

| field | option | default | what it says |
|---|---|---|---|
{chr(10).join(rows)}

Spellings of other tools are understood too: {shapes} (trtexec, Polygraphy) make axes dynamic,
{", ".join(f"`--{name}`" for name in SWITCHES)} (trtexec) choose a precision, and
{", ".join(f"`--provider {name}`" for name in PROVIDERS)} (Olive) a target.
"""


def passes() -> str:
    """The passes with their options."""
    parts = [
        f"""{MADE}
# Passes

A pass rewrites the graph in place. Each run is checked: whether the graph changed as the pass says, whether it is still
a valid graph, and that a second run changes nothing more. Where a rule does not fire, the report says why.

`--pass NAME:OPTION=VALUE,OPTION=VALUE` runs a pass of your choice before an engine's own ones, as in
`--pass simplify --pass opset:least=19`; several items are joined by `+`. The passes that bring a graph to a precision
run by themselves (see [targets](targets.md)), and take the options of `--quantization`. A pass of your own is one file:
see [adding a pass](adding-a-pass.md)."""
    ]
    for name in sorted(PASSES):
        cls = _class("enginesmith.passes", PASSES[name])
        module = inspect.getdoc(sys.modules[cls.__module__]) or ""
        parts.append(f"## {name}\n\n{_blocks(module)}\n\n{_summary(cls)}\n\n{_options(cls)}")
    return "\n".join(parts)


def targets() -> str:
    """The targets with what they take and their options."""
    rows = []
    parts = []
    for name in TARGETS:
        cls = _class("enginesmith.targets", TARGETS[name])
        can = cls.capabilities
        row = (f"[`{name}`](#{name})", cls.summary, ", ".join(can.devices), ", ".join(can.precisions))
        rows.append(f"| {' | '.join(row)} |")
        opset = "the torch module" if can.opset is None else f"a graph of opset {can.opset[0]} to {can.opset[1]}"
        needs = [f"{package} {version} or newer" for package, version in can.minimum.items()]
        needs += ["an NVIDIA GPU to build"] if can.gpu_to_build else []
        alike = inspect.getdoc(cls.built_for) if "built_for" in vars(cls) else "All that is known about it."
        facts = [
            ("takes", opset),
            ("needs", ", ".join(needs)),
            ("ties an engine to a machine", " ".join(str(alike).split())),
            ("Tensor Cores take multiples of", ", ".join(f"{v} ({k})" for k, v in can.alignment.items())),
            ("sparse weights", ", ".join(can.sparsity)),
            *((f"`{key}` is made by", ", ".join(f"`{text}`" for text in value)) for key, value in cls.lowerings.items()
              if value and can.consumes == "graph" and key in can.precisions),
        ]  # fmt: skip
        lines = "\n".join(f"| {what} | {text} |" for what, text in facts if text)
        parts.append(f"## {name}\n\n{_summary(cls)}\n\n| | |\n|---|---|\n{lines}\n\n{_options(cls)}")
    return f"""{MADE}
# Targets

A target builds engines and runs them. `enginesmith doctor` tries each on your machine and says what it lacks. Options
go behind the name, `--target onnxruntime-cpu:threads=2`; one target may be asked for several times with other options.
A target of your own is one file: see [adding a target](adding-a-target.md).

| target | engine | runs on | precisions |
|---|---|---|---|
{chr(10).join(rows)}

{chr(10).join(parts)}"""


PAGES = {"recipes.md": recipes, "passes.md": passes, "targets.md": targets}


def main(arguments: Sequence[str]) -> int:
    """Writes the pages, or names those that are not current."""
    stale = []
    for name, make in PAGES.items():
        text = make().rstrip() + "\n"
        path = DOCS / name
        if "--check" in arguments:
            stale += [] if path.is_file() and path.read_text() == text else [name]
        else:
            path.write_text(text)
    if stale:
        print(f"not current: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


def _field(name: str) -> str:
    field = Recipe.model_fields[name]
    (option,) = field_options(name)
    default = field.get_default(call_default_factory=True)
    shown = ", ".join(map(str, default)) if isinstance(default, (tuple, dict)) else default
    if isinstance(option, click.Argument):
        spelling = "`MODEL`"
    else:
        spelling = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
        choices = getattr(option.type, "choices", ())
        meta = "|".join(choices) or option.metavar or ("" if option.is_flag else option.type.name.upper())
        spelling += f" `{meta}`" if meta else ""
    text = " ".join((field.description or "").split())
    cells = (f"`{name}`", spelling, "" if shown in (None, "") else f"`{str(shown).lower()}`", text)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _options(cls: type[Any]) -> str:
    """A table of the fields of a dataclass."""
    described = _attributes(cls)
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = "+".join(default) if isinstance(default, tuple) else str(default).lower()
        values = (
            f"`{field.name}`",
            _values(hints[field.name]),
            f"`{value}`" if value else "",
            described.get(field.name, ""),
        )
        rows.append(f"| {' | '.join(_cell(text) for text in values)} |")
    if not rows:
        return "No options.\n"
    return "| option | values | default | what it says |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _values(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", ".join("none" if item is type(None) else _values(item) for item in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if origin is tuple:
        return f"{_values(arguments[0])}, several joined by `+`"
    return {bool: "true, false", int: "a whole number", float: "a number", str: "a text"}[hint]


def _attributes(cls: type[Any]) -> Mapping[str, str]:
    """What the class's docstring says about each field; two may share a line, and a base class may say it."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        _, _, tail = (inspect.cleandoc(vars(owner).get("__doc__") or "")).partition("\nAttributes:\n")
        for match in re.finditer(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", tail, re.MULTILINE):
            found |= dict.fromkeys(match[1].split(", "), _prose(" ".join(match[2].split())))
    return found


def _summary(cls: type[Any]) -> str:
    return _prose(inspect.cleandoc(vars(cls)["__doc__"]).partition("\nAttributes:\n")[0].strip())


def _blocks(text: str) -> str:
    """A docstring as Markdown: indented lines are code."""
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(part)}\n```" if part.startswith("    ") else _prose(part)
        for part in re.split(r"\n\n+", text)
    )


def _prose(text: str) -> str:
    return text.replace("``", "`")


def _class(package: str, place: str) -> type[Any]:
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(f"{package}.{module}"), name)
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" and `{names[-1]}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
