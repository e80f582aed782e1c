"""Evaluation: what a compressed model still does, measured beside the dense one and the baselines at equal bytes.

`tasks` writes prompts. `baselines` says what is compared on them, `eviction` has known ways to evict tokens. `scoring` measures
prompts and long text, each once, and turns scores into rows. `lm_harness` runs another project's tasks. `runner` does it all,
`measurement` one task and length after the other. Nothing here changes a plan.
"""
