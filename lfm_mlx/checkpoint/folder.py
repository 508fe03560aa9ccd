"""A checkpoint: a folder of config.json, safetensors shards and tokenizer files.

Knows every tensor's dtype and shape without reading its data, hands the data out lazily, and says
which file is missing or damaged.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import read_json

LFS_POINTER = b"version https://git-lfs"
INDEX_FILE = "model.safetensors.index.json"
# Where NVIDIA's ModelOpt says how it quantized; mlx-lm reads it too.
MODELOPT_FILE = "hf_quant_config.json"

# safetensors' dtype names and what one element takes.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "U16": 2, "I16": 2,
            "U32": 4, "I32": 4, "U64": 8, "I64": 8, "BOOL": 1}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a shard's header; `dtype` in safetensors' spelling (BF16, U32, …)."""

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
        """Raises InputError if the folder is not there or has no config.json."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "no such folder"
            raise InputError(f"{folder}: {what}; expected a checkpoint folder")
        if not (self.folder / "config.json").exists():
            raise InputError(f"{folder}: no config.json; {_instead(self.folder)}")
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        quantized = "quantization" in self.config or "quantization_config" in self.config
        if not quantized and (self.folder / MODELOPT_FILE).exists():
            self.config["quantization_config"] = {"quant_method": f"ModelOpt ({MODELOPT_FILE})"}

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's name → dtype, shape and file, read from the shards' headers.

        Raises InputError if a shard is absent or truncated, the index and the shards disagree,
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
        """The files that hold the weights: those of the index, or all if there is no index.

        An index none of whose files is there belongs to the source of a converted folder.
        """
        # Names with a leading dot are what macOS leaves beside files on foreign disks.
        there = [file for file in sorted(self.folder.glob("*.safetensors")) if file.name[0] != "."]
        indexed = [self.folder / name for name in sorted(set(self._weight_map.values()))]
        absent = [file.name for file in indexed if not file.exists()]
        if not there and not indexed:
            raise InputError(f"{self.folder}: no .safetensors file; {_instead(self.folder)}")
        if not indexed or (there and len(absent) == len(indexed)):
            self.__dict__["_weight_map"] = {}
            # mlx-lm's names; others beside them are adapters or another program's copy.
            return [file for file in there if file.name.startswith("model")] or there
        if absent:
            raise InputError(
                f"{self.folder / INDEX_FILE}: names files that are not there: {listing(absent)}; "
                "download the checkpoint again"
            )
        for file in there:
            if file not in indexed and file.name.startswith("model"):
                self._refuse_second_copy(file)
        return indexed

    def _refuse_second_copy(self, file: Path) -> None:
        """Raise InputError if a file that the index does not name holds tensors that it does.

        transformers takes model.safetensors then, mlx-lm whichever it reads last.
        """
        if any(name in self._weight_map for name in _read_header(file)):
            first = min(self._weight_map.values())
            raise InputError(
                f"{self.folder}: two sets of weights, {file.name} and the files of {INDEX_FILE} "
                f"({first} …); remove {file.name}, or the index and its files, whichever is old"
            )


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
    """Describe a folder that is not a checkpoint, and what was expected."""
    expected = "a folder with config.json and .safetensors files"
    if (folder / "adapter_config.json").exists():
        return f"it is an adapter; expected the model it was trained on: {expected}"
    for suffix, what in ((".gguf", "GGUF"), (".bin", "PyTorch"), (".onnx", "ONNX")):
        if any(folder.glob(f"*{suffix}")):
            return f"its weights are {what} files; expected {expected}"
    return f"expected {expected}"


def listing(names: list[str], most: int = 8) -> str:
    """The names joined by commas, at most `most` of them and the count of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
