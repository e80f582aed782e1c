"""Measured KL: the model under plans, what is measured already, and when the time is up."""
