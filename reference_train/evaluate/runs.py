"""Finds checkpoints of OpenCLIP and of the CyCLIP authors, and describes their runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip

from ..command_line import CannotStart
from ..losses import LOSSES
from ..pretrain.presets import register_models
from ..pretrain.runs import PARAMETERS, read_parameters

RELEASED_MODEL = "RN50-quickgelu"  # OpenCLIP's name of the only model that the authors released
# Arguments of OpenCLIP's trainer that change the model or its preprocessing.
KEPT_ARGUMENTS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)


@dataclass(eq=False)
class Checkpoint:
    """Where weights come from, before anything is loaded."""

    title: str
    model: str  # OpenCLIP's name
    path: Path | None  # None: OpenCLIP's pretrained weights, by `tag`
    tag: str | None
    arguments: dict[str, Any]  # of `open_clip.create_model_and_transforms`
    run: dict[str, Any] = field(default_factory=dict)  # of `describe_run`, for the table
    has_parameters: bool = False  # whether a params.txt says which model it is

    @cached_property
    def source(self) -> dict[str, str]:
        """What distinguishes these weights from others."""
        source = {"model": self.model, "path": str(self.path or self.tag)}
        return {**source, "written": str(self.path.stat().st_mtime_ns)} if self.path else source


def find_checkpoints(
    paths: Sequence[Path], model: str | None, pretrained: str | None
) -> list[Checkpoint]:
    """The checkpoints of the command line, with different titles.

    paths: files, or folders of runs. model: the model of all of them; None: each params.txt says
    it. pretrained: a tag of OpenCLIP's own weights.

    Raises `CannotStart` if a checkpoint or its model is missing, or named twice.
    """
    register_models()
    found = [from_file(checkpoint_file(path), model) for path in paths]
    distinguish(found)
    hub = model is not None and ":" in model and not paths  # the weights come with the model
    if pretrained is not None or hub:
        if model is None:
            raise CannotStart("--pretrained needs --model")
        title = model if hub else f"{model} {pretrained}"
        found.append(Checkpoint(title, model, None, pretrained, {}, describe_run(title, {})))
    if not found:
        raise CannotStart("no checkpoint: name one, or --model with --pretrained")
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1:
            raise CannotStart(f"{checkpoint.path or checkpoint.title} is named twice")
        if ":" not in checkpoint.model and checkpoint.model not in open_clip.list_models():
            raise CannotStart(f"{checkpoint.title}: OpenCLIP has no model {checkpoint.model!r}")
    return found


def checkpoint_file(path: Path) -> Path:
    """The file itself; in a run's folder its best epoch, or else its newest one."""
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        epochs = sorted(folder.glob("epoch_[0-9]*.pt"), key=lambda p: (len(p.name), p.name))
        # epoch.best.pt is the CyCLIP authors' name; epoch_latest.pt is as new as the newest epoch
        names = ("best.pt", "epoch.best.pt", "epoch_latest.pt")
        for file in (*(folder / name for name in names), *epochs[-1:]):
            if file.is_file():
                return file
    raise CannotStart(f"no checkpoint at {path}")


def from_file(file: Path, model: str | None) -> Checkpoint:
    """A checkpoint from a file and the params.txt of its run. Raises `CannotStart`."""
    folder = file.resolve().parent
    run = folder.parent  # logs/NAME/checkpoints/best.pt -> NAME
    parameters = read_parameters(run / PARAMETERS) or read_parameters(folder / PARAMETERS)
    name = model or parameters.get("model")
    if name is None:
        raise CannotStart(
            f"{file}: no {PARAMETERS} of a run beside it: say --model ({RELEASED_MODEL} for "
            "checkpoints of the CyCLIP authors)"
        )
    arguments = {k: parameters[k] for k in KEPT_ARGUMENTS if parameters.get(k)}
    if parameters.get("siglip"):  # the model needs a bias; the weights have its value
        arguments["init_logit_bias"] = 0.0
    title = file.stem
    if folder.name == "checkpoints":
        title = run.name
    elif folder.suffix == ".pt":  # the CyCLIP authors released cyclip.pt/best.pt
        title = folder.stem
    described = describe_run(title, parameters)
    return Checkpoint(title, name, file, None, arguments, described, "model" in parameters)


def describe_run(title: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The loss, the seed, and the pairs in an epoch of a run, for tables and pictures.

    parameters: its params.txt. The loss is the one that the title ends with, if it has the same
    penalties as the run. ("x-c-cyclip" ends with c-cyclip, not with cyclip.)
    """
    seed = parameters.get("seed")
    stem = title if seed is None else title.removesuffix(f"-{seed}")
    endings = [loss for loss in LOSSES if stem == loss or stem.endswith(f"-{loss}")]
    loss = max(endings, key=len, default=None)
    if "lambda_inmodal" in parameters:
        used = [parameters[f"lambda_{kind}"] > 0 for kind in ("inmodal", "crossmodal")]
        candidates = [name for name, x in LOSSES.items() if [x.inmodal, x.crossmodal] == used]
        loss = loss if loss in candidates else candidates[0]
    return {
        "loss": loss,
        "seed": seed,
        "train_num_samples": parameters.get("train_num_samples"),
    }


def distinguish(checkpoints: Sequence[Checkpoint]) -> None:
    """Adds paths to titles that several checkpoints have."""
    titles = [checkpoint.title for checkpoint in checkpoints]
    for title in {title for title in titles if titles.count(title) > 1}:
        paths = {
            c: Path(os.path.abspath(c.path)) for c in checkpoints if c.title == title and c.path
        }
        common = os.path.commonpath([path.parent for path in paths.values()])
        for checkpoint, path in paths.items():
            checkpoint.title = f"{title}: {path.relative_to(common)}"
