"""The files of a converted checkpoint: shards with their index, and what is kept of the source."""

import errno
import shutil
from pathlib import Path

import mlx.core as mx

from lfm_mlx.checkpoint.folder import INDEX_FILE
from lfm_mlx.errors import one_line
from lfm_mlx.files import free_bytes, write_json

# What a converted folder keeps of its source, beside the weights and the config.
KEPT = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip


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


def copy_kept(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, template, generation config and licence files; returns their names."""
    found = {file for pattern in KEPT for file in source.glob(pattern) if file.is_file()}
    names = sorted(file.name for file in found)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a config and weights, so that a conversion may replace it."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
