"""What the documentation says runs: every Python block of the README, and every command line in it parses."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})  # our own documentation
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", re.findall(r"^residuum .*$", README, re.MULTILINE))
def test_commands_parse(line: str) -> None:
    import tyro

    from residuum.flags import Command

    flags = tyro.cli(Command, args=shlex.split(line)[1:])
    assert type(flags).__name__.lower().removesuffix("command") == line.split()[1]


def test_readme_is_short_and_its_links_exist() -> None:
    assert len(README.splitlines()) < 200
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
