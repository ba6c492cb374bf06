"""Routes: how a handler's signature says what it takes, and how its return value becomes an answer.

    routes = Routes(tag="tasks")

    @routes.post("/tasks/{task_id}/events", status=202)
    async def send_event(task_id: str, body: EventDefinition, query: SendOptions) -> SendAnswer:
        '''Send an outside event to a task.'''

A parameter is, by its name: a `{part}` of the path, `body` (validated JSON, or the raw bytes if annotated `bytes`),
`query` (a pydantic model of the query parameters), or `request`. All of them may be left out. A handler returns data
(sent as JSON), a `Response` or a `Stream`, and raises the exceptions of `llama_corral.exceptions`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from .errors import Malformed, UnsupportedType, invalid, refusal, refusal_of_group
from .messages import Request, Response
from .streams import Stream

Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)
Answer = Response | Stream
_PART = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MULTIPLE = (list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """What a route says besides its path and its handler.

    Args:
        status: Status of a plain return value; 204 sends no body.
        hot: Answer in front of Quart: the same checks, fewer steps. Quart's own hooks do not see it.
        detached: The handler goes on when the client goes away (it still ends when the server does).
        returns: What the answer looks like, for the OpenAPI document, where the return annotation does not say it.
        media_type: Type of the answer in the document.
        answers: Further answers of the handler for the document: status to what their JSON looks like.
        errors: Statuses of the errors that the handler raises, for the document. What the door, the validation and a
            missing part of the path raise is there already, and so is 503.
        takes_headers: Request headers that mean something to the handler, for the document: name to JSON schema.
        body_limit: Largest body in bytes where it may be larger than the settings say. Only for a path without parts that
            are named.
        tag: Heading in the document.
        hidden: Leave the route out of the document.
    """

    status: int = 200
    hot: bool = False
    detached: bool = False
    returns: Any = None
    media_type: str = "application/json"
    answers: Mapping[int, Any] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    takes_headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    body_limit: int = 0
    tag: str | None = None
    hidden: bool = False


class Route:
    """A route ready to be called. The handler's signature is read here, once: a mistake in it shows at start-up."""

    def __init__(self, method: str, path: str, handler: Handler, options: RouteOptions) -> None:
        self.method = method
        self.path = path
        self.handler = handler
        self.options = options
        self.name = getattr(handler, "__name__", "handler")
        self.parts = path.strip("/").split("/")
        signature = _signature(handler)
        self.returns = options.returns if options.returns is not None else signature.return_annotation
        self.path_types: dict[str, TypeAdapter[Any]] = {}
        self.body: TypeAdapter[Any] | None = None
        self.body_default: Any = inspect.Parameter.empty
        self.query: type[BaseModel] | None = None
        self._raw_body = self._wants_request = False
        names = _PART.findall(path)
        for parameter in signature.parameters.values():
            self._take(parameter, names)
        self._lists: frozenset[str] = _list_fields(self.query) if self.query else frozenset()

    def _take(self, parameter: inspect.Parameter, path_names: list[str]) -> None:
        name, annotation = parameter.name, parameter.annotation
        if name in path_names:
            self.path_types[name] = TypeAdapter(str if annotation is parameter.empty else annotation)
        elif name == "body":
            self._raw_body = annotation is bytes
            self.body = TypeAdapter(Any if annotation is parameter.empty else annotation)
            self.body_default = parameter.default
        elif name == "query":
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                raise TypeError(f"{self.method} {self.path}: annotate `query` with a pydantic model")
            self.query = annotation
        elif name == "request":
            self._wants_request = True
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"{self.method} {self.path}: parameter {name!r} of {self.name} is no part of the path; "
                f"a handler takes {[*path_names, 'body', 'query', 'request']}"
            )

    async def answer(self, request: Request) -> Answer:
        """Validate, call the handler and turn what it returns or raises into an answer. Only cancellation comes out."""
        if self.options.detached:
            request.detach()
        try:
            return self._wrap(await self.handler(**self._arguments(request)))
        except BaseExceptionGroup as group:
            # The handler owned a nursery: a cancellation arrives in a group, possibly beside errors.
            refused = refusal_of_group(group)
            if refused is None:
                raise
            return Response.of_refusal(refused)
        except Exception as error:
            return Response.of_refusal(refusal(error))

    def _wrap(self, value: Any) -> Answer:
        if isinstance(value, (Response, Stream)):
            return value
        if self.options.status == 204:
            return Response(status=204)
        return Response.json(value, status=self.options.status)

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, adapter in self.path_types.items():
            try:
                arguments[name] = adapter.validate_python(request.path_params[name])
            except ValidationError as error:
                raise invalid(error, f"path.{name}") from error
        if self.query is not None:
            arguments["query"] = self._query(self.query, request)
        if self.body is not None:
            arguments["body"] = self._body(self.body, request)
        if self._wants_request:
            arguments["request"] = request
        return arguments

    def _query(self, model: type[BaseModel], request: Request) -> BaseModel:
        values: dict[str, Any] = {}
        if request.scope["query_string"]:
            values = {name: found if name in self._lists else found[-1] for name, found in request.query.items()}
        try:
            return model.model_validate(values)
        except ValidationError as error:
            raise invalid(error, "query") from error

    def _body(self, adapter: TypeAdapter[Any], request: Request) -> Any:
        body = request.body
        if self._raw_body:
            return body
        if not body and self.body_default is not inspect.Parameter.empty:
            return self.body_default
        check_json(request)
        try:
            # Strict: the document says integer, so true and "1" are mistakes of the sender, not numbers.
            return adapter.validate_json(body, strict=True)
        except ValidationError as error:
            raise invalid(error, "body") from error


