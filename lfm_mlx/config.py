"""The frozen Config: the keys of config.json as they stand there, everything else by property.

Reads every config of the `lfm2_moe` and the dense `lfm2` family, refuses by name what the port
lacks, and lists in `unknown_keys` the keys without effect. A key has a default only if
transformers and mlx-lm agree on it; what else shapes the model must be in the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lfm_mlx.errors import InputError
from lfm_mlx.files import read_json

CONV = "conv"
ATTENTION = "full_attention"

# Keys that say nothing about the function the model computes.
INERT_KEYS = frozenset(
    {
        "_name_or_path", "attention_dropout", "auto_map", "block_mlp_init_scale",
        "block_norm_eps", "block_out_init_scale", "block_use_xavier_init", "bos_token_id",
        "conversion", "conv_use_xavier_init", "dtype", "initializer_range", "license",
        "output_router_logits", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
# Keys whose value must be this one: the port computes nothing else.
FIXED_KEYS = {
    "block_use_swiglu": True,
    "use_pos_enc": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "is_causal": True,
    "sliding_window": None,
}
# Widths that neither transformers nor mlx-lm takes from here: they are left behind when a model is
# cut, and the tensors' shapes tell the truth.
UNREAD_WIDTHS = ("conv_dim", "conv_dim_out", "block_dim")
# The architectures whose weights answer as this model does, by model type.
ARCHITECTURES = {"lfm2_moe": "Lfm2MoeForCausalLM", "lfm2": "Lfm2ForCausalLM"}
# Other spellings of a key, in the order in which transformers and mlx-lm take them.
SPELLINGS = {
    "tie_word_embeddings": ("tie_word_embeddings", "tie_embedding"),
    "intermediate_size": ("block_ff_dim", "intermediate_size"),
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "num_experts": ("num_experts", "num_local_experts"),
}
# Where a value under the second spelling differs, programs disagree on which one counts.
MUST_AGREE = ("tie_word_embeddings", "num_experts")
# The rotary base of a config that names none: transformers' and mlx-lm's.
ROPE_THETA = 1e6
# Where quantization stands; other methods write the second one.
QUANTIZATION_KEYS = ("quantization", "quantization_config")


class ProjectionNames(NamedTuple):
    """Names of the three projections of a dense feed-forward in a family's checkpoints."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model's numbers, named as config.json names them. Widths in elements, counts in units."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_types: tuple[str, ...]
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    conv_L_cache: int
    conv_bias: bool
    tie_word_embeddings: bool
    num_dense_layers: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    use_expert_bias: bool = False
    routed_scaling_factor: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    quantization: Mapping[str, Any] | None = None
    unknown_keys: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Config":
        """Read `config.json` of a checkpoint folder. Raises InputError as `from_dict` does."""
        return cls.from_dict(read_json(Path(folder) / "config.json"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Build from the parsed config.json.

        Raises InputError that names the key, its value and what is supported, when a key is
        missing, has an impossible value, or asks for something this port does not compute.
        """
        reader = _Reader(values)
        model_type = reader.choice("model_type", ("lfm2_moe", "lfm2"))
        reader.check_architecture(model_type)
        layer_types = reader.layer_types()
        fields: dict[str, Any] = {
            "model_type": model_type,
            "layer_types": layer_types,
            "rope_theta": reader.rope_theta(),
            "norm_eps": reader.positive("norm_eps", float),
            "conv_bias": reader.flag("conv_bias"),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", default=True),
            "eos_token_ids": reader.token_ids("eos_token_id"),
            "dtype": values.get("dtype", values.get("torch_dtype")),
            "quantization": reader.quantization(),
        }
        for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"):
            fields[key] = reader.positive(key)
        for key in ("max_position_embeddings", "conv_L_cache", "intermediate_size"):
            fields[key] = reader.positive(key)
        if model_type == "lfm2_moe":
            fields |= reader.experts(len(layer_types))
        else:
            fields["num_dense_layers"] = len(layer_types)
            fields["intermediate_size"] = reader.adjusted_width(fields["intermediate_size"])
        reader.check_widths(fields)
        return cls(**fields, unknown_keys=reader.unknown_keys())

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_conv_layers(self) -> int:
        return self.layer_types.count(CONV)

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count(ATTENTION)

    @property
    def conv_memory(self) -> int:
        """Number of tokens the stack of convolutions sees back: (W - 1) x conv layers."""
        return (self.conv_L_cache - 1) * self.num_conv_layers

    @property
    def dense_projections(self) -> ProjectionNames:
        if self.model_type == "lfm2":
            return ProjectionNames("w1", "w3", "w2")
        return ProjectionNames("gate_proj", "up_proj", "down_proj")

    def is_attention(self, layer_index: int) -> bool:
        return self.layer_types[layer_index] == ATTENTION

    def is_sparse(self, layer_index: int) -> bool:
        return layer_index >= self.num_dense_layers

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes that the memory of one conversation of `tokens` tokens takes, keys to windows."""
        per_token = 2 * self.num_key_value_heads * self.head_dim * self.num_attention_layers
        windows = (self.conv_L_cache - 1) * self.hidden_size * self.num_conv_layers
        return (per_token * tokens + windows) * itemsize


class _Reader:
    """Takes values out of config.json one by one, and remembers which keys it was asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.seen = set(INERT_KEYS)
        self.overruled: set[str] = set()

    def get(self, key: str, default: Any = None, *, required: bool = True) -> Any:
        spellings = SPELLINGS.get(key, (key,))
        self.seen.update(spellings)
        given = [spelling for spelling in spellings if self.values.get(spelling) is not None]
        for other in given[1:]:
            self.compare(given[0], other, self.values[given[0]], self.values[other],
                         must_agree=key in MUST_AGREE)  # fmt: skip
        if given:
            return self.values[given[0]]
        if required and default is None:
            raise InputError(
                f"config.json: key {key!r} is missing; a config of the LFM2 family has it: "
                "take config.json from the model's own repository"
            )
        return default

    def compare(
        self, key: str, other: str, value: Any, other_value: Any, *, must_agree: bool = False
    ) -> None:
        """Note that `key` overrules `other` if they differ; raise InputError if they must agree."""
        if value == other_value:
            return
        if must_agree:
            raise InputError(
                f"config.json: {key} is {value!r} and {other} is {other_value!r}; they name the "
                "same thing: remove the wrong one"
            )
        self.overruled.add(other)

    def check_architecture(self, model_type: str) -> None:
        """Raise InputError unless `architectures` is absent or names a causal language model.

        Encoders, classifiers and drafters share the model type and the names of the tensors.
        """
        listed = self.get("architectures", required=False)
        names = listed if isinstance(listed, (list, tuple)) else [listed] if listed else []
        accepted = ARCHITECTURES[model_type]
        if names and accepted.lower() not in [str(name).lower() for name in names]:
            named = ", ".join(str(name) for name in names)
            raise InputError(
                f"config.json: architectures names {named}; supported with model_type {model_type}:"
                f" {accepted}, a causal language model"
            )

    def refuse(self, key: str, value: Any, expected: str) -> InputError:
        return InputError(f"config.json: {key} is {value!r}; supported: {expected}")

    def choice(self, key: str, accepted: tuple[str, ...]) -> str:
        value = self.get(key)
        if value not in accepted:
            raise self.refuse(key, value, " or ".join(accepted))
        return value

    def positive(self, key: str, kind: type = int) -> Any:
        return self.as_positive(key, self.get(key), kind)

    def as_positive(self, key: str, value: Any, kind: type) -> Any:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not 0 < value < math.inf or kind(value) != value:
            raise self.refuse(key, value, f"a positive {kind.__name__}")
        return kind(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key, default, required=default is None)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, (), required=False)
        ids = value if isinstance(value, (list, tuple)) else (value,)
        if not all(type(token) is int for token in ids):
            raise self.refuse(key, value, "a token id or a list of them")
        return tuple(ids)

    def layer_types(self) -> tuple[str, ...]:
        count = self.positive("num_hidden_layers")
        indices = self.get("full_attn_idxs", required=False)
        types = self.get("layer_types", required=indices is None)
        if indices is not None:
            listed = self.types_by_index(indices, count)
            if types not in (None, listed, tuple(listed)):
                raise self.refuse("layer_types", types, f"what full_attn_idxs = {indices} says")
            types = listed
        if not isinstance(types, (list, tuple)) or len(types) != count:
            raise self.refuse("layer_types", types, f"a list of num_hidden_layers = {count}")
        for layer_type in types:
            if layer_type not in (CONV, ATTENTION):
                raise self.refuse("layer_types", layer_type, f"{CONV} or {ATTENTION}")
        return tuple(types)

    def types_by_index(self, indices: Any, count: int) -> list[str]:
        known = isinstance(indices, (list, tuple)) and all(
            index in range(count) for index in indices
        )
        if not known:
            raise self.refuse("full_attn_idxs", indices, f"a list of layers below {count}")
        return [ATTENTION if index in indices else CONV for index in range(count)]

    def rope_theta(self) -> float:
        """The base of the rotary embedding, from its nested or its two top-level spellings."""
        nested = self.get("rope_parameters", {}, required=False)
        if not isinstance(nested, Mapping):
            raise self.refuse("rope_parameters", nested, "an object with rope_theta")
        rope_type = nested.get("rope_type", "default")
        if rope_type != "default":
            raise self.refuse("rope_parameters.rope_type", rope_type, "default")
        plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
        for key in sorted(set(nested) - {"rope_theta"}):
            if key not in plain or nested[key] != plain[key]:
                raise self.refuse(f"rope_parameters.{key}", nested[key], "rope_theta alone")
        self.check_rope_scaling()
        found = {key: self.get(key, required=False) for key in ("rope_theta", "theta")}
        found = {"rope_parameters.rope_theta": nested.get("rope_theta")} | found
        (key, theta), *others = [item for item in found.items() if item[1] is not None] or [
            ("rope_theta", ROPE_THETA)
        ]
        for other, value in others:
            self.compare(key, other, theta, value)
        return self.as_positive("rope_theta", theta, float)

    def check_rope_scaling(self) -> None:
        """Raise InputError if `rope_scaling` asks for more than the plain rotary embedding."""
        scaling = self.get("rope_scaling", required=False)
        kinds = {"rope_type": "default", "type": "default"}
        plain = isinstance(scaling, Mapping) and all(
            key == "rope_theta" or kinds.get(key) == value for key, value in scaling.items()
        )
        if scaling is not None and not plain:
            raise self.refuse("rope_scaling", scaling, "null or rope_type default")

    def experts(self, num_layers: int) -> dict[str, Any]:
        keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        fields = {key: self.positive(key) for key in keys}
        fields["num_dense_layers"] = dense = self.get("num_dense_layers")
        if type(dense) is not int or not 0 <= dense <= num_layers:
            raise self.refuse("num_dense_layers", dense, f"0 to num_hidden_layers = {num_layers}")
        if fields["num_experts_per_tok"] > fields["num_experts"]:
            raise self.refuse(
                "num_experts_per_tok",
                fields["num_experts_per_tok"],
                f"at most num_experts = {fields['num_experts']}",
            )
        fields["norm_topk_prob"] = self.flag("norm_topk_prob")
        fields["use_expert_bias"] = self.flag("use_expert_bias")
        scale = self.get("routed_scaling_factor", 1.0, required=False)
        fields["routed_scaling_factor"] = self.as_positive("routed_scaling_factor", scale, float)
        return fields

    def adjusted_width(self, width: int) -> int:
        """The dense family's feed-forward width: two thirds, scaled, rounded up (`block_*`)."""
        # Absent it is 1; an explicit null means that the width is not rounded either.
        multiplier = self.get("block_ffn_dim_multiplier", 1.0, required=False)
        if "block_ffn_dim_multiplier" in self.values:
            multiplier = self.values["block_ffn_dim_multiplier"]
        multiple = self.get("block_multiple_of", 256, required=False)
        multiple = self.as_positive("block_multiple_of", multiple, int)
        if not self.flag("block_auto_adjust_ff_dim", default=True):
            return width
        width = int(2 * width / 3)
        if multiplier is None:
            return width
        multiplier = self.as_positive("block_ffn_dim_multiplier", multiplier, float)
        return multiple * -(-int(multiplier * width) // multiple)

    def quantization(self) -> Mapping[str, Any] | None:
        """MLX's settings; they count before those of another method, as in mlx-lm."""
        mlx, other = (self.get(key, required=False) for key in QUANTIZATION_KEYS)
        key, found = (QUANTIZATION_KEYS[0], mlx) if mlx else (QUANTIZATION_KEYS[1], other)
        if not found:
            return None
        if mlx and other:
            self.compare(*QUANTIZATION_KEYS, mlx, other)
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        if method is not None and method != "mlx":
            raise InputError(
                f"config.json: {key} is {method!r}, which MLX does not read; take the unquantized "
                "checkpoint and convert it, or one that was quantized for MLX"
            )
        if not isinstance(found, Mapping) or not {"bits", "group_size"} <= set(found):
            raise self.refuse(key, found, "MLX's bits and group_size")
        return {name: value for name, value in found.items() if name != "quant_method"}

    def check_widths(self, fields: Mapping[str, Any]) -> None:
        for key in UNREAD_WIDTHS:
            self.compare("hidden_size", key, fields["hidden_size"],
                         self.get(key, fields["hidden_size"], required=False))  # fmt: skip
        for key, expected in FIXED_KEYS.items():
            value = self.get(key, expected, required=False)
            if value != expected:
                raise self.refuse(key, value, repr(expected))
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        if fields["hidden_size"] % heads or fields["hidden_size"] // heads % 2:
            raise self.refuse("num_attention_heads", heads, "an even width for every head")
        if heads % kv_heads:
            raise self.refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
        head_dim = self.get("head_dim", fields["hidden_size"] // heads, required=False)
        if head_dim != fields["hidden_size"] // heads:
            raise self.refuse("head_dim", head_dim, "hidden_size / num_attention_heads")

    def unknown_keys(self) -> tuple[str, ...]:
        return tuple(sorted((set(self.values) - self.seen) | self.overruled))
