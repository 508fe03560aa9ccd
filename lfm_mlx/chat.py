"""Messages ⇄ text: the checkpoint's chat template one way, typed segments the other.

Never sees an array. Text comes in pieces of any size and goes out as Segments; a tag that is split
between pieces is held back until it is whole.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx.command import InputError, one_line

THINKING, TEXT, TOOL_CALL = "thinking", "text", "tool_call"
# What opens and closes a segment that is not plain text.
TAGS = {
    "<think>": ("</think>", THINKING),
    "<|tool_call_start|>": ("<|tool_call_end|>", TOOL_CALL),
}


@dataclass(frozen=True)
class Segment:
    """A piece of an answer: `begins` is true of the first piece of each block."""

    kind: str
    text: str
    begins: bool = False


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """The token ids of a conversation, up to where the assistant speaks.

    options: passed to the template (`tools`, `add_generation_prompt`, …)

    Raises InputError when the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; use --raw to give the text as it is")
    options = {"add_generation_prompt": True} | options
    try:
        return list(tokenizer.apply_chat_template(list(messages), return_dict=False, **options))
    except Exception as error:  # whatever a template raises is about the messages it was given
        raise InputError(f"the chat template refuses the messages: {one_line(error)}") from error


class TextStream:
    """Token ids to text, one at a time: a character comes out when its last byte is there."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = {number: text for text, number in tokenizer.get_added_vocab().items()}
        self._bytes = {letter: byte for byte, letter in byte_letters().items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that this token completes."""
        return self._decoder.decode(self._encoded(token))

    def finish(self) -> str:
        """What is left: a replacement character where a character was never completed."""
        return self._decoder.decode(b"", final=True)

    def _encoded(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        letters = self._tokenizer.convert_ids_to_tokens(token) or ""
        return bytes(self._bytes[letter] for letter in letters)


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's letter for each byte: itself where it prints, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    shifted = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printed} | shifted


def segments(pieces: Iterable[str]) -> Iterator[Segment]:
    """Split streamed text into thinking, text and tool calls, as they arrive.

    Tags are left out. A block that is never closed keeps its kind to the end.
    """
    held, kind, closing, begins = "", TEXT, "", True
    for piece in pieces:
        held += piece
        while held:
            tags = {closing: ("", TEXT)} if closing else TAGS
            at, tag = min(((held.find(tag), tag) for tag in tags if tag in held), default=(-1, ""))
            if at < 0:
                keep = longest_beginning(held, tags)
                ready, held = held[: len(held) - keep], held[len(held) - keep :]
                if ready:
                    yield Segment(kind, ready, begins)
                    begins = False
                break
            if at:
                yield Segment(kind, held[:at], begins)
            held, begins = held[at + len(tag) :], True
            closing, kind = tags[tag]
    if held:
        yield Segment(kind, held, begins)


def longest_beginning(text: str, tags: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a tag."""
    longest = max(map(len, tags)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(tag.startswith(text[-n:]) for tag in tags)), 0)
