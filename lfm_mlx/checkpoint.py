"""A checkpoint: a folder of config.json, safetensors shards and tokenizer files.

Finds the folder (a path, a hub name, or `demo`), knows every tensor's dtype and shape without
reading its data, hands the data out lazily, and writes folders so that a half-written one is never
seen under its final name.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of httpx in hub 1, of httpx2 in hub 2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from lfm_mlx.command import InputError, one_line

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
LFS_POINTER = b"version https://git-lfs"
INDEX_FILE = "model.safetensors.index.json"
# What loading or converting a model takes from its repository, and what redistributing it adds.
LOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
DOWNLOADED = [*LOADED, "LICENSE*", "NOTICE*", "README.md"]
# What a converted folder keeps of its source, beside the weights and the config.
KEPT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip

# safetensors' dtype names and what one element takes.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "U16": 2, "I16": 2,
            "U32": 4, "I32": 4, "U64": 8, "I64": 8, "BOOL": 1}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor; `dtype` in safetensors' spelling (BF16, U32, …)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        count = ITEMSIZE[self.dtype]
        for length in self.shape:
            count *= length
        return count


class Checkpoint:
    """The files of one checkpoint folder. Opening it reads no tensor data."""

    def __init__(self, folder: str | Path):
        """Raises InputError when the folder is not there or has no config.json."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "no such folder"
            raise InputError(f"{folder}: {what}; expected a checkpoint folder")
        if not (self.folder / "config.json").exists():
            raise InputError(f"{folder}: no config.json; {_instead(self.folder)}")
        self.config: dict[str, Any] = read_json(self.folder / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's name → dtype, shape and file, read from the shards' headers.

        Raises InputError when a shard is absent or truncated, the index and the shards disagree,
        or a tensor is stored twice.
        """
        found: dict[str, TensorInfo] = {}
        for file in self._shards():
            for name, info in _read_header(file).items():
                if name in found:
                    raise InputError(
                        f"{file}: tensor {name} is also in {found[name].file.name}; "
                        "remove the files that do not belong to this checkpoint"
                    )
                found[name] = info
        absent = sorted(set(self._weight_map) - set(found))
        if absent:
            raise InputError(
                f"{self.folder / INDEX_FILE}: lists tensors no shard has: {listing(absent)}; "
                "download the checkpoint again"
            )
        return found

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor as a lazy array: its data is read from the file when it is evaluated."""
        loaded: dict[str, mx.array] = {}
        for file in sorted({info.file for info in self.tensors.values()}):
            loaded |= mx.load(str(file))  # pyright: ignore[reportOperatorIssue, reportCallIssue]
        return loaded

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if not index.exists():
            return {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise InputError(f"{index}: has no weight_map; download the checkpoint again")
        return weight_map

    def _shards(self) -> list[Path]:
        if not self._weight_map:
            # Names with a leading dot are what macOS leaves beside files on foreign disks.
            files = [
                file for file in sorted(self.folder.glob("*.safetensors")) if file.name[0] != "."
            ]
            if not files:
                raise InputError(f"{self.folder}: no .safetensors file; {_instead(self.folder)}")
            return files
        files = [self.folder / name for name in sorted(set(self._weight_map.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise InputError(
                f"{self.folder / INDEX_FILE}: names files that are not there: {listing(absent)}; "
                "download the checkpoint again"
            )
        return files


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="numpy") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
            found = {
                name: TensorInfo(part.get_dtype(), tuple(part.get_shape()), file)
                for name, part in slices.items()
            }
    except SafetensorError as error:
        if is_pointer(file):
            raise InputError(
                f"{file}: is a git-lfs pointer, the weights were not downloaded; "
                f"run `git lfs pull` in {file.parent}"
            ) from error
        raise InputError(
            f"{file}: truncated or not a safetensors file ({one_line(error)}); download it again"
        ) from error
    except OSError as error:
        what = "is a folder" if file.is_dir() else error.strerror or one_line(error)
        raise InputError(f"{file}: {what}; expected a safetensors file") from error
    odd = [f"{name}: {info.dtype}" for name, info in found.items() if info.dtype not in ITEMSIZE]
    if odd:
        raise InputError(
            f"{file}: dtypes that MLX does not compute with: {listing(odd)}; "
            "take the model in bfloat16, or an MLX quantization"
        )
    return found


def is_pointer(file: Path) -> bool:
    """Whether the file is what git leaves where git-lfs was to fetch the real one."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def _instead(folder: Path) -> str:
    """What a folder that is no checkpoint holds, and what was expected."""
    expected = "a folder with config.json and .safetensors files"
    if (folder / "adapter_config.json").exists():
        return f"it is an adapter; expected the model it was trained on: {expected}"
    for suffix, what in ((".gguf", "GGUF"), (".bin", "PyTorch"), (".onnx", "ONNX")):
        if any(folder.glob(f"*{suffix}")):
            return f"its weights are {what} files; expected {expected}"
    return f"expected {expected}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError when it is absent or is not a JSON object."""
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


def listing(names: list[str], most: int = 8) -> str:
    """The names joined by commas, at most `most` of them and the count of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def resolve(
    model: str | Path, *, revision: str | None = None, weights: bool = True,
    cache: Path | None = None,
) -> Path:  # fmt: skip
    """The folder that `model` names: `demo`, a local folder, or a hub repository (user/name).

    A repository is downloaded into the hub's cache; files that are there already are not fetched
    again, and without a network the cached files are used. Raises InputError in every other case.

    weights: False leaves them out of what is downloaded
    cache: where to download to, instead of the hub's cache
    """
    if str(model) == DEMO:
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(
            f"{name}: not a checkpoint folder; expected a folder, a hub name like "
            f"LiquidAI/LFM2.5-8B-A1B, or {DEMO!r}"
        )
    patterns = [p for p in DOWNLOADED if weights or p != "*.safetensors"]
    return _download(name, revision, patterns, cache)


def _download(name: str, revision: str | None, patterns: list[str], cache: Path | None) -> Path:
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        return _snapshot(name, revision, patterns, cache)
    except LocalEntryNotFoundError as error:
        # No network. mlx-lm, for one, leaves out the licence: what a model needs may be there.
        with contextlib.suppress(LocalEntryNotFoundError):
            loaded = [pattern for pattern in patterns if pattern in LOADED]
            return _snapshot(name, revision, loaded, cache, local_files_only=True)
        raise InputError(f"{name}: {_why_not_here(error)}") from error
    except GatedRepoError as error:
        raise InputError(
            f"{name}: access must be asked for on its hub page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: has no revision {revision or 'main'!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name}: no such folder here, and no such repository on the hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"{name}: {_refusal(error)}") from error
    except (HTTPError, RuntimeError, OSError) as error:  # hf_xet raises bare RuntimeError
        if "No space left" in str(error):
            raise no_room(OSError(errno.ENOSPC, ""), name) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise no_room(error, error.filename or name) from error
        raise InputError(
            f"{name}: the download broke off ({one_line(error) or type(error).__name__}); "
            "run this again, the files that came whole are kept"
        ) from error


def _snapshot(
    name: str, revision: str | None, patterns: list[str], cache: Path | None,
    *, local_files_only: bool = False,
) -> Path:  # fmt: skip
    """Download the files at the top of a repository; its folders hold other formats of it."""
    folder = huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"],
        cache_dir=cache, local_files_only=local_files_only,
    )  # fmt: skip
    return Path(folder)


def _why_not_here(error: LocalEntryNotFoundError) -> str:
    """Why the cache does not have a repository, and what to do."""
    if isinstance(error.__cause__, HfHubHTTPError):
        reason, remedy = _refusal(error.__cause__).rsplit("; ", 1)
    elif isinstance(error.__cause__, OfflineModeIsEnabled):
        reason, remedy = "HF_HUB_OFFLINE is set", "unset it, or give a folder that has the files"
    else:
        reason = "the hub cannot be reached"
        remedy = "connect to the network, or give a folder that has the files"
    has_part = hasattr(error, "snapshot_path")
    return f"{'only partly' if has_part else 'not'} in the local cache, and {reason}; {remedy}"


def _refusal(error: HfHubHTTPError) -> str:
    """What the hub's answer means, and what to do."""
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept the token; renew it with `hf auth login`"
    said = f" ({error.server_message})" if error.server_message else ""
    return one_line(ValueError(f"the hub answered {status}{said}; try again later"))


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
