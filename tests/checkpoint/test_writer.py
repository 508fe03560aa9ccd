"""A converted checkpoint's files: shards with an index, and what is kept of the source."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from folders import contents, stored_tensors

from lfm_mlx.checkpoint import writer
from lfm_mlx.checkpoint.folder import INDEX_FILE
from lfm_mlx.checkpoint.writer import ShardWriter


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.uint32])
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20])
def test_shards_hold_what_was_added(tmp_path: Path, dtype: mx.Dtype, shard_bytes: int) -> None:
    writer = ShardWriter(tmp_path, shard_bytes)
    arrays = {f"t{i}": (mx.arange(3 * i + 1) + i).astype(dtype) for i in range(7)}
    for name, array in arrays.items():
        writer.add(name, array)
    writer.finish(total_parameters=70)
    stored = stored_tensors(tmp_path)
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        assert stored[name].dtype == dtype
        assert mx.array_equal(stored[name], array), name
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    total = sum(array.nbytes for array in arrays.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 70}
    assert writer.nbytes == total
    for name, file in index["weight_map"].items():
        assert name in load_names(tmp_path / file)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    count = {1: 7, 1 << 20: 1}.get(shard_bytes, len(files))
    assert len(files) == count
    if count == 1:
        assert files == ["model.safetensors"]
    else:
        assert files[-1] == f"model-{count:05d}-of-{count:05d}.safetensors"
    for file in tmp_path.glob("*.safetensors"):
        held = [arrays[name].nbytes for name in load_names(file)]
        assert len(held) == 1 or sum(held) <= shard_bytes


def load_names(file: Path) -> set[str]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return set(arrays)


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    """The operating system refuses to write on; MLX reports it without the reason."""
    code = (
        "import resource, signal, mlx.core as mx\n"
        "from pathlib import Path\n"
        "from lfm_mlx.checkpoint.writer import ShardWriter\n"
        "from lfm_mlx.files import atomic_folder\n"
        "from lfm_mlx.checkpoint import writer\n"
        "from lfm_mlx.cli import command\n"
        "writer.free_bytes = lambda folder: 5000\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "def main():\n"
        f"    with atomic_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "        shards = ShardWriter(folder, 1)\n"
        "        for number in range(3):\n"
        "            shards.add(str(number), mx.zeros((10000,)))\n"
        "        shards.finish(1)\n"
        "raise SystemExit(command.run(main, 'test'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("out: no space left on the disk; free some and run this again\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_kept_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["LICENSE", "LICENSE.txt", "NOTICE", "added_tokens.json", "chat_template.jinja",
            "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json", "vocab.json"]  # fmt: skip
    left = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "a.py"]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()
    assert writer.copy_kept(source, target) == kept
    assert contents(target) == {name: name.encode() for name in kept}


@pytest.mark.parametrize(
    ("names", "is_one"),
    [
        (["config.json", "model.safetensors"], True),
        (["config.json", "model-00001-of-00002.safetensors", "notes.txt"], True),
        (["config.json"], False),
        (["model.safetensors"], False),
        ([], False),
    ],
)
def test_a_checkpoint_has_a_config_and_weights(
    tmp_path: Path, names: list[str], is_one: bool
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    assert writer.is_checkpoint(tmp_path) == is_one
