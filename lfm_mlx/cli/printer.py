"""Segments of an answer → stdout: styled on a terminal, with their tags in a pipe, or as JSON."""

import json
import sys
from dataclasses import asdict
from typing import Any

from lfm_mlx import chatml

DIM, CYAN, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[0m"
STYLES = {chatml.THINKING: DIM, chatml.TOOL_CALL: CYAN, chatml.TEXT: ""}
# Control characters, which could move the cursor or recolour the terminal, as pictures of them.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def escape_controls(text: str) -> str:
    """The text with its control characters made visible."""
    return text.translate(PICTURES)


class Printer:
    """Writes the segments of one answer as they come, and then its end."""

    def __init__(self, show_thinking: bool, as_json: bool = False):
        self.show_thinking = show_thinking
        self.as_json = as_json
        self.styled = sys.stdout.isatty()
        self.kind = chatml.TEXT

    def event(self, event: str, **content: Any) -> None:
        print(json.dumps({"event": event} | content, ensure_ascii=False), flush=True)

    def segment(self, segment: chatml.Segment) -> None:
        if segment.kind == chatml.THINKING and not self.show_thinking:
            return
        if self.as_json:
            calls = [asdict(call) for call in segment.calls]
            reason = {"reason": segment.reason} if segment.reason else {}
            self.event(segment.kind, text=segment.text, **({"calls": calls} if calls else reason))
            return
        if segment.begins:
            self.change(segment.kind)
        sys.stdout.write(escape_controls(segment.text) if self.styled else segment.text)
        sys.stdout.flush()

    def change(self, kind: str) -> None:
        """Close the block that was being written and open one of this kind."""
        opening = {name: tag for tag, (_, name) in chatml.TAGS.items()}
        closing = {name: tag for tag, name in chatml.TAGS.values()}
        if self.styled:
            after = PLAIN + "\n" if self.kind != chatml.TEXT else ""
            sys.stdout.write(after + STYLES[kind])
        else:
            sys.stdout.write(closing.get(self.kind, "") + opening.get(kind, ""))
        self.kind = kind

    def end(self) -> None:
        if not self.as_json:
            self.change(chatml.TEXT)
            sys.stdout.write("\n")
            sys.stdout.flush()
