"""Runs llama-agents-server with a workflow from a file. Executed in the peer's environment: no import of ours.

python peer_server.py WORKFLOW_FILE:ATTRIBUTE NAME [SQLITE_FILE]
"""

from __future__ import annotations

import importlib.util
import socket
import sys
from typing import Any

import uvicorn
from llama_agents.server import SqliteWorkflowStore, WorkflowServer


def load(target: str) -> Any:
    path, _, attribute = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("served_workflow", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["served_workflow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, attribute)


def main(target: str, name: str, sqlite_file: str | None = None) -> None:
    store = SqliteWorkflowStore(sqlite_file) if sqlite_file else None
    server = WorkflowServer(workflow_store=store)
    server.add_workflow(name, load(target))
    # asyncio switches Nagle's algorithm off only where the protocol is named; it would cost the peer 40 ms a request.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    print(f"peer ready at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    # Without an access log and its level: neither side writes a line a request.
    config = uvicorn.Config(server.app, access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
