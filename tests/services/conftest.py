"""Three configurations for every test of a service, and a check that nothing is left of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from .rig import Rig, living_tasks, open_rig

CONFIGURATIONS = {
    "trio-anyio": ("trio", "anyio"),
    "trio-asyncio": ("trio", "asyncio"),
    "asyncio": ("asyncio", "anyio"),
}


@pytest.fixture(params=list(CONFIGURATIONS))
def configuration(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def anyio_backend(configuration: str) -> str:
    return CONFIGURATIONS[configuration][0]


@pytest.fixture
def flavour(configuration: str) -> Any:
    """The step flavour of the configuration."""
    return CONFIGURATIONS[configuration][1]


@pytest.fixture
async def nothing_left(anyio_backend: str) -> AsyncIterator[None]:
    """No task outlives the test (P6)."""
    before = living_tasks()
    yield
    left = {task for task in living_tasks() - before if "_call_in_runner_task" not in repr(task)}  # the plugin's own
    assert not left, f"left behind: {left}"


@pytest.fixture
async def rig(anyio_backend: str, flavour: Any, nothing_left: None) -> AsyncIterator[Rig]:
    """Store in memory, queue and control plane; `rig.serve(workflow)` puts services on it."""
    async with open_rig(flavour) as opened:
        yield opened


@pytest.fixture
async def file_rig(anyio_backend: str, flavour: Any, nothing_left: None, tmp_path: Any) -> AsyncIterator[Rig]:
    """The same on a store in a file, with its threads."""
    async with open_rig(flavour, f"sqlite:///{tmp_path}/corral.db") as opened:
        yield opened
