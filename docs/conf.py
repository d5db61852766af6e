"""The site's settings: python -m sphinx -W --keep-going -b html docs docs/_build"""

import os
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

from docutils.nodes import literal_block
from docutils.parsers.rst import Directive

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fastbn"
author = "The fastbn developers"
copyright = author
version = release = installed("fastbn")  # pyproject.toml has it

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "mathml"]
default_role = "autolink"  # `BatchNorm` in a docstring is a link where there is such a name
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Types stand in the docstrings, and a signature that repeats them is hard to read.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"fastbn {release}"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"  # drawn by the browser itself: no script, and nothing from the network


class Options(Directive):
    """A command's options, as its --help prints them: ```{options} train."""

    required_arguments = 1

    def run(self):
        help = subprocess.run(
            [sys.executable, "-m", "fastbn", self.arguments[0], "--help"],
            env=os.environ | {"COLUMNS": "90"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [literal_block(help.stdout, help.stdout, language="text")]


def theirs(member):
    """Whether an estimator has it from scikit-learn, whose own pages describe it."""
    return (getattr(member, "__module__", None) or "").split(".")[0] == "sklearn"


def setup(app):
    app.connect("autodoc-skip-member", lambda app, what, name, member, skip, options: theirs(member) or None)
    app.add_directive("options", Options)
