"""compose.yaml and the Dockerfile start programs of ours, with options, variables and extras that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_corral.cli.targets import load_targets

from .programs import parse, variables

ROOT = Path(__file__).parents[2]
SUBSTITUTION = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def ours(compose: dict[str, Any]) -> dict[str, Any]:
    """The services that run our image."""
    return {name: one for name, one in compose["services"].items() if one.get("build") == "."}


def substituted(text: str) -> str:
    """As Compose does it, with the variables that must be given."""
    return SUBSTITUTION.sub(lambda found: found["default"] or "given", text)


def test_the_services(compose: dict[str, Any], ours: dict[str, Any]) -> None:
    assert set(ours) == {"core", "worker"}
    assert set(compose["services"]) - set(ours) == {"redis", "postgres"}
    assert ours["worker"]["deploy"]["replicas"] == 3


def test_their_commands_are_understood(ours: dict[str, Any]) -> None:
    for name, service in ours.items():
        command, options = parse(shlex.split(substituted(service["command"])))
        assert command == name
        if command == "worker":
            assert load_targets(options["targets"])
            assert options["control_plane"] == "http://core:8000"
        else:
            assert options["port"] == 8000
            assert options["queue"].startswith("redis://redis:")
            assert options["store"].startswith("postgresql://corral@postgres/")


def test_their_variables_are_read(ours: dict[str, Any]) -> None:
    known = variables()
    for service in ours.values():
        assert set(service["environment"]) <= known


def test_secrets_are_given_from_outside(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
        assert not re.search(r"://[^/\s]*:[^/\s]*@", str(service.get("command")))


def test_who_is_waited_for_has_a_health_check_and_volumes_are_declared(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert services[other]["healthcheck"]["test"]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]


def test_a_stop_leaves_time_to_drain(ours: dict[str, Any]) -> None:
    """And to end what is stuck after it."""
    for service in ours.values():
        _, options = parse(shlex.split(substituted(service["command"])))
        assert float(service["stop_grace_period"].removesuffix("s")) > options["drain_timeout"] + options["stuck_after"]


def test_the_image_has_the_extras_that_there_are() -> None:
    text = (ROOT / "Dockerfile").read_text()
    found = re.search(r"/build\[([\w,]+)\]", text)
    assert found is not None
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(found[1].split(",")) == set(extras) - {"bench", "dev"}


def test_the_top_of_the_file_names_what_must_be_given() -> None:
    text = (ROOT / "compose.yaml").read_text()
    required = {found["name"] for found in SUBSTITUTION.finditer(text) if found["default"] is None}
    loop = re.search(r"#   for name in (.+); do", text)
    assert loop is not None
    assert set(loop[1].split()) == required


def test_the_parser_refuses_what_there_is_not() -> None:
    with pytest.raises(Exception, match="nonsense"):
        parse(["core", "--nonsense"])
