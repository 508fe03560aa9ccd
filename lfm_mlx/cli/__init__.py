"""What commands share: their options, their exit codes, and how they print."""
