"""What a trained demo gets right, and how evenly it uses its experts."""

from __future__ import annotations

import torch
from batches import Batches, Encoder
from held_out import HELD_OUT_KINDS, Example, held_out, is_correct
from network import Balance
from tokenizer import PAD, render
from torch import Tensor
from training import Settings
from transformers import Lfm2MoeForCausalLM, PreTrainedTokenizerFast


@torch.no_grad()
def accuracies(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """Return, for each kind, the share of held-out examples that greedy decoding gets right."""
    model.eval()
    result = {}
    for kind in HELD_OUT_KINDS:
        examples = held_out(kind, count)
        examples.sort(key=lambda example: len(render(tokenizer.chat_template, example)))
        right = 0
        for first in range(0, count, 50):
            batch = examples[first : first + 50]
            texts = greedy(model, tokenizer, batch)
            wrong = [
                (e.messages[-1]["content"], e.expected, text)
                for e, text in zip(batch, texts, strict=True)
                if not is_correct(e, text)
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
    examples: list[Example],
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
