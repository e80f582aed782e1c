"""MODEL as a recipe asks for it, ready to run."""

from __future__ import annotations

from pathlib import Path

from moacompress.models.source import SourceModel, load_source
from moacompress.recipe import Recipe
from moacompress.runtime.linear import use_kernels


def load_for(recipe: Recipe, source: str | Path | SourceModel, *, trust_remote_code: bool = False) -> SourceModel:
    """Returns MODEL loaded as a recipe says, its products by the kernels, and a loaded model as it is.

    `recipe`: `dtype`, `device`, `weights` and `head_weights` count. `trust_remote_code`: run modelling code that comes with the
    model; recipes and other files have no say in it.

    Errors are those of `load_source`.
    """
    if isinstance(source, SourceModel):
        return source
    loaded = load_source(
        source,
        dtype=recipe.dtype,
        device=recipe.device,
        weights=recipe.weights,
        head_weights=recipe.head_weights,
        trust_remote_code=trust_remote_code,
    )
    use_kernels(loaded.model)
    return loaded
