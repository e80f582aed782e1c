"""Sphinx: the pages of this folder and the Python interface as one site (`make docs`)."""

from __future__ import annotations

import re
from typing import Any

from moacompress import __version__

project = "moacompress"
author = "The moacompress authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"moacompress {release}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


def escape_bars(app: Any, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Has bars around a word be those of an absolute value, as docstrings mean them, and no substitution."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Any) -> None:
    """Is called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars)
