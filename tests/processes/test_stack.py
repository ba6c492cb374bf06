"""The stack of processes itself: ready when it says so, and nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llama_corral.client import Client
from llama_corral.testing import Stack, open_stack

pytestmark = [pytest.mark.process, pytest.mark.anyio]
HELLO = "llama_corral.examples.hello:hello"


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_it_starts_stops_and_starts_again(tmp_path: Path) -> None:
    async with open_stack([HELLO], folder=tmp_path) as stack, Client(stack.url) as client:
        url, pid = stack.url, stack.main.pid
        assert await client.run("hello", name="Ada") == "Hello, Ada!"
        task = await client.start("hello", name="Bob")
        assert await task.result() == "Hello, Bob!"
        stack.main.terminate()
        assert await stack.main.wait_exit() == 0
        assert not stack.main.running
        await stack.main.restart()
        assert (stack.url, stack.main.pid == pid) == (url, False)
        assert await task.result() == "Hello, Bob!"
        stack.main.kill()
        assert await stack.main.wait_exit() == -signal.SIGKILL
        await stack.main.restart()
        last = stack.main.pid
    assert not lives(last)
    assert stack.store_path.exists()
    assert stack.main.log_path.read_text().count("corral ready at") == 3


async def test_it_ends_with_its_block_and_shows_what_was_printed() -> None:
    found: list[Stack] = []

    async def fail() -> None:
        async with open_stack([HELLO]) as stack:
            found.append(stack)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        await fail()
    assert not lives(found[0].main.pid)
    assert "corral ready at" in caught.value.__notes__[0]
    assert not found[0].folder.exists()


async def test_a_program_that_cannot_start() -> None:
    with pytest.raises(RuntimeError, match="'nonsense' is no target"):
        async with open_stack(["nonsense"]):
            pass


DYING = """
import os, anyio
from llama_corral.testing import open_stack

async def main():
    async with open_stack(["llama_corral.examples.hello:hello"]) as stack:
        print(stack.main.pid, flush=True)
        os._exit(3)  # as a test run does that is out of time

anyio.run(main, backend="trio")
"""


def test_it_ends_with_the_process_of_the_tests() -> None:
    done = subprocess.run([sys.executable, "-c", DYING], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 3
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(20)
