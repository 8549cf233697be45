"""What the annotations call by a name of their own."""

import os
from typing import Any
from typing import TypeAlias

# Of whatever class the backend has for it, or a `keras.KerasTensor`: these
# have no class in common.
Tensor: TypeAlias = Any
Filepath: TypeAlias = str | os.PathLike[str]
