"""Photographs, from small repositories made here: which part each is in, and what is refused."""

import json
import re
import subprocess

import pytest
from miniature import picture

from reference_train.command_line import RunFailed
from reference_train.data import photos
from reference_train.data.samples import decode, read_samples
from reference_train.evaluate.datasets import find


def clone(folder, files):
    """A repository with one commit, as `git clone` makes it. Returns the commit."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm files"):
        subprocess.run(["git", "-C", folder, *command.split()], check=True)
    return subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True).strip()


# 33 hats and 27 shoes, of which three have the same title each. Shoe 40 has the title of a hat, in
# other letters.
TYPES = ["Hat" if i < 33 else "Shoe" for i in range(60)]
TITLES = [f"{kind} {i % 9}" for i, kind in enumerate(TYPES)]
TITLES[40] = "hat 5"
TITLES[57] = ""
TITLES[34] = "Shoe  7 "
TYPES[59] = "Bag"  # of a type of which there are so few, no part is made
WNIDS = ["n01443537", "n01629819", "n01641577", "n01644900", "n01698640"]


@pytest.fixture
def clones(tmp_path, monkeypatch):
    """Clones whose commits are those that are read."""
    folder = tmp_path / "clones"
    # Shoe 59 has the picture of 58.
    pictures = {f"data/images/{i}.jpg": picture(min(i, 58)) for i in range(60)}
    commits = {photos.PRODUCTS: clone(folder / photos.PRODUCTS.split("/")[1], pictures)}
    rows = ["id,articleType", *(f"{i},{kind}" for i, kind in enumerate(TYPES))]
    titles = ["productDisplayName", *TITLES]
    tables = {"styles.csv": rows, "styles_text.csv": titles}
    files = {name: ("\n".join(lines) + "\n").encode() for name, lines in tables.items()}
    commits[photos.TITLES] = clone(folder / photos.TITLES.split("/")[1], files)
    root = "tiny-imagenet-200"
    tiny = {
        f"{root}/train/{label}/images/{label}_{j}.JPEG": picture(100 + 10 * i + j)
        for i, label in enumerate(WNIDS)
        for j in range(3)
    }
    tiny[f"{root}/train/{WNIDS[1]}/images/9.JPEG"] = picture(110)  # twice in its class
    # The first image of the first class is also one for validation, of the second class.
    tiny[f"{root}/val/images/val_0.JPEG"] = picture(100)
    tiny[f"{root}/val/images/val_1.JPEG"] = picture(99)
    annotations = "".join(f"val_{i}.JPEG\t{WNIDS[i]}\t0\t0\t9\t9\n" for i in range(2))
    tiny[f"{root}/val/val_annotations.txt"] = annotations.encode()
    tiny[f"{root}/wnids.txt"] = "\n".join(WNIDS).encode()
    commits[photos.TINY] = clone(folder / photos.TINY.split("/")[1], tiny)
    monkeypatch.setattr(photos, "SOURCES", commits)
    return folder


def test_no_title_and_no_image_is_in_two_parts(clones, tmp_path, monkeypatch, capsys):
    shares = []
    monkeypatch.setattr(photos, "choose", lambda *given: shares.append(given[1]) or {min(given[0])})
    # Of the shoes, 34 and 35 and those with their titles are for the test, 36 for validation.
    monkeypatch.setattr(photos, "number", lambda text: 30 * int(re.sub(r"\D", "", text)))
    out = tmp_path / "out"
    photos.main(f"--out {out} --clones {clones}".split())
    parts = json.loads((out / "manifest.json").read_text())["parts"]
    assert {part: entry["photographs"] for part, entry in parts.items()} == {
        "products-new-types/test/%d.tar": 33,
        "products/test/%d.tar": 6,
        "products-validation/test/%d.tar": 3,
        "products/train-%05d.tar": 15,  # not 40, 57 and 59
        "tiny-imagenet-new/test/%d.tar": 1,
        "tiny-imagenet-new/train/%d.tar": 2,  # one of three is for validation, too
        "tiny-imagenet/test/%d.tar": 1,
        "tiny-imagenet/train-%05d.tar": 12,
    }
    assert shares == [0.17, 0.2]
    # The pictures have 24 by 20 pixels, and get white margins.
    product = decode(next(read_samples([str(out / "products" / "test" / "0.tar")])).image, 64)
    assert (product[:, 8].min(), product[:, :, 8].min()) > (250, 250)
    assert product[:, 23:41, 21:43].mean() < 230
    train, test = (
        {sample.caption for sample in read_samples([str(out / "products" / name)])}
        for name in ("train-00000.tar", "test/0.tar")
    )
    assert (len(train), test) == (6, {"Shoe 7", "Shoe 8"})
    assert not train & test
    for name, new_class in (
        ("products-new-types", "Hat"),
        ("tiny-imagenet-new", "a photo of a goldfish, fish"),
    ):
        assert find([out])[name]().classes[""].names == [new_class]
    assert "skipped" not in capsys.readouterr().err


def test_a_share_of_the_names_is_chosen_in_whatever_order_they_come():
    names = [*map(str, range(100))]
    chosen = photos.choose(names, 0.17)
    assert len(chosen) == 17
    assert photos.choose(names[::-1], 0.17) == chosen != {*names[:17]}


def test_a_clone_without_the_commit_or_a_picture_is_refused(clones, tmp_path):
    with pytest.raises(RunFailed, match="IMagenet is not a whole clone: delete it"):
        list(photos.Repository(photos.TINY, clones).contents(["0" * 40]))
    photos.SOURCES[photos.TINY] = "0" * 40
    with pytest.raises(RunFailed, match=r"IMagenet.*0000"):
        photos.main(f"--out {tmp_path}/out --clones {clones}".split())
    assert not (tmp_path / "out").exists()
