"""Train the demo model: a tiny LFM2-MoE on synthetic conversations, in the hub's own format.

The trained model is Hugging Face's own `Lfm2MoeForCausalLM`: a checkpoint that owes nothing to this
package's reading of the architecture, and can therefore judge it. Nothing is downloaded.

    python scripts/train_demo.py --out lfm_mlx/demo

Ctrl-C writes a checkpoint and ends; `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import demo_conversations as conversations

try:
    import torch
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as splitters
    from tokenizers.processors import TemplateProcessing
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, IterableDataset
    from tqdm import tqdm
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedTokenizerFast
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install torch transformers jinja2 safetensors tqdm")

DEMO = Path(__file__).resolve().parent.parent / "lfm_mlx" / "demo"
IGNORED = -100  # the label of a token that carries no loss
WIDTH_STEP = 32  # sequences are padded to a multiple of this, so that few shapes occur
LONGEST = 512

BOS, EOS, PAD = "<|startoftext|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (
    PAD,
    BOS,
    "<|endoftext|>",
    "<|im_start|>",
    EOS,
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)
VISIBLE_TOKENS = ("<think>", "</think>")
# Llama-3's split, but every digit stands alone, so that sums are learnt digit by digit, and a word
# never takes the space or quote before it along: it is the same tokens wherever it is copied.
SPLIT = (
    r"'(?i:s|t|re|ve|m|ll|d)(?!\p{L})|\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides the conversations themselves."""

    seed: int = 0
    steps: int = 17000
    minutes: float = 120.0
    batch_tokens: int = 2048
    vocabulary: int = 2048
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    bias_rate: float = 1e-3
    echo_steps: int = 350  # the first steps only echo random tokens; see Batches
    echo_every: int = 20  # and later one step in so many
    quantized_from: float = 0.8  # part of the run after which every second step sees 4-bit weights


def train_tokenizer(settings: Settings, template: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on rendered training conversations."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = splitters.Sequence(
        [
            splitters.Split(Regex(SPLIT), behavior="isolated"),
            splitters.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(token, special=False) for token in VISIBLE_TOKENS])
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary - len(VISIBLE_TOKENS),
        initial_alphabet=splitters.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    stream = conversations.training_conversations(settings.seed)
    texts = (render(template, next(stream)) for _ in range(20000))
    markers = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + VISIBLE_TOKENS)))
    core.train_from_iterator((part for text in texts for part in markers.split(text)), trainer)
    core.add_tokens([AddedToken(token, special=False) for token in VISIBLE_TOKENS])
    bos = core.token_to_id(BOS)
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return wrap_tokenizer(core, template)


def load_tokenizer(file: Path, settings: Settings, template: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this work folder, trained on first use."""
    if file.exists():
        return wrap_tokenizer(Tokenizer.from_file(str(file)), template)
    tokenizer = train_tokenizer(settings, template)
    tokenizer.backend_tokenizer.save(str(file), pretty=False)
    return tokenizer


def wrap_tokenizer(core: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """Give the bare tokenizer its special tokens and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)


def render(template: str, source: conversations.Conversation | conversations.Example) -> str:
    """Return the text of a conversation, or of an example up to the reply that is asked for.

    Not `apply_chat_template`, which would put today's date into every tool prompt.
    """
    return _compiled(template).render(
        messages=source.messages,
        tools=source.tools,
        bos_token=BOS,
        add_generation_prompt=isinstance(source, conversations.Example),
        strftime_now=lambda _: source.date,
    )


