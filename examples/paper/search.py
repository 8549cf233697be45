"""The settings of a run: those of the authors, or the best of some trials.

Each method has as many trials, drawn from the same ranges, and the settings
that did best on validation data are those of the table. The first trial is of
the authors' own settings, so that none does worse for being searched.
"""

import copy
import math

# Of the learning rate, by that of the authors.
LOWEST, HIGHEST = 0.1, 4.0
FIRST_PLACE, GOLDEN_RATIO = 0.3, (math.sqrt(5) - 1) / 2
WEIGHT_DECAYS = (0.0, 0.01, 0.1)
# What the global norm of the gradients is clipped to.
CLIPNORM = 1.0
EPSILON = 1e-8


def authors_settings(method, learning_rate, options):
    """What the authors train a method with, in this package's terms.

    Their loss of a method with an ELBO is the task's times 1000 beside the
    ELBO, and clipped to a norm of 1. Here the task's loss is as it is and the
    ELBO is divided by 1000, so that the same step has the norm clipped to
    1e-3, and Adam's epsilon divided by 1000.

    Args:
        method: `Method`.
        learning_rate: Float.
        options: Dict, further fields of the method's config.

    Returns:
        Dict of settings, for `training.make_optimizer` and `methods.adapt`.
    """
    scale = 1e-3 if method.elbo_choices else 1.0
    if method.elbo_choices:
        options = method.elbo_choices[0] | options
    return {
        "learning_rate": learning_rate,
        "weight_decay": 0.01,
        "global_clipnorm": CLIPNORM * scale,
        "epsilon": EPSILON * scale,
        "options": dict(options),
    }


def trial_settings(method, authors, trial):
    """The settings of one trial.

    Args:
        method: `Method`.
        authors: Dict, what `authors_settings` returned.
        trial: Integer, the number of the trial. 0 is of the authors.

    Returns:
        Dict of settings.
    """
    settings = copy.deepcopy(authors)
    if trial == 0:
        return settings
    # The same for all methods: what differs is what they make of it. However
    # few trials there are, these are spread over the range.
    place = (FIRST_PLACE + trial * GOLDEN_RATIO) % 1
    share = LOWEST * (HIGHEST / LOWEST) ** place
    settings["learning_rate"] = float(authors["learning_rate"] * share)
    settings["global_clipnorm"], settings["epsilon"] = CLIPNORM, EPSILON
    if method.elbo_choices:
        number = trial % len(method.elbo_choices)
        settings["options"] |= method.elbo_choices[number]
        return settings
    settings["weight_decay"] = WEIGHT_DECAYS[trial % len(WEIGHT_DECAYS)]
    if method.dropouts:
        number = trial // len(WEIGHT_DECAYS) % len(method.dropouts)
        settings["options"]["dropout"] = method.dropouts[number]
    return settings
