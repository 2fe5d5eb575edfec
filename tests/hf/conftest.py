"""Parity is shown or it is not: without the reference library these tests fail, none is skipped."""

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and "tests/hf/" in item.nodeid:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped, but parity must be shown: {call.excinfo.value}"
