"""Where a model comes from: `demo`, a local folder, or a repository of the hub.

A repository is downloaded once, with the files a model needs and no others; without a network what
the cache has is used.
"""

import contextlib
import errno
import re
import sys
from pathlib import Path

import huggingface_hub
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

from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import no_room

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
# What loading or converting a model takes from its repository, and what redistributing it adds.
LOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
DOWNLOADED = [*LOADED, "LICENSE*", "NOTICE*", "README.md"]


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
