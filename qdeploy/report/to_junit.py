"""JUnit XML: each check a test case, so that every CI system shows them."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from qdeploy.disk.printable import printable
from qdeploy.judging.verdict import Check, describe, missing
from qdeploy.report.values import Report


def to_junit(report: Report) -> bytes:
    """One suite: a check off its limit fails, one made on too few images or missing is an error."""
    absent = [
        name
        for name in missing(report.checks, report.required)
        if not any(check.name == name for check in report.checks)
    ]
    failures = sum(check.state == "off" for check in report.checks)
    errors = len(absent) + sum(_inconclusive(check, report) for check in report.checks)
    suite = ET.Element(
        "testsuite",
        name="qdeploy",
        tests=str(len(report.checks) + len(absent)),
        failures=str(failures),
        errors=str(errors),
        timestamp=report.started,
        time=f"{sum(stage.seconds for stage in report.stages):.3f}",
    )
    for check in report.checks:
        case = _case(suite, ", ".join(filter(None, (check.name, check.subject, check.runtime))))
        said = f"{check.value:.6g} {check.unit}, limit {check.relation} {check.limit:g}"
        if check.state == "off":
            ET.SubElement(case, "failure", message=printable(said))
        elif _inconclusive(check, report):
            ET.SubElement(case, "error", message=printable(describe(check)))
        else:
            ET.SubElement(case, "system-out").text = printable(said)
    for name in absent:
        ET.SubElement(_case(suite, name), "error", message="required, and not measured")
    return ET.tostring(suite, encoding="utf-8", xml_declaration=True)


def _inconclusive(check: Check, report: Report) -> bool:
    return check.state == "unclear" or (check.state == "few" and check.name in report.required)


def _case(suite: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname="qdeploy.gate", name=printable(name))
