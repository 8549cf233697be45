"""Adapters to the Hugging Face Hub and back, each a repository of its own."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from typing import Literal

import keras

from keras_fvae.model import lookup
from keras_fvae.model.saving import save_adapter
from keras_fvae.model.summary import summarize

PREFIX = "hf://"
FILE = "adapter.safetensors"
CARD_FILE = "README.md"
CARD = """---
library_name: keras-fvae
tags:
- keras
- {tag}
{base}---

# {name}

An adapter for Keras, of [keras_fvae](https://arxiv.org/abs/2510.19640). {onto}

```python
import keras_fvae

path = keras_fvae.download_adapter("{uri}")
summary = keras_fvae.load_adapter(model, path)
```

```text
{summary}
```
"""


def upload_adapter(
    model: keras.Layer,
    uri: str,
    *,
    base_model: str | None = None,
    include: Literal["all", "inference"] = "all",
) -> None:
    """Uploads a model's adapters, and what else of it was trained.

    To a repository of the Hugging Face Hub, which is made if need be, as one
    file that `save_adapter` writes and a model card made of the summary. A
    card that is there stays. The client is `huggingface_hub`'s own, with its
    own settings: log in by `hf auth login` before.

    Args:
        model: `keras.Model` or layer with adapted layers.
        uri: String, such as `"hf://user/name"`.
        base_model: Optional string, what the card calls the base model, such
            as `"hf://google/vit-base-patch16-224"`.
        include: As in `keras_fvae.save_adapter`. Defaults to `"all"`.

    Raises:
        ValueError: If no layer is adapted, or `uri` or `include` is not
            allowed.
        TypeError: If `model` is no Keras model, or `base_model` no string.
        ImportError: If `huggingface_hub` is not installed.
        OSError: If the hub cannot be reached, or refuses.

    Example:

    ```python
    keras_fvae.upload_adapter(model, "hf://user/task")
    path = keras_fvae.download_adapter("hf://user/task")
    keras_fvae.load_adapter(other_model, path)
    ```
    """
    lookup.require_adapted_layers(model)
    repository = _repository(uri)
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(
            "`base_model` must be what the base model is called, a string. "
            f"Received: base_model={base_model!r}"
        )
    huggingface_hub = _client()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_adapter(model, folder / FILE, include)
        with _reached(uri):
            repository = huggingface_hub.create_repo(
                repository, exist_ok=True
            ).repo_id
            has_card = huggingface_hub.file_exists(repository, CARD_FILE)
        if not has_card:
            card = _card(model, PREFIX + repository, base_model)
            (folder / CARD_FILE).write_text(card)
        with _reached(uri):
            huggingface_hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload an adapter with keras_fvae",
            )


def download_adapter(uri: str) -> pathlib.Path:
    """Downloads what `upload_adapter` uploaded.

    Args:
        uri: String, such as `"hf://user/name"`.

    Returns:
        Path of the file, for `keras_fvae.load_adapter` or
        `keras_fvae.read_adapter`. It lies in the client's own cache.

    Raises:
        ValueError: If `uri` is not allowed.
        ImportError: If `huggingface_hub` is not installed.
        OSError: If the hub cannot be reached, or has no such file.

    Example:

    ```python
    path = keras_fvae.download_adapter("hf://user/task")
    keras_fvae.load_adapter(model, path)
    ```
    """
    repository = _repository(uri)
    huggingface_hub = _client()
    with _reached(uri):
        return pathlib.Path(huggingface_hub.hf_hub_download(repository, FILE))


def _repository(uri):
    """The repository of an address."""
    is_address = isinstance(uri, str) and uri.startswith(PREFIX)
    repository = uri.removeprefix(PREFIX) if is_address else ""
    if not 0 <= repository.count("/") <= 1 or not all(repository.split("/")):
        raise ValueError(
            "`uri` must name a repository of the Hugging Face Hub, such as "
            f"'hf://user/name'. Received: uri={uri!r}"
        )
    return repository


def _client():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "This takes the client of the Hugging Face Hub: `pip install "
            "huggingface_hub`."
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _reached(uri):
    """Says of which address an error of the client is, inside the block."""
    try:
        yield
    except Exception as error:  # Of many kinds, by what the client is made on.
        raise OSError(
            f"'{uri}' cannot be reached, or refuses: {error}"
        ) from error


def _card(model, uri, base_model):
    """String, a model card."""
    summary = summarize(model)
    method = summary.layers[0].config.method_name
    base = onto = ""
    if base_model is not None:
        base = f"base_model: {base_model.removeprefix(PREFIX)}\n"
        onto = f"It goes onto `{base_model}`."
    return CARD.format(
        tag=method.lower(),
        base=base,
        name=uri.split("/")[-1],
        onto=onto,
        uri=uri,
        summary=summary,
    )
