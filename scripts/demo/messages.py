"""Turns of a conversation."""

from typing import Any

Message = dict[str, Any]


def user(text: str) -> Message:
    """Return a user's turn."""
    return {"role": "user", "content": text}


def reply(answer: str, thinking: str | None = None) -> Message:
    """Return the assistant's turn; without `thinking` it has no such block."""
    message: Message = {"role": "assistant"}
    if thinking is not None:
        message["thinking"] = thinking
    return message | {"content": answer}


def reply_with_call(name: str, arguments: dict[str, Any]) -> Message:
    """Return the assistant's turn that calls a tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    thinking = f"I call {name}."
    return {"role": "assistant", "thinking": thinking, "content": "", "tool_calls": [call]}


def tool_result(text: str) -> Message:
    """Return a tool's turn."""
    return {"role": "tool", "content": text}
