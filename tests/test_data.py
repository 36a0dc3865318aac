"""
Packed records, the prepared OpenMoji set and its rules, pictures to tensors, captions to ids.
"""
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
import time

import emoji
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision import transforms

from conftest import REPO
from model import batch_order
from prepare_imagenet import (Pairs, Records, RecordWriter, augment, crop_box, decode, eval_image,
                              normalize, to_tensor, train_image, visible_patches)
from prepare_pairs import train_wordpiece
from server import encoded, files_of


def test_records_round_trip(tmp_path):
    given = [b"first", b"", os.urandom(3_000_000), b"\x00\n\xff", b""]
    prefix = str(tmp_path / "new folder" / "r")
    writer = RecordWriter(prefix)
    assert [writer.write(record) for record in given] == [0, 1, 2, 3, 4]
    assert not os.path.exists(prefix + ".bin") # a name appears when it is whole
    writer.close()
    records = pickle.loads(pickle.dumps(Records(prefix))) # as in a spawned worker
    assert len(records) == 5 and {i: records[i] for i in (4, 2, 0, 3, 1)} == dict(enumerate(given))
    with pytest.raises(IndexError):
        records[5]
    # the documented layout: N + 1 offsets, uint64, little-endian
    assert np.fromfile(prefix + ".idx", "<u8").tolist() == [0, 5, 5, 3_000_005, 3_000_008, 3_000_008]


def test_no_sample_draws_from_the_stream_of_its_epochs_order():
    """numpy fills a seed up with zeros: (3, 5) and (3, 5, 0) are one stream."""
    order = [unit for *_, unit in next(batch_order(100, 100, seed=3, step=5))]
    others = [(3, 5), *((3, 5, position) for position in range(100)), (3, 5, 0, 1)] # the last mixes pictures
    assert order not in [np.random.default_rng(seed).permutation(100).tolist() for seed in others]


def test_batch_order():
    """An epoch is a permutation of its own, of which each unit comes once at most; ranks share a batch."""
    batches = batch_order(10, 4, seed=0, step=0)
    whole = [next(batches) for _ in range(4)]
    first, second = ([unit for batch in whole[e:e + 2] for *_, unit in batch] for e in (0, 2))
    assert len({*first}) == len({*second}) == 8 and first != second and first != sorted(first)
    assert next(batch_order(10, 4, 0, 3)) == whole[3] and next(batch_order(10, 4, 1, 0)) != whole[0]
    ranks = [next(batch_order(10, 4, 0, 1, rank, 2)) for rank in (0, 1)]
    assert ranks[0] + ranks[1] == whole[1]


@pytest.fixture(scope="session")
def splits(openmoji):
    return {split: Pairs(openmoji, "openmoji", split) for split in ("train", "val", "test")}


def bare(name):
    """A name without what makes a variant: skin tone, hair, gender, direction; every composition of a family,
    of a couple, of people holding hands is one."""
    name = name.lower().replace("’", "'").replace(":", " ")
    if "claus" in name:
        return "claus"
    group = re.match(r"(family|kiss(?! mark)|couple with heart)\b|.*(holding hands)", name)
    if group:
        return group[1] or group[2]
    name = re.sub(r"(light|medium-light|medium|medium-dark|dark) skin tone", "", name)
    name = re.sub(r"\b((red|curly|white|blond) hair|bald|beard)\b", "", name)
    name = re.sub(r"\b(boy|girl)\b", "child", name)
    return " ".join(re.sub(
        r"\b((wo)?m[ae]n('s)?|person|people|(left|right|up|down)(wards)?|facing|pointing)\b", "",
        name).split())


