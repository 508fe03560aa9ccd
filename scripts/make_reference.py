"""Ask Hugging Face's LFM2 models for the answers that the tests compare with, and store them.

The only file here that needs torch and transformers. Deterministic for given versions of the two.

    python scripts/make_reference.py --out tests/fixtures
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from make_random_checkpoint import SHARED, Config, exit_code, random_tensors
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

SPARSE: Config = SHARED | {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_dense_layers": 2,
    "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
    "max_position_embeddings": 128000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DENSE: Config = {key: SPARSE[key] for key in SPARSE if "expert" not in key and "topk" not in key}
DENSE |= {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2"}
for key in ("num_dense_layers", "moe_intermediate_size", "routed_scaling_factor"):
    DENSE.pop(key, None)


def layers(pattern: str) -> Config:
    """The layer keys of config.json from a letter a layer: c for conv, a for attention."""
    names = {"c": "conv", "a": "full_attention"}
    return {"num_hidden_layers": len(pattern), "layer_types": [names[letter] for letter in pattern]}


@dataclass(frozen=True)
class Question:
    """What to ask: a config, the real length of each row, and where padding goes."""

    name: str
    note: str
    config: Config
    lengths: tuple[int, ...] = (48,)
    padding: str = "none"
    dtype: str = "float32"


EIGHT = SPARSE | layers("ccacccac")
EVERY = EIGHT | {"num_experts": 4}
OLD_ROPE = {key: EIGHT[key] for key in EIGHT if key != "rope_parameters"} | {"rope_theta": 1e4}
NARROW = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_experts": 8}
NARROW |= {"moe_intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 1}
BLOCK = {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16, "intermediate_size": 100}
QUESTIONS = (
    Question("eight_layers", "the first eight layers' pattern of LFM2.5-8B-A1B", EIGHT),
    Question("eight_layers_bfloat16", "eight_layers in bfloat16", EIGHT, dtype="bfloat16"),
    Question("eight_layers_float16", "eight_layers in float16", EIGHT, dtype="float16"),
    Question(
        "all_layers",
        "all 24 layers' pattern of LFM2.5-8B-A1B, very narrow; 4 query heads share a key head",
        SPARSE | NARROW | layers("ccacccacccacccacccaccacc"),
        lengths=(96,),
    ),
    Question(
        "long_context",
        "a prompt of 400 tokens",
        SPARSE | NARROW | layers("ccacca"),
        lengths=(400,),
    ),
    Question(
        "odd_sizes",
        "odd widths, 3 of 5 experts, 6 heads of width 10, one dense layer",
        SPARSE
        | layers("ccaca")
        | {"vocab_size": 97, "hidden_size": 60, "intermediate_size": 37, "num_experts": 5}
        | {"moe_intermediate_size": 13, "num_experts_per_tok": 3, "num_dense_layers": 1}
        | {"num_attention_heads": 6, "num_key_value_heads": 3},
        lengths=(33,),
    ),
    Question(
        "one_expert",
        "one expert a token and no dense layer",
        SPARSE | layers("cacca") | {"num_experts_per_tok": 1, "num_dense_layers": 0},
    ),
    Question("every_expert", "every expert takes every token", EVERY),
    Question(
        "every_expert_bfloat16",
        "every_expert in bfloat16: no choice that rounding could change",
        EVERY,
        dtype="bfloat16",
    ),
    Question(
        "weights_as_they_are",
        "norm_topk_prob false, routed_scaling_factor 2.5",
        EIGHT | {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    Question(
        "no_expert_bias",
        "use_expert_bias false; every query head has its own key head",
        EIGHT | {"use_expert_bias": False, "num_key_value_heads": 4},
    ),
    Question(
        "conv_width_4",
        "conv_L_cache 4 with conv_bias",
        SPARSE | layers("cacca") | {"conv_L_cache": 4, "conv_bias": True},
    ),
    Question("conv_width_2", "conv_L_cache 2", SPARSE | layers("cacca") | {"conv_L_cache": 2}),
    Question(
        "untied_head",
        "a head of its own, two rows, rope_theta at the top level",
        OLD_ROPE | {"tie_word_embeddings": False},
        lengths=(40, 40),
    ),
    Question(
        "left_padded",
        "three rows, shorter ones padded on the left",
        EIGHT,
        lengths=(37, 24, 1),
        padding="left",
    ),
    Question(
        "right_padded",
        "three rows, shorter ones padded on the right",
        EIGHT,
        lengths=(37, 24, 1),
        padding="right",
    ),
    Question("attention_first", "the first layer attends", SPARSE | layers("aaccac")),
    Question(
        "dense_block_width",
        "dense lfm2, full_attn_idxs, feed-forward width from the block_* keys with a multiplier",
        DENSE
        | BLOCK
        | {"num_hidden_layers": 6, "full_attn_idxs": [2, 5], "block_ffn_dim_multiplier": 1.3},
    ),
    Question(
        "dense_block_defaults",
        "dense lfm2 without any block_* key: two thirds of intermediate_size, rounded up to 256",
        DENSE | layers("ccacca") | {"intermediate_size": 400},
    ),
    Question(
        "dense_plain",
        "dense lfm2 that takes intermediate_size as it is",
        DENSE | layers("ccacca") | {"block_auto_adjust_ff_dim": False},
    ),
)


def load_model(config: Config, seed: int, dtype: str = "float32") -> PreTrainedModel:
    """A Hugging Face model with our random weights, loaded from a folder as a checkpoint is."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        path = Path(folder) / "model.safetensors"
        save_file(random_tensors(config, seed), path, metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            raise ValueError(f"{config['model_type']}: {key}: {sorted(report[key])}")
    return model.eval()


def make_tokens(question: Question, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [B, L] with padding, and the mask [B, L] of the real ones."""
    length, config = max(question.lengths), question.config
    random = np.random.PCG64(seed).random_raw(len(question.lengths) * length)
    tokens = (random % (config["vocab_size"] - 3) + 3).astype(np.int32).reshape(-1, length)
    position = np.arange(length)
    real = np.array(question.lengths)[:, None]
    mask = position >= length - real if question.padding == "left" else position < real
    return np.where(mask, tokens, config["pad_token_id"]).astype(np.int32), mask


def ask(
    model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    """Logits [B, L, V] and, a sparse layer, the router's logits, weights and experts [B*L, ...]."""
    routes: list[tuple[np.ndarray, ...]] = []

    def listen(_module: torch.nn.Module, _inputs: tuple, outputs: tuple) -> None:
        routes.append(tuple(output.detach().float().numpy() for output in outputs))

    hooks = [
        module.register_forward_hook(listen)
        for name, module in model.named_modules()
        if name.endswith("feed_forward.gate")
    ]
    with torch.inference_mode():
        answer = model(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        )
    for hook in hooks:
        hook.remove()
    return answer.logits.float().numpy(), routes


def smallest_margin(
    question: Question, seed: int, routes: list[tuple[np.ndarray, ...]], mask: np.ndarray
) -> float:
    """How far the last chosen expert is from the first refused one, over all real tokens."""
    config, k = question.config, question.config.get("num_experts_per_tok", 0)
    if k == config.get("num_experts", 0):
        return 1.0
    tensors, margins = random_tensors(config, seed), []
    for layer, (logits, _, _) in enumerate(routes, start=config.get("num_dense_layers", 0)):
        bias = tensors.get(f"model.layers.{layer}.feed_forward.expert_bias", 0.0)
        scores = np.sort(1 / (1 + np.exp(-logits[mask.reshape(-1)])) + bias, axis=-1)
        margins.append(float((scores[:, -k] - scores[:, -k - 1]).min()))
    return min(margins)


def check(question: Question, arrays: dict[str, np.ndarray], margin: float) -> None:
    """Refuse a case that could not show a fault: flat logits, idle experts, near ties."""
    spread = arrays["logits"][arrays["mask"]].std()
    if not 1 < spread < 10:
        raise ValueError(f"{question.name}: logits spread {spread:.2f}; expected 1 to 10")
    chosen = set(np.unique(arrays["experts"])) - {-1}
    if len(chosen) < question.config.get("num_experts", 0):
        raise ValueError(f"{question.name}: only experts {sorted(chosen)} are ever chosen")
    if question.dtype == "float32" and margin < 1e-5:
        raise ValueError(f"{question.name}: near tie of {margin:.1e} in a router; change the seed")


def answer_question(question: Question, seed: int, out: Path) -> dict:
    """Store one case's arrays; return its facts for cases.json."""
    tokens, mask = make_tokens(question, seed)
    logits, routes = ask(load_model(question.config, seed, question.dtype), tokens, mask)
    k = question.config.get("num_experts_per_tok", 0)
    shape = (len(routes), *tokens.shape, k)
    real = mask[..., None]
    weights = np.array([route[1] for route in routes], np.float32).reshape(shape)
    experts = np.array([route[2] for route in routes], np.int8).reshape(shape)
    arrays = {
        "tokens": tokens.astype(np.int16),
        "mask": mask,
        "logits": np.where(real, logits, 0).astype(np.float32),
        "experts": np.where(real, experts, -1).astype(np.int8),
        "weights": np.where(real, weights, 0).astype(np.float32),
    }
    margin = smallest_margin(question, seed, routes, mask)
    check(question, arrays, margin)
    path = out / f"{question.name}.safetensors"
    save_file(arrays, path)
    print(
        f"{path.name}: tokens {list(tokens.shape)}, logits up to {np.abs(logits).max():.1f}, "
        f"smallest margin {margin:.1e}, {path.stat().st_size / 1e3:.0f} kB"
    )
    return {
        "name": question.name,
        "note": question.note,
        "config": question.config,
        "seed": seed,
        "dtype": question.dtype,
        "padding": question.padding,
        "smallest_margin": margin,
    }


def save_again(out: Path) -> None:
    """Store what `save_pretrained` writes for a small model, per expert and fused."""
    config = SPARSE | layers("caca") | {"vocab_size": 43, "hidden_size": 16, "num_experts": 4}
    config |= {"intermediate_size": 24, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    config |= {"num_dense_layers": 1}
    model = load_model(config, seed=5)
    model.save_pretrained(out / "per_expert")
    model.save_pretrained(out / "fused", save_original_format=False)
    tokens, mask = make_tokens(Question("transformers5", "", config, lengths=(20,)), seed=5)
    logits = ask(model, tokens, mask)[0][0]
    save_file({"tokens": tokens[0], "logits": logits}, out / "answer.safetensors")
    print(f"{out}: one model of {model.num_parameters()} parameters, saved per expert and fused")


def run(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # One thread: sums are then taken in one order, whatever the machine.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    facts = [answer_question(question, seed, out) for question in QUESTIONS]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "cases": facts}, indent=1)
    (out / "cases.json").write_text(text + "\n")
    save_again(out / "transformers5")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
    parser.add_argument("--out", type=Path, default=default, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of weights and tokens")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options.out, options.seed))


if __name__ == "__main__":
    sys.exit(main())
