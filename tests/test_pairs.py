"""
Pairs from files laid out as COCO's, Flickr30K's and SBU's, from Conceptual Captions' lists, and from people's
own tables.

    pytest tests/test_pairs.py
"""
import csv
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest

import prepare_pairs
from conftest import REPO
from prepare_imagenet import Pairs
from prepare_pairs import open_pairs
from server import Server, picture
from test_shards import content, number, write


def prepare(*words):
    prepare_pairs.main(prepare_pairs.get_args([*words, "--threads=4"]))


def meta_of(data_dir, data):
    with open(os.path.join(data_dir, data, "meta.json")) as f:
        return json.load(f)


def used(data_dir, data):
    with open(os.path.join(data_dir, data, "used.tsv"), encoding="utf-8") as f:
        return [line for line in csv.DictReader(f, delimiter="\t") if not line["cause"]]


def refused(said, *words):
    with pytest.raises(SystemExit, match=said):
        prepare(*words)


def sentences(n, count):
    return [{"raw": f"Picture {n}, caption {c}. ", "imgid": n} for c in range(count)]


# -----------------------------------------------------------------------------
# COCO, Flickr30K, SBU


def coco_json(count):
    """dataset_coco.json: each fifth image has six captions, the others five. COCO's train lies in train2014,
    the rest in val2014."""
    images = []
    for n in range(count):
        split = ["train", "restval", "val", "test"][n % 4]
        folder = "train2014" if split == "train" else "val2014"
        images.append({"filepath": folder, "filename": f"COCO_{folder}_{1000 + n:012d}.jpg", "imgid": n,
                       "split": split, "sentences": sentences(n, 5 + (n % 5 == 0)), "cocoid": 1000 + n})
    return {"dataset": "coco", "images": images}


def write_coco(folder, count=40, zipped=True):
    """train2014.zip, val2014.zip and caption_datasets.zip, or what they hold."""
    coco = coco_json(count)
    archives = {"caption_datasets": {"dataset_coco.json": json.dumps(coco)}, "train2014": {}, "val2014": {}}
    for x in coco["images"]:
        archives[x["filepath"]][f"{x['filepath']}/{x['filename']}"] = picture(x["imgid"])
    for name, files in archives.items():
        for file, data in files.items():
            if zipped:
                with zipfile.ZipFile(f"{folder}/{name}.zip", "a") as z:
                    z.writestr(file, data)
            else:
                write(f"{folder}/{file}", data)
    return coco


@pytest.mark.parametrize("zipped", [True, False])
def test_coco(tmp_path, zipped, capsys):
    """As archives or unpacked; restval counts as training; all captions, also the sixth; raw text on one
    line."""
    coco = write_coco(tmp_path, 40, zipped)
    prepare("--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    expected = {split: {} for split in ("train", "val", "test")}
    for x in coco["images"]:
        n, split = x["imgid"], x["split"].replace("restval", "train")
        expected[split][n] = [f"Picture {n}, caption {c}." for c in range(5 + (n % 5 == 0))]
    assert content(tmp_path / "data", "coco") == expected
    for line in used(tmp_path / "data", "coco"):
        n = number(Pairs(f"{tmp_path}/data", "coco", line["split"]).images[int(line["image"])])
        x = coco["images"][n]
        assert (line["id"], line["where"]) == (str(x["cocoid"]), f"{x['filepath']}/{x['filename']}")
    # words a caption, captions an image, images, pairs: the columns of the thesis' table 2
    assert "train               4.0             5.2          20         104" in capsys.readouterr().out
    assert "CC BY 4.0" in meta_of(tmp_path / "data", "coco")["license"]


def test_what_is_missing_has_two_addresses(tmp_path, monkeypatch):
    write_coco(tmp_path)
    os.remove(tmp_path / "val2014.zip")
    asked = []

    def download(url, path):
        asked.append(url)
        raise SystemExit("no network")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_pairs, "download", download)
    for words in ([f"--source={tmp_path}"], []):
        refused("no network", "--data=coco", f"--data_dir={tmp_path}/data", *words)
    assert asked == ["http://images.cocodataset.org/zips/val2014.zip",
                     "https://s3.amazonaws.com/images.cocodataset.org/zips/val2014.zip",
                     "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
                     "https://github.com/Delphboy/karpathy-splits/raw/main/dataset_coco.json"]


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "train2014.zip").write_bytes((f / "train2014.zip").read_bytes()[:5000]),
     "train2014.zip cannot"),
    (lambda f: (f / "dataset_coco.json").write_text('{"images": [{"filename": "a"}]}'), "KeyError: 'imgid'"),
    (lambda f: (f / "dataset_coco.json").write_text(json.dumps(coco_json(4)).replace("restval", "dev2")),
     "'dev2'"),
    (lambda f: (f / "dataset_coco.json").write_text('{"images": []}'), "no picture came of it")])
