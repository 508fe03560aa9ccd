"""Write a checkpoint of random weights with the tensors of LFM2.5-8B-A1B, tiny, small or full size.

For measurements of loading, conversion and decoding where the real weights are not at hand. Weights
are a pure function of (config, seed, tensor name), computed and written a few megabytes at a time:
equal seeds give equal bytes in every layout, and the full 16.94 GB need little memory.

    python scripts/make_random_checkpoint.py --size tiny --out /tmp/tiny
"""

import argparse
import json
import math
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

Config = dict
Shape = tuple[int, ...]

PACKAGE = Path(__file__).resolve().parents[1] / "lfm_mlx"
TOKENIZER = PACKAGE / "demo"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
CHUNK = 1 << 20  # values computed at a time: the temporaries stay within a processor's cache
SHARD_BYTES = 5_000_000_000

# LFM2.5-8B-A1B, as it is published.
FULL: Config = json.loads((PACKAGE / "doctor" / "lfm25_8b_a1b.json").read_text(encoding="utf-8"))
# What sparse configs of every size have in common.
SHARED: Config = {
    key: FULL[key]
    for key in (
        *("architectures", "model_type", "norm_topk_prob", "use_expert_bias"),
        *("routed_scaling_factor", "conv_L_cache", "conv_bias", "norm_eps", "tie_word_embeddings"),
    )
}
# Deviations of weights beyond 1/sqrt(inputs). What a layer adds is damped, as training does, so
# that rounding errors do not grow from layer to layer.
GAINS = {"embed_tokens": 3.0, "lm_head": 3.0, ".gate.": 1.5, ".out_proj.": 0.5, ".w2.": 0.5}
EIGHT_LAYERS: Config = {"num_hidden_layers": 8, "layer_types": FULL["layer_types"][:8]}
# Widths stay multiples of 64, so that every size can be quantized in groups of 64.
SIZES: dict[str, Config] = {
    "tiny": FULL
    | EIGHT_LAYERS
    | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 192, "num_experts": 4}
    | {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "small": FULL
    | EIGHT_LAYERS
    | {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1792, "num_experts": 16}
    | {"moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2},
    "full": FULL,
}


def layer_types(config: Config) -> list[str]:
    """The operator of each layer, "conv" or "full_attention", from either key of config.json."""
    count = config["num_hidden_layers"]
    if config.get("layer_types"):
        return list(config["layer_types"])
    attention = config.get("full_attn_idxs")
    attention = range(count) if attention is None else attention
    return ["full_attention" if layer in attention else "conv" for layer in range(count)]


def dense_width(config: Config) -> int:
    """Width of a dense feed-forward, with the block_* rule that only `lfm2` configs know."""
    width = config.get("block_ff_dim", config["intermediate_size"])
    if config["model_type"] != "lfm2" or not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    multiplier = config.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is None:
        return width
    multiple = config.get("block_multiple_of", 256)
    return multiple * math.ceil(int(multiplier * width) / multiple)


def operator_shapes(config: Config, operator: str) -> Iterator[tuple[str, Shape]]:
    """Names below `model.layers.i.` and shapes of a layer's attention or short convolution."""
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    if operator == "full_attention":
        yield "self_attn.q_proj.weight", (hidden, hidden)
        yield "self_attn.k_proj.weight", (config["num_key_value_heads"] * head, hidden)
        yield "self_attn.v_proj.weight", (config["num_key_value_heads"] * head, hidden)
        yield "self_attn.out_proj.weight", (hidden, hidden)
        yield "self_attn.q_layernorm.weight", (head,)
        yield "self_attn.k_layernorm.weight", (head,)
        return
    yield "conv.in_proj.weight", (3 * hidden, hidden)
    yield "conv.conv.weight", (hidden, 1, config["conv_L_cache"])
    yield "conv.out_proj.weight", (hidden, hidden)
    if config.get("conv_bias", False):
        yield "conv.in_proj.bias", (3 * hidden,)
        yield "conv.conv.bias", (hidden,)
        yield "conv.out_proj.bias", (hidden,)


def feed_forward_shapes(config: Config, layer: int) -> Iterator[tuple[str, Shape]]:
    """Names below `model.layers.i.` and shapes of a layer's dense or sparse feed-forward."""

    def swiglu(prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
        yield f"{prefix}.w1.weight", (width, config["hidden_size"])
        yield f"{prefix}.w3.weight", (width, config["hidden_size"])
        yield f"{prefix}.w2.weight", (config["hidden_size"], width)

    if config["model_type"] == "lfm2" or layer < config["num_dense_layers"]:
        yield from swiglu("feed_forward", dense_width(config))
        return
    yield "feed_forward.gate.weight", (config["num_experts"], config["hidden_size"])
    if config["use_expert_bias"]:
        yield "feed_forward.expert_bias", (config["num_experts"],)
    for expert in range(config["num_experts"]):
        yield from swiglu(f"feed_forward.experts.{expert}", config["moe_intermediate_size"])


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Every tensor of a hub checkpoint with this config.json: name to shape."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer, operator in enumerate(layer_types(config)):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: (hidden,) for name in ("operator_norm.weight", "ffn_norm.weight")}
        shapes |= {prefix + name: shape for name, shape in operator_shapes(config, operator)}
        shapes |= {prefix + name: shape for name, shape in feed_forward_shapes(config, layer)}
    shapes["model.embedding_norm.weight"] = (hidden,)
    if not config.get("tie_embedding", config.get("tie_word_embeddings", True)):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def mean_and_deviation(name: str, shape: Shape) -> tuple[float, float]:
    """Statistics that keep activations of order 1, logits of order 1 to 10 and routing decisive."""
    if len(shape) == 1:
        return (1.0 if "norm" in name else 0.0), 0.25
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def random_chunks(name: str, shape: Shape, seed: int) -> Iterator[np.ndarray]:
    """Yield the values of one tensor, flat, as float32 pieces of at most CHUNK values.

    The noise is the sum of two uniform 16-bit words. It is taken from PCG64's raw bits and not
    from a NumPy distribution, because only the raw stream is promised to stay the same.
    """
    mean, deviation = mean_and_deviation(name, shape)
    scale = np.float32(deviation * math.sqrt(6.0) / 65536.0)
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
    count = math.prod(shape)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        words = bits.random_raw(-(-size // 2)).astype("<u8", copy=False).view("<u2")
        noise = words[0::2].astype(np.float32)
        noise += words[1::2]
        noise -= np.float32(65535.0)
        noise *= scale
        if mean:
            noise += np.float32(mean)
        yield noise[:size]


def random_tensors(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Every tensor of a small model, in float32, by its hub name."""
    return {
        name: np.concatenate(list(random_chunks(name, shape, seed))).reshape(shape)
        for name, shape in tensor_shapes(config).items()
    }


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 to bfloat16, ties to even; the result holds the 16 bits as uint16."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the bytes of one or several hub tensors, one after the other."""

    name: str
    shape: Shape
    parts: tuple[tuple[str, Shape], ...]

    @property
    def dtype(self) -> str:
        return "F32" if self.name.endswith("expert_bias") else "BF16"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)

    def chunks(self, seed: int) -> Iterator[bytes]:
        for name, shape in self.parts:
            for values in random_chunks(name, shape, seed):
                stored = values.astype("<f4") if self.dtype == "F32" else to_bfloat16(values)
                yield stored.tobytes()


def name_in_layout(name: str, layout: str) -> str:
    """The name of the tensor that holds hub tensor `name` in a layout."""
    if layout == "fused":
        name = re.sub(r"experts\.\d+\.w[13]\.weight$", "experts.gate_up_proj", name)
        return re.sub(r"experts\.\d+\.w2\.weight$", "experts.down_proj", name)
    if layout == "mlx":
        name = re.sub(r"experts\.\d+\.", "switch_mlp.", name)
        for hub, mlx in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            name = name.replace(f".{hub}.weight", f".{mlx}.weight")
    return name


def shape_in_layout(parts: list[tuple[str, Shape]], config: Config, layout: str) -> Shape:
    """The shape of the tensor that holds the bytes of `parts`, one after the other."""
    name, shape = parts[0]
    if layout == "mlx" and name.endswith("conv.conv.weight"):
        return shape[0], shape[2], 1
    if layout != "hub" and ".experts." in name:
        rows = sum(part_shape[0] for _, part_shape in parts)
        return config["num_experts"], rows // config["num_experts"], shape[1]
    return shape


def plan(config: Config, layout: str = "hub") -> list[Entry]:
    """The tensors of a checkpoint in a layout, in the order of writing; computes no weight.

    Layouts are hub (experts one by one), fused (as transformers saves with
    `save_original_format=False`) and mlx (as mlx-lm saves).
    """
    groups: dict[str, list[tuple[str, Shape]]] = {}
    for name, shape in tensor_shapes(config).items():
        groups.setdefault(name_in_layout(name, layout), []).append((name, shape))
    return [
        Entry(name, shape_in_layout(parts, config, layout), tuple(parts))
        for name, parts in groups.items()
    ]


def split_into_shards(entries: list[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """File name to tensors: consecutive entries up to `max_bytes` a file, at least one each."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def safetensors_header(entries: list[Entry], maker: str) -> bytes:
    """The length, then the JSON table of names, dtypes, shapes and offsets, padded to 8 bytes."""
    table: dict[str, dict] = {"__metadata__": {"format": maker}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, entries: list[Entry], maker: str, seed: int, wrote: Callable[[int], object]
) -> None:
    """Stream one file, tensor by tensor; `wrote` hears of every piece's bytes."""
    with path.open("wb") as file:
        file.write(safetensors_header(entries, maker))
        for entry in entries:
            for piece in entry.chunks(seed):
                file.write(piece)
                wrote(len(piece))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_checkpoint(
    config: Config, out: Path, seed: int = 0, layout: str = "hub", shard_bytes: int = SHARD_BYTES
) -> list[Entry]:
    """Write config.json, shards, index and tokenizer into folder `out`; return what was written.

    Everything is made in a subfolder and moved into place at the end, config.json last: an
    interrupted run leaves nothing that could be taken for a checkpoint.
    """
    entries = plan(config, layout)
    total = sum(entry.num_bytes for entry in entries)
    out.mkdir(parents=True, exist_ok=True)
    require_space(out, total)
    shards = split_into_shards(entries, shard_bytes)
    stage = out / ".partial"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
            for name, shard in shards.items():
                maker = "mlx" if layout == "mlx" else "pt"
                write_safetensors(stage / name, shard, maker, seed, progress.update)
        weight_map = {entry.name: name for name, shard in shards.items() for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(stage / "model.safetensors.index.json", index)
        copy_tokenizer(stage)
        move_into_place(stage, out)
        write_json(stage / "config.json", config)
        (stage / "config.json").replace(out / "config.json")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return entries


def copy_tokenizer(folder: Path) -> None:
    """Copy the tokenizer's files; without a tokenizer.json the others would be of no use."""
    if not (TOKENIZER / "tokenizer.json").exists():
        print(f"no tokenizer in {TOKENIZER}: the folder holds weights only")
        return
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            shutil.copyfile(TOKENIZER / name, folder / name)


def move_into_place(stage: Path, out: Path) -> None:
    """Move the staged files to `out`, where a former checkpoint's config and weights go first."""
    for old in [*out.glob("config.json"), *out.glob("model*.safetensors*")]:
        old.unlink()
    for path in stage.iterdir():
        path.replace(out / path.name)


def require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"not enough space in {folder}: {free / 1e9:.2f} GB free; "
            f"need {num_bytes / 1e9:.2f} GB; choose a smaller --size or another --out"
        )


def token_facts(folder: Path) -> Config:
    """The ids of bos, eos and pad and the number of ids of the tokenizer in `folder`, if any."""
    if not (folder / "tokenizer.json").exists():
        return {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0, "vocab_size": 0}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | added
    facts = {"vocab_size": max(ids.values()) + 1}
    for role in ("bos", "eos", "pad"):
        token = names[f"{role}_token"]
        facts[f"{role}_token_id"] = ids[token["content"] if isinstance(token, dict) else token]
    return facts


def config_of_size(size: str, vocabulary: int | None = None) -> Config:
    """config.json of a size, with the special ids of the tokenizer and room for all of its ids."""
    facts = token_facts(TOKENIZER)
    needed = facts.pop("vocab_size")
    if vocabulary is not None and vocabulary < max(needed, 1):
        raise ValueError(f"--vocab {vocabulary} is too small: the tokenizer has {needed} ids")
    default = max(SIZES[size]["vocab_size"], needed)
    return SIZES[size] | facts | {"vocab_size": vocabulary or default}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=("hub", "fused", "mlx"), default="hub")
    parser.add_argument("--vocab", type=int, help="vocabulary size instead of the size's own")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest file")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in --out")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: expected 0 or more")
    if options.out.is_dir() and any(options.out.iterdir()) and not options.force:
        raise ValueError(f"{options.out} is not empty; give another --out, or --force")
    config = config_of_size(options.size, options.vocab)
    entries = write_checkpoint(
        config, options.out, options.seed, options.layout, options.shard_bytes
    )
    parameters = sum(math.prod(entry.shape) for entry in entries)
    size = sum(entry.num_bytes for entry in entries)
    print(
        f"{options.out}: {len(entries)} tensors, {parameters / 1e9:.6f} B parameters, "
        f"{size / 1e9:.3f} GB"
    )


def exit_code(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Do the work of a command; return its exit code, after one line on what stopped it."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), "interrupted: nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
