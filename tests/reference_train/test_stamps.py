"""The stamps, from a package made here: a photograph is noise, a drawing is one colour."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("webdataset")
pytest.importorskip("rich")

from PIL import Image

from reference_train.data import stamps
from reference_train.errors import CannotStart, Stopped

NOISE = np.random.default_rng(0).integers(256, size=(40, 600, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = png(Image.fromarray(NOISE))
FLAT = png(Image.new("RGBA", (30, 20), (200, 30, 30, 255)))
WHITE = png(Image.new("RGBA", (30, 20), (255, 255, 255, 255)))
GLOW = png(Image.new("RGBA", (30, 20), (255, 0, 0, 100)))  # transparent all over
CAPTION = b"An owl.\nde.utf8=Eine Eule.\n"
FILES = {
    "animals/birds/owl.png": PHOTO,
    "animals/birds/owl.txt": CAPTION,
    "animals/birds/owl_mirror.png": PHOTO,  # no caption
    "animals/birds/cartoon/owl.png": PHOTO,
    "animals/birds/cartoon/owl.txt": CAPTION,
    "clothes/hats/cap.png": PHOTO,
    "clothes/hats/cap.svg": b"<svg/>",
    "clothes/hats/cap.txt": "A “cap”.\n".encode(),
    "naturalforces/bolt.png": WHITE,
    "naturalforces/bolt.txt": b"Lightning.\n",
    "naturalforces/glow.png": GLOW,
    "naturalforces/glow.txt": b"A glow.\n",
    "symbols/alphabets/asl/a.png": FLAT,
    "symbols/alphabets/asl/a.txt": b"The sign for A.\n",
}


def tar(files: dict[str, bytes], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_package(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package, as deb(5) describes it."""
    data = tar({f"./usr/share/tuxpaint/stamps/{name}": c for name, c in files.items()}, "xz")
    content = b"!<arch>\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}
    for name, member in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n".encode()
        content += member + b"\n" * (len(member) % 2)
    path.write_bytes(content)
    return path


def test_the_stamps_in_the_layout_of_clip_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, out = make_package(tmp_path / "p.deb", FILES), tmp_path / "new" / "stamps"
    stamps.main(["--out", str(out), "--package", str(package)])
    assert "5 stamps, 1 photographs and 4 drawings" in capsys.readouterr().out
    assert (out / "test" / "nshards.txt").read_text() == "1\n"
    templates = (out / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert all("{c}" in template for template in templates)

    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(out / "test" / "0.tar") as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            content = archive.extractfile(member)
            assert content is not None
            samples.setdefault(key, {})[suffix] = content.read()
    assert all(set(sample) == {"png", "cls", "txt", "json"} for sample in samples.values())
    names = (out / "classnames.txt").read_text().splitlines()
    found = {
        key: (names[int(s["cls"])], s["txt"].decode(), json.loads(s["json"])["photo"])
        for key, s in samples.items()
    }
    assert found == {
        "animals_birds_owl": ("bird", "An owl.", True),
        "animals_birds_cartoon_owl": ("bird", "An owl.", False),
        "clothes_hats_cap": ("hat", "A “cap”.", False),
        "naturalforces_glow": ("force of nature", "A glow.", False),
        "symbols_alphabets_asl_a": ("hand sign", "The sign for A.", False),
    }
    with Image.open(io.BytesIO(samples["animals_birds_owl"]["png"])) as image:
        assert (image.mode, image.size) == ("RGB", (256, 17))
    with Image.open(io.BytesIO(samples["naturalforces_glow"]["png"])) as image:
        assert image.getpixel((0, 0)) == (255, 155, 155)  # on white


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (None, "can't be read"),
        (b"not a package", "not a Debian package"),
        ({"animals/birds/owl.png": PHOTO}, "no captioned PNG"),
        ({"new/owl.png": PHOTO, "new/owl.txt": CAPTION}, "no class is known for new/owl"),
        ({"food/x.png": b"broken", "food/x.txt": CAPTION}, "food/x.png is no picture"),
    ],
    ids=["missing", "other", "empty", "unknown", "broken"],
)
def test_a_wrong_package_leaves_nothing(
    package: bytes | dict[str, bytes] | None, message: str, tmp_path: Path
) -> None:
    path, folder = tmp_path / "p.deb", tmp_path / "out"
    if isinstance(package, bytes):
        path.write_bytes(package)
    elif package is not None:
        make_package(path, package)
    folder.mkdir()
    with pytest.raises(CannotStart, match=message) as error:
        stamps.main(["--out", str(folder / "stamps"), "--package", str(path)])
    assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == []


def test_a_download_that_is_not_the_known_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "p.deb", FILES)
    changed = stamps.PACKAGE._replace(url=package.as_uri())
    monkeypatch.setattr(stamps, "PACKAGE", changed)
    with pytest.raises(Stopped, match="SHA-256"):
        stamps.main(["--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [package]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="is there already"):
        stamps.main(["--out", str(tmp_path)])
