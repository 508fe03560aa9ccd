"""Conversations as batches of token ids and labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from conversations import Conversation, training_conversations
from tokenizer import EOS, render
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label of a token that carries no loss
WIDTH_STEP = 32  # sequences are padded to a multiple of this, so that few shapes occur
LONGEST = 512


class Encoder:
    """Turns conversations into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.reply_start = self._ids("<|im_start|>assistant\n")
        self.user_start = self._ids("<|im_start|>user\n")
        self.turn_end = self._ids(EOS)[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, source: Conversation) -> tuple[list[int], list[int]]:
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
        for source in training_conversations(self.seed):
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
