"""The command line: click commands, and the map from errors to exit codes. All work is done elsewhere.

Exit codes: 0 done and the verdict is good, 1 negative verdict, 2 usage or recipe error, 3 the model could not be loaded
or captured, 4 no engine could be built or run, 130 interrupted. A traceback means a bug.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from . import __version__
from .compiler.console.commands import Named, printing
from .errors import EnginesmithError, UsageError

COMMANDS = {
    "compile": "Compile a model to a bundle of validated, measured engines.",
    "validate": "Judge the engines of a bundle again, on this machine or on new data.",
    "bench": "Measure the engines of a bundle again, interleaved with a baseline.",
    "compare": "Compare two bundles or engines, A and B; exit code 1 where B regressed.",
    "export-triton": "Write a bundle as a model repository of Triton Inference Server.",
    "serve": "Serve a bundle by gRPC, merging requests, until SIGTERM or Ctrl-C; SIGHUP reloads it.",
    "load-test": "Measure a service: latency and throughput under load, and where it is overloaded.",
    "debug": "Find the node that makes the error of an engine.",
    "diagnose": "Show where the time of a model or bundle goes, what limits it, and what would help.",
    "run": "Run an engine of a bundle over files of inputs, and go on where an earlier run was stopped.",
    "generate": "Go on with a text by the language model of a bundle, and write it as it comes.",
    "inspect": "Show inputs, sizes, operators and precisions of a model, bundle or engine.",
    "doctor": "Build and run a one-node model on every target, and say why one cannot.",
    "cache": "Look into the cache, keep it small, check it, carry it to another machine.",
    "schema": "Print the JSON schema of recipes.",
}


AS_JSON = "enginesmith.json"
"""Whether --json was given, in the `meta` that all contexts share: a command whose options are wrong has no values."""


class Commands(Named):
    """Commands that are made when they are called: making `compile` imports the recipe and with it pydantic."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Notes whether errors are to be JSON."""
        ctx.meta[AS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; an error of ours is shown and becomes its exit code."""
        try:
            return super().invoke(ctx)
        except EnginesmithError as error:
            _report(error, as_json=ctx.meta[AS_JSON])
            return error.exit_code

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Makes the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = _MAKERS[cmd_name]()
        command.name, command.help = cmd_name, COMMANDS[cmd_name]
        return command if isinstance(command, click.Group) else printing(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without making them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="enginesmith")
def cli() -> None:
    """From a PyTorch checkpoint to an engine that is proven right and proven faster."""


def _compile() -> click.Command:
    from .compiler.console.flags import overrides, recipe_options

    def run(recipe: Path | None, output: Path, junit: Path | None, as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.console.console import progress, show_bundle
        from .compiler.console.junit import bundle_cases, junit_report
        from .compiler.pipeline import compile

        with progress(quiet) as bars, junit_report(junit, "compile") as report:
            bundle = compile(output=output, recipe=recipe, progress=bars, **overrides(values))
            report(bundle_cases(bundle.manifest))
        _show(bundle.manifest, as_json, quiet, lambda: show_bundle(bundle))
        return 0 if bundle.passed else 1

    options: list[click.Parameter] = [
        *recipe_options(),
        click.Option(
            ["--recipe", "-r", "--config", "-c"],
            type=click.Path(path_type=Path),
            help="Recipe (YAML or JSON); options given beside it take the place of its fields.",
        ),
        click.Option(
            ["--output", "-o", "--output-path"],
            type=click.Path(path_type=Path),
            default=Path("build/bundle"),
            show_default=True,
            help="Folder of the bundle.",
        ),
        _JUNIT,
    ]
    return click.Command("compile", params=options, callback=run)


_JUNIT = click.Option(
    ["--junit"], type=click.Path(path_type=Path), metavar="FILE", help="Write the verdicts as JUnit XML too."
)
_BUNDLE = click.Argument(["bundle"], type=click.Path(path_type=Path))
_ENGINES = click.Option(["--engine", "-e", "engines"], multiple=True, help="Engine to take; all by default.")


def _validate() -> click.Command:
    from .compiler.console.flags import field_options, overrides

    def run(
        bundle: Path, engines: tuple[str, ...], junit: Path | None, as_json: bool, quiet: bool, **values: Any
    ) -> int:
        from .compiler.again import validate_bundle
        from .compiler.console.console import progress, show_validations
        from .compiler.console.junit import junit_report, validation_cases

        with progress(quiet) as bars, junit_report(junit, "validate") as report:
            result = validate_bundle(bundle, engines, progress=bars, **overrides(values))
            report(validation_cases(result))
        _show(result, as_json, quiet, lambda: show_validations(result))
        return 0 if all(validation["passed"] for validation in result) else 1

    options = field_options("data", "metric", "tolerances", "max_samples")
    return click.Command("validate", params=[_BUNDLE, _ENGINES, *options, _JUNIT], callback=run)


def _bench() -> click.Command:
    from .compiler.console.flags import field_options, overrides

    def run(bundle: Path, engines: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.again import benchmark_bundle
        from .compiler.console.console import progress, show_benchmark

        fields = overrides(values)
        if fields.get("batch_search") or {"p99", "max_batch"} & fields.keys():
            return _search_batches(bundle, engines, fields, as_json=as_json, quiet=quiet)
        with progress(quiet) as bars:
            result = benchmark_bundle(bundle, engines, progress=bars, **fields)
        _show(result, as_json, quiet, lambda: show_benchmark(result))
        return 0

    options = field_options("baselines", "data", "rounds", "slice_s", "with_transfers", "seed")
    options += field_options("batch_search", "p99", "max_batch")
    return click.Command("bench", params=[_BUNDLE, _ENGINES, *options], callback=run)


def _search_batches(
    bundle: Path, engines: tuple[str, ...], fields: dict[str, Any], *, as_json: bool, quiet: bool
) -> int:
    from .compiler.again import search_bundle
    from .compiler.batch.choice import missed
    from .compiler.console.batches import show_curves
    from .compiler.console.console import progress

    with progress(quiet) as bars:
        result = search_bundle(bundle, engines, progress=bars, **fields)
    _show(result, as_json, quiet, lambda: show_curves(result))
    return 1 if missed(result) else 0


def _compare() -> click.Command:
    from .compiler.console.comparison import rule_options, rules_of, show_comparison
    from .compiler.console.flags import field_options, overrides

    def run(
        a: str, b: str, sizes: tuple[str, ...], junit: Path | None, as_json: bool, quiet: bool, **values: Any
    ) -> int:
        from .compiler.comparison.comparison import FIELDS, compare
        from .compiler.comparison.inputs import parse_sizes
        from .compiler.console.console import progress
        from .compiler.console.junit import comparison_cases, junit_report

        fields = overrides({name: value for name, value in values.items() if name in FIELDS})
        with progress(quiet) as bars, junit_report(junit, "compare") as report:
            at = [parse_sizes(text) for text in sizes]
            result = compare(a, b, sizes=at, rules=rules_of(values), progress=bars, **fields)
            report(comparison_cases(result))
        _show(result, as_json, quiet, lambda: show_comparison(result))
        return 0 if result["verdict"]["passed"] else 1

    options: list[click.Parameter] = [
        click.Argument(["a"]),
        click.Argument(["b"]),
        click.Option(
            ["--sizes"],
            multiple=True,
            metavar="AXIS=SIZE[,AXIS=SIZE]",
            help="Size to time at, for instance batch=8. Default: those of either that both take.",
        ),
        *rule_options(),
        *field_options("data", "metric", "tolerances", "max_samples"),
        *field_options("benchmark", "rounds", "slice_s", "with_transfers", "seed"),
        _JUNIT,
    ]
    return click.Command("compare", params=options, callback=run)


def _export_triton() -> click.Command:
    from .compiler.console.serving import export_options

    def run(bundle: Path, folder: Path, as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.console.serving import export_bundle, show_exported

        result = export_bundle(bundle, folder, values)
        _show(result, as_json, quiet, lambda: show_exported(result))
        return 0

    folder = click.Argument(["folder"], metavar="DIR", type=click.Path(path_type=Path))
    return click.Command("export-triton", params=[_BUNDLE, folder, *export_options()], callback=run)


def _serve() -> click.Command:
    from .compiler.console.serve import serve_options

    def run(bundle: Path, as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.console.serve import serve_bundle

        serve_bundle(bundle, values, lambda result, show: _show(result, as_json, quiet, show), quiet=quiet)
        return 0

    return click.Command("serve", params=[_BUNDLE, *serve_options()], callback=run)


def _load_test() -> click.Command:
    from .compiler.console.load import load_options

    def run(urls: tuple[str, ...], as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.console.load import load_test, show_load, show_measurement

        result = load_test(urls, values, lambda found: None if quiet or as_json else show_measurement(found))
        _show(result, as_json, quiet, lambda: show_load(result))
        return 1 if result["problems"] else 0

    return click.Command("load-test", params=load_options(), callback=run)


def _debug() -> click.Command:
    from .compiler.console.flags import field_options, overrides

    def run(
        bundle: Path,
        engine: str | None,
        against: str,
        on: str | None,
        threshold: float | None,
        as_json: bool,
        quiet: bool,
        **values: Any,
    ) -> int:
        from .compiler.console.console import progress
        from .compiler.console.debug import show_debugged
        from .compiler.debug.debug import debug_bundle

        with progress(quiet) as bars:
            result = debug_bundle(
                bundle, engine, against=against, on=on, threshold=threshold, progress=bars, **overrides(values)
            )
        _show(result.to_json(), as_json, quiet, lambda: show_debugged(result))
        return 1 if result.diverges else 0

    options: list[click.Parameter] = [
        click.Option(["--engine", "-e"], help="Engine to examine. Default: the one farthest beyond its tolerance."),
        click.Option(
            ["--against"], default="reference", show_default=True, help="The model in fp32, or the name of an engine."
        ),
        click.Option(["--on"], metavar="TARGET", help="Run the engine's graph on this target, not on its own."),
        click.Option(
            ["--threshold"], type=float, help="Relative L2 that is too much. Default: that of the engine's precision."
        ),
    ]
    options += field_options("data", "max_samples")
    return click.Command("debug", params=[_BUNDLE, *options], callback=run)


def _diagnose() -> click.Command:
    from .compiler.console.flags import field_options, overrides

    def run(source: str, engines: tuple[str, ...], top: int, as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.console.console import progress
        from .compiler.console.diagnosis import show_diagnosed
        from .compiler.diagnosis.diagnose import diagnose

        with progress(quiet) as bars:
            result = diagnose(source, engines, progress=bars, **overrides(values))
        _show(result.to_json(), as_json, quiet, lambda: show_diagnosed(result, top))
        return 0

    options: list[click.Parameter] = [
        click.Argument(["source"], metavar="MODEL|BUNDLE"),
        click.Option(
            ["--engine", "-e", "engines"],
            multiple=True,
            help="Engine of a bundle. Default: the best, and the one that the ladder began with.",
        ),
        click.Option(
            ["--top"], type=click.IntRange(1), default=15, show_default=True, help="Rows of each table; JSON has all."
        ),
        *field_options(
            "weights", "arguments", "inputs", "dynamic", "data", "exporter", "opset", "passes", "targets",
            "reference_device", "seed",
        ),
    ]  # fmt: skip
    return click.Command("diagnose", params=options, callback=run)


def _run() -> click.Command:
    from .compiler.console.numbers import parse_numbers
    from .compiler.console.offline import run_options

    def run(bundle: Path, out: str, gpus: str | None, as_json: bool, quiet: bool, **options: Any) -> int:
        from .compiler.console.offline import running, show_outputs
        from .offline.run import run as run_data

        try:
            with contextlib.redirect_stdout(sys.stderr), running(quiet) as progress:  # a data function may print
                log = partial(click.echo, err=True)
                result = run_data(
                    bundle, out=out, gpus=parse_numbers("--gpus", gpus), progress=progress, log=log, **options
                )
        except (KeyboardInterrupt, SystemExit) as interruption:
            click.echo("enginesmith: stopped; the same command goes on where it was", err=True)
            return interruption.code if isinstance(interruption, SystemExit) else 130  # type: ignore[return-value]
        _show(result.to_json(), as_json, quiet, lambda: show_outputs(result))
        return 0 if result.passed else 1

    return click.Command("run", params=[_BUNDLE, *run_options()], callback=run)


def _generate() -> click.Command:
    from .compiler.console.generate import generate_options

    def run(bundle: Path, as_json: bool, quiet: bool, **options: Any) -> int:
        from .compiler.console.generate import generate_text

        result = generate_text(bundle, show=not (as_json or quiet), **options)
        _show(result, as_json, quiet, lambda: None)
        return 0

    return click.Command("generate", params=[_BUNDLE, *generate_options()], callback=run)


def _inspect() -> click.Command:
    from .compiler.console.flags import field_options, overrides

    def run(path: str, groups: bool, everything: bool, as_json: bool, quiet: bool, **values: Any) -> int:
        from .compiler.inspection import inspect, inspect_groups

        if groups:
            from .compiler.console.groups import show_groups

            found = inspect_groups(path, overrides(values), everything=everything)
            _show(found, as_json, quiet, lambda: show_groups(found))
            return 0
        from .compiler.console.console import show_inspection

        result = inspect(Path(path))
        _show(result, as_json, quiet, lambda: show_inspection(result))
        return 0

    options: list[click.Parameter] = [
        click.Argument(["path"]),
        click.Option(
            ["--groups"], is_flag=True, help="Show which axes change together; captures a model that is no graph."
        ),
        click.Option(["--all", "everything"], is_flag=True, help="Show groups too that no weight makes."),
        *field_options("weights", "arguments", "inputs", "dynamic", "data", "exporter", "opset", "passes"),
    ]
    return click.Command("inspect", params=options, callback=run)


def _doctor() -> click.Command:
    def run(targets: tuple[str, ...], as_json: bool, quiet: bool) -> int:
        from .compiler.console.console import progress, show_diagnosis
        from .compiler.machine.doctor import diagnose

        with progress(quiet) as bars:
            result = diagnose(targets, progress=bars)
        _show(result, as_json, quiet, lambda: show_diagnosis(result))
        return 0 if any(target["usable"] for target in result["targets"]) else 4

    option = click.Option(["--target", "-t", "targets"], multiple=True, help="Target to try; all by default.")
    return click.Command("doctor", params=[option], callback=run)


def _cache() -> click.Command:
    from .compiler.console.cache import cache_group

    return cache_group(_show)


def _schema() -> click.Command:
    def run(as_json: bool, quiet: bool) -> int:
        from .compiler.recipe import schema

        click.echo(json.dumps(schema(), indent=1))
        return 0

    return click.Command("schema", callback=run)


_MAKERS: dict[str, Callable[[], click.Command]] = {
    "compile": _compile,
    "validate": _validate,
    "bench": _bench,
    "compare": _compare,
    "export-triton": _export_triton,
    "serve": _serve,
    "load-test": _load_test,
    "debug": _debug,
    "diagnose": _diagnose,
    "run": _run,
    "generate": _generate,
    "inspect": _inspect,
    "doctor": _doctor,
    "cache": _cache,
    "schema": _schema,
}


def _show(result: Any, as_json: bool, quiet: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1, default=float))
    elif not quiet:
        show()


def main() -> NoReturn:
    """Runs the command line and exits with the documented code."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was begun is cleaned up
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"see {context.command_path} --help" if context else None
        as_json = context is not None and context.meta.get(AS_JSON, False)
        _report(UsageError(error.format_message(), hint=hint), as_json=as_json)
        code = UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("enginesmith: interrupted; nothing was written", err=True)
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: EnginesmithError, *, as_json: bool) -> None:
    if as_json:
        fields = ("message", "expected", "found", "hint", "exit_code")
        values = {name: getattr(error, name) for name in fields}
        click.echo(json.dumps({"error": {"type": type(error).__name__, **values}}, indent=1, default=str))
    click.echo(f"enginesmith: error: {error}", err=True)
