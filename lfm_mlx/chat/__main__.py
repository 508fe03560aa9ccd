"""python -m lfm_mlx.chat: a conversation on a terminal."""

import sys

from lfm_mlx.chat.program import command

if __name__ == "__main__":
    sys.exit(command())