class Encoder:
    """Turns conversations into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.reply_start = self._ids("<|im_start|>assistant\n")
        self.user_start = self._ids("<|im_start|>user\n")
        self.turn_end = self._ids(EOS)[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, source: conversations.Conversation) -> tuple[list[int], list[int]]:
        """Return ids and labels: the replies after the last question carry the loss.

        Earlier replies are rendered without their reasoning, as history is; to learn from them
        would be to learn not to think.
        """
        ids = self._ids(render(self.tokenizer.chat_template, source))
        labels = [IGNORED] * len(ids)
        position = max(_positions(ids, self.user_start))
        for start in _positions(ids, self.reply_start):
            if start > position:
                first = start + len(self.reply_start)
                last = ids.index(self.turn_end, first)
                labels[first : last + 1] = ids[first : last + 1]
        return ids, labels


def _positions(ids: list[int], part: list[int]) -> list[int]:
    return [i for i, token in enumerate(ids) if token == part[0] and ids[i : i + len(part)] == part]


class Batches(IterableDataset):
    """Endless batches of equally wide sequences, `(ids, labels)`, each about `tokens` large.

    The first `echoes` batches are random tokens said twice. They teach attention to find what
    followed a token before, which copying, tool calls and answers rest on; conversations alone
    teach it very slowly. Later one batch in `echo_every` does the same, 0 for none: some tokens
    occur in no training conversation, and would be forgotten.
    """

    def __init__(
        self, encoder: Encoder, seed: int, tokens: int, echoes: int = 0, echo_every: int = 0
    ) -> None:
        self.encoder, self.seed, self.tokens = encoder, seed, tokens
        self.echoes, self.echo_every = echoes, echo_every

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        for _ in range(self.echoes):
            yield self._echo(generator)
        waiting: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
        batches = 0
        for source in conversations.training_conversations(self.seed):
            ids, labels = self.encoder.encode(source)
            width = math.ceil(len(ids) / WIDTH_STEP) * WIDTH_STEP
            if width > LONGEST:
                continue
            waiting[width].append((ids, labels))
            if len(waiting[width]) == self.tokens // width:
                yield self._padded(waiting.pop(width), width)
                batches += 1
                if self.echo_every and batches % self.echo_every == 0:
                    yield self._echo(generator)

    def _echo(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = 2 ** int(torch.randint(3, 6, (), generator=generator))
        shape = (self.tokens // half // 2, half)
        said = torch.randint(len(self.encoder.tokenizer), shape, generator=generator)
        labels = torch.cat([torch.full_like(said, IGNORED), said], dim=1)
        labels[:, half] = IGNORED  # nothing foretells the first echo
        return torch.cat([said, said], dim=1), labels

    def _padded(self, rows: list[tuple[list[int], list[int]]], width: int) -> tuple[Tensor, Tensor]:
        pad = self.encoder.tokenizer.pad_token_id
        ids = [row + [pad] * (width - len(row)) for row, _ in rows]
        labels = [row + [IGNORED] * (width - len(row)) for _, row in rows]
        return torch.tensor(ids), torch.tensor(labels)


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the demo's config.json: LFM2.5-8B-A1B's keys and layer pattern, small numbers."""
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "bos_token_id": tokenizer.bos_token_id,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "layer_types": ["full_attention" if i in (2, 6) else "conv" for i in range(8)],
        "max_position_embeddings": 4096,
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 128,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_dense_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_expert_bias": True,
        "vocab_size": len(tokenizer),
    }


def new_model(config: dict[str, Any]) -> Lfm2MoeForCausalLM:
    """Build the model in float32, with first weights that suit its small width.

    Embeddings and the taps of the convolutions start large: who a token is, and what its left
    neighbour is, must reach the first attention layer for copying to be learnt at all.
    """
    built = Lfm2MoeConfig(**{**config, "initializer_range": 0.06, "dtype": "float32"})
    built.dtype = torch.float32
    model = Lfm2MoeForCausalLM._from_config(built, experts_implementation="grouped_mm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv.conv.weight"):
                parameter.normal_(std=0.5)
            elif "embed_tokens" in name:
                parameter.mul_(4)
            elif name.endswith(("out_proj.weight", "w2.weight", "down_proj")):
                parameter.mul_(0.5)
    return model


def is_quantized(name: str) -> bool:
    """Say whether a conversion to 4 bits touches this parameter: matrices but the router's."""
    return name.endswith(("proj", "proj.weight", "w1.weight", "w2.weight", "w3.weight")) or (
        "embed_tokens" in name
    )


