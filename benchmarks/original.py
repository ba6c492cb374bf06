"""llama_deploy 0.6.1 as its documentation starts it. Executed in the original's environment: no import of ours.

    python original.py core CONTROL_PLANE_PORT QUEUE_PORT
    python original.py service WORKFLOW_FILE:ATTRIBUTE NAME CONTROL_PLANE_PORT PORT

The core is one process with the control plane and the simple message queue. Both print `original ready at URL` when they
have begun to consume, which is the last thing that they do at the start.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import Any

import uvicorn
from llama_deploy import (
    ControlPlaneConfig,
    SimpleMessageQueueConfig,
    WorkflowServiceConfig,
    deploy_core,
    deploy_workflow,
)
from llama_deploy.message_queues.simple import SimpleMessageQueue


def load(target: str) -> Any:
    path, _, attribute = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("served_workflow", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["served_workflow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, attribute)


def announce(port: int) -> None:
    register = SimpleMessageQueue.register_consumer

    async def registering(self: SimpleMessageQueue, *args: Any, **kwargs: Any) -> Any:
        consume = await register(self, *args, **kwargs)
        print(f"original ready at http://127.0.0.1:{port}", flush=True)
        return consume

    SimpleMessageQueue.register_consumer = registering  # type: ignore[method-assign]


def main(role: str, *arguments: str) -> None:
    # Neither side writes a line a request.
    uvicorn.config.LOGGING_CONFIG["loggers"]["uvicorn.access"]["level"] = "WARNING"
    if role == "core":
        port, queue_port = map(int, arguments)
        announce(port)
        asyncio.run(deploy_core(ControlPlaneConfig(port=port), SimpleMessageQueueConfig(port=queue_port)))
        return
    target, name, control_plane_port, port = arguments
    announce(int(port))
    config = WorkflowServiceConfig(host="127.0.0.1", port=int(port), service_name=name)
    plane = ControlPlaneConfig(port=int(control_plane_port))
    asyncio.run(deploy_workflow(load(target), config, plane))


if __name__ == "__main__":
    main(*sys.argv[1:])
