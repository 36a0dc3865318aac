"""
Pairs from files laid out as COCO's, from people's own tables, and from lists of urls.

    pytest tests/test_pairs.py                # -m slow: kills at random moments
"""
import io
import json
import os
import random
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from unittest.mock import Mock

import pytest
import urllib3

import prepare_pairs
from conftest import killed_at_random, refused, start
from prepare_imagenet import Bad, Pairs
from prepare_pairs import Web, open_pairs
from server import ANSWERS, Server, content, number, picture, prepare_pairs_of as prepare, used, write
from test_shards import prepare_slowly


def coco_json(count=40):
    """dataset_coco.json: each fifth image has six captions; train lies in train2014, the rest in val2014."""
    images = []
    for n in range(count):
        split = ["train", "restval", "val", "test"][n % 4]
        folder = "train2014" if split == "train" else "val2014"
        sentences = [{"raw": f"Picture {n},\n caption {c}. "} for c in range(5 + (n % 5 == 0))]
        images.append({"filepath": folder, "filename": f"COCO_{folder}_{1000 + n:012d}.jpg", "imgid": n,
                       "split": split, "sentences": sentences, "cocoid": 1000 + n})
    return {"images": images}


def write_coco(folder):
    """caption_datasets.zip, train2014.zip and, unpacked, val2014."""
    coco = coco_json()
    with zipfile.ZipFile(f"{folder}/caption_datasets.zip", "w") as z:
        z.writestr("dataset_coco.json", json.dumps(coco))
    with zipfile.ZipFile(f"{folder}/train2014.zip", "w") as z:
        for x in coco["images"]:
            name = f"{x['filepath']}/{x['filename']}"
            if name.startswith("val"):
                write(f"{folder}/{name}", picture(x["imgid"]))
            else:
                z.writestr(name, picture(x["imgid"]))


def test_coco(tmp_path, capsys):
    """As archives or unpacked; restval is training; each picture once, with all its captions on one line."""
    write_coco(tmp_path)
    prepare("coco", tmp_path, tmp_path / "data")
    expected = {"train": {}, "val": {}, "test": {}}
    for n in range(40):
        captions = [f"Picture {n}, caption {c}." for c in range(5 + (n % 5 == 0))]
        expected[["train", "train", "val", "test"][n % 4]][n] = captions
    assert content(tmp_path / "data", "coco") == expected
    for line in used(tmp_path / "data", "coco"):
        n = number(Pairs(f"{tmp_path}/data", "coco", line["split"]).images[int(line["image"])])
        assert line["id"] == str(1000 + n) and line["where"].endswith(f"{1000 + n}.jpg")
    # words a caption, captions an image, images, pairs: the columns of the thesis' table 2
    assert "train               4.0             5.2          20         104" in capsys.readouterr().out


def test_what_is_missing_has_two_addresses(tmp_path, monkeypatch):
    write_coco(tmp_path)
    os.remove(tmp_path / "train2014.zip")
    os.mkdir(tmp_path / "empty")
    asked = []

    def download(url, path):
        asked.append(url.split("/")[2])
        raise SystemExit("error: no network")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_pairs, "download", download)
    for source in (tmp_path, tmp_path / "empty"):
        assert "no network" in refused(prepare, "coco", source, tmp_path / "data")
    assert asked == ["images.cocodataset.org", "s3.amazonaws.com", "cs.stanford.edu", "github.com"]


@pytest.mark.parametrize("name, old, new, said", [
    ("train2014.zip", b"PK\5\6", b"cut", "train2014.zip cannot"),
    ("dataset_coco.json", b"imgid", b"id", "KeyError: 'imgid'"),
    ("dataset_coco.json", b"restval", b"dev2", "'dev2'"),
    ("dataset_coco.json", b"000001005.jpg", b"000001006.jpg", "000001006.jpg is in two splits")])
