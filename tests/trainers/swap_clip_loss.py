"""A pytest plugin that runs OpenCLIP's tests with our ClipLoss and SigLipLoss.

OpenCLIP's main branch (4.x) has tests of its own. (`test_siglip_chunked_loss.py` calls a private
method, and `test_loss.py` no loss.) From a folder beside this checkout,
`cyclip-loss`, run them, and then the launcher on two processes, with `model/` for a folder with a
small `open_clip_config.json`. (On a CPU, 4.x takes several processes with FSDP only.) The log must
show three terms, two of them penalties:

    git clone https://github.com/mlfoundations/open_clip && cd open_clip
    python3 -m venv .venv && .venv/bin/pip install -e . -e ../cyclip-loss \\
        pytest pytest-split transformers pandas webdataset
    PYTHONPATH=../cyclip-loss/tests/trainers .venv/bin/python -m pytest -p swap_clip_loss \\
        tests/test_{factory_task,naflexclap,clap_task,task_checkpoint,eval_task}.py
    cd ../cyclip-loss && ../open_clip/.venv/bin/torchrun --nproc-per-node 2 \\
        -m cyclip_loss.open_clip_train --penalties strong --fsdp --precision fp32 \\
        --model local-dir:model --dataset-type webdataset --epochs 1 \\
        --train-data "reference_train/emoji/{noto,twemoji}.tar.xz" --train-num-samples 256 \\
        --batch-size 32 --workers 1 --log-every-n-steps 1
"""

import open_clip
import open_clip.factory
import open_clip.loss

import cyclip_loss

for module in (open_clip, open_clip.factory, open_clip.loss):
    for name in ("ClipLoss", "SigLipLoss"):
        setattr(module, name, getattr(cyclip_loss, name))
