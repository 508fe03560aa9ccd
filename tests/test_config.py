"""Config: every key of the published config.json files is read, and what the port lacks refused."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from make_random_checkpoint import SIZES, dense_width, layer_types
from mlx_lm.models import lfm2, lfm2_moe
from reference import cases

from lfm_mlx import Config
from lfm_mlx.errors import InputError

C, A = "conv", "full_attention"

LFM25_8B = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "bos_token_id": 124894,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 124900,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 7168,
    "layer_types": [A if layer in (2, 6, 10, 14, 18, 21) else C for layer in range(24)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 1792,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 124893,
    "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"},
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
    "transformers_version": "5.0.0",
    "use_cache": True,
    "use_expert_bias": True,
    "vocab_size": 128000,
}
LFM2_8B = {key: value for key, value in LFM25_8B.items() if key != "rope_parameters"} | {
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "transformers_version": "4.57.0",
    "vocab_size": 65536,
}
LFM2_24B = LFM2_8B | {
    "intermediate_size": 11776,
    "layer_types": [A if layer % 4 == 2 else C for layer in range(40)],
    "moe_intermediate_size": 1536,
    "num_experts": 64,
    "num_hidden_layers": 40,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
LFM2_1B = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
LFM2_700M = LFM2_1B | {
    "block_dim": 1536,
    "block_ff_dim": 10240,
    "conv_dim": 1536,
    "conv_dim_out": 1536,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_heads": 24,
}
LFM2_350M = LFM2_1B | {
    "block_dim": 1024,
    "block_ff_dim": 6656,
    "conv_dim": 1024,
    "conv_dim_out": 1024,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_heads": 16,
}
LFM2_2B = LFM2_1B | {
    "block_auto_adjust_ff_dim": False,
    "block_ff_dim": 10752,
    "full_attn_idxs": [2, 6, 9, 13, 17, 21, 24, 27],
    "num_hidden_layers": 30,
}
# The later spelling of the dense family: layer_types, nested rope, tie_embedding, theta.
LFM25_1B = {key: value for key, value in LFM2_1B.items() if key != "full_attn_idxs"} | {
    "dtype": "bfloat16",
    "intermediate_size": 12288,
    "layer_types": [A if layer in (2, 5, 8, 10, 12, 14) else C for layer in range(16)],
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "theta": 1000000.0,
    "tie_embedding": True,
    "head_dim": 64,
}
# name → config.json, width of the dense feed-forward, attention layers
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "LFM2.5-8B-A1B": (LFM25_8B, 7168, 6),
    "LFM2-8B-A1B": (LFM2_8B, 7168, 6),
    "LFM2-24B-A2B": (LFM2_24B, 11776, 10),
    "LFM2-1.2B": (LFM2_1B, 8192, 6),
    "LFM2-700M": (LFM2_700M, 6912, 6),
    "LFM2-350M": (LFM2_350M, 4608, 6),
    "LFM2-2.6B": (LFM2_2B, 10752, 8),
    "LFM2.5-1.2B": (LFM25_1B, 8192, 6),
}
every_published = pytest.mark.parametrize("name", PUBLISHED)


def refusal(config: dict[str, Any], **changes: Any) -> str:
    """The message with which `config` is refused after `changes`; a change to ... removes a key."""
    changed = {k: v for k, v in (config | changes).items() if v is not ...}
    with pytest.raises(InputError) as caught:
        Config.from_dict(changed)
    message = str(caught.value)
    assert "\n" not in message
    return message


@every_published
def test_published_configs_have_no_unknown_key(name: str) -> None:
    values, width, attention_layers = PUBLISHED[name]
    config = Config.from_dict(values)
    assert config.unknown_keys == ()
    assert config.intermediate_size == width
    assert config.num_attention_layers == attention_layers
    assert config.num_hidden_layers == values["num_hidden_layers"]
    assert config.head_dim == 64
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (values["eos_token_id"],)


@every_published
def test_agrees_with_mlx_lm(name: str) -> None:
    values, width, _ = PUBLISHED[name]
    config = Config.from_dict(values)
    args = {"lfm2": lfm2, "lfm2_moe": lfm2_moe}[config.model_type].ModelArgs.from_dict(values)
    attention = tuple(i for i, kind in enumerate(config.layer_types) if kind == A)
    assert attention == tuple(args.full_attn_idxs)
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads",
                "max_position_embeddings", "norm_eps", "conv_bias", "conv_L_cache",
                "rope_theta"):  # fmt: skip
        assert getattr(config, key) == getattr(args, key), key
    if config.model_type == "lfm2_moe":
        for key in ("intermediate_size", "moe_intermediate_size", "num_experts",
                    "num_experts_per_tok", "norm_topk_prob", "use_expert_bias",
                    "num_dense_layers", "routed_scaling_factor"):  # fmt: skip
            assert getattr(config, key) == getattr(args, key), key
    else:
        assert config.num_dense_layers == config.num_hidden_layers
        assert lfm2.MLP(
            8, args.block_ff_dim, args.block_multiple_of, args.block_auto_adjust_ff_dim,
            args.block_ffn_dim_multiplier,
        ).w1.weight.shape[0] == width  # fmt: skip


def test_every_value_is_where_the_checkpoint_says() -> None:
    config = Config.from_dict(LFM25_8B)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (128000, 2048, 7168)
    assert (config.num_experts, config.num_experts_per_tok) == (32, 4)
    assert (config.moe_intermediate_size, config.num_dense_layers) == (1792, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert (config.rope_theta, config.norm_eps) == (5e6, 1e-5)
    assert (config.conv_L_cache, config.num_conv_layers, config.conv_memory) == (3, 18, 36)
    assert [i for i in range(24) if config.is_attention(i)] == [2, 6, 10, 14, 18, 21]
    assert [i for i in range(24) if not config.is_sparse(i)] == [0, 1]
    assert config.dtype == "bfloat16"
    assert config.quantization is None


def test_cache_bytes() -> None:
    config = Config.from_dict(LFM25_8B)
    # 12 KiB a token in bfloat16, and 144 KiB of windows
    assert config.cache_bytes(0, 2) == 144 << 10
    assert config.cache_bytes(1000, 2) == (144 << 10) + 1000 * (12 << 10)


def test_is_frozen() -> None:
    config = Config.from_dict(LFM25_8B)
    with pytest.raises(FrozenInstanceError):
        config.vocab_size = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_the_dict_is_left_as_it_was() -> None:
    values = json.loads(json.dumps(LFM25_1B))
    Config.from_dict(values)
    assert values == LFM25_1B


def test_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LFM2_8B))
    assert Config.from_folder(tmp_path) == Config.from_dict(LFM2_8B)
    with pytest.raises(InputError, match="no such file"):
        Config.from_folder(tmp_path / "absent")


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_reads_every_stored_case(case: Any) -> None:
    config = Config.from_dict(case.config)
    assert list(config.layer_types) == layer_types(case.config)
    assert config.intermediate_size == dense_width(case.config)


def test_reads_what_the_script_writes() -> None:
    for size in SIZES.values():
        assert Config.from_dict(size).unknown_keys == ()


@pytest.mark.parametrize("spelling", ["rope_theta", "theta"])
def test_rope_theta_at_the_top(spelling: str) -> None:
    values = {k: v for k, v in LFM25_8B.items() if k != "rope_parameters"}
    assert Config.from_dict(values | {spelling: 12345.5}).rope_theta == 12345.5


def test_nested_rope_theta_wins_as_in_transformers() -> None:
    assert Config.from_dict(LFM25_8B | {"rope_theta": 10000.0}).rope_theta == 5e6
    nested = {"rope_type": "default", "partial_rotary_factor": 1.0}
    assert (
        Config.from_dict(LFM25_8B | {"rope_theta": 7.0, "rope_parameters": nested}).rope_theta == 7
    )


@pytest.mark.parametrize("key", ["tie_word_embeddings", "tie_embedding"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(key: str, tied: bool) -> None:
    values = {k: v for k, v in LFM25_8B.items() if k != "tie_word_embeddings"}
    assert Config.from_dict(values | {key: tied}).tie_word_embeddings is tied


def test_layers_by_index_or_by_type() -> None:
    values = {k: v for k, v in LFM25_8B.items() if k != "layer_types"}
    by_index = Config.from_dict(values | {"full_attn_idxs": [2, 6, 10, 14, 18, 21]})
    assert by_index.layer_types == Config.from_dict(LFM25_8B).layer_types
    assert Config.from_dict(values | {"full_attn_idxs": []}).num_attention_layers == 0
    both = Config.from_dict(LFM25_8B | {"full_attn_idxs": [2, 6, 10, 14, 18, 21]})
    assert both.layer_types == by_index.layer_types


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 8192),
        ({"block_ffn_dim_multiplier": 1.3}, 10752),  # 1.3 x 8192 = 10649.6, up to a multiple of 256
        ({"block_ffn_dim_multiplier": None}, 8192),
        ({"block_multiple_of": 1000}, 9000),
        ({"block_auto_adjust_ff_dim": False}, 12288),
        ({"block_ff_dim": 100, "block_multiple_of": 7}, 70),  # 66, up to a multiple of 7
        ({"block_ff_dim": 100, "block_ffn_dim_multiplier": None}, 66),  # not rounded up either
    ],
)
def test_dense_width_rule(changes: dict[str, Any], width: int) -> None:
    assert Config.from_dict(LFM2_1B | changes).intermediate_size == width


def test_dense_width_rule_has_no_place_in_the_sparse_family() -> None:
    config = Config.from_dict(LFM25_8B | {"block_auto_adjust_ff_dim": True})
    assert config.intermediate_size == 7168
    assert config.unknown_keys == ("block_auto_adjust_ff_dim",)


def test_unknown_keys_are_listed_in_order() -> None:
    config = Config.from_dict(LFM25_8B | {"zeta": 1, "unsloth_version": "2026.1"})
    assert config.unknown_keys == ("unsloth_version", "zeta")


@pytest.mark.parametrize("ids", [7, [7], [7, 2]])
def test_eos_token_ids(ids: Any) -> None:
    expected = (ids,) if isinstance(ids, int) else tuple(ids)
    assert Config.from_dict(LFM25_8B | {"eos_token_id": ids}).eos_token_ids == expected


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_quantization_in_both_spellings(key: str) -> None:
    settings = {"bits": 4, "group_size": 64, "model.embed_tokens": {"bits": 6, "group_size": 64}}
    assert Config.from_dict(LFM25_8B | {key: settings}).quantization == settings
    assert Config.from_dict(LFM25_8B | {key: None}).quantization is None


REQUIRED = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
    "num_hidden_layers", "num_experts", "num_experts_per_tok", "norm_topk_prob", "layer_types",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "use_expert_bias",
    "num_dense_layers", "norm_eps", "conv_bias", "conv_L_cache",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key(key: str) -> None:
    message = refusal(LFM25_8B, **{key: ...})
    assert f"{key!r} is missing" in message


def test_keys_that_transformers_and_mlx_lm_give_one_default() -> None:
    left_out = ("routed_scaling_factor", "rope_parameters", "tie_word_embeddings")
    few = {key: value for key, value in LFM25_8B.items() if key not in left_out}
    config, stock = Config.from_dict(few), lfm2_moe.ModelArgs.from_dict(few)
    assert config.routed_scaling_factor == stock.routed_scaling_factor == 1.0
    assert config.rope_theta == stock.rope_theta == 1e6
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", "lfm2_vl"),
        ("model_type", ["lfm2"]),
        ("vocab_size", 0),
        ("vocab_size", "128000"),
        ("hidden_size", True),
        ("hidden_size", 2048.5),
        ("num_experts", -4),
        ("norm_eps", 0),
        ("norm_eps", float("nan")),
        ("norm_eps", "1e-5"),
        ("max_position_embeddings", float("inf")),
        ("conv_bias", 0),
        ("conv_bias", "false"),
        ("conv_L_cache", 0),
        ("tie_word_embeddings", "yes"),
        ("num_experts_per_tok", 33),
        ("num_dense_layers", 25),
        ("num_dense_layers", -1),
        ("num_dense_layers", True),
        ("num_attention_heads", 33),
        ("num_attention_heads", 2048),  # heads of width 1 cannot be rotated
        ("num_key_value_heads", 5),
        ("head_dim", 128),
        ("head_dim", "64"),
        ("num_hidden_layers", 23),
        ("layer_types", "conv"),
        ("layer_types", 24),
        ("layer_types", [C] * 23),
        ("eos_token_id", "<|im_end|>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", True),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4}),
        ("rope_theta", -1.0),
        ("rope_parameters", [5000000]),
        ("use_pos_enc", False),
        ("block_use_swiglu", False),
        ("sliding_window", 4096),
        ("is_causal", False),
        ("full_attn_idxs", [2, 24]),
        ("full_attn_idxs", 2),
        ("full_attn_idxs", ["2"]),
        ("quantization", True),
        ("quantization", [4, 64]),
    ],
)  # fmt: skip
def test_unsupported_value_is_refused_by_name(key: str, value: Any) -> None:
    config = LFM25_8B if key != "rope_theta" else LFM2_8B
    changes = {"layer_types": ...} if key == "full_attn_idxs" else {}
    message = refusal(config, **{key: value}, **changes)
    # a count that does not fit is refused by the name of the list
    assert message.startswith(
        f"config.json: {'layer_types' if key == 'num_hidden_layers' else key} is "
    )
    if key != "num_hidden_layers":
        assert f"{value!r}; supported: " in message


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_another_rope_type(kind: str) -> None:
    message = refusal(LFM25_8B, rope_parameters={"rope_theta": 1e6, "rope_type": kind, "factor": 2})
    assert message == f"config.json: rope_parameters.rope_type is {kind!r}; supported: default"


@pytest.mark.parametrize("extra", [{"partial_rotary_factor": 0.5}, {"factor": 2.0}])
def test_rope_parameters_beyond_theta(extra: dict[str, Any]) -> None:
    key, value = next(iter(extra.items()))
    message = refusal(LFM25_8B, rope_parameters={"rope_theta": 1e6} | extra)
    assert f"rope_parameters.{key} is {value}" in message


def test_layer_of_another_type() -> None:
    message = refusal(LFM25_8B, layer_types=[C] * 23 + ["sliding_attention"])
    assert "layer_types is 'sliding_attention'" in message


def test_two_lists_of_layers_that_disagree() -> None:
    message = refusal(LFM25_8B, full_attn_idxs=[2, 6])
    assert "layer_types is " in message
    assert "full_attn_idxs = [2, 6]" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda settings: settings["quant_method"],
)
@pytest.mark.parametrize("config", [LFM25_8B, LFM25_1B], ids=["sparse", "dense"])
def test_another_quantization_is_refused_by_its_name(config: dict, settings: dict) -> None:
    message = refusal(config, quantization_config=settings)
    assert (
        f"quantization_config is {settings['quant_method']!r}, which MLX does not read" in message
    )
    assert "take the unquantized checkpoint" in message


def test_mlx_settings_count_before_those_of_another_method() -> None:
    mlx, other = {"bits": 4, "group_size": 64}, {"quant_method": "awq", "bits": 4}
    config = Config.from_dict(LFM25_8B | {"quantization": mlx, "quantization_config": other})
    assert config.quantization == mlx
    assert config.unknown_keys == ("quantization_config",)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LFM25_1B, ["Lfm2BidirectionalModel"]),
        (LFM25_1B, ["Lfm2Model"]),
        (LFM25_1B, ["Lfm2ForSequenceClassification"]),
        (LFM25_1B, ["Lfm2MoeForCausalLM"]),
        (LFM25_1B, "Lfm2ForMaskedLM"),
        (LFM25_8B, ["DSparkDraftModel"]),
        (LFM25_8B, ["Lfm2ForCausalLM"]),
        (LFM25_8B, ["Lfm2MoeForTokenClassification", "Lfm2MoeModel"]),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_its_name(config: dict, names: Any) -> None:
    message = refusal(config, architectures=names)
    assert all(name in message for name in ([names] if isinstance(names, str) else names))
    assert "supported with model_type" in message


@pytest.mark.parametrize("names", [..., None, [], ["LFM2ForCausalLM"], ["X", "Lfm2ForCausalLM"]])
def test_architectures_that_say_nothing_else(names: Any) -> None:
    changed = LFM25_1B | {"architectures": names}
    config = Config.from_dict({key: value for key, value in changed.items() if value is not ...})
    assert config.unknown_keys == ()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tie_word_embeddings": True}, {"tie_embedding": False}),
        ({"num_experts": 32}, {"num_local_experts": 16}),
    ],
)
def test_two_spellings_that_programs_read_differently_must_agree(first: dict, second: dict) -> None:
    (key, value), (other, another) = *first.items(), *second.items()
    message = refusal(LFM25_8B, **first, **second)
    assert f"{key} is {value!r} and {other} is {another!r}" in message
    assert "remove the wrong one" in message
    agreeing = Config.from_dict(LFM25_8B | first | {other: value})
    assert agreeing == Config.from_dict(LFM25_8B)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conv_dim", 1024),
        ("conv_dim_out", 1),
        ("block_dim", 1024),
        ("num_heads", 7),
        ("intermediate_size", 3),
        ("rope_theta", 3.0),
        ("theta", 3.0),
    ],
)
def test_what_nobody_reads_is_said_and_changes_nothing(key: str, value: Any) -> None:
    plain, changed = Config.from_dict(LFM25_1B), Config.from_dict(LFM25_1B | {key: value})
    assert changed.unknown_keys == (key,)
    assert replace(changed, unknown_keys=()) == plain


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, {"type": "default", "rope_theta": 1e6}, {}]
)
def test_rope_scaling_that_scales_nothing(scaling: Any) -> None:
    assert Config.from_dict(LFM25_1B | {"rope_scaling": scaling}) == Config.from_dict(LFM25_1B)


@pytest.mark.parametrize("key", ["block_multiple_of", "block_ffn_dim_multiplier"])
@pytest.mark.parametrize("value", [0, -2, "256", float("inf")])
def test_dense_width_rule_with_bad_numbers(key: str, value: Any) -> None:
    assert f"{key} is {value!r}" in refusal(LFM2_1B, **{key: value})
