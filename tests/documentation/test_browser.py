"""The site in a real browser: wide and narrow, light and dark, with its search, and without an error in the console.

The tests need the package playwright and a Chromium, on the path or named by CHROMIUM; they are skipped without. With
AXE=path/to/axe.min.js (the npm package axe-core) the pages are also checked for accessibility.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PAGES = ["", "start/", "choose/", "gallery/", "reference/estimators/", "benchmarks/results/peers/"]
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address at which the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser reports as errors; every test asserts that this is nothing."""
    return []


def opened(browser: Any, complaints: list[str], size: str, scheme: str) -> Any:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    return page


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_and_report_no_errors(
    browser: Any, address: str, complaints: list[str], size: str, scheme: str
) -> None:
    page = opened(browser, complaints, size, scheme)
    backgrounds = set()
    for path in PAGES:
        page.goto(address + path, wait_until="load")
        assert page.locator("article h1").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), path
        for picture in page.locator("article img").all():
            picture.scroll_into_view_if_needed()
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 1
    dark = sum(int(each) for each in backgrounds.pop().strip("rgba()").split(",")[:3]) < 3 * 128
    assert dark == (scheme == "dark")
    page.close()
    assert complaints == []


@pytest.mark.slow
def test_the_search_finds_a_name(browser: Any, address: str, complaints: list[str]) -> None:
    page = opened(browser, complaints, "wide", "light")
    page.goto(address, wait_until="load")
    page.locator("input.md-search__input").click()
    page.keyboard.type("ForwardGradient", delay=20)
    found = page.locator(".md-search-result__link").first
    found.wait_for(timeout=20_000)
    found.click()
    page.wait_for_load_state("load")
    assert "ForwardGradient" in page.locator("article").inner_text()
    page.close()
    assert complaints == []


@pytest.mark.slow
@pytest.mark.skipif("AXE" not in os.environ, reason="AXE does not name the file axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(browser: Any, address: str, complaints: list[str], scheme: str) -> None:
    page = opened(browser, complaints, "wide", scheme)
    found = []
    for path in PAGES:
        page.goto(address + path, wait_until="load")
        page.add_script_tag(path=os.environ["AXE"])
        rules = {"runOnly": ["wcag2a", "wcag2aa"]}
        for violation in page.evaluate("rules => axe.run('article', rules)", rules)["violations"]:
            found.append(f"{path}: {violation['id']}: {[node['html'][:80] for node in violation['nodes'][:3]]}")
    page.close()
    assert found == []
