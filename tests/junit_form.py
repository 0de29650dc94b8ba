"""Reads JUnit XML, and fails where its form is not the one that everybody reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

COUNTS = {"name", "tests", "failures", "errors", "time"}
OUTCOME = ({"message", "type"}, set(), set())
FORM: Mapping[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (COUNTS, COUNTS, {"testsuite"}),
    "testsuite": (
        COUNTS | {"skipped", "timestamp", "hostname"},
        {"name", "tests", "failures", "errors"},
        {"properties", "testcase"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, {"name", "value"}, set()),
    "testcase": ({"classname", "name", "time"}, {"classname", "name"}, {"skipped", "error", "failure", "system-out"}),
    "failure": OUTCOME,
    "error": OUTCOME,
    "skipped": OUTCOME,
    "system-out": (set(), set(), set()),
}
"""Attributes that are allowed, those that are needed, and children, as in the junit-10.xsd of Jenkins' xUnit plugin."""


def check_form(path: Path) -> ElementTree.Element:
    """Parses a file, and fails where its form is not the one that everybody reads."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    for element in root.iter():
        allowed, needed, children = FORM[element.tag]
        assert needed <= set(element.attrib) <= allowed, element.attrib
        assert {child.tag for child in element} <= children
        if "time" in element.attrib:
            assert re.fullmatch(r"\d+\.\d{3}", element.attrib["time"])
    for suite in (root, *root.findall("testsuite")):
        cases = list(suite.iter("testcase"))
        assert suite.attrib["tests"] == str(len(cases))
        for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            count = sum(case.find(kind) is not None for case in cases)
            assert suite.attrib.get(attribute, str(count)) == str(count)
    names = [(case.attrib["classname"], case.attrib["name"]) for case in root.iter("testcase")]
    assert len(set(names)) == len(names)
    return root


def outcome(root: ElementTree.Element, classname: str, name: str) -> tuple[str, str, str]:
    """What became of a case: a tag, a message, and what was put out."""
    (case,) = [c for c in root.iter("testcase") if (c.attrib["classname"], c.attrib["name"]) == (classname, name)]
    output = case.findtext("system-out", "")
    for child in case:
        if child.tag != "system-out":
            return child.tag, child.attrib["message"], output
    return "passed", "", output
