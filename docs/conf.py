"""How Sphinx builds these pages: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import workbench  # noqa: E402

project, author, release = "Workbench", "the Workbench's contributors", workbench.__version__
copyright = author
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"Workbench {release}"
html_copy_source = html_show_sourcelink = False

nitpicky = True  # A reference that leads nowhere is a warning, and warnings end the build (`-W`).
nitpick_ignore_regex = [("py:.*", r"(?!workbench\.\w+$).*")]  # Types of records, which have no page of their own.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# The notebook shows what it printed when it was last run; tests run it again (`tests/test_docs.py`).
nb_execution_mode, nb_render_markdown_format = "off", "myst"

generate.write(HERE / "_generated")
