from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .corral import Corral, open_corral


@pytest.fixture
async def corral(anyio_backend: str) -> AsyncIterator[Corral]:
    async with open_corral() as opened:
        yield opened
