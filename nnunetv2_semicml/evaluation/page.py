"""Fills HTML templates, which share the frame page.html.jinja, the macros of macros.html.jinja and style.css."""

from pathlib import Path
from typing import Any

import jinja2

from nnunetv2_semicml.evaluation.figures import REFERENCE_COLOR


def render_page(template: Path, **values: Any) -> str:
    """Fill a template.

    Args:
        template: the file; it extends page.html.jinja beside this module, which needs `title`, the heading, and
            `facts`, what was run, name -> value.
        values: what the template names.

    Raises:
        jinja2.UndefinedError: the template names something else.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["reference_color"] = REFERENCE_COLOR
    return environment.get_template(template.name).render(values)
