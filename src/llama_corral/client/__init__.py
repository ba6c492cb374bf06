"""ASKS: the client of a control plane, on Trio and on asyncio, and a synchronous face of it.

    async with Client("http://127.0.0.1:8000") as client:
        print(await client.run("hello", name="Ada"))

* `api.py`: `Client`; `services.py`, `sessions.py`, `tasks.py` what hangs on it; `sync.py` `SyncClient`.
* `http.py`: one connection pool, what is repeated and when; `errors.py` answers as exceptions; `urls.py`.
* `events.py`, `sse.py`: event streams that go on after a dropped connection; `outgoing.py` what is sent.

Names are loaded when they are first used: the command line uses `errors.py` alone, without an HTTP library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Client as Client
    from .events import TaskEvent as TaskEvent
    from .events import TaskEvents as TaskEvents
    from .services import Service as Service
    from .sessions import Session as Session
    from .sync import SyncClient as SyncClient
    from .sync import SyncSession as SyncSession
    from .sync import SyncTask as SyncTask
    from .tasks import Task as Task
    from .tasks import TaskInfo as TaskInfo

_HOMES = {
    "Client": "api",
    "Service": "services",
    "Session": "sessions",
    "SyncClient": "sync",
    "SyncSession": "sync",
    "SyncTask": "sync",
    "Task": "tasks",
    "TaskEvent": "events",
    "TaskEvents": "events",
    "TaskInfo": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
