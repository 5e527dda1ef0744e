"""Results for other programs: JUnit files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.validate import Validation


def write_junit(result: Validation, path: Path) -> None:
    """One test case a candidate and gate, as CI servers read them."""
    from junitparser import Failure, JUnitXml, TestCase, TestSuite

    from converters.writeback import write_atomically

    suite = TestSuite("mixmix validate")
    for candidate in result.candidates:
        for verdict in candidate.verdicts:
            case = TestCase(verdict.gate, classname=str(candidate.path))
            if not verdict.passed:
                case.result = [Failure(f"{candidate.path}: {verdict.reason}")]
            suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    write_atomically(path, document.tostring())