def check_json(request: Request) -> None:
    """Refuse a body that is not JSON in the strict sense.

    Raises:
        UnsupportedType: it is announced as something else. A page of another site can make a browser send a form or
            plain text without asking first; it cannot do that with JSON, so this is not pedantry.
        Malformed: it is empty, or has NaN or Infinity, which no other JSON parser would take from us.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not request.body:
        raise Malformed("body: a JSON document is missing", hint="send one, with Content-Type: application/json")
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedType(
            f"body: its type is {kind[:80]!r}, not JSON" if kind else "body: its type is not given",
            hint="send it with Content-Type: application/json",
        )
    if b"NaN" in request.body or b"Infinity" in request.body:  # rare, also inside strings: only then look closely
        try:
            from_json(request.body, allow_inf_nan=False)
        except ValueError as error:
            raise Malformed(f"body: {error}", hint="JSON has no NaN and no Infinity; send null") from error


class Routes:
    """A collection of routes, to be given to `WebApp.include`. Handlers may be functions, closures or bound methods."""

    def __init__(self, *, tag: str | None = None) -> None:
        self.tag = tag
        self._routes: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def add(self, method: str, path: str, handler: Handler, **options: Any) -> Route:
        """Add a route. `options` are the fields of `RouteOptions`."""
        options.setdefault("tag", self.tag)
        if not path.startswith("/"):
            raise ValueError(f"a path starts with '/': {path!r}")
        route = Route(method.upper(), path, handler, RouteOptions(**options))
        self._routes.append(route)
        return route

    def get(self, path: str, **options: Any) -> Callable[[H], H]:
        return self._decorator("GET", path, options)

    def post(self, path: str, **options: Any) -> Callable[[H], H]:
        return self._decorator("POST", path, options)

    def put(self, path: str, **options: Any) -> Callable[[H], H]:
        return self._decorator("PUT", path, options)

    def patch(self, path: str, **options: Any) -> Callable[[H], H]:
        return self._decorator("PATCH", path, options)

    def delete(self, path: str, **options: Any) -> Callable[[H], H]:
        return self._decorator("DELETE", path, options)

    def _decorator(self, method: str, path: str, options: Mapping[str, Any]) -> Callable[[H], H]:
        def register(handler: H) -> H:
            self.add(method, path, handler, **options)
            return handler

        return register


class RouteTable:
    """Finds a route by method and path. As in werkzeug, a fixed part wins over a named one."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[str, int], list[Route]] = {}

    def add(self, route: Route) -> None:
        found = self._by_shape.setdefault((route.method, len(route.parts)), [])
        found.append(route)
        found.sort(key=lambda known: [bool(_PART.fullmatch(part)) for part in known.parts])

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        if not path.startswith("/"):
            return None
        parts = path[1:].split("/")
        for route in self._by_shape.get((method, len(parts)), ()):
            params = _match(route.parts, parts)
            if params is not None:
                return route, params
        return None


def _match(template: list[str], parts: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for expected, part in zip(template, parts, strict=True):
        if expected[:1] == "{":
            if not part:
                return None
            params[expected[1:-1]] = part
        elif expected != part:
            return None
    return params


def _signature(handler: Handler) -> inspect.Signature:
    try:
        return inspect.signature(handler, eval_str=True)
    except NameError as error:
        raise TypeError(
            f"the annotations of {handler!r} cannot be read ({error}); models of a handler must be at module level"
        ) from error


def _list_fields(model: type[BaseModel]) -> frozenset[str]:
    names = set()
    for name, info in model.model_fields.items():
        if _is_multiple(info.annotation):
            names.add(info.alias or name)
    return frozenset(names)


def _is_multiple(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_multiple(option) for option in typing.get_args(annotation))
    return (origin or annotation) in _MULTIPLE
