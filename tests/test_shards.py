"""
Shards in: five pictures in each form that people have them in, laid out as the original writes it; what is
torn, killed, repeated or hostile.

    pytest tests/test_shards.py               # -m slow: kills at random, and three steps
"""
import io
import json
import os
import tarfile
import time

import pytest

import distill_image
import distill_multimodal
import prepare_imagenet
import prepare_pairs
from conftest import SHAPE, flags, killed_at_random, refused, start
from prepare_imagenet import Pairs
from server import content, number, picture, prepare_pairs_of, tar_bytes, write, write_parquet


def write_tar(path, *samples):
    """Each sample: its key, the number of its picture, and {ending: content} of its other files."""
    write(path, tar_bytes((f"{key}.{kind}", data) for key, n, files in samples
                          for kind, data in {"jpg": picture(n), **files}.items()))


def img2dataset_row(n):
    status = {"status": "success", "error_message": None, "width": 48}
    if n == 3:
        status = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", "width": None}
    return {"caption": f"caption {n}", "url": f"http://x/{n}", "key": f"{n:06}", **status, "sha256": f"{n}"}


def hub_row(n, **fields):
    return {"image": {"bytes": picture(n), "path": f"{n}.JPEG"}, **fields}


# -----------------------------------------------------------------------------
# each form -> flags, {split: {number of the picture: its captions}}

SPLIT = ["train", "train", "restval", "val", "test"] # as in Karpathy's lists
LIST = {"images": [{"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": [{"raw": "other words"}]}
                   for n, split in enumerate(SPLIT)]}
ONE = {n: [f"caption {n}"] for n in (0, 1, 2, 4, 5)} # of img2dataset's rows the fourth failed
FIVE = {n: [f"words {k} of {n}" for k in range(5)] for n in range(5)}
FIVE_BY_SPLIT = {"train": {n: FIVE[n] for n in (0, 1, 2)}, "val": {3: FIVE[3]}, "test": {4: FIVE[4]}}


def img2dataset_webdataset(folder):
    for shard, numbers in (("00000", (2, 1, 0)), ("00001", (4, 5))): # not sorted by key
        write_tar(f"{folder}/{shard}.tar", *((f"{n:06}", n, {
            "json": json.dumps(img2dataset_row(n)), "txt": f"caption {n}"}) for n in numbers))
        write_parquet(f"{folder}/{shard}.parquet", [img2dataset_row(n) for n in (*numbers, 3)])
        write(f"{folder}/{shard}_stats.json", {"count": 3, "successes": len(numbers)})
    return [], {None: ONE}


def img2dataset_parquet(folder):
    for shard, numbers in (("00000", (1, 2, 3, 0)), ("00001", (5, 4))):
        write_parquet(f"{folder}/{shard}.parquet", [
            {**img2dataset_row(n), "jpg": None if n == 3 else picture(n)} for n in numbers])
    return [], {None: ONE}


def img2dataset_files(folder):
    for n in ONE:
        for kind, data in (("jpg", picture(n)), ("json", img2dataset_row(n)), ("txt", f"caption {n}")):
            write(f"{folder}/0000{n // 3}/{n:06}.{kind}", data)
    write_parquet(f"{folder}/00000.parquet", [img2dataset_row(n) for n in range(4)])
    write(f"{folder}/00000_stats.json", {"count": 4, "successes": 3})
    return [], {None: ONE}


def pixparse(folder):
    for name, numbers in (("train-0000", (0, 1)), ("train-0001", (2,)), ("validation-0000", (4, 5))):
        write_tar(f"{folder}/cc3m-{name}.tar", *((f"{n:09}", n, {
            "json": '{"caption": "from the .json"}', "txt": f"caption {n}"}) for n in numbers))
    write(f"{folder}/_info.json", {"splits": {"train": {"shard_lengths": [2, 1]}}})
    return [], {"train": {n: ONE[n] for n in (0, 1, 2)}, "val": {n: ONE[n] for n in (4, 5)}}


def clip_benchmark(folder):
    write_tar(f"{folder}/test/0.tar", *((f"s{n:07}", n, {"txt": "\n".join(FIVE[n])}) for n in FIVE))
    return [], {"test": FIVE}


def dreamlip(folder):
    """img2dataset's, with save_additional_columns; some split into sentences, some null."""
    for n in range(5):
        fields = {**img2dataset_row(0), "raw_caption": f"raw {n}", "shortSV_captions": "short" if n else None,
                  "longSV_captions": [f"a {n}.", f"b {n}."], "longIB_captions": "not asked for"}
        write_tar(f"{folder}/{n:05}.tar", (f"{n:06}", n, {"json": json.dumps(fields), "txt": f"raw {n}"}))
    return ["--caption_key=raw_caption,shortSV_captions,longSV_captions"], {None: {
        n: [f"raw {n}", *(["short"] if n else []), f"a {n}.", f"b {n}."] for n in range(5)}}


