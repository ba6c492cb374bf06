"""How the programs of `deploy.py` begin: what they need may come up after them, and not everything is told them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Final, Protocol, TypeVar

import anyio
from pydantic import SecretStr, TypeAdapter

from .abc import MessageQueue
from .exceptions import SetupError, Unavailable
from .http_link import HttpLink
from .http_urls import is_loopback
from .protocol import calls
from .queues import open_queue
from .queues.http import HttpMessageQueue
from .queues.urls import credentials_of, with_credentials, without_credentials
from .settings import QueueSettings
from .supervision import Backoff, StopEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RETRY_DELAY: Final = 5.0
"""Seconds that a program waits at most before it looks again whether what it needs is up."""
REMINDER: Final = 60.0
"""Seconds after which the log says once more what is waited for."""

_QUEUE_INFO: Final = TypeAdapter(calls.QueueInfo)


class WorkersOptions(Protocol):
    """What says where a worker's queue is."""

    @property
    def token(self) -> SecretStr | None: ...

    @property
    def queue_url(self) -> str | None: ...

    @property
    def queue_credentials(self) -> QueueSettings: ...


async def try_patiently(attempt: Callable[[], Awaitable[T]], what: str, stop: StopEvent) -> T | None:
    """Try again and again while what is needed is away, without a limit: whoever runs the program sees in its log, and
    from `/ready`, that it waits. None: `stop` came first. Other errors than `Unavailable` come out."""
    backoff = Backoff(maximum=MAX_RETRY_DELAY)
    failures = 0
    silent_until = float("-inf")
    while not stop.is_set():
        try:
            return await attempt()
        except* Unavailable as group:
            away = group
        failures += 1
        if anyio.current_time() >= silent_until:
            silent_until = anyio.current_time() + REMINDER
            error = _first(away)
            logger.warning(
                "waiting for %s, trying again and again: %s%s", what, error, f" ({error.hint})" if error.hint else ""
            )
        with anyio.move_on_after(backoff.delay(failures)):
            await stop.wait()
    return None


async def enter_patiently(
    stack: AsyncExitStack, make: Callable[[], AbstractAsyncContextManager[T]], what: str, stop: StopEvent
) -> T | None:
    """Enter what `make` makes, a new one each time, until it can be entered. None: `stop` came first."""

    async def enter() -> T:
        return await stack.enter_async_context(make())

    return await try_patiently(enter, what, stop)


async def open_workers_queue(
    stack: AsyncExitStack, link: HttpLink, options: WorkersOptions, stop: StopEvent
) -> MessageQueue | None:
    """The queue of a worker: the one that its options name, or that the control plane names. None: `stop` came first.

    Raises:
        SetupError, UsageError: something must be changed before it can be used.
    """
    if options.queue_url is not None:
        # What is wrong with it is said at once, not when the control plane is there.
        open_queue(_workers_url(options.queue_url, options.queue_credentials), token=options.token)
    info = await try_patiently(partial(_ask_for_queue, link), "the control plane", stop)
    if info is None:
        return None
    if options.queue_url is None and info.url is None:
        logger.info("control plane: %s; queue: the same, over HTTP", link.url)
        return await stack.enter_async_context(HttpMessageQueue(link.urls, link=link))
    url = _workers_url(options.queue_url or info.url or "", options.queue_credentials)
    shown = without_credentials(url)
    logger.info("control plane: %s; queue: %s", link.url, shown)
    make = partial(open_queue, url, token=options.token, namespace=info.namespace)
    what = f"the queue {shown}"
    if options.queue_url is None and is_loopback(url) and not is_loopback(link.url):
        what += (
            ", which the control plane knows by a name of its own machine: if it is not here, give this worker --queue URL "
            "or CORRAL_QUEUE_URL"
        )
    return await enter_patiently(stack, make, what, stop)


async def _ask_for_queue(link: HttpLink) -> calls.QueueInfo:
    await link.ask("GET", "/ready", bytes)
    return await link.ask("GET", calls.QUEUE, _QUEUE_INFO.validate_json)


def _workers_url(url: str, credentials: QueueSettings) -> str:
    if url.partition(":")[0].lower() == "memory":
        raise SetupError(
            "A queue in memory is inside one process, and a worker is another one",
            hint="Leave --queue out: the control plane says where its queue is.",
        )
    return add_credentials(url, credentials.queue_user, credentials.queue_password)


def add_credentials(url: str, user: str | None, password: SecretStr | None) -> str:
    """A URL with the user and the password that it does not have itself. What has no host, and what takes a token, needs
    none.

    Raises:
        SetupError: it cannot be read.
    """
    scheme, _, rest = url.partition("://")
    if (user is None and password is None) or scheme.lower() in ("http", "https") or not rest.partition("/")[0]:
        return url
    own_user, own_password = credentials_of(url)
    if own_password is not None:
        return url
    return with_credentials(url, own_user or user, None if password is None else password.get_secret_value())


def _first(group: BaseExceptionGroup[Unavailable]) -> Unavailable:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Unavailable)
    return found
