"""How well the cost of rounded weights is predicted: predicted and measured KL of single linear layers, and of all together."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from moacompress.calibration.profile.store import Profile
from moacompress.models.source import load_source
from moacompress.models.weight_choices import CHOICES, WeightChoices
from moacompress.models.weight_rounding import RoundedLayers
from moacompress.rules.plan import Plan
from moacompress.search.measure.objective import Objective
from moacompress.search.weights.choosing import layer_prices, priced_samples


def main() -> None:
    """Prints, for each format, what all layers lose together and how single ones rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path, metavar="PROFILE", help="folder of a profile, whose model is at hand")
    parser.add_argument("--layers", type=int, default=40, help="linear layers that are measured alone, drawn at random")
    parser.add_argument("--samples", type=int, default=4, help="validation samples that KL is measured on")
    given = parser.parse_args()
    profile = Profile.load(given.profile)
    source = load_source(profile.source, dtype="float32", weights="auto")
    choices, rounded = WeightChoices.of(source.model, source.shape.dtype), RoundedLayers(source.model)
    samples = priced_samples(profile)
    prices = np.mean(
        [*layer_prices(source, choices.names, rounded, [*enumerate(samples)], profile.recipe.seed)], axis=0
    )
    shortest = [one for one in profile.validation if one.length == min(profile.lengths)][: given.samples]
    plain, full = Objective(source.model, shortest), Plan.full(source.shape)

    def measured(formats: dict[str, str]) -> float:
        return float(plain.with_rounding(lambda: rounded.in_place(formats)).kls(full).mean())

    drawn = np.random.default_rng(0).choice(len(choices.names), min(given.layers, len(choices.names)), replace=False)
    print(
        f"{len(choices.names)} linear layers, {len(drawn)} alone; {len(samples)} samples priced, {len(shortest)} measured"
    )
    for number, kind in enumerate(CHOICES[1:]):
        together = measured(dict.fromkeys(choices.names, kind))
        single = [measured({choices.names[layer]: kind}) for layer in drawn]
        predicted = prices[drawn, number]
        print(
            f"{kind}: all together {together:.3g} nats, predicted {prices[:, number].sum():.3g}; alone Spearman "
            f"{spearmanr(predicted, single)[0]:.2f}, measured over predicted {sum(single) / predicted.sum():.2f} in sum"
        )


if __name__ == "__main__":
    main()
