"""Messages → token ids: the checkpoint's chat template, with content that stays content.

What a user, a tool or a tool's description spells like a special token (`<|im_end|>`, `<think>`)
is text: it opens and closes nothing. Before rendering, such spellings get a mark behind their
first character; in the rendered text what still spells a token is the template's own, and the rest
is encoded as ordinary characters, marks removed. One exception: a system message may write its list
of tools by hand between the tags of one, as the cards of LFM2 do.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lfm_mlx.chatml.messages import Message, template_messages
from lfm_mlx.chatml.template import render_template
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.text import map_text
from lfm_mlx.tool_calls.schema import parameters_of

# Candidates for the mark: printable, so that Python's repr keeps them, rare, and many.
MARKS = range(0x20000, 0x2A6D0)
TOOL_LIST = {"<|tool_list_start|>", "<|tool_list_end|>"}
# What templates of the hub know an answer by that is to be continued; transformers appends it too.
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
_THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *,
    tools: Sequence[Mapping[str, Any]] | None = None, date: str | None = None,
    continue_final_message: bool = False, **options: Any,
) -> list[int]:  # fmt: skip
    """The token ids of a conversation, up to where the assistant speaks.

    messages: as in a chat request: `role`, `content` (text or text parts), `tool_calls`,
        `tool_call_id`, `reasoning_content` or `thinking`
    tools: the tools on offer, as in a chat request
    date: the day the template tells, YYYY-MM-DD; by default today
    continue_final_message: end in the last message, which the assistant began, instead of after it
    options: passed to the template (`add_generation_prompt`, `preserve_thinking`, …)

    Raises InputError if the tokenizer has no chat template, if a message or a tool is not as it
    should be, or if the template refuses them.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; only raw text can be given to it")
    plain, tools = _plain(messages, tools)
    if continue_final_message:
        _mark_end(plain, options)
    today = _day(date)
    added: dict[str, int] = tokenizer.get_added_vocab()
    mark = _unused_character(f"{plain}{tools}")
    guard = _guard(added, mark)
    listing = _guard(added.keys() - TOOL_LIST, mark)
    variables: dict[str, Any] = {
        **tokenizer.special_tokens_map,
        "add_generation_prompt": not continue_final_message,
        **options,
        "messages": [_guarded_message(message, guard, listing) for message in plain],
        "tools": map_text(tools, guard) if tools else None,
    }
    source = tokenizer.get_chat_template(tools=tools or None)
    try:
        text = render_template(source, variables, today)
    except Exception as error:  # whatever a template raises is about what it was given
        raise InputError(f"the chat template refuses the messages: {one_line(error)}") from error
    if continue_final_message:
        text, found, _ = text.rpartition(_CONTINUED.strip())
        if not found:
            raise InputError("the chat template cannot continue a message")
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


def ends_in_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a think block, as templates of some siblings let it."""
    tags = {number: text for text, number in tokenizer.get_added_vocab().items()}
    return next((tags[token] for token in reversed(prompt) if token in tags), "") == "<think>"


def _mark_end(messages: list[Message], options: Mapping[str, Any]) -> None:
    """Put the mark by which templates know it behind the last message, or behind its thinking."""
    if options.get("add_generation_prompt"):
        raise InputError("continue_final_message and add_generation_prompt exclude each other")
    last = messages[-1]
    key = next((key for key in ("content", "thinking") if last.get(key)), None)
    if last["role"] != "assistant" or key is None:
        raise InputError(
            "continue_final_message: expected the last message to be an answer that was begun"
        )
    last[key] += _CONTINUED


def _day(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        raise InputError(f"date is {text!r}; expected YYYY-MM-DD") from None


def _unused_character(text: str) -> str:
    free = (chr(code) for code in MARKS if chr(code) not in text)
    found = next(free, None)
    if found is None:
        raise InputError(
            f"the messages use every one of {len(MARKS)} rare characters; leave one of them out"
        )
    return found


def _guard(added: Iterable[str], mark: str) -> Callable[[str], str]:
    """Text with a mark inside whatever spells an added token, overlapping ones too."""
    spelled = re.compile(f"(?=(?:{_any_of(added)}))(.)", re.DOTALL)
    return lambda text: spelled.sub(rf"\1{mark}", text)


def _any_of(added: Iterable[str]) -> str:
    """A pattern of all added tokens; where several begin alike, the longest is found."""
    return "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)"


def _guarded_message(
    message: Message, guard: Callable[[str], str], listing: Callable[[str], str]
) -> Message:
    """The message with all its text guarded, but for a think block that the assistant begins with.

    Clients that know no reasoning key send such answers back whole, and templates look for them.
    `listing` guards the text of a system message, all but the tags around a list of tools.
    """
    guarded = {**map_text(message, guard), "role": message["role"]}
    if message["role"] == "system":
        return {**guarded, "content": listing(message["content"])}
    thought = _THOUGHT.fullmatch(message.get("content", ""))
    if message["role"] == "assistant" and "thinking" not in message and thought:
        opening, thinking, closing, answer = thought.groups()
        guarded["content"] = f"{opening}{guard(thinking)}{closing}{guard(answer)}"
    return guarded


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
