"""The KV cache of a compressed model, in parts.

`plan_cache` is what transformers holds, `layer_cache` what it asks of a layer; `layer_blocks` is what a layer holds: a block
table, a pool (`pool`), the tokens of every row (`real_tokens`) and the runs of blocks that they take (`block_runs`). What
changes it is a module each: `commit` takes in a chunk, `roll_back` forgets drafts, `fork` shares a prefix. What attends to it
is in `decode`.
"""
