"""A real browser for the tests of the page."""

from __future__ import annotations

import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    missing = "playwright is not installed: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=missing)
    chromium = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not chromium:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} found, CHROMIUM_PATH not set")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
