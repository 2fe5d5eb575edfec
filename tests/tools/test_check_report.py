"""The report in a real browser, where there is one."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]


@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} missing: see tools/check_report.py"
)
def test_a_browser_reads_the_report():
    done = subprocess.run(
        [sys.executable, "-m", "tools.check_report", "--records=2000"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
