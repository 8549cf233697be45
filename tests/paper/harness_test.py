"""What runs, what has run, and which settings a table is made with."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
import sklearn.metrics
from helpers import to_numpy

from examples.paper import harness
from examples.paper import methods
from examples.paper import metrics
from examples.paper import provenance
from examples.paper import results
from examples.paper import search
from examples.paper import tables
from examples.paper import training
from examples.paper.methods import METHODS
from examples.paper.metrics import classification_metrics

pytestmark = pytest.mark.always_one_backend


@dataclasses.dataclass(frozen=True)
class Data:
    version: str = "1.0.0"


class Experiment:
    """A table whose runs take no time, and say what they were asked for."""

    def __init__(self, folder, **changes):
        self.folder = folder
        self.calls = []
        self.table = harness.Table(
            name="toy",
            version=1,
            datasets={"first": Data(), "second": Data(), "third": Data()},
            default_datasets=("first", "second"),
            methods=("lora", "fvae_lora"),
            authors_settings=lambda name: search.authors_settings(
                METHODS[name], 5e-3, {}
            ),
            run=self.run,
            sizes={"full": harness.Size(4, (1, 2, 42), {"epochs": 3})},
        )
        self.table = dataclasses.replace(self.table, **changes)

    def run(self, dataset, method, settings, seed, size):
        is_trial = seed == harness.TRIAL_SEED
        backup = size["backup"]
        assert [path.name for path in backup.iterdir()] == ["run.json"]
        assert size == {"epochs": 3, "is_trial": is_trial, "backup": backup}
        self.calls.append((method, settings, seed))
        # The higher the learning rate, the better.
        return {"validation_score": settings["learning_rate"], "seed": seed}

    def main(self, *arguments):
        before = len(self.calls)
        harness.main(
            self.table, "toy", ["--output", str(self.folder), *arguments]
        )
        return self.calls[before:]

    def read(self, dataset, method, seed, settings="searched"):
        name = f"{method}_{settings}_{seed}.json"
        path = self.folder / "toy" / "full" / dataset / name
        return json.loads(path.read_text())


@pytest.fixture
def experiment(tmp_path):
    return Experiment(tmp_path)


def test_each_method_has_as_many_trials_and_the_best_settings(experiment):
    calls = experiment.main()
    # Two data sets, two methods, four trials and three seeds.
    assert len(calls) == 2 * 2 * (4 + 3)
    for method in ("lora", "fvae_lora"):
        of_method = [call for call in calls if call[0] == method]
        assert len(of_method) == 2 * (4 + 3)
        trials, runs = of_method[:4], of_method[4:7]
        rates = [settings["learning_rate"] for _, settings, _ in trials]
        assert len({*rates}) == 4
        assert {seed for _, _, seed in trials} == {harness.TRIAL_SEED}
        for (_, settings, _), seed in zip(runs, (1, 2, 42)):
            assert settings["learning_rate"] == max(rates)
            result = experiment.read("first", method, seed)
            assert result["status"] == "done"
            assert result["settings"] == settings
            assert result["seed"] == seed


def test_only_what_is_missing_runs(experiment, capsys):
    calls = experiment.main("--dataset", "first", "--method", "lora")
    assert len(calls) == 4 + 3
    assert experiment.main("--dataset", "first", "--method", "lora") == []
    path = experiment.folder / "toy" / "full" / "first" / "lora_searched_2.json"
    content = path.read_text()
    path.unlink()
    ((_, _, seed),) = experiment.main(
        "--dataset", "first", "--method", "lora", "--seed", "1", "2"
    )
    assert seed == 2
    assert json.loads(path.read_text())["seed"] == json.loads(content)["seed"]
    printed = capsys.readouterr().out
    assert "6 runs, of which 5 have a result." in printed
    assert "6 of 6: first, lora, seed 2" in printed
    # A new seed of the same settings.
    assert len(experiment.main("--dataset", "first", "--seed", "7")) == 6


def test_trials_that_have_changed_are_noticed(experiment):
    experiment.main("--dataset", "first", "--method", "lora")
    path = experiment.folder / "toy" / "full" / "first" / "lora_trial_2.json"
    trial = json.loads(path.read_text())
    trial["validation_score"] = 100.0
    path.write_text(json.dumps(trial))
    with pytest.raises(SystemExit, match="other settings than the trials"):
        experiment.main("--dataset", "first", "--method", "lora", "--seed", "7")


def test_what_another_version_left_is_not_gone_on_with(experiment):
    path = experiment.folder / "toy" / "full" / "first" / "lora_trial_0.backup"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"versions": {}}))
    (path / "callbacks.pickle").write_bytes(b"of another version")
    # `Experiment.run` looks at what there is.
    experiment.main("--dataset", "first", "--method", "lora")
    assert not path.exists()


def test_halves_of_the_test_split_are_for_the_authors_settings(tmp_path):
    experiment = Experiment(tmp_path, authors_datasets=("first",))
    with pytest.raises(SystemExit, match="'first' chooses.*add `--authors`"):
        experiment.main("--dataset", "first")
    assert len(experiment.main("--dataset", "first", "--authors")) == 6
    assert len(experiment.main("--dataset", "second")) == 2 * (4 + 3)


def test_each_choice_is_tried():
    for name, method in METHODS.items():
        authors = search.authors_settings(method, 5e-3, {})
        tried = [
            search.trial_settings(method, authors, trial) for trial in range(6)
        ]
        for choice in method.elbo_choices:
            assert any(
                choice.items() <= settings["options"].items()
                for settings in tried
            ), name
        if not method.elbo_choices:
            decays = {settings["weight_decay"] for settings in tried}
            assert decays == {*search.WEIGHT_DECAYS}
        if method.dropouts:
            pairs = {
                (s["weight_decay"], s["options"]["dropout"]) for s in tried[1:]
            }
            # The first trial is the authors', of no dropout.
            assert len(pairs) == 5 and len(method.dropouts) == 2


def test_the_authors_settings_take_no_trials(experiment):
    calls = experiment.main("--authors", "--dataset", "first")
    assert [seed for _, _, seed in calls] == [1, 2, 42] * 2
    fvae = experiment.read("first", "fvae_lora", 42, "authors")["settings"]
    lora = experiment.read("first", "lora", 42, "authors")["settings"]
    assert fvae["learning_rate"] == lora["learning_rate"] == 5e-3
    # A norm of 1 of a loss of 1000 times the task's.
    assert fvae["global_clipnorm"] == pytest.approx(1e-3)
    assert fvae["epsilon"] == pytest.approx(1e-11)
    assert (lora["global_clipnorm"], lora["epsilon"]) == (1.0, 1e-8)
    # They do not stand in for those of the search.
    assert len(experiment.main("--dataset", "first")) == 2 * (4 + 3)


def test_what_fails_says_so_and_the_rest_goes_on(tmp_path, capsys):
    def run(dataset, method, settings, seed, size):
        # A seed, and the trials without the authors' learning rate.
        if seed == 2 or (
            size["is_trial"] and settings["learning_rate"] != 5e-3
        ):
            raise RuntimeError("out of memory\nand more")
        return {"validation_score": 0.5}

    experiment = Experiment(tmp_path, run=run)
    experiment.main("--dataset", "first", "--method", "lora")
    failed = experiment.read("first", "lora", 2)
    assert failed["status"] == "failed: RuntimeError: out of memory"
    assert "and more" in failed["traceback"]
    assert experiment.read("first", "lora", 42)["status"] == "done"
    printed = capsys.readouterr().out
    # Three trials, and one run of the table.
    assert "4 runs failed" in printed
    assert "delete it to try again" in printed


def test_without_a_trial_that_worked_no_settings_are_made_up(tmp_path):
    def run(dataset, method, settings, seed, size):
        raise RuntimeError("never")

    experiment = Experiment(tmp_path, run=run)
    experiment.main("--dataset", "first", "--method", "lora")
    status = experiment.read("first", "lora", 1)["status"]
    assert status == "failed: ValueError: No trial of the search worked."


def test_missing_data_leave_no_result(tmp_path):
    def run(dataset, method, settings, seed, size):
        if dataset is experiment.table.datasets["second"]:
            raise harness.MissingDataError("put the files into FOLDER")
        return {"validation_score": 0.5}

    experiment = Experiment(tmp_path, run=run)
    with pytest.raises(SystemExit, match="second: put the files into FOLDER"):
        experiment.main()
    # The other data set goes on.
    assert {path.parent.name for path in tmp_path.glob("**/*.json")} == {
        "first"
    }
    assert len([*tmp_path.glob("**/*.json")]) == 2 * (4 + 3)


def test_a_killed_run_goes_on(tmp_path):
    def run(dataset, method, settings, seed, size):
        if len(experiment.calls) == 5:
            raise Killed
        return experiment.run(dataset, method, settings, seed, size)

    experiment = Experiment(tmp_path, run=run)
    with pytest.raises(Killed):
        experiment.main()
    assert len([*tmp_path.glob("**/*_*.json")]) == 5
    experiment.table = Experiment(tmp_path, run=experiment.run).table
    assert len(experiment.main()) == 28 - 5


@pytest.mark.parametrize(
    "change, what",
    [
        ({"version": 2}, "the table toy 1; here is the table toy 2"),
        (
            {"datasets": {"first": Data("2.0.0")}},
            "the data set first 1.0.0; here is the data set first 2.0.0",
        ),
    ],
)
def test_other_versions_are_not_mixed_in(experiment, change, what):
    experiment.main("--dataset", "first")
    other = Experiment(experiment.folder, **change)
    with pytest.raises(SystemExit, match=what):
        other.main("--dataset", "first")
    assert not other.calls


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"run": {}',
        b"[]",
        b"null",
        b'{"status": 1}',
        b"\xff\xfe\x00",
        b'{"run": {}, "provenance": {"versions": {}}}',
        b'{"run": {}, "status": "done", "provenance": {"versions": null}}',
    ],
)
def test_a_damaged_result_is_named(experiment, content):
    experiment.main("--dataset", "first", "--method", "lora")
    path = experiment.folder / "toy" / "full" / "first" / "lora_searched_2.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"lora_searched_2.json' is damaged"):
        experiment.main("--dataset", "first", "--method", "lora")
    with pytest.raises(ValueError, match=r"lora_searched_2.json' is damaged"):
        tables.read_results(experiment.folder, "toy", "full")


def test_a_result_of_another_run_is_not_taken(experiment):
    experiment.main("--dataset", "first")
    path = experiment.folder / "toy" / "full" / "first" / "lora_searched_2.json"
    path.with_name("fvae_lora_searched_2.json").replace(path)
    with pytest.raises(SystemExit, match="of another run.*'fvae_lora'"):
        experiment.main("--dataset", "first")


def test_a_score_that_is_no_number_does_not_win(tmp_path):
    def run(dataset, method, settings, seed, size):
        rates.append(settings["learning_rate"])
        score = math.nan if len(rates) == 1 else settings["learning_rate"]
        return {"validation_score": score}

    rates = []
    experiment = Experiment(tmp_path, run=run)
    experiment.main("--dataset", "first", "--method", "lora")
    assert rates[4:] == 3 * [max(rates[1:4])]


@pytest.mark.parametrize("content", ["", '{"versions": {"the'])
def test_half_a_backup_counts_as_none(experiment, content):
    path = experiment.folder / "toy" / "full" / "first" / "lora_trial_0.backup"
    path.mkdir(parents=True)
    (path / "run.json").write_text(content)
    (path / "left").touch()
    experiment.main("--dataset", "first", "--method", "lora")
    assert experiment.read("first", "lora", 0, "trial")["status"] == "done"


def test_what_is_asked_for_twice_runs_once(experiment, capsys):
    twice = ["--dataset", "first", "first", "--method", "lora", "lora"]
    experiment.main(*twice, "--seed", "1", "1")
    assert "5 runs, of which 0 have a result." in capsys.readouterr().out


def test_a_result_is_never_overwritten(tmp_path):
    run = results.Run("toy", "full", "first", "lora", 1)
    results.write(run, tmp_path, {"status": "done"}, {"versions": {}})
    before = run.path(tmp_path).read_bytes()
    with pytest.raises(FileExistsError):
        results.write(run, tmp_path, {"status": "failed"}, {"versions": {}})
    assert run.path(tmp_path).read_bytes() == before
    assert len([*run.path(tmp_path).parent.iterdir()]) == 1


@pytest.mark.parametrize(
    "arguments",
    [("--dataset", "fourth"), ("--method", "bit_fit"), ("--size", "huge")],
)
def test_the_unknown_lists_what_there_is(experiment, arguments, capsys):
    with pytest.raises(SystemExit):
        experiment.main(*arguments)
    error = capsys.readouterr().err
    known = {
        "--dataset": ("first", "second", "third"),
        "--method": ("lora", "fvae_lora"),
        "--size": ("full",),
    }[arguments[0]]
    assert all(name in error for name in known)
    assert not experiment.calls


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", "-1"),
        ("--seed", str(2**32)),
        ("--seed", "one"),
        ("--output", __file__),
    ],
)
def test_bad_arguments_are_refused(experiment, arguments, capsys):
    with pytest.raises(SystemExit):
        experiment.main(*arguments)
    assert arguments[0] in capsys.readouterr().err
    assert not experiment.calls


@pytest.mark.parametrize("name", ["head_only", "full_fine_tuning", "lora"])
def test_batch_norms_keep_their_statistics(name, rng):
    inputs = keras.Input((2, 2, 3))
    norm = keras.layers.BatchNormalization()
    backbone = keras.Model(inputs, norm(keras.layers.Conv2D(4, 1)(inputs)))
    settings = search.authors_settings(METHODS[name], 5e-3, {})
    methods.adapt(name, backbone, 2, settings, 0, "all-conv")
    x = rng.normal(loc=3.0, size=(8, 2, 2, 3)).astype("float32")
    before = backbone.get_weights()
    in_training = to_numpy(backbone(x, training=True))
    np.testing.assert_allclose(in_training, to_numpy(backbone(x)), atol=1e-5)
    for found, expected in zip(backbone.get_weights(), before):
        np.testing.assert_array_equal(found, expected)
    trains = [
        weight.path.split("/")[-1] for weight in backbone.trainable_weights
    ]
    assert (
        trains
        == {
            "head_only": [],
            "full_fine_tuning": ["kernel", "bias"],
            "lora": ["kernel_a", "kernel_b"],
        }[name]
    )


def test_all_methods_are_searched_in_the_same_places():
    def draw(name, trial):
        authors = search.authors_settings(METHODS[name], 5e-3, {})
        return search.trial_settings(METHODS[name], authors, trial)

    for trial in range(1, 20):
        settings = {name: draw(name, trial) for name in METHODS}
        (rate,) = {s["learning_rate"] for s in settings.values()}
        assert search.LOWEST <= rate / 5e-3 <= search.HIGHEST
        for name, method in METHODS.items():
            options = settings[name]["options"]
            if method.make_config:
                method.make_config(16, **options)
            assert bool(options) == bool(method.elbo_choices or method.dropouts)


def test_metrics_are_those_of_scikit_learn(rng):
    probabilities = rng.dirichlet(np.ones(4), 500)
    labels = rng.integers(0, 4, 500)
    found = classification_metrics(probabilities, labels)
    assert found["accuracy"] == sklearn.metrics.accuracy_score(
        labels, probabilities.argmax(axis=1)
    )
    assert found["negative_log_likelihood"] == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities)
    )
    assert found["brier_score"] == pytest.approx(
        sklearn.metrics.brier_score_loss(
            labels, probabilities, labels=range(4), scale_by_half=False
        )
    )


def test_the_calibration_error_by_its_definition(rng):
    probabilities = rng.dirichlet(np.ones(3), 400)
    labels = rng.integers(0, 3, 400)
    expected = 0.0
    for low in np.arange(15) / 15:
        chosen = [
            (p.max(), p.argmax() == y)
            for p, y in zip(probabilities, labels)
            if low <= p.max() < low + 1 / 15
        ]
        if chosen:
            confidence, is_right = np.mean(chosen, axis=0)
            expected += len(chosen) / 400 * abs(confidence - is_right)
    found = classification_metrics(probabilities, labels)
    assert found["calibration_error"] == pytest.approx(expected)


def test_certain_and_wrong_predictions_have_a_finite_loss():
    found = classification_metrics(np.array([[1.0, 0.0]]), np.array([1]))
    assert np.isfinite(found["negative_log_likelihood"])
    assert found["calibration_error"] == 1.0
    assert found["brier_score"] == 2.0


def test_the_temperature_takes_overconfidence_back(rng):
    logits = rng.normal(size=(20_000, 3))
    # Labels that are as likely as the logits say.
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    for factor in (0.5, 1.0, 4.0):
        found = metrics.best_temperature(factor * logits, labels)
        assert found == pytest.approx(factor, rel=0.05)


def test_foreign_inputs_are_told_by_the_largest_probability(rng):
    own, foreign = rng.dirichlet(np.ones(3), 50), rng.dirichlet(np.ones(3), 40)
    pairs = np.sign(own.max(axis=1)[:, None] - foreign.max(axis=1))
    expected = (1 + pairs.mean()) / 2
    assert metrics.foreign_auroc(own, foreign) == pytest.approx(expected)


def test_the_learning_rate_rises_and_falls():
    schedule = training.LinearWarmupAndDecay(2.0, 10, 100)
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 200)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0, 0.0])
    again = training.LinearWarmupAndDecay.from_config(schedule.get_config())
    assert float(again(55)) == pytest.approx(1.0)


def test_biases_and_norms_do_not_decay():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.LayerNormalization(),
        ]
    )
    settings = search.authors_settings(METHODS["lora"], 1.0, {})
    optimizer = training.make_optimizer(settings, 10, warmup_steps=0)
    for weight in model.trainable_variables:
        weight.assign(keras.ops.ones(weight.shape))
    zeros = [keras.ops.zeros(w.shape) for w in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    decayed = [
        weight.path.rpartition("/")[2]
        for weight in model.trainable_variables
        if float(keras.ops.max(weight)) < 1.0
    ]
    assert decayed == ["kernel"]


def test_the_best_epoch_comes_back():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    best = training.BestWeights("score", patience=2)
    best.set_model(model)
    model.stop_training = False
    scores = [0.1, 0.7, 0.3, 0.2]
    for epoch, score in enumerate(scores):
        model.layers[0].bias.assign([epoch])
        best.on_epoch_end(epoch, {"score": score})
        assert model.stop_training == (epoch == 3)
    best.restore()
    assert (best.best, best.state["epoch"]) == (0.7, 1)
    assert model.layers[0].bias.numpy() == [1.0]


class Killed(BaseException):
    pass


class Kill(keras.callbacks.Callback):
    """Ends the process, as far as anything but a test can see."""

    def __init__(self, epoch, place):
        super().__init__()
        self.epoch = epoch
        self.place = place

    def on_epoch_begin(self, epoch, logs=None):
        self.kill(epoch, "begin")

    def on_epoch_end(self, epoch, logs=None):
        self.kill(epoch, "end")

    def kill(self, epoch, place):
        if (epoch, place) == (self.epoch, self.place):
            raise Killed


@pytest.mark.parametrize(
    "place, killed_epoch", [("begin", 3), ("end", 3), ("end", 0)]
)
def test_training_goes_on_after_a_kill(place, killed_epoch, rng, tmp_path):
    x = rng.normal(size=(32, 4)).astype("float32")
    y = (x.sum(axis=1) > 0).astype("int32")

    def train(backup, kill_epoch=None):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        best = training.BestWeights("accuracy")
        found = training.fit(
            model,
            (x, y),
            None,
            6,
            [best, Kill(kill_epoch, place)],
            backup,
            shuffle=False,
        )
        best.restore()
        return found["history"], model.get_weights()

    backup = tmp_path / "run.backup"
    backup.mkdir()
    expected_history, expected_weights = train(None)
    with pytest.raises(Killed):
        train(backup, killed_epoch)
    history, weights = train(backup)
    assert history.keys() == expected_history.keys()
    for name in history:
        assert len(history[name]) == 6
        assert history[name] == pytest.approx(expected_history[name], rel=1e-5)
    for found, expected in zip(weights, expected_weights):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_score_that_never_was_a_number_is_an_error():
    best = training.BestWeights("score")
    best.set_model(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    best.on_epoch_end(0, {"score": float("nan")})
    with pytest.raises(ValueError, match="In no epoch was `score` a number"):
        best.restore()


@pytest.mark.parametrize("output", [["--output", "a b"], ["--output=a"], []])
def test_results_do_not_name_the_folder_they_are_in(output):
    words = ["-m", "examples.paper.local", *output, "--seed", "1"]
    expected = "-m examples.paper.local --seed 1"
    assert provenance.command(words) == expected