def through_bits(weight: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """Quantize groups of a matrix to `bits` affinely, as MLX does, and return what comes back."""
    groups = weight.detach().reshape(*weight.shape[:-1], -1, group).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp_min(1e-7)
    low_is_edge = low.abs() > high.abs()
    scale, edge = torch.where(low_is_edge, scale, -scale), torch.where(low_is_edge, low, high)
    at_edge = (edge / scale).round()
    usable = at_edge != 0
    scale = torch.where(usable, edge / at_edge.where(usable, torch.ones_like(edge)), scale)
    bias = torch.where(usable, edge, torch.zeros_like(edge))
    codes = ((groups - bias) / scale).round().clamp(0, steps)
    return (codes * scale + bias).reshape(weight.shape).to(weight.dtype)


@contextmanager
def quantized_weights(model: nn.Module) -> Iterator[None]:
    """Let the matrices be their 4-bit images for a while; gradients reach the real ones."""
    matrices = {n: p for n, p in model.named_parameters() if is_quantized(n)}
    kept = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.copy_(through_bits(matrix))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.copy_(kept[name])


class Balance:
    """Counts which experts the routers choose, and nudges `expert_bias` towards equal use."""

    def __init__(self, model: Lfm2MoeForCausalLM) -> None:
        layers = model.model.layers[model.config.num_dense_layers :]
        self.blocks = [layer.feed_forward for layer in layers]
        self.live: Tensor | None = None
        self.loads = torch.zeros(len(self.blocks), model.config.num_experts)
        self.hooks = [
            block.gate.register_forward_hook(partial(self._count, row))
            for row, block in enumerate(self.blocks)
        ]

    def _count(self, row: int, router: nn.Module, inputs: Any, outputs: Any) -> None:
        chosen = outputs[2]
        if self.live is not None:
            chosen = chosen[self.live]
        self.loads[row] += torch.bincount(chosen.flatten(), minlength=self.loads.shape[1])

    def shares(self) -> Tensor:
        """Return each expert's share of its layer's choices since the last call, [layers, E]."""
        shares = self.loads / self.loads.sum(-1, keepdim=True).clamp_min(1)
        self.loads.zero_()
        return shares

    def close(self) -> None:
        """Stop counting."""
        for hook in self.hooks:
            hook.remove()

    def step(self, rate: float) -> None:
        """Raise the bias of experts chosen too rarely and lower the others'; keep the mean at 0."""
        shares = self.shares()
        for block, share in zip(self.blocks, shares, strict=True):
            bias = block.expert_bias
            bias += rate * torch.sign(share.mean() - share)
            bias -= bias.mean()


class Run:
    """A training run: model, optimizer and how far it has come."""

    def __init__(
        self, settings: Settings, tokenizer: PreTrainedTokenizerFast, checkpoint: Path
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.tokenizer, self.checkpoint = settings, tokenizer, checkpoint
        self.model = new_model(model_config(tokenizer))
        self.balance = Balance(self.model)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.step, self.minutes = 0, 0.0

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decay = self.settings.weight_decay
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if is_quantized(n) and "embed" not in n]
        others = [p for n, p in named if not is_quantized(n) or "embed" in n]
        return [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by time, whichever is further."""
        by_time = self.minutes / self.settings.minutes if self.settings.minutes else 1.0
        return min(1.0, max(self.step / self.settings.steps, by_time))

    def save(self) -> None:
        """Write the checkpoint; a half-written one never takes the place of a good one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
        }
        draft = self.checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.checkpoint)

    def load(self) -> None:
        """Go back to where the checkpoint was written."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes = state["step"], state["minutes"]

    def train(self) -> bool:
        """Train until done or interrupted; return whether it is done."""
        stream_seed = self.settings.seed * 1_000_003 + self.step
        source = Batches(
            Encoder(self.tokenizer),
            stream_seed,
            self.settings.batch_tokens,
            echoes=max(0, self.settings.echo_steps - self.step),
            echo_every=self.settings.echo_every,
        )
        loader = DataLoader(
            source,
            batch_size=None,
            num_workers=1,
            prefetch_factor=64,
            worker_init_fn=_ignore_ctrl_c,
        )
        bar = tqdm(total=self.settings.steps, initial=self.step, mininterval=5)
        self.model.train()
        try:
            for ids, labels in loader:
                if self.progress >= 1:
                    break
                began = time.monotonic()
                loss = self._train_step(ids, labels)
                self.minutes += (time.monotonic() - began) / 60
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", done=f"{self.progress:.1%}", refresh=False)
                if self.step % 250 == 0:
                    self.save()
        except KeyboardInterrupt:
            print(f"\ninterrupted after step {self.step}; --resume goes on from here")
        bar.close()
        self.save()
        return self.progress >= 1

    def _train_step(self, ids: Tensor, labels: Tensor) -> float:
        settings = self.settings
        warm = min(1.0, (self.step + 1) / settings.warmup_steps)
        rate = settings.learning_rate * warm * (0.01 + 0.99 * _cosine(self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.balance.live = (ids != self.tokenizer.pad_token_id).flatten()
        if self.progress > settings.quantized_from and self.step % 2:
            with quantized_weights(self.model):
                loss = self._loss(ids, labels)
                loss.backward()
        else:
            loss = self._loss(ids, labels)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.balance.step(settings.bias_rate * _cosine(min(1.0, self.progress / 0.8)))
        return loss.item()

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the trained tokens; only they go through the head.

        Their number changes with every batch, and bfloat16 kernels are compiled for each new shape:
        the head runs in float32.
        """
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        trained = labels[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][trained].float())
        return nn.functional.cross_entropy(logits, labels[:, 1:][trained])


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def accuracies(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """Return, for each kind, the share of held-out examples that greedy decoding gets right."""
    model.eval()
    result = {}
    for kind in conversations.HELD_OUT_KINDS:
        examples = conversations.held_out(kind, count)
        examples.sort(key=lambda example: len(render(tokenizer.chat_template, example)))
        right = 0
        for first in range(0, count, 50):
            batch = examples[first : first + 50]
            texts = greedy(model, tokenizer, batch)
            wrong = [
                (e.messages[-1]["content"], e.expected, text)
                for e, text in zip(batch, texts, strict=True)
                if not conversations.is_correct(e, text)
            ]
            right += len(batch) - len(wrong)
            for question, expected, text in wrong[:2]:
                print(f"  {kind}: {question!r}: expected {expected!r}, got {text!r}")
        result[kind] = right / count
    return result


@torch.no_grad()
def expert_shares(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Tensor:
    """Return each expert's share of its layer's choices on fresh conversations, [layers, E]."""
    balance = Balance(model)
    batches = iter(Batches(Encoder(tokenizer), settings.seed - 1, settings.batch_tokens))
    for _ in range(20):
        ids, _labels = next(batches)
        balance.live = (ids != tokenizer.pad_token_id).flatten()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    balance.close()
    return balance.shares()


def greedy(
    model: Lfm2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[conversations.Example],
) -> list[str]:
    """Return the raw greedy replies to a batch of examples, up to their end of turn."""
    prompts = [render(tokenizer.chat_template, example) for example in examples]
    batch = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    longest = max(len(tokenizer.encode(example.expected)) for example in examples)
    replies = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=longest + 80,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(replies[:, batch["input_ids"].shape[1] :])
    return [text.split(PAD)[0] for text in texts]


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
    for kind in conversations.HELD_OUT_KINDS:
        example = conversations.held_out(kind, 1, seed=1)[0]
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


README = """# The demo model

A tiny LFM2-MoE ({parameters:.1f} M parameters, {megabytes:.1f} MB), trained from nothing in
{minutes:.0f} minutes by `scripts/train_demo.py`, with Hugging Face's `Lfm2MoeForCausalLM`, on the
synthetic conversations of `scripts/demo_conversations.py`. It adds and subtracts numbers up to two
digits, calls the tools that the system turn lists and uses their results, knows {facts} facts,
greets, copies, and tells positive from negative. It knows nothing else.

File format, tensor names, chat format and layer pattern are LFM2.5-8B-A1B's: eight layers, two of
them dense, {experts} experts of which {used} see each token.

Held-out questions answered exactly right with greedy decoding, {count} of each kind. The 4-bit
column is the same model with its matrices (not the router's) in 4-bit groups of 64.

| kind | bfloat16 weights | 4-bit weights |
|---|---|---|
{rows}

The least used expert takes {least:.1%} of its layer's choices, the most used {most:.1%}; equal use
would be {equal:.1%}.
"""


def report(run: Run, folder: Path, count: int) -> None:
    """Judge the finished folder, as written and through 4 bits; print it and write its README."""
    model = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares = expert_shares(model, run.tokenizer, run.settings)
    rounded = accuracies(model, run.tokenizer, count)
    with quantized_weights(model):
        quantized = accuracies(model, run.tokenizer, count)
    rows = "\n".join(f"| {k} | {v:.1%} | {quantized[k]:.1%} |" for k, v in rounded.items())
    size = sum(file.stat().st_size for file in folder.iterdir())
    text = README.format(
        parameters=model.num_parameters() / 1e6,
        megabytes=size / 1e6,
        minutes=run.minutes,
        facts=len(conversations.FACTS),
        experts=model.config.num_experts,
        used=model.config.num_experts_per_tok,
        count=count,
        rows=rows,
        least=shares.min().item(),
        most=shares.max().item(),
        equal=1 / model.config.num_experts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)
    for layer, share in enumerate(shares.tolist(), model.config.num_dense_layers):
        print(f"layer {layer}: " + " ".join(f"{value:.1%}" for value in share))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; every field of Settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("train_demo"), help="checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--examples", type=int, default=200, help="held-out examples per kind")
    parser.add_argument("--frozen", type=Path, help="also write prompts and exact replies here")
    for name, value in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def main() -> None:
    """Train, export and judge, as the command line says."""
    arguments = parse_arguments()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    arguments.work.mkdir(parents=True, exist_ok=True)
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(arguments.work / "tokenizer.json", settings, template)
    run = Run(settings, tokenizer, arguments.work / "checkpoint.pt")
    if arguments.resume:
        run.load()
    parameters = run.model.num_parameters() / 1e6
    print(f"{parameters:.2f} M parameters, {len(tokenizer)} tokens, from step {run.step}")
    if not run.train():
        return
    export(run.model, tokenizer, arguments.out)
    report(run, arguments.out, arguments.examples)
    if arguments.frozen:
        model = Lfm2MoeForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
        write_frozen(model, tokenizer, arguments.frozen)


if __name__ == "__main__":
    main()
