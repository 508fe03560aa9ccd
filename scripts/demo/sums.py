"""Sums of numbers up to two digits, and the reasoning that finds them."""


def total(a: int, b: int, operator: str) -> int:
    """Return `a operator b`."""
    return a + b if operator == "+" else a - b


def sum_reasoning(a: int, b: int, operator: str) -> str:
    """Return the column-wise reasoning for `a operator b`, both in 0..99.

    Every step is one small sum of neighbouring tokens: a lookup, which a tiny model can learn.
    """
    if operator == "-" and a < b:
        return f"{a} is less than {b}, so I take {b} - {a}. {_difference(b, a)} So {a - b}."
    if operator == "-":
        return f"{_difference(a, b)} So {a - b}."
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry, carried = (", carry 1", f", {tens}+1={tens + 1}") if ones > 9 else ("", "")
    return (
        f"Ones: {a % 10}+{b % 10}={ones}{carry}. "
        f"Tens: {a // 10}+{b // 10}={tens}{carried}. So {a + b}."
    )


def _difference(a: int, b: int) -> str:
    ones, tens = a % 10, a // 10 - b // 10
    borrow, borrowed = "", ""
    if ones < b % 10:
        ones, borrow, borrowed = ones + 10, ", borrow 1", f", {tens}-1={tens - 1}"
    return (
        f"Ones: {ones}-{b % 10}={ones - b % 10}{borrow}. "
        f"Tens: {a // 10}-{b // 10}={tens}{borrowed}."
    )
