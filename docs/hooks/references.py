"""Public names in the text as links to the API reference."""

import re

from mkdocs.utils import get_relative_url

# A name that mkdocstrings is told to show.
SHOWN = re.compile(r"^::: (\S+)", re.MULTILINE)
# Code that is a name or a call of it, outside of links and of blocks.
CODE = re.compile(r"(?<!\">)<code>((?:[\w.]+\.)?(\w+)(?:\(.*?\))?)</code>")

# Whose methods and layers have names such as ours.
OTHERS = ("keras.", "keras_hub.", "layer.", "model.")


def on_files(files, config):
    """Notes where the reference has which name."""
    _places.clear()
    for file in files.documentation_pages():
        if file.src_uri.startswith("reference/"):
            for path in SHOWN.findall(file.content_string):
                name = path.rsplit(".")[-1]
                _places[name] = f"{file.url}#{path}"
    return files


def on_page_content(content, page, **kwargs):
    def link(match):
        code, name = match.groups()
        is_of_others = code.startswith(OTHERS) and "backbone." not in code
        if name not in _places or is_of_others:
            return match[0]
        url = get_relative_url(_places[name], page.url)
        return f'<a href="{url}"><code>{code}</code></a>'

    return CODE.sub(link, content)


_places = {}
