"""Where tokens and text meet: what an answer must be, and the one road from a prompt to it."""
