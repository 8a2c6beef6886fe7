"""Links between the pages lead somewhere, and the architecture page names files and functions that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("autoprune", "agents", "benchmarks", "docs", "envs", "examples", "findings")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
SOURCES = [path for folder in ("autoprune", "agents", "envs", "tests") for path in (ROOT / folder).rglob("*.py")]
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """The page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a heading is linked by, as GitHub and mkdocs make it."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_site_is_reached_from_its_index() -> None:
    docs = ROOT / "docs"
    reached, new = set[Path](), {docs / "index.md"}
    while new:
        reached |= new
        links = {
            (page.parent / link.partition("#")[0]).resolve() for page in new for link in LINK.findall(text_of(page))
        }
        new = {link for link in links if link.suffix == ".md" and docs in link.parents} - reached
    assert reached == set(docs.rglob("*.md"))


@pytest.mark.parametrize("page", ["docs/architecture.md", "autoprune/repack/README.md"])
def test_files_and_names_of_the_code_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    files = {f"/{path.relative_to(ROOT).as_posix()}" for path in SOURCES}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(file.endswith(f"/{name}") for file in files), name
    for name in re.findall(r"`([\w/]+/)`", text):
        assert any(f"/{name}" in file for file in files) or (ROOT / name).is_dir(), name
    for name, listed in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
        sources = [path.read_text(encoding="utf-8") for path in SOURCES if path.as_posix().endswith(f"/{name}")]
        for symbol in re.findall(r"`[\w.]*?(\w+)`", listed):
            assert any(re.search(rf"\b{symbol}\b", source) for source in sources), f"{name}: {symbol}"
