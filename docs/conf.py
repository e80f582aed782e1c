"""Sphinx: the pages of this folder and the Python interface as one site (`make docs`)."""

from __future__ import annotations

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
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
