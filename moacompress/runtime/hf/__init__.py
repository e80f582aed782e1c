"""Where the runtime meets transformers: loading and saving, the hooks on a model, its masks and generation, compiled models.

What attends, what a cache holds and how a step is computed belong to `runtime` itself, which knows of no checkpoint. `compat`
lists every private name of transformers and torch that the whole product leans on, also those that are used elsewhere.
"""
