"""The demo's tokenizer, a byte-level BPE, and the text of conversations as the template has it."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path

from conversations import Conversation, training_conversations
from held_out import Example
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as splitters
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

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


def train_tokenizer(template: str, seed: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary` tokens on rendered training conversations."""
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
        vocab_size=vocabulary - len(VISIBLE_TOKENS),
        initial_alphabet=splitters.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    stream = training_conversations(seed)
    texts = (render(template, next(stream)) for _ in range(20000))
    markers = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + VISIBLE_TOKENS)))
    core.train_from_iterator((part for text in texts for part in markers.split(text)), trainer)
    core.add_tokens([AddedToken(token, special=False) for token in VISIBLE_TOKENS])
    bos = core.token_to_id(BOS)
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return wrap_tokenizer(core, template)


def load_tokenizer(
    file: Path, template: str, seed: int, vocabulary: int
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this work folder, trained on first use."""
    if file.exists():
        return wrap_tokenizer(Tokenizer.from_file(str(file)), template)
    tokenizer = train_tokenizer(template, seed, vocabulary)
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


def render(template: str, source: Conversation | Example) -> str:
    """Return the text of a conversation, or of an example up to the reply that is asked for.

    Not `apply_chat_template`, which would put today's date into every tool prompt.
    """
    return _compiled(template).render(
        messages=source.messages,
        tools=source.tools,
        bos_token=BOS,
        add_generation_prompt=isinstance(source, Example),
        strftime_now=lambda _: source.date,
    )
