"""The commands in this process, against the corral of the client's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from llama_corral.cli.app import run
from llama_corral.client import SyncClient

from ..client.conftest import locked_url as locked_url
from ..client.conftest import trio_thread as trio_thread
from ..client.conftest import url as url


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Each line as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def corral(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command in this process."""

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        code = run(arguments)
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def client(url: str) -> Any:
    with SyncClient(url, backend="asyncio") as client:
        yield client


@pytest.fixture
def server(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The corral, where commands look for it."""
    monkeypatch.setenv("CORRAL_URL", url)
    return url
