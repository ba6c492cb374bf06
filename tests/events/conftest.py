from __future__ import annotations

import pytest

from llama_corral.events import Changes

from .fakes import FakeLog


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def store(changes: Changes) -> FakeLog:
    return FakeLog(changes)
