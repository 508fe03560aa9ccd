"""The end of a command: exit codes, and the one line that says what went wrong.

0 done, 2 wrong use or bad input (one line on stderr, which begins with `error:`), 130 interrupted.
Everything a user can get wrong raises InputError; any other exception is a fault of ours and keeps
its traceback.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lfm_mlx.cli import streams
from lfm_mlx.cli.spelling import advice
from lfm_mlx.errors import InputError, one_line

DONE = 0
BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reads a command line. Options are not abbreviated, and wrong ones are an InputError."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(
            f"{message}{advice(message, self._option_string_actions)}; --help lists the options"
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own leaves out what cannot be written, such as help behind a full disk.
        if message:
            (file or sys.stderr).write(message)


def run(main: Callable[[], int | None], name: str) -> int:
    """Call `main` and return the exit code its outcome stands for.

    name: of the command, for the line that tells of an interruption
    """
    streams.prepare()
    try:
        with streams.delivered():
            return outcome(main)
    except InputError as error:
        tell(f"error: {one_line(error)}")
        return BAD_INPUT
    except KeyboardInterrupt:
        tell(f"{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return DONE  # the reader (`| head`) has what it wants


def outcome(main: Callable[[], int | None]) -> int:
    """The exit code of `main`, which may leave by way of SystemExit, as --help does."""
    try:
        return main() or DONE
    except SystemExit as left:
        if isinstance(left.code, str):
            raise InputError(left.code) from left
        return left.code or DONE


def tell(line: str) -> None:
    """Write a line to stderr, if that can be done."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
