"""The pages: their code runs and prints what they say, every public name has a place, and the site builds strictly."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout
from html import unescape
from io import StringIO
from pathlib import Path
from urllib.parse import unquote

import pytest
import site_pages

import bilevel
from bilevel import attribution

NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]\d+)?")


@pytest.mark.slow
@pytest.mark.parametrize("page", site_pages.with_code())
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in site_pages.blocks(page):
        out = StringIO()
        with redirect_stdout(out):
            exec(compile("\n" * (block.line - 1) + block.code, str(site_pages.DOCS / page), "exec"), names)
        if block.printed is not None:
            assert_same_but_for_rounding(out.getvalue(), block.printed)


def assert_same_but_for_rounding(printed: str, shown: str) -> None:
    """Words and whole numbers are equal. Other numbers agree within a tenth, or within two of the last digit shown."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        last_digit = 10.0 ** -len(expected.split(".")[1].split("e")[0])
        assert float(found) == pytest.approx(float(expected), rel=0.1, abs=2 * last_digit)


def test_a_page_that_shows_another_number_is_found() -> None:
    assert_same_but_for_rounding("loss 0.5012 of 3", "loss 0.49 of 3")
    for shown in ("loss 0.6999 of 3", "loss -0.5012 of 3", "loss 0.5 of 4", "error 0.5 of 3"):
        with pytest.raises(AssertionError):
            assert_same_but_for_rounding("loss 0.5012 of 3", shown)


def test_the_pages_with_code_are_found() -> None:
    assert {"start.md", "choose.md", "coming_from.md", "guides/troubleshooting.md"} <= set(site_pages.with_code())


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (site_pages.DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    modules = (
        (bilevel, "bilevel"),
        (bilevel.experimental, "bilevel.experimental"),
        (attribution, "bilevel.attribution"),
    )
    public = {f"{name}.{each}" for module, name in modules for each in module.__all__}
    public -= {"bilevel.attribution.attribute"}  # `bilevel.attribute`
    public |= {"bilevel.integrations.example_weights.ExampleWeights"}  # needs scikit-learn
    public |= {f"bilevel.integrations.transformers.{name}" for name in ("MixedSources", "MixtureCallback")}  # need `lm`
    public -= {"bilevel.errors", "bilevel.experimental"}
    errors = {
        f"bilevel.errors.{n}"
        for n, e in vars(bilevel.errors).items()
        if isinstance(e, type) and e.__module__ == "bilevel.errors"
    }
    stable = re.findall(
        r"^\| `(\w+)` \| `(bilevel[\w.]*)` \|", (site_pages.DOCS / "stability.md").read_text(), flags=re.MULTILINE
    )
    received = {f"{module}.{name}" for name, module in stable}
    assert received
    assert public | errors | received == set(shown)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (site_pages.DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [row.split("`")[1] for row in re.findall(r"^\| `.*$", page, flags=re.MULTILINE)]
    assert len(quoted) > 8
    source = "".join(path.read_text(encoding="utf-8") for path in (site_pages.ROOT / "src").rglob("*.py"))
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)  # literals that are continued on the next line
    for message in quoted:
        for fragment in filter(None, (each.strip() for each in message.split("…"))):
            assert fragment in joined, message


def test_every_picture_has_a_text() -> None:
    for page in [site_pages.ROOT / "README.md", *site_pages.DOCS.rglob("*.md")]:
        for alternative in re.findall(r"!\[([^\]]*)\]\(", page.read_text(encoding="utf-8")):
            assert len(alternative) > 10, page


@pytest.mark.slow
def test_the_reference_shows_names_with_their_fields(site: Path) -> None:
    reference = (site / "reference" / "estimators" / "index.html").read_text(encoding="utf-8")
    assert 'id="bilevel.ForwardGradient"' in reference
    assert "<code>standard_error</code>" in reference


@pytest.mark.slow
def test_no_link_is_dead_and_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    html = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in html.items()}
    dead, links = [], 0
    for path, text in html.items():
        assert not re.search(r'<(?:script|img|iframe)[^>]* src="?https?:', text)
        assert not re.search(r'<link[^>]* rel="?stylesheet[^>]* href="?https?:', text)
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            address, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            links += 1
            target = Path(os.path.normpath(path.parent / address)) if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert links > 1000
    assert dead == []