def test_splits_of_openmoji(splits):
    """Families are labels, and no label or picture is on two sides. Held-out ones are in default form, under
    one name each, which no training picture has."""
    train = splits["train"]
    named = {bare(train.captions[j]) for j in np.unique(train.text_to_image, return_index=True)[1]}
    for a, b in itertools.combinations(splits.values(), 2):
        assert not {*a.labels.tolist()} & {*b.labels.tolist()}
        assert not {a.images[i] for i in range(len(a.images))} & {b.images[i] for i in range(len(b.images))}
    for split, families in (("test", 300), ("val", 100)):
        pairs = splits[split]
        assert len(pairs.images) == len(set(pairs.captions)) == len(set(pairs.labels.tolist())) == families
        assert not [c for c in pairs.captions
                    if re.search(r"skin tone|facing right|\b(red|curly|white) hair", c)]
        assert not {c.lower() for c in pairs.captions} & {c.lower() for c in train.captions}
        assert not {bare(c) for c in pairs.captions} & named
    assert len(train.images) > 2500 and len(set(train.labels.tolist())) > 950


def test_captions_and_pictures_of_openmoji(openmoji, splits):
    """No country's flag, no caption that is no words, aliases once; a tokenizer that saw no others."""
    captions = [c for pairs in splits.values() for c in pairs.captions]
    flags = [d["en"].strip(":").replace("_", " ") for e, d in emoji.EMOJI_DATA.items()
             if "\U0001F1E6" <= e[0] <= "\U0001F1FF" or "\U000E007F" in e]
    assert len(flags) > 250 and not {*captions} & {*flags} and "pirate flag" in captions # no country's
    assert not [c for c in captions if re.search(r"[_:]|  |^ | $", c) or not c]
    train = splits["train"]
    once = {*zip(train.text_to_image.tolist(), train.captions)}
    assert len(once) == len(train.captions) > len(train.images)
    assert train.meta["license"] == "CC BY-SA 4.0" in train.meta["credit"] and train.meta["not_drawn"] == 19
    image = decode(splits["val"].images[0])
    assert image.size == (72, 72) and image.getpixel((0, 0)) == (255, 255, 255)
    with open(os.path.join(openmoji, "openmoji", "tokenizer.json"), encoding="utf-8") as f:
        assert f.read() == train_wordpiece(train.captions, 2000)


@pytest.mark.slow
def test_two_processes_draw_at_once(openmoji, tmp_path):
    """The second waits for the first, or, where that is killed, draws them itself."""
    command = [sys.executable, os.path.join(REPO, "prepare_pairs.py"), f"--data_dir={tmp_path}"]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)]
    time.sleep(6)
    runs[0].kill()
    assert [run.wait() for run in runs][1:] == [0, 0]
    assert files_of(tmp_path / "openmoji") == files_of(os.path.join(openmoji, "openmoji"))


@pytest.mark.parametrize("how", range(1, 9))
def test_every_exif_turn(how):
    """As PIL's own, which writes the EXIF anew and fails where it is corrupt."""
    exif = Image.Exif()
    exif[0x0112] = how
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    data = encoded(image.resize((90, 60), Image.NEAREST), "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("width, height, scale_min", [(60, 60, 0.6), (100, 60, 0.08), (60, 140, 0.6)])
def test_crop_box_is_distributed_as_in_torchvision(width, height, scale_min):
    torch.manual_seed(0)
    rng, image, quantiles = np.random.default_rng(0), torch.zeros(3, height, width), []
    ours = np.array([crop_box(width, height, scale_min, rng) for _ in range(3000)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= width).all() and (ours[:, 3] <= height).all()
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (scale_min, 1), (3 / 4, 4 / 3))
                       for _ in range(3000)]) # top, left, height, width
    ours[:, 2:] -= ours[:, :2]
    for left, top, w, h in (ours.T, theirs[:, [1, 0, 3, 2]].T):
        values = [w * h / (width * height), np.log(w / h), left / width, top / height]
        quantiles.append(np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9), axis=1))
    assert quantiles[0] == pytest.approx(quantiles[1], abs=0.03)


