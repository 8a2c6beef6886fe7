"""The HTML page says what the markdown says, shows its figures, and asks for nothing from elsewhere."""

from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser

from autoprune.report.html import html_page
from autoprune.report.page import report_page
from tests.report.test_page import REPORT

PNG = {"front of trials.png": b"first", "reward.png": b"second"}


class Reader(HTMLParser):
    """Collects a page's tags with their attributes, its text, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):  # these have no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_every_word_and_row_of_the_markdown_is_there() -> None:
    markdown = report_page(REPORT)
    page = Reader(html_page(markdown, PNG))
    cells = re.sub(r"!\[(.*?)\]\(.*?\)|^\| -.*$", r"\1", markdown, flags=re.MULTILINE).replace("\\|", "\0")
    plain = re.sub(r"[#*|]", " ", cells).replace("\0", "|")
    assert set(plain.split()) <= set(page.words)
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert page.count("table") == len(tables)
    assert page.count("tr") == sum(table.count("\n") - 1 for table in tables)
    assert not page.open, "every tag is closed"
    assert page.count("h2") == markdown.count("\n## ")


def test_figures_are_inside_with_their_captions() -> None:
    page = html_page(report_page(REPORT), PNG)
    sources = re.findall(r'src="data:image/png;base64,(.*?)" alt="(.*?)"', page)
    assert [(b64decode(data), caption) for data, caption in sources] == [(b"first", "Trials"), (b"second", "Reward")]
    assert re.findall(r'class="caption">(.*?)<', page) == ["Trials", "Reward"]


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = "# A <b>title</b> & more\n\n<script>run()</script> ![far](https://example.org/x.png) [x](javascript:run())\n"
    page = html_page(text + report_page(REPORT), PNG)
    tags = Reader(page).tags
    assert not {"script", "link", "iframe", "b"} & {name for name, _ in tags}
    asked = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert len(asked) == 2
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in asked)
    assert "<title>A &lt;b&gt;title&lt;/b&gt; &amp; more</title>" in page
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