def test_damaged_lists(tmp_path, name, old, new, said):
    write_coco(tmp_path)
    write(f"{tmp_path}/dataset_coco.json", coco_json())
    path = tmp_path / name
    path.write_bytes(path.read_bytes().replace(old, new))
    assert said in refused(prepare, "coco", tmp_path, tmp_path / "data")
    assert not os.path.exists(tmp_path / "data" / "coco" / "meta.json")


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
    "Excel's cp1252, and a line of UTF-8": (
        "t.csv", b"image,caption,split\n0.png,caf\xe9,train\n1.png,na\xefve \x96 x,train\n"
        b"3.png,caf\xc3\xa9,val\n",
        {"train": {0: ["café"], 1: ["naïve – x"]}, "val": {3: ["café"]}}),
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
    "Karpathy's list": ("dataset_flickr30k.json", json.dumps({"images": [
        {"filename": f"{n}.png", "imgid": n, "split": ["train", "train", "restval", "val", "test"][n],
         "sentences": [{"raw": f" caption {n}\n", "imgid": n}]} for n in range(5)]}), THREE),
    "SBU's list": ("t.json", json.dumps({"image_urls": [f"{n}.png" for n in range(5)],
                                         "captions": [f"My cat {n}" for n in range(5)]}),
                   {None: {n: [f"My cat {n}"] for n in range(5)}}), # split by a hash
    "tabs in a .csv, open_clip's names": ("t.csv", "filepath\ttitle\tsplit\n" + ROWS.replace(",", "\t"),
                                          THREE),
    "Flickr's bars and blanks": ("t.csv", "image_name| comment_number| comment| split\n" + "".join(
        f"{n}.png| {k}| caption {n}{k % 2}| {split}\n" for n, split in ((0, "train"), (3, "val"))
        for k in range(3)), {"train": {0: ["caption 00", "caption 01"]},
                            "val": {3: ["caption 30", "caption 31"]}}),
    "absolute paths inside --images": (
        "t.csv", "image,caption,split\n" + ROWS.replace("0.png", f"{HERE}/0.png"), THREE),
    "another split": ("t.csv", "image,caption,split\n0.png,y,trian\n", "row 1: split 'trian' is none of"),
    "two splits": ("t.csv", "image,caption,split\n0.png,y,train\n./0.png,z,val\n",
                   "row 2: 0.png is in two splits, train and val"),
    "no file": ("t.csv", "image,caption\nnone.png,y\n", "no picture came of it")}


@pytest.mark.parametrize("what", TABLES)
def test_own_tables(what, tmp_path, capsys):
    name, table, expected = TABLES[what]
    for n in range(5):
        write(f"{tmp_path}/src/{n}.png", picture(n))
    table = table if isinstance(table, bytes) else table.replace(HERE, f"{tmp_path}/src").encode()
    write(f"{tmp_path}/src/{name}", table)
    words = ["mine", f"{tmp_path}/src/{name}", f"{tmp_path}/data", f"--images={tmp_path}/src"]
    if isinstance(expected, str):
        assert re.search(expected, refused(prepare, *words))
        return
    prepare(*words)
    found = content(tmp_path / "data", "mine")
    if None in expected:
        found = {None: found["train"] | found["val"]}
    assert found == expected
    assert ("cp1252" in capsys.readouterr().out) == what.startswith("Excel")


def test_a_table_for_each_split(tmp_path):
    """As COCO's own are; with one beside them that says no split they are refused."""
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        images = [{"id": 70 - n, "file_name": f"{n}.jpg"} for n in numbers]
        annotations = [{"image_id": 70 - n, "caption": f"caption {n}"} for n in numbers[::-1]]
        write(f"{tmp_path}/src/captions_{split}2017.json", {"images": images, "annotations": annotations})
        for n in numbers:
            write(f"{tmp_path}/src/{split}2017/{n}.jpg", picture(n))
    prepare("mine", tmp_path / "src", tmp_path / "data")
    assert content(tmp_path / "data", "mine") == {"train": THREE["train"], "val": THREE["val"]}
    write(f"{tmp_path}/src/more.csv", "image,caption\n")
    assert "more.csv" in refused(prepare, "more", tmp_path / "src", tmp_path / "data")


def test_tables_of_urls(server, tmp_path):
    """Conceptual Captions' two lists without names; a list of urls and files; a row without is counted."""
    for name, numbers in (("Train_GCC-training", range(9)), ("Validation_GCC-1.1.0-Validation", [9, 10])):
        lines = [f"number {n}\t{server.url}/png/{n}\n" for n in numbers]
        write(f"{tmp_path}/cc3m/{name}.tsv", "".join(lines))
    prepare("cc3m", tmp_path / "cc3m", tmp_path / "data")
    write(f"{tmp_path}/0.png", picture(0))
    lines = [{"url": "0.png", "caption": "number 0", "split": "train"}, {"url": None, "caption": "x"}]
    lines += [{"url": f"{server.url}/png/{n}", "caption": f"number {n}", "split": "val" if n > 8 else None}
              for n in range(1, 11)]
    write(f"{tmp_path}/urls.jsonl", "\n".join(map(json.dumps, lines)))
    prepare("mine", tmp_path / "urls.jsonl", tmp_path / "data")
    for data in ("cc3m", "mine"):
        assert content(tmp_path / "data", data) == {"train": {n: [f"number {n}"] for n in range(9)},
                                                    "val": {n: [f"number {n}"] for n in (9, 10)}}
    assert json.loads((tmp_path / "data/mine/meta.json").read_bytes())["failed"] == {"no file name": 1}


