"""
Shards in: five pictures in each form that people have them in, laid out as the original writes it; what is
torn, killed, repeated or hostile.

    pytest tests/test_shards.py               # -m slow: kills at random, and three steps on each form
"""
import io
import json
import os
import random
import signal
import tarfile
import time

import pytest

import distill_image
import distill_multimodal
import evaluate
import prepare_imagenet
import prepare_pairs
from conftest import end, start
from prepare_imagenet import Pairs, decode
from server import picture

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else
                json.dumps(data).encode())


def tar_bytes(members):
    """[(name, bytes or text)] -> a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path, *samples):
    """Each sample: its key, the number of its picture, and {ending: content} of its other files."""
    write(path, tar_bytes((f"{key}.{kind}", data) for key, n, files in samples
                          for kind, data in {"jpg": picture(n), **files}.items()))


def write_parquet(path, rows, names=None):
    """names: of the classes, which the hub keeps in the schema."""
    from pyarrow import parquet
    table = pyarrow.Table.from_pylist(rows)
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)


def image(n, name=None):
    return {"bytes": picture(n), "path": name}


def row_of_img2dataset(n, **more):
    status = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", "width": None}
    ok = {"status": "success", "error_message": None, "width": 48}
    return {**more, "caption": f"caption {n}", "url": f"http://x/{n}", "key": f"{n:06}",
            **(status if n == 3 else ok), "exif": "{}", "sha256": f"{n}"}


# -----------------------------------------------------------------------------
# each form -> flags, {split: {number of the picture: its captions}}

LIST = {"images": [ # as Karpathy's
    {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentids": [n],
     "sentences": [{"raw": "other words"}]}
    for n, split in enumerate(["train", "train", "restval", "val", "test"])]}
SPLIT = ["train", "train", "train", "val", "test"]
ONE = {n: [f"caption {n}"] for n in (0, 1, 2, 4, 5)} # of img2dataset's rows the fourth failed
FIVE = {n: [f"words {k} of {n}" for k in range(5)] for n in range(5)}


def by_split(captions):
    return {split: {n: captions[n] for n in captions if SPLIT[n] == split}
            for split in ("train", "val", "test")}


def img2dataset_webdataset(folder):
    for shard, numbers in (("00000", (2, 1, 0)), ("00001", (4, 5))): # not sorted by key
        write_tar(f"{folder}/{shard}.tar", *((f"{n:06}", n, {
            "json": json.dumps(row_of_img2dataset(n)), "txt": f"caption {n}"}) for n in numbers))
        write_parquet(f"{folder}/{shard}.parquet", [row_of_img2dataset(n) for n in (*numbers, 3)])
        write(f"{folder}/{shard}_stats.json", {"count": 3, "successes": len(numbers)})
    return [], {None: ONE}


def img2dataset_parquet(folder):
    for shard, numbers in (("00000", (1, 2, 3, 0)), ("00001", (5, 4))):
        write_parquet(f"{folder}/{shard}.parquet", [
            {**row_of_img2dataset(n), "jpg": None if n == 3 else picture(n)} for n in numbers])
    return [], {None: ONE}


def img2dataset_files(folder):
    for n in ONE:
        for kind, data in (("jpg", picture(n)), ("json", row_of_img2dataset(n)), ("txt", f"caption {n}")):
            write(f"{folder}/0000{n // 3}/{n:06}.{kind}", data)
    write_parquet(f"{folder}/00000.parquet", [row_of_img2dataset(n) for n in range(4)])
    write(f"{folder}/00000_stats.json", {"count": 4, "successes": 3})
    return [], {None: ONE}


def pixparse(folder):
    for name, numbers in (("train-0000", (0, 1)), ("train-0001", (2,)), ("validation-0000", (3, 4))):
        write_tar(f"{folder}/cc3m-{name}.tar", *((f"{n:09}", n, {
            "json": '{"caption": "from the .json"}', "txt": f"caption {n}"}) for n in numbers))
    write(f"{folder}/_info.json", {"splits": {"train": {"shard_lengths": [2, 1]}}})
    return [], {"train": {n: [f"caption {n}"] for n in (0, 1, 2)},
                "val": {n: [f"caption {n}"] for n in (3, 4)}}


def clip_benchmark(folder):
    write_tar(f"{folder}/test/0.tar", *((f"s{n:07}", n, {"txt": "\n".join(FIVE[n])}) for n in FIVE))
    return [], {"test": FIVE}


def dreamlip(folder):
    """img2dataset's, with save_additional_columns; some split into sentences, some null."""
    extra = [{"raw_caption": f"raw {n}", "shortSV_captions": f"short {n}" if n else None,
              "longSV_captions": [f"a {n}.", f"b {n}."], "longIB_captions": "not asked for"}
             for n in range(5)]
    write_tar(f"{folder}/00000.tar", *((f"{n:06}", n, {
        "json": json.dumps({**row_of_img2dataset(0), **extra[n]}), "txt": f"raw {n}"}) for n in range(5)))
    return ["--caption_key=raw_caption,shortSV_captions,longSV_captions"], {None: {
        n: [f"raw {n}", *([f"short {n}"] if n else []), f"a {n}.", f"b {n}."] for n in range(5)}}


