"""One conversation, turn by turn: questions, answers, and the tools called in between."""

from collections.abc import Iterable, Iterator
from typing import Any

from lfm_mlx import chatml
from lfm_mlx.answer.responder import Responder
from lfm_mlx.chat.conversation import Conversation
from lfm_mlx.chat.tools import Tools, failure
from lfm_mlx.chat.view import View
from lfm_mlx.errors import InputError

# How often tools are called for one question; then the model has to answer with what it has.
MOST_ROUNDS = 8


class Session:
    """A conversation under way, which the commands act on.

    tools: on offer, or None
    tool_seconds: how long a call of a tool may take
    ask_first: whether the person is asked before a tool runs
    file: where the conversation is kept after each turn, or None
    """

    def __init__(
        self, conversation: Conversation, responder: Responder, view: View, *,
        tools: Tools | None = None, tool_seconds: float = 30.0, ask_first: bool = True,
        file: str | None = None,
    ):  # fmt: skip
        self.conversation, self.responder, self.view = conversation, responder, view
        self.tools, self.tool_seconds = tools, tool_seconds
        self.ask_first, self.file = ask_first, file
        self.is_open = True

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return self.tools.schemas if self.tools else []

    def ask(self, question: str) -> None:
        """A turn: the question, and answers until one calls no tool."""
        messages = self.conversation.messages
        before = len(messages)
        messages.append({"role": "user", "content": question})
        try:
            self._answer()
        except (InputError, KeyboardInterrupt):
            del messages[before:]
            raise
        self.keep()

    def keep(self) -> None:
        """Write the conversation where it is kept."""
        if self.file is not None:
            self.conversation.save(self.file)

    def recall(self) -> None:
        """Let the model forget what is no longer part of the conversation."""
        self.responder.recall(self.conversation.request(), self.schemas)

    def _answer(self) -> None:
        for rounds_left in reversed(range(MOST_ROUNDS + 1)):
            segments, interrupted = self._hear("auto" if rounds_left else "none")
            message = chatml.as_message(segments)
            if interrupted:
                message.pop("tool_calls", None)
                self.view.note("stopped")
            self.conversation.messages.append(message)
            self.view.note(status(self.responder))
            calls = [call for segment in segments for call in segment.calls]
            if interrupted or not rounds_left or not self.tools or not calls:
                return
            if not self._run(self.tools, calls):
                return

    def _hear(self, tool_choice: str) -> tuple[list[chatml.Segment], bool]:
        """The answer, shown as it comes, and whether Ctrl-C ended it."""
        answer = self.responder.answer(self.conversation.request(), self.schemas, tool_choice)
        heard: list[chatml.Segment] = []
        try:
            self.view.show(_noted(answer, heard))
        except KeyboardInterrupt:
            return heard, True
        return heard, False

    def _run(self, tools: Tools, calls: list[chatml.Call]) -> bool:
        """Answer each call with a message; False where Ctrl-C ended it."""
        interrupted = False
        for place, call in enumerate(calls):
            try:
                result = failure("interrupted") if interrupted else self._result(tools, call)
            except KeyboardInterrupt:
                interrupted, result = True, failure("interrupted")
            self.view.note(f"{call.name}: {result}")
            self.conversation.messages.append(
                {"role": "tool", "tool_call_id": f"call_{place}", "content": result}
            )
        return not interrupted

    def _result(self, tools: Tools, call: chatml.Call) -> str:
        return tools.run(call) if self._may_run(call) else failure("the user declined this call")

    def _may_run(self, call: chatml.Call) -> bool:
        if not self.ask_first:
            return True
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
        reply = self.view.confirm(f"run {call.name}({arguments})? [y]es, [n]o, [a]lways:")
        reply = reply.strip().lower()
        self.ask_first = reply not in ("a", "always")
        return reply in ("y", "yes", "a", "always")


def _noted(
    segments: Iterable[chatml.Segment], heard: list[chatml.Segment]
) -> Iterator[chatml.Segment]:
    for segment in segments:
        heard.append(segment)
        yield segment


def status(responder: Responder) -> str:
    """Speed and context in a few words."""
    statistics = responder.statistics
    cut = " · cut short by --max-tokens" if statistics.finish_reason == "length" else ""
    return f"{statistics.generated_tokens_per_second:.1f} tokens/s · {context(responder)}{cut}"


def report(responder: Responder) -> str:
    """The last answer's statistics in full."""
    return f"{responder.statistics}\n{context(responder)}"


def context(responder: Responder) -> str:
    used, longest = responder.context, responder.longest_context
    return f"context: {used} of {longest} tokens ({used / longest:.0%})"