def test_any_console(tmp_path, monkeypatch):
    """One that lacks a letter of what is printed is no reason to fail."""
    write(f"{tmp_path}/src/t.csv", "image,caption,split\na.png,caf\u00e9 \u2013 x,train\n")
    write(f"{tmp_path}/src/a.png", picture(1))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    prepare("mine", f"{tmp_path}/src", tmp_path / "données – x")
    assert content(tmp_path / "données – x", "mine") == {"train": {1: ["café – x"]}}


def test_several_sets_as_one(tmp_path):
    """Joined in order; validated on the first that has a split for it."""
    data_dir = str(tmp_path / "data")
    for name, splits in (("one", ["train", "train"]), ("two", ["val", "train", "train"])):
        for n in range(len(splits)):
            write(f"{tmp_path}/{name}/{n}.png", picture(n))
        rows = [f"{n}.png,{name} {n},{split}\n" for n, split in enumerate(splits)]
        write(f"{tmp_path}/{name}/t.csv", "image,caption,split\n" + "".join(rows))
        prepare(name, tmp_path / name, data_dir)
    joined = open_pairs(data_dir, "one,two", "train")
    assert [joined.captions[j] for j in range(4)] == ["one 0", "one 1", "two 1", "two 2"]
    assert [number(joined.images[i]) for i in joined.text_to_image] == [0, 1, 1, 2] and joined.labels is None
    assert open_pairs(data_dir, "one,two", "val").captions[:] == ["two 0"]


# -----------------------------------------------------------------------------
# urls: what becomes of every kind of answer, kills, second passes, addresses refused

