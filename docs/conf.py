"""What `make docs` gives to Sphinx. Building and reading the pages needs no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import roles

import nmjax

project = "nmjax"
author = "The nmjax authors"
copyright = "The nmjax authors"
release = version = nmjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

# The guides are executed when they are written, and a test executes them again.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # The default fetches scripts from the network.
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Tables of plans are printed in blocks marked as Python; a highlighter need not understand them.
suppress_warnings = ["misc.highlighting_failure"]

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
# On file systems that ignore case, a class and a function would share a page.
autosummary_filename_map = {
    f"nmjax.{name}": f"nmjax.{name}_class" for name in ("Channels", "Cost", "Sizes")
}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": False}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 70
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "nmjax"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}


def code_role(
    role: str, text: str, raw: str, line: int, inliner: Any, *unused: Any, **settings: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """`name` in a docstring links to the page of that name; any other code is shown as it is."""
    content = raw.removeprefix("`").removesuffix("`")
    if re.fullmatch(r"nmjax(\.\w+)+", content):
        from sphinx.domains.python import PyXRefRole

        return PyXRefRole()("py:obj", f":py:obj:`{content}`", content, line, inliner)
    return [nodes.literal(raw, content)], []


def escape_marks(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Outside code, escapes what `(*lead, in, out)` and `|w|` would mean in reStructuredText."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`+[^`]*`+)", line)
            parts[::2] = [re.sub(r"(?<![\\*\w])\*(?=[a-z])|\|", r"\\\g<0>", p) for p in parts[::2]]
            lines[i] = "".join(parts)


def skip_field(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple stand under "Attributes"; their own docstrings say nothing."""
    return True if (thing.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Connects the functions of this file."""
    app.connect("autodoc-process-docstring", escape_marks, priority=900)
    app.connect("autodoc-skip-member", skip_field)


roles.register_canonical_role("code-or-name", code_role)
default_role = "code-or-name"
