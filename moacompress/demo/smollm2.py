"""The demo: the whole way on SmolLM2-135M-Instruct, small enough for a laptop."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moacompress.core.errors import DataError
from moacompress.core.files import new_folder
from moacompress.core.progress import Progress
from moacompress.exporter.exporting import save_dense
from moacompress.pipeline import compress
from moacompress.recipe import Recipe

RECIPE = "smollm2-135m/demo.yaml"


def run_demo(
    out: str | Path,
    model: str | Path,
    squad: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the demo recipe and returns its summary.

    Args:
        out: the folder to fill, as `compress` does; also `dense/`, the source model as safetensors, and `text/`.
        model: the demo's model, a `.gguf` file or a folder.
        squad: SQuAD as JSON, whose articles are the prose haystack.
        overwrite: start anew where `out` holds another run.
        progress: is told of the steps.
    """
    out = Path(out)
    dense, text = out / "dense", out / "text"
    if not text.exists():
        articles_to_text(squad, text)
    if not dense.exists():
        save_dense(model, dense)
    data = yaml.safe_load(resources.files("moacompress.recipes").joinpath(RECIPE).read_text("utf-8"))
    data["model"] = str(dense)
    data.setdefault("calibration", {})["text"] = str(text)
    return compress(Recipe.from_dict(data, f"recipe {RECIPE}"), out, overwrite=overwrite, progress=progress)


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
