"""A site of mathv2-report in headless Chromium, for checks.

It needs Debian's chromium and chromium-driver, and selenium, the extra [browser] of setup.py.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from selenium import webdriver
from selenium.common import exceptions
from selenium.webdriver.chrome import service

WAIT_SECONDS = 20.0


class WrongError(Exception):
    """The page is not as it must be."""


def require(fact: bool, said: str) -> None:
    if not fact:
        raise WrongError(said)


class Page:
    """A site in a browser."""

    def __init__(self, driver: webdriver.Chrome, at: pathlib.Path):
        self.driver, self.at = driver, at

    def open(self, address: str = "") -> None:
        """A fresh load of an address of the site."""
        self.driver.get("about:blank")
        self.driver.get(f"{(self.at / 'index.html').as_uri()}{address}")
        self.until("return document.querySelector('main h1') !== null", "nothing is shown")

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def until(self, script: str, otherwise: str) -> None:
        """Waits until the script returns something true."""
        end = time.monotonic() + WAIT_SECONDS
        while not self.run(script):
            if time.monotonic() > end:
                raise WrongError(f"{otherwise} (at {self.run('return location.hash')})")
            time.sleep(0.02)

    def click(self, selector: str, number: int = 0) -> None:
        found = self.driver.find_elements("css selector", selector)
        require(len(found) > number, f"there is no {selector} number {number}")
        self.run("arguments[0].scrollIntoView({ block: 'center' })", found[number])
        found[number].click()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus, with time for each to be acted on."""
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()
            time.sleep(0.15)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def resize(self, size: tuple[int, int], dark: bool = False) -> None:
        facts = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", facts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def require_quiet(self) -> None:
        """No console error, no dialog, and nothing was loaded from elsewhere."""
        with contextlib.suppress(exceptions.NoAlertPresentException):
            raise WrongError(f"a dialog is open: {self.driver.switch_to.alert.text}")
        said = [entry for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        require(not said, f"the console says {said[:3]}")
        loaded = self.run("return performance.getEntriesByType('resource').map((e) => e.name)")
        strange = [name for name in loaded if not name.startswith(self.at.as_uri())]
        require(not strange, f"something was loaded from elsewhere: {strange[:3]}")


@contextlib.contextmanager
def browsing() -> Iterator[webdriver.Chrome]:
    """Headless Chromium; ValueError where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise ValueError("chromium or its driver is missing: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-dev-shm-usage")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    opened = webdriver.Chrome(options=options, service=service.Service(driver))
    try:
        opened.set_script_timeout(WAIT_SECONDS)
        yield opened
    finally:
        opened.quit()
