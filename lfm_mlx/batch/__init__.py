"""Many prompts or conversations, answered together: `python -m lfm_mlx.batch`."""
