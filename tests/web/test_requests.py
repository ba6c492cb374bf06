"""What a handler gets, what is refused at the door, and that every refusal has the same shape."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import httpx
import pytest
import trio
from pydantic import BaseModel, Field

from llama_corral import exceptions as exc
from llama_corral.log_ids import TASK_ID, log_task
from llama_corral.web import Request, Response, Routes

pytestmark = [pytest.mark.trio, pytest.mark.timeout(10)]


class Item(BaseModel):
    """Something to store."""

    name: str
    count: int = 1


class Page(BaseModel):
    limit: Annotated[int, Field(ge=1, le=100, description="How many.")] = 10
    status: list[str] = []
    wait: float | None = None


async def echo(item_id: str, body: Item, query: Page, request: Request) -> dict[str, Any]:
    """Answer what was sent.

    In full.
    """
    return {"id": item_id, "item": body.model_dump(), "page": query.model_dump(), "request": request.id}


def assert_shape(answer: Any, status: int, code: str) -> str:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error", "detail"}
    assert set(body["error"]) == {"code", "message", "hint"}
    assert body["error"]["code"] == code
    assert body["detail"] == body["error"]["message"]
    assert "\n" not in body["detail"]
    return str(body["detail"])


async def test_path_body_query_and_request(make_app, running, hot):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo, hot=hot)
    async with running(app) as server:
        path = "/items/a%20b?limit=5&status=x&status=y&wait=0.5"
        answer = await server.ask("POST", path, b'{"name": "n"}', X_Request_ID="abc-1")
    assert answer.status == 200
    assert answer.json() == {
        "id": "a b",
        "item": {"name": "n", "count": 1},
        "page": {"limit": 5, "status": ["x", "y"], "wait": 0.5},
        "request": "abc-1",
    }
    assert answer.headers["x-request-id"] == "abc-1"
    assert "server" not in answer.headers


JSON = "application/json"


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("body", "kind", "status", "code", "text"),
    [
        (b'{"name": ', JSON, 400, "malformed", "Invalid JSON"),
        (b"\xff\xfe", JSON, 400, "malformed", "Invalid JSON"),
        (b'{"name": "\xff"}', JSON, 400, "malformed", "Invalid JSON"),
        (b'{"name": "\\ud800"}', JSON, 400, "malformed", "Invalid JSON"),
        (b"[" * 5000, JSON, 400, "malformed", "Invalid JSON"),
        (b'{"name": "n", "count": NaN}', JSON, 400, "malformed", "body"),
        (b'{"name": "n", "count": ' + b"9" * 6000 + b"}", JSON, 400, "malformed", "body"),
        (b"", JSON, 400, "malformed", "missing"),
        (b"[1]", JSON, 422, "bad_input", "object"),
        (b"null", JSON, 422, "bad_input", "object"),
        (b'"text"', JSON, 422, "bad_input", "object"),
        (b"{}", JSON, 422, "bad_input", "body.name: Field required"),
        (b'{"name": "n", "count": "many"}', JSON, 422, "bad_input", "body.count"),
        (b'{"name": "n"}', "text/plain", 415, "unsupported_media_type", "text/plain"),
        (b'{"name": "n"}', "application/x-www-form-urlencoded", 415, "unsupported_media_type", "urlencoded"),
    ],
)
async def test_a_bad_body_is_named(make_app, running, hot, body, kind, status, code, text):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo, hot=hot)
    async with running(app) as server:
        answer = await server.ask("POST", "/items/1", body, Content_Type=kind)
    assert text in assert_shape(answer, status, code)


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("query", "status"),
    [("limit=0", 422), ("limit=x", 422), ("wait=", 422), ("status=%ff", 400), ("&".join(["a=1"] * 1001), 400)],
)
async def test_a_bad_query_is_named(make_app, running, hot, query, status):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo, hot=hot)
    async with running(app) as server:
        answer = await server.ask("POST", f"/items/1?{query}", b'{"name": "n"}')
    assert_shape(answer, status, "bad_input" if status == 422 else "malformed")


async def test_values_of_a_bad_body_are_not_repeated(make_app, running):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo)
    async with running(app) as server:
        answer = await server.ask("POST", "/items/1", b'{"name": "n", "count": "hunter2"}')
    assert b"hunter2" not in answer.body


@pytest.mark.promise("P9")
async def test_routing_errors_have_the_shape(make_app, running, hot):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo, hot=hot)
    async with running(app) as server:
        assert_shape(await server.ask("GET", "/nowhere"), 404, "not_found")
        assert_shape(await server.ask("POST", "/items//x"), 404, "not_found")
        wrong = await server.ask("DELETE", "/items/1")
        assert_shape(wrong, 405, "method_not_allowed")
        assert "POST" in wrong.headers["allow"]
        assert_shape(await server.ask("GET", "/%00"), 400, "malformed")


FAMILIES = [
    (exc.BadInput, 422, {}),
    (exc.UsageError, 400, {}),
    (exc.NotFound, 404, {}),
    (exc.Conflict, 409, {}),
    (exc.TooLarge, 413, {"connection": "close"}),
    (exc.TooSlow, 408, {"connection": "close"}),
    (exc.Unauthorized, 401, {"www-authenticate": "Bearer"}),
    (exc.Unavailable, 503, {"retry-after": "1"}),
    (exc.Draining, 503, {"retry-after": "1"}),
    (exc.StoreUnavailable, 503, {"retry-after": "1"}),
    (exc.QueueUnavailable, 503, {"retry-after": "1"}),
    (exc.TooManyTasks, 429, {"retry-after": "1"}),
    (exc.TaskTimedOut, 504, {}),
    (exc.TaskFailed, 500, {}),
    (exc.TaskCancelled, 409, {}),
    (exc.Fenced, 409, {}),
]


@pytest.mark.parametrize(("family", "status", "headers"), FAMILIES)
async def test_every_family_has_its_status(make_app, running, hot, family, status, headers):
    async def fail() -> None:
        raise family("what is wrong", hint="what to do")

    async def fail_in_a_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail)

    app = make_app()
    app.add("GET", "/fail", fail, hot=hot)
    app.add("GET", "/nursery", fail_in_a_nursery, hot=hot)
    async with running(app) as server:
        for path in ("/fail", "/nursery"):
            answer = await server.ask("GET", path)
            assert assert_shape(answer, status, family.code) == "what is wrong"
            assert answer.json()["error"]["hint"] == "what to do"
            assert headers.items() <= answer.headers.items()


@pytest.mark.parametrize(
    "error", [KeyError("hunter2"), exc.StoreError("hunter2"), ExceptionGroup("g", [OSError("hunter2")])]
)
async def test_an_unexpected_error_says_nothing_and_is_logged(make_app, running, hot, error, caplog):
    async def fail() -> None:
        raise error

    app = make_app()
    app.add("GET", "/fail", fail, hot=hot)
    async with running(app) as server:
        answer = await server.ask("GET", "/fail", X_Request_ID="find-me")
    assert_shape(answer, 500, "internal")
    assert b"hunter2" not in answer.body
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "find-me" in record.getMessage()
    assert "hunter2" in caplog.text


async def test_an_answer_that_is_no_json_is_an_unexpected_error(make_app, running, hot):
    async def odd() -> object:
        return object()

    app = make_app()
    app.add("GET", "/odd", odd, hot=hot)
    async with running(app) as server:
        assert_shape(await server.ask("GET", "/odd"), 500, "internal")


async def test_statuses_headers_and_other_types(make_app, running, hot):
    async def created() -> Item:
        return Item(name="n")

    async def nothing() -> None:
        return None

    async def page() -> Response:
        return Response(b"<p>", 202, {"X-Extra": "1"}, "text/html")

    async def raw(body: bytes) -> int:
        return len(body)

    async def optional(body: Item | None = None) -> bool:
        return body is None

    app = make_app()
    app.add("POST", "/created", created, status=201, hot=hot)
    app.add("DELETE", "/gone", nothing, status=204, hot=hot)
    app.add("GET", "/null", nothing, hot=hot)
    app.add("GET", "/page", page, hot=hot)
    app.add("POST", "/raw", raw, hot=hot)
    app.add("POST", "/optional", optional, hot=hot)
    async with running(app) as server, server.connect() as client:
        answer = await client.ask("POST", "/created")
        assert (answer.status, answer.json()) == (201, {"name": "n", "count": 1})
        gone = await client.ask("DELETE", "/gone")
        assert (gone.status, gone.body, gone.headers.get("content-type")) == (204, b"", None)
        assert (await client.ask("GET", "/null")).body == b"null"
        found = await client.ask("GET", "/page")
        assert (found.status, found.body, found.headers["x-extra"]) == (202, b"<p>", "1")
        assert found.headers["content-type"] == "text/html"
        assert (await client.ask("POST", "/raw", b"\xff" * 7, Content_Type="a/b")).json() == 7
        assert (await client.ask("POST", "/optional")).json() is True


@pytest.mark.promise("P9")
async def test_a_token_is_needed_everywhere_but_at_the_probes(make_app, running, hot):
    app = make_app(token="s3cret")
    app.add("POST", "/items/{item_id}", echo, hot=hot)
    async with running(app) as server:
        for path in ("/health", "/ready"):
            assert (await server.ask("GET", path)).status == 200
        for path in ("/openapi.json", "/docs", "/nowhere", "/items/1", "/health/"):
            answer = await server.ask("GET", path)
            assert_shape(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for value in ("Bearer wrong", "Bearer", "Basic s3cret", "s3cret", "Bearer s3cret\xe9"):
            answer = await server.ask("POST", "/items/1", b'{"name": "n"}', Authorization=value)
            assert_shape(answer, 401, "unauthorized")
            assert b"s3cret" not in answer.body
        for value in ("Bearer s3cret", "bearer s3cret"):
            assert (await server.ask("POST", "/items/1", b'{"name": "n"}', Authorization=value)).status == 200


async def test_refused_requests_keep_the_connection_if_they_had_no_body(make_app, running):
    async with running(make_app(token="t")) as server, server.connect() as client:
        assert (await client.ask("GET", "/docs")).status == 401
        assert (await client.ask("GET", "/docs", Authorization="Bearer t")).status == 200


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "x\ty", "h\xe9"])
async def test_an_odd_request_id_is_replaced(make_app, running, given):
    async with running(make_app()) as server:
        answer = await server.ask("GET", "/health", X_Request_ID=given)
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


async def test_cors_is_closed(make_app, running):
    app = make_app()
    app.add("POST", "/items/{item_id}", echo)
    async with running(app) as server:
        answer = await server.ask("GET", "/health", Origin="https://evil.example")
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
        body = b'{"name": "n"}'
        assert_shape(await server.ask("POST", "/items/1", body, Origin="https://evil.example"), 403, "foreign_origin")
        assert_shape(await server.ask("POST", "/items/1", body, Origin="null"), 403, "foreign_origin")
        preflight = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
        assert (await server.ask("OPTIONS", "/items/1", **preflight)).status == 403
        own = f"http://127.0.0.1:{server.port}"
        assert (await server.ask("POST", "/items/1", body, Origin=own, Host=own[7:])).status == 200


@pytest.mark.parametrize("origins", ["https://ui.example, https://b.example", "*"])
async def test_cors_can_be_opened(make_app, running, origins):
    app = make_app(cors_origins=origins, token="t")
    app.add("POST", "/items/{item_id}", echo)
    async with running(app) as server:
        origin = "https://ui.example"
        found = await server.ask("OPTIONS", "/items/1", Origin=origin, Access_Control_Request_Method="POST")
        assert found.status == 204
        allowed = "*" if origins == "*" else origin
        assert found.headers["access-control-allow-origin"] == allowed
        assert "access-control-allow-credentials" not in found.headers
        assert "authorization" in found.headers["access-control-allow-headers"]
        posted = await server.ask("POST", "/items/1", b'{"name": "n"}', Origin=origin, Authorization="Bearer t")
        assert posted.status == 200
        assert posted.headers["access-control-allow-origin"] == allowed


async def test_probes(make_app, running):
    app = make_app()
    state = {"store": False}
    app.add_component("store", lambda: state["store"])
    async with running(app) as server:
        assert "store" in assert_shape(await server.ask("GET", "/ready"), 503, "unavailable")
        assert (await server.ask("GET", "/health")).json() == {"status": "ok"}
        state["store"] = True
        assert (await server.ask("GET", "/ready")).json() == {"status": "ready"}
        app.drain.set()
        assert_shape(await server.ask("GET", "/ready"), 503, "draining")
        assert (await server.ask("GET", "/health")).status == 200


async def test_the_document_describes_the_routes(make_app, running):
    app = make_app(token="t")
    app.hot("POST", "/items/{item_id}", echo, tag="items")
    routes = Routes(tag="more")

    @routes.get("/items")
    async def listing(query: Page) -> list[Item]:
        """List <items>."""
        return [Item(name=str(query.limit))]

    app.include(routes)
    async with running(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        client.headers["Authorization"] = "Bearer t"
        document = (await client.get("/openapi.json")).json()
        page = await client.get("/docs")
    post = document["paths"]["/items/{item_id}"]["post"]
    assert post["summary"] == "Answer what was sent."
    assert post["description"] == "In full."
    assert [(item["name"], item["in"]) for item in post["parameters"]] == [
        ("item_id", "path"),
        ("limit", "query"),
        ("status", "query"),
        ("wait", "query"),
    ]
    assert post["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Item"}
    assert post["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    listed = document["paths"]["/items"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert listed["items"] == {"$ref": "#/components/schemas/Item"}
    assert document["paths"]["/health"]["get"]["security"] == []
    assert document["security"] == [{"token": []}]
    assert page.headers["content-type"].startswith("text/html")
    assert "List &lt;items&gt;." in page.text
    assert "<script" not in page.text
    assert "https://" not in page.text
    assert json.dumps(document)  # no NaN, no cycles


async def test_a_handler_with_an_unknown_parameter_is_refused_at_start_up(make_app):
    async def handler(other: str) -> None:
        pass

    with pytest.raises(TypeError, match=r"GET /x: parameter 'other' of handler .* \['body', 'query', 'request'\]"):
        make_app().add("GET", "/x", handler)


async def test_a_fixed_part_wins_over_a_named_hot_one(make_app, running):
    async def named(name: str) -> str:
        return f"named {name}"

    async def fixed() -> str:
        return "fixed"

    app = make_app()
    app.add("GET", "/services/{name}", named, hot=True)
    app.add("GET", "/services/register", fixed)
    async with running(app) as server:
        assert (await server.ask("GET", "/services/register")).json() == "fixed"
        assert (await server.ask("GET", "/services/other")).json() == "named other"
        assert (await server.ask("GET", "/services/")).status == 404


async def test_the_access_log_names_request_and_status(make_app, running, caplog):
    caplog.set_level(logging.INFO, "llama_corral.access")
    async with running(make_app(access_log=True)) as server:
        await server.ask("GET", "/nowhere?secret=1")
    (record,) = [record for record in caplog.records if record.name == "llama_corral.access"]
    assert "GET '/nowhere' 404" in record.getMessage()
    assert "secret" not in record.getMessage()


async def test_log_task_is_undone():
    with log_task("t1"):
        assert TASK_ID.get() == "t1"
    assert TASK_ID.get() == "-"


async def test_websockets_are_refused(make_app, running):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    async with running(make_app(token="t")) as server:
        answer = await server.ask("GET", "/health", **upgrade, Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==")
    assert answer.status == 403
