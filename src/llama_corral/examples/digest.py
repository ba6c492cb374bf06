"""A digest of texts: reads files side by side, picks the sentences that matter, asks a person if it should.

    result = await run_workflow(digest)                               # the texts that ship with the package
    result = await run_workflow(digest, paths=["docs/"], sentences=8)

Served: `corral serve llama_corral.examples.digest:digest`. It needs no network and no model. Where the application has
set `llama_index.core.Settings.llm`, that model writes a summary of the picked sentences as well.

It reads every file that its process may read and that it is asked for. `DigestWorkflow(root="/srv/texts")` reads below
one folder only: use that where you do not trust everyone who can reach the service.

    DigestRequest -> find -> list[FileToRead] -> read (4 at a time) -> list[FileRead] -> rank -> Drafted
                  -> approve (may wait for a person) -> Decided -> write -> Digest
"""

from __future__ import annotations

import anyio.to_thread
from pydantic import BaseModel, Field
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from .digesting import sources
from .digesting.draft import Draft, Quote, SourceStats, make_draft, summarize


class Skipped(BaseModel):
    """A file that is not part of the digest, and why."""

    file: str
    reason: str


class DigestRequest(StartEvent):
    """What to digest. `paths` are files and folders; without them it is the texts that ship with the package."""

    paths: list[str] | None = Field(default=None, min_length=1)
    sentences: int = Field(default=5, ge=1, le=50)
    approve: bool = False
    max_bytes: int = Field(default=1_000_000, ge=1)


class FilesFound(Event):
    """Progress: these files will be read."""

    files: list[str]


class FileProgress(Event):
    """Progress: file `number` (from 1) of `total` was read, or `skipped` says why not. They come in any order."""

    file: str
    number: int
    total: int
    bytes: int = 0
    sentences: int = 0
    skipped: str | None = None


class SentencesRanked(Event):
    """Progress: `picked` of `sentences` sentences were picked."""

    sentences: int
    picked: int
    keywords: list[str]


class ApprovalRequired(InputRequiredEvent):
    """Asks for one of `answers`, as in `HumanResponseEvent(response="yes")`. After "shorter" it is asked again with
    fewer sentences; after anything else with the reason in `problem`."""

    prefix: str = "Publish this digest?"
    preview: list[Quote]
    answers: tuple[str, ...] = ("yes", "no", "shorter")
    problem: str | None = None


class FileToRead(Event):
    number: int
    total: int
    file: str
    path: str
    max_bytes: int


class FileRead(Event):
    number: int
    file: str
    text: sources.Text | None = None
    skipped: str | None = None


class Drafted(Event):
    draft: Draft
    skipped: list[Skipped]
    problem: str | None = None


class Decided(Event):
    draft: Draft
    skipped: list[Skipped]
    approved: bool | None


class Digest(StopEvent):
    """The result. `sentences` stand in reading order. `approved` is None when nobody was asked; a digest that was
    refused keeps its sentences. `summary` is the configured model's; `summary_error` says why it could not write."""

    title: str
    sentences: list[Quote]
    keywords: list[str]
    sources: list[SourceStats]
    skipped: list[Skipped]
    approved: bool | None
    summary: str | None = None
    summary_error: str | None = None

    def __str__(self) -> str:
        lines = [self.title, *([self.summary] if self.summary else [])]
        lines += [f"- {quote.text} [{quote.file}:{quote.position}]" for quote in self.sentences]
        lines += [f"(skipped {skipped.file}: {skipped.reason})" for skipped in self.skipped]
        return "\n".join(lines)


class DigestState(BaseModel):
    """What later steps need to know of the request."""

    sentences: int = 5
    approve: bool = False
    more_files: bool = False


