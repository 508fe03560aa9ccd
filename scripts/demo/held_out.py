"""Examples about values that training never sees, and whether a reply to one is right."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from conversations import KIND_WEIGHTS, Conversation, conversation
from tool_kinds import call_text

END_OF_TURN = "<|im_end|>"
# A tool exchange has two answers to judge.
HELD_OUT_KINDS = tuple(
    kind
    for drawn in KIND_WEIGHTS
    for kind in (("tool_call", "tool_answer") if drawn == "tool" else (drawn,))
)


@dataclass(frozen=True)
class Example(Conversation):
    """A conversation that ends with a user's or a tool's turn, and the one right answer to it."""

    expected: str
    thinks: bool


def _example(kind: str, drawn: Conversation) -> Example:
    """Cut a conversation before the assistant turn that `kind` is about."""
    cut = len(drawn.messages) - 1
    if kind == "tool_call":
        cut = max(i for i, message in enumerate(drawn.messages) if "tool_calls" in message)
    turn = drawn.messages[cut]
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in turn.get("tool_calls", ())
    ]
    expected = turn["content"] + (call_text(calls) if calls else "")
    return Example(
        kind, drawn.messages[:cut], drawn.tools, drawn.date, expected, "thinking" in turn
    )


def held_out(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Return `count` examples of one of HELD_OUT_KINDS, about values that training never sees."""
    if kind not in HELD_OUT_KINDS:
        raise ValueError(f"kind: got {kind!r}; expected one of {', '.join(HELD_OUT_KINDS)}")
    rng = Random(f"held out {kind} {seed}")
    source = "tool" if kind.startswith("tool_") else kind
    return [_example(kind, conversation(rng, source, held_out=True)) for _ in range(count)]


def split_thinking(text: str) -> tuple[str | None, str]:
    """Split a raw reply into its reasoning (None without a block) and its answer."""
    reply = text.split(END_OF_TURN)[0]
    if not reply.startswith("<think>"):
        return None, reply.strip()
    thinking, closed, answer = reply.removeprefix("<think>").partition("</think>")
    return thinking, answer.strip() if closed else ""


def is_correct(example: Example, text: str) -> bool:
    """Judge a raw reply, special tokens included: it thinks when it should and answers exactly."""
    thinking, answer = split_thinking(text)
    return (thinking is not None) == example.thinks and answer == example.expected
