"""A conversation's memory on disk: one safetensors file, whole or not there.

    prompt_cache.save("report.cache", cache, model)
    cache = prompt_cache.load("report.cache", model)
    unread = rewind_to(cache, prompt)

The file has what the layers remember, without the room they keep to grow into, and the ids of the
tokens read, so that it can be rewound. Its metadata name the model and the tokenizer by their
fingerprints, the dtype, and the SHA-256 of the file itself with zeros in that sum's place: a file
that is cut short or altered by one bit is not read. Files of mlx-lm's prompt caches are not read:
made with mlx-lm's own model they have no token ids, so there is nothing to compare a prompt with.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lfm_mlx.cache.cache import token_log
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.keys_values import GrowingKVCache, GrowingQuantizedKVCache
from lfm_mlx.cache.protocols import Cache
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import atomic_file, free_bytes
from lfm_mlx.model import Model

FORMAT = "lfm_mlx prompt cache 1"
UNSIGNED = "0" * 64
DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32",
          mx.int32: "I32"}  # fmt: skip
SAMPLES = 64  # values of each parameter that enter the fingerprint
BLOCK = 1 << 24  # bytes read at a time
PARTS = ("weight", "scales", "biases")


def fingerprint(model: Model) -> str:
    """Hash of a model: config, every parameter's shape, and values spread over each.

    The same in every process, and for one checkpoint in every dtype it can be loaded in.
    """
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in sorted(parameters.items()):
        places = mx.array(np.linspace(0, array.size - 1, SAMPLES).astype(np.uint32))
        values = array.reshape(-1)[places]
        if mx.issubdtype(array.dtype, mx.floating):
            values = values.astype(mx.bfloat16)
        digest.update(f"{name} {array.shape} ".encode() + np.array(values.view(mx.uint8)).tobytes())
    return digest.hexdigest()


def dtype_of(model: Model) -> str:
    return str(model.model.embedding_norm.weight.dtype).rpartition(".")[2]


def save(path: str | Path, cache: Cache, model: Model, tokenizer: str = "") -> None:
    """Write the cache of one conversation; `path` has the old file or the new one, never a part.

    tokenizer: the fingerprint of the one that made the tokens, compared at the next `load`

    Only its owner may read the file: it holds the conversation. Raises InputError for a batch,
    for what was read without token ids, and where the file cannot be written.
    """
    path = Path(path).expanduser().resolve()
    metadata = {
        "format": FORMAT,
        "model": fingerprint(model),
        "tokenizer": tokenizer,
        "dtype": dtype_of(model),
        "layers": json.dumps([layer_facts(entry) for entry in cache]),
        "sha256": UNSIGNED,
    }
    tensors = dict(contents(cache))
    needed = sum(array.nbytes for array in tensors.values())
    try:
        if path.parent.is_dir() and free_bytes(path.parent) < needed:
            raise InputError(f"{path}: needs {needed / 1e9:.1f} GB, more than the disk has left")
        with atomic_file(path) as file:
            write_safetensors(file, tensors, metadata)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({one_line(error)})") from error


def layer_facts(entry: Any) -> dict[str, int]:
    """Facts of an entry beside its arrays. Raises InputError for an entry that is not ours."""
    if isinstance(entry, ConvWindow) and entry.rows == 1 and not entry.left_padding:
        return {"stale": int(entry.stale)}
    if isinstance(entry, GrowingQuantizedKVCache):
        return {"bits": entry.bits, "group_size": entry.group_size}
    if isinstance(entry, GrowingKVCache):
        return {}
    raise InputError("only the cache of one conversation can be saved, not that of a batch")


def contents(cache: Cache) -> Iterator[tuple[str, mx.array]]:
    """Name and array of all that is to be kept, cut to what is in use."""
    log = token_log(cache)
    if log is None or not log.complete:
        raise InputError("this cache does not know the ids of the tokens it has read")
    if log.tokens is not None:
        yield "tokens", log.tokens.astype(mx.int32)
    for index, entry in enumerate(cache):
        if isinstance(entry, ConvWindow):
            if entry.window is not None:
                yield f"layers.{index}.window", entry.window
        elif entry.keys is not None and entry.offset:
            for kind, stored in zip(("keys", "values"), entry.keys_and_values(), strict=True):
                parts = stored if isinstance(stored, tuple | list) else [stored]
                for name, part in zip(PARTS, parts, strict=False):
                    yield f"layers.{index}.{kind}.{name}", part


def write_safetensors(
    file: BinaryIO, tensors: dict[str, mx.array], metadata: dict[str, str]
) -> None:
    """Write tensors one by one, none of them twice in memory; then put the sum in its place."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": [begin, end]
        }  # fmt: skip
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    first = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(first)
    file.write(first)
    for array in tensors.values():
        data = np.array(mx.contiguous(array).view(mx.uint8)).tobytes()
        digest.update(data)
        file.write(data)
    file.seek(first.index(UNSIGNED.encode()))
    file.write(digest.hexdigest().encode())


