"""What each preset gives to OpenCLIP's trainer and to the loss, as its command line."""

from pathlib import Path

import open_clip
import torch

WEIGHT = 0.25  # of a penalty that a loss has: the paper's, section 4.1
BATCH_SIZES = {"icons": 1024, "modern": 1024, "paper": 128}  # of all ranks
# Goel et al. 2022, section 4.1, and appendix. The authors' model is OpenAI's RN50, whose text
# encoder has QuickGELU. A scale and an aspect ratio of 1 make timm's random crop the largest
# centred square, resized, which is the paper's resizing and centre crop. The warm-up runs here. In
# the authors' code it never does: that code counts its steps from the end of the first epoch.
PAPER = """
--model RN50-quickgelu --epochs 64 --lr 5e-4 --wd 0.1 --beta1 0.9 --beta2 0.999 --eps 1e-8
--warmup 10000 --precision amp --workers 4 --aug-cfg use_timm=True scale=(1.0,1.0) ratio=(1.0,1.0)
"""
# OpenCLIP's recipe for RN50 on CC3M (https://github.com/mlfoundations/open_clip/issues/448).
MODERN = """
--model RN50 --epochs 30 --lr 1e-3 --wd 0.1 --warmup 2000 --precision amp_bf16 --workers 4
"""
# An "epoch" of these, after which it is validated and saved, is a part of the data.
ICONS = """
--train-num-samples 65536 --wd 0.1 --beta2 0.98 --log-every-n-steps 16 --aug-cfg scale=(0.8,1.0)
"""
ICONS_CPU = "--model icons-rn-32 --epochs 20 --lr 2e-3 --warmup 50 --workers 1"
ICONS_GPU = "--model icons-rn-64 --epochs 120 --lr 1e-3 --warmup 500 --workers 8 "
ICONS_GPU += "--precision amp_bf16"


def preset(name: str) -> list[str]:
    """The flags of a preset, for the machine that this is."""
    cuda = torch.cuda.is_available()
    icons = ICONS + (ICONS_GPU if cuda else ICONS_CPU)
    flags = {"icons": icons, "modern": MODERN, "paper": PAPER}[name].split()
    if not cuda:
        # where a processor does not multiply bfloat16, it is many times slower than float32
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        flags += ["--precision", "amp_bf16" if name == "icons" and fast else "fp32"]
    return [*flags, "--reference-batch-size", "128"]


def register_models() -> None:
    """Makes our own models known to OpenCLIP: a small one for a CPU, a larger one for a GPU."""
    open_clip.add_model_config(Path(__file__).parent / "models")
