"""A control plane behind a real server on a free port, and an HTTP client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import trio

from llama_corral.control_plane.http import control_plane_app
from llama_corral.settings import ServerSettings
from llama_corral.web import WebApp, serve

from .corral import Corral, open_corral


class Web(Corral):
    """A corral with a server: `client` knows its address."""

    client: httpx.AsyncClient
    app: WebApp
    stop: trio.Event


@asynccontextmanager
async def open_web(queue_config: Any = None, **settings: Any) -> AsyncIterator[Web]:
    async with open_corral(**settings) as corral:
        server_settings = ServerSettings(port=0, graceful_timeout=5)
        app = control_plane_app(corral.plane, server_settings, version="0", queue_config=queue_config)
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            (url,) = await nursery.start(partial(serve, app, server_settings, stop=stop))
            async with httpx.AsyncClient(base_url=url, timeout=10) as client:
                web = Web(corral.store, corral.queue, corral.plane)
                web.client, web.app, web.stop = client, app, stop
                yield web
            nursery.cancel_scope.cancel()
