"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_and_print_what_their_comments_say(number):
    block = BLOCKS[number]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, f"README block {number}", "exec"), {})
    lines = [line for line in block.splitlines() if line.startswith("print(")]
    for line, shown in zip(lines, printed.getvalue().splitlines(), strict=True):
        _, comment, said = line.partition("  # ")
        if comment:
            assert shown == said.split(": ")[0]


def test_blocks_are_found():
    assert len(BLOCKS) >= 3
