"""Tool calls: recorded shapes, round trips through the template, and what is ambiguous."""

import json
import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_call_shapes import SHAPES, TOOLS, tool

from lfm_mlx import chatml
from lfm_mlx.chatml.tags import CALL_END, CALL_START
from lfm_mlx.chatml.template import render_template
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.errors import InputError

Calls = list[tuple[str, dict[str, Any]]]
TEMPLATE = (DEMO_FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
# Text in which quotes, brackets and commas are as frequent as letters.
TROUBLE = st.text("ab1'\"\\,=()[]{}: \nñ", max_size=12)
# Text that can only be read one way: no apostrophe, or one inside a word.
PLAIN = st.text().map(lambda text: text.replace("'", "’")) | TROUBLE.map(
    lambda text: text.replace("'", "")
)
CONTRACTED = st.lists(st.sampled_from(["it's", "don't", "o'clock", "a", "café"])).map(" ".join)


def values(strings: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Arguments: the given strings, and whatever JSON has."""
    anything = TROUBLE | st.text()
    scalars = st.none() | st.booleans() | st.integers()
    scalars |= st.floats(allow_nan=False, allow_infinity=False)
    nested = st.recursive(
        scalars | anything,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
        max_leaves=6,
    )
    return strings | nested.filter(lambda value: not isinstance(value, str))


def calls(strings: st.SearchStrategy[str]) -> st.SearchStrategy[Calls]:
    arguments = st.dictionaries(NAMES.filter("properties".__ne__), values(strings), max_size=4)
    named = st.tuples(NAMES, arguments)
    return st.lists(named, min_size=1, max_size=3, unique_by=lambda call: call[0])


def written(calls: Calls) -> str:
    """The calls as the template writes them, without the tags."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    message = {"role": "assistant", "tool_calls": [{"function": it} for it in functions]}
    text = render_template(TEMPLATE, {"messages": [{"role": "user", "content": "?"}, message]})
    return text[text.index(CALL_START) + len(CALL_START) : text.rindex(CALL_END)]


def pairs(parsed: tuple[chatml.Call, ...]) -> Calls:
    return [(call.name, call.arguments) for call in parsed]


def same(left: Any, right: Any) -> bool:
    """Equality by which true is not 1, and 3.0 not 3."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.what)
def test_parse_reads_recorded_shapes(shape) -> None:
    if shape.calls is None:
        with pytest.raises(chatml.CallError) as error:
            chatml.parse(shape.text, TOOLS)
        assert "\n" not in str(error.value)
    else:
        assert same(pairs(chatml.parse(shape.text, TOOLS)), shape.calls)


def test_the_table_is_long_enough() -> None:
    assert len({shape.text for shape in SHAPES}) == len(SHAPES) >= 60


@given(calls(PLAIN))
def test_calls_without_apostrophes_come_back(original: Calls) -> None:
    parsed = chatml.parse(written(original))
    assert same(pairs(parsed), original)
    strings = [value for _, given in original for value in given.values() if type(value) is str]
    if not any("\\" in text for text in strings):
        assert not any(call.ambiguous for call in parsed)


@given(calls(CONTRACTED))
def test_contractions_come_back(original: Calls) -> None:
    assert same(pairs(chatml.parse(written(original))), original)


@given(calls(TROUBLE | st.text()), st.booleans())
def test_any_call_comes_back_or_is_reported(original: Calls, with_tools: bool) -> None:
    """What comes back otherwise is marked, refused, or has the very text of a plainer call.

    The last is what the syntax cannot tell: a string that spells `', b='` and a further argument.
    """
    text = written(original)
    tools = [tool(name, len(given), **{key: {} for key in given}) for name, given in original]
    try:
        parsed = chatml.parse(text, tools if with_tools else None)
    except chatml.CallError:
        assert "'" in text
        return
    if not same(pairs(parsed), original) and not any(call.ambiguous for call in parsed):
        assert written(pairs(parsed)) == text
        strings = [value for call in parsed for value in call.arguments.values()]
        assert not any("'" in value for value in strings if isinstance(value, str))


def test_two_fitting_readings_are_ambiguous() -> None:
    text = "[f(a='it's', b='so')]"
    apart, together = {"a": "it's", "b": "so"}, {"a": "it's', b='so"}
    both, one = tool("f", 1, a="string", b="string"), tool("f", 1, a="string")
    closed = {"name": "f", "parameters": {"properties": {"a": {}}, "additionalProperties": False}}
    for offered, arguments, ambiguous in (
        (both, apart, True),
        (tool("f", 2, a="string", b="string"), apart, False),
        (one, together, True),
        (closed, together, False),
    ):
        (call,) = chatml.parse(text, [offered])
        assert (call.arguments, call.ambiguous) == (arguments, ambiguous)


def test_quotes_that_all_end_their_strings_are_no_guess() -> None:
    closed = {"name": "f", "parameters": {"properties": {"a": {}}, "additionalProperties": False}}
    with pytest.raises(chatml.CallError, match="no place for b"):
        chatml.parse("[f(a='x', b='y')]", [closed])


def test_long_code_is_read() -> None:
    code = "for w in ['a', 'b']:\n    print('w', w, end='')\n    log(x='1'), f('y')\n" * 200
    (call,) = chatml.parse(f"[python(code='{code}', timeout=5)]", TOOLS)
    assert call == chatml.Call("python", {"code": code, "timeout": 5})


def test_an_escape_in_single_quotes_is_ambiguous() -> None:
    for text, value in ((r"[f(a='x\ny')]", r"x\ny"), (r"[f(a='it\'s')]", "it's")):
        (call,) = chatml.parse(text)
        assert call == chatml.Call("f", {"a": value})
        assert call.ambiguous


def test_without_tools_any_call_goes() -> None:
    assert pairs(chatml.parse("[fly(to='Rome', days='3')]")) == [
        ("fly", {"to": "Rome", "days": "3"})
    ]
    with pytest.raises(chatml.CallError, match="without a name"):
        chatml.parse("[fly('Rome')]")


def test_reasons_say_what_and_where() -> None:
    reasons = {
        "[get_weather(city='Paris', days='x')]": "get_weather: days is 'x'; expected integer",
        "[get_weather(days=3)]": "get_weather: lacks city",
        "[search(query='x', tags=[1.5])]": r"search: tags\[0\] is 1.5; expected string",
        "[search(query=]": r"expected a value at character 15 \('\]'\)",
        "[fly()]": "there is no tool 'fly'; expected get_weather, search",
        "[get_weather(city='Par": "the end of the string",
    }
    for text, reason in reasons.items():
        with pytest.raises(chatml.CallError, match=reason):
            chatml.parse(text, TOOLS)


@pytest.mark.parametrize(
    "text",
    [
        "[f(" + "a='it's', " * 300 + ")]",
        "[f(code='" + "g('x'), h('y')\n" * 2000,
        "[f(code='" + "g('x'), h('y')\n" * 2000 + "')]",
        "[f(a=" + "[" * 50000 + ")]",
        "[f(" + "a=1, " * 5000 + ")]",
        "[" + "f('a', " * 2000 + "]",
        "'" * 20000,
        "[f(a='" + "\\'" * 20000 + "')]",
    ],
    ids=range(8),
)
def test_hostile_text_takes_little_time(text: str) -> None:
    began = time.perf_counter()
    with suppress(chatml.CallError):
        chatml.parse(text)
    assert time.perf_counter() - began < 10


@given(st.text("f(a='\"\\,)[]{}:1 \n*.-", max_size=30))
def test_parse_refuses_with_a_call_error_only(text: str) -> None:
    try:
        found = chatml.parse(text)
    except chatml.CallError:
        return
    assert found
    assert json.dumps([call.arguments for call in found], allow_nan=False)
    assert re.search(r"[\w)}\]]", text)


@pytest.mark.parametrize("tools", [["f"], [{}], [{"function": {"name": ""}}], [{"name": 3}]])
def test_parse_refuses_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(InputError, match=r"tools\[0\]: expected a function with a name"):
        chatml.parse("[f()]", tools)
