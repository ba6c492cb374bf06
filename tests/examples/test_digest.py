"""The digest as a workflow: what it reads, what it says on the way, what it returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core import Settings
from llama_index.core.llms import MockLLM
from workflows.errors import WorkflowRuntimeError

from llama_corral.examples.digest import (
    ApprovalRequired,
    DigestWorkflow,
    FileProgress,
    FilesFound,
    SentencesRanked,
    digest,
)
from llama_corral.examples.digesting import sources

pytestmark = pytest.mark.anyio

TEXT = """The harbour of the town freezes in every winter. Ships wait outside of the harbour until spring comes.
In spring the harbour opens and all the ships come in. The town then celebrates its harbour for three days.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "harbour.txt").write_text(TEXT)
    return tmp_path


async def digest_of(run_example, *paths: Path | str, **start):
    return (await run_example(digest, paths=[str(path) for path in paths], **start)).result


async def test_the_samples_make_a_digest_offline(run_example, no_network):
    outcome = await run_example(digest)
    result = outcome.result
    assert result.title.startswith("Digest of 6 texts: ")
    assert len(result.sentences) == 5
    assert len({quote.file for quote in result.sentences}) == 5, "a digest says something about each text"
    assert result.skipped == []
    assert result.approved is None
    assert result.summary is None
    for quote in result.sentences:
        text = " ".join((sources.SAMPLES / quote.file).read_text().split())
        assert quote.text in text
        assert 0 < quote.score <= 1
    assert [source.file for source in result.sources] == sorted(path.name for path in sources.SAMPLES.iterdir())
    assert all(240 <= source.words <= 500 for source in result.sources)
    assert sum(source.picked for source in result.sources) == 5
    assert str(result).splitlines()[0] == result.title


async def test_progress_is_published_in_typed_events(run_example):
    outcome = await run_example(digest, sentences=3)
    (found,) = outcome.of(FilesFound)
    progress = outcome.of(FileProgress)
    (ranked,) = outcome.of(SentencesRanked)
    assert sorted(event.number for event in progress) == [1, 2, 3, 4, 5, 6]
    assert {event.file for event in progress} == set(found.files)
    assert all(event.total == 6 and event.bytes > 0 and event.skipped is None for event in progress)
    assert ranked.sentences == sum(event.sentences for event in progress)
    assert ranked.picked == 3
    kinds = [type(event) for event in outcome.events]
    assert kinds.index(FilesFound) < kinds.index(FileProgress) < kinds.index(SentencesRanked)


async def test_the_same_input_gives_the_same_digest(run_example):
    first, second = [(await run_example(digest, sentences=10)).result for _ in range(2)]
    assert json.dumps(first.model_dump(mode="json")) == json.dumps(second.model_dump(mode="json"))


async def test_what_cannot_be_read_is_listed_with_the_reason(run_example, folder: Path):
    (folder / "binary.txt").write_bytes(b"text\0\x01\x02")
    (folder / "latin.txt").write_bytes("Über den Fluß".encode("latin-1"))
    (folder / "huge.txt").write_text(TEXT * 100)
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    missing = [str(folder / name) for name in ("missing.txt", "empty", "pipe", "nul\0.txt")]
    outcome = await run_example(digest, paths=[str(folder), *missing], max_bytes=2000)
    reasons = {Path(skipped.file).name: skipped.reason for skipped in outcome.result.skipped}
    assert reasons.keys() == {
        *("binary.txt", "latin.txt", "huge.txt", "blank.txt", "missing.txt", "empty", "pipe", "nul\0.txt")
    }
    assert reasons["binary.txt"] == "a binary file"
    assert reasons["latin.txt"] == "not UTF-8 (at byte 0)"
    assert reasons["huge.txt"] == "larger than max_bytes (2,000)"
    assert reasons["blank.txt"] == "no text in it"
    assert reasons["missing.txt"] == "No such file or directory"
    assert reasons["empty"].startswith("a folder without texts")
    assert reasons["pipe"] == "not a regular file"
    assert [Path(source.file).name for source in outcome.result.sources] == ["harbour.txt"]
    assert {Path(event.file).name for event in outcome.of(FileProgress) if event.skipped} == reasons.keys()
    assert "(skipped " in str(outcome.result)


async def test_nothing_readable_is_an_empty_digest(run_example, tmp_path: Path):
    result = await digest_of(run_example, tmp_path)
    assert (result.title, result.sentences, result.keywords) == ("Nothing to digest", [], [])
    assert len(result.skipped) == 1


@pytest.mark.parametrize("start", [{"paths": []}, {"paths": "a.txt"}, {"sentences": 0}, {"sentences": 51}])
async def test_a_wrong_request_does_not_start(run_example, start):
    with pytest.raises(WorkflowRuntimeError, match="start event"):
        await run_example(digest, **start)


