"""The text of a tool-call block ⇄ calls that fit the tools, or the reason why there are none.

A block is Python-like (`[f(a='x', n=3), g(b={"k": 1})]`) or JSON (`[{"name": …, "arguments":
{…}}]`). All calls of a block stand or fall together: what does not read to its end, names no tool
that was offered or does not fit its schema is no call.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from lfm_mlx.tool_calls.coerce import SchemaError, shown
from lfm_mlx.tool_calls.json_calls import read_json_calls
from lfm_mlx.tool_calls.literals import ParseError
from lfm_mlx.tool_calls.python_calls import UNPACKED, Argument, CallReader, WrittenCall
from lfm_mlx.tool_calls.schema import Schema, fit, parameters_of

# More readings of one text than this are not looked at: it is ambiguous enough.
MOST_READINGS = 64
_FENCED = re.compile(r"```\w*\s*(.*?)\s*```", re.DOTALL)
_Reading = tuple[WrittenCall, ...]
_Settled = list[tuple[str, dict[str, Any]]]


class CallError(ValueError):
    """The block is not a call, for this reason.

    open_string: the text ends inside a string, so that more of it might complete the call
    """

    def __init__(self, reason: str, open_string: bool = False):
        super().__init__(reason)
        self.open_string = open_string


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    ambiguous: the text could be read otherwise too; this is its likeliest reading
    """

    name: str
    arguments: dict[str, Any]
    ambiguous: bool = field(default=False, compare=False)


def parse(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[Call, ...]:
    """The calls of a block, without its tags.

    tools: as in a chat request; arguments are coerced to their schemas and checked. With None any
        call goes, with an empty list none does

    Raises CallError.
    """
    parameters = None if tools is None else parameters_of(tools)
    fenced = _FENCED.fullmatch(text.strip())
    text = fenced[1] if fenced else text.strip()
    try:
        if re.match(r"\[?\s*\{", text):
            settled = _settled(read_json_calls(text), parameters)
            return tuple(Call(name, arguments) for name, arguments in settled)
        return _read(text, parameters)
    except ParseError as error:
        raise CallError(str(error), error.open_string) from error
    except SchemaError as error:
        raise CallError(str(error)) from error
    except RecursionError:
        raise CallError("the call is nested too deep") from None


def _read(text: str, parameters: Mapping[str, Schema] | None) -> tuple[Call, ...]:
    """The likeliest reading that fits.

    A reading in which every quote ends its string is the one that was meant, fit or not. Otherwise
    some string holds quotes, and readings with the tools' own names come before any others.
    """
    clean = _first(CallReader(text, clean=True), 1)
    if clean:
        return _likeliest(clean, parameters)
    offers = (parameters or {}).items()
    names = {name: schema.get("properties") or {} for name, schema in offers}
    offered = _first(CallReader(text, names), MOST_READINGS) if names else []
    any_names = CallReader(text, positional=bool(names))
    readings = offered + _first(any_names, MOST_READINGS)
    if not readings:
        raise CallError(any_names.problem, any_names.open_string)
    if text.startswith("[") and not text.endswith("]"):
        raise CallError("expected ']' at the end", open_string=True)
    return _likeliest(readings, parameters)


def _first(reader: CallReader, most: int) -> list[_Reading]:
    return list(islice(reader.readings(), most))


def _likeliest(
    readings: Iterable[_Reading], parameters: Mapping[str, Schema] | None
) -> tuple[Call, ...]:
    """The first reading that fits; ambiguous where another one does, too."""
    fitting: list[_Settled] = []
    misfits: list[SchemaError] = []
    ambiguous = False
    for reading in readings:
        try:
            settled = _settled(reading, parameters)
        except SchemaError as misfit:
            misfits.append(misfit)
            continue
        doubtful = any(argument.doubtful for call in reading for argument in call.arguments)
        ambiguous |= settled != fitting[0] if fitting else doubtful
        fitting.append(settled)
    if not fitting:
        raise misfits[0]
    return tuple(Call(name, arguments, ambiguous) for name, arguments in fitting[0])


def _settled(calls: Iterable[WrittenCall], parameters: Mapping[str, Schema] | None) -> _Settled:
    """Names and arguments, by the tools' schemas; SchemaError where they do not fit."""
    settled: _Settled = []
    for call in calls:
        if parameters is not None and call.name not in parameters:
            offered = ", ".join(parameters) or "no call: no tools are on offer"
            raise SchemaError(f"there is no tool {call.name!r}; expected {offered}")
        schema = (parameters or {}).get(call.name, {})
        try:
            settled.append((call.name, fit(_named(call, schema), schema)))
        except SchemaError as misfit:
            raise SchemaError(f"{call.name}: {str(misfit).lstrip('.')}") from None
    return settled


def _named(call: WrittenCall, schema: Schema) -> dict[str, Any]:
    """All arguments by name: the leading ones without a name take the schema's, in their order."""
    properties = schema.get("properties") or {}
    pairs = _unwrapped(call.arguments, properties)
    leading = sum(1 for _ in takewhile(lambda pair: pair[0] is None, pairs))
    if leading > len(properties):
        raise SchemaError(f"{leading} arguments without a name; the tool names {len(properties)}")
    keys = [*islice(properties, leading), *(key for key, _ in pairs[leading:])]
    named: dict[str, Any] = {}
    for key, (_, value) in zip(keys, pairs, strict=True):
        if key is None:
            raise SchemaError(f"argument {shown(value)} has no name")
        if key in named:
            raise SchemaError(f"argument {key} is given twice")
        named[key] = value
    return named


def _unwrapped(
    arguments: Sequence[Argument], properties: Mapping[str, Any]
) -> list[tuple[str | None, Any]]:
    """The arguments without the mapping that they may come wrapped in."""
    pairs: list[tuple[str | None, Any]] = []
    for argument in arguments:
        if argument.key == UNPACKED or (len(arguments) == 1 and _wraps(argument, properties)):
            pairs += argument.value.items()
        else:
            pairs.append((argument.key, argument.value))
    return pairs


def _wraps(argument: Argument, properties: Mapping[str, Any]) -> bool:
    """Whether a call's only argument holds the arguments: `f(properties={…})`, `f({…})`.

    It does not where the tool has a parameter that the mapping is meant for.
    """
    if not isinstance(argument.value, dict):
        return False
    if argument.key is None:
        return not properties or argument.value.keys() <= properties.keys()
    return argument.key == "properties" and "properties" not in properties


def as_messages(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """The calls as a chat message lists them under `tool_calls`, arguments as JSON text."""
    return [
        {
            "id": f"call_{place_in_list}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False, allow_nan=False),
            },
        }
        for place_in_list, call in enumerate(calls)
    ]