def umaru97(folder):
    for split, part in (("train", (0, 1, 2)), ("validation", (3,)), ("test", (4,))):
        write_parquet(f"{folder}/data/{split}-00000-of-00001-0a1b2c3d4e5f.parquet", [
            {"image": image(n), "caption": FIVE[n], "sentids": ["1"], "split": "wrong", "img_id": str(n),
             "filename": f"{n}.jpg"} for n in part])
    return [], by_split(FIVE)


def bitmind(folder):
    """A row a caption, the picture repeated, also in another file."""
    rows = [{"image": image(n), "filepath": "val2014", "sentids": [1], "filename": f"{n}.jpg", "imgid": n,
             "split": LIST["images"][n]["split"],
             "sentences": {"tokens": ["a"], "raw": FIVE[n][k], "imgid": n},
             "cocoid": 900 + n} for k in range(5) for n in range(5)]
    for i in range(2):
        write_parquet(f"{folder}/data/part-0000{i}-of-00002.parquet", rows[13 * i:13 * i + 13])
    return [], by_split(FIVE)


def lmms_lab(folder):
    """One split, no column that tells it: Karpathy's list beside it does."""
    write_parquet(f"{folder}/data/test-00000-of-00001.parquet", [
        {"image": image(n), "caption": FIVE[n], "sentids": ["1"], "img_id": str(n), "filename": f"{n}.jpg"}
        for n in range(5)])
    write(f"{folder}/dataset_flickr30k.json", LIST)
    return [], by_split(FIVE)


PAIRS = [img2dataset_webdataset, img2dataset_parquet, img2dataset_files, pixparse, clip_benchmark, dreamlip,
         umaru97, bitmind, lmms_lab]


def number(data):
    r, g, b = decode(data).getpixel((0, 0))
    assert b == 7
    return r + 256 * g


def content(data_dir, name):
    """{split: {number of the picture: its captions}}; each picture is there once."""
    found = {}
    with open(f"{data_dir}/{name}/meta.json") as f:
        splits = json.load(f)["splits"]
    for split in splits:
        pairs = Pairs(str(data_dir), name, split)
        numbers = [number(pairs.images[i]) for i in range(len(pairs.images))]
        assert len(set(numbers)) == len(numbers)
        found[split] = {n: [] for n in numbers}
        for j, i in enumerate(pairs.text_to_image):
            found[split][numbers[i]].append(pairs.captions[j])
    return found


def prepare(tmp_path, *words, name="it", source="source"):
    prepare_pairs.main(prepare_pairs.get_args([f"--data={name}", f"--data_dir={tmp_path}/data",
                                               f"--source={tmp_path}/{source}", "--threads=2", *words]))
    return content(f"{tmp_path}/data", name)


