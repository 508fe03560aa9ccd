"""The model's text → typed segments as they arrive: thinking, text, tool calls.

The same segments come out however the text is cut, and nothing of it is lost. Thinking and text
stream; a tool call comes whole, when its end is there. A block that is no call comes as text, tags
included, with the reason.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx.chatml.tags import (
    CALL_END,
    CALL_START,
    TAGS,
    TEXT,
    THINKING,
    TOOL_CALL,
    Tag,
    TagFinder,
)
from lfm_mlx.tool_calls.parse import Call, CallError, as_messages, parse

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Segment:
    """A piece of an answer.

    kind: THINKING, TEXT or TOOL_CALL
    text: as the model wrote it, without the tags around it
    begins: whether it is the first piece of a block
    calls: of a TOOL_CALL, what is called
    reason: of a TEXT that stood in a tool call's place, why it is none
    """

    kind: str
    text: str
    begins: bool = False
    calls: tuple[Call, ...] = ()
    reason: str | None = None


def segments(
    pieces: Iterable[str], tools: Tools | None = None, thinking: bool = False
) -> Iterator[Segment]:
    """Split streamed text into segments, as they arrive.

    pieces: what a TextStream gives, or text that spells its tags, cut anywhere
    tools: what calls are checked against, as in a chat request; with None any call goes
    thinking: whether the prompt has opened a think block, so that the answer begins inside it

    A block that is never closed keeps its kind to the end; a tool call must at least have closed
    its list.
    """
    segmenter = Segmenter(tools, thinking)
    for piece in pieces:
        yield from segmenter.add(piece)
    yield from segmenter.finish()


class Segmenter:
    """Splits an answer that is handed over piece by piece; arguments as in `segments`."""

    def __init__(self, tools: Tools | None = None, thinking: bool = False):
        self._tools = tools
        self._finder = TagFinder()
        self._kind, self._begins = THINKING if thinking else TEXT, True
        self._call: list[str] = []

    def add(self, piece: str) -> Iterator[Segment]:
        """The segments that this piece completes."""
        for part in self._finder.add(piece):
            yield from self._add(part)

    def finish(self) -> Iterator[Segment]:
        """The remaining segments once the answer is over."""
        for part in self._finder.finish():
            yield from self._add(part)
        yield from self._finish()

    def _add(self, part: str) -> Iterator[Segment]:
        if self._kind == TOOL_CALL:
            yield from self._add_to_call(part)
        elif isinstance(part, Tag) and self._kind == TEXT and part in TAGS:
            self._enter(TAGS[part][1])
        elif isinstance(part, Tag) and self._kind == THINKING and part == TAGS["<think>"][0]:
            self._enter(TEXT)
        else:
            yield Segment(self._kind, str(part), self._begins)
            self._begins = False

    def _finish(self) -> Iterator[Segment]:
        if self._kind != TOOL_CALL:
            return
        if self._ends():
            yield from self._give_up("the string in it has no end")
            yield from self._finish()
            return
        text, self._call = "".join(self._call), []
        self._enter(TEXT)
        try:
            if not text.strip().endswith("]"):
                raise CallError("the answer ended inside the call")
            yield Segment(TOOL_CALL, text, True, parse(text, self._tools))
        except CallError as error:
            yield Segment(TEXT, CALL_START + text, True, reason=str(error))

    def _enter(self, kind: str) -> None:
        self._kind, self._begins = kind, True

    def _ends(self) -> list[int]:
        """Positions, among the parts of a call, of the tag that ends it."""
        places = enumerate(self._call)
        return [at for at, part in places if isinstance(part, Tag) and part == CALL_END]

    def _add_to_call(self, part: str) -> Iterator[Segment]:
        """A tag that ends the call may also stand in one of its strings: the string decides.

        While the text before the tag ends inside a string, the call goes on to the next such tag,
        unless another call begins first.
        """
        waited = self._ends()
        if waited and isinstance(part, Tag) and part == CALL_START:
            yield from self._give_up("the string in it has no end")
            yield from self._add(part)
            return
        self._call.append(part)
        if not (isinstance(part, Tag) and part == CALL_END):
            return
        text = "".join(self._call[:-1])
        try:
            calls = parse(text, self._tools)
        except CallError as error:
            if not error.open_string:
                yield from self._give_up(str(error))
            return
        self._call = []
        self._enter(TEXT)
        yield Segment(TOOL_CALL, text, True, calls)

    def _give_up(self, reason: str) -> Iterator[Segment]:
        """Turn everything up to the first end of the call into text, and read the rest again."""
        end = self._ends()[0] + 1
        block, rest, self._call = self._call[:end], self._call[end:], []
        self._enter(TEXT)
        yield Segment(TEXT, CALL_START + "".join(block), True, reason=reason)
        for part in rest:
            yield from self._add(part)


def as_message(found: Iterable[Segment]) -> dict[str, Any]:
    """The answer as an assistant's message of a chat request; what was written stays as it was."""
    texts = {THINKING: "", TEXT: ""}
    calls: list[Call] = []
    for segment in found:
        if segment.kind == TOOL_CALL:
            calls += segment.calls
        else:
            texts[segment.kind] += segment.text
    message: dict[str, Any] = {"role": "assistant", "content": texts[TEXT]}
    if texts[THINKING]:
        message["thinking"] = texts[THINKING]
    if calls:
        message["tool_calls"] = as_messages(calls)
    return message
