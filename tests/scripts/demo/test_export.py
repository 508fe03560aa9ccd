"""The embedded folder, which the trainer exported, has the hub's format."""

import json
import re
import struct
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "lfm_mlx" / "demo"


@pytest.fixture(scope="module")
def header():
    with (FOLDER / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.fixture(scope="module")
def config():
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def expected_shapes(config):
    """The hub's names and shapes for a config, as its checkpoints have them."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    head = d // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {"embed_tokens.weight": [config["vocab_size"], d], "embedding_norm.weight": [d]}
    for i in range(layers):
        layer = {"operator_norm.weight": [d], "ffn_norm.weight": [d]}
        if config["layer_types"][i] == "conv":
            layer |= {"conv.conv.weight": [d, 1, config["conv_L_cache"]]}
            layer |= {"conv.in_proj.weight": [3 * d, d], "conv.out_proj.weight": [d, d]}
        else:
            layer |= {f"self_attn.{n}_proj.weight": [kv, d] for n in "kv"}
            layer |= {f"self_attn.{n}_proj.weight": [d, d] for n in ("q", "out")}
            layer |= {f"self_attn.{n}_layernorm.weight": [head] for n in "qk"}
        if i < config["num_dense_layers"]:
            stems, width = ["feed_forward"], config["intermediate_size"]
        else:
            experts, width = config["num_experts"], config["moe_intermediate_size"]
            stems = [f"feed_forward.experts.{e}" for e in range(experts)]
            layer |= {"feed_forward.gate.weight": [experts, d]}
            layer |= {"feed_forward.expert_bias": [experts]}
        for stem in stems:
            layer |= {f"{stem}.{n}.weight": [width, d] for n in ("w1", "w3")}
            layer |= {f"{stem}.w2.weight": [d, width]}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"model.{name}": shape for name, shape in shapes.items()}


def test_folder_has_the_tensors_of_the_hub(header, config):
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected_shapes(config)


def test_folder_has_the_dtypes_of_the_hub(header):
    kinds = {"F32" if name.endswith("expert_bias") else "BF16" for name in header}
    assert kinds == {"F32", "BF16"}
    for name, tensor in header.items():
        assert tensor["dtype"] == ("F32" if name.endswith("expert_bias") else "BF16"), name


def test_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000


def test_tokenizer_has_the_ids_of_the_config(config):
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert ids["<|startoftext|>"] == config["bos_token_id"]
    assert ids["<|im_end|>"] == config["eos_token_id"]
    assert ids["<|pad|>"] == config["pad_token_id"]


def test_tokenizer_keeps_digits_apart():
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert not [token for token in tokenizer["model"]["vocab"] if re.search(r"\d.*\d", token)]
