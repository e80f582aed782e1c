"""Kinds of prompts that no calibration resembles: legal prose, tables, dialogue, code.

They are for evaluation alone: the text, the names and the form of what is asked for are made here, or are those of Python's
standard library, and nothing that calibration draws from has them. So they show what a plan keeps on text unlike all that it
was found on.
"""
