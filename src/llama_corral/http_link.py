"""Kept-alive connections to the control plane, or to several on one store, for the services and the queue of one process.

What goes wrong comes out in the families of `exceptions`. Nothing is repeated here: callers know what may be done twice
and how long they can wait. No message, field or `repr` ever holds the token.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import anyio
import httpx
from pydantic import SecretStr

from .exceptions import CorralError, Draining, TooLarge, TooManyTasks, Unauthorized, Unavailable
from .http_answers import from_answer, no_answer
from .http_targets import Targets
from .http_urls import authorization, check_urls, is_loopback

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT: Final = 30.0
"""Seconds that one request may take, beside what the server is asked to wait."""
CONNECT_TIMEOUT: Final = 5.0
KEEP_ALIVE: Final = 20.0
"""Seconds that an idle connection is kept: less than the server keeps it, so that requests do not meet its end."""
CLOSING_TIME: Final = 2.0

_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)


class _Body(httpx.AsyncByteStream):
    """A request's body in one piece. httpx's own is a generator, which a cancelled request leaves to the garbage collector,
    of which Trio warns."""

    def __init__(self, content: bytes) -> None:
        self._left: list[bytes] = [content]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class _Target:
    """One control plane, and the connections to it."""

    def __init__(self, url: str, headers: dict[bytes, bytes], verify: ssl.SSLContext | bool) -> None:
        self.url = url
        self.met = False
        self.client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            # Every request has a caller who waits for it; a limit here would let long polls block everything else.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=KEEP_ALIVE),
            # Loading the certificates of the system takes longer than most requests.
            verify=verify if url.startswith("https:") else False,
            # What is on this machine is never behind a proxy, whatever the environment says.
            trust_env=not is_loopback(url),
        )

    async def ask(self, request: httpx.Request, read: Callable[[bytes], T], seconds: float) -> T:
        try:
            response = await self._send(request, seconds)
            if response.status_code >= 300:
                raise self._refusal(response)
            found = read(response.content)
        except ValueError as error:
            raise self._not_ours(request.url.path) from error
        self.met = True
        return found

    async def _send(self, request: httpx.Request, seconds: float) -> httpx.Response:
        try:
            with anyio.fail_after(seconds):
                return await self.client.send(request)
        except TimeoutError as error:
            raise no_answer(self.url, f"none within {seconds:g} s", sent=True) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise no_answer(self.url, reason, sent=not isinstance(error, _NOT_SENT)) from error

    def _refusal(self, response: httpx.Response) -> CorralError:
        error = from_answer(response.status_code, response.content, response.headers, self.url)
        foreign = error.fields["code"] is None
        if isinstance(error, Unavailable):
            return error
        # A proxy that lost its server may answer anything; at the first contact it is a wrong URL.
        lost = foreign and self.met and not isinstance(error, (Unauthorized, TooLarge))
        self.met = self.met or not foreign
        if response.status_code >= 500 or response.status_code in (408, 429) or lost:
            return Unavailable(error.message, hint=error.hint, **error.fields)
        return error

    def _not_ours(self, path: str) -> CorralError:
        kind = Unavailable if self.met else CorralError
        message = f"{self.url} does not answer {path} as a control plane does"
        return kind(message, hint="Check that the URL is right.", url=self.url)


class HttpLink:
    """Requests to a control plane: `async with HttpLink(url, token) as link: await link.ask("GET", "/", json.loads)`.

    Of several control planes on one store the first one that answers is asked, until it fails or says that it stops; then
    the next one. Works on Trio and on asyncio. Leaving the block closes the connections; requests in flight belong to
    their callers, who end them before.

    Args:
        url: Of the control plane, without user and password; or several, in a sequence or with commas in between.
        token: Bearer token, sent with every request and never shown.
        timeout: Seconds that a request may take as a whole.
        verify: TLS certificates: as in httpx.

    Raises:
        BadInput: the URL or the token cannot be used.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token: str | SecretStr | None = None,
        *,
        timeout: float = TIMEOUT,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.urls = check_urls(url)
        self._timeout = timeout
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        headers = {b"Authorization": authorization(secret)} if secret else {}
        self._targets = {each: _Target(each, headers, verify) for each in self.urls}
        self._choice = Targets(self.urls)
        self._answered = ""
        self._trouble: Unavailable | None = None
        self._requests = self._failed = 0

    @property
    def url(self) -> str:
        """The control plane that was asked last."""
        return self._choice.current

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.move_on_after(CLOSING_TIME, shield=True):
            for target in self._targets.values():
                await target.client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], T],
        *,
        body: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        wait: float = 0.0,
        timeout: float | None = None,
        away: type[Unavailable] = Unavailable,
        at: str | None = None,
        on_answer: Callable[[str], None] | None = None,
    ) -> T:
        """What `read` makes of the body of the answer.

        With several control planes, what one has not done is asked of the next one. What one may have done is not
        repeated here; the next call asks another one.

        Args:
            read: Raises ValueError for what is no answer of a control plane.
            body: JSON.
            wait: Seconds for which the server is asked to hold the answer back (a long poll), beside the timeout.
            timeout: Seconds for this request, where they are less than the link's.
            away: The kind of `Unavailable` to raise.
            at: Ask this one of the URLs and no other.
            on_answer: Called with the URL that has answered.

        Raises:
            Unavailable: nothing came back in time, or the server answered that it cannot (408, 429, 5xx). Field `sent` is
                False if nothing of the request was done.
            CorralError: what else the server answered (Unauthorized, NotFound, Conflict, TooLarge, BadInput, ...), or
                something that is no control plane.
        """
        seconds = (self._timeout if timeout is None else min(timeout, self._timeout)) + wait
        asked: set[str] = set()
        url = self._choice.choose(anyio.current_time()) if at is None else at
        while True:
            asked.add(url)
            target = self._targets[url]
            self._requests += 1
            try:
                found = await target.ask(_request(target.client, method, path, body, params), read, seconds)
            except CorralError as error:
                self._failed += 1
                if isinstance(error, Unavailable):
                    self._note(url, error)
                    undone = not error.fields.get("sent", True) and not isinstance(error, TooManyTasks)
                    if undone and at is None and (other := self._choice.choose_after(asked, anyio.current_time())):
                        url = other
                        continue
                    if not isinstance(error, away):
                        raise away(error.message, hint=error.hint, **error.fields) from error
                raise
            self._note_answer(url, at)
            if on_answer is not None:
                on_answer(url)
            return found

    def avoid(self, url: str) -> None:
        """A control plane has said that it stops: ask others, if there are any."""
        self._choice.failed(url, anyio.current_time(), stops=True)

    def _note(self, url: str, error: Unavailable) -> None:
        if not isinstance(error, TooManyTasks):
            self._choice.failed(url, anyio.current_time(), stops=isinstance(error, Draining))
            self._trouble = error

    def _note_answer(self, url: str, at: str | None) -> None:
        self._choice.answered(url)
        # What was asked before of one that is not asked any more may be answered late.
        if at is None and url == self._choice.current != self._answered:
            if self._answered:
                logger.warning("asking %s from now on: %s", url, self._trouble or f"{self._answered} stops")
            self._answered = url
            self._trouble = None

    def statistics(self) -> Mapping[str, int]:
        """How many requests were sent, and how many of them failed."""
        return {"requests": self._requests, "failed": self._failed}


def _request(
    client: httpx.AsyncClient, method: str, path: str, body: bytes | None, params: Mapping[str, Any] | None
) -> httpx.Request:
    headers = None if body is None else {"Content-Type": "application/json"}
    request = client.build_request(method, path, params=params, content=body, headers=headers)
    if body is not None:
        request.stream = _Body(body)
    return request
