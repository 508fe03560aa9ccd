"""Small checkpoint folders on disk, stock mlx-lm as their other reader, and commands as processes.

Widths are multiples of 128, so that every group size fits; the other sizes are odd on purpose.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from make_random_checkpoint import SHARED, write_checkpoint
from mlx_lm.utils import load_model as load_stock_model
from safetensors.numpy import save_file

from lfm_mlx.load import load_model

SPARSE: dict[str, Any] = SHARED | {
    "dtype": "bfloat16",
    "vocab_size": 131,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
DENSE: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "dtype": "bfloat16",
    "vocab_size": 131,
    "hidden_size": 128,
    "block_dim": 128,
    "block_ff_dim": 500,
    "intermediate_size": 500,
    "block_multiple_of": 128,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "num_hidden_layers": 3,
    "full_attn_idxs": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
FAMILIES = {"sparse": SPARSE, "dense": DENSE}
TOKENS = [[5, 3, 130, 77, 0, 12, 12, 90, 41]]


def write_folder(
    out: Path, config: dict[str, Any] = SPARSE, *, seed: int = 0, layout: str = "hub",
    shard_bytes: int = 300_000,
) -> Path:  # fmt: skip
    """A checkpoint of random weights, in several shards, with the demo's tokenizer."""
    write_checkpoint(config, out, seed, layout, shard_bytes)
    return out


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite the folder as one float32 shard, after `change` of its tensors."""
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        arrays: Any = mx.load(str(shard))
        tensors |= {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a folder, by name."""
    found: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        arrays: Any = mx.load(str(shard))
        found |= arrays
    return found


def our_logits(folder: Path, dtype: str = "float32") -> np.ndarray:
    return np.array(load_model(folder, dtype=dtype)(mx.array(TOKENS)).astype(mx.float32))


def stock_logits(folder: Path) -> np.ndarray:
    """The logits of mlx-lm's own model of the same folder, in float32."""
    model, _ = load_stock_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(TOKENS)))


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m lfm_mlx.MODULE ARGUMENTS`."""
    line = [sys.executable, "-m", f"lfm_mlx.{module}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)
