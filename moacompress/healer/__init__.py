"""Heal: a short distillation of a compressed checkpoint's weights from the dense model, under the plan as it is.

`healing` does it, `heal_estimate` says before what it takes. Nothing here changes a plan, and no evaluation is known here.
"""
