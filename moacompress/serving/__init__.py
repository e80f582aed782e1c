"""Plans in programs that serve models to many clients at once."""
