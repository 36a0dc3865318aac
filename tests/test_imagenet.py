"""
Labelled sets: ImageNet in each layout it is handed out in, in miniature; broken files, kills, limits; digits.
"""
import hashlib
import os
import pathlib
import random
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import prepare_imagenet
from conftest import flags, refused
from prepare_imagenet import Growing, Pairs, RecordWriter, decode
from server import encoded, files_of, tar_bytes as tar, write

WNIDS = ["n01440764", "n02105855", "n03018349", "n13037406"]


@pytest.fixture(autouse=True)
def four_classes(monkeypatch):
    monkeypatch.setattr(prepare_imagenet, "NUM_CLASSES", len(WNIDS))


def picture(seed, size=(40, 30), format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return encoded(Image.fromarray(pixels).resize(size, Image.BICUBIC), format)


PICTURES = { # split -> wnid -> {file name: bytes}; in val one class has fewer
    "train": {w: {f"{w}_{i}.JPEG": picture((c, i)) for i in range(3 + c)} for c, w in enumerate(WNIDS)},
    "val": {w: {f"ILSVRC2012_val_{1 + c + 4 * i:08d}.JPEG": picture((9, c, i)) for i in range(3 - (c == 3))}
            for c, w in enumerate(WNIDS)}}
EXPECTED = {split: Counter((c, data) for c, w in enumerate(WNIDS) for data in PICTURES[split][w].values())
            for split in PICTURES}
BROKEN = {"cut": picture(10, (90, 90))[:-300], "page": b"<html>", "void": b""} # in the second class
TRAIN = {**PICTURES["train"], WNIDS[1]: {
    **PICTURES["train"][WNIDS[1]], **{f"{WNIDS[1]}_{name}.JPEG": data for name, data in BROKEN.items()}}}
FOLDERS = {f"{split}/{w}/{name}": data for split, classes in (("train", TRAIN), ("val", PICTURES["val"]))
           for w in WNIDS for name, data in classes[w].items()}
FLAT_VAL = {name: data for w in WNIDS for name, data in PICTURES["val"][w].items()}
KAGGLE = {"LOC_val_solution.csv": "ImageId,PredictionString\n" + "".join(
    f"{name[:-5]},{w} 85 1 499 272 {w} 1 2 3 4\n" for w in WNIDS for name in PICTURES["val"][w])}


def under(folder, files):
    return {f"{folder}/{name}": data for name, data in files.items()}


TRAIN_TARS = {f"{w}.tar": tar(TRAIN[w]) for w in WNIDS}
CLS_LOC = "ILSVRC/Data/CLS-LOC"
LAYOUTS = { # layout -> its files, with junk beside them as a Mac leaves it
    "official": {"ILSVRC2012_img_train.tar": tar({"._n01440764.tar": b"junk", **TRAIN_TARS}),
                 "ILSVRC2012_img_val.tar": tar({"./._a.JPEG": b"junk", **under(".", FLAT_VAL)}), **KAGGLE},
    "half extracted": {**under("train", TRAIN_TARS), **under("val", FLAT_VAL), **KAGGLE,
                       "train/._n01440764.tar": b"junk"},
    "folders": {**FOLDERS, "train/.DS_Store": b"junk", "val/__MACOSX/x.JPEG": b"junk"},
    "kaggle": {**under(CLS_LOC, {name: data for name, data in FOLDERS.items() if name.startswith("train")}),
               **under(f"{CLS_LOC}/val", FLAT_VAL), f"{CLS_LOC}/test/test_1.JPEG": b"no label", **KAGGLE},
    "names": {re.sub(r"/(n\d+)/(.*)\.JPEG", r"/\2_\1.JPEG", name): data for name, data in FOLDERS.items()}}


@pytest.fixture
def at(tmp_path):
    """at(layout) -> a folder with the pictures in that layout."""
    def make(layout):
        for name, data in LAYOUTS[layout].items():
            write(tmp_path / layout / name, data)
        return str(tmp_path / layout)
    return make


def prepare(data_dir, source=None, data="imagenet", **changes):
    words = flags(dict(data=data, data_dir=data_dir, source=source) | changes)
    prepare_imagenet.main(prepare_imagenet.get_args(words))
    return os.path.join(data_dir, data)


def content(pairs):
    return Counter((int(label), pairs.images[i]) for i, label in enumerate(pairs.labels))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, at, tmp_path):
    """The files' own bytes, the rank of their wnid; broken ones are counted and named; nothing is moved."""
    source = at(layout)
    before = sorted(os.walk(source))
    prepare(tmp_path / "data", source)
    for split in PICTURES:
        pairs = Pairs(str(tmp_path / "data"), "imagenet", split)
        assert content(pairs) == EXPECTED[split] and pairs.meta["classes"] == WNIDS
        assert pairs.captions == [] and len(pairs.text_to_image) == 0 and pairs.labels.dtype == np.int64
        skipped = pairs.meta["splits"][split]["skipped_files"]
        broken = BROKEN if split == "train" else {}
        assert len(skipped) == pairs.meta["splits"][split]["skipped"] == len(broken)
        assert all(any(f"_{name}" in said for said in skipped) for name in broken)
    assert "non-commercial" in pairs.meta["license"] and sorted(os.walk(source)) == before


