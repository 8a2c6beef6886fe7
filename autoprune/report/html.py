"""A report as one HTML file with its figures in it: nothing is fetched, and nothing in it runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

_STYLE = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1f2328; --faint: #656d76; --line: #d8dee4; --band: #f6f8fa; --accent: #0969da;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --text: #e6edf3; --faint: #8d96a0; --line: #30363d; --band: #161b22; --accent: #58a6ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem;
  background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif;
}
h1 { margin: 0 0 .75rem; font-size: 1.75rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h1 + p { margin: 0; padding: .8rem 1rem; border-left: 4px solid var(--accent); background: var(--band); }
h2 + p { color: var(--faint); }
a { color: var(--accent); }
code { font: .9em ui-monospace, monospace; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
tbody tr:hover { background: var(--band); }
img { display: block; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #ffffff; }
.caption { padding-top: .4rem; color: var(--faint); font-size: .875rem; }
"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def html_page(markdown: str, figures: Mapping[str, bytes]) -> str:
    """Returns a page of markdown as an HTML document that needs no other file.

    Args:
        markdown: the page; its first line is the title. HTML in it is shown, not rendered.
        figures: file name -> PNG, of the images that the page shows. Of another image its caption alone is shown.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")

    def figure(_: RendererHTML, tokens: Sequence[Token], at: int, *__: Any) -> str:
        name, caption = unquote(str(tokens[at].attrs["src"])), escape(tokens[at].content)
        if name not in figures:
            return caption
        data = b64encode(figures[name]).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{caption}"><span class="caption">{caption}</span>'

    renderer.add_render_rule("image", figure)
    renderer.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    title = markdown.partition("\n")[0].lstrip("# ")
    return _PAGE.format(title=escape(title), style=_STYLE, body=renderer.render(markdown))
