"""A real headless browser, in which tests open pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser(width: int = 1200, height: int = 1400) -> Iterator[WebDriver]:
    """Chromium of this machine, with a window of this size in pixels. Where there is none, Selenium downloads one."""
    options = webdriver.ChromeOptions()
    # no-sandbox: root has none. dev-shm: containers have little of it
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found, driver = next(filter(None, map(shutil.which, _BROWSERS)), None), shutil.which("chromedriver")
    if found:
        options.binary_location = found
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver if found else None))
    try:
        yield opened
    finally:
        opened.quit()
