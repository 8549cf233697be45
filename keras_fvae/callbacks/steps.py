"""How many updates `fit` makes, for callbacks whose schedule ends with it."""

from keras_fvae.layers.config import is_integer


def total_updates(callback):
    """Integer, the updates of the optimizer in a `fit` that begins.

    Args:
        callback: Callback with the attribute `total_steps`, an integer, or
            `None` to ask `fit`.

    Raises:
        ValueError: If `fit` does not know.
    """
    if callback.total_steps is not None:
        return callback.total_steps
    num_steps = callback.params.get("steps")
    if num_steps is None:
        raise ValueError(
            "`fit` does not know how many steps an epoch has. Pass "
            "`steps_per_epoch` to `fit`, or `total_steps` to "
            f"`{type(callback).__name__}`."
        )
    per_update = callback.model.optimizer.gradient_accumulation_steps or 1
    return callback.params["epochs"] * num_steps // per_update


def checked(name, value, minimum):
    """An argument that is `None` or an integer; a `ValueError` if not."""
    if value is not None and (not is_integer(value) or value < minimum):
        raise ValueError(
            f"`{name}` must be `None` or an integer >= {minimum}. "
            f"Received: {name}={value!r}"
        )
    return value
