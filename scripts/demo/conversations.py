"""Seeded synthetic conversations for the demo model: sums, tools, facts, greetings, copying.

Needs only the standard library, so that training (PyTorch) and evaluation (MLX) share one source
of truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from exchanges import EXCHANGES
from messages import Message
from tool_kinds import TOOLS, listed_tools, schema
from values import NAMES

# How often training draws each kind of exchange.
KIND_WEIGHTS = {
    "sum": 28,
    "tool": 48,
    "copy": 16,
    "fact": 7,
    "greeting": 3,
    "sentiment": 4,
    "decline": 14,
    "unknown": 2,
}


@dataclass(frozen=True)
class Conversation:
    """Messages, assistant's turns with their `thinking`; the tools listed to it, and its date."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    date: str


def _draw_kind(rng: Random, allowed: Sequence[str]) -> str:
    return rng.choices(allowed, [KIND_WEIGHTS[kind] for kind in allowed])[0]


def _draw_tool_kinds(rng: Random, kind: str) -> list[str]:
    if kind != "tool" and rng.random() < 0.82:
        return []
    choices = [k for k in TOOLS if not (kind == "sum" and k == "calculator")]
    return rng.sample(choices, rng.choice((1, 1, 2, 2, 3, 4)))


def _date(rng: Random) -> str:
    return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def conversation(rng: Random, kind: str, held_out: bool = False) -> Conversation:
    """Draw one conversation whose last exchange is of `kind` (a key of KIND_WEIGHTS)."""
    listed = listed_tools(rng, _draw_tool_kinds(rng, kind))
    allowed = [k for k in EXCHANGES if k != "tool" or listed]
    if "calculator" in listed:
        allowed.remove("sum")  # with a calculator at hand, arithmetic goes to it
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(NAMES["system_prompts"])})
    for _ in range(rng.choices((0, 1, 2, 3), (70, 16, 9, 5))[0]):
        messages += EXCHANGES[_draw_kind(rng, allowed)](rng, listed, held_out)
    messages += EXCHANGES[kind](rng, listed, held_out)
    tools = [schema(rng, tool) for tool in listed.values()] or None
    return Conversation(kind, messages, tools, _date(rng))


def training_conversations(seed: int) -> Iterator[Conversation]:
    """Yield training conversations without end; equal seeds give equal streams."""
    rng = Random(f"train {seed}")
    while True:
        yield conversation(rng, _draw_kind(rng, list(KIND_WEIGHTS)))