@pytest.mark.parametrize("size, exif", [((1000, 700), 1), ((641, 483), 1), ((250, 999), 1), ((1000, 700), 6)])
def test_train_image_gives_the_crop_that_its_noise_says(size, exif):
    """A large JPEG is decoded at 1/2, 1/4 or 1/8: the same crops, a little softer, never below their size."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8))
    turn = Image.Exif()
    turn[0x0112] = exif
    data = encoded(small.resize(size, Image.BICUBIC), "JPEG", quality=95, exif=turn)
    whole, reduced = decode(data), 0
    for seed in range(20):
        crop = train_image(data, 32, 0.3, np.random.default_rng(seed))
        box = crop_box(*whole.size, 0.3, np.random.default_rng(seed))
        expected = to_tensor(whole.crop(box).resize((32, 32), Image.BICUBIC))
        away, aside = ((crop.float() - x.float())[:, 1:-1, 1:-1].abs().mean()
                       for x in (expected, expected.roll(1, 2)))
        assert crop.dtype == torch.uint8 and away < aside / 2 # not by half a pixel
        reduced += (crop.int() - expected.int()).abs().max() > 1 # torch rounds another way
    assert reduced == (20 if exif == 1 else 0)


def test_eval_image_crops_or_squashes():
    image = Image.new("RGB", (60, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    crop, squashed = (eval_image(encoded(image), 24, squash=squash) for squash in (False, True))
    assert crop.shape == squashed.shape == (3, 24, 24) and crop.dtype == squashed.dtype == torch.uint8
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 24, 24)
    assert (crop.int() - blue.int()).abs()[:, :, 1:].max() < 30 # the red third is cut off
    assert (squashed[0] > 128).sum(1).tolist() == [8] * 24 # a third of the width is red


MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def noise(n, seed=0):
    return torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))


def random_images(n=4, size=16):
    return torch.randint(0, 256, (n, 3, size, size),
                         generator=torch.Generator().manual_seed(9)).to(torch.uint8)


def test_colours_vary_as_far_as_documented():
    """Gain by color, brightness by half of it: black shows the second alone, mid grey both."""
    for level, most in ((0, 0.1), (128, 128 / 255 * 1.2 + 0.1)):
        images = torch.full((2000, 3, 1, 1), level, dtype=torch.uint8)
        out = augment(images, noise(2000), 0, 0, 0.2) * STD + MEAN
        assert most - 0.02 < out.max() <= most + 1e-5


def test_normalize_and_flip():
    images = random_images(200, 4)
    for out in (augment(images, noise(200), flip=0.0), normalize(images), normalize(images.float())):
        assert out.dtype == torch.float32 and (out - (images / 255 - MEAN) / STD).abs().max() < 1e-5
    for rotate in (0.0, 1e-5): # two ways through it
        assert torch.allclose(augment(images, noise(200), 1.0, rotate), normalize(images.flip(-1)), atol=1e-2)
    flipped = (augment(images, noise(200), flip=0.3) - normalize(images)).abs().amax((1, 2, 3)) > 1e-3
    assert 40 < flipped.sum() < 80


def test_visible_patches():
    """The share that is seen, in rising order, each as often as the others."""
    drawn = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    seen = visible_patches(drawn, 0.6)
    assert seen.shape == (4000, 16 - 9) and seen.dtype == torch.int64 and (seen.diff(dim=1) > 0).all()
    assert (seen.flatten().bincount() / 4000 - 7 / 16).abs().max() < 0.03
    assert seen[0].tolist() == sorted(drawn[0].argsort()[9:].tolist()) and visible_patches(drawn, 0) is None


def test_rotation_keeps_white_white_and_shapes_in_shape():
    white = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.allclose(augment(white, noise(8), rotate=45.0), normalize(white), atol=1e-4)
    image = Image.new("RGB", (65, 65), "white")
    ImageDraw.Draw(image).ellipse([29, 7, 35, 13], fill="black") # a dot 22 pixels above the centre
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(64, -1, -1, -1)
    for flip in (0.0, 1.0):
        dark = 1 - (augment(images, noise(64), flip=flip, rotate=30.0) * STD + MEAN)[:, 0] # (B, H, W)
        mass, offset = dark.sum((1, 2)), torch.arange(65.0) - 32
        x, y = (dark.sum(1) * offset).sum(1) / mass, (dark.sum(2) * offset).sum(1) / mass
        angle = torch.atan2(x, -y) * 180 / np.pi
        assert ((x ** 2 + y ** 2).sqrt() - 22).abs().max() < 0.5 # on its circle, and as large
        assert (mass / mass.mean() - 1).abs().max() < 0.05
        assert 25 < angle.max() < 30.5 and -30.5 < angle.min() < -25
