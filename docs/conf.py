"""The documentation site: `make docs` builds it, strictly, into build/docs.

The source folder is the repository's root and not docs/, so that a link such as ``../wovr_jax/pace.py`` or
``../notebooks/01_pace_on_a_laptop.ipynb`` leads to the same file on the site and in the repository.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
# The pages of the interface import the package. Nothing is computed, and no accelerator should be taken for it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, version = _about["name"], _about["version"]
copyright = "Apache-2.0"
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "docs/api/*.md", "notebooks/*.ipynb"]
# Folders without pages are not even looked into: an environment or a run folder holds many thousand files.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "notebooks")]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "settings_page",
    "commands_page",
    "source_links",
]

# ---------------------------------------------------------------- Markdown and notebooks
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Outputs are those that are stored; the tests execute the notebooks.
nb_execution_mode = "off"
nb_merge_streams = True

# ---------------------------------------------------------------- the interface, from docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have their types by shape letters; the docstrings say the rest
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Attributes", "params_style"),  # a list in the text of the class, and no entries of their own
    ("Raises (when an object is made)", "Raises"),
    ("Raises (as an exit in words)", "Raises"),
]
add_module_names = False


# Napoleon takes the words before a colon in the docstring of a constant for its type. So it is not shown any.
CONSTANTS = ("attribute", "data", "property")
_held: dict[str, list[str]] = {}


def hide_constant(app, what, name, obj, options, lines):
    """Takes the docstring of a constant away before napoleon comes."""
    if what in CONSTANTS:
        _held[name] = lines[:]
        lines.clear()


def show_constant(app, what, name, obj, options, lines):
    """Gives it back afterwards."""
    if what in CONSTANTS:
        lines[:] = _held.pop(name)


def setup(app):
    """Connects the two around napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", hide_constant, priority=400)
    app.connect("autodoc-process-docstring", show_constant, priority=600)


# ---------------------------------------------------------------- strictness
nitpicky = True
nitpick_ignore_regex = [
    # Names of other packages and of exceptions: the site is built without a network, so there is nothing to link to.
    (r"py:.*", r"(?!wovr_jax).*"),
    # Groups of settings stand on the page of settings, which is a table and no list of classes.
    (r"py:class", r"wovr_jax\.(run\.recipe|core\.sharding|core\.history|sim\.libero\.tasks|sim\.tabletop\.expert)\..*"),
    # Type variables, and a base that only its module uses.
    (r"py:.*", r"wovr_jax\..*\.(T|_\w+)"),
]

# ---------------------------------------------------------------- looks
html_theme = "sphinx_book_theme"
html_title = "wovr_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# build/docs/index.html leads to build/docs/docs/index.html.
html_extra_path = ["_static/root"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    **({"repository_url": url, "use_repository_button": True} if (url := _about.get("urls", {}).get("Source")) else {}),
}
