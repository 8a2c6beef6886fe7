"""Puts on the site what lies outside docs/: the results of benchmarks, the card of the bundled policy, the examples.

Pages link to them by their place in the repository, which works there and in editors; on the site the same link leads
to the copy below ``repository/``.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("*.md", "*.png", "*.svg")
COPIED = (*(f"benchmarks/results/{each}" for each in RESULTS), "agents/shipped/CARD.md", "examples/*.py")
FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            place = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads links out of docs/ to the copies."""
    here = PurePosixPath(page.file.src_uri).parent

    def moved(link: re.Match[str]) -> str:
        target = normpath(f"docs/{here}/{link[1]}")
        return link[1] if target.startswith("docs/") else relpath(f"{FOLDER}/{target}", str(here))

    return _LINK.sub(moved, markdown)
