"""Files and folders that appear whole: written under a temporary name, and then renamed.

An interrupted or failed write leaves what was there as it was.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lfm_mlx.errors import InputError, one_line

Replaceable = Callable[[Path], bool]


def never(_: Path) -> bool:
    return False


def no_room(error: OSError, what: str | Path) -> InputError:
    """The one line for a failed write: says when the disk is full."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{what}: no space left on the disk; free some and run this again")
    return InputError(f"{what}: {error.strerror or one_line(error)}")


@contextlib.contextmanager
def atomic_folder(
    out: Path, *, force: bool = False, replaceable: Replaceable = never
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an exception.

    Raises InputError if `out` may not be replaced (see `require_vacant`), or cannot be written.
    """
    out = Path(os.path.abspath(out.expanduser()))
    require_vacant(out, force=force, replaceable=replaceable)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise no_room(error, out) from error
    try:
        with _locked(partial):
            yield partial
            partial.chmod(0o755)
            _take_place(partial, out)
    except OSError as error:
        raise no_room(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends, and is removed if it fails.

    Only its owner may read it.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def require_vacant(out: Path, *, force: bool = False, replaceable: Replaceable = never) -> None:
    """Raise InputError if `out` is there, unless `force` is given and it is empty or `replaceable`.

    replaceable: whether a folder that holds something may give way
    """
    out = out.expanduser()
    if out.exists() and not force:
        raise InputError(f"{out}: is there already; give another name, or force to replace it")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or replaceable(out))):
        raise InputError(f"{out}: holds something else than what is made here; it is left as it is")


def _take_place(partial: Path, out: Path) -> None:
    """Rename, keeping what was at `out` until the new folder stands there."""
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        partial.rename(out)
    finally:
        if not out.exists():  # the second rename failed, or an interrupt came before it
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)


# What flock answers on disks that have no locks (some SMB, NFS, FUSE and Lustre mounts).
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.ENOTTY}


def lock(descriptor: int) -> bool:
    """Lock a file or folder until it is closed; False if its disk has no locks.

    Raises BlockingIOError if another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process; False without. Raises as `lock`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(out: Path) -> None:
    """Remove the partial folders of runs that were killed; a living one has its folder locked."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with contextlib.suppress(OSError), _locked(left) as held:
            if held:
                shutil.rmtree(left)


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is absent or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a checkpoint's {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
