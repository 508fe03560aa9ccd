"""python -m lfm_mlx.chat: a conversation on a terminal."""

import sys

from lfm_mlx.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("chat"))
