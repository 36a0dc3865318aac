"""
Pairs from files laid out as COCO's, Flickr30K's, Conceptual Captions' and SBU's, and from one's own;
training on several sets.

    pytest tests/test_pairs.py
"""
import csv
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import distill_multimodal
import evaluate
import prepare_pairs
from conftest import shape_png
from model import load_checkpoint
from prepare_pairs import Pairs, decode, open_pairs
from server import Server, picture

FAST = ["--threads=4", "--timeout=2", "--tries=1", "--min_side=8"]


def prepare(*words):
    prepare_pairs.main(prepare_pairs.get_args([*words, *FAST]))


def used(data_dir, data):
    with open(os.path.join(data_dir, data, "used.tsv"), encoding="utf-8") as f:
        return list(csv.DictReader(f, delimiter="\t"))


def of(image):
    """The number of a picture() from its bytes."""
    r, g, b = decode(image).getpixel((0, 0))
    assert b == 7
    return r + 256 * g


def sentences(n, count, first):
    return [{"tokens": ["picture", str(n)], "raw": f"Picture {n}, caption {c}. ", "imgid": n,
             "sentid": first + c}
            for c in range(count)]


COCO_SPLITS = ["train", "restval", "val", "test"] # COCO's train lies in train2014, the rest in val2014


def coco_json(count):
    """dataset_coco.json: each fifth image has six captions, the others five."""
    images, sentid = [], 0
    for n in range(count):
        split = COCO_SPLITS[n % 4]
        folder = "train2014" if split == "train" else "val2014"
        captions = sentences(n, 5 + (n % 5 == 0), sentid)
        sentid += len(captions)
        images.append({"filepath": folder, "filename": f"COCO_{folder}_{1000 + n:012d}.jpg", "imgid": n,
                       "split": split, "sentids": [s["sentid"] for s in captions], "sentences": captions,
                       "cocoid": 1000 + n})
    return {"dataset": "coco", "images": images}


def write_coco(folder, count=40, zipped=True, inside=True):
    """train2014.zip and val2014.zip, caption_datasets.zip."""
    content = coco_json(count)
    for part in ("train2014", "val2014"):
        files = {x["filename"]: picture(x["imgid"]) for x in content["images"] if x["filepath"] == part}
        if zipped:
            with zipfile.ZipFile(os.path.join(folder, f"{part}.zip"), "w") as z:
                z.writestr(f"{part}/", b"")
                for name, data in files.items():
                    z.writestr(f"{part}/{name}", data)
        else:
            os.makedirs(os.path.join(folder, part))
            for name, data in files.items():
                with open(os.path.join(folder, part, name), "wb") as f:
                    f.write(data)
    if inside:
        with zipfile.ZipFile(os.path.join(folder, "caption_datasets.zip"), "w") as z:
            z.writestr("dataset_coco.json", json.dumps(content))
            z.writestr("dataset_flickr8k.json", "{}")
    else:
        with open(os.path.join(folder, "dataset_coco.json"), "w") as f:
            json.dump(content, f)
    return content


@pytest.mark.parametrize("zipped, inside", [(True, True), (False, False)])
def test_coco(tmp_path, zipped, inside, capsys):
    """As archives or unpacked; restval counts as training; all captions, also the sixth; raw text on one
    line."""
    content = write_coco(tmp_path, 40, zipped, inside)
    prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    out = capsys.readouterr().out
    lines = {(line["split"], int(line["image"])): line for line in used(tmp_path / "data", "coco")}
    counts = {}
    for split in ("train", "val", "test"):
        pairs = Pairs(str(tmp_path / "data"), "coco", split)
        counts[split] = len(pairs.images), len(pairs.captions)
        for i in range(len(pairs.images)):
            n = of(pairs.images[i])
            image = content["images"][n]
            assert image["split"].replace("restval", "train") == split
            own = [pairs.captions[j] for j in np.flatnonzero(pairs.text_to_image == i)]
            assert own == [f"Picture {n}, caption {c}." for c in range(5 + (n % 5 == 0))]
            assert lines[split, i]["id"] == str(image["cocoid"])
            assert lines[split, i]["where"] == f"{image['filepath']}/{image['filename']}"
    assert counts == {"train": (20, 104), "val": (10, 52), "test": (10, 52)} and len(lines) == 40
    # words a caption, captions an image, images, pairs: the columns of the thesis' table 2
    assert "train               4.0             5.2          20         104" in out
    with open(tmp_path / "data" / "coco" / "meta.json") as f:
        meta = json.load(f)
    assert meta["splits"]["train"]["captions_per_image"] == 5.2 and "CC BY 4.0" in meta["license"]


