"""Runs that ask to be tried again, through the whole system."""

from __future__ import annotations

import pytest

from llama_corral.client import Client, SyncClient
from llama_corral.exceptions import BadInput, TaskFailed
from llama_corral.protocol.messages import new_id


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_a_run_is_tried_again_where_it_asks_for_it(url: str, anyio_backend: str) -> None:
    async with Client(url) as client:
        name = new_id()
        again = {"max_attempts": 3, "retry_on": ["OSError"], "backoff": 0.01}
        assert await client.run("flaky", name=name, failures=2, **again) == 3
        other = new_id()
        with pytest.raises(TaskFailed, match="attempt 3"):
            await client.run("flaky", name=other, failures=3, **again)
        for options in ({}, {"retry_on": "ValueError"}, {"max_attempts": 5}):
            with pytest.raises(TaskFailed, match="attempt 1"):
                await client.run("flaky", name=new_id(), failures=1, **options)
        with pytest.raises(BadInput, match="no error"):
            await client.run("flaky", name=name, failures=0, backoff=1)


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_the_sync_client_asks_for_it_too(url: str, backend: str) -> None:
    with SyncClient(url, backend=backend) as client:  # type: ignore[arg-type]
        name = new_id()
        assert client.run("flaky", name=name, failures=1, retry_on="*", backoff=0.01) == 2
