"""Tasks: how their prompts are written, and what counts as an answer."""
