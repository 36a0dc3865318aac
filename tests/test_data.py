"""
Packed records, the prepared OpenMoji set and its rules, pictures to tensors, captions to ids.

    pytest tests/test_data.py
"""
import io
import itertools
import json
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

import prepare_pairs
from conftest import REPO, refused
from model import batch_order
from prepare_imagenet import (ByLabel, Pairs, Records, RecordWriter, augment, crop_box, decode, eval_image,
                              normalize, to_tensor, train_image, visible_patches)
from prepare_pairs import openmoji_families, train_wordpiece
from test_imagenet import files_of


def encoded(image, format="PNG", **kwargs):
    data = io.BytesIO()
    image.save(data, format, **kwargs)
    return data.getvalue()


# -----------------------------------------------------------------------------
# packed records


RECORDS = [b"first", b"", os.urandom(3_000_000), b"\x00\n\xff", b""]


def write_records(prefix):
    writer = RecordWriter(prefix)
    assert [writer.write(r) for r in RECORDS] == [0, 1, 2, 3, 4]
    return writer


def test_records_round_trip(tmp_path):
    prefix = str(tmp_path / "new folder" / "r")
    writer = write_records(prefix)
    # a name appears when it is whole
    assert not os.path.exists(prefix + ".bin") and not os.path.exists(prefix + ".idx")
    writer.close()
    assert sorted(os.listdir(tmp_path / "new folder")) == ["r.bin", "r.idx"]
    records = Records(prefix)
    assert len(records) == 5 and {i: records[i] for i in (4, 2, 0, 3, 1)} == dict(enumerate(RECORDS))
    for i in (5, -1):
        with pytest.raises(IndexError, match=r"r\.bin"):
            records[i]
    assert pickle.loads(pickle.dumps(records))[2] == RECORDS[2] # in a spawned worker
    # the documented layout: N + 1 offsets, uint64, little-endian
    assert np.fromfile(prefix + ".idx", "<u8").tolist() == [0, 5, 5, 3_000_005, 3_000_008, 3_000_008]


def test_no_sample_draws_from_the_stream_of_its_epochs_order():
    """numpy fills a seed up with zeros: (3, 5) and (3, 5, 0) are one stream."""
    order = [unit for *_, unit in next(batch_order(100, 100, seed=3, step=5))]
    others = [(3, 5), *((3, 5, position) for position in range(100)), (3, 5, 0, 1)] # the last mixes pictures
    assert order not in [np.random.default_rng(seed).permutation(100).tolist() for seed in others]
    assert order == [unit for *_, unit in next(batch_order(100, 100, seed=3, step=5))]
    assert order != [unit for *_, unit in next(batch_order(100, 100, seed=3, step=6))]


def test_positions_of_each_label():
    by_label = ByLabel(np.array([7, 2, 7, 0, 2, 7]))
    assert [by_label[k].tolist() for k in range(len(by_label))] == [[3], [1, 4], [0, 2, 5]]
    # what a spawned worker gets: not an object for each of a million pictures
    assert len(pickle.dumps(ByLabel(np.arange(10_000)))) < 20 * 10_000


# -----------------------------------------------------------------------------
# prepared sets


def test_pairs(tiny_data):
    for split, images, captions in (("train", 48, 72), ("val", 12, 12), ("test", 12, 12)):
        pairs = Pairs(tiny_data, "toy", split)
        assert (len(pairs.images), len(pairs.captions), len(pairs.text_to_image), len(pairs.labels)) == (
            images, captions, captions, images)
        assert all(decode(pairs.images[i]).size == (32, 32) for i in range(images))
    assert pairs.captions[:2] == ["red circle", "red cross"] and pairs.meta["credit"]


@pytest.mark.parametrize("name, said", [
    ("openmoji", "openmoji is not there.*python prepare_pairs.py --data=openmoji --data_dir="),
    ("cifar10", "python prepare_imagenet.py --data=cifar10"), ("half", "half-written"),
    ("toy", "no split 'dev', only")])
