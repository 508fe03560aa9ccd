"""Tokens meet text: conditions of an answer, and the one road from a prompt to it."""
