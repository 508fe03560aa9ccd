"""The way into a command: Ctrl-C from the first moment, its options, and only then its imports.

    python -m lfm_mlx.generate --help

MLX and the tokenizer's library take a second to import; help and a wrong option do not wait for
them, so every command line is read before its program is imported.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from types import FrameType
from typing import NoReturn

from lfm_mlx.cli.command import INTERRUPTED, run
from lfm_mlx.cli.commands import COMMANDS


def start(name: str, argv: list[str] | None = None) -> int:
    """Run the command `name` on `argv` (sys.argv if None), and return its exit code."""
    _, options, program = COMMANDS[name]
    if options is None:
        with interruptible():
            module = import_module(program)
        return module.command()
    return run(lambda: read_and_run(options, program, argv), f"lfm_mlx.{name}")


def read_and_run(options: str, program: str, argv: list[str] | None) -> int | None:
    """Read the command line by the parser of one module, then give it to `main` of another."""
    with interruptible():
        import_module(options).parser().parse_args(argv)
        module = import_module(program)
    return module.main(argv)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once while the block runs.

    A KeyboardInterrupt amid an import becomes whatever the interrupted module makes of it, and
    nothing was begun that would have to be ended.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a background job's shell has it ignored
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave(_: int, __: FrameType | None) -> NoReturn:
    """End the process as Ctrl-C does."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(INTERRUPTED)
