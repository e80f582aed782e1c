"""Pictures of a page as PNG files, for a model card or a talk. Kaleido draws them, with a Chrome that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import MODEL_FOLDER
from moacompress.core.errors import UsageError, one_line
from moacompress.core.files import write_bytes, write_text
from moacompress.exporter.card import CARD
from moacompress.report.page.figure_style import Picture, without_tags
from moacompress.report.page.findings import Findings
from moacompress.report.page.report_page import page_sections

WIDTH, SCALE = 900, 2
PICTURES, HEADING = "pictures", "## Pictures"
"""The folder of a card's pictures, and the heading above them, which ends the card."""
NEEDS = (
    'PNG files need kaleido and a Chrome or Chromium ({}); pip install "moacompress[report]", and install a browser with '
    "`plotly_get_chrome` or your system's packages"
)
LAYOUT = {
    "template": "plotly_white",
    "width": WIDTH,
    "margin": {"l": 10, "r": 10, "t": 60, "b": 10},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
}


def write_pictures(found: Findings, folder: Path) -> dict[Path, str]:
    """Writes every picture of the page as `NAME.png`, in the place of earlier ones, and returns the files with their titles.

    Raises:
        UsageError: kaleido is not installed, or it finds no browser.
        ArtefactError: the folder cannot be made, or written to.
    """
    files = {}
    for section in page_sections(found):
        for picture in section.all_pictures:
            path = folder / f"{picture.file_stem}.png"
            write_bytes(path, png(picture))
            files[path] = picture.title
    return files


def illustrate_card(found: Findings) -> dict[Path, str]:
    """Writes the pictures into the checkpoint's folder and shows them in its card, in the place of earlier ones.

    Raises:
        UsageError: there is no checkpoint, or no picture can be drawn.
    """
    folder = found.folder / MODEL_FOLDER if (found.folder / MODEL_FOLDER).is_dir() else found.folder
    card = folder / CARD
    if not card.is_file():
        raise UsageError(f"{found.folder} has no checkpoint with a card; export the plan with `moacompress export`")
    files = write_pictures(found, folder / PICTURES)
    shown = "".join(f"![{title}]({PICTURES}/{file.name})\n\n" for file, title in files.items())
    before = card.read_text("utf-8").partition(f"\n{HEADING}\n")[0].rstrip("\n")
    write_text(card, f"{before}\n\n{HEADING}\n\n{shown}")
    return files


def png(picture: Picture) -> bytes:
    """Returns a picture on white as PNG.

    Raises:
        UsageError: kaleido is not installed, or it finds no browser.
    """
    from plotly.graph_objects import Figure

    drawn: Any = Figure(picture.figure())
    drawn.update_layout(**LAYOUT, title={"text": without_tags(picture.title)})
    try:
        image: bytes = drawn.to_image("png", scale=SCALE)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UsageError(NEEDS.format(one_line(error))) from error
    return image