def test_coco_that_is_not_all_there(tmp_path, monkeypatch):
    write_coco(tmp_path)
    os.remove(tmp_path / "val2014.zip")
    asked = []

    def download(url, path):
        asked.append(url)
        raise SystemExit("no network")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_pairs, "download", download)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e12, 0, 1e12))
    with pytest.raises(SystemExit, match="no network"):
        prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    with pytest.raises(SystemExit, match="no network"):
        prepare("--data=coco", f"--data_dir={tmp_path}/data")
    assert asked == ["http://images.cocodataset.org/zips/val2014.zip",
                     "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e12, 0, 1e6))
    with pytest.raises(SystemExit, match="val2014.zip has no room for it"):
        prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "train2014.zip").write_bytes((f / "train2014.zip").read_bytes()[:5000]),
     "train2014.zip cannot be read as the list it should be .*BadZipFile.*Half a download"),
    (lambda f: (f / "caption_datasets.zip").write_bytes(b"PK"), "caption_datasets.zip cannot be read"),
    (lambda f: (f / "dataset_coco.json").write_text('{"images": [{"filename": "a"}]}'), "KeyError: 'imgid'"),
    (lambda f: (f / "dataset_coco.json").write_text("[]"), "dataset_coco.json cannot be read"),
    (lambda f: (f / "dataset_coco.json").write_text(json.dumps(coco_json(4)).replace("restval", "dev")),
     "the split 'dev', which"),
    (lambda f: (f / "dataset_coco.json").write_text('{"images": []}'), "no training picture")])
def test_damaged_lists(tmp_path, spoil, said):
    write_coco(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=said):
        prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    assert not os.path.exists(tmp_path / "data" / "coco" / "meta.json")


def test_broken_pictures_are_counted(tmp_path, capsys):
    """A picture that is missing, cut short, or bent inside the archive: its captions go with it."""
    content = write_coco(tmp_path)
    names = [x["filename"] for x in content["images"] if x["filepath"] == "train2014"]
    with zipfile.ZipFile(tmp_path / "train2014.zip", "w") as z:
        z.writestr(f"train2014/{names[1]}", picture(4)[:800])
        z.writestr(f"train2014/{names[2]}", b"")
        for name in names[3:]:
            z.writestr(f"train2014/{name}", picture(8))
    data = bytearray((tmp_path / "train2014.zip").read_bytes())
    data[data.index(picture(8)) + 900] ^= 255 # the archive's checksum sees it
    (tmp_path / "train2014.zip").write_bytes(data)
    prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    with open(tmp_path / "data" / "coco" / "meta.json") as f:
        meta = json.load(f)
    assert meta["failed"] == {"no such file": 1, "damaged": 2, "empty": 1}
    assert (meta["splits"]["train"]["images"] == 16
            and "4 of 40 rows did not become pairs" in capsys.readouterr().out)


def test_flickr30k(tmp_path):
    images = [{"sentids": [], "imgid": n, "sentences": sentences(n, 5, 5 * n), "filename": f"{900 + n}.jpg",
               "split": ["train", "train", "val", "test"][n % 4]} for n in range(16)]
    with open(tmp_path / "dataset_flickr30k.json", "w") as f:
        json.dump({"dataset": "flickr30k", "images": images}, f)
    words = ["--data=flickr30k", f"--source={tmp_path}/dataset_flickr30k.json", f"--data_dir={tmp_path}/data"]
    with pytest.raises(SystemExit, match="by request only: https://forms.*--images="):
        prepare(*words)
    os.mkdir(tmp_path / "pictures")
    for n in range(16):
        (tmp_path / "pictures" / f"{900 + n}.jpg").write_bytes(picture(n))
    prepare(*words, f"--images={tmp_path}/pictures")
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        pairs = Pairs(str(tmp_path / "data"), "flickr30k", split)
        assert (len(pairs.images), len(pairs.captions)) == (count, 5 * count)
        assert all(f"Picture {of(pairs.images[i])}," in pairs.captions[j]
                   for j, i in enumerate(pairs.text_to_image))


