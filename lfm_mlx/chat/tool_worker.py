"""A process of its own for the functions of one Python file: says what they are, or runs one.

The request comes as JSON on stdin, the reply goes as JSON to stdout; what the functions print goes
to stderr. Meant to be run by its path: it imports nothing of the package, and so starts at once.
"""

import asyncio
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
from pydantic import TypeAdapter, ValidationError, validate_call
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python

# The file's name as a module: one that shadows nothing the file itself may import.
MODULE = "tools_on_offer"


class PlainSchema(GenerateJsonSchema):
    """JSON Schema without a title for every name: models read each word of it."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def functions_of(path: Path) -> dict[str, Callable[..., Any]]:
    """The public functions that the file defines, in its order."""
    sys.path[0] = str(path.parent)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return {
        name: member
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == MODULE and not name.startswith("_")
    }


def tool_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The function as a chat request offers it: signature and docstring."""
    adapter: TypeAdapter[Any] = TypeAdapter(function)  # pyright: ignore[reportArgumentType]
    schema = adapter.json_schema(schema_generator=PlainSchema)
    if schema.get("type") != "object":
        raise TypeError(f"{name}: positional-only parameters are not supported")
    schema.pop("additionalProperties", None)
    text = docstring_parser.parse(inspect.getdoc(function) or "")
    for parameter in text.params:
        if parameter.arg_name in schema["properties"] and parameter.description:
            schema["properties"][parameter.arg_name]["description"] = parameter.description
    order = ("type", "properties", "required")
    parameters = {key: schema[key] for key in (*order, *schema) if key in schema}
    described = {"description": text.description.strip()} if text.description else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """The function's result, as text."""
    result = validate_call(function)(**arguments)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    if isinstance(result, str):
        return result
    return json.dumps(to_jsonable_python(result, fallback=str), ensure_ascii=False)


def problem(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        found = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return "; ".join(found)
    return f"{type(error).__name__}: {error}"


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    """`tools` for a request without a name, else `result`; `error` where either fails."""
    try:
        functions = functions_of(Path(request["file"]))
        if "name" not in request:
            return {"tools": [tool_of(name, function) for name, function in functions.items()]}
        return {"result": called(functions[request["name"]], request["arguments"])}
    except (Exception, SystemExit) as error:  # whatever a stranger's file raises
        return {"error": problem(error)}


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)
    reply = reply_to(json.load(sys.stdin))
    with open(out, "w", encoding="utf-8") as stdout:
        json.dump(reply, stdout)


if __name__ == "__main__":
    main()
