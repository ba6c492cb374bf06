"""Several control planes of which any may be asked: which one it is now. Pure; moments are monotonic seconds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

FIRST_PAUSE: Final = 0.25
LONGEST_PAUSE: Final = 10.0
"""Seconds for which one that has failed is not asked again while there are others; doubling from the first."""


@dataclass(slots=True)
class _State:
    failures: int = 0
    paused_until: float = float("-inf")


class Targets:
    """Asks the same one until it fails, then the next that has not failed lately, and stays there.

    Where all have failed, it is the one whose pause ends first; a request that fails there too is for the others in their
    turn, each once. Whoever asks decides how long to wait then.

    Args:
        urls: Not empty, in the order in which they are tried.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)
        self._states = {url: _State() for url in self.urls}
        self.current = self.urls[0]

    def choose(self, now: float) -> str:
        """The one to ask now."""
        if self._states[self.current].paused_until > now:
            self.current = min(self._in_turn(), key=lambda url: max(now, self._states[url].paused_until))
        return self.current

    def choose_after(self, asked: Collection[str], now: float) -> str | None:
        """The one to ask where those have just failed one request; None where none is left. It may have failed lately:
        asking it costs a moment, and it may be the only one that is back."""
        left = [url for url in self._in_turn() if url not in asked]
        if not left:
            return None
        self.current = min(left, key=lambda url: max(now, self._states[url].paused_until))
        return self.current

    def answered(self, url: str) -> None:
        """It works."""
        self._states[url] = _State()

    def failed(self, url: str, now: float, *, stops: bool = False) -> None:
        """It did not answer, or cannot now. `stops`: it says that it goes, and need not be asked soon."""
        state = self._states[url]
        if state.paused_until > now and not stops:
            return  # requests that failed together have failed once
        state.failures += 1
        pause = LONGEST_PAUSE if stops else min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(state.failures - 1, 30))
        state.paused_until = now + pause

    def _in_turn(self) -> tuple[str, ...]:
        """All, from the current one on."""
        begin = self.urls.index(self.current)
        return (*self.urls[begin:], *self.urls[:begin])
