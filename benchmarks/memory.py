"""Peak memory of decoding at 8 K, 32 K and 128 K tokens, with keys and values in 16, 8 and 4 bits.

    python benchmarks/memory.py --model lfm-4bit

Measured, not added up: each row is a process of its own that loads the weights, fills a cache to
that length with random keys, values and windows, grown as a prefill grows it, and decodes from it.
Decoding takes and frees what it does with any numbers. Prints a table, then one JSON line.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx import Model, device
from lfm_mlx.cache.cache import cached_tokens, log_tokens, stored_bytes
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.keys_values import BITS, KVQuantization, quantize_cache
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.engine.decode import PREFILL_CHUNK, decode
from lfm_mlx.errors import InputError
from lfm_mlx.load import DTYPES, load_model

LENGTHS = (8_000, 32_000, 128_000)


def filled_cache(model: Model, length: int, bits: int | None, dtype: mx.Dtype) -> list[Any]:
    """A cache that has read `length` tokens, by its size; what it holds is random."""
    config, cache = model.config, model.make_cache()
    quantize_cache(cache, None if bits is None else KVQuantization.of(config, bits))
    for begin in range(0, length, PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, length - begin)
        log_tokens(cache, mx.random.randint(0, config.vocab_size, (1, count)).astype(mx.int32))
        shape = (1, config.num_key_value_heads, count, config.head_dim)
        for entry in cache:
            if not isinstance(entry, ConvWindow):
                entry.update_and_fetch(*(mx.random.normal(shape, dtype) for _ in range(2)))
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()
    for entry in cache:
        if isinstance(entry, ConvWindow):
            window = (1, config.conv_L_cache - 1, config.hidden_size)
            entry.advance(mx.random.normal(window, dtype), length, None)
    return cache


def measure(folder: Path, length: int, bits: int | None, dtype: str, tokens: int) -> dict[str, Any]:
    """One row, in this process. Bytes; the resident peak has Python and MLX's code in it."""
    model = load_model(folder, dtype=dtype)
    weights = mx.get_active_memory()
    cache = filled_cache(model, length - tokens, bits, DTYPES[dtype])
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    stamps = [time.perf_counter()]
    for _ in decode(model, [1], cache=cache, max_tokens=tokens):
        stamps.append(time.perf_counter())
    return {
        "context_tokens": cached_tokens(cache) + 1,
        "kv_bits": bits or 8 * DTYPES[dtype].size,
        "weight_bytes": weights,
        "cache_bytes": stored_bytes(cache),
        "working_bytes": mx.get_peak_memory() - held,
        "mlx_peak_bytes": mx.get_peak_memory(),
        "resident_peak_bytes": device.peak_bytes(),
        "seconds_per_token": (stamps[-1] - stamps[1]) / max(1, tokens - 1),
    }


def in_own_process(args: argparse.Namespace, length: int, bits: int | None) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--model", args.model, "--dtype", args.dtype,
        "--tokens", str(args.tokens), "--worker", str(length), str(bits or 0),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{length} tokens in {bits} bits: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict[str, Any]]) -> None:
    titles = {
        "weight_bytes": "weights", "cache_bytes": "cache", "working_bytes": "working",
        "mlx_peak_bytes": "MLX peak", "resident_peak_bytes": "process peak",
    }  # fmt: skip
    print("context  bits", *(f"{title + ' GB':>16}" for title in titles.values()))
    for row in rows:
        values = (f"{row[key] / 1e9:16.3f}" for key in titles)
        print(f"{row['context_tokens']:7}  {row['kv_bits']:4}", *values)


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub name, or demo (default)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="context, in tokens")
    add("--bits", type=int, nargs="+", choices=(16, *BITS), default=(16, *BITS))
    add("--tokens", type=int, default=3, help="tokens decoded at the end of the context")
    add("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.tokens < 2 or min(args.lengths) <= args.tokens:
        raise InputError("expected --tokens of 2 or more, and --lengths above that")
    folder = resolve(args.model)
    if args.worker:
        length, bits = args.worker
        print(json.dumps(measure(folder, length, bits or None, args.dtype, args.tokens)))
        return
    rows = []
    for length in args.lengths:
        for bits in args.bits:
            print(f"{length} tokens, {bits} bits", file=sys.stderr)
            rows.append(in_own_process(args, length, None if bits == 16 else bits))
    show(rows)
    facts = {"dtype": args.dtype, "machine": platform.machine(), "mlx": version("mlx")}
    print(json.dumps({"benchmark": "memory", "model": args.model} | facts | {"rows": rows}))


if __name__ == "__main__":
    sys.exit(run(main, "memory"))
