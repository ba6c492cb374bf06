"""Each promise of the design has tests that name it. `pytest --collect-only -q --promises` lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import PROMISES

MARK = re.compile(r"mark\.promise\(([^)]*)\)")


def named() -> set[str]:
    texts = (path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    return {name for text in texts for found in MARK.findall(text) for name in re.findall(r"P\d+", found)}


@pytest.mark.parametrize("promise", PROMISES)
def test_it_has_tests(promise: str) -> None:
    assert promise in named()
