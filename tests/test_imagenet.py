"""
Labelled sets: ImageNet in each layout it is handed out in, in miniature; odd files, kills, limits; CIFAR and
digits.

    pytest tests/test_imagenet.py
"""
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import prepare_imagenet
from conftest import flags, refused
from prepare_imagenet import Pairs, RecordWriter, decode
from test_shards import tar_bytes, write

WNIDS = ["n01440764", "n02105855", "n03018349", "n13037406"]


@pytest.fixture(autouse=True)
def four_classes(monkeypatch):
    monkeypatch.setattr(prepare_imagenet, "NUM_CLASSES", len(WNIDS))


def picture(seed, size=(40, 30), mode="RGB", format="JPEG", **kwargs):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode).save(data, format, **kwargs)
    return data.getvalue()


PICTURES = { # split -> wnid -> {file name: bytes}; in val one class has fewer
    "train": {w: {f"{w}_{i}.JPEG": picture((c, i)) for i in range(3 + c)} for c, w in enumerate(WNIDS)},
    "val": {w: {f"ILSVRC2012_val_{1 + c + 4 * i:08d}.JPEG": picture((9, c, i)) for i in range(3 - (c == 3))}
            for c, w in enumerate(WNIDS)}}
FLAT_VAL = {name: data for w in WNIDS for name, data in PICTURES["val"][w].items()}
EXPECTED = {split: Counter((c, data) for c, w in enumerate(WNIDS) for data in PICTURES[split][w].values())
            for split in PICTURES}
KAGGLE = {"LOC_val_solution.csv": "ImageId,PredictionString\n" + "".join(
    f"{name[:-5]},{w} 85 1 499 272 {w} 1 2 3 4\n" for w in WNIDS for name in PICTURES["val"][w])}


def tar(files):
    return tar_bytes(files.items())


def under(folder, files):
    return {f"{folder}/{name}": data for name, data in files.items()}


TRAIN_TARS = {f"{w}.tar": tar(PICTURES["train"][w]) for w in WNIDS}
LAYOUTS = { # layout -> its files, with junk beside them as a Mac leaves it; what is said of train and of val
    "official": ({"ILSVRC2012_img_train.tar": tar({"._n01440764.tar": b"junk", **TRAIN_TARS}),
                  "ILSVRC2012_img_val.tar": tar({"./._a.JPEG": b"junk", **under(".", FLAT_VAL)}), **KAGGLE},
                 r"class tars, .*ILSVRC2012_img_train\.tar", r".*ILSVRC2012_img_val\.tar, classes by name"),
    "half extracted": ({**under("train", TRAIN_TARS), **under("val", FLAT_VAL), **KAGGLE,
                        "train/._n01440764.tar": b"junk"},
                       r"class tars, .*train/n01440764\.tar", r".*/val, classes by name"),
    "folders": ({**{f"{s}/{w}/{n}": d for s in PICTURES for w in WNIDS for n, d in PICTURES[s][w].items()},
                 "train/.DS_Store": b"junk", f"train/{WNIDS[0]}/._{WNIDS[0]}_0.JPEG": b"junk",
                 "val/__MACOSX/x.JPEG": b"junk"}, r".*train/<class>/\*", r".*val/<class>/\*"),
    "kaggle": (under("ILSVRC/Data/CLS-LOC", {
        **{f"train/{w}/{n}": d for w in WNIDS for n, d in PICTURES["train"][w].items()},
        **under("val", FLAT_VAL), "test/ILSVRC2012_test_1.JPEG": b"no label"}) | KAGGLE,
               r".*CLS-LOC/train/<class>/\*", r".*CLS-LOC/val, classes by name"),
    "names": ({f"{s}/{n[:-5]}_{w}.JPEG": d for s in PICTURES for w in WNIDS
               for n, d in PICTURES[s][w].items()}, ".*train, classes by name", ".*val, classes by name")}


