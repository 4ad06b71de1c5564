"""The emoji shards that ship, against their data card."""

import hashlib
import io
import re

from PIL import Image

from reference_train.data.emoji import ALL_STYLES, EMOJI_FOLDER
from reference_train.data.samples import read_samples


def split_of(key: str) -> str:
    """As the data card says."""
    place = int.from_bytes(hashlib.sha256(f"52:{key}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < 0.15 else "validation" if place < 0.25 else "train"


def test_samples_and_concepts() -> None:
    """Concepts are the same in every style, and none is a flag, a skin tone or a near-duplicate."""
    paths = {path.name.removesuffix(".tar.xz"): path for path in EMOJI_FOLDER.glob("*.tar*")}
    assert set(paths) == set(ALL_STYLES)
    count, seen = 0, dict[str, dict]()
    for style, path in paths.items():
        pictures, samples = set(), list(read_samples([str(path)]))
        count += len(samples)
        for key, png, caption, info in samples:
            with Image.open(io.BytesIO(png)) as image:
                image.load()  # decodes, checksums included
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
                pictures.add(image.tobytes())
                assert image.getextrema() != ((255, 255),) * 3, "blank"
            assert info.pop("style") == style
            assert seen.setdefault(key, info) == info
            assert info["name"] == caption
        assert len(pictures) == len(samples), "two concepts with one picture"
    assert count == 10_544
    assert len(seen) == len({concept["name"] for concept in seen.values()}) == 1597
    subgroups = {concept["subgroup"] for concept in seen.values()}
    trained = {c["subgroup"] for c in seen.values() if c["split"] == "train"}
    assert (len(subgroups), trained) == (95, subgroups)
    for key, concept in seen.items():
        code = "-".join(f"{ord(c):04X}" for c in concept["emoji"])
        assert concept["concept"] == key
        assert key.replace("-FE0F", "") == code.replace("-FE0F", "")
        assert concept["split"] == split_of(key)
        assert all(concept["keywords"]) == bool(concept["keywords"]) is True
        assert not re.search(r"\b1F3F[B-F]\b|\b1F1[EF]", key)
        assert not re.search(r"facing right$|^family:|skin tone|^flag(?! in hole)", concept["name"])
