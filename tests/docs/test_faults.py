"""The table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| ([A-D]\d+) \|.*\| ([^|]+) \|")
PLACES = {"testing": ROOT / "src" / "llama_corral"}


def test_every_fault_has_tests_that_exist() -> None:
    rows = dict(ROW.findall((ROOT / "docs" / "faults.md").read_text()))
    assert [len([fault for fault in rows if fault[0] == group]) for group in "ABCD"] == [22, 24, 21, 16]
    missing = []
    for fault, cell in rows.items():
        named = re.findall(r"`([^`:]+)::(\w+)`", cell)
        assert named, fault
        for path, name in named:
            file = PLACES.get(path.split("/")[0], ROOT / "tests") / path
            if not file.is_file() or not re.search(rf"\bdef {name}\(", file.read_text()):
                missing.append(f"{fault}: {path}::{name}")
    assert not missing, "\n".join(missing)