def umaru97(folder):
    for split, part in (("train", (0, 1, 2)), ("validation", (3,)), ("test", (4,))):
        rows = [hub_row(n, caption=FIVE[n], split="wrong", img_id=str(n), filename=f"{n}.jpg") for n in part]
        write_parquet(f"{folder}/data/{split}-00000-of-00001-0a1b2c3d4e5f.parquet", rows)
    return [], FIVE_BY_SPLIT


def bitmind(folder):
    """A row a caption, the picture repeated, also in another file."""
    rows = [hub_row(n, filename=f"{n}.jpg", split=SPLIT[n], cocoid=900 + n,
                    sentences={"tokens": ["a"], "raw": FIVE[n][k], "imgid": n})
            for k in range(5) for n in range(5)]
    for i in range(2):
        write_parquet(f"{folder}/data/part-0000{i}-of-00002.parquet", rows[13 * i:13 * i + 13])
    return [], FIVE_BY_SPLIT


def lmms_lab(folder):
    """One split, no column that tells it: Karpathy's list beside it does."""
    rows = [hub_row(n, caption=FIVE[n], img_id=str(n), filename=f"{n}.jpg") for n in range(5)]
    write_parquet(f"{folder}/data/test-00000-of-00001.parquet", rows)
    write(f"{folder}/dataset_flickr30k.json", LIST)
    return [], FIVE_BY_SPLIT


PAIRS = [img2dataset_webdataset, img2dataset_parquet, img2dataset_files, pixparse, clip_benchmark, dreamlip,
         umaru97, bitmind, lmms_lab]


def prepare(tmp_path, *words, source="source"):
    prepare_pairs_of("it", tmp_path / source, tmp_path / "data", *words)
    return content(tmp_path / "data", "it")


def whole(found):
    """All splits as one, in which each picture is there once."""
    parts = {n: captions for part in found.values() for n, captions in part.items()}
    assert len(parts) == sum(map(len, found.values()))
    return parts


@pytest.mark.parametrize("form", PAIRS, ids=lambda form: form.__name__)
def test_pairs_in_each_form(form, tmp_path, capsys):
    words, expected = form(tmp_path / "source")
    found = prepare(tmp_path, *words)
    if None in expected: # by a hash, but never none for validation
        assert found["val"]
        found = {None: whole(found)}
    assert found == expected
    assert "words/caption" in capsys.readouterr().out # the statistics of the thesis' tables
    failed = {"not fetched (failed_to_download)": 1} if form is img2dataset_parquet else {}
    assert json.loads((tmp_path / "data/it/meta.json").read_bytes())["failed"] == failed


NAMES = ["a dog", "a cat"]
LABELS = {"train": {0: 0, 1: 1, 2: 1}, "val": {3: 0, 4: 1}, "test": {5: -1}}


def imagenet_parquet(folder):
    for split, rows in LABELS.items():
        write_parquet(f"{folder}/data/{split}-00000-of-00001.parquet",
                      [hub_row(n, label=label) for n, label in rows.items()], NAMES)


def imagenet_wds(folder):
    for split in ("train", "val"):
        write_tar(f"{folder}/imagenet1k-{split}-0000.tar",
                  *((f"{n:07}", n, {"cls": f"{label}"}) for n, label in LABELS[split].items()))


def val_alone(folder):
    write_tar(f"{folder}/val/0.tar", *((f"s{n:07}", n, {"cls": f"{n - 3}\n"}) for n in (3, 4)))


@pytest.mark.parametrize("form, data", [
    (imagenet_parquet, "imagenet"), (imagenet_parquet, "own"), (imagenet_wds, "own"), (val_alone, "own")])
def test_labelled_sets_in_each_form(form, data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_imagenet, "NUM_CLASSES", 2)
    form(tmp_path / "source")
    prepare_imagenet.main(prepare_imagenet.get_args([
        f"--data={data}", f"--data_dir={tmp_path}/data", f"--source={tmp_path}/source"]))
    splits = ["val"] if form is val_alone else ["train", "val"]
    for split in splits:
        pairs = Pairs(f"{tmp_path}/data", data, split)
        found = {number(pairs.images[i]): label for i, label in enumerate(pairs.labels.tolist())}
        assert found == LABELS[split] and len(pairs.images) == len(found)
        assert pairs.meta["classes"] == (NAMES if form is imagenet_parquet else ["0", "1"])
    assert list(pairs.meta["splits"]) == splits


@pytest.mark.slow
def test_trains_and_is_judged(tmp_path):
    """Three steps of two loops, then a table, on one form: all are stored alike."""
    umaru97(tmp_path / "source")
    prepare(tmp_path)
    pairs = dict(kd_loss="none", align_loss="contrastive", unit="image", image_init="random",
                 text_init="random", text_depth=1)
    image = dict(teacher="ema", target_layers=1)
    for module, changes in ((distill_image, image), (distill_multimodal, pairs)):
        knobs = dict(SHAPE, data="it", data_dir=tmp_path / "data", out_dir=tmp_path / module.__name__,
                     depth=1, batch_size=2, max_steps=3, device="cpu")
        module.main(module.get_args(flags(knobs | changes)))
    assert (tmp_path / "distill_multimodal" / "retrieval.json").exists()


