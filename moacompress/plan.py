"""Plans and what they are made of, under a short name for users; they live in `moacompress.rules`."""

from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

__all__ = ["ModelShape", "Plan", "Rule"]