URLS = { # urls that no server answers -> what becomes of the row
    "http://": "bad url", "http://[::1": "bad url",
    "file:///etc/passwd": "not http", "http://no-such-host.invalid/a.png": "no such host",
    "http://169.254.169.254/latest": "private address", "http://127.0.0.1:1/a.png": "no connection"}


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Short waits; the address of the server here counts as public."""
    public = prepare_pairs.is_public
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TIMEOUT", 0.4), ("TRIES", 2), ("MAX_FILE", 10 ** 6)):
            patch.setattr(prepare_pairs, name, value)
        patch.setattr(prepare_pairs, "is_public", lambda address: address == "127.0.0.1" or public(address))
        yield public


@pytest.fixture
def server():
    with Server() as server:
        yield server


def prepare_urls(folder, *words):
    prepare("cc12m", folder, folder, "--threads=32", *words)


def write_list(folder, urls):
    """Their caption is the last part of the url."""
    lines = [f"{url}\tcaption {url.rpartition('/')[2]}\n" for url in urls]
    write(f"{folder}/cc12m.tsv", "".join(lines))


def outcomes(folder):
    """{url: what became of it at last}."""
    return {line["where"]: line["cause"] for line in used(folder, "cc12m")}


def check_pictures(folder):
    """Every picture is there once, under its caption, and has a line in used.tsv. Returns the urls."""
    urls = sorted(line["where"] for line in used(folder, "cc12m") if not line["cause"])
    found = [(n, captions) for part in content(folder, "cc12m").values() for n, captions in part.items()]
    expected = [int(url.rpartition("/")[2]) for url in urls]
    assert sorted(found) == [(n, [f"caption {n}"]) for n in sorted(expected)]
    return urls


@pytest.fixture(scope="module")
def table(tmp_path_factory, fast):
    """One run over two urls of every kind between good ones -> {name: outcomes}."""
    folder, found = tmp_path_factory.mktemp("table"), {}
    with Server() as server:
        names = [name for name in ANSWERS for _ in range(2)] + ["png"] * 40
        random.Random(0).shuffle(names)
        urls = [f"{server.url}/{name}/{n}" for n, name in enumerate(names)]
        urls += [*URLS, f"https{server.url[4:]}/png/1"] # TLS to a port that speaks none
        write_list(folder, urls)
        prepare_urls(folder)
        for url, cause in outcomes(folder).items():
            name = url if url in URLS else "tls" if url.startswith("https") else url.split("/")[-2]
            found.setdefault(name, set()).add(cause)
    failed = json.loads((folder / "cc12m/meta.json").read_bytes())["failed"]
    assert len(check_pictures(folder)) + sum(failed.values()) == len(urls) # none is lost
    return found


@pytest.mark.parametrize("name, cause", [*((name, cause) for name, (cause, _) in ANSWERS.items()),
                                         *URLS.items(), ("tls", "TLS error")])
def test_answer(table, name, cause):
    assert table[name] == {cause}


def test_retry_after_is_obeyed(server):
    """Also by the other urls of the host."""
    web, start = Web(), time.monotonic()
    assert web(f"{server.url}/busy_once/1") == picture(1) and time.monotonic() - start > 0.9
    web.busy_until["127.0.0.1"] = time.monotonic() + 2.6 # longer than an answer may take
    assert web(f"{server.url}/png/2") == picture(2) and server.asked["/png/2"] == 1


@pytest.mark.parametrize("values, out", [
    (["max-image-preview:none, noimageai"], True), (["*: noai"], True), (["distill-pairs: noindex"], True),
    (["all", "NOAI"], True), (["noai, otherbot: all"], True), (["otherbot: noai, noindex"], False),
    (["max-image-preview: none"], False)])
def test_opting_out(values, out):
    headers = urllib3.HTTPHeaderDict([("X-Robots-Tag", value) for value in values])
    assert prepare_pairs.opted_out(headers) == out


def test_public_addresses(fast):
    private = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1",
               "fe80::1%eth0", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"]
    assert [address for address in private if fast(address)] == []
    assert all(map(fast, ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]))


def test_this_machine_is_refused_unless_allowed(server, tmp_path, monkeypatch, fast):
    """By number, by name, and however the name is resolved: nothing is sent."""
    monkeypatch.setattr(prepare_pairs, "is_public", fast)
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1"]
    write_list(tmp_path, [f"{server.url.replace('127.0.0.1', host)}/png/{n}" for n, host in enumerate(hosts)])
    for words in ([], ["--retry"]): # asking again does not help
        assert "no picture came of it" in refused(prepare_urls, tmp_path, *words)
        assert set(outcomes(tmp_path).values()) == {"private address"} and not server.asked
    shutil.rmtree(tmp_path / "cc12m")
    prepare_urls(tmp_path, "--allow_private")
    assert list(outcomes(tmp_path).values()) == [""] * 4


def test_the_address_that_is_connected_to_is_the_one_checked(monkeypatch, server, fast):
    """A name may stand for a public address when it is looked up first, and for a private one after."""
    monkeypatch.setattr(prepare_pairs, "is_public", fast)
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", lambda *args: [
        (2, 1, 6, "", ("127.0.0.1", server.port))])
    with pytest.raises(Bad, match="private address"):
        Web()(f"http://rebound.example:{server.port}/png/6")
    assert not server.asked


def test_a_second_pass_asks_for_what_failed_only(server, tmp_path, monkeypatch):
    """A set that is there stays as it is; another list or flag is refused."""
    names = ["png"] * 20 + ["broken", "none", "opted_out", "cut"]
    urls = [f"{server.url}/{name}/{n}" for n, name in enumerate(names)]
    write_list(tmp_path, urls)
    prepare_urls(tmp_path)
    first, before = Counter(server.asked), check_pictures(tmp_path)
    # what may come right later was asked for twice
    assert [first[url.removeprefix(server.url)] for url in urls[19:]] == [1, 2, 1, 1, 2]
    prepare_urls(tmp_path)
    assert server.asked == first
    assert "--resize=0. Remove it" in refused(prepare_urls, tmp_path, "--resize=32")
    monkeypatch.setitem(ANSWERS, "broken", ANSWERS["png"]) # the server is mended
    prepare_urls(tmp_path, "--retry")
    assert server.asked - first == {"/broken/20": 1, "/none/21": 1, "/cut/23": 2}
    assert check_pictures(tmp_path) == sorted([*before, urls[20]])
    write_list(tmp_path, [*urls, f"{server.url}/png/99"])
    assert "begun with other list" in refused(prepare_urls, tmp_path, "--retry")
    assert len(check_pictures(tmp_path)) == 21 # what was whole is still there


def test_without_a_network(tmp_path, monkeypatch):
    """The run ends before it has spent all rows on it; the same command asks again for those."""
    write_list(tmp_path, [f"http://host{n}.invalid/a" for n in range(400)])
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", Mock(side_effect=prepare_pairs.socket.gaierror))
    monkeypatch.setattr(prepare_pairs, "TRIES", 1)
    for _ in range(2):
        assert "is there a network" in refused(prepare_urls, tmp_path)
        assert len(outcomes(tmp_path)) < 400


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    """SIGKILL at random moments: no duplicate, no gap, every caption under its picture."""
    folders = [f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    words = ["--data=cc12m", "--allow_private", "--threads=8", *folders]
    with Server(delay=0.02) as server:
        urls = [f"{server.url}/{'none' if n % 5 == 0 else 'png'}/{n}" for n in range(1000)]
        write_list(tmp_path, urls)
        begun = tmp_path / "cc12m" / "begun.json"
        assert killed_at_random(lambda: start(prepare_slowly, 0.001, *words), begun, 5) > 1
        prepare_pairs.main(prepare_pairs.get_args(words))
    assert check_pictures(tmp_path) == sorted(url for url in urls if "/png/" in url)
    assert Counter(outcomes(tmp_path).values()) == {"": 800, "http 404": 200}
    assert not [f for f in os.listdir(tmp_path / "cc12m") if ".tmp" in f]
