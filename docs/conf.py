"""Settings of the documentation site; build it with ``python -m sphinx -W docs build/docs``."""

import re

project = "seal_jax"
copyright = "the authors of seal_jax"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "seal_jax"
exclude_patterns = ["build"]

autodoc_member_order = "bysource"
autodoc_type_aliases = {"PyTree": "PyTree"}
autodoc_typehints = "none"  # the signatures show them
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that begin with a heading of a lower level


def setup(app):
    """Show links to pages outside of this folder, which are not part of the site, as text."""

    def unlink(app, name, source):
        source[0] = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\.md\)", r"\1", source[0])

    app.connect("source-read", unlink)
