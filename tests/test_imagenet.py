"""
Labelled sets: ImageNet in each layout it is handed out in, in miniature; odd files, kills, limits; CIFAR and
digits.

    pytest tests/test_imagenet.py
    pytest tests/test_imagenet.py -m slow       # SIGKILL at random moments
"""
import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import prepare_imagenet
from prepare_imagenet import Pairs, RecordWriter, decode

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
VAL = {name: wnid for wnid, files in PICTURES["val"].items() for name in files}
EXPECTED = {split: Counter((c, data) for c, w in enumerate(WNIDS) for data in PICTURES[split][w].values())
            for split in PICTURES}


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def tar(files, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return data.getvalue()


def train_tars():
    return {f"{w}.tar": tar(PICTURES["train"][w]) for w in WNIDS}


def kaggle_list():
    lines = [f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for name, wnid in VAL.items()]
    return "\n".join(["ImageId,PredictionString", *lines]).encode()


def build(layout, source):
    """PICTURES under `source`, in a layout. Junk beside it, as a Mac leaves it."""
    flat_val = {name: PICTURES["val"][w][name] for name, w in VAL.items()}
    files = {}
    if layout == "official":
        files = {"ILSVRC2012_img_train.tar": tar({"._n01440764.tar": b"junk", **train_tars()}),
                 "ILSVRC2012_img_val.tar": tar({"./._a.JPEG": b"junk",
                                                **{f"./{n}": d for n, d in flat_val.items()}}),
                 "LOC_val_solution.csv": kaggle_list()}
    elif layout == "half extracted": # the outer tar
        files = {**{f"train/{n}": d for n, d in train_tars().items()},
                 **{f"val/{n}": d for n, d in flat_val.items()}, "LOC_val_solution.csv": kaggle_list(),
                 "train/._n01440764.tar": b"junk"}
    elif layout == "folders":
        files = {f"{s}/{w}/{n}": d for s in PICTURES for w in WNIDS for n, d in PICTURES[s][w].items()}
        files |= {"train/.DS_Store": b"junk", f"train/{WNIDS[0]}/._{WNIDS[0]}_0.JPEG": b"junk",
                  "val/__MACOSX/x.JPEG": b"junk"}
    elif layout == "kaggle":
        root = "ILSVRC/Data/CLS-LOC"
        files = {f"{root}/train/{w}/{n}": d for w in WNIDS for n, d in PICTURES["train"][w].items()}
        files |= ({f"{root}/val/{n}": d for n, d in flat_val.items()} |
                  {f"{root}/test/ILSVRC2012_test_1.JPEG": b"no label"})
        files["LOC_val_solution.csv"] = kaggle_list()
        files["LOC_synset_mapping.txt"] = "\n".join(f"{w} words, of it" for w in WNIDS).encode()
    elif layout == "hugging face": # parts in any order of classes
        names = [(f"{n[:-5]}_{w}.JPEG", d) for w in WNIDS for n, d in PICTURES["train"][w].items()]
        random.Random(0).shuffle(names)
        files = {f"data/train_images_{i}.tar.gz": tar(dict(names[i::11]), "w:gz") for i in range(11)}
        files["data/val_images.tar.gz"] = tar({f"{n[:-5]}_{w}.JPEG": flat_val[n] for n, w in VAL.items()},
                                              "w:gz")
    for name, data in files.items():
        write(os.path.join(source, name), data)


LAYOUTS = { # layout -> what is said of it, for train and for val
    "official": (r"class tars in .*ILSVRC2012_img_train\.tar", r"found .*ILSVRC2012_img_val\.tar"),
    "half extracted": (r"class tars in .*train", r"found .*val/\*"),
    "folders": (r"train/<class>/\*", r"val/<class>/\*"),
    "kaggle": (r"CLS-LOC/train/<class>/\*", r"CLS-LOC/val/\*"),
    "hugging face": (r"train_images_0.tar.gz, .*_9.tar.gz, .*_10.tar.gz", r"val_images\.tar\.gz")}


@pytest.fixture
def at(tmp_path):
    """at(layout) -> the pictures in that layout."""
    def make(layout):
        source = str(tmp_path / layout)
        if not os.path.exists(source):
            build(layout, source)
        return source
    return make


def prepare(data_dir, source=None, data="imagenet", **flags):
    words = [f"--data={data}", f"--data_dir={data_dir}", *([f"--source={source}"] if source else [])]
    prepare_imagenet.main(prepare_imagenet.get_args(words + [f"--{k}={v}" for k, v in flags.items()]))
    return os.path.join(data_dir, data)


def message(*args, **kwargs):
    with pytest.raises(SystemExit) as e:
        prepare(*args, **kwargs)
    assert str(e.value).startswith("error: ")
    return str(e.value)


def content(pairs):
    return Counter((int(label), pairs.images[i]) for i, label in enumerate(pairs.labels))


def files_of(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))
            if name != "lock"}


