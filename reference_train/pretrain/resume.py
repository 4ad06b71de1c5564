"""Whether a run is resumed: how far it is, and whether it was begun with the same settings."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..command_line import CannotStart
from .runs import PARAMETERS, load_checkpoint, read_parameters

# The settings that may change when a run is resumed. All others must stay the same: a flag that is
# missing here, such as a new flag of OpenCLIP, is compared. The number of ranks is compared too:
# ranks share out the shards, and a validation's loss is over the batches of one rank.
MAY_DIFFER = {
    # Where files are. Shards are compared by `train_shards` and `val_shards`.
    "train_data",
    "val_data",
    "imagenet_val",
    "imagenet_v2",
    "cache_dir",
    "logs",
    "log_local",
    "name",
    "resume",
    # What is saved and copied.
    "save_frequency",
    "save_most_recent",
    "delete_previous_checkpoint",
    "copy_codebase",
    "remote_sync",
    "remote_sync_frequency",
    "remote_sync_protocol",
    "fsdp_checkpoint",
    # What is logged, and when the run is validated.
    "debug",
    "report_to",
    "wandb_notes",
    "wandb_project_name",
    "log_every_n_steps",
    "log_metric_every_n_steps",
    "train_loss_ema_samples",
    "val_frequency",
    "zeroshot_frequency",
    "val_retrieval_chunk_size",
    "val_retrieval_precision",
    # How the same values are computed.
    "workers",
    "bucket_prefetch_pools",
    "device",
    "rank",
    "dist_url",
    "dist_backend",
    "no_set_device_rank",
    "ddp_static_graph",
    "fsdp",
    "fsdp_no_reshard_after_forward",
    "fsdp_offload_cpu",
    "impl",
    "dist_impl",
    "loss_dist_impl",
    "grad_checkpointing",
    "trace",
    "torchscript",
    "torchcompile",
    "torchcompile_strategy",
    "torchcompile_backend",
    "torchcompile_mode",
}


def epochs_done(folder: Path, args: Namespace) -> int:
    """The number of epochs that a run of this name has finished.

    Raises `CannotStart` if it was begun with other settings, or its checkpoint can't be loaded.
    """
    # OpenCLIP 4 writes sharded checkpoints into a folder
    latest = next((folder / "checkpoints").glob("epoch_latest*"), None)
    if latest is None:
        return 0
    done = 0 if latest.is_dir() else int(load_checkpoint(latest)["epoch"])
    begun = settings_at_the_start(folder)
    if begun.get("epochs") == done and args.epochs > done:  # finished, and asked for more
        begun["epochs"] = args.epochs
    if name := first_difference(begun, vars(args)):
        what = f"{folder} was begun with {name} = {begun[name]}, not {getattr(args, name)}"
        raise CannotStart(f"{what}: choose another --name")
    return done


def settings_at_the_start(folder: Path) -> dict[str, Any]:
    """The params.txt of a run, with the names that settings have today."""
    settings = read_parameters(folder / PARAMETERS)
    if settings.pop("ignore_same_captions", False):  # the flag's name until 0.3
        settings["same_captions"] = "ignored"
    settings.setdefault("views", None)  # the run may be older than the flag
    return settings


def first_difference(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting that must stay the same and does not; None if there is none.

    A setting that `begun` lacks is not compared: the version that began the run did not have it.
    """
    for name, value in settings.items():
        # OpenCLIP writes a list of one --force-image-size as the number
        same = name not in begun or value in (begun[name], [begun[name]])
        if not same and name not in MAY_DIFFER:
            return name
    return None
