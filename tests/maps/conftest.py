"""The tests of model maps share helpers, and the models of examples/cross."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (
    Path(__file__).parent,
    Path(__file__).parents[2] / "examples" / "cross",
    Path(__file__).parents[2] / "examples" / "torch_fsdp",
):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
