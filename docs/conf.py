"""The docs site: Markdown pages by MyST, API pages from docstrings.

sphinx-build -W --keep-going -b html docs docs/_build/html
"""

import os
import re
from typing import Any

# Modules are imported for their docstrings: no accelerator is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import internvl_jax

project = "internvl_jax"
author = "the internvl_jax authors"
copyright = "2026, the internvl_jax authors"  # noqa: A001
version = release = internvl_jax.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "internvl_jax"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
# Annotations as they are written in the source, not what they resolve to.
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
# An attribute called `bytes` or `spec` is not what an annotation of that name means.
suppress_warnings = ["ref.python"]

# Files of the repository that pages link to are on the host that builds the site; elsewhere they are downloads.
_REPOSITORY = os.environ.get("GITHUB_REPOSITORY")
_REVISION = os.environ.get("GITHUB_SHA", "main")
_OUTSIDE = re.compile(r"\]\(\.\./(?P<path>[\w./-]+)(?P<anchor>#[\w-]+)?\)")


def link_to_repository(app: Any, name: str, source: list[str]) -> None:
  """Turns links that lead out of docs/ into links to the repository on GitHub."""
  del app, name
  if _REPOSITORY:
    source[0] = _OUTSIDE.sub(
      lambda found: (
        f"](https://github.com/{_REPOSITORY}/blob/{_REVISION}/{found['path']}{found['anchor'] or ''})"
      ),
      source[0],
    )


_CODE = re.compile(r"(?<!`)`(?!`)([^`]+)`(?!`)")
_MARKUP = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  """Reads single backticks of docstrings as code, indented paragraphs as examples, other signs as themselves."""
  del app, obj, options
  paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
  read: list[str] = []
  for index, text in enumerate(paragraphs):
    if index and text.startswith(" ") and not paragraphs[index - 1].split("\n")[-1].startswith(" "):
      read += ["::", text]
      continue
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = [_MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    # A literal ends before a sign that is no letter: `TokenBatch`es.
    parts[2::2] = [f"\\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]
    read.append("".join(_CODE.sub(r"``\1``", part) for part in parts))
  lines[:] = "\n\n".join(read).split("\n")
  if what in ("attribute", "data"):
    _VALUES[name] = list(lines)


_VALUES: dict[str, list[str]] = {}
"""Docstrings of values, of which napoleon would take the words before a colon for a type."""


def restore_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  """Puts the docstring of a value back as it was before napoleon."""
  del app, what, obj, options
  lines[:] = _VALUES.pop(name, lines)


def setup(app: Any) -> None:
  """Registers what Sphinx does not do by itself."""
  app.connect("source-read", link_to_repository)
  # Before napoleon, which turns sections of docstrings into reStructuredText at priority 500.
  app.connect("autodoc-process-docstring", read_docstring, priority=400)
  app.connect("autodoc-process-docstring", restore_docstring, priority=600)
