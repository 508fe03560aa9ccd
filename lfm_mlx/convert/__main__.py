"""python -m lfm_mlx.convert: an MLX folder of a checkpoint."""

import sys

from lfm_mlx.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("convert"))
