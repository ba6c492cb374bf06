"""The configurations of services, and a rig whose store and coordinators fail where a test says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.stores import SqlStore
from llama_corral.supervision import Backoff
from llama_corral.testing import FaultyStore

from ..services.conftest import anyio_backend as anyio_backend
from ..services.conftest import configuration as configuration
from ..services.conftest import flavour as flavour
from ..services.conftest import nothing_left as nothing_left
from ..services.rig import Rig


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again asks soon."""
    monkeypatch.setattr(Backoff, "delay", lambda self, failures: 0.001)


@pytest.fixture
async def rig(anyio_backend: str, flavour: Any, nothing_left: None, short_pauses: None) -> AsyncIterator[Rig]:
    """`rig.store` is a `FaultyStore`."""
    config = ControlPlaneConfig(topic_namespace="test", heartbeat_interval=0.1, lease=0.3, backstop_interval=0.1)
    async with FaultyStore(SqlStore("sqlite://")) as store, MemoryMessageQueue() as queue:
        async with ControlPlane(store, queue, config=config, alone=True) as plane:
            async with anyio.create_task_group() as tasks:
                opened = Rig(store, queue, plane, tasks, flavour)
                yield opened
                tasks.cancel_scope.cancel()
    for crash in opened.crashes:
        raise crash
