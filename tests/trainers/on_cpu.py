"""The launcher with several processes on a CPU: `torchrun tests/trainers/on_cpu.py MODEL_FILE ...`.

OpenCLIP passes device_ids to DistributedDataParallel, which refuses them on a CPU.
"""

import sys
from typing import Any

import open_clip
import torch

from cyclip_loss import open_clip_train


class WithoutDevices(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


if __name__ == "__main__":
    open_clip.add_model_config(sys.argv.pop(1))
    torch.nn.parallel.DistributedDataParallel = WithoutDevices
    open_clip_train.main()