def test_pairs_that_are_not_there(tiny_data, tmp_path, name, said):
    os.mkdir(tmp_path / "half")
    assert re.search(said, refused(Pairs, tiny_data if name == "toy" else str(tmp_path), name, "dev"))


# -----------------------------------------------------------------------------
# OpenMoji: the rules of the split, checked without the code that makes it


def first_captions(pairs):
    """The official name of each picture: its first caption."""
    return [pairs.captions[j] for j in np.unique(pairs.text_to_image, return_index=True)[1]]


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


def test_no_family_is_on_two_sides(splits):
    sides = {}
    for split, pairs in splits.items():
        for name in first_captions(pairs):
            sides.setdefault(bare(name), {}).setdefault(split, []).append(name)
    assert {k: v for k, v in sides.items() if len(v) > 1} == {}
    # the check has something to check
    assert sum(len(names) > 5 for v in sides.values() for names in v.values()) > 100
    for a, b in itertools.combinations(splits.values(), 2): # nor is a label or a picture
        assert not {*a.labels.tolist()} & {*b.labels.tolist()}
        assert not {a.images[i] for i in range(len(a.images))} & {b.images[i] for i in range(len(b.images))}


def test_held_out_families_are_in_default_form(splits):
    for split, families in (("test", 300), ("val", 100)):
        pairs = splits[split]
        assert len(pairs.images) == len(pairs.captions) == len(set(pairs.labels.tolist())) == families
        assert pairs.text_to_image.tolist() == list(range(families))
        assert not [c for c in pairs.captions
                    if re.search(r"skin tone|facing right|\b(red|curly|white) hair", c)]
        assert len(set(pairs.captions)) == families
    assert len(splits["train"].images) > 2500 and len(set(splits["train"].labels.tolist())) > 950


def test_no_name_of_a_held_out_picture_is_trained_on(splits):
    """Some are also another name of a training picture."""
    held_out = {c.lower() for split in ("val", "test") for c in splits[split].captions}
    assert not held_out & {c.lower() for c in splits["train"].captions}
    assert set(splits["train"].text_to_image.tolist()) == set(range(len(splits["train"].images)))


@pytest.mark.slow
def test_two_processes_draw_at_once(openmoji, tmp_path):
    """The second waits for the first, or, where that is killed, draws them itself."""
    command = [sys.executable, os.path.join(REPO, "prepare_pairs.py"), f"--data_dir={tmp_path}"]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)]
    time.sleep(6)
    runs[0].kill()
    assert [run.wait() for run in runs][1:] == [0, 0]
    ours, theirs = files_of(tmp_path / "openmoji"), files_of(os.path.join(openmoji, "openmoji"))
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def test_country_flags_and_undrawn_emoji_are_left_out(splits):
    names = {name for pairs in splits.values() for name in first_captions(pairs)}
    flags = [d["en"].strip(":").replace("_", " ") for e, d in emoji.EMOJI_DATA.items()
             if "\U0001F1E6" <= e[0] <= "\U0001F1FF" or "\U000E007F" in e]
    assert len(flags) > 250 and not [f for f in flags if f in names]
    assert "pirate flag" in names # which is no country's
    assert splits["train"].meta["not_drawn"] == 19


def test_captions_and_meta_of_openmoji(splits):
    for pairs in splits.values():
        assert not [c for c in pairs.captions if re.search(r"[_:]|  |^ | $", c) or not c]
    train, meta = splits["train"], splits["train"].meta # with aliases, each once
    once = {*zip(train.text_to_image.tolist(), train.captions)}
    assert len(once) == len(train.captions) > len(train.images)
    assert "OpenMoji" in meta["credit"] and meta["license"] == "CC BY-SA 4.0" in meta["credit"]
    for split, pairs in splits.items():
        counts, words = meta["splits"][split], [len(c.split()) for c in pairs.captions]
        assert (counts["images"], counts["captions"], counts["families"]) == (
            len(pairs.images), len(pairs.captions), len(set(pairs.labels.tolist())))
        assert counts["words_per_caption"] == pytest.approx(np.mean(words), abs=0.006)
    image = decode(splits["val"].images[0])
    assert image.size == (72, 72) and meta["size"] == 72 and image.getpixel((0, 0)) == (255, 255, 255)


