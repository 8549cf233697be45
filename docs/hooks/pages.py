"""Pages of what lies elsewhere in the repository, so that it is there once."""

import pathlib
import re

import jupytext
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
COLAB = "://colab.research.google.com/github"
GUIDE = """\
# {title}

[Open in Colab]({colab}) · [The notebook]({notebook})

{text}
"""


def on_files(files, config):
    for page, name in PAGES.items():
        text = _with_local_links((ROOT / name).read_text(), config)
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "guides").glob("*.py")):
        page = f"guides/{path.stem}.md"
        text = _of_guide(path, config.extra["repository"])
        files.append(File.generated(config, page, content=text))
    return files


def _with_local_links(text, config):
    """What GitHub and PyPI need the whole address for is a page here."""

    def local(match):
        page, anchor = match.groups(default="")
        return f"]({page.strip('/') or 'index'}.md{anchor})"

    prefix = re.escape(config.site_url)
    text = re.sub(rf"\]\({prefix}([^)#]*)(#[^)]*)?\)", local, text)
    pictures = f"{config.extra['repository']}/raw/main/docs/"
    return text.replace(pictures, "")


def _of_guide(path, repository):
    """A guide in Markdown, and where it is as a notebook."""
    place = f"blob/main/guides/{path.stem}.ipynb"
    first, *cells = jupytext.read(path).cells
    heading, _, introduction = first.source.partition("\n")
    parts = [introduction.strip()]
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
    return GUIDE.format(
        title=heading.removeprefix("# "),
        colab=f"{repository.replace('://github.com', COLAB)}/{place}",
        notebook=f"{repository}/{place}",
        text="\n\n".join(parts),
    )