def test_resized(tmp_path):
    """--resize: the shorter side, never enlarged; what is stored is a JPEG then."""
    os.mkdir(tmp_path / "p")
    for name, size in (("a", (600, 400)), ("b", (400, 600)), ("c", (100, 90)), ("d", (2000, 1000)),
                       ("e", (90, 99))):
        (tmp_path / "p" / f"{name}.png").write_bytes(picture(1, "JPEG", size))
    with open(tmp_path / "list.csv", "w") as f:
        f.write("image,caption,split\n" + "".join(f"{n}.png,{n},{'val' if n == 'e' else 'train'}\n"
                                                  for n in "abcde"))
    prepare("--data=mine", f"--source={tmp_path}/list.csv", f"--images={tmp_path}/p",
            f"--data_dir={tmp_path}", "--resize=200")
    pairs = Pairs(str(tmp_path), "mine", "train")
    sizes = {pairs.captions[j]: Image.open(io.BytesIO(pairs.images[i])).size
             for j, i in enumerate(pairs.text_to_image)}
    assert sizes == {"a": (300, 200), "b": (200, 300), "c": (100, 90), "d": (400, 200)}


# -----------------------------------------------------------------------------
# lists of urls


def urls_of(server, numbers, answers=("png", "png", "png", "none")):
    return [f"{server.url}/{answers[n % len(answers)]}/{n}" for n in numbers]


def check_urls(data_dir, data, captions, splits):
    """Each good url is there once, under its caption, in its split."""
    lines = used(data_dir, data)
    assert Counter(line["where"] for line in lines) == Counter(u for u in captions if "/png/" in u)
    for line in lines:
        pairs = Pairs(str(data_dir), data, line["split"])
        i = int(line["image"])
        assert pairs.images[i] == picture(int(line["where"].rpartition("/")[2]))
        assert pairs.captions[np.flatnonzero(pairs.text_to_image == i)[0]] == captions[line["where"]]
        assert splits is None or line["split"] == splits[line["where"]]
    return lines


def test_cc3m(tmp_path):
    """Caption first; the validation list beside it is the validation split."""
    with Server() as server:
        train, val = urls_of(server, range(60)), urls_of(server, range(100, 120))
        captions = {url: f"a person {n} , in the field ." for n, url in enumerate(train + val)}
        for name, urls in (("Train_GCC-training.tsv", train), ("Validation_GCC-1.1.0-Validation.tsv", val)):
            (tmp_path / name).write_text("".join(f"{captions[u]}\t{u}\n" for u in urls))
        prepare("--data=cc3m", f"--source={tmp_path}", f"--data_dir={tmp_path}/data", "--allow_private")
    lines = check_urls(tmp_path / "data", "cc3m", captions,
                       {u: "train" if u in train else "val" for u in captions})
    assert {line["id"] for line in lines if line["split"] == "val"} == {f"val-{n}" for n in range(20)
                                                                        if n % 4 != 3}


