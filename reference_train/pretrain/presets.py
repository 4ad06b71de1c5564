"""The presets of `pretrain`: each is a set of flags for OpenCLIP.

A new one needs its flags in `preset`, a batch size in `BATCH_SIZES`, and a name in
`PENALTY_PRESETS`.
"""

import torch

NO_AUGMENTATION = {"use_timm": True, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}  # as in PAPER
BATCH_SIZES = {"icons": 1024, "modern": 1024, "paper": 128}  # all ranks together
# The launcher's `--penalties` for the losses with penalties, except SigLIP's.
PENALTY_PRESETS = {"icons": "recommended", "modern": "recommended", "paper": "paper"}
# Goel et al. 2022, section 4.1, and appendix. The authors' model is OpenAI's RN50, whose text
# encoder has QuickGELU. With a scale and an aspect ratio of 1, timm's random crop is the largest
# centred square, resized. That is the paper's resizing and centre crop. The authors' code numbers
# its first step as if an epoch had already run, so on CC3M its warm-up never runs. Here it runs.
PAPER = """
--model RN50-quickgelu --epochs 64 --lr 5e-4 --wd 0.1 --beta1 0.9 --beta2 0.999 --eps 1e-8
--warmup 10000 --precision amp --workers 4 --aug-cfg use_timm=True scale=(1.0,1.0) ratio=(1.0,1.0)
"""
# OpenCLIP's recipe for RN50 on CC3M (https://github.com/mlfoundations/open_clip/issues/448).
MODERN = """
--model RN50 --epochs 30 --lr 1e-3 --wd 0.1 --warmup 2000 --precision amp_bf16 --workers 4
"""
# An epoch is 65,536 pairs, a part of the data. Each epoch is validated and saved.
ICONS = """
--train-num-samples 65536 --wd 0.1 --beta2 0.98 --log-every-n-steps 16 --aug-cfg scale=(0.8,1.0)
"""
ICONS_CPU = "--model icons-rn-32 --epochs 20 --lr 2e-3 --warmup 50 --workers 1"
ICONS_GPU = """
--model icons-rn-64 --epochs 120 --lr 1e-3 --warmup 500 --workers 8 --precision amp_bf16
"""


def preset(name: str) -> list[str]:
    """The flags of a preset on this machine."""
    cuda = torch.cuda.is_available()
    icons = ICONS + (ICONS_GPU if cuda else ICONS_CPU)
    flags = {"icons": icons, "modern": MODERN, "paper": PAPER}[name].split()
    if not cuda:
        # On a processor without instructions for it, bfloat16 is far slower than float32.
        # Older versions of PyTorch do not say.
        has_bfloat16 = getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("avx512_bf16")
        flags += ["--precision", "amp_bf16" if name == "icons" and has_bfloat16 else "fp32"]
    return flags
