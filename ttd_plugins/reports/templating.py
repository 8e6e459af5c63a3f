"""The templates of all pages: jinja2 with autoescape, and the stylesheets and scripts that go inside a page."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ttd_plugins.reports.formatting import capitalised, number, plural, signed, valid_text
from ttd_plugins.reports.palette import css_variables


def render(template: str, **view: Any) -> str:
    """Fill a template of ``templates/``; every text in ``view`` is escaped, and made valid where it is not."""
    return _environment().get_template(template).render(**view)


def stylesheet(*names: str, dark: str = "") -> Markup:
    """The palette and stylesheets of this package, to go inside ``<style>``; ``dark`` as in :func:`css_variables`."""
    return Markup(css_variables(dark) + "".join(_read(name) for name in names))


def script(name: str) -> Markup:
    """A script of this package, to go inside ``<script>``."""
    return Markup(_read(name))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ttd_plugins.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(number=number, signed=signed, plural=plural, capitalised=capitalised)
    return environment


def _finalize(value: Any) -> Any:
    """Text as a page may contain it; markup that a chart or a macro made is left alone."""
    return valid_text(value) if type(value) is str else value


def _read(name: str) -> str:
    return resources.files("ttd_plugins.reports").joinpath(name).read_text(encoding="utf-8")
