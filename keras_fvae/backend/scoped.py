"""Values that hold for the time of a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class ScopedValue(threading.local):
    """A value that each thread sets for the time of a block.

    Not a `contextvars.ContextVar`, where `torch.compile` breaks its graph off.

    Args:
        default: The value outside of all blocks.
    """

    def __init__(self, default: Any = None) -> None:
        self.value: Any = default

    @contextlib.contextmanager
    def set_to(self, value: Any) -> Iterator[None]:
        """Makes it another value inside the block."""
        previous = self.value
        self.value = value
        try:
            yield
        finally:
            self.value = previous