def test_tokenizer_saw_training_captions_only(openmoji, splits):
    with open(os.path.join(openmoji, "openmoji", "tokenizer.json"), encoding="utf-8") as f:
        text = f.read()
    assert text == train_wordpiece(splits["train"].captions, 2000)
    vocab = json.loads(text)["model"]["vocab"]
    assert len(vocab) <= 2000
    words = {s: set(re.findall(r"[a-z]+", " ".join(p.captions).lower())) for s, p in splits.items()}
    new = [w for w in words["test"] | words["val"] if not any(t.startswith(w) for t in words["train"])]
    assert len(new) > 50 and not [w for w in new if w in vocab]


def test_prepared_twice_changes_nothing(openmoji, capsys):
    folder = os.path.join(openmoji, "openmoji")

    def state():
        return {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}

    before = state()
    prepare_pairs.main(prepare_pairs.get_args([f"--data_dir={openmoji}"]))
    out = capsys.readouterr().out
    assert "already prepared" in out and re.search(r"^test .* 300 +300$", out, re.M)
    args = prepare_pairs.get_args([f"--data_dir={openmoji}", "--size=48"])
    assert re.search("size=72.*Remove it.*size=48", refused(prepare_pairs.main, args))
    assert state() == before


def test_families():
    names = {e: d["en"].strip(":").replace("_", " ") for e, d in emoji.EMOJI_DATA.items()
             if d["status"] == emoji.STATUS["fully_qualified"]}
    families = openmoji_families(names)
    assert families == openmoji_families(dict(reversed(names.items())))
    assert sorted(e for f in families for e in f) == sorted(names)
    polo = next(f for f in families if "\U0001F93D" in f)
    assert polo[0] == "\U0001F93D" and len(polo) == 18 # default form; three genders, six skin tones
    # whatever side chance puts them on: the variants of a thing are one family
    pairs = {(i, bare(names[e])) for i, family in enumerate(families) for e in family}
    assert len(pairs) == len({name for _, name in pairs})


# -----------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("how", range(1, 9))
def test_every_exif_turn(how):
    """As PIL's own, which writes the EXIF anew and fails where it is corrupt."""
    exif = Image.Exif()
    exif[0x0112] = how
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    data = encoded(image.resize((90, 60), Image.NEAREST), "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


def test_crop_box_is_distributed_as_in_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    for width, height, scale_min in ((60, 60, 0.6), (100, 60, 0.08), (60, 140, 0.6)):
        rng, image = np.random.default_rng(0), torch.zeros(3, height, width)
        ours = np.array([crop_box(width, height, scale_min, rng) for _ in range(3000)])
        theirs = np.array([transforms.RandomResizedCrop.get_params(image, (scale_min, 1), (3 / 4, 4 / 3))
                           for _ in range(3000)]) # top, left, height, width
        assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= width).all() and (ours[:, 3] <= height).all()
        w, h = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
        for a, b in ((w * h / (width * height), theirs[:, 2] * theirs[:, 3] / (width * height)), # area
                     (np.log(w / h), np.log(theirs[:, 3] / theirs[:, 2])), # aspect
                     (ours[:, 0] / width, theirs[:, 1] / width),
                     (ours[:, 1] / height, theirs[:, 0] / height)):
            for q in (0.1, 0.25, 0.5, 0.75, 0.9):
                assert np.quantile(a, q) == pytest.approx(np.quantile(b, q), abs=0.03)
            assert a.mean() == pytest.approx(b.mean(), abs=0.015)


