"""The examples of the documentation do what it says they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..runtime.scripted_llm import ScriptedLLM, call, in_turn

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(
    r"<!-- run: (?P<backends>[a-z ]+)(?:, given (?P<given>\w+))? -->\n"
    r"```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```",
    re.DOTALL,
)


def snippets():
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for number, match in enumerate(SNIPPET.finditer(text)):
            line = text.count("\n", 0, match.start("code")) + 1
            for backend in match["backends"].split():
                yield pytest.param(page, line, match, backend, id=f"{page.stem}-{number}-{backend}")


def given(name):
    """What an example takes for granted."""
    return {"llm": ScriptedLLM(in_turn([call("add", a=1, b=2)], "it is 3"))} if name == "llm" else {}


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # upstream's, about agents
@pytest.mark.parametrize(("page", "line", "match", "backend"), list(snippets()))
def test_it_prints_what_the_page_shows(page, line, match, backend, capsys):
    code = re.sub(r'backend="\w+"', f'backend="{backend}"', match["code"])
    source = "\n" * (line - 1) + code  # so that a traceback shows the page's own lines
    exec(compile(source, str(page), "exec"), {"__name__": "__main__", **given(match["given"])})
    assert capsys.readouterr().out == match["output"]


def test_no_example_is_left_out():
    """What is a whole program is run; the rest is a part of one."""
    for page in (ROOT / "docs").glob("*.md"):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        assert sum(".run(main" in code for code in blocks) == len(SNIPPET.findall(page.read_text()))


def test_the_readmes_example(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(code for code in blocks if "anyio.run" in code)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "llama: yes\ngone\n"
