"""Every Metal kernel of this machine, checked and timed: `python -m lfm_mlx.doctor`."""