def test_damaged_lists(tmp_path, spoil, said):
    write_coco(tmp_path)
    spoil(tmp_path)
    refused(said, "--data=coco", f"--source={tmp_path}", f"--data_dir={tmp_path}/data")
    assert not os.path.exists(tmp_path / "data" / "coco" / "meta.json")


def test_flickr30k(tmp_path):
    images = [{"imgid": n, "sentences": sentences(n, 5), "filename": f"{900 + n}.jpg",
               "split": ["train", "train", "val", "test"][n % 4]} for n in range(16)]
    write(f"{tmp_path}/dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    words = ["--data=flickr30k", f"--source={tmp_path}/dataset_flickr30k.json", f"--data_dir={tmp_path}/data"]
    for n in range(16):
        write(f"{tmp_path}/pictures/{900 + n}.jpg", picture(n))
    prepare(*words, f"--images={tmp_path}/pictures")
    expected = {split: {x["imgid"]: [f"Picture {x['imgid']}, caption {c}." for c in range(5)]
                        for x in images if x["split"] == split} for split in ("train", "val", "test")}
    assert content(tmp_path / "data", "flickr30k") == expected


def check_urls(data_dir, data, captions, splits=None):
    """Each good url is there once, under its caption, in its split."""
    lines = used(data_dir, data)
    assert Counter(line["where"] for line in lines) == Counter(url for url in captions if "/png/" in url)
    for line in lines:
        pairs, i = Pairs(str(data_dir), data, line["split"]), int(line["image"])
        assert pairs.images[i] == picture(int(line["where"].rpartition("/")[2]))
        assert pairs.captions[np.flatnonzero(pairs.text_to_image == i)[0]] == captions[line["where"]]
        assert splits is None or line["split"] == splits[line["where"]]


def urls_of(server, numbers):
    return [f"{server.url}/{'none' if n % 4 == 3 else 'png'}/{n}" for n in numbers]


def test_sbu(tmp_path):
    with Server() as server:
        captions = {url: f"My cat {n} on the sofa" for n, url in enumerate(urls_of(server, range(40)))}
        write(f"{tmp_path}/sbu-captions-all.json",
              {"image_urls": list(captions), "captions": list(captions.values()), "user_ids": ["x"] * 40})
        prepare("--data=sbu", f"--source={tmp_path}", f"--data_dir={tmp_path}/data", "--allow_private")
    check_urls(tmp_path / "data", "sbu", captions)


def test_conceptual_captions_lists(tmp_path):
    """No names in the first line; caption first or url first; the validation list beside it is that split."""
    with Server() as server:
        train, val = urls_of(server, range(30)), urls_of(server, range(100, 110))
        captions = {url: f"a person {n} , in the field ." for n, url in enumerate(train + val)}
        for name, urls in (("Train_GCC-training.tsv", train), ("Validation_GCC-1.1.0-Validation.tsv", val)):
            write(f"{tmp_path}/{name}", "".join(f"{captions[u]}\t{u}\n" for u in urls))
        prepare("--data=cc3m", f"--source={tmp_path}", f"--data_dir={tmp_path}/data", "--allow_private")
        write(f"{tmp_path}/cc12m.tsv", "".join(f"{u}\t{captions[u]}\n" for u in train))
        prepare("--data=cc12m", f"--source={tmp_path}/cc12m.tsv", f"--data_dir={tmp_path}/data",
                "--allow_private")
    check_urls(tmp_path / "data", "cc3m", captions, {u: "train" if u in train else "val" for u in captions})
    check_urls(tmp_path / "data", "cc12m", {u: captions[u] for u in train})


# -----------------------------------------------------------------------------
# people's own tables: each of these was tried and stored wrong things, or was refused


ROWS = "".join(f"{n}.png,caption {n},{split}\n"
               for n, split in enumerate("train train train val test".split()))
THREE = {"train": {n: [f"caption {n}"] for n in range(3)}, "val": {3: ["caption 3"]},
         "test": {4: ["caption 4"]}}
HERE = "@" # stands for the folder of the pictures
TABLES = { # what -> name and content of the table, {split: {picture: captions}}, or why it is refused
    "a split in held-out rows only": ("t.jsonl", "\n".join(json.dumps(
        {"image": f"{n}.png", "caption": f"caption {n}",
         **({"split": ["val", "test"][n - 3]} if n > 2 else {})})
        for n in range(5)), THREE),
    "a comma in an unquoted cell": ("t.csv", "image,caption\n0.png,A dog\n1.png,A dog, and a cat\n",
                                    "row 2: 3 cells, and the first line has 2"),
    "a quote too many": ("t.csv", 'image,caption\n0.png,"a\n1.png,b\n', "cannot be read as the list"),
    "Excel's cp1252, and a line of UTF-8": (
        "t.csv", b"image,caption,split\n0.png,caf\xe9,train\n1.png,na\xefve \x96 x,train\n"
        b"3.png,caf\xc3\xa9,val\n",
        {"train": {0: ["café"], 1: ["naïve – x"]}, "val": {3: ["café"]}}),
    "UTF-16 with a mark": ("t.tsv", ("image\tcaption\tsplit\n" + ROWS.replace(",", "\t")).encode("utf-16"),
                           THREE),
    "soft hyphens and joiners": ("t.csv", "image,caption,split\n0.png,re\u00adfri\u200bger\u200dator,train\n"
                                 "3.png,می\u200cخواهم,val\n",
                                 {"train": {0: ["refrigerator"]}, "val": {3: ["میخواهم"]}}),
    "NaN and true": ("t.jsonl", '{"image": "0.png", "caption": [NaN, true, null, "a", 7], "split": "train"}\n'
                     '{"image": "1.png", "caption": NaN, "split": "train"}\n'
                     '{"image": "3.png", "caption": "b", "split": "dev"}',
                     {"train": {0: ["a", "7"]}, "val": {3: ["b"]}}),
    "pandas' .tsv: quotes, tabs and line ends in cells": (
        "t.tsv", 'image\tcaption\tsplit\n0.png\t"said ""hi"", twice"\ttrain\n1.png\t"two\nlines"\ttrain\n'
        '2.png\t"a\ttab"\ttrain\n3.png\t6" nails\tval\n',
        {"train": {0: ['said "hi", twice'], 1: ["two lines"], 2: ["a tab"]}, "val": {3: ['6" nails']}}),
    "a .tsv without quoting": ("t.tsv", 'image\tcaption\tsplit\n0.png\t"a" is b\ttrain\n1.png\t"c\ttrain\n'
                               '2.png\td"\ttrain\n3.png\te\tval\n',
                               {"train": {0: ['"a" is b'], 1: ['"c'], 2: ['d"']}, "val": {3: ["e"]}}),
    "a list in a cell, as JSON and as Python": (
        "t.csv", 'raw,sentids,split,filename,img_id\n"[""a dog"", ""it\'s a dog""]","[0, 1]",train,0.png,0\n'
        '"[\'a\', \'b\']","[2, 3]",train,1.png,1\n'
        '[CLS] x,[4],val,3.png,3\n', {"train": {0: ["a dog", "it's a dog"], 1: ["a", "b"]},
                                "val": {3: ["[CLS] x"]}}),
    "a caption in quotation marks": ("t.csv", 'image,caption,split\n0.png,"""Hi!""",train\n3.png,b,val\n',
                                     {"train": {0: ['"Hi!"']}, "val": {3: ["b"]}}),
    "a .json that is no list": ("t.json", "5", "cannot be read as the list"),
    "tabs in a .csv, open_clip's names": ("t.csv", "filepath\ttitle\tsplit\n" + ROWS.replace(",", "\t"),
                                          THREE),
    "Flickr's bars and blanks": ("t.csv", "image_name| comment_number| comment| split\n" + "".join(
        f"{n}.png| {k}| caption {n}{k}| {'val' if n == 3 else 'train'}\n" for n in (0, 3) for k in range(2)),
        {"train": {0: ["caption 00", "caption 01"]}, "val": {3: ["caption 30", "caption 31"]}}),
    "absolute paths inside --images": (
        "t.csv", "image,caption,split\n" + ROWS.replace("0.png", f"{HERE}/0.png"), THREE),
    "LAVIS' list": ("t.json", json.dumps([{"image": f"{n}.png", "caption": [f"caption {n}"], "split": split}
                                          for n, split in enumerate("train train train val test".split())]),
                    THREE),
    "other columns": ("t.csv", "a,b\n0.png,x\n", r"has the columns 'a', 'b'.*filename.*title"),
    "nothing": ("t.csv", "", r"has the columns \(none\)"),
    "another split": ("t.csv", "image,caption,split\n0.png,y,trian\n", "row 1: split 'trian' is none of"),
    "two splits": ("t.csv", "image,caption,split\n0.png,y,train\n./0.png,z,val\n",
                   "row 2: 0.png is in two splits"),
    "no file": ("t.csv", "image,caption\nnone.png,y\n", "no picture came of it")}


@pytest.mark.parametrize("what", TABLES)
def test_own_tables(what, tmp_path, capsys):
    name, table, expected = TABLES[what]
    for n in range(5):
        write(f"{tmp_path}/src/{n}.png", picture(n))
    table = table if isinstance(table, bytes) else table.replace(HERE, f"{tmp_path}/src").encode()
    write(f"{tmp_path}/src/{name}", table)
    words = ["--data=mine", f"--source={tmp_path}/src/{name}", f"--images={tmp_path}/src",
             f"--data_dir={tmp_path}/data"]
    if isinstance(expected, str):
        refused(expected, *words)
        return
    prepare(*words)
    assert content(tmp_path / "data", "mine") == expected
    assert ("2 lines" in (out := capsys.readouterr().out) and "cp1252" in out) == what.startswith("Excel")


def test_a_table_for_each_split(tmp_path):
    """As LAVIS' and COCO's are; two that say no split are refused."""
    for n in range(4):
        write(f"{tmp_path}/src/train2017/{n}.jpg", picture(n))
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        write(f"{tmp_path}/src/captions_{split}2017.json", {
            "images": [{"id": 70 - n, "file_name": ("" if split == "train" else "../train2017/") + f"{n}.jpg"}
                       for n in numbers],
            "annotations": [{"image_id": 70 - n, "caption": f"caption {n}"} for n in numbers[::-1]]})
    os.mkdir(tmp_path / "src/val2017")
    prepare("--data=mine", f"--source={tmp_path}/src", f"--data_dir={tmp_path}/data")
    assert content(tmp_path / "data", "mine") == {"train": THREE["train"], "val": THREE["val"]}
    write(f"{tmp_path}/src/more.csv", "image,caption\n")
    for source, said in (("src", "holds captions_train2017.json, captions_val2017.json, more.csv"),
                         ("captoins.csv", "captoins.csv is not there")):
        refused(said, "--data=more", f"--source={tmp_path}/{source}", f"--data_dir={tmp_path}/data")


def test_own_urls_and_files(tmp_path):
    """A table may name urls, and files beside them; rows without either are counted."""
    with Server() as server:
        write(f"{tmp_path}/0.png", picture(0))
        lines = [{"url": "0.png", "caption": "number 0", "split": "train"}, {"url": None, "caption": "x"},
                 {"caption": "y"}]
        lines += [{"url": f"{server.url}/png/{n}", "caption": f"number {n}",
                   "split": "val" if n == 7 else None} for n in range(1, 20)]
        write(f"{tmp_path}/urls.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        prepare("--data=mine", f"--source={tmp_path}/urls.jsonl", f"--data_dir={tmp_path}/data",
                "--allow_private")
    found = content(tmp_path / "data", "mine")
    assert found["val"] == {7: ["number 7"]} and sorted(found["train"]) == [n for n in range(20) if n != 7]
    assert meta_of(tmp_path / "data", "mine")["failed"] == {"no file name": 2}


# -----------------------------------------------------------------------------
# captions, flags, what is stored


def test_rare_letters_leave_room_for_words():
    """Captions in more letters than the vocabulary has tokens."""
    captions = ["a red apple on a table", "the red house"] * 50 + [chr(0x4E00 + n) for n in range(3000)]
    vocab = json.loads(prepare_pairs.train_wordpiece(captions, 1500))["model"]["vocab"]
    assert len(vocab) <= 1500 and {"red", "apple", "table"} <= set(vocab)


@pytest.mark.parametrize("words, said", [
    ("--data=mine", "needs --source.*captions.csv"), ("--data=sbu", "needs --source"),
    ("--data=mine --source=none", "none is not there"), ("--data=sbu --source=none", "none is not there"),
    ("--data=../x --source=none", "no name for a folder"), ("--data=cifar10", "made by prepare_imagenet.py"),
    ("--resize=256", "--resize is not for openmoji"), ("--data_dir=file", "cannot write file/openmoji"),
    ("--data=coco --data_dir=file", "cannot write file/coco")])
def test_flags_that_are_wrong(tmp_path, words, said, monkeypatch):
    """data_dir may be a file, too."""
    monkeypatch.chdir(tmp_path)
    write("./file", "")
    with pytest.raises(SystemExit, match=said):
        prepare_pairs.main(prepare_pairs.get_args(words.split()))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_home_and_any_console(tmp_path):
    """~ is the home folder; a console that lacks the credit's dash is no reason to fail."""
    write(f"{tmp_path}/src/t.csv", "image,caption,split\na.png,caf\u00e9 \u2013 x,train\n")
    write(f"{tmp_path}/src/a.png", picture(1))
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
                   "LC_ALL": "C"}
    subprocess.run([sys.executable, f"{REPO}/prepare_pairs.py", "--data=mine", "--source=~/src/t.csv",
                    "--data_dir=~/data"],
                   check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "data", "mine") == {"train": {1: ["café – x"]}}
    assert not os.path.exists(tmp_path / "~")


