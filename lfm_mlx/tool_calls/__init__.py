"""The text of a call ⇄ a call that fits its schema. Never sees an array."""
