"""One connection pool, and what is repeated when.

A request is repeated, for `retry_for` seconds at most, if that is safe: it was not sent, or the server said that nothing
of it was done, or doing it twice is doing it once (`repeatable`). Only a server that has answered this client before is
waited for: the first request to a wrong URL fails at once. A server that is full is asked `FULL_ATTEMPTS` times at most,
and only for what is repeatable: everybody repeating everything would keep it full.
"""

from __future__ import annotations

import json
import math
import ssl
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any, Final

import anyio
import httpx
from pydantic import SecretStr

from ..exceptions import CorralError, TooManyTasks, Unavailable
from ..http_answers import from_answer, no_answer, not_ours
from ..http_urls import authorization, check_url, is_loopback

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
    """Requests to one control plane. `aclose` closes the pool and every stream that was left open."""

    def __init__(
        self, url: str, token: str | SecretStr | None, timeout: float, retry_for: float, verify: ssl.SSLContext | bool
    ) -> None:
        self.url = check_url(url)
        self.timeout = timeout
        self.retry_for = retry_for
        self.answered = False
        self._abandoned: deque[StreamBody] = deque()
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={b"Authorization": authorization(secret)} if secret else {},
            timeout=timeout,
            # Each connection belongs to a caller; a limit here would let open streams block everything else.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            # Loading the certificates of the system takes longer than most requests.
            verify=verify if self.url.startswith("https:") else False,
            # What is on this machine is never behind a proxy, whatever the environment says.
            trust_env=not is_loopback(self.url),
        )

    async def aclose(self) -> None:
        await self.close_abandoned()
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await self._client.aclose()

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
        request = self._client.build_request(
            method,
            path,
            params={name: value for name, value in (params or {}).items() if value is not None},
            content=content,
            headers={"Content-Type": "application/json"} if content is not None else {},
            timeout=httpx.Timeout(self.timeout, read=self.timeout + wait),
        )
        give_up = anyio.current_time() + self.retry_for
        for failures in count(1):
            try:
                return await self._once(request)
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

    async def _once(self, request: httpx.Request) -> httpx.Response:
        response = await self._send(request)
        if response.status_code >= 300:
            raise self._refusal(response)
        return response

    async def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            response = await self._client.send(request, stream=stream)
        except httpx.HTTPError as error:
            raise self.lost(error) from error
        self.answered = True
        return response

    def lost(self, error: httpx.HTTPError | httpx.StreamError) -> Unavailable:
        """A failure of the connection as one of ours."""
        reason = str(error) or ("timed out" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
        return no_answer(self.url, reason, sent=not isinstance(error, _NOT_SENT))

    def _refusal(self, response: httpx.Response) -> CorralError:
        return from_answer(response.status_code, response.content, response.headers, self.url)

    # Streams

    async def open_stream(self, path: str, *, params: Mapping[str, Any], headers: Mapping[str, str]) -> StreamBody:
        """An answer whose body is still to be read. Not repeated here: the reader knows where to go on.

        Resource handling: the caller closes it, or hands it to `abandon`.
        """
        await self.close_abandoned()
        request = self._client.build_request(
            "GET",
            path,
            params=params,
            headers={"Accept": "text/event-stream", "Accept-Encoding": "identity", **headers},
            timeout=httpx.Timeout(self.timeout, read=STREAM_SILENCE),
        )
        response = await self._send(request, stream=True)
        if response.status_code < 300:
            return StreamBody(self, response)
        try:
            await response.aread()
        except httpx.HTTPError as error:
            raise self.lost(error) from error
        raise self._refusal(response)

    def abandon(self, body: StreamBody) -> None:
        """For a reader that is collected and cannot await: the body is closed with the next request."""
        self._abandoned.append(body)

    async def close_abandoned(self) -> None:
        while self._abandoned:
            await self._abandoned.popleft().aclose()


class StreamBody:
    """The body of an answer, piece by piece."""

    def __init__(self, http: Http, response: httpx.Response) -> None:
        self._http = http
        self._response = response
        self._chunks = response.aiter_bytes()

    async def receive(self) -> bytes | None:
        """The next piece; None at the end of a complete body. `Unavailable` if the connection failed."""
        try:
            return await anext(self._chunks, None)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._http.lost(error) from error

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
