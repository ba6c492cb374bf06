"""Which services there are."""

from __future__ import annotations

from pydantic import ValidationError

from ..http_answers import not_ours
from ..http_urls import path_of
from ..protocol.messages import ServiceDefinition as Service
from .http import Http

__all__ = ["Service", "Services"]


class Services:
    """`client.services`."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def list(self) -> list[Service]:
        """All services, by name."""
        answer = await self._http.request("GET", "/services")
        try:
            return [Service.model_validate(each) for each in answer.values()]
        except (ValidationError, AttributeError) as error:
            raise not_ours(self._http.url, "its answer is no list of services") from error

    async def get(self, service_name: str) -> Service:
        """Raises `NotFound` where there is no such service."""
        answer = await self._http.request("GET", path_of("services", service_name))
        try:
            return Service.model_validate(answer)
        except ValidationError as error:
            raise not_ours(self._http.url, "its answer is no service") from error
