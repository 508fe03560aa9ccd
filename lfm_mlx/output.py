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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from lfm_mlx.checkpoint import INDEX_FILE
from lfm_mlx.command import InputError, one_line

# What a converted folder keeps of its source, beside the weights and the config.
KEPT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip


def no_room(error: OSError, what: str | Path) -> InputError:
    """The one line for a failed write: says when the disk is full."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{what}: no space left on the disk; free some and run this again")
    return InputError(f"{what}: {error.strerror or one_line(error)}")


@contextlib.contextmanager
def atomic_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an exception.

    Raises InputError when `out` is there already and `force` is not given, or cannot be written.
    """
    out = Path(os.path.abspath(out.expanduser()))
    require_vacant(out, force=force)
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


def require_vacant(out: Path, *, force: bool = False) -> None:
    """Raise InputError when `out` is there and may not be replaced."""
    out = out.expanduser()
    if out.exists() and not force:
        raise InputError(f"{out}: is there already; give another name, or --force to replace it")
    if out.exists() and not _replaceable(out):
        raise InputError(f"{out}: holds something that is not a checkpoint; it is left as it is")


def _replaceable(out: Path) -> bool:
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or (
        (out / "config.json").exists() and any(out.glob("*.safetensors"))
    )


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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process. Raises OSError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(out: Path) -> None:
    """Remove the partial folders of runs that were killed; a living one has its folder locked."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)


def free_bytes(folder: Path) -> int:
    """What can still be written on the disk `folder` is on."""
    return shutil.disk_usage(folder).free


class ShardWriter:
    """Writes tensors one after another into safetensors shards, with an index of what is where.

    A shard is written as soon as it holds `shard_bytes`, so that never more than that waits in
    memory. Shards get their final names (…-of-N) in `finish`, when their number is known.
    """

    def __init__(self, folder: Path, shard_bytes: int = 1 << 30):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.nbytes = 0
        self._waiting: dict[str, mx.array] = {}
        self._waiting_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, array: mx.array) -> None:
        if self._waiting and self._waiting_bytes + array.nbytes > self.shard_bytes:
            self._flush()
        self._waiting[name] = array
        self._waiting_bytes += array.nbytes
        self.nbytes += array.nbytes

    def finish(self, total_parameters: int) -> None:
        """Write what waits, name the shards, and write the index last."""
        self._flush()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / (final if count > 1 else "model.safetensors"))
            weight_map |= dict.fromkeys(names, final if count > 1 else "model.safetensors")
        metadata = {"total_size": self.nbytes, "total_parameters": total_parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_FILE, index)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._written.append(list(self._waiting))
        file = self._part(len(self._written))
        try:
            mx.save_safetensors(str(file), self._waiting, metadata={"format": "mlx"})
        except RuntimeError as error:
            # MLX reports a full disk without its errno: what is left to write on tells it.
            full = free_bytes(self.folder) < self._waiting_bytes
            raise OSError(errno.ENOSPC if full else errno.EIO, one_line(error)) from error
        self._waiting.clear()
        self._waiting_bytes = 0


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_kept(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, template, generation config and licence files; returns their names."""
    found = {file for pattern in KEPT for file in source.glob(pattern) if file.is_file()}
    names = sorted(file.name for file in found)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
