"""python -m lfm_mlx, and the `lfm-mlx` command: all commands under one name.

    lfm-mlx chat
    lfm-mlx "Why is the sky blue?"

Without a command's name the arguments are a question, which `generate` answers.
"""

import difflib
import sys
from importlib.metadata import version
from typing import NoReturn

from lfm_mlx.cli.command import run
from lfm_mlx.cli.commands import COMMANDS
from lfm_mlx.cli.entry import start
from lfm_mlx.errors import InputError

USAGE = """usage: lfm-mlx COMMAND …
       lfm-mlx [OPTION …] "QUESTION"

  {commands}

lfm-mlx COMMAND --help lists a command's options; a question takes those of generate. Text that is
piped in is part of the question: cat notes.txt | lfm-mlx "Sum this up"."""


def main() -> int:
    """Run what sys.argv asks for; returns the exit code."""
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        del sys.argv[1]
        return start(first)
    if first in ("-h", "--help", "help") or (not arguments and sys.stdin and sys.stdin.isatty()):
        return run(lambda: print(usage()), "lfm-mlx")
    if first in ("-V", "--version"):
        return run(lambda: print(f"lfm_mlx {version('lfm_mlx')}"), "lfm-mlx")
    if len(arguments) == 1 and (meant := command_like(first)):
        return run(lambda: refuse(first, meant), "lfm-mlx")
    return start("generate")


def usage() -> str:
    """The commands, and how a question is asked."""
    lines = [f"{name:10} {command.summary}" for name, command in COMMANDS.items()]
    return USAGE.format(commands="\n  ".join(lines))


def command_like(word: str) -> str | None:
    """The command that a single word is nearly the name of."""
    return next(iter(difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)), None)


def refuse(word: str, meant: str) -> NoReturn:
    """Say that there is no such command, as InputError."""
    raise InputError(
        f"no command {word!r}; did you mean {meant}? As a question: lfm-mlx generate {word!r}"
    )


if __name__ == "__main__":
    sys.exit(main())
