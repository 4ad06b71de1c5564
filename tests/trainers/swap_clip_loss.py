"""A pytest plugin that runs OpenCLIP's tests with CyCLIPLoss as ClipLoss; see CONTRIBUTING.md."""

import open_clip
import open_clip.factory
import open_clip.loss

from cyclip_loss import CyCLIPLoss

for module in (open_clip, open_clip.factory, open_clip.loss):
    module.ClipLoss = CyCLIPLoss
