"""How many epochs of a run are finished, and whether its settings are still the same."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclip_loss.open_clip_train import LAMBDAS, PENALTIES

from ..command_line import UsageError
from ..runs import PARAMETERS, load_checkpoint, read_parameters

# The settings that may change when a run is resumed. All other settings must stay the same,
# including flags that a new version of OpenCLIP adds. The number of ranks must stay the same, too:
# it decides which shards a rank reads, and which batches the validation's loss is computed on.
MAY_DIFFER = " ".join(
    (
        # Where files are. Shards are compared by `train_shards` and `val_shards`.
        "train_data val_data imagenet_val imagenet_v2 cache_dir logs log_local name",
        "resume model_config",
        # The name of values that are compared.
        "penalties",
        # What is saved and copied.
        "save_frequency save_most_recent delete_previous_checkpoint copy_codebase remote_sync",
        "remote_sync_frequency remote_sync_protocol fsdp_checkpoint",
        # What is logged, and when the run is validated.
        "debug report_to wandb_notes wandb_project_name log_every_n_steps log_metric_every_n_steps",
        "train_loss_ema_samples val_frequency zeroshot_frequency val_retrieval_chunk_size",
        "val_retrieval_precision",
        # How the same values are computed.
        "workers bucket_prefetch_pools device rank dist_url dist_backend no_set_device_rank",
        "ddp_static_graph fsdp fsdp_no_reshard_after_forward fsdp_offload_cpu impl dist_impl",
        "loss_dist_impl grad_checkpointing trace torchscript torchcompile torchcompile_strategy",
        "torchcompile_backend torchcompile_mode",
    )
).split()


def epochs_done(folder: Path, args: Namespace) -> int:
    """The number of epochs that the run in a folder has finished.

    Raises `UsageError` if the run was begun with other settings, or its checkpoint can't be
    loaded.
    """
    # A sharded checkpoint of OpenCLIP 4 is a folder.
    latest = next((folder / "checkpoints").glob("epoch_latest*"), None)
    if latest is None:
        return 0
    done = 0 if latest.is_dir() else int(load_checkpoint(latest)["epoch"])
    # The run may have been begun without `pretrain`, or before there was `--loss`.
    initial = {"views": None, "loss": None, **read_parameters(folder / PARAMETERS)}
    if initial.get("epochs") == done and args.epochs > done:  # a finished run may get more epochs
        initial["epochs"] = args.epochs
    if name := first_difference(initial, vars(args)):
        what = f"{folder} was begun with {name} = {initial[name]}, not {getattr(args, name)}"
        raise UsageError(f"{what}: choose another --name")
    return done


def first_difference(initial: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first setting that differs but must stay the same; None if there is none.

    A setting that `initial` lacks is not compared: the version that began the run did not have it.
    Of penalties without weight, only the weights are compared.
    """
    unused = () if any(settings[name] for name in LAMBDAS) else PENALTIES.keys() - {*LAMBDAS}
    for name, value in settings.items():
        # OpenCLIP writes --force-image-size as a number if the list has only one.
        same = name not in initial or value in (initial[name], [initial[name]])
        if not same and name not in MAY_DIFFER and name not in unused:
            return name
    return None