def test_cc3m_needs_its_list(tmp_path):
    with pytest.raises(SystemExit, match="does not hold, Train.GCC-training.tsv"):
        prepare("--data=cc3m", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")


def test_columns_the_wrong_way_round(tmp_path):
    (tmp_path / "cc12m.tsv").write_text("a caption\thttp://example.org/a.jpg\n" * 3)
    with pytest.raises(SystemExit, match="no url in column 1 of the first lines"):
        prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")


@pytest.mark.parametrize("packed", [False, True])
def test_sbu(tmp_path, packed):
    with Server() as server:
        urls = urls_of(server, range(80))
        captions = {url: f"My cat {n} on the sofa" for n, url in enumerate(urls)}
        content = json.dumps({"image_urls": urls, "captions": list(captions.values()),
                              "user_ids": ["x"] * 80})
        if packed:
            with tarfile.open(tmp_path / "sbu-captions-all.tar.gz", "w:gz") as tar:
                info = tarfile.TarInfo("dataset/sbu-captions-all.json")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
        else:
            (tmp_path / "sbu-captions-all.json").write_text(content)
        prepare("--data=sbu", f"--source={tmp_path}", f"--data_dir={tmp_path}/data", "--allow_private")
    lines = check_urls(tmp_path / "data", "sbu", captions, None)
    assert {line["id"] for line in lines} == {str(n) for n in range(80) if n % 4 != 3}
    (tmp_path / "sbu-captions-all.json").write_text('{"image_urls": ["a"], "captions": []}')
    with pytest.raises(SystemExit, match="1 urls and 0 captions"):
        prepare("--data=sbu", f"--source={tmp_path}/sbu-captions-all.json", f"--data_dir={tmp_path}/more")


# -----------------------------------------------------------------------------
# one's own


def write_own(folder, name):
    """Thirty pictures in a/, two captions for each third, in a table of that name."""
    os.makedirs(folder / "a", exist_ok=True)
    rows = []
    for n in range(30):
        (folder / "a" / f"{n}.png").write_bytes(picture(n))
        split = "val" if n % 10 == 0 else "test" if n % 10 == 1 else "train"
        rows += [(f"a/{n}.png", f'said "{n}", twice: {k}', split) for k in range(1 + (n % 3 == 0))]
    if name.endswith(".jsonl"):
        grouped = {}
        for path, caption, split in rows:
            grouped.setdefault(path, {"file_name": path, "text": [], "split": split})["text"].append(caption)
        (folder / name).write_text("".join(json.dumps(x) + "\n" for x in grouped.values()))
    else:
        with open(folder / name, "w", newline="", encoding="utf-8-sig" if "csv" in name else "utf-8") as f:
            table = [("Image", "caption", "split"), *rows]
            if name.endswith(".tsv"): # no quoting: a quote is a quote
                f.writelines("\t".join(row) + "\n" for row in table)
            else:
                csv.writer(f).writerows(table)
    return rows


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "metadata.jsonl"])
def test_own(tmp_path, name):
    rows = write_own(tmp_path, name)
    prepare("--data=folder", f"--source={tmp_path}/{name}", f"--data_dir={tmp_path}/data")
    found = []
    for split in ("train", "val", "test"):
        pairs = Pairs(str(tmp_path / "data"), "folder", split)
        found += [(f"a/{of(pairs.images[i])}.png", pairs.captions[j], split)
                  for j, i in enumerate(pairs.text_to_image)]
    assert sorted(found) == sorted(rows)


def test_own_urls(tmp_path):
    """A table may name urls, and files beside them."""
    with Server() as server:
        (tmp_path / "0.png").write_bytes(picture(0))
        lines = [{"url": "0.png", "caption": "number 0", "split": "train"}, {"url": None, "caption": "x"},
                 {"caption": "y"}]
        lines += [{"url": f"{server.url}/png/{n}", "caption": f"number {n}",
                   "split": "val" if n == 7 else None} for n in range(1, 40)]
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        prepare("--data=mine", f"--source={tmp_path}/urls.jsonl", f"--data_dir={tmp_path}/data",
                "--allow_private")
    found = {}
    for split in ("train", "val"):
        pairs = Pairs(str(tmp_path / "data"), "mine", split)
        found |= {of(pairs.images[i]): pairs.captions[j] for j, i in enumerate(pairs.text_to_image)}
    assert found == {n: f"number {n}" for n in range(40)}


def test_own_pictures_stay_in_their_folder(tmp_path):
    """Paths that lead out of it are not read."""
    write_own(tmp_path, "captions.csv")
    (tmp_path / "secret.png").write_bytes(picture(99))
    with open(tmp_path / "captions.csv", "a") as f:
        f.write(f"../secret.png,x,train\n{tmp_path}/secret.png,y,train\n"
                "a/../../secret.png,z,train\nnone.png,w,train\n")
    prepare("--data=mine", f"--source={tmp_path}/captions.csv", f"--images={tmp_path}",
            f"--data_dir={tmp_path}/data")
    with open(tmp_path / "data" / "mine" / "meta.json") as f:
        assert json.load(f)["failed"] == {"outside the folder": 2, "no such file": 1} # two are one path