def test_several_sets_as_one(tmp_path):
    """Joined in order; validated on the first that has a split for it."""
    for name, count in (("one", 6), ("two", 9)):
        rows = ["image,caption,split"]
        for n in range(count):
            rows.append(f"{n}.png,{name} {n},{'test' if n == 0 else 'val' if n == 1 else 'train'}")
            write(f"{tmp_path}/{name}/{n}.png", picture(n))
        write(f"{tmp_path}/{name}/t.csv", "\n".join(rows))
        prepare(f"--data={name}", f"--source={tmp_path / name}", f"--data_dir={tmp_path}/data")
    data_dir = str(tmp_path / "data")
    joined, one = open_pairs(data_dir, "one,two", "train"), Pairs(data_dir, "one", "train")
    assert (len(joined.images), len(joined.captions)) == (4 + 7, 4 + 7) and joined.labels is None
    assert sorted(joined.captions[j] for j in range(11)) == sorted(
        f"{name} {number(joined.images[i])}" for name, part in (("one", range(4)), ("two", range(4, 11)))
        for i in part)
    assert all(joined.captions[j].endswith(f" {number(joined.images[i])}")
               for j, i in enumerate(joined.text_to_image))
    assert one.captions[0] == joined.captions[0]
    os.remove(f"{data_dir}/one/val_images.idx")
    assert open_pairs(data_dir, "one,two", "val").captions[:] == ["two 1"]
    with pytest.raises(SystemExit, match="data set three"):
        open_pairs(data_dir, "one,three", "train")
