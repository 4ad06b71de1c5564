"""What OpenCLIP's trainer leaves of a run: its settings in params.txt, and weights."""

import ast
import re
from pathlib import Path
from typing import Any


def read_parameters(path: Path) -> dict[str, Any]:
    """A params.txt, `name: value` a line."""
    parameters: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(": ")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[name] = value
    return parameters


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """Weights by the model's own names: less what DDP and torch.compile put before them."""
    return {
        re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value
        for name, value in state.items()
    }
