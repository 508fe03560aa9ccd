"""python -m lfm_mlx.batch: many prompts or conversations at once, from a file."""

import sys

from lfm_mlx.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("batch"))
