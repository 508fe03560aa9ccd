"""Names of models as a person types them: USER/NAME with a revision, or advice in one line."""

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from lfm_mlx.errors import InputError

DEMO = "demo"
# The family on the hub, for advice about names that are nearly right.
FAMILY = tuple(
    f"LiquidAI/{name}"
    for name in ("LFM2.5-8B-A1B", "LFM2.5-8B-A1B-MLX-4bit", "LFM2-8B-A1B", "LFM2-24B-A2B",
                 "LFM2.5-1.2B-Instruct", "LFM2-2.6B", "LFM2-1.2B", "LFM2-700M", "LFM2-350M")
)  # fmt: skip
WANTED = f"expected a folder, a hub name like {FAMILY[0]}, or {DEMO!r}"
PART = r"[\w.-]+"
URL = re.compile(rf"(?:https?://[^/]+/|hf://|hf:|hf\.co/|huggingface\.co/)({PART}/{PART})(.*)")
QUANTIZED = f"{FAMILY[1]}, or convert the original"


class HubName(NamedTuple):
    """A repository of the hub, and a branch, tag or commit of it; None for its main branch."""

    repository: str
    revision: str | None


def hub_name(text: str, revision: str | None = None) -> HubName:
    """The repository that `text` names as USER/NAME or USER/NAME@REVISION.

    Raises InputError, with the nearest right name, for everything else, which names no folder.
    """
    match = re.fullmatch(rf"({PART}/{PART})(?:@([\w./-]+))?", text)
    if match is None or text.startswith((".", "~")) or text.endswith(".gguf"):
        raise InputError(f"{text}: {advice(text)}")
    repository, named = match.groups()
    if named and revision and named != revision:
        raise InputError(f"{text}: names revision {named}, and revision is {revision}; give one")
    return HubName(repository, named or revision)


def advice(text: str) -> str:
    """Explain what is wrong with a name of neither folder nor repository, and what to do."""
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        return f"GGUF files are not read; take safetensors: {QUANTIZED}"
    if path.is_file():
        return f"is a file; give its folder: {path.parent}"
    if match := URL.fullmatch(text):
        branch = re.match(r"/(?:tree|resolve|blob)/([^/?#]+)", match[2])
        return f"is a URL; give the hub's name: {match[1]}{f'@{branch[1]}' if branch else ''}"
    if "://" in text:
        return f"is a URL; {WANTED}"
    if text.startswith((".", "/", "~")) or (path.parent.is_dir() and path.parent != Path(".")):
        return f"no such folder{neighbour(path)}; {WANTED}"
    if ":" in text:
        before, _, after = text.partition(":")
        return (
            f"a hub name has no {':' + after!r}{nearest(before)}; a quantization is a repository "
            f"of its own: {QUANTIZED}"
        )
    if text.count("/") > 1:
        user, name, *rest = text.split("/")
        return (
            f"no such folder; {user}/{name} may be a repository, but its sub-folder "
            f"{'/'.join(rest)} has no name here: download it and give the folder"
        )
    return f"no such folder{nearest(text)}; {WANTED}"


def nearest(text: str) -> str:
    """`; did you mean NAME?` for the known name that is most like `text`, if one is."""
    known = {name.lower(): name for name in (DEMO, *FAMILY)}
    known |= {name.split("/")[1].lower(): name for name in FAMILY}
    found = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.6)
    begun = [name for key, name in known.items() if len(text) > 3 and key.startswith(text.lower())]
    names = begun or [known[key] for key in found]
    return f"; did you mean {names[0]}?" if names else ""


def neighbour(path: Path) -> str:
    """`; did you mean PATH?` for the folder beside `path` whose name is most like its own."""
    try:
        there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / found[0]}?" if found else ""
