"""Predicted KL: the surrogate of a profile."""
