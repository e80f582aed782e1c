"""RULER's tasks (arXiv 2404.06654) in the published formats: needles, variable tracking, word counts, questions.

Every module writes one family of prompts as drafts, fitted to a length. Templates, counts, depths and answer lengths are
the published ones; where a task differs (prose and words are not RULER's), its module says so.
"""
