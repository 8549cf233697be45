"""Formulas as MathML, which browsers show without a script."""

import html
import re

from latex2mathml.converter import convert

# What the extension arithmatex makes of `$...$` and of `$$...$$`.
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content, **kwargs):
    return FORMULA.sub(_to_mathml, content)


def _to_mathml(match):
    tag, formula = match.groups()
    display = "block" if tag == "div" else "inline"
    mathml = convert(html.unescape(formula), display=display)
    return f'<{tag} class="formula">{mathml}</{tag}>'
