"""Sources of a model: `demo`, a local folder, or a repository of the hub.

A repository is downloaded once, with the files a model needs and no others: its small files first,
which are judged before its weights are fetched. Without a network, or with a cache that cannot be
written, what the cache has is used.
"""

import contextlib
import errno
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of httpx in hub 1, of httpx2 in hub 2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lfm_mlx.checkpoint.folder import INDEX_FILE, listing
from lfm_mlx.checkpoint.names import DEMO, QUANTIZED, HubName, hub_name, nearest
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import free_bytes, no_room, read_json

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
# What a model cannot do without, if its repository has it.
ESSENTIAL = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "*.jinja", INDEX_FILE]  # fmt: skip
# What loading or converting a model takes from its repository, and what redistributing it adds.
SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md"]

# Given the folder of the small files and the bytes of the weights; raises InputError to stop.
Judge = Callable[[Path, int], object]


def judge_config(folder: Path, _: int) -> None:
    """Raise InputError unless config.json is one of this family."""
    Config.from_folder(folder)


def resolve(
    model: str | Path, *, revision: str | None = None, weights: bool = True,
    cache: Path | None = None, judge: Judge = judge_config,
) -> Path:  # fmt: skip
    """The folder that `model` names: `demo`, a local folder, or a hub repository (user/name).

    A repository is downloaded into the hub's cache; files that are there already are not fetched
    again, and without a network the cached files are used. Raises InputError in every other case.

    revision: a repository's branch, tag or commit; `user/name@revision` says the same
    weights: False leaves them out of what is downloaded
    cache: where to download to, instead of the hub's cache
    judge: looks at the small files before the weights are downloaded
    """
    path = Path(model).expanduser()
    if str(model) == DEMO or path.is_dir():
        if revision is not None:
            raise InputError(f"{model}: has no revisions; revision belongs to a hub name")
        return DEMO_FOLDER if str(model) == DEMO else path
    name = hub_name(str(model), revision)
    folder = _download(name, SMALL, ESSENTIAL, cache)
    if not (folder / "config.json").exists():
        raise InputError(f"{name.repository}: {_what_else(name)}")
    if not weights:
        return folder
    # The commit, so that both downloads are of one state of the repository.
    commit = HubName(name.repository, folder.name)
    files = _weight_files(folder)
    judge(folder, _require_disk(commit, files, folder, cache))
    return _download(commit, files, files, cache)


def _weight_files(folder: Path) -> list[str]:
    """The files that the index names, or the pattern of all if there is none."""
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map") if index.exists() else None
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({file for file in named if isinstance(file, str)}) or ["*.safetensors"]


def _require_disk(name: HubName, files: list[str], folder: Path, cache: Path | None) -> int:
    """The bytes of these files. Raises InputError if those to download exceed the disk."""
    try:
        found = huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=files,
            ignore_patterns=["*/*"], cache_dir=cache, dry_run=True,
        )  # fmt: skip
    except (OSError, HTTPError, ValueError, DryRunError):
        return 0  # no network, or a cache that cannot be written: the download says so
    coming = sum(file.file_size or 0 for file in found if file.will_download)
    there = free_bytes(folder)
    if coming > there:
        raise InputError(
            f"{name.repository}: {coming / 1e9:.1f} GB will be downloaded and {there / 1e9:.1f} GB "
            "are free; free some disk space, or set HF_HOME to another disk"
        )
    return sum(file.file_size or 0 for file in found)


def _what_else(name: HubName) -> str:
    """Describe a repository without config.json at its top, and what to do."""
    try:
        files = huggingface_hub.HfApi().list_repo_files(name.repository, revision=name.revision)
    except (OSError, HTTPError, ValueError):
        files = []
    folders = sorted(file.rsplit("/", 1)[0] for file in files if file.endswith("/config.json"))
    if folders:
        return (
            f"its models are in sub-folders ({listing(folders)}), which have no name here; "
            "download one of them and give the folder"
        )
    if any(file.endswith(".gguf") for file in files):
        return f"its weights are GGUF files, which are not read; take safetensors: {QUANTIZED}"
    return "the repository has no config.json; expected one with config.json and .safetensors files"


def _download(name: HubName, patterns: list[str], needed: list[str], cache: Path | None) -> Path:
    """The snapshot with the files of `patterns`; those of `needed` do if no more can be had."""
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    repository = name.repository
    try:
        return _snapshot(name, patterns, cache)
    except LocalEntryNotFoundError as error:
        # No network. mlx-lm, for one, leaves out the licence: what a model needs may be there.
        with contextlib.suppress(LocalEntryNotFoundError):
            return _snapshot(name, needed, cache, local_files_only=True)
        raise InputError(f"{repository}: {_why_not_here(error)}") from error
    except GatedRepoError as error:
        raise InputError(
            f"{repository}: access must be asked for on its hub page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: has no revision {name.revision or 'main'!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        known = nearest(repository)
        known = "" if f" {repository}?" in known else known
        raise InputError(
            f"{repository}: no such folder here, and no such repository on the hub "
            f"(a private one needs `hf auth login`){known}"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"{repository}: {_refusal(error)}") from error
    except (HTTPError, RuntimeError, OSError) as error:  # hf_xet raises bare RuntimeError
        if isinstance(error, OSError) and error.errno in READ_ONLY:
            with contextlib.suppress(LocalEntryNotFoundError):
                return _snapshot(name, needed, cache, local_files_only=True)
        if "No space left" in str(error):
            raise no_room(OSError(errno.ENOSPC, ""), repository) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise no_room(error, error.filename or repository) from error
        raise InputError(
            f"{repository}: the download was interrupted ({one_line(error) or type(error).__name__}"
            "); run the command again: finished files are kept"
        ) from error


def _snapshot(
    name: HubName, patterns: list[str], cache: Path | None, *, local_files_only: bool = False
) -> Path:
    """Download the files at the top of a repository; its folders hold other formats of it."""
    folder = huggingface_hub.snapshot_download(
        name.repository, revision=name.revision, allow_patterns=patterns,
        ignore_patterns=["*/*"], cache_dir=cache, local_files_only=local_files_only,
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
    """Explain the hub's answer, and what to do."""
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept the token; renew it with `hf auth login`"
    said = f" ({error.server_message})" if error.server_message else ""
    return one_line(ValueError(f"the hub answered {status}{said}; try again later"))