def test_train_image():
    # brightness = column
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    crops = [train_image(encoded(ramp), 24, 0.1, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert crops[0].shape == (3, 24, 24) and crops[0].dtype == torch.uint8
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    left, _, right, _ = crop_box(200, 100, 0.1, np.random.default_rng(0))
    assert abs(crops[0][0, 0, 0].item() - left) < 8 and abs(crops[0][0, 0, -1].item() - right) < 8


@pytest.mark.parametrize("size, exif", [((1000, 700), 0), ((641, 483), 0), ((250, 999), 0), ((1000, 700), 6)])
def test_a_reduced_jpeg_gives_the_same_crops(size, exif):
    """A large JPEG is decoded at 1/2, 1/4 or 1/8: the same crops, a little softer, never below their size."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8))
    options = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    data = encoded(small.resize(size, Image.BICUBIC), "JPEG", quality=95, **options)
    whole, reduced = decode(data), 0
    for seed in range(20):
        crop = train_image(data, 32, 0.3, np.random.default_rng(seed))
        box = crop_box(*whole.size, 0.3, np.random.default_rng(seed))
        expected = to_tensor(whole.crop(box).resize((32, 32), Image.BICUBIC))
        away, aside = ((crop.float() - x.float())[:, 1:-1, 1:-1].abs().mean()
                       for x in (expected, expected.roll(1, 2)))
        assert away < aside / 2 # not by half a pixel
        reduced += (crop.int() - expected.int()).abs().max() > 1 # torch rounds another way
    assert reduced == (0 if exif else 20)


def test_eval_image_crops_or_squashes():
    image = Image.new("RGB", (60, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    crop, squashed = (eval_image(encoded(image), 24, squash=squash) for squash in (False, True))
    assert crop.shape == squashed.shape == (3, 24, 24) and crop.dtype == squashed.dtype == torch.uint8
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 24, 24)
    assert (crop.int() - blue.int()).abs()[:, :, 1:].max() < 30 # the red third is cut off
    assert (squashed[0] > 128).sum(1).tolist() == [8] * 24 # a third of the width is red


# -----------------------------------------------------------------------------
# augmentation


def noise(n, seed=0):
    return torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))


def random_images(n=4, size=16):
    return torch.randint(0, 256, (n, 3, size, size),
                         generator=torch.Generator().manual_seed(9)).to(torch.uint8)


MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def test_colours_vary_as_far_as_documented():
    """Gain by color, brightness by half of it: black shows the second alone, mid grey both."""
    for level, most in ((0, 0.1), (128, 128 / 255 * 1.2 + 0.1)):
        images = torch.full((2000, 3, 1, 1), level, dtype=torch.uint8)
        out = augment(images, noise(2000), 0, 0, 0.2) * STD + MEAN
        assert most - 0.02 < out.max() <= most + 1e-5


def test_augment_off_is_normalize():
    images = random_images()
    expected = (images / 255 - MEAN) / STD
    for out in (augment(images, noise(4), flip=0.0), normalize(images), normalize(images.float())):
        assert out.dtype == torch.float32 and (out - expected).abs().max() < 1e-5


def test_flip():
    images = random_images(200, 4)
    assert torch.allclose(augment(images, noise(200), flip=1.0), normalize(images.flip(-1)), atol=1e-5)
    assert torch.allclose(augment(images, noise(200), flip=1.0, rotate=1e-5), normalize(images.flip(-1)),
                          atol=1e-2)
    flipped = (augment(images, noise(200), flip=0.3) - normalize(images)).abs().amax((1, 2, 3)) > 1e-3
    assert 40 < flipped.sum() < 80


def test_augment_is_a_function_of_its_noise():
    """Of each picture's row alone, whatever is beside it in the batch; nothing else is drawn."""
    images, knobs = random_images(), dict(rotate=20.0, color=0.3)
    first = augment(images, noise(4, 1), **knobs)
    torch.manual_seed(5)
    assert torch.equal(first, augment(images, noise(4, 1), **knobs))
    assert torch.allclose(first[2:3], augment(images[2:3], noise(4, 1)[2:3], **knobs), atol=1e-5)
    assert not torch.equal(first, augment(images, noise(4, 2), **knobs))


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
