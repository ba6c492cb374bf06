"""Three configurations for every test of the runtime, and a check that nothing is left of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..moments import living_tasks

pytest.register_assert_rewrite("tests.runtime.compare")

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
def flavour(configuration: str) -> str:
    """The step flavour of the configuration: pass it to `open_run` and `run_workflow`."""
    return CONFIGURATIONS[configuration][1]


@pytest.fixture
def tasks() -> Any:
    return living_tasks


@pytest.fixture
async def nothing_left(anyio_backend: str) -> AsyncIterator[None]:
    """No task outlives the test (P6)."""
    before = living_tasks()
    yield
    left = {task for task in living_tasks() - before if "_call_in_runner_task" not in repr(task)}  # the plugin's own
    assert not left, f"left behind: {left}"


@pytest.fixture(params=["copied", "in-place"])
def kept(request: pytest.FixtureRequest) -> Any:
    """How the state of a recording is kept: as upstream's runner does, and as ours does."""
    # Here, and not above: with a name of upstream gone the runtime cannot be imported, and test_upstream.py says which.
    from llama_corral.runtime.live_state import live

    return live if request.param == "in-place" else lambda state: state


@pytest.fixture
def chain(kept: Any) -> Any:
    """A recording of a run whose first step is working; a second one follows."""
    from .recorded import Chain, Recorded

    return Recorded(Chain(), kept).begin()
