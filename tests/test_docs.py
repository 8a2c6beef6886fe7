"""Links lead somewhere, files and names on the architecture page are there, and code that loads files runs."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoprune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("autoprune", "agents", "benchmarks", "docs", "envs", "examples", "findings")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
SOURCES = [path for folder in ("autoprune", "agents", "envs", "tests") for path in (ROOT / folder).rglob("*.py")]
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_pages_take_from_the_package_is_there(page: Path) -> None:
    for code in PYTHON.findall(page.read_text(encoding="utf-8")):
        for name in re.findall(r"\bautoprune\.(\w+)\(", code):
            assert hasattr(autoprune, name), name
        for module, names in re.findall(r"^from (autoprune(?!\.integrations)[\w.]*) import (.+)$", code, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


@pytest.mark.slow
def test_what_a_run_leaves_is_loaded_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is run as it stands, in a folder with a finished run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randint(3, (64,))
    quick: dict[str, Any] = {
        "latency": {"engines": ["eager"], "samples": 3, "search_samples": 3, "profile_samples": 3},
        "env": {"min_saving": 0.0},
        "search": {"agent": "uniform", "episodes": 1},
        "finetune": {"settings": {"epochs": 1}},
    }
    target = autoprune.Target(sparsity=0.5)
    given = (build(), [(x, y)], lambda _: 0.5, x[:1], target)
    done = autoprune.compress(*given, config=quick, directory="runs/mine")
    code = PYTHON.findall((ROOT / "docs/guide/what-you-get.md").read_text(encoding="utf-8"))
    assert len(code) == 4
    Path("page.py").write_text("\n".join(code), encoding="utf-8")
    names = runpy.run_path("page.py", {"build": build, "x": x})
    masked = [p for p in names["model"].parameters() if p.ndim == 2]
    assert all(bool((weight == 0).any()) for weight in masked)
    for output in (names["output"], names["small"](x), torch.from_numpy(names["logits"]), done.model(x)):
        torch.testing.assert_close(output, names["model"](x), rtol=1e-3, atol=1e-4)
