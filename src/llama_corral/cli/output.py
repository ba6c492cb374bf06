"""How commands print: tables and lines for people, JSON for programs, one line for an error.

Standard output holds results only; everything else goes to standard error. What comes from a server is shown without its
control characters, so that no event can drive somebody's terminal.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_CANCELLED: Final = 130

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST_CELL: Final = 60


def printable(text: str) -> str:
    """The text with its control characters made visible; line ends and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def complain(message: str, hint: str | None, code: int) -> int:
    """An error as one line on stderr. Returns the exit code."""
    print(f"corral: {one_line(message)}{f' ({one_line(hint)})' if hint else ''}", file=sys.stderr, flush=True)
    return code


def note(text: str) -> None:
    """Something that is no result."""
    print(one_line(text), file=sys.stderr, flush=True)


def to_json(value: Any, *, indent: int | None = None) -> str:
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not utf8, indent=indent)


def print_json(value: Any) -> None:
    """One JSON document."""
    print(to_json(value, indent=2), flush=True)


def print_line(value: Any) -> None:
    """One line of a stream of JSON documents."""
    print(to_json(value), flush=True)


def print_text(text: str) -> None:
    print(printable(text), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """A table: as wide as its content in a pipe, fitted by rich at a terminal. Without rows, `empty` on stderr."""
    if not rows:
        note(empty)
        return
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("ID", "TASK"))
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."


def moment(seconds: float | None) -> str | None:
    """Seconds since the epoch as local time."""
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float | None) -> str | None:
    """Seconds in the largest unit of which there are two."""
    if seconds is None:
        return None
    for name, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def print_event(index: int, kind: str, data: Any) -> None:
    """An event for a person: one line, whatever is in it."""
    fields = printable(json.dumps(data, ensure_ascii=False)) if data else ""
    kind = one_line(kind)
    if not sys.stdout.isatty():
        print(f"{index:>4}  {kind}  {fields}".rstrip(), flush=True)
        return
    # rich costs a tenth of a second, which a line of an event need not.
    colour, plain = ("\x1b[36m", "\x1b[0m") if _colours() else ("", "")
    print(f"{index:>4}  {colour}{kind}{plain}  {fields}".rstrip(), flush=True)


def _colours() -> bool:
    import os

    return "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
