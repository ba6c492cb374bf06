"""Settings from arguments and the environment, and logs."""

from __future__ import annotations

import io
import json
import logging

import pytest
from pydantic import ValidationError

from llama_corral.log_ids import REQUEST_ID, log_task
from llama_corral.settings import ServerSettings
from llama_corral.web import configure_logging


def test_the_environment_is_read_when_called(monkeypatch):
    monkeypatch.setenv("CORRAL_PORT", "1234")
    monkeypatch.setenv("CORRAL_TOKEN", "s3cret")
    monkeypatch.setenv("CORRAL_CORS_ORIGINS", "https://a.example/, https://b.example")
    settings = ServerSettings()
    assert settings.port == 1234
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert ServerSettings(port=1).port == 1
    assert "s3cret" not in repr(settings)


def test_the_defaults_are_safe():
    settings = ServerSettings()
    assert settings.host == "127.0.0.1"
    assert settings.cors_origins == ()
    assert not settings.debug


@pytest.mark.promise("P9")
def test_kubernetes_service_links_are_ignored(monkeypatch, caplog):
    monkeypatch.setenv("CORRAL_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("CORRAL_PORT_8000_TCP", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("CORRAL_SERVICE_HOST", "10.0.0.1")
    assert ServerSettings().port == 8000
    assert "ignored CORRAL_PORT" in caplog.text


@pytest.mark.parametrize("values", [{"token": ""}, {"token": "  "}, {"tls_cert": "a"}, {"port": 70000}])
def test_settings_that_make_no_sense_are_refused(values):
    with pytest.raises(ValidationError) as caught:
        ServerSettings(**values)
    assert "input_value" not in str(caught.value)


@pytest.fixture
def stream():
    stream = io.StringIO()
    logger = logging.getLogger("llama_corral")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before


def test_json_logs_name_request_and_task(stream):
    configure_logging("json", stream=stream)
    token = REQUEST_ID.set("r1")
    with log_task("t1"):
        logging.getLogger("llama_corral.x").warning("hello %s", "you", extra={"step": "s"})
    REQUEST_ID.reset(token)
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "warning",
        "logger": "llama_corral.x",
        "message": "hello you",
        "request_id": "r1",
        "task_id": "t1",
        "step": "s",
    }


def test_json_logs_hold_the_traceback_on_one_line(stream):
    configure_logging("json", stream=stream)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("llama_corral.x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "KeyError" in json.loads(line)["traceback"]


def test_text_logs_name_what_is_known_and_are_not_doubled(stream):
    configure_logging("text", stream=stream)
    configure_logging("text", stream=stream)
    logging.getLogger("llama_corral.x").info("one", extra={"task_id": "t2"})
    logging.getLogger("llama_corral.x").info("two")
    first, second = stream.getvalue().splitlines()
    assert "llama_corral.x task=t2 one" in first
    assert "llama_corral.x two" in second
