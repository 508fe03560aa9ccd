"""python -m lfm_mlx.doctor: check every Metal kernel on this machine."""

import sys

from lfm_mlx.cli.entry import start

if __name__ == "__main__":
    sys.exit(start("doctor"))
