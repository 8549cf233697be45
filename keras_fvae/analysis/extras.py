"""Packages that are installed only by those who need them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Says which extra of this package brings what cannot be imported.

    Args:
        extra: String, its name in the metadata of this package.

    Raises:
        ImportError: If an import inside the block fails.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"This takes the package '{error.name}', which is not installed. "
            f'Install it with `pip install "keras-fvae[{extra}]"`.',
            name=error.name,
        ) from error
