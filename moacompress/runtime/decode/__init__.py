"""How a compressed model attends: the attention that transformers calls, and the routes that a decode step can take.

`routes` has all routes in one ordered list, `step_requests` what can be asked of them. Requests come from `attention` (what
transformers calls), `fused` (whole layers of families that are known) and `all_layers` (all of them in one call). What
loads a model, or hooks into it, is in `hf`.
"""
