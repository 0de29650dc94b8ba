"""Verdicts as JUnit XML, which GitLab, Jenkins and the actions of GitHub read: one test case for each check.

The form is what Jenkins' xUnit plugin accepts (its junit-10.xsd). Numbers stand in the system-out of each case, as
properties of cases are not part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from ... import __version__
from ...errors import EnginesmithError, OutputError
from ..comparison.records import Check, Comparison
from ..manifest import EngineRecord, Manifest, OutputMetrics, Validation

ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, such as the escapes of colours in the message of a runtime."""

Outcome = Literal["passed", "failure", "error", "skipped"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One test case.

    Attributes:
        group: what it belongs to; group and name together are unique, as GitLab drops repetitions.
        message: why it did not pass, in a line; `text` says more.
        numbers: what was measured.
    """

    group: str
    name: str
    outcome: Outcome = "passed"
    message: str = ""
    text: str = ""
    numbers: Mapping[str, float | int | str | None] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def junit_report(path: Path | None, command: str) -> Iterator[Callable[[Iterable[Case]], None]]:
    """Yields what writes the cases of a command; an error of ours is written as a case of its own, and goes on.

    An older file is removed first, so that none is left that tells of another run. Nothing is written where `path` is
    None.

    Raises:
        OutputError: the file cannot be written; before any work.
    """
    if path is None:
        yield lambda cases: None
        return
    _prepare(path)
    start = time.perf_counter()

    def report(cases: Iterable[Case]) -> None:
        _write(path, command, list(cases), time.perf_counter() - start)

    try:
        yield report
    except EnginesmithError as error:
        report([Case(command, "finished", "error", error.message, str(error))])
        raise


def comparison_cases(comparison: Comparison) -> list[Case]:
    """One case for each check; what would fail, and does not count, is told in its output."""
    outcomes: Mapping[str, Outcome] = {"failed": "failure", "skipped": "skipped"}
    return [
        Case(
            f"compare.{check['kind']}",
            check["name"],
            outcomes.get(check["state"], "passed"),
            f"B is {check['verdict']}" if check["kind"] == "speed" else check["verdict"],
            check["text"],
            {"verdict": check["verdict"], **_uncounted(check), **check["numbers"]},
            check["seconds"],
        )
        for check in comparison["checks"]
    ]


def _uncounted(check: Check) -> dict[str, str]:
    return {"counts": "no, as this kind does not fail the comparison"} if check["state"] == "information" else {}


def validation_cases(validations: Iterable[Validation]) -> list[Case]:
    """One case for each engine and output, and one for each budget."""
    return [case for validation in validations for case in _validation_cases("validate", validation)]


def bundle_cases(manifest: Manifest) -> list[Case]:
    """One case for the build of each engine, and one for each output of those that were judged."""
    cases = []
    for engine in manifest["engines"]:
        cases.append(_build_case(engine))
        if engine["validation"] is not None and not engine["dropped"]:
            cases += _validation_cases("compile", engine["validation"])
    return cases


def _build_case(engine: EngineRecord) -> Case:
    outcome: Outcome = "passed"
    why = engine["reason"]
    if engine["dropped"]:
        outcome, why = "skipped", f"dropped: {engine['dropped']}"
    elif engine["status"] == "failed":
        outcome = "failure"
    elif engine["status"] == "unavailable":
        outcome = "skipped"
    numbers = {"status": engine["status"], "size_bytes": engine["size_bytes"], "cached": str(engine["cached"])}
    text = "\n".join(part for part in (why, engine["to_do"]) if part)
    return Case(
        f"compile.{engine['name']}", "build", outcome, why.partition("\n")[0], text, numbers, engine["build_s"] or 0.0
    )


def _validation_cases(command: str, validation: Validation) -> list[Case]:
    group = f"{command}.{validation['engine']}"
    cases = [_output_case(group, output, validation) for output in validation["outputs"]]
    if (budget := validation["budget"]) is not None:
        cases.append(
            Case(
                group,
                f"budget {budget['text']}",
                "passed" if budget["holds"] else "failure",
                budget["problem"] or f"measured {budget['value']}",
                numbers={"value": budget["value"]},
            )
        )
    return cases


def _output_case(group: str, output: OutputMetrics, validation: Validation) -> Case:
    numbers: dict[str, float | int | str | None] = {
        key: output[key] for key in ("relative_l2", "max_abs", "cosine", "snr_db", "nan", "inf", "top1", "top5")
    }
    numbers |= {f"bound_{key}": value for key, value in validation["tolerance"].items() if isinstance(value, float)}
    numbers["samples"] = validation["samples"]
    if (metric := validation["metric"]) is not None:
        numbers |= {f"metric_{metric['name']}": metric["value"], "metric_of_reference": metric["reference"]}
        numbers |= {name: metric[name] for name in ("perplexity", "perplexity_of_reference") if name in metric}
    outcome: Outcome = "passed" if output["passed"] else "failure"
    first = next(iter(output["failures"]), "")
    return Case(group, f"output {output['output']}", outcome, first, "\n".join(output["failures"]), numbers)


def _prepare(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise _unusable(path, error.strerror) from error
    if not writable:
        raise _unusable(path, "its folder is read-only")


def _write(path: Path, command: str, cases: list[Case], seconds: float) -> None:
    counts = {what: str(sum(case.outcome == kind for case in cases)) for what, kind in _COUNTED}
    total = f"{seconds:.3f}"
    root = ElementTree.Element("testsuites", {"name": "enginesmith", "tests": str(len(cases)), "time": total})
    root.attrib |= {what: counts[what] for what in ("failures", "errors")}
    attributes = {
        "name": f"enginesmith {command}",
        "tests": str(len(cases)),
        **counts,
        "time": total,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hostname": platform.node() or "localhost",
    }
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", {"name": "enginesmith", "value": __version__})
    for case in cases:
        suite.append(_element(case))
    ElementTree.indent(root)
    try:
        ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise _unusable(path, error.strerror) from error


_COUNTED = (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))


def _element(case: Case) -> ElementTree.Element:
    attributes = {
        "classname": _clean(f"enginesmith.{case.group}"), "name": _clean(case.name), "time": f"{case.seconds:.3f}",
    }  # fmt: skip
    element = ElementTree.Element("testcase", attributes)
    if case.outcome != "passed":
        attributes = {"message": _clean(case.message)}
        if case.outcome != "skipped":
            attributes["type"] = case.outcome
        ElementTree.SubElement(element, case.outcome, attributes).text = _clean(case.text or case.message)
    lines = [f"{key}: {'unknown' if value is None else value}" for key, value in case.numbers.items()]
    if case.outcome == "passed" and case.text:
        lines.insert(0, case.text)
    if lines:
        ElementTree.SubElement(element, "system-out").text = _clean("\n".join(lines))
    return element


def _clean(text: str) -> str:
    return ILLEGAL.sub("", text)


def _unusable(path: Path, reason: str | None) -> OutputError:
    return OutputError(f"JUnit file {str(path)!r} cannot be written", found=reason, hint="choose another file")
