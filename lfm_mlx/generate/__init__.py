"""Answer a prompt: `python -m lfm_mlx.generate`."""
