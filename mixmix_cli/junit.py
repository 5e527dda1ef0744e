"""Gates as a JUnit file, which CI servers read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.validate import Validation


def write_junit(result: Validation, path: Path) -> None:
    """One test case a candidate and gate. The suite takes the time of the whole validation, as gates share runs."""
    from junitparser import Failure, JUnitXml, TestCase, TestSuite

    from mixmix_cli.report.documents import clean
    from recipes.records import write_text

    suite = TestSuite("mixmix validate")
    for candidate in result.candidates:
        for verdict in candidate.verdicts:
            name = clean(str(candidate.path))  # XML has no control characters
            case = TestCase(verdict.gate, classname=name, time=round(verdict.seconds, 3))
            if not verdict.passed:
                case.result = [Failure(f"{name}: {clean(verdict.reason)}")]
            suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    suite.time = document.time = round(result.seconds, 3)
    write_text(path, document.tostring().decode())
