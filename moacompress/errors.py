"""The errors that a user can catch; they live in `moacompress.core.errors`."""

from moacompress.core.errors import (
    ArtefactError,
    BudgetError,
    DataError,
    InfeasibleBudgetError,
    InUseError,
    MoaCompressError,
    ModelError,
    OutOfTimeError,
    PlanError,
    RecipeError,
    UnsupportedError,
    UsageError,
)

__all__ = [
    "ArtefactError",
    "BudgetError",
    "DataError",
    "InUseError",
    "InfeasibleBudgetError",
    "MoaCompressError",
    "ModelError",
    "OutOfTimeError",
    "PlanError",
    "RecipeError",
    "UnsupportedError",
    "UsageError",
]
