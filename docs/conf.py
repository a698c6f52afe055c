"""How Sphinx builds these pages: ``make docs``, without a network, and with warnings as errors."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import kfacore
import kfacore.lab.diagnostics
import kfacore.testing  # before autodoc looks at config models: it writes to their annotations

project = "kfacore"
author = "the kfacore contributors"
release = version = kfacore.__version__
html_title = f"kfacore {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples", "figures"]

html_theme = "furo"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"code-font-size": "75%"},  # a hundred characters of code fit a page
}
html_show_sourcelink = False
html_show_copyright = False
python_maximum_signature_line_length = 88
html_copy_source = False

myst_heading_anchors = 4  # links to headings work as they do where the repository is browsed
default_role = "code"  # single backticks in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


class Public(SphinxDirective):
    """``{public} module``: every public name of a module with its docstring.

    Names are read from ``__all__``, so that a page of the reference cannot forget one.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One autodoc directive a name."""
        module = importlib.import_module(self.arguments[0])
        text = "\n".join(_directive(module, name) for name in module.__all__)
        return self.parse_text_to_nodes(f"```{{eval-rst}}\n{text}\n```")


def _directive(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if not isinstance(value, type):
        hidden = "   :no-value:\n" if len(repr(value)) > 60 else ""  # a table of records is no signature
        return f".. {'autofunction' if callable(value) else 'autodata'}:: {module.__name__}.{name}\n{hidden}"
    if issubclass(value, Exception):
        return f".. autoexception:: {module.__name__}.{name}\n"
    again = "   :no-index:\n" if module is not kfacore and name in kfacore.__all__ else ""
    return f".. autoclass:: {module.__name__}.{name}\n   :members:\n{again}"


def _absolute_values(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """|x| in a docstring is an absolute value, not a substitution."""
    lines[:] = [line if "``" in line else line.replace("|", "\\|") for line in lines]


def _where_it_is_said(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A constant that a module takes from another has its docstring there; autodoc would show that of its type."""
    attribute = name.rpartition(".")[2]
    if what != "data":
        return
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "kfacore"]:
        if vars(module).get(attribute) is value:
            said = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", attribute))
            if said is not None:
                lines[:] = said
                return


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is here."""
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", _where_it_is_said)
    app.connect("autodoc-process-docstring", _absolute_values)
    return {"parallel_read_safe": True}
