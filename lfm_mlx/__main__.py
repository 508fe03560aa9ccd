"""python -m lfm_mlx, and the `lfm-mlx` command: all commands under one name."""

import sys
from importlib import import_module

# Each command's module, and what it does.
COMMANDS = {
    "generate": ("generate", "prompt → streamed text"),
    "chat": ("chat.program", "a conversation on a terminal, with tools"),
    "batch": ("batch.program", "many prompts or conversations at once, from a file"),
    "convert": ("convert", "Hugging Face folder → MLX folder, optionally quantized"),
    "doctor": ("doctor.program", "check every Metal kernel on this machine"),
    "mlx_lm": ("mlx_lm", "mlx-lm's own commands (server, generate, lora, …) on this model"),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        return import_module(f"lfm_mlx.{COMMANDS[name][0]}").command()
    wanted_help = name in ("-h", "--help")
    lines = [f"  {known:10} {what}" for known, (_, what) in COMMANDS.items()]
    usage = "\n".join(["usage: lfm-mlx COMMAND …", "", *lines])
    print(usage, file=sys.stdout if wanted_help else sys.stderr)
    return 0 if wanted_help else 2


if __name__ == "__main__":
    sys.exit(main())
