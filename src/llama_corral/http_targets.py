"""Several control planes of which any may be asked: which one it is now. Pure; moments are monotonic seconds."""

from __future__ import annotations

from collections.abc import Sequence
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

    Where all have failed, it is the one whose pause ends first: whoever asks decides how long to wait.

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
            begin = self.urls.index(self.current)
            in_turn = (*self.urls[begin:], *self.urls[:begin])
            self.current = min(in_turn, key=lambda url: max(now, self._states[url].paused_until))
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
