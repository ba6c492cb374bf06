"""What a control plane works with, as far as others may know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ...queues.urls import without_credentials


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`queue_url`: of a queue that is in no process of ours, without credentials. `queue`, `store`: what they are, as the
    schemes of their URLs say it."""

    queue_url: str | None = None
    queue: str = "memory"
    store: str | None = None

    @classmethod
    def of(cls, queue_url: str, store_url: str | None) -> Self:
        queue = _kind(queue_url)
        shown = None if queue == "memory" else without_credentials(queue_url)
        return cls(shown, queue, None if store_url is None else _kind(store_url))


def _kind(url: str) -> str:
    return url.partition(":")[0].partition("+")[0].lower()
