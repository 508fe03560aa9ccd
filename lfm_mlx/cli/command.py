"""The end of a command: exit codes, and the one line that says what went wrong.

0 done, 2 wrong use or bad input (one line on stderr), 130 interrupted. Everything a user can get
wrong raises InputError; any other exception is a fault of ours and keeps its traceback.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lfm_mlx.errors import InputError, one_line

DONE = 0
BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reads a command line. Options are not abbreviated, and wrong ones are an InputError."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def read_with_replacement(stream: Any) -> None:
    """Let a byte that is not text become U+FFFD on a standard stream, whatever the locale says."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def run(main: Callable[[], int | None], name: str) -> int:
    """Call `main` and return the exit code its outcome stands for; `name` begins the error line."""
    try:
        return main() or DONE
    except InputError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: give Python's shutdown a place to flush to, and be silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
