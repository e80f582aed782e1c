"""Predicted KL: the surrogate of a profile, and profiles made around a plan."""