# -----------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, at, tmp_path, capsys):
    """Whatever the layout, the files' own bytes and the rank of their wnid; what was found is said; then the
    reader."""
    source = at(layout)
    before = sorted(os.walk(source))
    folder = prepare(tmp_path / "data", source)
    out = capsys.readouterr().out
    for split, said in zip(("train", "val"), LAYOUTS[layout]):
        pairs = Pairs(str(tmp_path / "data"), "imagenet", split)
        assert content(pairs) == EXPECTED[split]
        assert pairs.captions == [] and len(pairs.text_to_image) == 0 and pairs.labels.dtype == np.int64
        assert re.search(f"^{split}: .*{said}", out, re.M), out
        files = sum(EXPECTED[split].values())
        assert f"of these, {source} had {files}" in out # which is not all of ImageNet
        assert pairs.meta["splits"][split] == {"images": files, "classes": 4,
                                               "bytes": sum(len(d) for _, d in EXPECTED[split]),
                                               "skipped": 0, "skipped_files": []}
    assert pairs.meta["classes"] == WNIDS and "non-commercial" in pairs.meta["license"] \
        and pairs.meta["source"] == source
    assert "takes about 0.00 GB" in out and "next: python distill_image.py --data=imagenet" in out
    assert sorted(os.listdir(folder)) == sorted(["lock", "meta.json"] + [f"{s}_{n}" for s in PICTURES for n in
                                                                 ("images.bin", "images.idx", "labels.npy")])
    assert sorted(os.walk(source)) == before # which was only read


