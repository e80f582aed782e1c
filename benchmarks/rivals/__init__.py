"""Rivals as they are: what each needs to be measured beside a plan on the same prompts, by `compare_rivals.py`.

A rival is another library that makes caches smaller or runs the model faster. Each has an environment of its own with pinned
versions (`requirements/`), because their versions of the same packages exclude each other, and a runner (`runners/`), the one
module that runs in it. A runner imports its rival, the standard library and its neighbours in `runners/`; only ours imports
moacompress.
"""
