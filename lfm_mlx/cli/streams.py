"""Standard streams as a shell may hand them over: closed, full, or of few characters."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from lfm_mlx.errors import InputError, one_line

# Faults of the disk or of a stream, which whoever runs a command can mend.
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG, errno.EROFS}


def prepare() -> None:
    """Make all three standard streams usable.

    A closed one is replaced: stdin by an empty one, stderr by one that swallows, stdout by one that
    fails where it is written to. What a terminal's encoding cannot show becomes a question mark;
    bytes that are not text in it become U+FFFD, also in the parts that Python would hide in
    surrogates.
    """
    _open_closed_descriptors()
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _open_closed_descriptors() -> None:
    """Open the closed ones of 0, 1 and 2, which files opened later would take otherwise.

    Standard output is opened for reading: a write into it fails, and is said.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one


@contextlib.contextmanager
def delivered() -> Iterator[None]:
    """Have everything written when the block ends. Raises InputError for a full disk or the like.

    Raises BrokenPipeError if the reader of standard output has gone.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        raise
    except OSError as error:
        if error.errno not in WRITING and error.filename is None:
            raise
        _discard(sys.stdout)
        where = error.filename or "standard output"
        reason = "is closed" if error.errno == errno.EBADF else error.strerror or one_line(error)
        raise InputError(f"{where}: {reason}") from error


def _discard(stream: TextIO) -> None:
    """Let what is left in the stream's buffer, which Python writes at its end, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
