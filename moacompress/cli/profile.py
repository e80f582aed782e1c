"""`moacompress profile`: how much every rule on every KV head would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import Output, Run, verb
from moacompress.cli.options import (
    Lengths,
    Model,
    Overwrite,
    RecipeFile,
    Text,
    TrustRemoteCode,
    read_sources,
    required_model,
)


@verb(
    "moacompress profile path/to/model -o profile/",
    "moacompress profile path/to/model.gguf -o profile/ --lengths 1k,2k --samples 48",
    "moacompress profile path/to/model -o profile/ --source needle --source qa.jsonl --json",
)
def profile(
    run: Run,
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the profile.")] = Path("profile"),
    recipe: RecipeFile = None,
    lengths: Lengths = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples, over all lengths.")] = None,
    validation_samples: Annotated[int | None, typer.Option(help="Samples on which plans are measured.")] = None,
    draws: Annotated[int | None, typer.Option(help="Random logit cotangents a sample.")] = None,
    estimator: Annotated[str | None, typer.Option(help="How rows are added up: fisher or sample.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="NAME", help="Generator, data file or hub set; may be repeated."),
    ] = None,
    text: Text = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = None,
) -> Output:
    """Predict what every KV head loses by each rule.

    Writes a profile of MODEL at several lengths. A run that was stopped goes on with the same command.
    """
    resolved = run.recipe(
        recipe,
        calibration__lengths=lengths,
        calibration__samples=samples,
        calibration__validation_samples=validation_samples,
        calibration__sources=read_sources(source),
        calibration__text=text,
        profile__draws=draws,
        profile__estimator=estimator,
        trust_remote_code=trust_remote_code,
    )
    name = required_model(model, resolved.model)

    from moacompress.calibration.profiler import profile as profile_model

    made = profile_model(name, out, resolved.override(model=name), overwrite=overwrite, progress=run.progress)
    data = {
        "profile": str(out),
        "model": made.source,
        "fingerprint": made.fingerprint,
        "lengths": list(made.lengths),
        "samples": len(made.sample_lengths),
        "validation_samples": len(made.validation),
        "layers": made.shape.layers,
        "kv_heads": made.shape.kv_heads,
        "rules": len(made.rules),
        "seconds": made.seconds,
    }
    work = f"{made.shape.layers * made.shape.kv_heads} KV heads x {len(made.rules)} rules on {data['samples']} samples"
    return Output(
        data,
        [
            f"Profiled {work} in {made.seconds:.0f} s.",
            f"Next: moacompress search {out} --budget 25% -o plan.json",
        ],
    )