@pytest.mark.parametrize("form", PAIRS, ids=lambda form: form.__name__)
def test_pairs_in_each_form(form, tmp_path, capsys):
    words, expected = form(tmp_path / "source")
    found = prepare(tmp_path, *words)
    if None in expected: # by a hash, but never none for validation
        assert found["val"]
        found = {None: {n: captions for part in found.values() for n, captions in part.items()}}
    assert found == expected
    out = capsys.readouterr().out
    assert "words/caption" in out and "split" in out # the statistics of the thesis' tables
    failed = {"not fetched (failed_to_download)": 1} if form is img2dataset_parquet else {}
    assert json.loads((tmp_path / "data/it/meta.json").read_bytes())["failed"] == failed


NAMES = ["a dog", "a cat"]


def imagenet_parquet(folder):
    for split, rows in (("train", [(0, 0), (1, 1), (2, 1)]), ("validation", [(3, 0), (4, 1)]),
                        ("test", [(5, -1)])):
        write_parquet(f"{folder}/data/{split}-00000-of-00001.parquet",
                      [{"image": image(n, "x.JPEG"), "label": label} for n, label in rows], NAMES)


def imagenet_wds(folder):
    for split, rows in (("train", [(0, 0), (1, 1), (2, 1)]), ("validation", [(3, 0), (4, 1)])):
        write_tar(f"{folder}/imagenet1k-{split}-0000.tar",
                  *((f"{n:07}", n, {"cls": f"{label}"}) for n, label in rows))


def val_alone(folder):
    write_tar(f"{folder}/test/0.tar", *((f"s{n:07}", n, {"cls": f"{n % 2}\n"}) for n in range(5)))


@pytest.mark.parametrize("form, data, expected", [
    (imagenet_parquet, "imagenet", {"train": {0: 0, 1: 1, 2: 1}, "val": {3: 0, 4: 1}}),
    (imagenet_parquet, "own", {"train": {0: 0, 1: 1, 2: 1}, "val": {3: 0, 4: 1}}),
    (imagenet_wds, "own", {"train": {0: 0, 1: 1, 2: 1}, "val": {3: 0, 4: 1}}),
    (val_alone, "own", {"test": {n: n % 2 for n in range(5)}})])
def test_labelled_sets_in_each_form(form, data, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_imagenet, "NUM_CLASSES", 2)
    form(tmp_path / "source")
    prepare_imagenet.main(prepare_imagenet.get_args([
        f"--data={data}", f"--data_dir={tmp_path}/data", f"--source={tmp_path}/source"]))
    for split, labels in expected.items():
        pairs = Pairs(f"{tmp_path}/data", data, split)
        assert dict(zip(map(number, map(pairs.images.__getitem__, range(len(labels)))),
                        pairs.labels.tolist())) == labels and len(pairs.images) == len(labels)
        assert pairs.meta["classes"] == (NAMES if form is imagenet_parquet else ["0", "1"])
    assert list(pairs.meta["splits"]) == list(expected)


@pytest.mark.slow
def test_trains_and_is_judged(tmp_path):
    """Three steps, then a table, on one form of pairs and one of labelled pictures: all are stored alike."""
    def run(module, *words):
        module.main(module.get_args([*words, f"--data_dir={tmp_path}/data"]))

    small = ["--img_size=32", "--patch_size=8", "--embed_dim=32", "--num_heads=2", "--depth=1",
             "--batch_size=2", "--max_steps=3", "--device=cpu", f"--out_dir={tmp_path}/run"]
    imagenet_wds(tmp_path / "labelled")
    run(prepare_imagenet, "--data=own", f"--source={tmp_path}/labelled")
    run(distill_image, "--data=own", "--teacher=ema", "--target_layers=1", *small)
    evaluate.main(["knn", "--task=own", f"--data_dir={tmp_path}/data", f"--ckpt={tmp_path}/run/ckpt.pt"])
    umaru97(tmp_path / "source")
    prepare(tmp_path)
    run(distill_multimodal, "--data=it", "--unit=image", "--kd_loss=none", "--align_loss=contrastive",
        "--image_init=random", "--text_init=random", "--text_depth=1", *small, f"--out_dir={tmp_path}/pairs")
    evaluate.main(["retrieval", "--data=it", f"--data_dir={tmp_path}/data",
                   f"--ckpt={tmp_path}/pairs/ckpt.pt"])


