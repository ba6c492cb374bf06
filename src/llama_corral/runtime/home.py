"""The event loop that a run lives in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio.lowlevel

from ..aio import caller_library, library_clock


@dataclass(slots=True)
class Home:
    """Where a run is driven: what code of other threads and of the other library must know to reach it."""

    backend: str
    thread: int
    token: Any
    clock: Callable[[], float]

    @classmethod
    def here(cls) -> Home:
        """The caller's event loop, in the caller's library."""
        token = anyio.lowlevel.current_token()
        return cls(caller_library() or "asyncio", threading.get_ident(), token, library_clock())
