"""What is to be done once a module has been imported, whoever imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Calls a function each time that a module has been imported.

    Now, if the module is there; and after each import that runs it, the first
    one or one that runs it anew. The module is not imported for it.

    Args:
        name: String, the name of a module, which need not be installed.
        function: Function without arguments.
    """
    sys.meta_path.insert(0, _Watcher(name, function))
    if sys.modules.get(name) is not None:
        function()


class _Watcher:
    """A finder that leaves the finding to those behind it."""

    def __init__(self, name, function):
        self.name = name
        self.function = function

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        position = sys.meta_path.index(self)
        for finder in sys.meta_path[position + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader):
        exec_module = loader.exec_module

        def exec_and_call(module):
            exec_module(module)
            # Some loaders load other modules, too.
            if module.__name__ == self.name:
                self.function()

        loader.exec_module = exec_and_call
