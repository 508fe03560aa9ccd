"""Random checkpoints: the hub's tensors, in every layout, with equal bytes from equal seeds."""

import json
import math
import shutil
from pathlib import Path

import make_random_checkpoint as maker
import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

TINY = ["--size", "tiny", "--vocab", "96"]


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for a tokenizer, so that tests do not depend on the demo's."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    monkeypatch.setattr(maker, "TOKENIZER", folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    added = [{"content": "<bos>", "id": 100}, {"content": "<eos>", "id": 101}]
    tokenizer = {"model": {"vocab": {"a": 0, "<pad>": 3}}, "added_tokens": added}
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text("template")
    (folder / "generation_config.json").write_text("{}")


def load(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(mx.load(str(path)))
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("layout", "count"), [("hub", 2302), ("fused", 234), ("mlx", 256)])
def test_plan_of_full_size(layout: str, count: int) -> None:
    entries = maker.plan(maker.FULL, layout)
    assert len(entries) == count
    assert round(sum(math.prod(entry.shape) for entry in entries) / 1e9, 3) == 8.468
    assert round(sum(entry.num_bytes for entry in entries) / 1e9, 2) == 16.94
    assert sum(entry.dtype == "F32" for entry in entries) == 22


def test_tensor_shapes_of_full_size() -> None:
    shapes = maker.tensor_shapes(maker.FULL)
    expected = {
        "model.embed_tokens.weight": (128000, 2048),
        "model.embedding_norm.weight": (2048,),
        "model.layers.0.operator_norm.weight": (2048,),
        "model.layers.0.conv.in_proj.weight": (6144, 2048),
        "model.layers.0.conv.conv.weight": (2048, 1, 3),
        "model.layers.21.self_attn.k_proj.weight": (512, 2048),
        "model.layers.21.self_attn.q_layernorm.weight": (64,),
        "model.layers.1.feed_forward.w2.weight": (2048, 7168),
        "model.layers.2.feed_forward.gate.weight": (32, 2048),
        "model.layers.2.feed_forward.expert_bias": (32,),
        "model.layers.23.feed_forward.experts.31.w1.weight": (1792, 2048),
        "model.layers.23.feed_forward.experts.31.w2.weight": (2048, 1792),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "lm_head.weight" not in shapes


def test_plan_stacks_experts() -> None:
    fused = {entry.name: entry.shape for entry in maker.plan(maker.FULL, "fused")}
    assert fused["model.layers.2.feed_forward.experts.gate_up_proj"] == (32, 3584, 2048)
    assert fused["model.layers.2.feed_forward.experts.down_proj"] == (32, 2048, 1792)
    mlx = {entry.name: entry.shape for entry in maker.plan(maker.FULL, "mlx")}
    assert mlx["model.layers.2.feed_forward.switch_mlp.down_proj.weight"] == (32, 2048, 1792)
    assert mlx["model.layers.0.feed_forward.gate_proj.weight"] == (7168, 2048)
    assert mlx["model.layers.0.conv.conv.weight"] == (2048, 3, 1)


def test_to_bfloat16() -> None:
    # Half way between neighbours goes to the even one: 1 + 1/256 down, 1 + 3/256 up.
    values = np.array([1.0, 1 + 1 / 256, 1 + 3 / 256, -2.5], np.float32)
    expected = np.array([1.0, 1.0, 1 + 4 / 256, -2.5], np.float32)
    np.testing.assert_array_equal(maker.to_bfloat16(values), expected.view(np.uint32) >> 16)


def test_random_tensors() -> None:
    config = maker.config_of_size("tiny", 96)
    tensors = maker.random_tensors(config, 7)
    assert {name: tensor.shape for name, tensor in tensors.items()} == maker.tensor_shapes(config)
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    weight = tensors["model.layers.0.feed_forward.w1.weight"]
    assert abs(weight.std() * 8 - 1) < 0.02
    assert abs(weight.mean()) < 0.005
    # Stored answers rest on these very numbers.
    expected = np.array([0.0028732992, 0.16086738, -0.09912648], np.float32)
    np.testing.assert_array_equal(weight[0, :3], expected)


def test_random_chunks_join_to_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(maker.random_chunks("a", (5, 7), 1)))
    monkeypatch.setattr(maker, "CHUNK", 8)
    pieces = list(maker.random_chunks("a", (5, 7), 1))
    assert [len(piece) for piece in pieces] == [8, 8, 8, 8, 3]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_main_writes_hub_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert maker.main([*TINY, "--out", str(out), "--shard-bytes", "500000"]) == 0
    assert "138 tensors" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]

    found: dict[str, tuple] = {}
    for file in files:
        with safe_open(out / file, "mlx") as stored:
            for name in stored.offset_keys():
                part = stored.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
                assert index["weight_map"][name] == file
    entries = maker.plan(config)
    assert found == {entry.name: (entry.shape, entry.dtype) for entry in entries}
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in entries)

    for name, expected in maker.random_tensors(config, 0).items():
        kept = mx.array(expected)
        kept = kept if name.endswith("expert_bias") else kept.astype(mx.bfloat16)
        assert mx.array_equal(load(out)[name], kept), name


