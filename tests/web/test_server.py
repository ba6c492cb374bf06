"""Binding, stopping, TLS: what `serve` does around an app."""

from __future__ import annotations

import ssl
import subprocess

import anyio
import httpx
import pytest
import trio
import trio.testing

from llama_corral.exceptions import AddressError, SetupError
from llama_corral.settings import ServerSettings
from llama_corral.web import Request, Stream, WebApp, ndjson, serve

pytestmark = [pytest.mark.trio, pytest.mark.timeout(10)]


async def test_two_apps_in_one_process(make_app, running):
    async with running(make_app()) as one, running(make_app(token="t")) as two:
        assert one.port != two.port
        assert (await one.ask("GET", "/openapi.json")).status == 200
        assert (await two.ask("GET", "/openapi.json")).status == 401
        one.stop.set()
        await one.ended.wait()
        assert (await two.ask("GET", "/health")).status == 200


async def test_the_loopback_address_is_the_default(make_app, running):
    async with running(make_app()) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"


async def test_a_name_is_bound_on_one_address(make_app, running):
    async with running(make_app(host="localhost")) as server:
        assert (await server.ask("GET", "/health")).status == 200


async def test_a_port_in_use(make_app, running):
    async with running(make_app()) as server:
        app = make_app(port=server.port)
        with pytest.raises(
            AddressError, match=f"cannot listen on 127.0.0.1:{server.port}: Address already in use"
        ) as e:
            await serve(app, app.settings)
        assert "choose another" in e.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 300])
async def test_an_address_that_is_not_ours(make_app, host):
    app = make_app(host=host)
    with pytest.raises(AddressError) as caught:
        await serve(app, app.settings)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


async def test_on_asyncio_there_is_one_clear_error():
    async def main() -> None:
        settings = ServerSettings(port=0)
        await serve(WebApp(settings, title="t", version="1"), settings)

    with pytest.raises(SetupError, match="Trio backend"):
        await trio.to_thread.run_sync(lambda: anyio.run(main, backend="asyncio"))


@pytest.mark.promise("P7")
async def test_readiness_turns_before_the_listener_closes(make_app, running):
    async with running(make_app(readiness_delay=60)) as server, server.connect() as client:
        assert (await client.ask("GET", "/ready")).status == 200
        server.stop.set()
        await server.app.drain.wait()
        answer = await server.ask("GET", "/ready")  # on a new connection: it still listens
        assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
        assert (await server.ask("GET", "/health")).status == 200
        last = await client.ask("GET", "/health")  # an open connection is told to go elsewhere
        assert last.headers["connection"] == "close"
        await client.eof()


async def test_after_the_stop_nobody_is_let_in(make_app, running):
    async with running(make_app()) as server, server.connect() as idle:
        assert (await idle.ask("GET", "/health")).status == 200
        server.stop.set()
        await idle.eof()
        await server.ended.wait()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", server.port)


@pytest.mark.promise("P7")
async def test_requests_in_flight_get_the_graceful_timeout_and_no_more(make_app, running, hot):
    cancelled = trio.Event()
    entered = trio.Event()

    async def stubborn() -> None:
        entered.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    app = make_app(graceful_timeout=0.2)
    app.add("GET", "/stubborn", stubborn, hot=hot, detached=True)
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/stubborn")
        await entered.wait()
        started = trio.current_time()
        server.stop.set()
        await server.ended.wait()
        assert cancelled.is_set()
        assert 0.15 < trio.current_time() - started < 5
        await client.eof()


@pytest.mark.promise("P6")
async def test_cancelling_serve_ends_it_at_once(make_app):
    app = make_app()
    entered = trio.Event()

    async def wait(request: Request) -> None:
        entered.set()
        await trio.sleep_forever()

    app.add("GET", "/wait", wait)
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve_app, app)
        async with await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2])) as stream:
            await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            await entered.wait()
            started = trio.current_time()
            nursery.cancel_scope.cancel()
    assert trio.current_time() - started < 5


async def serve_app(app, task_status):
    await serve(app, app.settings, task_status=task_status)


@pytest.mark.promise("P7")
@pytest.mark.parametrize("user_timeout", [0.5, 600])
async def test_a_client_that_stops_reading_does_not_block_the_stop(make_app, running, hot, user_timeout):
    async def source():  # noqa: ASYNC900 - a stream's source is one
        while True:
            yield b"x" * 1_000_000

    async def flood() -> Stream:
        return ndjson(source())

    app = make_app(user_timeout=user_timeout, graceful_timeout=0.1)
    app.add("GET", "/flood", flood, hot=hot)
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/flood")
        await client.head()
        await trio.testing.wait_all_tasks_blocked(0.05)  # the server is stuck in its write
        started = trio.current_time()
        server.stop.set()
        await server.ended.wait()
        assert trio.current_time() - started < 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    extra = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run([*command.split(), *extra], check=True, capture_output=True)
    return cert, key


async def test_tls(make_app, running, certificate):
    cert, key = certificate
    async with running(make_app(tls_cert=cert, tls_key=key)) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        context.set_alpn_protocols(["http/1.1"])
        tcp = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with trio.SSLStream(tcp, context, server_hostname="localhost", https_compatible=True) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            received = b""
            while data := await stream.receive_some():
                received += data
        assert received.startswith(b"HTTP/1.1 200")


async def test_http_2_over_tls(make_app, running, certificate, hot):
    cert, key = certificate

    async def lines() -> Stream:
        return ndjson(source())

    async def source():  # noqa: ASYNC900 - what ndjson takes
        yield 1
        await trio.sleep_forever()

    app = make_app(tls_cert=cert, tls_key=key, body_limit=1000)
    app.add("GET", "/lines", lines, hot=hot)
    context = ssl.create_default_context(cafile=cert)
    async with running(app) as server, httpx.AsyncClient(http2=True, verify=context) as client:
        url = f"https://localhost:{server.port}"
        for _ in range(2):
            found = await client.post(f"{url}/nowhere", content=b"x" * 100_000)
            assert (found.http_version, found.status_code) == ("HTTP/2", 413)
            assert "connection" not in found.headers
            assert (await client.get(f"{url}/health")).status_code == 200
        async with client.stream("GET", f"{url}/lines") as found:
            parts = found.aiter_text()
            assert await anext(parts) == "1\n"
            server.stop.set()
            assert [part async for part in parts] == []  # ended by the drain, and complete


async def test_tls_files_that_are_none(make_app, tmp_path):
    missing = str(tmp_path / "missing.pem")
    app = make_app(tls_cert=missing, tls_key=missing)
    with pytest.raises(SetupError, match="TLS"):
        await serve(app, app.settings)
