"""Medians with their spread, tables, JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def spread(values: Iterable[float], digits: int = 2) -> str:
    """`median (least-greatest)`."""
    known = list(values)
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.median(known):.{digits}f} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of sorted values did not exceed; nan without any."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = f"|{'|'.join('-' * (width + 1) + (':' if column else '-') for column, width in enumerate(widths))}|"
    return "\n".join([line(head), rule, *map(line, rows)])


def write_json(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1) + "\n")


def rotated(items: Sequence[Any], round_number: int) -> list[Any]:
    """Another order every round: reversed every other time and begun elsewhere, so that no neighbour is always the same."""
    start = (round_number // 2) % max(1, len(items))
    turned = [*items[start:], *items[:start]]
    return turned[::-1] if round_number % 2 else turned
