"""The fenced blocks of the README."""

from __future__ import annotations

import re
from pathlib import Path

import qsparse_moe

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# These run the tests, or everything at once: .ci/run starts them.
OWN_CI_STEP = ("bash launch/quickstart.sh", "bash launch/test.sh")


def blocks(language: str) -> list[str]:
    """The text of every block fenced as ``language``, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of every bash block, on one line."""
    return [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]


def launch_commands() -> list[str]:
    """The commands that start a script for other machines, and what they need before."""
    (block,) = (block for block in blocks("bash") if "launch/local.sh" in block)
    return block.splitlines()


def session_commands() -> list[str]:
    """The commands that a user types in one session after the other."""
    return [line for line in commands() if line not in (*OWN_CI_STEP, *launch_commands())]
