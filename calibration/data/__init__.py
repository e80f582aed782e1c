"""Samples: where prompts come from, what the model answers, and the files that they are kept in."""
