"""The launcher with several processes on a CPU: `torchrun tests/trainers/on_cpu.py -- FLAGS`.

OpenCLIP passes device_ids to DistributedDataParallel, which refuses them on a CPU.
"""

from typing import Any

import torch

from cyclip_loss import open_clip_train


class WithoutDevices(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = WithoutDevices
    open_clip_train.main()
