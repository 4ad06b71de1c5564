"""A trainer with several processes on a CPU: `torchrun tests/trainers/on_cpu.py MODEL_FILE MODULE`.

Then follow the flags of MODULE, the launcher or `open_clip_train.main`. The contrastive loss's
values are printed. OpenCLIP passes device_ids to DistributedDataParallel, which refuses them on a
CPU.
"""

import sys
from importlib import import_module
from typing import Any

import open_clip
import torch
from torch.nn.modules.module import register_module_forward_hook


class WithoutDevices(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


def print_loss(module: torch.nn.Module, args: Any, output: Any) -> None:
    if type(module).__name__ in ("SigLipLoss", "CySigLIPLoss", "CyCLIPLoss"):
        print("loss:", *(float(term.detach()) for term in output.values()))


if __name__ == "__main__":
    register_module_forward_hook(print_loss)
    open_clip.add_model_config(sys.argv.pop(1))
    torch.nn.parallel.DistributedDataParallel = WithoutDevices
    import_module(sys.argv.pop(1)).main(sys.argv[1:])
