"""The OpenAPI 3.1 document, made from the routes, and a page that shows it without fetching anything."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from html import escape
from http import HTTPStatus
from typing import Any, Protocol

from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.json_schema import JsonSchemaMode

from .door import OPEN_PATHS, SAFE_METHODS
from .errors import ErrorBody
from .messages import Response
from .routes import Route
from .streams import Stream

Schema = dict[str, Any]


class Titled(Protocol):
    title: str
    version: str
    description: str


def describe(about: Titled, routes: Iterable[Route], *, secured: bool) -> Schema:
    """The document for these routes."""
    shown = [route for route in routes if not route.options.hidden]
    schemas = _Schemas(shown)
    paths: dict[str, Schema] = {}
    for route in shown:
        operation = _operation(route, schemas, secured=secured)
        if secured and route.path in OPEN_PATHS:
            operation["security"] = []
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    components: Schema = {"schemas": schemas.definitions}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": about.title, "version": about.version, "description": about.description},
        "paths": paths,
        "components": components,
    }
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


class _Schemas:
    """JSON schemas of all that the routes take and give, generated together so that equal names are kept apart."""

    def __init__(self, routes: list[Route]) -> None:
        inputs: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
            ("error", "serialization", TypeAdapter(ErrorBody))
        ]
        for route in routes:
            key = _key(route)
            if route.body is not None:
                inputs.append((f"{key} body", "validation", route.body))
            if route.query is not None:
                inputs.append((f"{key} query", "validation", TypeAdapter(route.query)))
            inputs += [(f"{key} {name}", "validation", adapter) for name, adapter in route.path_types.items()]
            answer = _answer_type(route)
            if answer is not None:
                inputs.append((f"{key} answer", "serialization", answer))
            for status, kind in route.options.answers.items():
                inputs.append((f"{key} {status}", "serialization", TypeAdapter(kind)))
        found, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
        self._found = {key: schema for (key, _), schema in found.items()}
        self.definitions: Schema = shared.get("$defs", {})

    def get(self, key: str) -> Schema:
        return self._found.get(key, {})

    def resolve(self, schema: Schema) -> Schema:
        name = schema.get("$ref", "").rpartition("/")[2]
        found: Schema = self.definitions.get(name, schema)
        return found


def _operation(route: Route, schemas: _Schemas, *, secured: bool) -> Schema:
    key = _key(route)
    text = inspect.getdoc(route.handler) or ""
    summary, _, description = text.partition("\n\n")
    operation: Schema = {
        "operationId": route.name.strip("_"),
        "summary": " ".join(summary.split()),
        "parameters": [
            *_path_parameters(route, schemas),
            *_query_parameters(route, schemas),
            *_header_parameters(route),
        ],
        "responses": _responses(route, schemas, secured=secured),
    }
    if description:
        operation["description"] = description
    if route.options.tag:
        operation["tags"] = [route.options.tag]
    if route.body is not None:
        operation["requestBody"] = {
            "required": route.body_default is inspect.Parameter.empty,
            "content": {"application/json": {"schema": schemas.get(f"{key} body")}},
        }
    return operation


def _path_parameters(route: Route, schemas: _Schemas) -> list[Schema]:
    key = _key(route)
    names = [part[1:-1] for part in route.parts if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": schemas.get(f"{key} {name}") or {"type": "string"}}
        for name in names
    ]


def _query_parameters(route: Route, schemas: _Schemas) -> list[Schema]:
    model = schemas.resolve(schemas.get(f"{_key(route)} query"))
    required = model.get("required", ())
    found = []
    for name, schema in model.get("properties", {}).items():
        parameter = {"name": name, "in": "query", "required": name in required, "schema": schema}
        if "description" in schema:
            parameter["description"] = schema["description"]
        found.append(parameter)
    return found


def _header_parameters(route: Route) -> list[Schema]:
    return [
        {"name": name, "in": "header", "required": False, "schema": dict(schema)}
        for name, schema in route.options.takes_headers.items()
    ]


def _responses(route: Route, schemas: _Schemas, *, secured: bool) -> Schema:
    found = {route.options.status: _success(route, schemas)}
    for status in route.options.answers:
        found[status] = _response(status, schemas.get(f"{_key(route)} {status}"))
    for status in _error_statuses(route, secured=secured):
        found.setdefault(status, _response(status, schemas.get("error")))
    return {str(status): found[status] for status in sorted(found)}


def _error_statuses(route: Route, *, secured: bool) -> set[int]:
    found = {400, 503, *route.options.errors}
    if route.path == "/health":
        found = {400}
    if secured and route.path not in OPEN_PATHS:
        found.add(401)
    if not secured and route.method not in SAFE_METHODS:
        found.add(403)
    if "{" in route.path:
        found |= {404, 422}
    if route.body is not None:
        found |= {408, 413, 415, 422}
    if route.query is not None or route.options.takes_headers:
        found.add(422)
    return found


def _response(status: int, schema: Schema) -> Schema:
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}


def _success(route: Route, schemas: _Schemas) -> Schema:
    if route.options.status == 204:
        return {"description": "No content"}
    schema = schemas.get(f"{_key(route)} answer")
    return {"description": "OK", "content": {route.options.media_type: {"schema": schema}}}


def _answer_type(route: Route) -> TypeAdapter[Any] | None:
    if route.returns in (inspect.Signature.empty, Response, Stream, Any, None, Response | Stream):
        return None
    try:
        adapter = TypeAdapter(route.returns)
        adapter.json_schema(mode="serialization")
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None  # an answer that only its docstring describes
    return adapter


def _key(route: Route) -> str:
    return f"{route.method} {route.path}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
code, pre { font: 13px/1.4 ui-monospace, monospace } pre { background: #f5f5f5; padding: .6rem; overflow-x: auto }
section { border-top: 1px solid #ddd; padding: .4rem 0 } h3 { margin: .4rem 0 } .m { color: #06c }
td, th { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top } summary { cursor: pointer }
"""


def render(document: Schema) -> str:
    """The document as one page of HTML that needs nothing else: no script, no network."""
    info = document["info"]
    operations = "\n".join(
        _render_operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    models = "\n".join(
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>{_render_json(schema)}</details>'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    title = escape(f"{info['title']} {info['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(info['description'])}</p>"
        f'<p>The same as an OpenAPI document: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{operations}<h2>Models</h2>{models}</html>"
    )


def _render_operation(method: str, path: str, operation: Schema) -> str:
    parts = [
        f'<section><h3><code><span class="m">{method.upper()}</span> {escape(path)}</code></h3>',
        f"<p>{escape(operation['summary'])}</p>",
    ]
    if "description" in operation:
        parts.append(f"<pre>{escape(operation['description'])}</pre>")
    if operation["parameters"]:
        rows = "".join(
            f"<tr><td><code>{escape(item['name'])}</code><td>{item['in']}<td>{'required' if item['required'] else ''}"
            f"<td>{escape(item.get('description', ''))}"
            for item in operation["parameters"]
        )
        parts.append(f"<table>{rows}</table>")
    if "requestBody" in operation:
        parts.append(f"<details><summary>Body</summary>{_render_content(operation['requestBody'])}</details>")
    for status, response in operation["responses"].items():
        if int(status) < 300 and "content" in response:
            parts.append(f"<details><summary>Answer {status}</summary>{_render_content(response)}</details>")
    return "".join([*parts, "</section>"])


def _render_content(holder: Schema) -> str:
    return "".join(f"<p>{escape(kind)}</p>{_render_json(item['schema'])}" for kind, item in holder["content"].items())


def _render_json(schema: Schema) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2))}</pre>"
