"""The page: self-contained, escaped, accessible, and opened in a browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.report_fixtures import default_sweep, full_sweep, write_json, write_run
from vaeq.report import Report, write_report
from vaeq.report.figures import DRAWINGS
from vaeq.report.latex import literal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Elements without an end tag.
VOID = {"meta", "link", "img", "br", "hr", "path", "use", "rect", "image", "circle", "stop"}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over everything a record may hold."""
    folder = tmp_path_factory.mktemp("full")
    full_sweep(folder / "runs", (2, 8, 32), (1, 2), (0, 1, 2), samples=2000)
    write_report([folder / "runs"], folder / "out", Console(quiet=True))
    return folder / "out" / "report.html"


def report(folder: Path) -> tuple[str, Report]:
    result = write_report([folder], folder / "out", Console(quiet=True))
    return (folder / "out" / "report.html").read_text(), result


class Outline(HTMLParser):
    """Tags, ids and links of a page; that every element is closed in order is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_one_file_with_landmarks_and_names_for_everything(full: Path) -> None:
    text = full.read_text()
    page = Outline(text)
    assert len(text) < 2_000_000
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("nav")) == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in page.all("a"):
        target = attrs["href"] or ""
        assert target[1:] in ids if target.startswith("#") else (full.parent / target).exists()
    # Nothing is fetched: what is referred to is in the page.
    for _, attrs in page.tags:
        for name in ("src", "xlink:href"):
            if name in attrs:
                assert re.match(r"data:|#", attrs[name] or "")
    assert not re.search(r"url\((?!#)|@import|http://(?!www.w3.org)|https://", text)
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    assert all("scope" in attrs for attrs in page.all("th"))
    assert text.count("<caption") == text.count("<table")
    assert {attrs["id"] for attrs in page.all("figure")} == DRAWINGS.keys() - {
        "divergence_by_encoder_width"
    }


def test_what_is_referred_to_inside_the_drawings_is_there_once(full: Path) -> None:
    text = full.read_text()
    used = set(re.findall(r"(?:xlink:href=\"#|url\(#)([\w-]+)", text))
    assert used
    for name in used:
        assert text.count(f'id="{name}"') == 1


def test_the_verdict_comes_first_and_tables_hold_the_tests(full: Path) -> None:
    text = full.read_text()
    first = text.index("One dimension at a time, claim 1 is confirmed")
    assert first < text.index("Jointly claim 1 is") < text.index("Claim 2, a deeper encoder")
    assert first < text.index("<table") < text.index("<figure")
    flat = html.unescape(text)
    for words in ("Page p<0.001", "q<0.001", "Per doubling", "Per layer", "pairs certified",
                  "training images (floor)", "KL(p_data‖p_θ) ≥", "Random projections",
                  "Collapsed dimensions: 24 of 32", "Benjamini"):  # fmt: skip
        assert words in flat


def test_numbers_that_are_missing_are_said_and_never_drawn(tmp_path: Path) -> None:
    text, result = report(default_sweep(tmp_path))
    assert "these records hold no log-likelihood" in text
    assert {"n_curve", "quilt", "uniform", "two_sample", "samples", "training"} <= set(
        result.left_out
    )
    for name, reason in result.left_out.items():
        assert f"<code>{name}</code>: {html.escape(reason, quote=False)}." in text
        assert f'<figure id="{name}"' not in text


def test_old_records_without_divergence_by_epoch_show_the_elbo_alone(tmp_path: Path) -> None:
    directory = write_run(tmp_path, 8, full=True)
    record = json.loads((directory / "record.json").read_text())
    del record["history"]["test_marginal_kl"], record["history"]["test_moment_kl"]
    record["curves"]["by_class"]["marginal_kl"][3] = None
    write_json(directory / "record.json", record)
    text, result = report(tmp_path)
    assert "hold no divergence by epoch, so it is not drawn" in text
    assert "Divergence of the held-out codes" not in text
    assert "quilt" in result.left_out


def test_names_from_files_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    for latent_dim in (2, 8):
        write_run(tmp_path, latent_dim, activation=evil, experiment=f"{evil}&")
    directory = write_run(tmp_path / '"><img src=x onerror=alert(1)>', 2, activation="$x_2^{")
    record = json.loads((directory / "record.json").read_text())
    record["estimates"]["moment_kl"] |= {"value": None, "std_error": None, "reason": evil}
    record["provenance"]["torch"] = evil
    write_json(directory / "record.json", record)
    text, _ = report(tmp_path)
    assert evil not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<img src=x" not in text
    Outline(text)


def test_one_run_alone_makes_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, 2, samples=200)
    text, _ = report(tmp_path)
    assert "has no answer here" in text
    assert "None: no factor varied" in text


def test_latex_is_a_booktabs_table_without_active_characters(full: Path) -> None:
    lines = (full.parent / "table.tex").read_text().splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {6}
    assert {r"\toprule", r"\midrule", r"\bottomrule"} <= set(lines)
    assert lines[1] == r"\begin{tabular}{lrrrrrr}"
    assert rows[0].startswith(r"latent\_dim & 2 & 2 & 8")
    assert literal(r"50% of $x_1 & {a}~b\c^#") == (
        r"50\% of \$x\_1 \& \{a\}\textasciitilde{}b\textbackslash{}c\textasciicircum{}\#"
    )


SORT = """<script>
const head = document.querySelector("#runs th"), cell = () => document.querySelector("#runs td");
const said = [document.documentElement.scrollWidth <= innerWidth];
for (let i = 0; i < 2; i++) {
  head.querySelector("button").click();
  said.push(head.getAttribute("aria-sort"), cell().textContent);
}
document.title = JSON.stringify(said);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_a_complaint(full: Path, tmp_path: Path, width: int) -> None:
    """No console message, no sideways scrolling, and the table sorts from its buttons."""
    page = tmp_path / "page.html"
    # Headless windows are at least 500 wide: a phone is a frame of its width.
    framed = tmp_path / "framed.html"
    framed.write_text(full.read_text().replace("</body>", SORT))
    page.write_text(
        "<!DOCTYPE html><title>x</title>"
        f'<iframe src="framed.html" width="{width}" height="900"></iframe>'
        "<script>onload = () => setTimeout(() => { document.title = "
        'document.querySelector("iframe").contentDocument.title; }, 100)</script>'
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
            "--virtual-time-budget=4000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert found == [True, "ascending", "2", "descending", "32"]
