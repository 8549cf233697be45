"""What a fresh process makes of the models that another one saved.

Run with a directory: loads each `KIND-NAME.keras` and preset in it, all of one
name, and writes what they predict and how they go on to `loaded.npz`.
"""

import pathlib
import sys

import keras
import keras_hub
import numpy as np
import small_models

import keras_fvae  # noqa: F401

TASKS = {
    "text_classifier": keras_hub.models.TextClassifier,
    "image_classifier": keras_hub.models.ImageClassifier,
    "causal_lm": keras_hub.models.CausalLM,
    "backbone": keras_hub.models.Backbone,
}


def main(directory):
    results = {}

    def check(kind, name, model):
        results[f"{kind}/predictions"] = small_models.predict(model, name)
        results[f"{kind}/trainable"] = np.array(
            [str(weight.shape) for weight in model.trainable_weights]
        )

    # So that no name that Keras makes up is what it was.
    keras.layers.Dense(1), keras.layers.MultiHeadAttention(1, 1)
    for path in sorted(directory.glob("*.keras")):
        kind, name = path.stem.split("-")
        model = keras.saving.load_model(path)
        check(kind, name, model)
        # KerasHub does not keep how a task was compiled.
        if kind == "trained" and name not in TASKS:
            small_models.fit(model, name)
            check("after", name, model)
            model.save(directory / "again.keras")
            again = keras.saving.load_model(directory / "again.keras")
            check("again", name, again)
            (directory / "again.keras").unlink()
    for path in directory.glob("*-preset"):
        kind, name, _ = path.name.split("-")
        check(f"{kind}-preset", name, TASKS[name].from_preset(str(path)))
    np.savez(directory / "loaded.npz", **results)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
