"""Models, data and ranks for the recipes on the pages of `docs/`."""

from functools import lru_cache

import open_clip
import torch
from pages import run
from torch import nn

from cyclip_loss import CyCLIPLoss
from reference_train.data.emoji import EMOJI_FOLDER
from reference_train.data.samples import decode, read_samples

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT = {"layers": 1, "width": 32, "heads": 2, "context_length": 12}
LARGE_BATCH = "cached_backward"


@lru_cache
def captions():
    """32 emoji: (image (3, 32, 32), name, its first keyword)."""
    samples = read_samples([str(EMOJI_FOLDER / "noto.tar.xz")])
    found = []
    for sample, _ in zip(samples, range(32), strict=False):
        image = torch.tensor(decode(sample.image, 32))
        found.append((image, sample.caption, sample.info["keywords"][0]))
    return found


@lru_cache
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=12)


def batch():
    """Images (32, 3, 32, 32) and tokens (32, 12)."""
    images, names, _ = zip(*captions(), strict=True)
    return torch.stack(images) / 255, tokenizer()(list(names))


def tiny_clip():
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)


def tiny_coca():
    pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return open_clip.CoCa(
        embed_dim=32,
        multimodal_cfg={"layers": 1, "width": 32, "heads": 2, "context_length": 12},
        text_cfg=TEXT | {"embed_cls": True, "output_tokens": True},
        vision_cfg=VISION | pooled,
    )


def scale_gradient_on_rank(rank, world_size):
    """The gradient of a logit scale outside of the DDP model, averaged over the ranks."""
    images, tokens = batch()
    images, tokens = images.double().chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    model = tiny_clip().double()
    names = model(images, tokens) | {"loss_fn": CyCLIPLoss()}
    names["log_scale"] = nn.Parameter(model.logit_scale.detach().clone())
    return run("Your own loop", 1, **names)["log_scale"].grad


def tiny_hugging_face(family="CLIP"):
    """family: "CLIP" or "Siglip"."""
    import transformers

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {"CLIP": {"eos_token_id": 49407}, "Siglip": {"vocab_size": 49408}}[family]
    options = {"CLIP": {"projection_dim": 16}, "Siglip": {}}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        text_config=tower | {"max_position_embeddings": 12} | text,
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        **options,
    )
    return getattr(transformers, f"{family}Model")(config)
