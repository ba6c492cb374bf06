"""A Redis server of a test's own."""

from __future__ import annotations

import re

from .base import ServerProcess


class RedisServer(ServerProcess):
    """Keeps what it got over a restart (append-only file, every write)."""

    program = "redis-server"
    ready = re.compile(r"Ready to accept connections")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        return [
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        ]
