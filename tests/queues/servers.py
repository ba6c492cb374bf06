"""Servers that tests need: the one of this machine, and servers of their own. Tests skip themselves where there is none."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from llama_corral.queues.urls import without_credentials
from llama_corral.supervision import SupportGroup, open_support_group
from llama_corral.testing.servers import ServerMissingError, ServerProcess

S = TypeVar("S", bound=ServerProcess)


def shared_url(what: str, variable: str, default: str) -> str:
    """The URL of the server that all tests share: `shared_url("Redis", "CORRAL_TEST_REDIS_URL", "redis://127.0.0.1:6379")`.
    Skips the test where nobody listens."""
    url = os.environ.get(variable, default)
    parts, usual = urlsplit(url), urlsplit(default)
    try:
        with socket.create_connection((parts.hostname or "localhost", parts.port or usual.port or 0), timeout=5):
            return url
    except OSError:
        pytest.skip(f"no {what} at {urlsplit(without_credentials(url)).netloc}: set {variable}")


@asynccontextmanager
async def own_server(make: Callable[..., S], variable: str, **options: Any) -> AsyncIterator[S]:
    """A server of the test's own, started: `own_server(RedisServer, "CORRAL_TEST_REDIS_URL")`. Its data goes with it."""
    with tempfile.TemporaryDirectory(prefix="corral-", ignore_cleanup_errors=True) as folder:
        async with open_support_group() as group:
            server = _make(make, group, Path(folder), variable, options)
            await server.start()
            yield server


def _make(make: Callable[..., S], group: SupportGroup, folder: Path, variable: str, options: dict[str, Any]) -> S:
    try:
        return make(group, folder, **options)
    except ServerMissingError as error:
        pytest.skip(f"{error}: install it beside the server of {variable}")