@pytest.mark.parametrize("limit", [2, 5, 8, 13, 1000])
@pytest.mark.parametrize("layout", ["official", "folders", "hugging face"])
def test_limit_is_balanced(layout, limit, at, tmp_path):
    prepare(tmp_path, at(layout), limit=limit)
    for split in PICTURES:
        pairs = Pairs(str(tmp_path), "imagenet", split)
        assert not content(pairs) - EXPECTED[split] and pairs.meta["classes"] == WNIDS
        has = [len(PICTURES[split][w]) for w in WNIDS]
        want = [(c + 1) * limit // 4 - c * limit // 4 for c in range(4)]
        assert np.bincount(pairs.labels, minlength=4).tolist() == np.minimum(has, want).tolist() \
            and max(want) - min(want) <= 1


def own_folders(source, splits=("train", "val", "test"), classes=("roses", "äpfel und birnen")):
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(2):
                write(os.path.join(source, split, name, f"images/{i}.png"), picture((c, i), format="PNG"))
    return source


def test_own_folders(tmp_path, capsys):
    """Any classes, nested folders, three splits under any of their names; a folder that is none is named."""
    for val in ("val", "valid", "validation", "dev"):
        source = own_folders(f"{tmp_path}/{val}", ("train", val, "test", "extra"))
        prepare(tmp_path, source, data=f"flowers-{val}")
        pairs = Pairs(str(tmp_path), f"flowers-{val}", "val")
        assert pairs.meta["classes"] == ["roses", "äpfel und birnen"]
        assert pairs.labels.tolist() == [0, 0, 1, 1]
        assert list(pairs.meta["splits"]) == ["train", "val", "test"]
        assert "left out, since no split is called so: extra" in capsys.readouterr().out
    own_folders(source, ["valid"])
    assert "are both val" in message(tmp_path, source, data="two")
    prepare(tmp_path, own_folders(f"{tmp_path}/src", ["val"]), data="alone") # for zero-shot
    assert "judging alone" in capsys.readouterr().out
    own_folders(f"{tmp_path}/odd", ["train"])
    own_folders(f"{tmp_path}/odd", ["test"], ["tulips"])
    assert "has classes that" in (said := message(tmp_path, tmp_path / "odd",
                                                  data="other")) and "tulips" in said
    assert "1 class, at least 2" in message(tmp_path, own_folders(f"{tmp_path}/single", ["train"], ["a"]),
                                            data="one")


def test_links_and_names_that_are_no_text(tmp_path, capsys):
    """A class twice through a link counts once; a link to a file that is there anyway, too; names of any
    bytes."""
    source = own_folders(f"{tmp_path}/src", ["train"])
    os.symlink(f"{source}/train/roses", f"{source}/train/a link")
    os.symlink("0.png", f"{source}/train/roses/images/again.png")
    odd = os.path.join(os.fsencode(source), b"train", b"caf\xe9")
    os.makedirs(odd)
    with open(os.path.join(odd, b"\xff.png"), "wb") as f:
        f.write(picture(9, format="PNG"))
    with open(os.path.join(odd, b"\xfe.png"), "wb") as f:
        f.write(b"broken")
    prepare(tmp_path, source, data="own")
    pairs = Pairs(str(tmp_path), "own", "train")
    assert pairs.meta["classes"] == ["caf\\xe9", "roses", "äpfel und birnen"]
    assert np.bincount(pairs.labels).tolist() == [1, 2, 2]
    assert pairs.meta["splits"]["train"]["skipped_files"] == ["caf\\xe9/\\xfe.png: not a picture"]
    out = capsys.readouterr().out
    assert "a link is a link to the class roses" in out and "again.png is a link" in out


# -----------------------------------------------------------------------------
# pictures


EXIF = (b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
        b"\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\x0f\0\0\0\0")
ODD = {"n02105855_2933.JPEG": picture(1, format="PNG"), "n01739381_1309.JPEG": picture(2, mode="CMYK"),
       "gray.JPEG": picture(3, mode="L"), "exif.JPEG": picture(4, exif=EXIF),
       "junk_exif.JPEG": picture(5, exif=b"Exif\0\0junk"), "padded.JPEG": picture(6) + bytes(40),
       "trailing.JPEG": picture(7) + b"written by a camera", "progressive": picture(
           8, progressive=True)}
BROKEN = {"cut.JPEG": picture(10, (90, 90))[:-300], "cut.PNG": picture(11, (90, 90), format="PNG")[:-300],
          "page.JPEG": b"<html>", "zeros.JPEG": bytes(3000), "empty.JPEG": b"",
          "cut_padded.JPEG": picture(12)[:700] + bytes(500), "head.JPEG": picture(13)[:9]}


def odd_source(layout, tmp_path):
    build(layout, tmp_path / "src")
    files = {**PICTURES["train"][WNIDS[1]], **ODD, **BROKEN}
    if layout == "official":
        write(str(tmp_path / "src/ILSVRC2012_img_train.tar"),
              tar({**train_tars(), f"{WNIDS[1]}.tar": tar(files)}))
    else:
        for name, data in files.items():
            write(str(tmp_path / "src/train" / WNIDS[1] / name), data)
        os.symlink("nowhere", tmp_path / "src/train" / WNIDS[1] / "link.JPEG")
    return tmp_path / "src"


@pytest.mark.parametrize("layout", ["official", "folders"])
@pytest.mark.parametrize("resize", [0, 24])
def test_odd_and_broken_files(layout, resize, tmp_path, capsys):
    """CMYK, grayscale, a PNG named .JPEG, corrupt EXIF: taken. Cut off, empty, no picture: skipped, counted
    and named."""
    folder = prepare(tmp_path, odd_source(layout, tmp_path), resize=resize)
    out, pairs = capsys.readouterr().out, Pairs(str(tmp_path), "imagenet", "train")
    broken = {*BROKEN, *(["link.JPEG"] if layout == "folders" else [])}
    counts = pairs.meta["splits"]["train"]
    assert counts["skipped"] == len(broken) == len(counts["skipped_files"])
    assert {os.path.basename(s.partition(":")[0]) for s in counts["skipped_files"]} == broken
    assert not [s for s in counts["skipped_files"] if " at 0x" in s] # the same text in each run
    assert all(f"skipped {s}" in out for s in counts["skipped_files"])
    assert len(pairs.images) == sum(EXPECTED["train"].values()) + len(ODD) == counts["images"]
    images = [decode(pairs.images[i]) for i in range(len(pairs.images))]
    assert {min(image.size) for image in images} == {resize or 30}
    assert (24, 32) in {i.size for i in images} or not resize # turned by its EXIF
    if not resize:
        assert content(pairs) == EXPECTED["train"] + Counter((1, data) for data in ODD.values())
    assert os.path.exists(os.path.join(folder, "meta.json"))


def test_resize(tmp_path, at):
    """The shorter side; aspect kept; never enlarged; the quality asked for; any number of workers gives the
    same."""
    build("folders", tmp_path / "src")
    small, large = picture(1, (50, 20)), picture(2, (90, 300))
    write(str(tmp_path / "src/train" / WNIDS[0] / "small.png"), small)
    write(str(tmp_path / "src/train" / WNIDS[0] / "large.png"), large)
    folders = [prepare(tmp_path / str(n), tmp_path / "src", resize=24, num_workers=n) for n in (0, 2)]
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


@pytest.mark.parametrize("layout, limit", [("official", 0), ("folders", 0), ("hugging face", 0),
                                           ("official", 9), ("hugging face", 9)])
def test_stopped_anywhere(layout, limit, at, tmp_path, monkeypatch, capsys):
    """Stopped after any number of records, in the middle of one: the next run makes what an undisturbed one
    makes."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    source = odd_source(layout, tmp_path) if layout != "hugging face" else at(layout)
    whole = files_of(prepare(tmp_path / "whole", source, limit=limit))
    write_record, rng, left = RecordWriter.write, random.Random(0), [0]

    def dies(self, record):
        left[0] = left[0] or rng.randint(2, 7)
        left[0] -= 1
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
            with pytest.raises(SystemExit, match="half-written.*python prepare_imagenet.py --data=imagenet"):
                Pairs(str(tmp_path / str(count)), "imagenet", "val")
        monkeypatch.setattr(prepare_imagenet.Growing, "close", close)
        assert files_of(prepare(tmp_path / str(count), at("folders"))) == whole


def test_torn_archives_are_named_and_mended(at, tmp_path, monkeypatch):
    """Half a download, or a tar that ends exactly between two members, ends the run with its name; with the
    whole file in its place the run goes on."""
    monkeypatch.setattr(prepare_imagenet, "COMMIT_SECONDS", -1)
    for layout, name in (("hugging face", "data/train_images_3.tar.gz"),
                         ("half extracted", "train/n03018349.tar")):
        source = at(layout)
        whole, path = files_of(prepare(tmp_path / layout / "whole", source)), os.path.join(source, name)
        data = open(path, "rb").read()
        cuts = [len(data) // 2]
        if layout == "half extracted":
            cuts += [m.offset for m in tarfile.open(path).getmembers()][1:]
        for size in cuts:
            write(path, data[:size])
            said = message(tmp_path / layout, source)
            assert os.path.basename(name) in said and "Half a download" in said, said
        write(path, data)
        assert files_of(prepare(tmp_path / layout, source)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random(workers, tmp_path):
    """SIGKILL at random moments, five times: the same files as undisturbed, and no process is left behind."""
    rng, source, folder = random.Random(workers), tmp_path / "src", tmp_path / "killed/imagenet"
    for split, n in (("train", 120), ("val", 20)):
        for c, w in enumerate(WNIDS):
            write(f"{source}/{split}/{w}.tar",
                  tar({f"{w}_{i}.JPEG": picture((c, i), (400, 300)) for i in range(n)}))
    code = ("import prepare_imagenet as p; p.NUM_CLASSES, p.COMMIT_SECONDS = 4, 0.01\n"
            "if __name__ == '__main__': p.main(p.get_args())")

    def start(name):
        command = [f"--data_dir={tmp_path / name}", f"--source={source}", "--resize=200",
                   f"--num_workers={workers}"]
        return subprocess.Popen([sys.executable, "-c", code, *command], cwd=REPO, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def written():
        return (folder / "begun.json").read_bytes() if (folder / "begun.json").exists() else b""
    assert "wrote" in start("whole").communicate()[0]
    for kill in range(5):
        run, before = start("killed"), written()
        while run.poll() is None and written() == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(run.pid, signal.SIGKILL)
        out, _ = run.communicate(timeout=60) # which ends when the workers have, that hold the pipe too
        assert ("going on" in out) == (kill > 0) and "wrote" not in out, out
    out, _ = start("killed").communicate()
    assert "wrote" in out and "going on" in out
    assert files_of(folder) == files_of(tmp_path / "whole/imagenet")


# -----------------------------------------------------------------------------
# wrong input: named before anything is written


@pytest.mark.parametrize("victim, data, said", [
    ("official/ILSVRC2012_img_train.tar", b"<html>sign in</html>" * 99,
     r"ILSVRC2012_img_train\.tar cannot be read.*another file"),
    ("official/ILSVRC2012_img_train.tar", tar({"x.txt": b"x", "y.txt": b"y"}), r"img_train\.tar: 0 classes"),
    ("official/ILSVRC2012_img_train.tar", tar(dict(list(train_tars().items())[:3])),
     r"img_train\.tar: 3 classes \(n01440764.*has 4"),
    ("official/ILSVRC2012_img_train.tar", tar(train_tars())[:30_000], r"img_train\.tar cannot be read"),
    ("official/ILSVRC2012_img_val.tar", tar({"ILSVRC2012_val_00000001.JPEG": picture(1)}),
     r"img_val\.tar: 1 classes"),
    ("official/ILSVRC2012_img_val.tar", tar({"other.txt": b"x"}), "nothing says which class"),
    ("official/LOC_val_solution.csv", None, "Put Kaggle's LOC_val_solution.csv"),
    ("kaggle/LOC_val_solution.csv", b"a,b\n1\n\n,\n", "nothing says which class"),
    ("folders/train/n01440764", None, "train/<class>.*: 3 classes"),
    ("folders/train/n01440764", {}, "n01440764 is a class without pictures"),
    ("folders/val", {f"{w}_/{w}.JPEG": picture(1) for w in WNIDS}, r"val/<class>.*: 4 classes \(n01440764_"),
    ("hugging face/data/val_images.tar.gz", tar({"a.JPEG": b""}, "w:gz")[:20],
     r"val_images\.tar\.gz cannot be read")])
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


def test_wrong_flags(at, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    source = at("folders")
    for words, said in ((dict(), "needs --source=DIR.*--help"),
                        (dict(data="cifra10"), "did you mean --data=cifar10"),
                        (dict(source=tmp_path / "file"), "is no folder"),
                        (dict(source=tmp_path / "none"), "is no folder"),
                        (dict(data="../x"), "no name for a folder"),
                        (dict(source=source, data="folders"), "lies where the result goes"),
                        (dict(source=source + "/train", data="own"),
                         "no pictures of train, val or test in .*There is: .*n01440764"),
                        (dict(source=source, data="cifar10"), "holds neither cifar-10-python.tar.gz")):
        assert re.search(said, message(tmp_path, **words), re.S), words


def test_prepared_twice(at, tmp_path, capsys):
    folder = prepare(tmp_path, at("folders"), limit=8)
    before = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}
    prepare(tmp_path, limit=8) # the source may be gone by now
    assert "already prepared" in (out := capsys.readouterr().out) and re.search(r"^train +8 +4 ", out, re.M)
    for flag, value in (("resize", 20), ("limit", 4)):
        assert re.search(f"{flag}=.*Remove it.*{flag}={value}",
                         message(tmp_path, at("folders"), **{"limit": 8, flag: value}))
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
    x, y = ([np.asarray(decode(s.images[i])).mean(-1).ravel() for i in range(400)] for s in splits.values())
    x, y = np.array(x), np.array(y)
    # the nearest in train: labels belong to their pictures
    near = np.argmin((x ** 2).sum(-1) - 2 * y @ x.T, 1)
    assert (splits["train"].labels[near] == splits["test"].labels[:400]).mean() > 0.9
    prepare(tmp_path / "few", data="digits", limit=20)
    assert np.bincount(Pairs(str(tmp_path / "few"), "digits", "test").labels).tolist() == [2] * 10
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in message(tmp_path / "other", data="digits")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch):
    """torchvision's layouts with pictures and checksums of our own: the archive, what it unpacks to, and half
    of it."""
    from torchvision import datasets
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    rng, key = np.random.default_rng(0), "labels" if name == "cifar10" else "fine_labels"
    names, files = [f"thing {i}" for i in range(int(name[5:]))], {}
    batches = {batch: {"data": rng.integers(0, 256, (20, 3072), np.uint8),
                       key: rng.integers(0, len(names), 20).tolist(), "coarse_labels": [0] * 20}
               for batch, _ in reader.train_list + reader.test_list}
    for batch, value in {**batches, reader.meta["filename"]: {reader.meta["key"]: names}}.items():
        files[f"{reader.base_folder}/{batch}"] = pickle.dumps(value)
    def checked(entries):
        return [[batch, hashlib.md5(files[f"{reader.base_folder}/{batch}"]).hexdigest()]
                for batch, _ in entries]
    archive, meta_md5 = tar(files, "w:gz"), checked([[reader.meta["filename"], ""]])[0][1]
    for attribute, value in (("train_list", checked(reader.train_list)),
                             ("test_list", checked(reader.test_list)),
                             ("tgz_md5", hashlib.md5(archive).hexdigest()),
                             ("meta", {**reader.meta, "md5": meta_md5}),
                             ("url", "http://127.0.0.1:9/nothing")):
        monkeypatch.setattr(reader, attribute, value)
    write(str(tmp_path / "src" / reader.filename), archive)
    prepare(tmp_path, tmp_path / "src", data=name) # unpacks
    again = prepare(tmp_path / "again", tmp_path / "src" / reader.base_folder, data=name)
    for split, count, batch in (("train", 20 * len(reader.train_list), reader.train_list[0][0]),
                                ("test", 20, reader.test_list[0][0])):
        pairs = Pairs(str(tmp_path), name, split)
        assert len(pairs.images) == count and pairs.meta["classes"] == names \
            and pairs.labels[:20].tolist() == batches[batch][key]
        assert (np.asarray(decode(pairs.images[3])).transpose(2, 0, 1).ravel() ==
                batches[batch]["data"][3]).all()
        assert pairs.images[0][:4] == b"\x89PNG"
    assert os.path.exists(f"{again}/test_labels.npy") and not os.path.exists(f"{again}/val_labels.npy")
    write(str(tmp_path / "half" / reader.filename), archive[:1000])
    assert f"{reader.filename} cannot be had at" in message(tmp_path / "new", tmp_path / "half", data=name)
