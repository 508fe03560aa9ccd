"""Messages of a chat request, checked and in the form that chat templates read.

Content parts become text, JSON arguments mappings, `reasoning_content` the key `thinking`. Tool
results stand in the order of their calls, since the template prints no ids.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_mlx.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
# Later names of the same things.
_ROLE_NAMES = {"developer": "system"}
_REASONING = ("thinking", "reasoning_content", "reasoning")
Message = dict[str, Any]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages as a template reads them.

    Raises InputError that names the message and what is wrong with it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages: expected a list; got {type(messages).__name__}")
    if not messages:
        raise InputError("messages: expected at least one; got an empty list")
    rendered: list[Message] = []
    for index, message in enumerate(messages):
        try:
            rendered.append(_rendered(message))
        except ValueError as problem:
            raise InputError(f"messages[{index}]{_role_of(message)}: {problem}") from None
    return _with_results_in_order(rendered)


def _role_of(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    return f" ({role})" if isinstance(role, str) and role else ""


def _rendered(message: Any) -> Message:
    """One message; ValueError says what is wrong with it."""
    if not isinstance(message, Mapping):
        raise ValueError(f"expected an object; got {type(message).__name__}")
    rendered = {key: value for key, value in message.items() if value is not None}
    if not all(isinstance(key, str) for key in rendered):
        raise ValueError("expected keys that are text")
    role = rendered.get("role")
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; expected {', '.join(ROLES)}")
    rendered["role"] = role
    if "content" in rendered:
        rendered["content"] = _text(rendered["content"])
    if role == "assistant":
        return _rendered_assistant(rendered)
    if "content" not in rendered:
        raise ValueError("content is missing")
    if "tool_calls" in rendered:
        raise ValueError("tool_calls belong to a message of the assistant")
    return rendered


def _text(content: Any) -> str:
    """The text of a content, in parts or whole."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"content is of type {type(content).__name__}; expected text or parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content part {kind!r}; this model reads parts of type 'text' only")
        texts.append(part["text"])
    return "".join(texts)


def _rendered_assistant(message: Message) -> Message:
    if "function_call" in message:
        raise ValueError("function_call is not supported; use tool_calls")
    given = {key: message.pop(key) for key in _REASONING if key in message}
    for key, thinking in given.items():
        if not isinstance(thinking, str):
            raise ValueError(f"{key} is of type {type(thinking).__name__}; expected text")
        # An empty `thinking` asks for an empty block; servers send an empty reasoning_content.
        if thinking or key == "thinking":
            message.setdefault("thinking", thinking)
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise ValueError("tool_calls: expected a list")
    if calls:
        message["tool_calls"] = [_call(index, call) for index, call in enumerate(calls)]
    if not message.keys() & {"content", "tool_calls", "thinking"}:
        raise ValueError("content is missing, and so are tool_calls")
    return message


def _call(index: int, call: Any) -> Message:
    """One entry of tool_calls, its arguments a mapping."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f"tool_calls[{index}]: expected a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else None
        except ValueError as error:
            raise ValueError(f"tool_calls[{index}] ({name}): arguments: no JSON: {error}") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"tool_calls[{index}] ({name}): arguments: expected a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments or {})}}


def _with_results_in_order(messages: list[Message]) -> list[Message]:
    """The messages, each run of tool results in the order of the calls that it answers."""
    ordered: list[Message] = []
    at = 0
    while at < len(messages):
        if messages[at]["role"] != "tool":
            ordered.append(messages[at])
            at += 1
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        calls = messages[at - 1].get("tool_calls", []) if at else []
        ordered += _matched(at, messages[at:end], [call.get("id") for call in calls])
        at = end
    return ordered


def _matched(first: int, results: list[Message], ids: list[Any]) -> list[Message]:
    """Tool results in the order of the calls with these ids; as given where ids are missing."""
    if len(results) > len(ids):
        extra = f"messages[{first + len(ids)}] (tool)"
        raise InputError(f"{extra}: no call of the assistant before it is left to answer")
    places: list[int] = []
    for index, result in enumerate(results):
        answers = result.get("tool_call_id")
        if answers is None or not any(ids):
            return results
        problem = ""
        if answers not in ids:
            problem = f"names no call; expected {' or '.join(repr(known) for known in ids)}"
        elif ids.index(answers) in places:
            problem = "was answered already"
        if problem:
            raise InputError(
                f"messages[{first + index}] (tool): tool_call_id {answers!r} {problem}"
            )
        places.append(ids.index(answers))
    return [results[index] for index in sorted(range(len(results)), key=places.__getitem__)]
