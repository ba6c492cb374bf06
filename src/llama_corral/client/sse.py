"""Server-sent events as they come off the wire. Pure: bytes in, frames out.

Lines end with LF or CRLF; a lone CR, which the standard allows too, is not used by any server of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..exceptions import TooLarge

MAX_FRAME: Final = 64_000_000
"""Bytes of one frame. Events are smaller than the server's body limit; this bounds what a broken server can make us keep."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`id` is None where the frame has none: the parser does not remember the last one."""

    event: str
    data: str
    id: str | None = None


class SseParser:
    """Feed it what arrives, in pieces of any size; it gives the frames that are complete."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._size = 0
        self._event = ""
        self._id: str | None = None
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Frame]:
        """Raises `TooLarge` for a frame that does not end."""
        self._size += len(chunk)
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            self._rest.append(chunk)
            self._check()
            return []
        self._rest.append(head)
        lines = b"".join(self._rest).split(b"\n")
        self._rest = [tail]
        frames = [frame for line in lines if (frame := self._line(line.removesuffix(b"\r"))) is not None]
        if not any(self._data):
            self._size = len(tail)
        self._check()
        return frames

    def _check(self) -> None:
        if self._size > MAX_FRAME:
            raise TooLarge(f"a server-sent event is larger than {MAX_FRAME} bytes")

    def _line(self, line: bytes) -> Frame | None:
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            self._id = value
        return None

    def _dispatch(self) -> Frame | None:
        frame = Frame(self._event or "message", "\n".join(self._data), self._id) if self._data else None
        self._event, self._id, self._data = "", None, []
        return frame
