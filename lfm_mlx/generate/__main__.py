"""python -m lfm_mlx.generate: a prompt answered."""

import sys

from lfm_mlx.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("generate"))
