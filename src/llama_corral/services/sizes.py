"""How large what travels may be. A coordinator takes at least this much; larger things are named where they would stand."""

from __future__ import annotations

from typing import Final

REPORT_LIMIT: Final = 1_000_000
"""Bytes of events in one report; a single larger event travels alone."""
EVENT_LIMIT: Final = 4_000_000
RESULT_LIMIT: Final = 4_000_000
CONTEXT_LIMIT: Final = 4_000_000
CHECKPOINT_LIMIT: Final = 8_000_000
MESSAGE_LIMIT: Final = 64_000
"""Characters of an error's message; and four times as many of its traceback."""


def size_of(text: str) -> int:
    """The bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def shortened(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """The text, without its middle where it is longer than that."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {len(text) - limit} characters left out ... {text[-limit // 2 :]}"
