"""The page for operators names commands, options, variables and pages that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .programs import options, parse, variables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "deploy.md").read_text()
OURS = re.compile(r"\b(?:CORRAL|CONTROL_PLANE|LLAMA_DEPLOY)_[A-Z_]+\b")


def test_its_commands_are_understood() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("corral ")]
    assert {parse(command)[0] for command in commands} >= {"serve", "core", "worker"}


def test_its_options_and_variables_exist() -> None:
    assert set(re.findall(r"(?<=[`\s])--[a-z][a-z-]+", PAGE)) <= options()
    assert set(OURS.findall(PAGE)) <= variables()


def test_its_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", PAGE):
        page = DOCS / target if target else DOCS / "deploy.md"
        assert page.is_file(), target
        headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        assert not anchor or anchor[1:] in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