def own_folders(source, splits=("train", "val", "test"), classes=("roses", "äpfel und birnen")):
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(2):
                write(os.path.join(source, split, name, f"images/{i}.png"), picture((c, i), format="PNG"))
    return source


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev"])
def test_own_folders(val, tmp_path, capsys):
    """Any classes, nested folders, three splits under any of their names; a folder that is none is named."""
    source = own_folders(f"{tmp_path}/src", ("train", val, "test", "extra"))
    prepare(tmp_path, source, data="flowers")
    pairs = Pairs(str(tmp_path), "flowers", "val")
    assert pairs.meta["classes"] == ["roses", "äpfel und birnen"] and pairs.labels.tolist() == [0, 0, 1, 1]
    assert list(pairs.meta["splits"]) == ["train", "val", "test"] and "extra" in capsys.readouterr().out
    own_folders(source, ["valid", "val"])
    assert "are both val" in refused(prepare, tmp_path, source, data="two")
    own_folders(f"{tmp_path}/other", ["train"])
    own_folders(f"{tmp_path}/other", ["test"], ["tulips"])
    assert "lacks: tulips" in refused(prepare, tmp_path, tmp_path / "other", data="two")


def test_links_and_names_that_are_no_text(tmp_path):
    """A class, or a file, that is there twice through a link counts once; names of any bytes."""
    source = own_folders(f"{tmp_path}/src", ["train"])
    os.symlink(f"{source}/train/roses", f"{source}/train/a link")
    os.symlink("0.png", f"{source}/train/roses/images/-first.png")
    odd = os.path.join(os.fsencode(source), b"train", b"caf\xe9")
    write(os.path.join(odd, b"\xff.png"), picture(9, format="PNG"))
    write(os.path.join(odd, b"\xfe.png"), b"broken")
    prepare(tmp_path, source, data="own")
    pairs = Pairs(str(tmp_path), "own", "train")
    assert pairs.meta["classes"] == ["caf\\xe9", "roses", "äpfel und birnen"]
    assert np.bincount(pairs.labels).tolist() == [1, 2, 2]
    assert pairs.meta["splits"]["train"]["skipped_files"] == ["caf\\xe9/\\xfe.png: not a picture"]


