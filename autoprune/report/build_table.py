"""What `autoprune build` wrote, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from autoprune.repack.aot.library import Built
from autoprune.report.table import markdown_table


def build_text(rows: Sequence[Built]) -> str:
    """A row a target, then what was written and what is missing for the rest."""
    header = ("target", "shapes", "object bytes", "code", "read-only data", "workspace")
    cells = [
        (
            row.target,
            ", ".join(row.shapes),
            str(row.object_bytes),
            str(row.code_bytes),
            str(row.data_bytes),
            ", ".join(map(str, row.workspace_bytes)),
        )
        for row in rows
    ]
    lines = [markdown_table(header, cells, left=2)]
    for row in rows:
        lines.append(f"Written for {row.target} in {row.folder}: {', '.join(row.files)}")
        lines += [f"For {row.target}: {note}" for note in row.notes]
    return "\n".join(lines)
