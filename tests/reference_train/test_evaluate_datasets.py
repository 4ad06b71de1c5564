"""The data sets of `evaluate` in each layout that it reads, and the paper's superclasses."""

import open_clip
import pytest
import torch
from miniature import picture, write_image_folder, write_set
from timm.data.imagenet_info import ImageNetInfo

from reference_train.evaluate import datasets, paper
from reference_train.evaluate.datasets import Images, Unusable, open_folders, open_tars

IMAGE, LABEL, TEXT = {"png": picture(0)}, {"cls": b"9"}, {"txt": b"a"}
NAMES = open_clip.IMAGENET_CLASSNAMES
CIFAR100 = ("cifar100", 100, 20)


def test_class_names_come_from_the_folders_or_from_classnames_txt(tmp_path):
    write_image_folder(tmp_path, ["a_b", "c"])
    (tmp_path / "empty").mkdir()
    assert open_folders(tmp_path, "x").classes[""].names == ["a b", "c", "empty"]
    (tmp_path / "classnames.txt").write_text("own 0 \nown 1\nown 2\n\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n{c} b\n")
    found = open_folders(tmp_path, "x").classes[""]
    assert (found.names, found.templates) == (["own 0", "own 1", "own 2"], ["a {}", "{} b"])
    for text, message in (
        ("own 0\n", r"3 classes, classnames\.txt has 1"),
        ("own 0\n \nown 1\n", r"classnames\.txt: line 2 is blank"),
    ):
        (tmp_path / "classnames.txt").write_text(text)
        with pytest.raises(Unusable, match=message):
            open_folders(tmp_path, "x")


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_images_of_a_folder_are_those_of_its_test_or_validation(split, tmp_path):
    for part, classes in (split, "ab"), ("train", "ab"), ("other", "c"):
        write_image_folder(tmp_path / part, classes)
    found = open_folders(tmp_path, "x")
    assert (len(found.images), len(found.train[0])) == (2, 2)
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "c")
    with pytest.raises(Unusable, match="train has 2 classes, not those of"):
        open_folders(tmp_path, "x")


def test_folders_of_imagenet_are_its_identifiers_or_class_numbers(tmp_path):
    """The folders of imagenetv2 have numbers."""
    some = list(range(0, 1000, 5))
    identifiers = ImageNetInfo("imagenet-1k").label_names()
    write_image_folder(tmp_path / "a", [identifiers[i] for i in some])
    classes = open_folders(tmp_path / "a", "imagenet-a").classes[""]
    assert classes.names == [NAMES[i] for i in some]
    assert classes.templates == paper.TEMPLATES
    write_image_folder(tmp_path / "v2", ["0", "10", "999"])
    found = open_folders(tmp_path / "v2", "imagenet-x").classes[""].names
    assert found == [NAMES[i] for i in (0, 10, 999)]
    (tmp_path / "v2" / "999").rename(tmp_path / "v2" / "1000")
    with pytest.raises(Unusable, match=r"/1000: .* identifier \(n01440764\) or number"):
        open_folders(tmp_path / "v2", "imagenet-x")


@pytest.mark.parametrize(
    ("samples", "names", "message"),
    [
        ([], "", "no images"),
        ([IMAGE], "", "have neither .cls nor .txt"),
        ([IMAGE | LABEL], "", r"no .*classnames\.txt"),
        ([IMAGE | LABEL], "a\nb", "labels from 9 to 9, but 2 class names"),
        ([IMAGE | TEXT, IMAGE, IMAGE], "", "2 of 3 samples have no .txt"),
        ([IMAGE | {"txt": b" "}], "", "images without a caption"),
    ],
)
def test_samples_that_cannot_be_evaluated_are_refused(samples, names, message, tmp_path):
    write_set(tmp_path, {"test": samples}, classnames=names)
    with pytest.raises(Unusable, match=message):
        open_tars(tmp_path, "x")


def test_imagenets_class_names_in_another_order_are_refused(tmp_path):
    """Otherwise each class would have a wrong superclass, and no number would show it."""
    names = [NAMES[number] for number in datasets.imagenet_classes("imagenet-a", ["?"] * 200)]

    def read(names):
        write_set(tmp_path, {"test": [IMAGE | LABEL]}, classnames="\n".join(names))
        return open_tars(tmp_path, "imagenet-a").classes[""].names

    translated = [f"le {name}" for name in names]
    assert (read(names), read(translated)) == (names, translated)
    names[3], names[7] = names[7], names[3]
    with pytest.raises(Unusable, match=f"class 3 is called '{names[3]}', .* is '{names[7]}'"):
        read(names)


def test_superclasses_are_cut_to_the_classes_of_a_dataset(tmp_path):
    """The numbers of superclasses are those in the authors' histograms, and CIFAR-100's own."""
    images = Images(torch.zeros(1, 3, 1, 1)), torch.tensor([0])
    for name, count, number in ("imagenet1k", 1000, 67), ("imagenet-r", 200, 49), CIFAR100:
        data = datasets.classification(tmp_path, name, images, [*map(str, range(count))], None)
        superclasses = data.classes[""].superclass
        assert (len(superclasses), len(superclasses.unique())) == (count, number)
    aquarium_fish, trout = (paper.CIFAR100.index.get_loc(x) for x in ("aquarium_fish", "trout"))
    assert superclasses[aquarium_fish] == superclasses[trout]
