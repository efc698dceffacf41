"""A hook of MkDocs: formulas become MathML while the site is built, so that browsers show them without a script or a font."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """The page with MathML in place of what pymdownx.arithmatex has marked as TeX."""

    def mathml(found: re.Match[str]) -> str:
        return convert(html.unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline")

    return _FORMULA.sub(mathml, content)
