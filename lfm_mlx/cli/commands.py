"""The commands of `lfm-mlx`: their modules, by name, and what each is for."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command: `options` has its parser and imports in no time; `program` has what it does.

    options: None for a program that reads its own command line
    """

    summary: str
    options: str | None
    program: str


def _of_package(name: str, summary: str) -> Command:
    return Command(summary, f"lfm_mlx.{name}.options", f"lfm_mlx.{name}.program")


COMMANDS = {
    "generate": _of_package("generate", "answer a prompt"),
    "chat": _of_package("chat", "converse on a terminal, with tools"),
    "batch": _of_package("batch", "answer many prompts or conversations from a file"),
    "convert": _of_package("convert", "make an MLX folder of a checkpoint, quantized or not"),
    "doctor": _of_package("doctor", "check every Metal kernel on this machine"),
    "mlx_lm": Command(
        "run mlx-lm's own commands (server, lora, …) on this model", None, "lfm_mlx.mlx_lm"
    ),
}