class DigestWorkflow(Workflow):
    """Takes a `DigestRequest`, publishes its progress, answers with a `Digest`.

    `root`: read below this folder only; `paths` are then relative to it, and without paths all of it is read.
    """

    def __init__(self, *, root: str | None = None) -> None:
        super().__init__(timeout=None)  # a person may take longer than any timeout
        self.root = root

    @step
    async def find(self, ctx: Context[DigestState], ev: DigestRequest) -> list[FileToRead]:
        found, more = await anyio.to_thread.run_sync(sources.find, ev.paths, self.root)
        await ctx.store.set_state(DigestState(sentences=ev.sentences, approve=ev.approve, more_files=more))
        ctx.write_event_to_stream(FilesFound(files=[file for file, _ in found]))
        return [
            FileToRead(number=number, total=len(found), file=file, path=path, max_bytes=ev.max_bytes)
            for number, (file, path) in enumerate(found, start=1)
        ]

    @step(num_workers=4)
    async def read(self, ctx: Context[DigestState], ev: FileToRead) -> FileRead:
        read = FileRead(number=ev.number, file=ev.file)
        progress = FileProgress(number=ev.number, total=ev.total, file=ev.file)
        try:
            read.text = await anyio.to_thread.run_sync(sources.read, ev.path, ev.max_bytes, self.root)
            progress.bytes = read.text.bytes
            progress.sentences = len(read.text.sentences())
        except sources.UnreadableError as error:
            read.skipped = progress.skipped = str(error)
        ctx.write_event_to_stream(progress)
        return read

    @step
    async def rank(self, ctx: Context[DigestState], files: list[FileRead]) -> Drafted:
        state = await ctx.store.get_state()
        files = sorted(files, key=lambda file: file.number)  # they come in the order in which they were ready
        texts = {file.file: file.text for file in files if file.text is not None}
        skipped = [Skipped(file=file.file, reason=file.skipped) for file in files if file.skipped is not None]
        if state.more_files:
            reason = f"not looked at: there are more than {sources.MAX_FILES} files"
            skipped.append(Skipped(file="(more files)", reason=reason))
        draft = await anyio.to_thread.run_sync(make_draft, texts, state.sentences)
        total = sum(source.sentences for source in draft.sources)
        ctx.write_event_to_stream(SentencesRanked(sentences=total, picked=len(draft.quotes), keywords=draft.keywords))
        return Drafted(draft=draft, skipped=skipped)

    @step
    async def approve(self, ctx: Context[DigestState], ev: Drafted) -> Drafted | Decided:
        draft = ev.draft
        if not (await ctx.store.get_state()).approve:
            return Decided(draft=draft, skipped=ev.skipped, approved=None)
        question = ApprovalRequired(preview=draft.in_reading_order(), problem=ev.problem)
        event = await ctx.wait_for_event(HumanResponseEvent, waiter_event=question, timeout=None)
        # When the answer comes the step runs again from its beginning, and this time it gets here. It waits only once:
        # to ask again it returns the event that starts it.
        answer = str(event.get("response", "")).strip().lower()
        if answer in ("yes", "no"):
            return Decided(draft=draft, skipped=ev.skipped, approved=answer == "yes")
        if answer != "shorter":
            return Drafted(draft=draft, skipped=ev.skipped, problem="please answer yes, no or shorter")
        if len(draft.quotes) <= 1:
            return Drafted(draft=draft, skipped=ev.skipped, problem="it cannot be shorter")
        return Drafted(draft=draft.shortened((len(draft.quotes) + 1) // 2), skipped=ev.skipped)

    @step
    def write(self, ev: Decided) -> Digest:
        # A step without `async` runs in a worker thread: a call to a model may block there.
        summary, error = (None, None) if ev.approved is False else summarize(ev.draft)
        return Digest(
            title=ev.draft.title,
            sentences=ev.draft.in_reading_order(),
            keywords=ev.draft.keywords,
            sources=ev.draft.statistics(),
            skipped=ev.skipped,
            approved=ev.approved,
            summary=summary,
            summary_error=error,
        )


digest = DigestWorkflow()
