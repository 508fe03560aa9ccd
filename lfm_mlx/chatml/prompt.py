"""Messages → token ids: the checkpoint's chat template, with content that stays content.

What a user, a tool or a tool's description spells like a special token (`<|im_end|>`, `<think>`)
is text: it opens and closes nothing. Before rendering, such spellings get a mark behind their
first character; in the rendered text what still spells a token is the template's own, and the rest
is encoded as ordinary characters, marks removed.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm_mlx.chatml.messages import Message, template_messages
from lfm_mlx.chatml.template import render_template
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.text import map_text
from lfm_mlx.tool_calls.schema import parameters_of

# Candidates for the mark: printable, so that Python's repr keeps them, rare, and many.
MARKS = range(0x20000, 0x2A6D0)
_THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *,
    tools: Sequence[Mapping[str, Any]] | None = None, date: str | None = None, **options: Any,
) -> list[int]:  # fmt: skip
    """The token ids of a conversation, up to where the assistant speaks.

    messages: as in a chat request: `role`, `content` (text or text parts), `tool_calls`,
        `tool_call_id`, `reasoning_content` or `thinking`
    tools: the tools on offer, as in a chat request
    date: the day the template tells, YYYY-MM-DD; by default today
    options: passed to the template (`add_generation_prompt`, `preserve_thinking`, …)

    Raises InputError if the tokenizer has no chat template, when a message or a tool is not as it
    should be, or when the template refuses them.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; only raw text can be given to it")
    plain, tools = _plain(messages, tools)
    today = _day(date)
    added: dict[str, int] = tokenizer.get_added_vocab()
    mark = _unused_character(f"{plain}{tools}")
    guard = _guard(added, mark)
    variables: dict[str, Any] = {
        **tokenizer.special_tokens_map,
        "add_generation_prompt": True,
        **options,
        "messages": [_guarded_message(message, guard) for message in plain],
        "tools": _guarded([*tools], guard) if tools else None,
    }
    source = tokenizer.get_chat_template(tools=tools)
    try:
        text = render_template(source, variables, today)
    except Exception as error:  # whatever a template raises is about what it was given
        raise InputError(f"the chat template refuses the messages: {one_line(error)}") from error
    ids = _token_ids(tokenizer, added, text, mark)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _plain(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[list[Message], Sequence[Mapping[str, Any]] | None]:
    """Messages and tools, checked and in text that can be encoded."""
    try:
        tools = map_text(tools)
        parameters_of(tools)
        return template_messages(map_text(messages)), tools
    except RecursionError:
        raise InputError("the messages or the tools are nested too deep") from None


def _day(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        raise InputError(f"date is {text!r}; expected YYYY-MM-DD") from None


def _unused_character(text: str) -> str:
    free = (chr(code) for code in MARKS if chr(code) not in text)
    found = next(free, None)
    if found is None:
        raise InputError(f"the messages hold all of the {len(MARKS)} rarest characters")
    return found


def _guard(added: Mapping[str, int], mark: str) -> Callable[[str], str]:
    """Text with a mark inside whatever spells an added token, overlapping ones too."""
    spelled = re.compile(f"(?=(?:{_any_of(added)}))(.)", re.DOTALL)
    return lambda text: spelled.sub(rf"\1{mark}", text)


def _any_of(added: Mapping[str, int]) -> str:
    """A pattern of all added tokens; where several begin alike, the longest is found."""
    return "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)"


def _guarded_message(message: Message, guard: Callable[[str], str]) -> Message:
    """The message with all its text guarded, but for a think block that the assistant begins with.

    Clients that know no reasoning key send such answers back whole, and templates look for them.
    """
    guarded = {**_guarded(message, guard), "role": message["role"]}
    thought = _THOUGHT.fullmatch(message.get("content", ""))
    if message["role"] == "assistant" and "thinking" not in message and thought:
        opening, thinking, closing, answer = thought.groups()
        guarded["content"] = f"{opening}{guard(thinking)}{closing}{guard(answer)}"
    return guarded


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {_guarded(key, guard): _guarded(item, guard) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(item, guard) for item in value]
    return value


def _token_ids(tokenizer: Tokenizer, added: Mapping[str, int], text: str, mark: str) -> list[int]:
    if mark not in text:
        # Quietly: whoever reads the ids says what is too long, in one line.
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    ids: list[int] = []
    for piece in re.split(f"({_any_of(added)})", text):
        ids += [added[piece]] if piece in added else _ordinary_ids(tokenizer, piece, mark)
    return ids


def _ordinary_ids(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """The ids of text in which nothing is a special token, whatever it spells."""
    backend = tokenizer.backend_tokenizer
    text = text.replace(mark, "")
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]
