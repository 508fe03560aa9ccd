"""python -m lfm_mlx.batch: many prompts or conversations at once, from a file."""

import sys

from lfm_mlx.batch.program import command

if __name__ == "__main__":
    sys.exit(command())