async def test_texts_of_any_script_are_quoted_as_they_are(run_example, tmp_path: Path):
    (tmp_path / "река.txt").write_text(
        "\ufeffРека течёт через старый город к морю. Весной река поднимается и заливает луга. "
        "Летом дети купаются в реке до вечера. Naïve señores trinken café à la crème im Wirtshaus.",
        encoding="utf-8",
    )
    result = await digest_of(run_example, tmp_path / "река.txt", sentences=4)
    assert [quote.position for quote in result.sentences] == [1, 2, 3, 4]
    assert result.sentences[0].text == "Река течёт через старый город к морю."
    assert "река" in result.keywords


async def test_markdown_gives_sections_and_reads_as_prose(run_example, tmp_path: Path):
    (tmp_path / "notes.md").write_text(
        "# Ships\n\nThe **old** ship lies in [the harbour](http://example.invalid/x) since `1912`.\n\n"
        "```python\n# not a heading. Not a sentence that anybody should read here.\n```\n\n"
        "## Crew\n\n- The crew of the ship numbered forty sailors\n- The captain_of_the_ship came from a small island\n"
    )
    result = await digest_of(run_example, tmp_path, sentences=9)
    assert [(quote.section, quote.text) for quote in result.sentences] == [
        ("Ships", "The old ship lies in the harbour since 1912."),
        ("Crew", "The crew of the ship numbered forty sailors"),
        ("Crew", "The captain_of_the_ship came from a small island"),
    ]


@pytest.mark.parametrize(("answer", "approved"), [("yes", True), ("No ", False)])
async def test_a_person_decides(run_example, folder: Path, answer: str, approved: bool):
    outcome = await run_example(digest, paths=[str(folder)], sentences=2, approve=True, answers=[answer])
    (question,) = outcome.of(ApprovalRequired)
    assert question.preview == outcome.result.sentences
    assert question.answers == ("yes", "no", "shorter")
    assert outcome.result.approved is approved
    assert len(outcome.result.sentences) == 2


async def test_a_person_may_want_it_shorter(run_example):
    answers = ["shorter", "what?", "shorter", "shorter", "shorter", "yes"]
    outcome = await run_example(digest, sentences=5, approve=True, answers=answers)
    asked = [(len(question.preview), question.problem) for question in outcome.of(ApprovalRequired)]
    assert asked == [
        (5, None),
        (3, None),
        (3, "please answer yes, no or shorter"),
        (2, None),
        (1, None),
        (1, "it cannot be shorter"),
    ]
    assert len(outcome.result.sentences) == 1
    assert sum(source.picked for source in outcome.result.sources) == 1


async def test_nothing_outside_of_the_root_is_read(run_example, folder: Path):
    (folder / "secret.txt").write_text(TEXT)
    inside = folder / "inside"
    inside.mkdir()
    (inside / "open.txt").write_text(TEXT)
    (inside / "link.txt").symlink_to(folder / "secret.txt")
    rooted = DigestWorkflow(root=str(inside))
    paths = ["open.txt", "link.txt", "../secret.txt", "..", str(folder / "secret.txt")]
    result = (await run_example(rooted, paths=paths)).result
    assert [source.file for source in result.sources] == ["open.txt"]
    assert [skipped.file for skipped in result.skipped] == paths[1:]
    assert {skipped.reason for skipped in result.skipped} == {"outside of the folder that may be read"}
    everything = (await run_example(rooted)).result
    assert [source.file for source in everything.sources] == ["open.txt"]


async def test_too_many_files_are_cut_off_and_said(run_example, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MAX_FILES", 3)
    for number in range(5):
        (folder / f"more{number}.txt").write_text(TEXT)
    result = await digest_of(run_example, folder, folder)
    assert [Path(source.file).name for source in result.sources] == ["harbour.txt", "more0.txt", "more1.txt"]
    assert [skipped.reason for skipped in result.skipped] == ["not looked at: there are more than 3 files"]


async def test_a_configured_model_writes_the_summary(run_example, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    result = await digest_of(run_example, folder, sentences=1)
    assert result.sentences[0].text in result.summary  # the mock repeats its prompt
    assert result.summary in str(result)


async def test_a_model_that_fails_leaves_the_digest(run_example, folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(MockLLM):
        def complete(self, *args, **kwargs):
            raise ConnectionError("no route to the model")

    monkeypatch.setattr(Settings, "_llm", Broken())
    result = await digest_of(run_example, folder)
    assert (result.summary, result.summary_error) == (None, "ConnectionError: no route to the model")
    assert result.sentences


def test_importing_an_example_is_light(tmp_path: Path):
    """No llama-index-core, no file, no network: the command line lists the examples without waiting for them."""
    code = (
        "import sys, llama_corral.examples.digest, llama_corral.examples.form, llama_corral.examples.counter\n"
        "assert 'llama_index.core' not in sys.modules and 'nltk' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
