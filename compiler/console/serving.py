"""How a bundle is served, as options: those of `serve` and `export-triton` are the fields of `Serving`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...serving.checks import PASSED, Checked, check
from ...serving.repository import Form, Repository, export
from ...serving.settings import STALLS, Serving

ONE = {"gpus": "gpu"}
"""Options that are given once for each of several values, by another name than their field's."""


def serving_options() -> list[click.Parameter]:
    """An option for each field of `Serving`."""
    hints = typing.get_type_hints(Serving)
    return [_option(field, hints[field.name]) for field in dataclasses.fields(Serving)]


def serving_of(values: Mapping[str, Any]) -> Serving:
    """The settings that the options describe.

    Raises:
        RecipeError: they make no sense.
    """
    return Serving(**{field.name: values[field.name] for field in dataclasses.fields(Serving)})


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Parameter:
    spelling = "--" + ONE.get(field.name, field.name).replace("_", "-")
    several = typing.get_origin(hint) is tuple
    kind = next(part for part in (typing.get_args(hint) or (hint,)) if part is not types.NoneType)
    shown = not several and field.default is not None
    if kind is bool:
        spelling = f"{spelling}/--no-{spelling[2:]}"
    names = [spelling, *(["-e"] if field.name == "engine" else []), field.name]
    return click.Option(
        names, type=kind, multiple=several, default=field.default, show_default=shown, help=field.metadata["help"]
    )


def export_options() -> list[click.Parameter]:
    """All options of `export-triton`."""
    form = click.Option(
        ["--form"],
        type=click.Choice(typing.get_args(Form)),
        default="python",
        show_default=True,
        help="Served through enginesmith, or by Triton's own backend of the engine's runtime.",
    )
    checks = click.Option(
        ["--check/--no-check"], default=True, help="Have a Triton of this machine look at the configuration."
    )
    return [form, *serving_options(), checks]


def export_bundle(bundle: Path, folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Exports, checks, and tells what was written."""
    settings = serving_of(values)
    repository = export(bundle, folder, settings, values["form"])
    checked = check(repository) if values["check"] else None
    return {**_facts(repository, settings), "checks": checked and dataclasses.asdict(checked)}


def _facts(repository: Repository, settings: Serving) -> dict[str, Any]:
    return {
        "repository": str(repository.path),
        "model": repository.name,
        "engine": repository.engine,
        "form": repository.form,
        "max_batch": repository.merged,
        "reason": repository.reason,
        "warning": STALLS if repository.merged and settings.stalls else "",
    }


def show_exported(result: Mapping[str, Any]) -> None:
    """What was written, and whether Triton takes it."""
    click.echo(f"{result['repository']}/{result['model']}: {result['engine']}, form {result['form']}")
    merged = f"up to {result['max_batch']}" if result["max_batch"] else f"no: {result['reason'] or 'as asked'}"
    click.echo(f"  requests are merged: {merged}")
    if result["warning"]:
        click.echo(f"  warning: {result['warning']}")
    if checks := result["checks"]:
        for field in dataclasses.fields(Checked):
            found = checks[field.name]
            click.echo(f"  checked by {field.name}: {'yes' if found == PASSED else found}")
