"""A tiny CLIP model, and miniature data sets in the layouts that the commands read."""

import io
import json
import tarfile

import numpy as np
import open_clip
import torch
from PIL import Image

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TEN_CLASSES = "\n".join("abcdefghij")


def write_run(folder):
    """logs/NAME of a tiny random model, as OpenCLIP's trainer leaves it under DDP."""
    for name, quick in (("evaluate-tiny", False), ("evaluate-tiny-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, "quick_gelu": quick}))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model("evaluate-tiny", load_weights=False)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    run = folder / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 2, "state_dict": state}, run / "checkpoints" / "epoch_2.pt")
    (run / "params.txt").write_text("batch_size: 8\nmodel: evaluate-tiny\nlr: 0.001\n")
    return run


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def picture(number):
    """A PNG of noise."""
    rng, buffer = np.random.default_rng(number), io.BytesIO()
    noise = rng.integers(rng.integers(250), 256, (24, 20, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def labelled(count, classes):
    """Samples of a picture and a label."""
    return [{"png": picture(i), "cls": str(3 * i % classes).encode()} for i in range(count)]


def write_samples(path, samples):
    """A tar file of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, {f"{path.stem}s{i:04}.{e}": s[e] for i, s in enumerate(samples) for e in s})


def make_shards(folder):
    """Shards of 8 pairs: a picture of noise, and a caption with its number."""
    names = [*(f"train-{number:05d}.tar" for number in range(4)), "val-00000.tar"]
    for name in names:
        pairs = [{"png": picture(i), "txt": f"{name} {i}".encode()} for i in range(8)]
        write_samples(folder / name, pairs)
    (folder / "sizes.json").write_text(json.dumps(dict.fromkeys(names, 8)))
    return folder


def break_picture(shard):
    """Overwrites the header of a shard's first picture."""
    content = bytearray(shard.read_bytes())
    start = content.index(b"PNG")
    content[start : start + 8] = bytes(8)
    shard.write_bytes(content)


def write_set(folder, splits, **texts):
    """A data set in clip-benchmark's layout, with two shards per split. texts: its text files."""
    for split, samples in splits.items():
        half = len(samples) // 2
        write_samples(folder / split / "0.tar", samples[:half])
        write_samples(folder / split / "1.tar", samples[half:])
        (folder / split / "nshards.txt").write_text("2\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def write_image_folder(folder, classes):
    """A folder for each class, with one picture in it."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(picture(0))
