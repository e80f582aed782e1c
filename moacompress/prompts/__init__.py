"""Prompts with a known answer far back, shared by calibration and evaluation: pools, generators, templates, SQuAD, recall.

Pools of keys, values and haystacks are disjoint between calibration, validation and evaluation. No model runs here, and
nothing here knows of a profile or a score.
"""