@pytest.fixture
def at(tmp_path):
    """at(layout) -> a folder with the pictures in that layout."""
    def make(layout):
        source = str(tmp_path / layout)
        if not os.path.exists(source):
            for name, data in LAYOUTS[layout][0].items():
                write(os.path.join(source, name), data)
        return source
    return make


def prepare(data_dir, source=None, data="imagenet", **changes):
    words = flags(dict(data=data, data_dir=data_dir, source=source) | changes)
    prepare_imagenet.main(prepare_imagenet.get_args(words))
    return os.path.join(data_dir, data)


def message(*args, **kwargs):
    return refused(prepare, *args, **kwargs)


def content(pairs):
    return Counter((int(label), pairs.images[i]) for i, label in enumerate(pairs.labels))


def files_of(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))
            if name != "lock"}


# -----------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, at, tmp_path, capsys):
    """Whatever the layout, the files' own bytes and the rank of their wnid; what was found is said."""
    source = at(layout)
    before = sorted(os.walk(source))
    folder = prepare(tmp_path / "data", source)
    out = capsys.readouterr().out
    for split, said in zip(("train", "val"), LAYOUTS[layout][1:]):
        pairs = Pairs(str(tmp_path / "data"), "imagenet", split)
        assert content(pairs) == EXPECTED[split]
        assert pairs.captions == [] and len(pairs.text_to_image) == 0 and pairs.labels.dtype == np.int64
        assert re.search(f"^{split}: found {said}", out, re.M), out
        files = sum(EXPECTED[split].values())
        assert f"of these, {source} had {files}" in out # which is not all of ImageNet
        assert pairs.meta["splits"][split] == {"images": files, "classes": 4,
                                               "bytes": sum(len(d) for _, d in EXPECTED[split]),
                                               "skipped": 0, "skipped_files": []}
    assert pairs.meta["classes"] == WNIDS and "non-commercial" in pairs.meta["license"] \
        and pairs.meta["source"] == source
    assert sorted(os.listdir(folder)) == sorted(["lock", "meta.json"] + [
        f"{s}_{n}" for s in PICTURES for n in ("images.bin", "images.idx", "labels.npy")])
    assert sorted(os.walk(source)) == before # which was only read


