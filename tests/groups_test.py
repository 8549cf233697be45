import json

import keras
import numpy as np
import pytest

import keras_fvae

Y = [0, 0, 1, 1, 1, 0]
GROUPS = ["a", "a", "a", "b", "b", "c"]
SCORES = np.array(
    [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]
)


@pytest.fixture
def identity():
    """A model that predicts its inputs."""
    return keras.Sequential([keras.Input((2,)), keras.layers.Identity()])


def test_accuracy_in_each_group(identity):
    result = keras_fvae.evaluate_groups(identity, SCORES, Y, GROUPS)
    assert result.accuracies == {"a": pytest.approx(2 / 3), "b": 0.0, "c": 1.0}
    assert result.counts == {"a": 3, "b": 2, "c": 1}
    assert result.mean == pytest.approx(3 / 6)
    assert (result.worst_group, result.worst) == ("b", 0.0)
    assert result.gap == pytest.approx(0.5)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert str(result).splitlines() == [
        "group      accuracy  examples",
        "a             0.667         3",
        "b             0.000         2",
        "c             1.000         1",
        "mean          0.500         6",
        "worst (b)     0.000",
        "gap           0.500",
    ]


@pytest.mark.parametrize(
    "activation, scores",
    [(None, [-1.0, 0.2, 0.7]), ("sigmoid", [-1.0, 0.2, 0.7])],
)
def test_binary_scores(activation, scores):
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Activation(activation)]
    )
    x = np.array(scores)[:, None]
    result = keras_fvae.evaluate_groups(model, x, [0, 1, 1], [0, 0, 1])
    assert result.accuracies == {0: 1.0, 1: 1.0}
    assert keras_fvae.evaluate_groups(model, x, [1, 0, 0], [0, 0, 1]).mean == 0


def test_the_callback_drives_those_of_keras(rng, tmp_path):
    x = rng.normal(size=(32, 4))
    y = (x[:, 0] > 0).astype(int)
    groups = np.arange(32) % 2
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh", name="query"),
            keras.layers.Dense(2),
        ]
    )
    keras_fvae.enable_fvae_lora(
        model, rank=2, decoder_units=(4,), trainable_layer_names=["dense"]
    )
    model.compile(
        keras.optimizers.Adam(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    by_worst_group = {"monitor": "worst_group_accuracy", "mode": "max"}
    history = model.fit(
        x,
        y,
        epochs=30,
        verbose=0,
        callbacks=[
            keras_fvae.WorstGroupAccuracy(x, y, groups),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "best.weights.h5",
                save_best_only=True,
                save_weights_only=True,
                **by_worst_group,
            ),
            keras.callbacks.EarlyStopping(patience=3, **by_worst_group),
        ],
    ).history
    worst = history["worst_group_accuracy"]
    assert worst[0] < max(worst)
    assert len(worst) < 30
    assert len(worst) == np.argmax(worst) + 4
    for mean, low in zip(history["mean_group_accuracy"], worst):
        assert mean >= low
    model.load_weights(tmp_path / "best.weights.h5")
    best = keras_fvae.evaluate_groups(model, x, y, groups)
    assert best.worst == pytest.approx(max(worst))


@pytest.mark.parametrize(
    "y, groups, message",
    [
        (Y, GROUPS[:5], "the same shape"),
        (np.eye(2)[Y], GROUPS, "one value for each example"),
        ([], [], "one value for each example"),
        (Y[:5], GROUPS[:5], "6 in `x`, 5 in `y`"),
        (Y, [None] * 6, "integers or strings"),
        (np.array(Y, "float32"), GROUPS, "integers or strings"),
    ],
)
def test_bad_labels_are_refused(y, groups, message, identity):
    with pytest.raises(ValueError, match=message):
        keras_fvae.evaluate_groups(identity, SCORES, y, groups)
    if len(y) != 5:
        with pytest.raises(ValueError, match=message):
            keras_fvae.WorstGroupAccuracy(SCORES, y, groups)


def test_a_model_with_other_outputs_is_refused():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, {"a": inputs, "b": inputs})
    with pytest.raises(ValueError, match="one row of scores"):
        keras_fvae.evaluate_groups(model, SCORES, Y, GROUPS)
