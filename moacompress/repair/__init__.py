"""Closed-form repair: weights refitted to what a plan leaves of a model's attention, for copies and for whole plans."""