@pytest.mark.parametrize("layout, limit", [("official", 0), ("folders", 0), ("names", 9)])
def test_stopped_anywhere(layout, limit, at, tmp_path, monkeypatch):
    """Amid records, or while the files get their names: the next run makes what an undisturbed one makes."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    source = at(layout)
    whole = files_of(prepare(tmp_path / "whole", source, limit=limit))
    write_record, close, left = RecordWriter.write, Growing.close, random.Random(0).choices(range(2, 8), k=40)

    def counted(self, *args):
        """RecordWriter.write or Growing.close; every few calls one dies, in the middle of a record."""
        if left:
            left[-1] -= 1
        if left and not left[-1]:
            left.pop()
            if args:
                self.records.file.write(args[0][:len(args[0]) // 2])
            raise KeyboardInterrupt
        return write_record(self, *args) if args else close(self)

    monkeypatch.setattr(RecordWriter, "write", counted)
    monkeypatch.setattr(Growing, "close", counted)
    for attempt in range(60):
        try:
            folder = prepare(tmp_path / "killed", source, limit=limit)
            break
        except SystemExit as e:
            assert "Give the same command again" in str(e.code)
        assert "half-written" in refused(Pairs, str(tmp_path / "killed"), "imagenet", "val")
        # other flags than those it was begun with
        assert "--limit=3" in refused(prepare, tmp_path / "killed", source, limit=3)
    assert attempt > 2 and files_of(folder) == whole


def test_torn_archives_are_named_and_mended(at, tmp_path, monkeypatch):
    """Half a download, or a tar that ends between two members; with the whole one the run goes on."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    source = at("half extracted")
    whole, path = files_of(prepare(tmp_path / "whole", source)), f"{source}/train/n03018349.tar"
    data, members = open(path, "rb").read(), tarfile.open(path).getmembers()
    for size in (len(data) // 2, *(m.offset for m in members[1:])):
        write(path, data[:size])
        assert "n03018349.tar" in refused(prepare, tmp_path, source)
    write(path, data)
    assert files_of(prepare(tmp_path, source)) == whole


@pytest.mark.parametrize("victim, files, said", [
    ("official/ILSVRC2012_img_train.tar", {"": tar(dict(list(TRAIN_TARS.items())[:3]))},
     r"img_train.tar.* 3 classes \(n01440764.*has 4"),
    ("official/ILSVRC2012_img_val.tar", {"": tar({"other.txt": b"x"})}, "nothing says which class"),
    ("kaggle/LOC_val_solution.csv", {}, "Put Kaggle's LOC_val_solution.csv"),
    ("folders/train/n01440764", {"/.DS_Store": b""}, "n01440764 is a class without pictures"),
    ("folders/val", {f"/{w}_/{w}.JPEG": picture(1) for w in WNIDS}, r"val/<class>.*: 4 classes \(n0144")])
def test_wrong_sources_are_named_before_anything_is_written(victim, files, said, at, tmp_path):
    layout, _, name = victim.partition("/")
    source = at(layout)
    path = os.path.join(source, name)
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    for name, content in files.items():
        write(path + name, content)
    assert re.search(said, refused(prepare, tmp_path / "data", source), re.S)
    assert not os.path.exists(tmp_path / "data")


def test_a_set_that_is_there_stays_as_it_is(at, tmp_path):
    source = at("folders")
    folder = prepare(tmp_path, source, limit=8)
    assert np.bincount(Pairs(str(tmp_path), "imagenet", "train").labels).tolist() == [2] * 4
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).iterdir()}
    prepare(tmp_path, limit=8) # the source may be gone by now
    for said, source, limit in (("--limit=8. Remove it", source, 4), ("with --source=", tmp_path, 8)):
        assert said in refused(prepare, tmp_path, source, limit=limit)
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).iterdir()} == before


def test_cifar(tmp_path, monkeypatch):
    """What torchvision reads, each picture under its label."""
    from torchvision import datasets
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)

    class Reader:
        base_folder, filename, url, classes = "it", "it.tar.gz", "http://it", ["cat", "dog"]

        def __init__(self, root, train, download):
            self.data = pixels[:20] if train else pixels[20:]
            self.targets = [i % 2 for i in range(len(self.data))]
    monkeypatch.setattr(datasets, "CIFAR10", Reader)
    write(f"{tmp_path}/src/it.tar.gz", "all of it")
    prepare(tmp_path, tmp_path / "src", data="cifar10")
    for split, images in ("train", pixels[:20]), ("test", pixels[20:]):
        pairs = Pairs(str(tmp_path), "cifar10", split)
        assert pairs.labels.tolist() == [i % 2 for i in range(len(images))]
        assert all((np.asarray(decode(pairs.images[i])) == x).all() for i, x in enumerate(images))


def test_digits(tmp_path):
    prepare(tmp_path, data="digits")
    splits = {split: Pairs(str(tmp_path), "digits", split) for split in ("train", "test")}
    assert [len(s.images) for s in splits.values()] == [1297, 500]
    # the same on every machine: the split, not the bytes, which are the PNG encoder's
    assert hashlib.sha256(splits["test"].labels.tobytes()).hexdigest()[:8] == "0f76a014"
    x, y = (np.array([np.asarray(decode(s.images[i])).mean(-1).ravel() for i in range(400)])
            for s in splits.values())
    # the nearest in train: labels belong to their pictures
    near = np.argmin((x ** 2).sum(-1) - 2 * y @ x.T, 1)
    assert (splits["train"].labels[near] == splits["test"].labels[:400]).mean() > 0.9
