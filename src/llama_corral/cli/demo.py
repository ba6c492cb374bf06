"""`corral demo`: the whole system in one process, at work on real texts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ..exceptions import BadInput
from ._program import run_program


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("demo")(demo)


def demo(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Files and folders to digest; without them the texts of the package."),
    ] = None,
    sentences: Annotated[int, typer.Option(help="Sentences of the digest.", min=1, max=50)] = 6,
    approve: Annotated[bool, typer.Option("--approve", help="Ask for approval at the terminal.")] = False,
) -> None:
    """Digest texts through the whole system: client, control plane, queue, service, runtime, and events back.

    Everything runs in this process, on a free port, with a store that is removed afterwards. Needs no network.
    """

    def prepare() -> Any:
        from ..deploy import DeployOptions
        from ..settings import ServerSettings
        from ..web import configure_logging

        for path in paths or []:
            if not Path(path).exists():
                raise BadInput(f"there is no file or folder {path}")
        configure_logging("text", level="WARNING")
        options = DeployOptions(settings=ServerSettings(port=0, token=None), drain_timeout=1.0)
        request: dict[str, Any] = {"sentences": sentences, "approve": approve}
        if paths:
            request["paths"] = [str(Path(path).resolve()) for path in paths]
        return request, options

    sys.exit(run_program(prepare, _demo, drain_timeout=1.0))


async def _demo(prepared: Any, stop: Any) -> int:
    from dataclasses import replace
    from functools import partial

    import trio

    from ..deploy import Deployment, deploy_all
    from ..examples.digest import digest

    request, options = prepared
    with tempfile.TemporaryDirectory(prefix="corral-demo-") as folder:
        options = replace(options, store_url=f"sqlite:///{folder}/corral.db")
        async with trio.open_nursery() as nursery:
            deployment: Deployment = await nursery.start(partial(deploy_all, {"digest": digest}, options, stop=stop))
            try:
                code = await _digest(deployment.url, request, stop)
            finally:
                stop.set()
    return code


async def _digest(url: str, request: dict[str, Any], stop: Any) -> int:
    """Run the task as any client would, over HTTP, and show what comes back."""
    import trio

    from ..client import Client
    from ..supervision import EXIT_OK

    code = 130  # unless it ends before Ctrl-C
    print(f"core, queue, service and store are up: {url} (stops when this is done)")
    async with Client(url) as client, trio.open_nursery() as nursery:

        async def cancel_on_stop() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel_on_stop)
        session = await client.sessions.create()
        task = await session.start("digest", **request)
        print(f"session {session.id}\ntask    {task.id}\n")
        async for event in task.events():
            await _show(task, event)
        _show_digest(await task.result())
        code = EXIT_OK
        nursery.cancel_scope.cancel()
    return code


async def _show(task: Any, event: Any) -> None:
    data = event.data
    if event.type == "FilesFound":
        print(f"{event.index:3}  found {len(data['files'])} files")
    elif event.type == "FileProgress":
        what = (
            f"skipped: {data['skipped']}"
            if data["skipped"]
            else f"{data['bytes']} bytes, {data['sentences']} sentences"
        )
        print(f"{event.index:3}  read {data['number']}/{data['total']}  {data['file']}: {what}")
    elif event.type == "SentencesRanked":
        print(f"{event.index:3}  ranked {data['sentences']} sentences, picked {data['picked']}")
    elif event.type == "ApprovalRequired":
        await _ask(task, data)


async def _ask(task: Any, question: dict[str, Any]) -> None:
    import trio

    if question.get("problem"):
        print(f"     {question['problem']}")
    for quote in question["preview"]:
        print(f"     - {quote['text']}")
    prompt = f"{question['prefix']} [{'/'.join(question['answers'])}] "
    answer = await trio.to_thread.run_sync(input, prompt, abandon_on_cancel=True)
    await task.send_event("HumanResponseEvent", {"response": answer})


def _show_digest(digest: dict[str, Any]) -> None:
    print(f"\n{digest['title']}\n{'=' * len(digest['title'])}\n")
    if digest.get("summary"):
        print(f"{digest['summary']}\n")
    for quote in digest["sentences"]:
        print(f"  * {quote['text']}\n    [{quote['file']}, sentence {quote['position']}]")
    print(f"\nkeywords: {', '.join(digest['keywords'])}")
    for skipped in digest["skipped"]:
        print(f"skipped {skipped['file']}: {skipped['reason']}")
    if digest["approved"] is not None:
        print("approved" if digest["approved"] else "not approved")
