"""How many recorded tool-call shapes each parser reads, ours and mlx-lm's, on the same table.

    python benchmarks/tool_calls.py

A shape counts as read when names and arguments are equal, types included; a shape that is no call
counts as refused when no call comes out. Prints what was lost, then one JSON line.
"""

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm.tool_parsers.pythonic import parse_tool_call

from lfm_mlx import chatml
from lfm_mlx.cli.command import Parser, run

SHAPES = Path(__file__).parents[1] / "tests" / "tool_call_shapes.py"
Calls = list[tuple[str, Any]] | None

COUNTS = ("read", "read_by_syntax_only", "refused", "refused_by_syntax_only")


def ours(text: str, tools: Sequence[dict[str, Any]]) -> Calls:
    try:
        return [(call.name, call.arguments) for call in chatml.parse(text, tools)]
    except chatml.CallError:
        return None


def mlx_lms(text: str, tools: Sequence[dict[str, Any]]) -> Calls:
    try:
        found = parse_tool_call(text, tools)
    except Exception:  # its server, too, takes any failure for no call
        return None
    calls = found if isinstance(found, list) else [found]
    return [(call["name"], call["arguments"]) for call in calls]


PARSERS: dict[str, Callable[[str, Sequence[dict[str, Any]]], Calls]] = {
    "lfm_mlx": ours,
    "mlx_lm": mlx_lms,
}


def outcome(found: Calls, expected: Calls) -> str:
    """`right`, `lost` where a call was not found, `wrong` where another was."""
    if written(found) == written(expected):
        return "right"
    return "lost" if found is None else "wrong"


def written(calls: Calls) -> str:
    """As JSON, where true is not 1 and 3.0 not 3."""
    return json.dumps(calls, sort_keys=True, default=repr)


def main() -> None:
    Parser(description=__doc__).parse_args()
    table = runpy.run_path(str(SHAPES))
    shapes, tools = table["SHAPES"], table["TOOLS"]
    score = {name: dict.fromkeys((*COUNTS, "lost", "wrong"), 0) for name in PARSERS}
    totals = dict.fromkeys(COUNTS, 0)
    print(f"{'shape':36}", *(f"{name:>8}" for name in PARSERS))
    for shape in shapes:
        outcomes = {
            name: outcome(parse(shape.text, tools), shape.calls) for name, parse in PARSERS.items()
        }
        # Some texts mean what they mean by their tool's schema only, which mlx-lm does not ask.
        syntax_only = outcome(ours(shape.text, []), shape.calls) == "right"
        counts = ["refused" if shape.calls is None else "read"]
        counts += [f"{counts[0]}_by_syntax_only"] * syntax_only
        for count in counts:
            totals[count] += 1
        for name, result in outcomes.items():
            for key in counts if result == "right" else [result]:
                score[name][key] += 1
        if set(outcomes.values()) != {"right"}:
            print(f"{shape.what:36}", *(f"{result:>8}" for result in outcomes.values()))
    for count in COUNTS:
        title = f"{count.replace('_', ' ')}, of {totals[count]}"
        print(f"{title:36}", *(f"{row[count]:>8}" for row in score.values()))
    record = {"benchmark": "tool_calls", "shapes": totals, "mlx_lm_version": version("mlx-lm")}
    print(json.dumps({**record, "score": score}))


if __name__ == "__main__":
    sys.exit(run(main, "tool_calls"))
