"""Docstrings in Keras's style, as Markdown for the API reference."""

import re

import griffe

# From the first prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
HEADING = re.compile(r"^(Examples?):$", re.MULTILINE)


class KerasDocstrings(griffe.Extension):
    """Makes examples blocks of code, and shows defaults by their values."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = HEADING.sub(r"**\1**", text)

    def on_package(self, *, pkg, **kwargs):
        for obj in _members(pkg):
            if obj.is_function:
                for parameter in obj.parameters:
                    parameter.default = _value(pkg, obj, parameter.default)
            elif obj.is_attribute and obj.parent.is_class:
                obj.value = _value(pkg, obj.parent, obj.value)


def _members(obj):
    for member in obj.members.values():
        if not member.is_alias:
            yield member
            yield from _members(member)


def _value(package, scope, expression):
    """What a constant of the package stands for; else the expression."""
    is_name = isinstance(expression, griffe.ExprName)
    if not is_name or not expression.name.isupper():
        return expression
    path = scope.resolve(expression.name)
    constant = package.modules_collection.get_member(path)
    return getattr(constant, "value", expression)
