"""The connections to a control plane, or to several on one store, and what is repeated when.

A request is repeated, for `retry_for` seconds at most, if that is safe: it was not sent, or the server said that nothing
of it was done, or doing it twice is doing it once (`repeatable`). Only a server that has answered this client before is
waited for: the first request to a wrong URL fails at once. Of several servers the next one is asked without waiting. A
server that is full is asked `FULL_ATTEMPTS` times at most, and only for what is repeatable: everybody repeating everything
would keep it full.
"""

from __future__ import annotations

import json
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

import anyio
import httpx
from pydantic import SecretStr

from ..exceptions import CorralError, Draining, TooManyTasks, Unavailable
from ..http_answers import from_answer, no_answer, not_ours
from ..http_targets import Targets
from ..http_urls import authorization, check_urls, is_loopback

T = TypeVar("T")

STREAM_SILENCE: Final = 45.0
"""Seconds of silence after which a stream's connection counts as dead: three heartbeats of the server."""
FIRST_DELAY: Final = 0.05
LONGEST_DELAY: Final = 5.0
FULL_ATTEMPTS: Final = 4

_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


def delay_of(failures: int, error: Unavailable | None = None) -> float:
    """Seconds to wait after this many failures in a row, or longer if the server said so."""
    own = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 1, 30))
    told = error.fields.get("retry_after", 0.0) if error is not None else 0.0
    return max(own, min(float(told), LONGEST_DELAY))


class Http:
    """Requests to a control plane; to one of several, until it fails. `aclose` closes the connections and every stream that
    was left open."""

    def __init__(
        self,
        url: str | Sequence[str],
        token: str | SecretStr | None,
        timeout: float,
        retry_for: float,
        verify: ssl.SSLContext | bool,
    ) -> None:
        self._choice = Targets(check_urls(url))
        self.timeout = timeout
        self.retry_for = retry_for
        self.answered = False
        self._abandoned: deque[StreamBody] = deque()
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        self._clients = {
            each: httpx.AsyncClient(
                base_url=each,
                headers={b"Authorization": authorization(secret)} if secret else {},
                timeout=timeout,
                # Each connection belongs to a caller; a limit here would let open streams block everything else.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
                # Loading the certificates of the system takes longer than most requests.
                verify=verify if each.startswith("https:") else False,
                # What is on this machine is never behind a proxy, whatever the environment says.
                trust_env=not is_loopback(each),
            )
            for each in self._choice.urls
        }

    @property
    def url(self) -> str:
        """The control plane that was asked last."""
        return self._choice.current

    async def aclose(self) -> None:
        await self.close_abandoned()
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            for client in self._clients.values():
                await client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        repeatable: bool | None = None,
        wait: float = 0.0,
    ) -> Any:
        """The JSON of the answer.

        Args:
            repeatable: Doing it twice is doing it once. None: so it is for GET and PUT.
            wait: Seconds for which the server is asked to hold the answer back, beside the usual timeout.

        Raises:
            CorralError: what the server answered; `Unavailable` if nothing came back.
        """
        response = await self.response(method, path, params=params, body=body, repeatable=repeatable, wait=wait)
        try:
            return response.json()
        except ValueError as error:
            raise not_ours(self.url, "its answer is no JSON") from error

    async def response(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        repeatable: bool | None = None,
        wait: float = 0.0,
    ) -> httpx.Response:
        """As `request`, for who needs the headers too."""
        await self.close_abandoned()
        twice = method in ("GET", "PUT") if repeatable is None else repeatable
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = {
            "method": method,
            "url": path,
            "params": {name: value for name, value in (params or {}).items() if value is not None},
            "content": content,
            "headers": {"Content-Type": "application/json"} if content is not None else {},
            "timeout": httpx.Timeout(self.timeout, read=self.timeout + wait),
        }
        give_up = anyio.current_time() + self.retry_for
        for failures in count(1):
            try:
                return await self._anywhere(partial(self._once, request), twice)
            except Unavailable as error:
                delay = delay_of(failures, error)
                if not self._may_repeat(error, twice, failures) or anyio.current_time() + delay > give_up:
                    raise
                await anyio.sleep(delay)
        raise AssertionError("unreachable")

    def _may_repeat(self, error: Unavailable, twice: bool, failures: int) -> bool:
        if isinstance(error, TooManyTasks):
            return twice and failures < FULL_ATTEMPTS
        return self.answered and (twice or not error.fields.get("sent", True))

    async def _anywhere(self, ask: Callable[[str], Awaitable[T]], twice: bool) -> T:
        """Ask one control plane after the other until one answers, as long as that is safe."""
        asked: set[str] = set()
        url = self._choice.choose(anyio.current_time())
        while True:
            asked.add(url)
            try:
                found = await ask(url)
            except Unavailable as error:
                self.note(url, error)
                elsewhere = not isinstance(error, TooManyTasks) and (twice or not error.fields.get("sent", True))
                other = self._choice.choose_after(asked, anyio.current_time()) if elsewhere else None
                if other is None:
                    raise
                url = other
            else:
                self._choice.answered(url)
                return found

    def note(self, url: str, error: Unavailable) -> None:
        """One could not answer, or a stream of it was cut: the next request is for another one, if there is any."""
        if not isinstance(error, TooManyTasks):
            self._choice.failed(url, anyio.current_time(), stops=isinstance(error, Draining))

    async def _once(self, request: Mapping[str, Any], url: str) -> httpx.Response:
        known = self.answered
        response = await self._send(request, url)
        if response.status_code >= 300:
            raise _refusal(response, url, known)
        return response

    async def _send(self, request: Mapping[str, Any], url: str, *, stream: bool = False) -> httpx.Response:
        client = self._clients[url]
        try:
            response = await client.send(client.build_request(**request), stream=stream)
        except httpx.HTTPError as error:
            raise _lost(error, url) from error
        self.answered = True
        return response

    # Streams

    async def open_stream(self, path: str, *, params: Mapping[str, Any], headers: Mapping[str, str]) -> StreamBody:
        """An answer whose body is still to be read. Not repeated here: the reader knows where to go on.

        Resource handling: the caller closes it, or hands it to `abandon`.
        """
        await self.close_abandoned()
        request = {
            "method": "GET",
            "url": path,
            "params": params,
            "headers": {"Accept": "text/event-stream", "Accept-Encoding": "identity", **headers},
            "timeout": httpx.Timeout(self.timeout, read=STREAM_SILENCE),
        }
        return await self._anywhere(partial(self._open, request), twice=True)

    async def _open(self, request: Mapping[str, Any], url: str) -> StreamBody:
        known = self.answered
        response = await self._send(request, url, stream=True)
        if response.status_code < 300:
            return StreamBody(response, url)
        try:
            await response.aread()
        except httpx.HTTPError as error:
            raise _lost(error, url) from error
        raise _refusal(response, url, known)

    def abandon(self, body: StreamBody) -> None:
        """For a reader that is collected and cannot await: the body is closed with the next request."""
        self._abandoned.append(body)

    async def close_abandoned(self) -> None:
        while self._abandoned:
            await self._abandoned.popleft().aclose()


