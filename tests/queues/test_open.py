from __future__ import annotations

import pytest

from llama_corral.exceptions import SetupError
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import MemoryMessageQueue, open_queue


@pytest.mark.anyio
async def test_memory() -> None:
    async with open_queue("memory://?max_messages=1") as queue:
        assert isinstance(queue, MemoryMessageQueue)
        assert not queue.durable
        await queue.publish(QueueMessage(), "t")


@pytest.mark.promise("P9", "P11")
@pytest.mark.parametrize(
    "url",
    [
        "kafka://user:hunter2@h/0",
        "nonsense",
        "",
        "://",
        "memory:/",
        "memory://hunter2",
        "memory://?max_messages=0",
        "memory://?max_messages=",
        "memory://?max_messages=-1",
        "memory://?hunter=2",
        "redis://:12#hunter2@host/0",
        "redis://host:1,hunter2:2",
        "amqp://user:12/hunter2@host",
        "nats://user:12?hunter2@host",
    ],
)
def test_what_cannot_be_opened_says_why_and_tells_no_secret(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        open_queue(url)
    assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.fields}"
    if "host" not in url and "memory://" not in url:
        assert "memory://" in str(caught.value.hint)
