"""Where the runtime meets transformers: loading and saving, the hooks on a model, generation, compiled models.

What attends, what a cache holds and how a step is computed belong to `runtime` itself, which knows of no checkpoint. What all
of them need to know about transformers and torch is below them, in `compat`.
"""
