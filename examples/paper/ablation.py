"""What each setting of FVAE-LoRA does, one change at a time, on local data.

python -m examples.paper.ablation
python -m examples.paper.comparison --table ablation --beside nothing_changed

Each change has its own best of a few learning rates. What is changed is
`wide_fvae_lora` of the local table.
"""

import dataclasses

from examples.paper import harness
from examples.paper import local
from examples.paper import methods

TABLE = dataclasses.replace(
    local.TABLE,
    name="ablation",
    default_datasets=(
        "digits",
        "docstrings",
        "docstrings_5_a_class",
        "docstrings_40_percent_wrong",
        "spurious_digits",
    ),
    methods=tuple(methods.ABLATIONS),
    sizes={
        "full": harness.Size(3, tuple(range(1, 6)), local.FULL),
        "small": harness.Size(2, (1, 2, 3), local.FULL),
        "tiny": harness.Size(2, (1,), local.TINY),
    },
)

if __name__ == "__main__":
    harness.main(TABLE, __doc__)
