"""Finds checkpoints of OpenCLIP and of the CyCLIP authors' code, and describes their runs."""

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

RELEASED_MODEL = "RN50-quickgelu"  # OpenCLIP's name for the model of the authors' checkpoints
# Arguments of OpenCLIP's trainer that change the model or its preprocessing.
MODEL_ARGUMENTS = (
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
    """Where the weights of a model come from. Nothing is loaded yet."""

    title: str
    model: str  # OpenCLIP's name
    path: Path | None  # a file; None: the weights come from `tag`
    tag: str | None  # of OpenCLIP's pretrained weights
    arguments: dict[str, Any]  # for `open_clip.create_model_and_transforms`
    run: dict[str, Any] = field(default_factory=dict)  # from `describe_run`, for the table
    has_parameters: bool = False  # whether a params.txt has the name of the model

    @cached_property
    def source(self) -> dict[str, str]:
        """What distinguishes these weights from others."""
        source = {"model": self.model, "path": str(self.path or self.tag)}
        return {**source, "written": str(self.path.stat().st_mtime_ns)} if self.path else source


def find_checkpoints(
    paths: Sequence[Path], model: str | None, pretrained: str | None
) -> list[Checkpoint]:
    """The checkpoints that the command line asks for. Each has a title of its own.

    paths: files, or folders of runs. model: the model of all checkpoints; None: the model in the
    params.txt of each run. pretrained: a tag of OpenCLIP's own weights.

    Raises `CannotStart` if a checkpoint or its model is missing, or a checkpoint is given twice.
    """
    register_models()
    found = [from_file(checkpoint_file(path), model) for path in paths]
    distinguish(found)
    # The name of a model on a hub ("hf-hub:...") stands for its weights, too.
    is_on_hub = model is not None and ":" in model and not paths
    if pretrained is not None or is_on_hub:
        if model is None:
            raise CannotStart("--pretrained needs --model")
        title = model if is_on_hub else f"{model} {pretrained}"
        found.append(Checkpoint(title, model, None, pretrained, {}, describe_run(title, {})))
    if not found:
        raise CannotStart("no checkpoint: give one, or --model with --pretrained")
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1:
            raise CannotStart(f"{checkpoint.path or checkpoint.title} is given twice")
        if ":" not in checkpoint.model and checkpoint.model not in open_clip.list_models():
            raise CannotStart(f"{checkpoint.title}: OpenCLIP has no model {checkpoint.model!r}")
    return found


def checkpoint_file(path: Path) -> Path:
    """The path itself if it is a file. In a run's folder: its best epoch, or else its newest."""
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
            f"{file}: no {PARAMETERS} of a run beside it: pass --model ({RELEASED_MODEL} for "
            "checkpoints of the CyCLIP authors)"
        )
    arguments = {k: parameters[k] for k in MODEL_ARGUMENTS if parameters.get(k)}
    if parameters.get("siglip"):  # so that the model has a bias; the weights have its value
        arguments["init_logit_bias"] = 0.0
    title = file.stem
    if folder.name == "checkpoints":
        title = run.name
    elif folder.suffix == ".pt":  # the CyCLIP authors released cyclip.pt/best.pt
        title = folder.stem
    described = describe_run(title, parameters)
    return Checkpoint(title, name, file, None, arguments, described, "model" in parameters)


def describe_run(title: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The loss and the seed of a run, and the pairs in its epoch, for tables and pictures.

    The title ends with the name of the loss. ("x-c-cyclip" ends with c-cyclip, not with cyclip.) If
    the run had other penalties or views than this loss, the run's settings decide. The loss is None
    if it is not known.

    parameters: the run's params.txt.
    """
    seed = parameters.get("seed")
    stem = title if seed is None else title.removesuffix(f"-{seed}")
    endings = [loss for loss in LOSSES if stem == loss or stem.endswith(f"-{loss}")]
    loss = max(endings, key=len, default=None)
    if "lambda_inmodal" in parameters:
        inmodal, crossmodal = (parameters[f"lambda_{k}"] > 0 for k in ("inmodal", "crossmodal"))
        views = "contrastive" if parameters.get("views") else ""
        candidates = [
            name
            for name, x in LOSSES.items()
            if (x.inmodal, x.crossmodal, x.views) == (inmodal, crossmodal, views)
        ]
        loss = loss if loss in candidates else candidates[0]
    return {
        "loss": loss,
        "seed": seed,
        "train_num_samples": parameters.get("train_num_samples"),
    }


def distinguish(checkpoints: Sequence[Checkpoint]) -> None:
    """Makes titles unique: where several checkpoints have the same one, it adds their paths."""
    titles = [checkpoint.title for checkpoint in checkpoints]
    for title in {title for title in titles if titles.count(title) > 1}:
        paths = {
            c: Path(os.path.abspath(c.path)) for c in checkpoints if c.title == title and c.path
        }
        common = os.path.commonpath([path.parent for path in paths.values()])
        for checkpoint, path in paths.items():
            checkpoint.title = f"{title}: {path.relative_to(common)}"
