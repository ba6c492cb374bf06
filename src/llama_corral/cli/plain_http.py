"""Single requests with the standard library: an HTTP library takes longer to import than these commands to run."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from ..exceptions import TooManyTasks, Unavailable
from ..http_answers import from_answer, no_answer, not_ours
from ..http_urls import authorization, check_urls, is_loopback

TIMEOUT: Final = 30.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Server:
    """A control plane, or several: the next one is asked where one has not done what it was asked. `BadInput` if a URL is
    none."""

    url: str
    token: str | None = None

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of the answer. Parameters that are None are left out; a list is repeated.

        Raises:
            CorralError: what the server answered; `Unavailable` if nothing came back.
        """
        return self._ask("GET", path, params)

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        return self._ask("POST", path, params, body)

    def _ask(self, method: str, path: str, params: Mapping[str, Any], body: Any = None) -> Any:
        *first, last = check_urls(self.url)
        for url in first:
            try:
                return self._ask_one(url, method, path, params, body)
            except TooManyTasks:
                raise
            except Unavailable as error:
                if method != "GET" and error.fields.get("sent", True):
                    raise
        return self._ask_one(last, method, path, params, body)

    def _ask_one(self, url: str, method: str, path: str, params: Mapping[str, Any], body: Any) -> Any:
        query = urlencode({name: value for name, value in params.items() if value is not None}, doseq=True)
        request = urllib.request.Request(
            f"{url}{path}{'?' if query else ''}{query}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Accept": "application/json"},
            method=method,
        )
        if body is not None:
            request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", authorization(self.token).decode("latin-1"))
        # What is on this machine is never behind a proxy, whatever the environment says.
        proxies = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
        text = _send(urllib.request.build_opener(_NoRedirect, *proxies), request, url)
        try:
            return json.loads(text)
        except ValueError as error:
            raise not_ours(url, "its answer is no JSON") from error


def _send(opener: urllib.request.OpenerDirector, request: urllib.request.Request, url: str) -> bytes:
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        with error:
            headers = {name.lower(): value for name, value in error.headers.items()}
            raise from_answer(error.code, error.read(), headers, url) from error
    except urllib.error.URLError as error:
        reason = error.reason
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise no_answer(url, text, sent=False) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise no_answer(url, str(error) or type(error).__name__, sent=True) from error
