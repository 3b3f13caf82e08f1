"""The pages in headless Chromium, light and dark, without console errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.reports.history import history_page
from mtl_ranker.reports.page import training_report
from mtl_ranker.workspace import Workspace
from tests.nightly.test_suite import LAST, prepared
from tests.projects import project
from tests.reports.test_history import with_trouble

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# 1 = light, 0 = dark, as the page's prefers-color-scheme sees it.
SCHEMES = {"light": "1", "dark": "0"}


def screenshot(page: Path, picture: Path, shown: tuple[str, str], profile: Path) -> str:
    """Write a screenshot of a page to `picture`; returns its console messages.

    Args:
        shown: colour scheme, and width and height of the window.
    """
    scheme, size = shown
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={profile}",
            f"--window-size={size}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--enable-logging=stderr",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def check_both_schemes(page: Path, folder: Path, size: str = "1200,1600") -> None:
    """The page is not empty, light or dark as asked, and logs nothing to the console."""
    brightness = {}
    for scheme in SCHEMES:
        picture = folder / f"{scheme}.png"
        messages = screenshot(page, picture, (scheme, size), folder / f"profile-{scheme}")
        assert messages == ""
        pixels = imread(picture)[..., :3]
        brightness[scheme] = float(np.median(pixels))
        assert pixels.std() > 0.05
    assert brightness["light"] > 0.9
    assert brightness["dark"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1200,1600", "500,1600"], ids=["desk", "phone"])
def test_page_of_all_nights_is_readable(tmp_path, size):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    page = tmp_path / "index.html"
    page.write_text(history_page(project(), with_trouble(30), Workspace(tmp_path)), "utf-8")
    check_both_schemes(page, tmp_path, size)


@pytest.mark.slow
def test_report_is_readable_light_and_dark_without_console_errors(tiny, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    page = tmp_path / "report.html"
    page.write_text(training_report(context.project, suite), "utf-8")
    check_both_schemes(page, tmp_path)