def _lost(error: httpx.HTTPError | httpx.StreamError, url: str) -> Unavailable:
    """A failure of the connection as one of ours."""
    reason = str(error) or ("timed out" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
    return no_answer(url, reason, sent=not isinstance(error, _NOT_SENT))


def _refusal(response: httpx.Response, url: str, known: bool) -> CorralError:
    error = from_answer(response.status_code, response.content, response.headers, url)
    if known and response.status_code >= 500 and error.fields["code"] is None and not isinstance(error, Unavailable):
        # Of a server that is being ended, or of a proxy that has lost it; the first answer of all may be of a wrong URL.
        return Unavailable(error.message, hint=error.hint, **error.fields)
    return error


class StreamBody:
    """The body of an answer, piece by piece. `url` is that of its server."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        self.url = url
        self._response = response
        self._chunks = response.aiter_bytes()

    async def receive(self) -> bytes | None:
        """The next piece; None at the end of a complete body. `Unavailable` if the connection failed."""
        try:
            return await anext(self._chunks, None)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _lost(error, self.url) from error

    async def aclose(self) -> None:
        """Close the connection, unless the body was read to its end.

        The generators that httpx nests are ended by a cancelled read, which unwinds all of them; closing the outermost
        one would leave the others to the garbage collector, of which Trio warns.
        """
        with anyio.CancelScope(shield=True) as scope:
            scope.cancel()
            try:
                while await anext(self._chunks, None) is not None:
                    pass
            except (httpx.HTTPError, httpx.StreamError):
                pass
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await self._response.aclose()


class Patience:
    """How long to go on after connections that failed, counted from the last progress.

    Args:
        seconds: The limit.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = 0
        self._give_up = math.inf

    def progress(self) -> None:
        self._failures = 0
        self._give_up = math.inf

    async def pause(self, error: Unavailable) -> None:
        """Wait before the next attempt; raise `error` if there was no progress for too long."""
        now = anyio.current_time()
        self._failures += 1
        self._give_up = min(self._give_up, now + self._seconds)
        delay = delay_of(self._failures, error)
        if now + delay > self._give_up:
            raise error
        await anyio.sleep(delay)