@pytest.mark.parametrize("layout, limit", [("official", 5), ("folders", 2), ("names", 13), ("names", 1000)])
def test_limit_is_balanced(layout, limit, at, tmp_path):
    prepare(tmp_path, at(layout), limit=limit)
    for split in PICTURES:
        pairs = Pairs(str(tmp_path), "imagenet", split)
        assert not content(pairs) - EXPECTED[split] and pairs.meta["classes"] == WNIDS
        has = [len(PICTURES[split][w]) for w in WNIDS]
        want = [(c + 1) * limit // 4 - c * limit // 4 for c in range(4)]
        assert np.bincount(pairs.labels, minlength=4).tolist() == np.minimum(has, want).tolist()


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
    assert list(pairs.meta["splits"]) == ["train", "val", "test"]
    assert "left out, since no split is called so: extra" in capsys.readouterr().out
    own_folders(source, ["valid", "val"])
    assert "are both val" in message(tmp_path, source, data="two")


def test_links_and_names_that_are_no_text(tmp_path, capsys):
    """A class twice through a link counts once; a link to a file that is there anyway, too; names of any
    bytes."""
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
    out = capsys.readouterr().out
    assert "a link is a link to the class roses" in out and "-first.png is another name" in out


# -----------------------------------------------------------------------------
# pictures


EXIF = (b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
        b"\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\x0f\0\0\0\0")
ODD = {"n02105855_2933.JPEG": picture(1, format="PNG"), "n01739381_1309.JPEG": picture(2, mode="CMYK"),
       "gray.JPEG": picture(3, mode="L"), "exif.JPEG": picture(4, exif=EXIF)} # more in tests/test_hostile.py
BROKEN = {"cut.JPEG": picture(10, (90, 90))[:-300], "page.JPEG": b"<html>", "empty.JPEG": b""}


def with_odd_files(source):
    """Adds ODD and BROKEN to the second class of a source in the layout official or folders."""
    if os.path.basename(source) == "official":
        files = {**TRAIN_TARS, f"{WNIDS[1]}.tar": tar({**PICTURES["train"][WNIDS[1]], **ODD, **BROKEN})}
        write(f"{source}/ILSVRC2012_img_train.tar", tar(files))
    else:
        for name, data in {**ODD, **BROKEN}.items():
            write(f"{source}/train/{WNIDS[1]}/{name}", data)
        os.symlink("nowhere", f"{source}/train/{WNIDS[1]}/link.JPEG")
    return source


@pytest.mark.parametrize("layout, resize", [("official", 0), ("folders", 24)])
def test_odd_and_broken_files(layout, resize, at, tmp_path, capsys):
    """CMYK, grayscale, a PNG named .JPEG, corrupt EXIF: taken. Cut off, empty, no picture: skipped, counted
    and named."""
    prepare(tmp_path, with_odd_files(at(layout)), resize=resize)
    out, pairs = capsys.readouterr().out, Pairs(str(tmp_path), "imagenet", "train")
    counts = pairs.meta["splits"]["train"]
    broken = [*BROKEN, "link.JPEG"] if layout == "folders" else [*BROKEN]
    assert counts["skipped"] == len(counts["skipped_files"])
    assert sorted(os.path.basename(s.partition(":")[0]) for s in counts["skipped_files"]) == sorted(broken)
    assert not [s for s in counts["skipped_files"] if " at 0x" in s] # the same text in each run
    assert all(f"skipped {s}" in out for s in counts["skipped_files"])
    assert len(pairs.images) == sum(EXPECTED["train"].values()) + len(ODD) == counts["images"]
    images = [decode(pairs.images[i]) for i in range(len(pairs.images))]
    assert {min(image.size) for image in images} == {resize or 30}
    assert (24, 32) in {i.size for i in images} or not resize # turned by its EXIF
    if not resize:
        assert content(pairs) == EXPECTED["train"] + Counter((1, data) for data in ODD.values())


def test_resize(tmp_path, at):
    """The shorter side; aspect kept; never enlarged; any number of workers gives the same."""
    source, small, large = at("folders"), picture(1, (50, 20)), picture(2, (90, 300))
    write(f"{source}/train/{WNIDS[0]}/small.png", small)
    write(f"{source}/train/{WNIDS[0]}/large.png", large)
    folders = [prepare(tmp_path / str(n), source, resize=24, num_workers=n) for n in (0, 2)]
    assert files_of(folders[0]) == files_of(folders[1])
    pairs = Pairs(str(tmp_path / "0"), "imagenet", "train")
    records = [pairs.images[i] for i in range(len(pairs.images)) if pairs.labels[i] == 0]
    images = [Image.open(io.BytesIO(r)) for r in records]
    # in the order of their names
    assert records[-1] == small and images[0].size == (24, 80) and images[0].format == "JPEG"
    assert {i.size for i in images[1:-1]} == {(32, 24)}
    assert np.abs(np.asarray(images[0], int) -
                  np.asarray(decode(large).resize((24, 80), Image.BICUBIC), int)).mean() < 4


# -----------------------------------------------------------------------------
# kills


@pytest.mark.parametrize("layout, limit", [("official", 0), ("folders", 0), ("names", 9)])
def test_stopped_anywhere(layout, limit, at, tmp_path, monkeypatch, capsys):
    """Stopped after any number of records, in the middle of one: the next run makes what an undisturbed one
    makes."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    source = at(layout) if layout == "names" else with_odd_files(at(layout))
    whole = files_of(prepare(tmp_path / "whole", source, limit=limit))
    write_record, rng, left = RecordWriter.write, random.Random(0), [0]

    def dies(self, record):
        left[0] = (left[0] or rng.randint(2, 7)) - 1
        if not left[0]:
            self.records.file.write(record[:len(record) // 2]) # half a record
            raise KeyboardInterrupt
        return write_record(self, record)
    for attempt in range(60):
        monkeypatch.setattr(RecordWriter, "write", dies if attempt < 40 else write_record)
        try:
            folder = prepare(tmp_path / "killed", source, limit=limit)
            break
        except SystemExit as e:
            assert "Give the same command again" in str(e.code)
        assert not os.path.exists(tmp_path / "killed/imagenet/meta.json")
        # other flags than those it was begun with
        assert "--limit=3" in message(tmp_path / "killed", source, limit=3)
    assert attempt > 2 and "going on" in capsys.readouterr().out
    assert files_of(folder) == whole


def test_stopped_while_files_get_their_names(at, tmp_path, monkeypatch):
    """Also where some are there and the set is not."""
    whole, close = files_of(prepare(tmp_path / "whole", at("folders"))), prepare_imagenet.Growing.close
    for count in range(7):
        calls = []

        def dies(self):
            calls.append(self)
            if len(calls) > count:
                raise KeyError("as good as a kill")
            close(self)
        monkeypatch.setattr(prepare_imagenet.Growing, "close", dies)
        with contextlib.suppress(KeyError):
            prepare(tmp_path / str(count), at("folders"))
        if count < 6:
            assert "half-written" in refused(Pairs, str(tmp_path / str(count)), "imagenet", "val")
        monkeypatch.setattr(prepare_imagenet.Growing, "close", close)
        assert files_of(prepare(tmp_path / str(count), at("folders"))) == whole


def test_torn_archives_are_named_and_mended(at, tmp_path, monkeypatch):
    """Half a download, or a tar that ends exactly between two members, ends the run with its name; with the
    whole file in its place the run goes on."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    source = at("half extracted")
    whole, path = files_of(prepare(tmp_path / "whole", source)), f"{source}/train/n03018349.tar"
    data, members = open(path, "rb").read(), tarfile.open(path).getmembers()
    for size in (len(data) // 2, *(m.offset for m in members[1:])):
        write(path, data[:size])
        assert "n03018349.tar" in (said := message(tmp_path, source)) and "Half a download" in said, said
    write(path, data)
    assert files_of(prepare(tmp_path, source)) == whole


# -----------------------------------------------------------------------------
# wrong input: named before anything is written


@pytest.mark.parametrize("victim, data, said", [
    ("official/ILSVRC2012_img_train.tar", b"<html>sign in</html>" * 99, "img_train.tar.* cannot be read"),
    ("official/ILSVRC2012_img_train.tar", tar(dict(list(TRAIN_TARS.items())[:3])),
     r"img_train.tar.* 3 classes \(n01440764.*has 4"),
    ("official/ILSVRC2012_img_val.tar", tar({"ILSVRC2012_val_00000001.JPEG": picture(1)}),
     r"img_val.tar.* 1 classes"),
    ("official/ILSVRC2012_img_val.tar", tar({"other.txt": b"x"}), "nothing says which class"),
    ("official/LOC_val_solution.csv", None, "Put Kaggle's LOC_val_solution.csv"),
    ("kaggle/LOC_val_solution.csv", b"a,b\n1\n\n,\n", "nothing says which class"),
    ("folders/train/n01440764", None, "train/<class>.*: 3 classes"),
    ("folders/train/n01440764", {}, "n01440764 is a class without pictures"),
    ("folders/val", {f"{w}_/{w}.JPEG": picture(1) for w in WNIDS}, r"val/<class>.*: 4 classes \(n01440764_")])
def test_wrong_sources(victim, data, said, at, tmp_path):
    layout, _, name = victim.partition("/")
    path = os.path.join(at(layout), name)
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if isinstance(data, dict): # a folder
        os.makedirs(path)
        for name, content in data.items():
            write(os.path.join(path, name), content)
    elif data is not None:
        write(path, data)
    assert re.search(said, message(tmp_path / "data", at(layout)), re.S)
    assert not os.path.exists(tmp_path / "data")


@pytest.mark.parametrize("changes, said", [
    (dict(), "needs --source=DIR.*--help"), (dict(data="cifra10"), "did you mean --data=cifar10"),
    (dict(source="file"), "is no folder"), (dict(source="none"), "is no folder"),
    (dict(data="../x"), "no name for a folder"),
    (dict(source="it/train", data="own"), "no pictures of train, val or test in"),
    (dict(source="odd", data="own"), "has 1 classes that .*train.* lacks: tulips"),
    (dict(source="single", data="own"), "1 class, at least 2"),
    (dict(data_dir="file", source="it", data="own"), "cannot write file/own"),
    (dict(source="it", data="cifar10"), "it holds neither cifar-10-python.tar.gz"),
    (dict(source="none", data="cifar10"), "none holds neither")])
def test_wrong_flags(changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("./file", "")
    own_folders("it")
    own_folders(own_folders("odd", ["train"]), ["test"], ["tulips"])
    own_folders("single", ["train"], ["a"])
    assert re.search(said, message(**{"data_dir": ".", **changes}), re.S)


def test_prepared_twice(at, tmp_path, capsys):
    folder = prepare(tmp_path, at("folders"), limit=8)
    before = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}
    prepare(tmp_path, limit=8) # the source may be gone by now
    assert "already prepared" in (out := capsys.readouterr().out) and re.search(r"^train +8 +4 ", out, re.M)
    assert re.search("limit=8.*Remove it.*limit=4", message(tmp_path, at("folders"), limit=4))
    assert "was prepared with --source=" in message(tmp_path, at("official"), limit=8)
    assert {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)} == before


# -----------------------------------------------------------------------------
# sets that come as arrays


def test_digits(tmp_path, monkeypatch):
    prepare(tmp_path, data="digits")
    splits = {split: Pairs(str(tmp_path), "digits", split) for split in ("train", "test")}
    assert [len(s.images) for s in splits.values()] == [1297, 500] \
        and splits["train"].meta["classes"] == list("0123456789")
    for pairs in splits.values():
        assert np.bincount(pairs.labels).min() > 30 and decode(pairs.images[0]).size == (32, 32)
    # none on both sides
    assert len({s.images[i] for s in splits.values() for i in range(len(s.images))}) > 1790
    # the same on every machine: the split, not the bytes, which are the PNG encoder's
    assert hashlib.sha256(splits["test"].labels.tobytes()).hexdigest()[:8] == "0f76a014"
    x, y = (np.array([np.asarray(decode(s.images[i])).mean(-1).ravel() for i in range(400)])
            for s in splits.values())
    # the nearest in train: labels belong to their pictures
    near = np.argmin((x ** 2).sum(-1) - 2 * y @ x.T, 1)
    assert (splits["train"].labels[near] == splits["test"].labels[:400]).mean() > 0.9
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in message(tmp_path / "other", data="digits")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch):
    """What torchvision reads, no val split, each picture under its label; what it says if it cannot."""
    from torchvision import datasets
    rng, given = np.random.default_rng(0), {}
    for train, count in ((True, 50), (False, 20)):
        given[train] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 9, count).tolist()

    class Reader:
        base_folder, filename, url, classes = "it", "it.tar.gz", "http://it", [f"thing {i}" for i in range(9)]

        def __init__(self, root, train, download):
            if os.path.getsize(os.path.join(root, self.filename)) < 9:
                raise RuntimeError("half of it")
            self.data, self.targets = given[train]
    monkeypatch.setattr(datasets, name.upper(), Reader)
    write(f"{tmp_path}/src/it.tar.gz", "all of it")
    folder = prepare(tmp_path, tmp_path / "src", data=name)
    for split, (images, labels) in zip(("train", "test"), given.values()):
        pairs = Pairs(str(tmp_path), name, split)
        assert pairs.labels.tolist() == labels and pairs.meta["classes"] == Reader.classes
        assert all((np.asarray(decode(pairs.images[i])) == x).all() for i, x in enumerate(images))
    assert not os.path.exists(f"{folder}/val_labels.npy")
    write(f"{tmp_path}/src/it.tar.gz", "half")
    assert "it.tar.gz cannot be had at" in message(tmp_path / "new", tmp_path / "src", data=name)