# -----------------------------------------------------------------------------
# what is torn, killed, linked, hostile


def numbered(folder, shards=6, each=20):
    """Shards of so many pictures -> {number: its caption} of all."""
    for s in range(shards):
        write_tar(f"{folder}/{s:05}.tar", *((f"{n:06}", n, {"txt": f"caption {n}"})
                                            for n in range(s * each, s * each + each)))
    return {n: [f"caption {n}"] for n in range(shards * each)}


def whole(found):
    parts = [n for part in found.values() for n in part]
    assert len(set(parts)) == len(parts)
    return {n: captions for part in found.values() for n, captions in part.items()}


@pytest.mark.parametrize("kind", ["in a header", "in a picture", "between members", "html", "two tars",
                                  "empty"])
def test_a_torn_shard_is_named_and_mended(tmp_path, kind, capsys):
    """Cut, also exactly between two members (which tarfile takes for the end), no tar, or two in one file:
    all others are converted, the shard is named, and the whole one in its place gives what was missing."""
    expected, path = numbered(tmp_path / "source", 3, 20), tmp_path / "source/00000.tar"
    data = path.read_bytes()
    end = tarfile.open(path).getmembers()[-1].offset_data + 512 # behind the last text
    write(path, {"in a header": data[:700], "in a picture": data[:10240 + 512], "between members": data[:end],
                 "html": b"<html>no</html>" * 99, "two tars": data + data, "empty": b""}[kind])
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 of 3 shards are torn"):
            prepare(tmp_path, "--caption_key=txt") # which the first shard has to have
        assert "torn: 00000.tar" in capsys.readouterr().out
        assert not os.path.exists(tmp_path / "data/it/meta.json")
    if kind == "in a header": # or without it, and what came before stays
        os.remove(path)
        expected = {n: expected[n] for n in expected if n >= 20}
    else:
        write(path, data)
    assert whole(prepare(tmp_path, "--caption_key=txt")) == expected


