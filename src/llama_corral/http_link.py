"""One pool of kept-alive connections to a control plane, for the services and the queue of one process.

What goes wrong comes out in the families of `exceptions`. Nothing is repeated here: callers know what may be done twice
and how long they can wait. No message, field or `repr` ever holds the token.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, TypeVar

import anyio
import httpx
from pydantic import SecretStr

from .exceptions import CorralError, TooLarge, Unauthorized, Unavailable
from .http_answers import from_answer, no_answer
from .http_urls import authorization, check_url, is_loopback

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


class HttpLink:
    """Requests to one control plane: `async with HttpLink(url, token) as link: await link.ask("GET", "/", json.loads)`.

    Works on Trio and on asyncio. Leaving the block closes the connections; requests in flight belong to their callers,
    who end them before.

    Args:
        url: Of the control plane, without user and password.
        token: Bearer token, sent with every request and never shown.
        timeout: Seconds that a request may take as a whole.
        verify: TLS certificates: as in httpx.

    Raises:
        BadInput: the URL or the token cannot be used.
    """

    def __init__(
        self,
        url: str,
        token: str | SecretStr | None = None,
        *,
        timeout: float = TIMEOUT,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.url = check_url(url)
        self._timeout = timeout
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={b"Authorization": authorization(secret)} if secret else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            # Every request has a caller who waits for it; a limit here would let long polls block everything else.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=KEEP_ALIVE),
            # Loading the certificates of the system takes longer than most requests.
            verify=verify if self.url.startswith("https:") else False,
            # What is on this machine is never behind a proxy, whatever the environment says.
            trust_env=not is_loopback(self.url),
        )
        self._met = False
        self._requests = self._failed = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.move_on_after(CLOSING_TIME, shield=True):
            await self._client.aclose()

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
    ) -> T:
        """What `read` makes of the body of the answer.

        Args:
            read: Raises ValueError for what is no answer of a control plane.
            body: JSON.
            wait: Seconds for which the server is asked to hold the answer back (a long poll), beside the timeout.
            timeout: Seconds for this request, where they are less than the link's.
            away: The kind of `Unavailable` to raise.

        Raises:
            Unavailable: nothing came back in time, or the server answered that it cannot (408, 429, 5xx). Field `sent` is
                False if nothing of the request was done.
            CorralError: what else the server answered (Unauthorized, NotFound, Conflict, TooLarge, BadInput, ...), or
                something that is no control plane.
        """
        self._requests += 1
        request = self._client.build_request(
            method,
            path,
            params=params,
            content=body,
            headers=None if body is None else {"Content-Type": "application/json"},
        )
        if body is not None:
            request.stream = _Body(body)
        try:
            response = await self._send(
                request, (self._timeout if timeout is None else min(timeout, self._timeout)) + wait
            )
            if response.status_code >= 300:
                raise self._refusal(response)
            found = read(response.content)
        except ValueError as error:
            self._failed += 1
            raise self._not_ours(path, away) from error
        except CorralError as error:
            self._failed += 1
            if isinstance(error, Unavailable) and not isinstance(error, away):
                raise away(error.message, hint=error.hint, **error.fields) from error
            raise
        self._met = True
        return found

    async def _send(self, request: httpx.Request, seconds: float) -> httpx.Response:
        try:
            with anyio.fail_after(seconds):
                return await self._client.send(request)
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
        lost = foreign and self._met and not isinstance(error, (Unauthorized, TooLarge))
        self._met = self._met or not foreign
        if response.status_code >= 500 or response.status_code in (408, 429) or lost:
            return Unavailable(error.message, hint=error.hint, **error.fields)
        return error

    def _not_ours(self, path: str, away: type[Unavailable]) -> CorralError:
        kind = away if self._met else CorralError
        message = f"{self.url} does not answer {path} as a control plane does"
        return kind(message, hint="Check that the URL is right.", url=self.url)

    def statistics(self) -> Mapping[str, int]:
        """How many requests were sent, and how many of them failed."""
        return {"requests": self._requests, "failed": self._failed}
