"""TARGETs of the command line: what each kind loads, and what is said of the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llama_corral.cli.targets import load_targets
from llama_corral.exceptions import TargetError
from llama_corral.runtime import run_workflow

APP = """
from llama_corral.examples.hello import hello as fine

number = 3
Fine = type(fine)

class Picky(type(fine)):
    def __init__(self, needed):
        super().__init__()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "targets_app.py").write_text(APP)
    (tmp_path / "targets_broken.py").write_text("raise RuntimeError('on purpose')\n")
    (tmp_path / "targets_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("targets_app", "targets_broken", "targets_flow"):
        sys.modules.pop(name, None)


def test_modules_files_names_and_classes() -> None:
    here = Path.cwd() / "targets_app.py"
    loaded = load_targets(["targets_app:fine", "other=targets_app.py:fine", "made=targets_app:Fine"])
    assert list(loaded) == ["fine", "other", "made"]
    assert list(load_targets([f"{here}:fine"])) == ["fine"]
    assert {type(workflow).__name__ for workflow in loaded.values()} == {"HelloWorkflow"}
    assert loaded["fine"] is loaded["other"]


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (["nonsense"], ["'nonsense' is no target", "module:attribute"]),
        (["=targets_app:fine"], ["is no target"]),
        (["a/b=targets_app:fine"], ["'a/b' is no name for a service"]),
        (["a\nb=targets_app:fine"], ["'a\\nb' is no name for a service"]),
        (["..=targets_app:fine"], ["'..' is no name for a service"]),
        (["targets_exits:x"], ["targets_exits cannot be imported: SystemExit: 3"]),
        (["targets_exits.py:x"], ["targets_exits.py cannot be imported: SystemExit: 3"]),
        (["no_such_module:x"], ["no_such_module cannot be imported", "ModuleNotFoundError"]),
        (["no_such_file.py:x"], ["no file no_such_file.py"]),
        (["targets_app:nothing"], ["targets_app has no attribute 'nothing'", "it has: fine"]),
        (["targets_app:number"], ["targets_app:number is a int, not a workflow"]),
        (["targets_broken:x"], ["targets_broken cannot be imported: RuntimeError: on purpose"]),
        (["targets_broken.py:x"], ["targets_broken.py cannot be imported: RuntimeError: on purpose"]),
        (["targets_app:fine", "targets_app.py:fine"], ["two targets are named 'fine'"]),
        (["targets_app:Picky"], ["cannot be made without arguments"]),
    ],
)
def test_bad_targets(targets: Sequence[str], parts: Sequence[str]) -> None:
    with pytest.raises(TargetError) as caught:
        load_targets(list(targets))
    shown = f"{caught.value} ({caught.value.hint})"
    for part in parts:
        assert part in shown


FLOW = """
from __future__ import annotations

from pydantic import BaseModel
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent


class Part(BaseModel):
    {field}: int = {value}


class Whole(StartEvent):
    part: Part = Part()


class Flow(Workflow):
    @step
    async def work(self, ev: Whole) -> StopEvent:
        return StopEvent(result=ev.part.{field})


flow = Flow()
"""


@pytest.mark.anyio
async def test_files_of_one_name_in_two_folders_are_two_workflows(tmp_path: Path) -> None:
    targets = []
    for value, field in enumerate(("first", "second")):
        folder = tmp_path / field
        folder.mkdir()
        (folder / "targets_flow.py").write_text(FLOW.format(field=field, value=value))
        targets.append(f"{field}={folder / 'targets_flow.py'}:flow")
    loaded = load_targets(targets)
    assert [await run_workflow(workflow) for workflow in loaded.values()] == [0, 1]
    assert [await run_workflow(flow, part={name: 5}) for name, flow in loaded.items()] == [5, 5]
