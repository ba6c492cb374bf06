"""The original's own client (PyPI llama-deploy 0.6.1, in an environment of its own) works unchanged.

`CORRAL_TEST_LLAMA_DEPLOY` names the Python of that environment; `.ci/run` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = os.environ.get("CORRAL_TEST_LLAMA_DEPLOY")
SERVICES = ["echo", "streaming", "human", "waiting", "counting", "failing"]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A real `corral serve` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "llama_corral.cli",
        "serve",
        "--port",
        "0",
        "--store",
        f"sqlite:///{tmp_path}/c.db",
    ]
    served = [f"{HERE / 'served.py'}:{name}" for name in SERVICES]
    with subprocess.Popen([*command, *served], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("corral ready at http://"), ready
        yield ready.split()[-1]
        process.terminate()
        assert process.wait(timeout=20) == 0


@pytest.mark.process
@pytest.mark.promise("P1", "P3", "P4")
@pytest.mark.timeout(120)
@pytest.mark.skipif(PYTHON is None, reason="CORRAL_TEST_LLAMA_DEPLOY names no Python with llama-deploy==0.6.1")
def test_original_client(url: str) -> None:
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(HERE / "original_client.py"), url], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["services"] == sorted(SERVICES)
    assert seen["listed"]
    assert seen["got"]
    assert seen["unknown_session"] == 404
    assert seen["run"] == "hello_result"
    assert seen["tasks"] == ["echo"]
    assert [event["progress"] for event in seen["stream"] if "progress" in event] == [0.3, 0.6, 0.9]
    assert seen["stream_result"] == "events_streamed"
    assert seen["human"] == ["42", "42"]
    assert seen["counts"] == ["1", "2", "1"]
    assert seen["failure"] == "the llama refused to move"
    assert seen["fifty"] == 50
    assert seen["deleted"] == 404
