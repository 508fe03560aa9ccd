"""What people's checkpoint folders suffer from: what was done to a good one, and what is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from folders import change_config, change_tensors
from safetensors.numpy import save_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4996420160\n"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.2.ffn_norm.weight"


@dataclass(frozen=True)
class Damage:
    """`apply` spoils a folder written by `folders.write_folder`; `said` is part of the message."""

    apply: Callable[[Path], object]
    said: str


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number - 1]


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def map_to(folder: Path, target: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(index["weight_map"], target)})
    )


def list_one_more(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def copy_shard_without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copyfile(shard(folder), folder / "model-copy.safetensors")


def make_gguf(folder: Path) -> None:
    empty(folder)
    (folder / "LFM2.5-8B-A1B-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")


def make_adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    save_file({"lora_a": np.zeros((2, 2), np.float32)}, folder / "adapters.safetensors")


def only_pytorch(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def set_norm(values: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({NORM: values}))


def shard_becomes_folder(folder: Path) -> None:
    file = shard(folder)
    file.unlink()
    file.mkdir()


def float8(folder: Path) -> None:
    """One tensor's dtype in the header becomes an 8-bit float's, as in checkpoints for servers."""
    without_weights(folder)
    header = json.dumps(
        {"model.embedding_norm.weight": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"0" * 8
    )


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGES = {
    "empty folder": Damage(empty, "no config.json; expected a folder with config.json"),
    "no config": Damage(lambda f: (f / "config.json").unlink(), "no config.json; expected"),
    "config cut off": Damage(
        config_text('{"model_type": "lfm2_moe", '), "not valid JSON (Expecting"
    ),
    "config is a list": Damage(config_text("[1, 2]"), "expected a JSON object, got a list"),
    "config is binary": Damage(
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON ('utf-8' codec"
    ),
    "another model": Damage(
        lambda f: change_config(f, model_type="llama"),
        "model_type is 'llama'; supported: lfm2_moe or lfm2",
    ),
    "another rope": Damage(
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
        "rope_parameters.rope_type is 'yarn'; supported: default",
    ),
    "another quantization": Damage(
        lambda f: change_config(f, quantization_config={"quant_method": "awq"}),
        "quantization_config is 'awq'",
    ),
    "shard cut off": Damage(lambda f: truncate(shard(f, 2)), "truncated or not a safetensors file"),
    "empty shard": Damage(
        lambda f: shard(f).write_bytes(b""), "truncated or not a safetensors file"
    ),
    "shard is text": Damage(
        lambda f: shard(f).write_text("<!DOCTYPE html>\n" * 9),
        "truncated or not a safetensors file",
    ),
    "shard is a git-lfs pointer": Damage(
        lambda f: shard(f, 2).write_text(POINTER),
        "is a git-lfs pointer, the weights were not downloaded; run `git lfs pull`",
    ),
    "shard is a folder": Damage(shard_becomes_folder, "is a folder; expected a safetensors file"),
    "shard absent": Damage(
        lambda f: shard(f, 2).unlink(), "names files that are not there: model-00002-of-"
    ),
    "shard absent, no index": Damage(
        lambda f: ((f / INDEX).unlink(), shard(f, 2).unlink()), "do not fit its config.json: "
    ),
    "no weights": Damage(without_weights, "no .safetensors file; expected"),
    "PyTorch weights": Damage(only_pytorch, "no .safetensors file; its weights are PyTorch files"),
    "GGUF": Damage(make_gguf, "no config.json; its weights are GGUF files; expected"),
    "adapter": Damage(make_adapter, "it is an adapter; expected the model it was trained on"),
    "index without map": Damage(lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index cut off": Damage(lambda f: truncate(f / INDEX), "not valid JSON"),
    "index maps to numbers": Damage(lambda f: map_to(f, 1), "has no weight_map"),
    "index beside other weights": Damage(
        lambda f: shutil.copyfile(shard(f, 1), f / "model.safetensors"),
        "two sets of weights, model.safetensors and the files of model.safetensors.index.json",
    ),
    "index lists a tensor no shard has": Damage(
        list_one_more, "lists tensors no shard has: model.layers.9.ghost"
    ),
    "a tensor twice": Damage(copy_shard_without_index, "is also in model-00001-of-"),
    "tensor missing": Damage(
        lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"missing: {NORM}"
    ),
    "tensor left over": Damage(
        lambda f: change_tensors(f, lambda t: t.update({"vision.weight": np.zeros(3, np.float32)})),
        "not part of the model: vision.weight",
    ),
    "wrong shape": Damage(
        set_norm(np.ones(127, np.float32)), f"{NORM}: shape (127,), expected (128,)"
    ),
    "wrong dtype": Damage(
        set_norm(np.ones(128, np.int64)), f"{NORM}: dtype I64, expected mlx.core.float32"
    ),
    "float8": Damage(float8, "dtypes that MLX does not compute with: model.embedding_norm.weight"),
    "config of a larger model": Damage(
        lambda f: change_config(f, vocab_size=200), "model.embed_tokens.weight: shape (131, 128)"
    ),
    "config with more experts": Damage(
        lambda f: change_config(f, num_experts=7), "wants experts 0 to 6, and lacks 5, 6"
    ),
    "config with fewer experts": Damage(
        lambda f: change_config(f, num_experts=4), "wants experts 0 to 3, and has also 4"
    ),
}
