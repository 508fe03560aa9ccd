"""Shared by commands: their options, their exit codes, and their printing."""
