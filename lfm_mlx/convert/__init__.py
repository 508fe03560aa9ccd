"""Make an MLX folder of a checkpoint: `python -m lfm_mlx.convert`."""
