"""Tools to try with the demo model.

python -m lfm_mlx.chat --model demo --tools examples/tools.py
"""

import ast
import operator
from typing import Any

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
WEATHER = {"Paris": (18, "cloudy"), "Oslo": (-3, "snowy"), "Cairo": (34, "sunny")}


def calculator(expression: str) -> dict[str, float]:
    """Evaluate an expression."""
    return {"result": _value(ast.parse(expression.strip(), mode="eval").body)}


def get_weather(city: str) -> dict[str, Any]:
    """Get the weather in a city."""
    temperature, condition = WEATHER.get(city, (21, "clear"))
    return {"temperature": temperature, "condition": condition}


def _value(node: ast.expr) -> float:
    """Arithmetic on numbers only: an expression of a model's is no program to run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"cannot calculate {ast.unparse(node)}")
