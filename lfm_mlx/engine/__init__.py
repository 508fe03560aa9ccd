"""Token ids only: sampling, decoding, speculation, constraints, and a prompt cache on disk."""
