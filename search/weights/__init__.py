"""Formats of weights as part of a search: what they take, what they are predicted to cost, and which are chosen."""
