"""Settings of the documentation site: `make docs`.

The source folder is the checkout, so that links between pages, examples and files are the same here and in a
browser of the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/_ext")]

import conch  # noqa: E402

project = "Conch"
copyright = "the authors of Conch"
release = version = conch.__version__
root_doc = "docs/index"

extensions = ["myst_parser", "sphinx.ext.autodoc", "reference", "needs"]
myst_enable_extensions = ["deflist", "colon_fence"]
# Anchors as GitHub makes them; a link to one that is not there is a warning, and warnings are errors.
myst_heading_anchors = 4
# Quotes stay as the code has them, so that they can be searched for and copied.
smartquotes = False

_FOLDERS = ("docs", "examples", "findings", "singularity", "model_store")
include_patterns = [
    *("docs/**", "README.md", "CONTRIBUTING.md"),
    *(f"{folder}/{depth}README.md" for folder in _FOLDERS[1:] for depth in ("", "**/")),
]
# Everything else is left out by its name, so that no environment, no model and no run is walked through.
exclude_patterns = [
    *(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in _FOLDERS),
    *("model_store/*/**", "examples/*/model_store", "examples/*/models", "examples/*/runs"),
    *("**/outputs", "**/__pycache__", "docs/_ext", "docs/_templates"),
]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}

html_theme = "furo"
html_title = f"Conch {release}"
html_copy_source = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]

# Of `make docs-links`: addresses of examples, which nobody serves.
linkcheck_ignore = [r"https?://(localhost|127\.0\.0\.1|[\w.-]*example\.(com|org))([:/].*)?"]
# GitHub draws the lines of a file and the anchors of a page by scripts.
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
linkcheck_timeout = 30
