"""The routes of the control plane: `services.py`, `sessions.py`, `tasks.py` those of the original; `run.py` ours
for clients, `instances.py` and `queue.py` for workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...settings import ServerSettings
from ...web import WebApp
from ..plane import ControlPlane
from .instances import InstanceRoutes
from .queue import QueueRoutes
from .run import RunRoutes
from .services import ServiceRoutes
from .sessions import SessionRoutes
from .surroundings import Surroundings
from .tasks import TaskRoutes


def control_plane_app(plane: ControlPlane, settings: ServerSettings, *, version: str, **options: Any) -> WebApp:
    """The application of a control plane that is open, ready to be served. The options are those of `mount`."""
    app = WebApp(settings, title="llama-corral control plane", version=version)
    mount(app, plane, **options)
    return app


def mount(
    app: WebApp,
    plane: ControlPlane,
    *,
    queue_config: Mapping[str, Any] | None = None,
    queue_url: str = "memory://",
    store_url: str | None = None,
) -> None:
    """Give an app all routes of a control plane that is open, and drain it when the app drains.

    Args:
        queue_config: What `GET /queue_config` answers: `{class name: settings}`, as the original has it. Credentials are
            taken out here. If not given, the simple queue of this server, at the address that the request came to, and
            behind it the queue that it is a bridge to.
        queue_url: Of the plane's queue. Workers are told, without its credentials; where it is in this process, they are
            told to use it over HTTP.
        store_url: Of the plane's store. Its scheme is told.
    """
    surroundings = Surroundings.of(queue_url, store_url)
    queue = QueueRoutes(plane, surroundings)
    groups = (
        ServiceRoutes(plane, queue_config, surroundings),
        SessionRoutes(plane),
        TaskRoutes(plane),
        RunRoutes(plane),
        InstanceRoutes(plane, surroundings),
        queue,
    )
    for group in groups:
        for routes in group.routes():
            app.include(routes)
    app.add_component("control plane", lambda: not plane.draining)
    plane.start_helper(queue.leased.run, name="clients of the queue")
    plane.drain_on(app.drain)