def test_captions_that_are_none(tmp_path):
    """null and objects are no captions; numbers are. ./a and a are one picture."""
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    lines = [{"image": "0.png", "captions": ["x", None]}, {"image": "1.png", "captions": {"en": "a dog"}},
             {"image": "2.png", "captions": 7}, {"image": "./0.png", "captions": "again"},
             {"image": "3.png", "captions": None}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({**x, "split": "train"}) + "\n" for x in lines))
    prepare("--data=mine", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    pairs = Pairs(str(tmp_path / "data"), "mine", "train")
    assert sorted(pairs.captions[:]) == ["7", "again", "x"] and len(pairs.images) == 2
    with open(tmp_path / "data" / "mine" / "meta.json") as f:
        assert json.load(f)["failed"] == {"no caption": 2}


def test_the_source_that_was_named_is_read(tmp_path):
    """Never another file that lies beside it."""
    write_own(tmp_path, "captions.csv")
    (tmp_path / "other.jsonl").write_text('{"image": "a/5.png", "caption": "other", "split": "train"}\n')
    prepare("--data=mine", f"--source={tmp_path}/other.jsonl", f"--data_dir={tmp_path}/data")
    assert Pairs(str(tmp_path / "data"), "mine", "train").captions[:] == ["other"]
    for source, said in (("captoins.csv", "captoins.csv is not there"),
                         (".", "holds captions.csv, other.jsonl: give one")):
        with pytest.raises(SystemExit, match=said):
            prepare("--data=more", f"--source={tmp_path}/{source}", f"--data_dir={tmp_path}/data")
    (tmp_path / "part1.tsv").write_text("http://127.0.0.1:1/a\ta\n")
    (tmp_path / "cc12m.tsv").write_text("http://127.0.0.1:1/a\ta\nhttp://127.0.0.1:1/b\tb\n")
    args = prepare_pairs.get_args(["--data=cc12m", f"--source={tmp_path}/part1.tsv"])
    assert len(list(prepare_pairs.find_tsv(args).rows())) == 1


def test_rare_letters_leave_room_for_words():
    """Captions in more letters than the vocabulary has tokens."""
    captions = ["a red apple on a table", "the red house"] * 50 + [chr(0x4E00 + n) for n in range(3000)]
    vocab = json.loads(prepare_pairs.train_wordpiece(captions, 1500))["model"]["vocab"]
    assert len(vocab) <= 1500 and {"red", "apple", "table"} <= set(vocab)


@pytest.mark.parametrize("text, said", [
    ("image,caption\nx.png,\"y\nz.png,w\n", "unexpected end of data"),
    ("a,b\nx.png,y\n", "has the columns 'a', 'b', none of image, file_name"),
    ("image,title\nx.png,y\n", "none of caption, captions, text"), ("", r"has the columns \(none\)"),
    ("image,caption,split\nx.png,y,trian\n", "row 1: split 'trian' is none of train, val, test"),
    ("image,caption,split\nx.png,y,train\nx.png,z,val\n", "row 2: x.png is in two splits"),
    ("image,caption\nnone.png,y\n", "no training picture")])
def test_own_tables_that_are_wrong(tmp_path, text, said):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SystemExit, match=said):
        prepare("--data=mine", f"--source={tmp_path}/list.csv", f"--data_dir={tmp_path}/data")


@pytest.mark.parametrize("words, said", [
    ("--data=mine", "is none of openmoji, coco.*--source=captions.csv"),
    ("--data=mine --source=none", "none is not there"),
    ("--data=../x --source=none", "no name for a folder"), ("--data=cifar10", "made by prepare_imagenet.py"),
    ("--resize=256", "--resize is not for openmoji"), ("--data=coco --size=64", "--size is for openmoji"),
    ("--data=sbu --source=none", "none is not there")])
