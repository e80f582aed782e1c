"""Scores: of prompts and of long text, their statistics and the rows of a result."""
