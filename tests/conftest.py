"""Backends, promises and what every test may rely on.

Tests for both backends are marked `anyio` and take their backend from the `anyio_backend` fixture; tests that need Trio
alone are marked `trio` (pytest-trio). A test that proves a promise of the design is marked `promise("P1")`.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import hypothesis
import pytest

# Before anything imports it: the bare asserts of contract suites are to say what they compared.
pytest.register_assert_rewrite("llama_corral.testing.queues", "llama_corral.testing.brokers")

# No test asserts a time: an example that is slow on a busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

PROMISES = {
    "P1": "one ending",
    "P2": "at least once, one outcome",
    "P3": "gap-free streams",
    "P4": "context is safe",
    "P5": "state change and publish are one",
    "P6": "cancellation is real",
    "P7": "drain",
    "P8": "shutdown deletes nothing that others use",
    "P9": "bad input fails at the door",
    "P10": "nothing polls",
    "P11": "nothing untrusted is executed",
    "P12": "memory is bounded",
}


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("promise"):
            unknown = set(mark.args) - PROMISES.keys()
            if unknown or not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: unknown promise {sorted(unknown)}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", action="store_true", help="list which of the chosen tests prove which promise")


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if not config.getoption("--promises"):
        return []
    proofs: dict[str, dict[str, None]] = {promise: {} for promise in PROMISES}
    for item in items:
        for mark in item.iter_markers("promise"):
            for promise in mark.args:
                proofs[promise][item.nodeid.partition("[")[0]] = None
    lines: list[str] = []
    for promise, tests in proofs.items():
        lines += [f"{promise} {PROMISES[promise]}: {len(tests)} tests", *(f"  {test}" for test in tests)]
    return lines


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test skips itself where what it needs is not there; its reason names the `CORRAL_TEST_...` variable that tells
    where it is. Where everything is installed (CI), such a skip is a failure."""
    report = yield
    if report.skipped and "CORRAL_TEST_" in str(report.longrepr) and os.environ.get("CORRAL_TEST_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be missing: {report.longrepr}"
    return report
