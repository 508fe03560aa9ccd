"""The finished demo as files: the hub's format, and exact replies that other engines must give."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from held_out import HELD_OUT_KINDS, held_out
from network import model_config
from safetensors.torch import save_file
from tokenizer import BOS, EOS, PAD, render
from torch import Tensor
from transformers import Lfm2MoeForCausalLM, PreTrainedTokenizerFast


def hub_tensors(model: Lfm2MoeForCausalLM) -> dict[str, Tensor]:
    """Return the weights under the hub's names: per expert, BF16 but for the F32 expert biases."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, pair in enumerate(value.bfloat16()):
                stem = name.replace("gate_up_proj", str(expert))
                w1, w3 = pair.chunk(2)
                tensors |= {f"{stem}.w1.weight": w1, f"{stem}.w3.weight": w3}
        elif name.endswith("experts.down_proj"):
            for expert, w2 in enumerate(value.bfloat16()):
                tensors[f"{name.replace('down_proj', str(expert))}.w2.weight"] = w2
        else:
            tensors[name] = value.float() if name.endswith("expert_bias") else value.bfloat16()
    return {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}


def export(model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder; its files change one by one, each at once."""
    draft = out.parent / f".{out.name}.draft"
    draft.mkdir(parents=True, exist_ok=True)
    config = model_config(tokenizer)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(draft / "config.json", config)
    _write_json(draft / "generation_config.json", {**ids, "do_sample": False})
    tokenizer.backend_tokenizer.save(str(draft / "tokenizer.json"), pretty=False)
    _write_json(
        draft / "tokenizer_config.json",
        {
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (draft / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    save_file(hub_tensors(model), draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "model.safetensors").chmod(0o644)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(draft.iterdir()):
        os.replace(file, out / file.name)
    draft.rmdir()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_frozen(model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Write a few prompts with the exact tokens that follow, for other engines to reproduce."""
    entries = []
    for kind in HELD_OUT_KINDS:
        example = held_out(kind, 1, seed=1)[0]
        prompt = tokenizer.encode(
            render(tokenizer.chat_template, example), add_special_tokens=False, return_tensors="pt"
        )
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=80,
            do_sample=False,
        )
        reply = ids[0, prompt.shape[1] :].tolist()
        entries.append(
            {
                "kind": kind,
                "prompt": prompt[0].tolist(),
                "reply": reply,
                "reply_text": tokenizer.decode(reply),
            }
        )
    _write_json(file, {"dtype": "float32", "entries": entries})
