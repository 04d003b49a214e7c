import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from mcl_clip.core.errors import UserError
from mcl_clip.eval.classification import ClassificationTask
from mcl_clip.eval.datasets import open_image_folder
from mcl_clip.eval.evaluate import run_task
from tests.unit.eval.sets import encoder_of, noise_png, write_image_folder

FOLDERS = {"red_fox": 3, "owl": 2, "Bee": 4}


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "animals", FOLDERS)


def test_folders_are_classes(root):
    data = open_image_folder(root)
    assert data.classnames == ("Bee", "owl", "red fox")  # in sorted order, as torchvision's ImageFolder
    assert data.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert data.templates == tuple(template("{c}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)
    assert data.texts[:2] == ["itap of a Bee.", "a bad photo of the Bee."]
    for path, image in zip(data.source.paths, data.source.images(np.arange(9)), strict=True):
        assert np.array_equal(image, Image.open(path))


class Knowing:
    """A model that has seen every image, and every name."""

    def __init__(self):
        self.labels = {}
        for index, (_, count) in enumerate(FOLDERS.items()):
            for number in range(count):
                image = np.array(Image.open(io.BytesIO(noise_png(100 * index + number, 8))))
                self.labels[image.tobytes()] = [2, 1, 0][index]  # red_fox, owl, Bee were written in this order

    def encode_image(self, pixels):
        images = (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return torch.eye(3)[[self.labels[image.tobytes()] for image in images]]

    def encode_text(self, tokens):
        return torch.eye(3).repeat_interleave(7, 0)


def test_a_folder_is_measured(root):
    metrics = run_task(ClassificationTask("animals", open_image_folder(root)), encoder_of(Knowing()))[0]
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == 1


def test_a_class_of_one_format_only_is_not_forgotten(root):
    (root / "ant").mkdir()
    (root / "ant/x.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"ant/x.heic is not one of jpg, jpeg, png, webp, gif, bmp, avif"):
        open_image_folder(root)


def test_names_and_templates_of_their_own(root):
    (root / "classnames.txt").write_text("honey bee\nbarn owl\nfox\n")
    (root / "zeroshot_classification_templates.txt").write_text("look, a {c}\n")
    data = open_image_folder(root)
    assert data.classnames == ("honey bee", "barn owl", "fox")
    assert data.texts == ["look, a honey bee", "look, a barn owl", "look, a fox"]


def test_what_is_no_image_is_no_image(root):
    (root / "Bee/notes.txt").write_text("x")
    (root / "Bee/.hidden.png").write_bytes(b"x")
    (root / "Bee/folder.png").mkdir()
    (root / ".cache").mkdir()
    (root / ".cache/a.png").write_bytes(b"x")
    (root / "papers").mkdir()
    (root / "Bee/9.JPEG").write_bytes(noise_png(9))
    data = open_image_folder(root)
    assert data.classnames == ("Bee", "owl", "red fox")
    assert [path.name for path in data.source.paths[:5]] == ["0.png", "1.png", "2.png", "3.png", "9.JPEG"]


def test_the_digest_is_over_names_and_sizes(root, tmp_path):
    digest = ClassificationTask("animals", open_image_folder(root)).data.sha256
    elsewhere = write_image_folder(tmp_path / "elsewhere", FOLDERS)
    assert ClassificationTask("other", open_image_folder(elsewhere)).data.sha256 == digest
    (elsewhere / "owl/0.png").rename(elsewhere / "owl/7.png")
    assert ClassificationTask("other", open_image_folder(elsewhere)).data.sha256 != digest
    (root / "owl/0.png").write_bytes(noise_png(100, 9))
    assert ClassificationTask("animals", open_image_folder(root)).data.sha256 != digest


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    ids = ImageNetInfo("imagenet-1k").label_names()
    return write_image_folder(tmp_path_factory.mktemp("imagenet") / "val", dict.fromkeys(reversed(ids), 1))


def test_the_ids_of_imagenet_get_its_names(imagenet):
    data = open_image_folder(imagenet)
    assert data.classnames == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(data.templates) == 80
    assert data.texts[0] == "a bad photo of a tench."
    names = ImageNetInfo("imagenet-1k")
    for folder, name in (("n01440764", "tench"), ("n02364673", "guinea pig"), ("n15075141", "toilet paper")):
        label = data.labels[[path.parent.name for path in data.source.paths].index(folder)]
        assert data.classnames[label] == name
        assert name in names.label_name_to_description(folder)


def test_other_ids_need_names(imagenet, tmp_path):
    ids = sorted(path.name for path in imagenet.iterdir())
    few = write_image_folder(tmp_path / "few", dict.fromkeys(ids[:5], 1))
    with pytest.raises(UserError, match=r"the 5 folders in .* are WordNet ids, but not the 1,000 of ImageNet; write "):
        open_image_folder(few)
    others = write_image_folder(tmp_path / "others", dict.fromkeys([*ids[:-1], "n99999999"], 1))
    with pytest.raises(UserError, match=r"the 1000 folders in .* are WordNet ids, .* into .*classnames.txt"):
        open_image_folder(others)
    (few / "classnames.txt").write_text("a\nb\nc\nd\ne\n")
    assert open_image_folder(few).classnames == ("a", "b", "c", "d", "e")


def test_mistakes(root, tmp_path):
    (root / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(
        UserError, match=r"classnames.txt has 2 names for 3 folders with images; write one name per line"
    ):
        open_image_folder(root)
    (root / "classnames.txt").unlink()
    (root / "owl/x.tiff").write_bytes(b"x")
    with pytest.raises(UserError, match=r"owl/x.tiff is not one of jpg, jpeg, png, webp, gif, bmp, avif; convert it"):
        open_image_folder(root)
    with pytest.raises(UserError, match="holds 1 folders with images; a classification set has one for each class"):
        open_image_folder(write_image_folder(tmp_path / "one", {"a": 2}))
