"""Pages of results: a head that names the command, tables, and at the foot where the figures come from."""

from __future__ import annotations

from pathlib import Path

from autoprune.files import write_text


def page(title: str, command: str, about: str, *parts: str) -> str:
    """A page as markdown: the head, then the parts, an empty line between them.

    Args:
        title: of the page.
        command: what wrote it, behind ``python -m benchmarks``.
        about: what was measured, and how; follows the command on its line.
        parts: paragraphs, headings, tables; empty ones are left out.
    """
    head = f"Written by `python -m benchmarks {command}`. {about}"
    return "\n\n".join(part.strip() for part in (f"# {title}", head, *parts) if part.strip()) + "\n"


def write_page(folder: Path, name: str, text: str) -> None:
    """Writes ``NAME.md`` and prints it."""
    write_text(folder / f"{name}.md", text)
    print(text)
