"""Our own models, as OpenCLIP's JSON: a small one for a CPU, a larger one for a GPU."""

from pathlib import Path

import open_clip


def register() -> None:
    """Makes the models of this folder known to OpenCLIP by their files' names."""
    open_clip.add_model_config(Path(__file__).parent)
