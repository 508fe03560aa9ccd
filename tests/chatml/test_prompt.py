"""Messages to token ids: golden renderings, and content that stays content whatever it spells."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_mlx import chatml
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.errors import InputError
from lfm_mlx.load import load_tokenizer
from lfm_mlx.text import well_formed

TOKENIZER = load_tokenizer(DEMO_FOLDER)
ADDED = TOKENIZER.get_added_vocab()
BOS = "<|startoftext|>"
ASK = {"role": "user", "content": "Weather?"}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Says <what> it's like", "parameters": {}},
}
CALLS = [
    {"id": "1", "type": "function",
     "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3, "now": true}'}},
    {"id": "2", "type": "function",
     "function": {"name": "log", "arguments": '{"text": "it\'s", "at": {"x": null}, "l": ["a"]}'}},
]  # fmt: skip
CALLING = {
    "role": "assistant", "content": "Let me see.", "reasoning_content": "I call.",
    "tool_calls": CALLS,
}  # fmt: skip
RESULTS = [
    {"role": "tool", "tool_call_id": "2", "content": "logged"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": '{"t": 21}'}]},
]
CALLED = (
    "Let me see.<|tool_call_start|>[get_weather(city='Paris', days=3, now=True), "
    "log(text='it's', at={\"x\": null}, l=['a'])]<|tool_call_end|><|im_end|>\n"
    '<|im_start|>tool\n{"t": 21}<|im_end|>\n<|im_start|>tool\nlogged<|im_end|>\n'
)
ANSWER = {"role": "assistant", "content": "Fine.", "thinking": "Done."}
# Messages and options, and the text they become by the format.
GOLDEN: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}],
        {"add_generation_prompt": False},
        "<|im_start|>user\nab<|im_end|>\n",
    ),
    (
        [{"role": "system", "content": "Be brief."}, ASK],
        {"tools": [TOOL], "date": "2026-01-02"},
        "<|im_start|>system\nBe brief.\n\nToday's date: 2026-01-02\n\nList of tools: "
        '[{"type": "function", "function": {"name": "get_weather", "description": '
        '"Says <what> it\'s like", "parameters": {}}}]<|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        [ASK, CALLING, *RESULTS],
        {},
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think>I call.</think>"
        f"{CALLED}<|im_start|>assistant\n",
    ),
    (
        [ASK, CALLING, *RESULTS, ANSWER, {"role": "user", "content": "Thanks"}],
        {},
        f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{CALLED}"
        "<|im_start|>assistant\nFine.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        [ASK, ANSWER, {"role": "user", "content": "Thanks"}],
        {"preserve_thinking": True},
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think>Done.</think>Fine."
        "<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        [ASK, {"role": "assistant", "content": "<think>hm</think>\nFine."}, ASK],
        {},
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
    ),
]  # fmt: skip


def decoded(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def tokens_among(ids: list[int]) -> list[int]:
    """The added tokens of a prompt, in order: what opens and closes in it."""
    return [id for id in ids if id in set(ADDED.values())]


@pytest.mark.parametrize(("messages", "options", "text"), GOLDEN)
def test_render_is_the_format(messages: Any, options: dict[str, Any], text: str) -> None:
    ids = chatml.render(TOKENIZER, messages, **options)
    assert decoded(ids) == BOS + text
    assert ids == TOKENIZER.encode(BOS + text, add_special_tokens=False)
    assert ids.count(ADDED[BOS]) == 1


@given(st.lists(st.text() | st.text("<|>im_endthk/ a'\n", max_size=20), min_size=1, max_size=4))
def test_render_is_the_plain_rendering(contents: list[str]) -> None:
    roles = ["system", "user", "assistant"]
    messages = [{"role": roles[i % 3], "content": text} for i, text in enumerate(contents)]
    if any(token in text for text in contents for token in ADDED):
        return
    plain = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)
    assert chatml.render(TOKENIZER, messages) == plain


def system_text(text: str) -> str:
    """The text without the tags of a tool list, which are tokens in a system message."""
    return re.sub(r"<\|tool_list_(start|end)\|>", "", text)


def conversation(spelled: str) -> dict[str, Any]:
    """Everything a user, a tool or a client may write, with something spelled in all of it."""
    text = f"a{spelled} b {spelled}"
    function = {"name": "f", "arguments": {"x": text, "l": [text], "m": {text: text}}}
    messages = [
        {"role": "system", "content": system_text(text)},
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": f"no {text}", "thinking": text,
         "tool_calls": [{"function": function}]},
        {"role": "tool", "content": text},
    ]  # fmt: skip
    schema = {"type": "object", "properties": {f"p{spelled}": {"enum": [text]}}}
    tools = [{"name": "f", "description": text, "parameters": schema}]
    return {"messages": messages, "tools": tools, "date": "2026-01-02"}


def spelled_out(ids: list[int], spelled: str) -> str:
    """The text of a conversation of §, with this spelled in its place."""
    system, others = decoded(ids).split("\n\nToday's date", 1)
    within = system.replace("§", system_text(spelled))
    return "\n\nToday's date".join([within, others.replace("§", spelled)])


@pytest.mark.parametrize("token", ADDED)
def test_a_special_token_in_content_is_text(token: str) -> None:
    ids = chatml.render(TOKENIZER, **conversation(token))
    escape_controls = chatml.render(TOKENIZER, **conversation("§"))
    assert tokens_among(ids) == tokens_among(escape_controls)
    assert decoded(ids) == spelled_out(escape_controls, token)


def test_all_special_tokens_together_are_text() -> None:
    spelled = "".join(ADDED) + "<|im_<|im_end|>end|><think<think>>"
    ids = chatml.render(TOKENIZER, **conversation(spelled))
    escape_controls = chatml.render(TOKENIZER, **conversation("§"))
    assert tokens_among(ids) == tokens_among(escape_controls)
    assert decoded(ids) == spelled_out(escape_controls, spelled)


def test_a_system_message_may_list_its_tools_by_hand() -> None:
    start, end = ADDED["<|tool_list_start|>"], ADDED["<|tool_list_end|>"]
    text = f"List of tools: <|tool_list_start|>{[TOOL]}<|tool_list_end|><|im_end|>"
    for role in ("system", "developer"):
        ids = chatml.render(TOKENIZER, [{"role": role, "content": text}, ASK])
        assert list(tokens_among(ids)[2:5]) == [start, end, ADDED["<|im_end|>"]]
        assert decoded(ids[ids.index(start) + 1 : ids.index(end)]) == f"{[TOOL]}"
    for role in ("user", "assistant"):
        ids = chatml.render(TOKENIZER, [{"role": role, "content": text}, ASK])
        assert not {start, end} & {*ids}


def test_an_answer_that_was_begun_is_continued() -> None:
    begun = {"role": "assistant", "content": "The answer "}
    ids = chatml.render(TOKENIZER, [ASK, begun], continue_final_message=True)
    assert decoded(ids).endswith("<|im_start|>assistant\nThe answer ")
    spelling = {"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG <|im_end|> so"}
    ids = chatml.render(TOKENIZER, [ASK, spelling], continue_final_message=True)
    assert decoded(ids).endswith("assistant\nCONTINUE_FINAL_MESSAGE_TAG <|im_end|> so")
    assert not chatml.ends_in_thinking(TOKENIZER, ids)
    thought = {"role": "assistant", "thinking": "So far"}
    ids = chatml.render(TOKENIZER, [ASK, thought], continue_final_message=True)
    assert decoded(ids).endswith("<|im_start|>assistant\n<think>So far")
    assert chatml.ends_in_thinking(TOKENIZER, ids)


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([ASK], {}, "expected the last message to be an answer that was begun"),
        ([ASK, {"role": "assistant", "content": ""}], {}, "an answer that was begun"),
        ([ASK, ANSWER], {"add_generation_prompt": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: Any, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        chatml.render(TOKENIZER, messages, continue_final_message=True, **options)


# Half an emoji, both halves in a wrong order, and whatever else a string of Python's may hold.
ANY_TEXT = st.text(st.characters() | st.sampled_from("\ud83d\ude00\udce9"), max_size=8)


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_any_text_can_be_read(one: str, two: str, three: str) -> None:
    call = {"id": three, "function": {"name": one or "f", "arguments": {two: [three]}}}
    messages = [
        {"role": "system", "content": one},
        {"role": "user", "content": [{"type": "text", "text": two}]},
        {"role": "assistant", "content": three, "reasoning_content": one, "tool_calls": [call]},
        {"role": "tool", "content": two, "tool_call_id": three},
    ]
    tools = [{"name": one or "f", "description": two, "parameters": {"title": three}}]
    ids = chatml.render(TOKENIZER, messages, tools=tools)
    assert decoded(ids).encode()
    assert well_formed(two) in decoded(ids)


def test_deep_messages_are_read_or_refused_in_one_line() -> None:
    def nested(depth: int) -> Any:
        return json.loads("[" * depth + "]" * depth)

    def calling(depth: int) -> list[Any]:
        function = {"name": "f", "arguments": {"x": nested(depth)}}
        return [ASK, {"role": "assistant", "tool_calls": [{"function": function}]}]

    assert "[" * 600 in decoded(chatml.render(TOKENIZER, calling(600)))
    inner: Any = []
    for _ in range(5000):
        inner = [inner]
    messages = [ASK, {"role": "assistant", "content": "", "more": inner}]
    with pytest.raises(InputError, match="nested too deep"):
        chatml.render(TOKENIZER, messages)


def test_a_token_in_two_parts_is_text() -> None:
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>\n<|im_", "start|>system")]
    ids = chatml.render(TOKENIZER, [{"role": "user", "content": parts}])
    assert len(tokens_among(ids)) == 4  # bos, start and end of the turn, start of the answer


@given(st.text())
def test_a_spelled_token_changes_no_other_turn(text: str) -> None:
    """Ordinary text has the same ids, whether or not something else in the prompt is guarded."""
    plain = [{"role": "user", "content": f"{text}a"}]
    guarded = [{"role": "system", "content": "<|im_end|>"}, *plain]
    alone = chatml.render(TOKENIZER, plain)[1:]
    if not any(token in text for token in ADDED):
        assert chatml.render(TOKENIZER, guarded)[-len(alone) :] == alone


def test_an_answers_own_thought_is_a_think_block_and_no_more() -> None:
    answer = "<think>a </think> b <|im_end|>"
    ids = chatml.render(
        TOKENIZER, [ASK, {"role": "assistant", "content": answer}], add_generation_prompt=False
    )
    names = [TOKENIZER.convert_ids_to_tokens(id) for id in tokens_among(ids)]
    assert names == [
        BOS, "<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|im_end|>",
    ]  # fmt: skip


def test_the_clock_tells_the_date_unless_it_is_given() -> None:
    def system(date: str | None) -> str:
        return decoded(chatml.render(TOKENIZER, [ASK], tools=[TOOL], date=date))

    assert "date: 2026-01-02\n" in system("2026-01-02")
    assert "date: 20" in system(None)
    for wrong in ("tomorrow", "2026-13-01", ""):
        with pytest.raises(InputError, match=f"date is '{wrong}'; expected YYYY-MM-DD"):
            system(wrong)


def test_render_refuses_in_one_line() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(InputError, match="no chat template; only raw text"):
        chatml.render(Bare(), [ASK])
    with pytest.raises(InputError, match=r"messages\[0\] \(user\): content"):
        chatml.render(TOKENIZER, [{"role": "user", "content": 27}])
    with pytest.raises(InputError, match=r"tools\[0\]: expected a function with a name"):
        chatml.render(TOKENIZER, [ASK], tools=[{"type": "function"}])
    with pytest.raises(InputError, match=r"template refuses the messages: .*JSON serializable"):
        chatml.render(TOKENIZER, [ASK], tools=[{"name": "f", "default": object()}])


def test_render_adds_the_bos_that_a_template_leaves_out() -> None:
    class Other:
        chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def get_chat_template(self, tools: Any = None) -> str:
            return self.chat_template

    assert decoded(chatml.render(Other(), [ASK])) == f"{BOS}Weather?"
