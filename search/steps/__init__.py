"""Steps of a search, one a module: each is a function that takes the best plan so far and returns the best after it.

A step is a `search_context.Step`: it takes a `Incumbent` and the `SearchContext`, and it is one line in `study.STEPS`. Steps do
not import each other: what two of them need is in the context, or in a module of `search`. Nothing here loads a model, measures
baselines or makes the notes of a plan: `study` does so before the first step, and `found_plan` after the last.
"""
