"""What would go to the Hub, for a person to agree to."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlcpt.report.screen import visible


def push_lines(
    repo_id: str, private: bool, revision: str | None, files: Iterable[tuple[str, int]], card: str
) -> list[RenderableType]:
    """The repository, every file with its size, and the card in full.

    Example:
        >>> lines = push_lines("me/mine", True, None, [("README.md", 2), ("config.json", 40)], "hi")
        >>> str(lines[0])
        'would go to me/mine (private, branch main)'
    """
    table = Table(box=box.SIMPLE, pad_edge=False, show_footer=True)
    sizes = list(files)
    table.add_column("file", f"{len(sizes)} files", overflow="fold")
    table.add_column("bytes", f"{sum(size for _, size in sizes):,}", justify="right", no_wrap=True)
    for name, size in sizes:
        table.add_row(name, f"{size:,}")
    where = f"{'private' if private else 'public'}, branch {revision or 'main'}"
    return [Text(f"would go to {repo_id} ({where})"), table, Text("README.md", "bold"), Text(visible(card))]
