"""Files, classes and functions stay small enough to be read at one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, CLASS, FUNCTION = 400, 200, 60  # lines at most; of a definition from its `def` or `class` to its end
REASON = "# long: "  # of a longer function: its line stands right above the `def` or its decorators, or right below it
CLASSES = (ast.ClassDef,)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources() -> list[Path]:
    """Each file once: `autoprune/envs` and `autoprune/agents` are links."""
    folders = ("autoprune", "envs", "agents", "benchmarks")
    return sorted({path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")})


def too_long(text: str, name: str) -> Iterator[str]:
    """What exceeds its number of lines."""
    lines = text.splitlines()
    if len(lines) > FILE:
        yield f"{name} has {len(lines)} lines, more than {FILE}: part it."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, CLASSES):
            most, advice = CLASS, "part it"
        elif isinstance(node, FUNCTIONS):
            most, advice = FUNCTION, f"part it, or say why not in a comment right above it: {REASON}..."
        else:
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > most and not (isinstance(node, FUNCTIONS) and has_reason(node, lines)):
            yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than {most}: {advice}."


def has_reason(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Whether a comment says why the function is long."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    above, below = lines[first - 2] if first > 1 else "", lines[node.body[0].lineno - 2]
    return any(len(line.strip()) > len(REASON) and line.strip().startswith(REASON) for line in (above, below))


def test_nothing_is_too_long_to_be_read_at_one_go() -> None:
    found = sources()
    assert len(found) > 200
    long = [
        each
        for path in found
        for each in too_long(path.read_text("utf-8"), path.relative_to(ROOT.resolve()).as_posix())
    ]
    assert not long, "\n".join(long)


BODY = "    x = 1\n" * 60


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("def f():\n" + BODY[:-10], 0),
        ("def f():\n" + BODY, 1),
        ("async def f():\n" + BODY, 1),
        ("# long: one table\ndef f():\n" + BODY, 0),
        ("# long: one table\n@cache\ndef f():\n" + BODY, 0),
        ("def f():\n    # long: one table\n" + BODY, 0),
        ("# long: \ndef f():\n" + BODY, 1),
        ("# long: one table\n\ndef f():\n" + BODY, 1),
        ("class A:\n    x: int\n" + "    y = 1\n" * 198, 0),
        ("class A:\n    x: int\n" + "    y = 1\n" * 199, 1),
        ("# long: no class may be\nclass A:\n    x: int\n" + "    y = 1\n" * 199, 1),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * 60, 1),
    ],
)
def test_what_is_too_long(text: str, count: int) -> None:
    assert len(list(too_long(text, "name"))) == count
