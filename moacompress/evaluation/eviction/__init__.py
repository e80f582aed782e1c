"""Known ways to evict tokens, to be measured against: scores, which tokens they keep, and the model under those masks.

Each is written from its paper's formulas, in plain PyTorch. What is evicted is masked and not freed: memory is counted as if it
were, and speed is not measured.
"""