def load(path: str | Path, model: Model, tokenizer: str = "") -> Cache:
    """The cache that `save` wrote, for this model and tokenizer in this dtype.

    Raises InputError for a file that is not there, not whole, or not this model's.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            metadata = verified_metadata(path, file)
        require_same(path, metadata, model, tokenizer)
        arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # pyright: ignore
        mx.eval(arrays)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error
    cache = model.make_cache()
    for index, facts in enumerate(json.loads(metadata["layers"])):
        cache[index] = restored(cache[index], facts, arrays, f"layers.{index}.")
    log = token_log(cache)
    if log is not None and "tokens" in arrays:
        log.parts = [arrays["tokens"]]
    return cache


def load_or_new(path: str | Path, model: Model, tokenizer: str = "") -> Cache:
    """The cache in `path`, or an empty one if there is no such file yet.

    Raises InputError as `load` does, and where no file could be made.
    """
    path = Path(path).expanduser()
    if path.exists():
        return load(path, model, tokenizer)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written; {path.parent} is not a folder to write in")
    return model.make_cache()


def verified_metadata(path: Path, file: BinaryIO) -> dict[str, str]:
    """The metadata of a file that is whole, of our format, and as it was written."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    strange = InputError(f"{path}: not a prompt cache of this package; give another name")
    if not 2 <= length <= size - 8:
        raise strange
    encoded = file.read(length)
    try:
        metadata = json.loads(encoded)["__metadata__"]
        known = metadata["format"] == FORMAT and len(metadata["sha256"]) == len(UNSIGNED)
    except (ValueError, KeyError, TypeError) as error:
        raise strange from error
    if not known:
        raise strange
    signed = metadata["sha256"].encode()
    unsigned = encoded.replace(signed, UNSIGNED.encode(), 1)
    digest = hashlib.sha256(length.to_bytes(8, "little") + unsigned)
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest().encode() != signed:
        raise InputError(f"{path}: is cut short or was altered; remove it, and it is made again")
    return metadata


def require_same(path: Path, metadata: dict[str, str], model: Model, tokenizer: str) -> None:
    """Raise InputError unless the file is this model's, this tokenizer's, and in this dtype."""
    if metadata["model"] != fingerprint(model):
        raise InputError(f"{path}: belongs to another model, or other weights; give another name")
    if tokenizer and metadata["tokenizer"] != tokenizer:
        raise InputError(f"{path}: belongs to another tokenizer; give another name")
    if metadata["dtype"] != dtype_of(model):
        raise InputError(
            f"{path}: is of a model in {metadata['dtype']}, and this one is in "
            f"{dtype_of(model)}; give another name, or load it in that dtype"
        )


def restored(entry: Any, facts: dict[str, int], arrays: dict[str, mx.array], own: str) -> Any:
    """A fresh entry of a cache, with the arrays whose names begin with `own`."""
    if isinstance(entry, ConvWindow):
        entry.window, entry.stale = arrays.get(own + "window"), bool(facts["stale"])
        return entry
    if "bits" in facts:
        entry = entry.to_quantized(facts["group_size"], facts["bits"])
    for kind in ("keys", "values"):
        names = [f"{own}{kind}.{part}" for part in PARTS]
        parts = tuple(arrays[name] for name in names if name in arrays)
        if parts:
            setattr(entry, kind, parts if "bits" in facts else parts[0])
            entry.offset = parts[0].shape[2]
    return entry