def test_flags_that_are_wrong(tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        prepare_pairs.main(prepare_pairs.get_args([*words.split(), f"--data_dir={tmp_path}/data"]))
    assert os.listdir(tmp_path) in ([], ["data"])


def test_captions_are_lines_of_text():
    assert prepare_pairs.clean(" a\tb\r\n\x00c\x1b[0m\u2028d ") == "a b c [0m d"
    assert prepare_pairs.clean("é ü שלום 火 \U0001f600") == "é ü שלום 火 \U0001f600"
    assert len(prepare_pairs.clean("word " * 300_000)) <= 2000 and prepare_pairs.clean(7) == "7"


# -----------------------------------------------------------------------------
# what is stored, and training on it


@pytest.mark.parametrize("mode, kind, stored", [
    ("RGB", "JPEG", "JPEG"), ("L", "JPEG", "JPEG"), ("CMYK", "JPEG", "JPEG"), ("RGBA", "PNG", "PNG"),
    ("P", "GIF", "JPEG"), ("RGB", "WEBP", "JPEG"), ("RGB", "BMP", "JPEG"), ("RGB", "TIFF", "JPEG")])
def test_records_are_jpeg_or_png(mode, kind, stored):
    data = io.BytesIO()
    Image.open(io.BytesIO(picture(3, size=(40, 30)))).convert(mode).save(data, kind)
    record = prepare_pairs.to_record(data.getvalue())
    image = Image.open(io.BytesIO(record))
    assert (image.format, image.size) == (stored, (40, 30)) and decode(record).mode == "RGB"
    assert (record == data.getvalue()) == (kind == stored)


def test_postscript_is_no_picture():
    """PIL would start Ghostscript for it."""
    with pytest.raises(prepare_pairs.Bad, match="not a picture"):
        prepare_pairs.to_record(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"
                                b"%%EndComments\nshowpage\n")


def write_shapes(folder, count, seed):
    """A table of one's own of coloured shapes with their names."""
    rng, colours, shapes = (np.random.default_rng(seed), ["red", "green", "blue"],
                            ["square", "circle", "triangle"])
    os.makedirs(folder)
    with open(folder / "captions.csv", "w") as f:
        f.write("image,caption,split\n")
        for n in range(count):
            colour, shape = colours[n % 3], shapes[n // 3 % 3]
            (folder / f"{n}.png").write_bytes(shape_png(colour, shape, rng))
            f.write(f"{n}.png,a {colour} {shape} {seed},"
                    f"{'test' if n % 9 == 0 else 'val' if n % 9 == 1 else 'train'}\n")


def test_several_sets_train_together(tmp_path, capsys):
    """--data=coco,shapes,urls: joined in order; validated on the first that has a split for it, tested on the
    first; the checkpoint comes with the first one's tokeniser."""
    data_dir = str(tmp_path / "data")
    write_shapes(tmp_path / "one", 54, 1)
    write_shapes(tmp_path / "two", 90, 2)
    for name in ("one", "two"):
        prepare(f"--data={name}", f"--source={tmp_path / name}", f"--data_dir={data_dir}")
    joined = open_pairs(data_dir, "one,two", "train")
    one, two = (Pairs(data_dir, name, "train") for name in ("one", "two"))
    assert (len(joined.images), len(joined.captions)) == (42 + 70, 42 + 70) and joined.labels is None
    for j, i in enumerate(joined.text_to_image):
        part, jj = (one, j) if j < 42 else (two, j - 42)
        assert (joined.captions[j] == part.captions[jj]
                and joined.images[i] == part.images[part.text_to_image[jj]])
    assert len(open_pairs(data_dir, "one,two", "val").images) == 6
    for split in ("val", "test"):
        os.remove(os.path.join(data_dir, "one", f"{split}_images.idx"))
    assert len(open_pairs(data_dir, "one,two", "val").images) == 10
    with pytest.raises(SystemExit, match="data set three"):
        open_pairs(data_dir, "one,three", "train")

    args = ["--preset=tiny", "--data=two,one", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out",
            "--unit=caption", "--kd_loss=none", "--image_init=random", "--img_size=32", "--patch_size=8",
            "--embed_dim=32", "--num_heads=2", "--depth=1", "--text_depth=1", "--batch_size=32",
            "--max_steps=4", "--device=cpu", "--num_workers=1", "--micro_batch_size=16"]
    distill_multimodal.main(distill_multimodal.get_args(args))
    out = capsys.readouterr().out
    assert "112 training images, 112 captions; validation 10 and 10" in out and "--data=two --data_dir" in out
    model = load_checkpoint(f"{tmp_path}/out/ckpt.pt")
    ids, mask = model.tokenizer.encode(["a red square 2"], 24)
    assert ids.shape[1] == 6 and model.encode_text(ids, mask).shape == (1, 32)


def test_from_urls_to_a_table(tmp_path, capsys):
    """COCO's layout, with photographs by url beside it: prepared, trained on together, evaluated."""
    write_coco(tmp_path, 48)
    data_dir = f"{tmp_path}/data"
    with Server() as server:
        (tmp_path / "cc12m.tsv").write_text("".join(f"{u}\tpicture {n}\n" for n, u in enumerate(urls_of(
            server, range(200, 260)))))
        prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={data_dir}", "--allow_private")
    prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={data_dir}")
    distill_multimodal.main(distill_multimodal.get_args(
        ["--preset=tiny", "--data=coco,cc12m", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out",
         "--unit=image", "--kd_loss=none", "--image_init=random", "--img_size=32", "--patch_size=8",
         "--embed_dim=32", "--num_heads=2", "--depth=1", "--text_depth=1", "--batch_size=16",
         "--max_steps=2", "--device=cpu"]))
    metrics = evaluate.main(["retrieval", f"--ckpt={tmp_path}/out/ckpt.pt", "--data=coco",
                             f"--data_dir={data_dir}", "--device=cpu"])["metrics"]
    assert 0 <= metrics["mean"] <= 100 and "no published rows" in capsys.readouterr().out
