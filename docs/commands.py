"""Writes docs/commands.md, which shows what every command of this package says with -h: `make docs`."""

import os
import textwrap
from pathlib import Path

from nnunetv2_semicml.command_line import PARSERS

WIDTH = 100
HEAD = """# Commands

What the commands of this package say with `-h`, in the order in which they are used. `make docs` writes this page; to
change it, change [command_line.py](../nnunetv2_semicml/command_line.py).
"""


def page() -> str:
    """The page, the same in every terminal and with every version of Python, which break usages in different places."""
    os.environ |= {"COLUMNS": str(WIDTH), "PYTHON_COLORS": "0"}
    sections = [HEAD]
    for make_parser in PARSERS:
        parser = make_parser()
        usage, text = parser.format_help().split("\n\n", maxsplit=1)
        words = " ".join(usage.split())
        usage = textwrap.fill(words, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        sections.append(f"## {parser.prog}\n\n```text\n{usage}\n\n{text.rstrip()}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