def test_links_on_the_disk_and_in_a_tar(tmp_path, capsys):
    """The hub's cache links to blobs, which are read; each once; a cycle is named; in a tar links are not
    read, and no name becomes a path."""
    expected = numbered(tmp_path / "blobs", 2, 4)
    link = tarfile.TarInfo("000099.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out = io.BytesIO(tar_bytes([("../../../evil.jpg", picture(50)), ("../../../evil.txt", "fifty")]))
    with tarfile.open(fileobj=out, mode="a") as tar:
        tar.addfile(link)
    write(tmp_path / "blobs/evil", out.getvalue())
    snapshot = tmp_path / "source/snapshots/0a1b"
    os.makedirs(snapshot / "data")
    for name, blob in (("a", "00000.tar"), ("b", "00001.tar"), ("twice", "00000.tar"), ("c", "evil")):
        os.symlink(tmp_path / "blobs" / blob, snapshot / f"data/{name}.tar")
    os.symlink(tmp_path / "source", snapshot / "cycle")
    assert whole(prepare(tmp_path)) == expected | {50: ["fifty"]}
    out = capsys.readouterr().out
    assert "twice.tar is another name" in out and "cycle is another name" in out
    assert not [f for _, _, files in os.walk(tmp_path) for f in files if f.startswith("evil.")]


@pytest.mark.parametrize("source, said", [
    ("dead", "fetched none"), ("urls", "img2dataset"), ("both", "both"), ("keys", "no_such"),
    ("other", "no table and no shards"), ("saved", "to_parquet"), ("other/a.beton", "a.beton")])
def test_what_cannot_be_read_is_named(tmp_path, source, said):
    """A run of img2dataset without a network, urls, two forms side by side, a wrong key, other forms."""
    write(f"{tmp_path}/dead/00000_stats.json", {"count": 10, "successes": 0})
    write(f"{tmp_path}/dead/00000.tar", tar_bytes([]))
    write_parquet(f"{tmp_path}/urls/0.parquet", [{"image_url": "http://x/1", "caption": "a"}])
    numbered(f"{tmp_path}/both", 1)
    write_parquet(f"{tmp_path}/both/x.parquet", [{"image": image(1), "caption": "a"}])
    write(f"{tmp_path}/other/a.beton", b"x")
    write(f"{tmp_path}/saved/data-00000-of-00001.arrow", b"x")
    img2dataset_webdataset(tmp_path / "keys")
    with pytest.raises(SystemExit, match=said):
        prepare(tmp_path, *(["--caption_key=no_such"] if source == "keys" else []), source=source)


def test_limit_is_raised_later(tmp_path):
    expected = numbered(tmp_path / "source")
    found = prepare(tmp_path, "--limit=15")
    assert len(found["train"]) == 15
    more = prepare(tmp_path, "--limit=40")
    assert len(more["train"]) == 40 and found["train"].items() <= more["train"].items()
    assert whole(prepare(tmp_path, "--limit=0")) == expected


def test_the_hub_is_read_tar_by_tar(tmp_path, monkeypatch):
    """Without --source: fetched, converted, deleted; what failed on the way, or is torn, is fetched again."""
    _, expected = pixparse(tmp_path / "hub")
    fetched, broken = [], ["cc3m-train-0000.tar", "cc3m-train-0001.tar"]

    def download(url, path):
        name = url.rpartition("/")[2]
        if name in broken:
            broken.remove(name)
            if name == "cc3m-train-0001.tar":
                raise SystemExit("no network")
            write(path, b"torn")
        else:
            fetched.append(name)
            write(path, (tmp_path / "hub" / name).read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_pairs, "download", download)
    monkeypatch.setitem(prepare_pairs.HUB, "cc3m",
                        (prepare_pairs.HUB["cc3m"][0], {"validation": 1, "train": 2}, 1))
    words = ["--data=cc3m", f"--data_dir={tmp_path}/data", "--threads=2"]
    for said in ("no network", "torn"):
        with pytest.raises(SystemExit, match=said):
            prepare_pairs.main(prepare_pairs.get_args(words))
    prepare_pairs.main(prepare_pairs.get_args(words))
    assert content(f"{tmp_path}/data", "cc3m") == expected and sorted(set(fetched)) == sorted(fetched)
    assert not [f for _, _, files in os.walk(tmp_path / "cache") for f in files]


def prepare_slowly(*words):
    note, prepare_pairs.COMMIT_SECONDS = prepare_pairs.SetWriter.note, 0.01
    prepare_pairs.SetWriter.note = lambda *args: (time.sleep(0.03), note(*args))[1] # of every row
    prepare_pairs.main(prepare_pairs.get_args(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize("form", [numbered, bitmind])
def test_killed_at_random(tmp_path, form):
    """SIGKILL at random moments: no duplicate, no gap, every caption under its picture."""
    rng, expected = random.Random(0), form(tmp_path / "source")
    words = ["--data=it", f"--data_dir={tmp_path}/data", f"--source={tmp_path}/source", "--threads=2"]
    begun, kills = tmp_path / "data/it/begun.json", 0
    for _ in range(6):
        before, process = begun.read_bytes() if begun.exists() else b"", start(prepare_slowly, *words)
        while process.is_alive() and (not begun.exists() or begun.read_bytes() == before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        kills += end(process) == -signal.SIGKILL
    assert kills > 1
    prepare(tmp_path)
    found = content(f"{tmp_path}/data", "it")
    if form is bitmind:
        assert {s: {n: sorted(c) for n, c in part.items()} for s, part in found.items()} == by_split(FIVE)
    else:
        assert whole(found) == expected
