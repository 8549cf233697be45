"""Docstrings in Keras's style, as Markdown for the API reference."""

import re

import griffe

# From the first prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
HEADING = re.compile(r"^(Examples?):$", re.MULTILINE)


class KerasDocstrings(griffe.Extension):
    """Makes examples blocks of code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = HEADING.sub(r"**\1**", text)