def numbered(folder, shards=6, each=20):
    """Shards of so many pictures -> {number: its caption} of all."""
    for s in range(shards):
        write_tar(f"{folder}/{s:05}.tar", *((f"{n:06}", n, {"txt": f"caption {n}"})
                                            for n in range(s * each, s * each + each)))
    return {n: [f"caption {n}"] for n in range(shards * each)}


@pytest.mark.parametrize("kind", ["in a header", "between members", "html", "two tars"])
def test_a_torn_shard_is_named_and_mended(tmp_path, kind, capsys):
    """All others are converted, and the whole one in its place gives what was missing."""
    expected, path = numbered(tmp_path / "source", 3, 20), tmp_path / "source/00000.tar"
    data = path.read_bytes()
    end = tarfile.open(path).getmembers()[-1].offset_data + 512 # behind the last text
    write(path, {"in a header": data[:700], "between members": data[:end], "html": b"<html>no</html>" * 99,
                 "two tars": data + data}[kind])
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 of 3 shards are torn"):
            prepare(tmp_path, "--caption_key=txt") # which the first shard has to have
        assert "torn: 00000.tar" in capsys.readouterr().out
        assert not os.path.exists(tmp_path / "data/it/meta.json")
    write(path, data)
    assert whole(prepare(tmp_path, "--caption_key=txt")) == expected


def test_links_on_the_disk_and_in_a_tar(tmp_path):
    """The hub's cache links to blobs, each read once; in a tar links are not, and no name becomes a path."""
    expected = numbered(tmp_path / "blobs", 2, 4)
    link = tarfile.TarInfo("000099.jpg")
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc/passwd"
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
    assert not [f for _, _, files in os.walk(tmp_path) for f in files if f.startswith("evil.")]


@pytest.mark.parametrize("source, said", [
    ("dead", "fetched none"), ("urls", "img2dataset"), ("keys", "no_such"), ("saved", "to_parquet"),
    ("other/a.beton", "a.beton")])
def test_what_cannot_be_read_is_named(tmp_path, source, said):
    write(f"{tmp_path}/dead/00000_stats.json", {"count": 10, "successes": 0})
    write(f"{tmp_path}/dead/00000.tar", tar_bytes([]))
    write_parquet(f"{tmp_path}/urls/0.parquet", [{"image_url": "http://x/1", "caption": "a"}])
    write(f"{tmp_path}/other/a.beton", b"x")
    write(f"{tmp_path}/saved/data-00000-of-00001.arrow", b"x")
    pixparse(tmp_path / "keys")
    words = ["--caption_key=no_such"] if source == "keys" else []
    assert said in refused(prepare, tmp_path, *words, source=source)


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
        fetched.append(url.rpartition("/")[2])
        if fetched[-1] not in broken:
            return write(path, (tmp_path / "hub" / fetched[-1]).read_bytes())
        broken.remove(fetched[-1])
        if fetched[-1] == "cc3m-train-0001.tar":
            raise SystemExit("no network")
        write(path, b"torn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_pairs, "download", download)
    counts = {"validation": 1, "train": 2}
    monkeypatch.setitem(prepare_pairs.HUB, "cc3m", (prepare_pairs.HUB["cc3m"][0], counts, 1))
    args = prepare_pairs.get_args(["--data=cc3m", f"--data_dir={tmp_path}/data", "--threads=2"])
    for said in ("no network", "torn"):
        with pytest.raises(SystemExit, match=said):
            prepare_pairs.main(args)
    prepare_pairs.main(args)
    assert content(tmp_path / "data", "cc3m") == expected
    assert len(fetched) == 3 + 2
    assert not [f for _, _, files in os.walk(tmp_path / "cache") for f in files]


def prepare_slowly(seconds, *words):
    """So many for each row."""
    note, prepare_pairs.COMMIT_SECONDS = prepare_pairs.SetWriter.note, 0.01
    prepare_pairs.SetWriter.note = lambda *args: (time.sleep(seconds), note(*args))[1]
    prepare_pairs.main(prepare_pairs.get_args(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize("form", [numbered, bitmind])
def test_killed_at_random(tmp_path, form):
    """SIGKILL at random moments: no duplicate, no gap, every caption under its picture."""
    expected = form(tmp_path / "source")
    words = ["--data=it", f"--data_dir={tmp_path}/data", f"--source={tmp_path}/source", "--threads=2"]
    begun = tmp_path / "data/it/begun.json"
    assert killed_at_random(lambda: start(prepare_slowly, 0.03, *words), begun, 6, 0.15) > 1
    found = {n: sorted(captions) for n, captions in whole(prepare(tmp_path)).items()}
    assert found == (FIVE if form is bitmind else expected)
