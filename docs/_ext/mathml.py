"""Formulas as MathML, made when the site is built: no page needs a script from elsewhere to show them.

conf.py puts this folder on sys.path, has "mathml" among the extensions, and sets html_math_renderer to "mathml".
"""

from typing import Any

from docutils.nodes import Element, SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def inline(page: Any, formula: Element) -> None:
    page.body.append(convert(formula.astext()))
    raise SkipNode


def displayed(page: Any, formula: Element) -> None:
    """On a page that is too narrow, a telephone's, the formula scrolls by itself."""
    page.body.append('<div class="formula" style="overflow-x: auto; overflow-y: hidden; padding: 0.4em 0">')
    page.body.append(convert(formula.astext(), display="block"))
    page.body.append("</div>\n")
    raise SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