def test_main_repeats_itself(tmp_path: Path) -> None:
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        assert maker.main([*TINY, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_main_writes_one_model_in_every_layout(tmp_path: Path) -> None:
    stored = {}
    for layout in ("hub", "fused", "mlx"):
        assert maker.main([*TINY, "--layout", layout, "--out", str(tmp_path / layout)]) == 0
        stored[layout] = load(tmp_path / layout)
    prefix = "model.layers.2.feed_forward."
    w1, w3, w2 = (
        mx.stack([stored["hub"][f"{prefix}experts.{expert}.{w}.weight"] for expert in range(4)])
        for w in ("w1", "w3", "w2")
    )
    gate_up = mx.concatenate([w1, w3], axis=1)
    assert mx.array_equal(stored["fused"][f"{prefix}experts.gate_up_proj"], gate_up)
    assert mx.array_equal(stored["fused"][f"{prefix}experts.down_proj"], w2)
    for name, expected in (("gate_proj", w1), ("up_proj", w3), ("down_proj", w2)):
        assert mx.array_equal(stored["mlx"][f"{prefix}switch_mlp.{name}.weight"], expected)
    taps = stored["hub"]["model.layers.0.conv.conv.weight"]
    assert mx.array_equal(stored["mlx"]["model.layers.0.conv.conv.weight"], taps.transpose(0, 2, 1))


def test_main_brings_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    write_tokenizer(tokenizer)
    out = tmp_path / "out"
    assert maker.main(["--size", "tiny", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    ids = [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    assert ids == [100, 101, 3]
    assert config["vocab_size"] == 2048
    copied = {name: data for name, data in contents(out).items() if name in maker.TOKENIZER_FILES}
    assert copied == contents(tokenizer)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert maker.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_main_refuses_a_small_vocabulary(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tokenizer)
    error = refusal(["--vocab", "101", "--out", str(tmp_path / "out")], capsys)
    assert "the tokenizer has 102 ids" in error


def test_main_refuses_a_used_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert maker.main([*TINY, "--out", str(out), "--shard-bytes", "500000"]) == 0
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in refusal([*TINY, "--out", str(out)], capsys)
    assert maker.main([*TINY, "--out", str(out), "--force"]) == 0
    names = sorted(path.name for path in out.iterdir())
    index = "model.safetensors.index.json"
    assert names == ["config.json", "model-00001-of-00001.safetensors", index, "notes.txt"]


def test_main_refuses_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10_000, 9_000, 1_000)
    monkeypatch.setattr(maker.shutil, "disk_usage", lambda _folder: usage)
    assert "not enough space" in refusal([*TINY, "--out", str(tmp_path / "out")], capsys)


def test_main_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    write = maker.write_safetensors
    monkeypatch.setattr(
        maker, "write_safetensors", lambda *arguments: write(*arguments[:-1], interrupt)
    )
    assert maker.main([*TINY, "--out", str(tmp_path / "out")]) == 130
    assert list((tmp_path / "out").iterdir()) == []
