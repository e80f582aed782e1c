"""The demo: the whole way on SmolLM2-135M-Instruct, small enough for a laptop."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moacompress.core.artefact_names import DEMO_FILE, DENSE_FOLDER, TEXT_FOLDER, of_compress, of_demo
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import digest_files, new_folder, read_json, remove, sweep_files, write_json
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import no_empty_folder
from moacompress.core.progress import Progress
from moacompress.exporter.exporting import save_dense
from moacompress.pipeline import fill
from moacompress.recipe import Recipe
from moacompress.rules.formats import dtype_name
from moacompress.run_folder import clear_run, refuse_held

RECIPE = "smollm2-135m/demo.yaml"


def run_demo(
    out: str | Path,
    model: str | Path,
    squad: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the demo recipe and returns its summary.

    Args:
        out: the folder to fill, as `compress` does; also `dense/`, the source model as safetensors, and `text/`.
        model: the demo's model, a `.gguf` file or a folder.
        squad: SQuAD as JSON, whose articles are the prose haystack.
        dtype: of `dense/`, and so of the cache whose bytes are counted; "auto" for the model's own, which is bfloat16.
        device: torch device.
        seed: of everything random; None for the recipe's own.
        overwrite: start from scratch: all that a run left in `out` is removed, and nothing else.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: is told of the steps.

    Raises:
        DataError: the model's or SQuAD's files cannot be read.
        ArtefactError: `out` holds another run, or another process is filling it.
        MoaCompressError: from any of the steps.
    """
    out, model, squad, dtype = Path(out), Path(model), Path(squad), dtype_name(dtype)
    dense, text = out / DENSE_FOLDER, out / TEXT_FOLDER
    data = yaml.safe_load(resources.files("moacompress.recipes").joinpath(RECIPE).read_text("utf-8"))
    data["model"] = str(dense)
    data.setdefault("calibration", {})["text"] = str(text)
    data["device"] = device
    if seed is not None:
        data["seed"] = seed
    recipe = Recipe.from_dict(data, f"recipe {RECIPE}")
    recipe.override(dtype=dtype)  # what is wrong with it is said before anything is written
    with no_empty_folder(out), own_folder(out):
        _claim(out, model, squad, dtype, seed, overwrite)
        if not text.exists():
            articles_to_text(squad, text)
        if not dense.exists():
            save_dense(model, dense, dtype, trust_remote_code=trust_remote_code)
        return fill(recipe, out, progress or Progress(), trust_remote_code=trust_remote_code)


def _claim(out: Path, model: Path, squad: Path, dtype: str, seed: int | None, overwrite: bool) -> None:
    """Makes `out` the folder of a demo of this model, in this dtype, and these texts, or refuses."""
    mark = out / DEMO_FILE
    wanted: dict[str, Any] = {
        "name": model.name,
        "model": digest_files(model),
        "squad": digest_files(squad),
        "dtype": dtype,
    }
    wanted |= {} if seed is None else {"seed": seed}
    sweep_files(mark)
    if overwrite:
        others = [path for path in of_demo(out) if path.exists() and not mark.exists()]
        if others:
            raise ArtefactError(f"{others[0]} exists already and no demo left it; choose another folder")
        clear_run(out, (model, squad))
    elif mark.exists() and {**read_json(mark, "demo"), "name": wanted["name"]} == wanted:
        return
    elif mark.exists() and not any(path.exists() for path in (out / DENSE_FOLDER, *of_compress(out))):
        remove(of_demo(out))  # of one whose model could not be read
    refuse_held(out, (*of_demo(out), *of_compress(out)))
    write_json(mark, wanted)


def articles_to_text(squad: str | Path, out: Path) -> None:
    """Writes the paragraphs of every SQuAD article to a text file of its own.

    Raises:
        DataError: not SQuAD's JSON.
    """
    try:
        articles = json.loads(Path(squad).read_text("utf-8"))["data"]
        texts = {
            str(article["title"]): "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])
            for article in articles
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{squad} is not SQuAD's JSON (data, paragraphs, context): {error}") from error
    with new_folder(out) as aside:
        for index, (_, text) in enumerate(sorted(texts.items())):
            (aside / f"article-{index:03d}.txt").write_text(text, "utf-8")
