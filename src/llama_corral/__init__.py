"""llama-corral: run llama-index workflows as services under structured concurrency, on AnyIO and Trio.

The map, in the order in which data flows (imports point down the list in CONTRIBUTING.md and never up):

    protocol/       what travels: messages, records, the life of a task; pure
    client/         asks: the HTTP client, async and sync
    control_plane/  decides: sessions, tasks, claims; the HTTP routes
    queues/         carries: tickets and wake-ups
    services/       works: a workflow behind a queue and a cap
    runtime/        runs: one workflow run inside one task group
    events/         returns: event logs to any number of readers
    stores/         remembers: the truth, in a database
    remote/         a workflow that runs as another service

What is imported from here is loaded when it is first used, so that a client does not pay for the workflow libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .client import Client as Client
    from .client import SyncClient as SyncClient
    from .control_plane import ControlPlane as ControlPlane
    from .control_plane import ControlPlaneConfig as ControlPlaneConfig
    from .deploy import Core as Core
    from .deploy import Deployment as Deployment
    from .deploy import DeployOptions as DeployOptions
    from .deploy import ServiceOptions as ServiceOptions
    from .deploy import Worker as Worker
    from .deploy import WorkerOptions as WorkerOptions
    from .deploy import deploy_all as deploy_all
    from .deploy import deploy_core as deploy_core
    from .deploy import deploy_worker as deploy_worker
    from .deploy import deploy_workflow as deploy_workflow
    from .deploy import open_core as open_core
    from .exceptions import CorralError as CorralError
    from .queues import MemoryMessageQueue as MemoryMessageQueue
    from .remote import RemoteEvent as RemoteEvent
    from .remote import RemoteWorkflow as RemoteWorkflow
    from .runtime import Run as Run
    from .runtime import StructuredRuntime as StructuredRuntime
    from .runtime import open_run as open_run
    from .runtime import run_workflow as run_workflow
    from .services import BaseService as BaseService
    from .services import WorkflowService as WorkflowService
    from .services import WorkflowServiceConfig as WorkflowServiceConfig
    from .stores import SqlStore as SqlStore

_HOME = {
    "Client": "client",
    "ControlPlane": "control_plane",
    "ControlPlaneConfig": "control_plane",
    "Core": "deploy",
    "CorralError": "exceptions",
    "DeployOptions": "deploy",
    "Deployment": "deploy",
    "MemoryMessageQueue": "queues",
    "BaseService": "services",
    "RemoteEvent": "remote",
    "RemoteWorkflow": "remote",
    "Run": "runtime",
    "ServiceOptions": "deploy",
    "SqlStore": "stores",
    "StructuredRuntime": "runtime",
    "SyncClient": "client",
    "Worker": "deploy",
    "WorkerOptions": "deploy",
    "WorkflowService": "services",
    "WorkflowServiceConfig": "services",
    "deploy_all": "deploy",
    "deploy_core": "deploy",
    "deploy_worker": "deploy",
    "deploy_workflow": "deploy",
    "open_core": "deploy",
    "open_run": "runtime",
    "run_workflow": "runtime",
}

__all__ = ("__version__", *_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
