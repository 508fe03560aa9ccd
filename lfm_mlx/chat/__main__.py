"""python -m lfm_mlx.chat: a conversation on a terminal, which `lfm_mlx.terminal` holds."""

import sys

from lfm_mlx.terminal.program import command

if __name__ == "__main__":
    sys.exit(command())
