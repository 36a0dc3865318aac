"""
Prepares pictures with labels: ImageNet in any form it is handed out in, CIFAR, digits, or folders of your
own.

    python prepare_imagenet.py --data=imagenet --source=DIR                 # 155 GB, as fast as the disk
    python prepare_imagenet.py --data=imagenet --source=DIR --resize=256 --num_workers=16     # about 40 GB
    python prepare_imagenet.py --data=imagenet --source=DIR --limit=10000   # a trial, ten pictures of
                                                                              each class
    python prepare_imagenet.py --data=cifar10        # or cifar100: downloads 170 MB
    python prepare_imagenet.py --data=digits         # 1,797 digits that scikit-learn carries: no download,
                                                       two seconds
    python prepare_imagenet.py --data=flowers --source=DIR   # your own: DIR/{train,val,test}/<class>/*

DIR for ImageNet holds, for each split, one of (what was found is printed):

    ILSVRC2012_img_train.tar, or in train/ the tars inside it   image-net.org/download, behind a login
    ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz     likewise; the labels are in the devkit
    train_images_*.tar.gz, val_images.tar.gz (also in data/)    huggingface.co/datasets/ILSVRC/imagenet-1k
    train/<wnid>/*, val/<wnid>/*                                extracted; under ILSVRC/Data/CLS-LOC as
                                                                Kaggle has it
    val/*                                                       flat, with the devkit or Kaggle's
                                                                LOC_val_solution.csv

data/imagenet/ then holds <split>_images.{bin,idx} and <split>_labels.npy as described in prepare_pairs.py
and, last, meta.json: counts, classes, options, licence. A label is the rank of the class's name (ImageNet's
wnid) in sorted order; for CIFAR and digits the official number. ImageNet's 50,000 held-out pictures are split
"val"; CIFAR's official test sets and 500 of the digits are "test". A run that was killed goes on if the same
command is given again.
"""
import contextlib
import csv
import glob
import io
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image

from model import Parser, cache_folder, fail, make_folder, nearest, save_atomic, write_json
from prepare_pairs import (FLUSH_SECONDS, LABELLED, SOURCES, Bad, RecordWriter, add_lines, bytes_left,
                           going_on, open_journal, prepared, progress, resize_flags, to_record)

NUM_CLASSES, NUM_IMAGES = 1000, {"train": 1_281_167, "val": 50_000} # of ImageNet
FILE_BYTES = 115_000 # of a file of ImageNet, on average
MOST_BYTES = 2 ** 26 # read of a file: a few bytes of an archive can claim to be a terabyte of zeros
LICENCES = {"imagenet": "ImageNet's terms of access: non-commercial research and education",
            "cifar": "none stated; cite Krizhevsky 2009, Learning Multiple Layers of Features from "
                     "Tiny Images",
            "digits": "CC BY 4.0; Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits"}

# -----------------------------------------------------------------------------
# where pictures come from: a split is a list of shards, each read from its start to its end, always in the
# same order


class Shard(NamedTuple):
    where: str # file or folder, for messages
    members: Callable # () -> iterator of (name, function that reads the bytes)
    cls: str = None # of all its members, if it is one class


class Split(NamedTuple):
    layout: str # what was found, in words
    shards: list
    classes: list # sorted; None if only reading all of it would tell
    count: int # pictures and bytes; estimates where only reading all of it would tell
    nbytes: int
    class_of: Callable = None # name -> class or None, for shards of many classes


def is_junk(path):
    """What macOS and Windows leave in folders and archives: ._x.JPEG, .DS_Store, __MACOSX/, Thumbs.db."""
    parts = [p for p in re.split(r"[/\\]", path) if p.strip(".")]
    return not parts or any(p[0] == "." or p in ("__MACOSX", "Thumbs.db", "desktop.ini") for p in parts)


@contextlib.contextmanager
def readable(path):
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
        fail(f"{path} cannot be read, or not to its end: {e}. Half a download, or another file of that name? "
             f"Put the whole one there and give the same command again.")


def tar_members(path, inside=None):
    """The files of a tar, or of the tar that is its member `inside`. They are read as streams and never
    extracted, so that no name, link or device in an archive can reach the disk."""
    with contextlib.ExitStack() as stack:
        tar = stack.enter_context(tarfile.open(path))
        if inside:
            tar = stack.enter_context(tarfile.open(fileobj=tar.extractfile(inside)))
        while (member := tar.next()) is not None:
            tar.members.clear() # or tarfile keeps them all, a kilobyte each
            if member.isreg() and not is_junk(member.name):
                yield member.name, lambda: tar.extractfile(member).read(MOST_BYTES)


def read_file(path):
    with contextlib.suppress(OSError): # a bad sector: skipped like a broken picture
        if os.path.isfile(path): # no pipe, no device: they never end
            with open(path, "rb") as f:
                return f.read(MOST_BYTES)
    return b""


def folder_files(folder):
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not is_junk(f))
        yield from (os.path.join(here, f) for f in sorted(files) if not is_junk(f))


def folder_members(folder):
    for path in folder_files(folder):
        yield os.path.relpath(path, os.path.dirname(folder)), partial(read_file, path)


def array_members(images):
    for i, pixels in enumerate(images): # (H, W) or (H, W, 3) uint8
        png = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").save(png, "PNG")
        yield str(i), png.getvalue


def measure(folder):
    """Number of files in a folder and, from a few of them, about how many bytes."""
    paths = list(folder_files(folder))
    sizes = [os.path.getsize(p) for p in paths[::len(paths) // 16 + 1] if os.path.exists(p)]
    return len(paths), int(np.mean(sizes or [0]) * len(paths))


# -----------------------------------------------------------------------------
# layouts


def class_folders(folder, names):
    shards = [Shard(path := os.path.join(folder, c), partial(folder_members, path), c) for c in sorted(names)]
    sizes = [measure(shard.where) for shard in shards]
    if empty := [shard.where for shard, (count, _) in zip(shards, sizes) if count == 0]:
        fail(f"{empty[0]} is a class without pictures ({len(empty)} such). Did the extraction stop? Fill "
             f"or remove it.")
    return Split(f"{folder}/<class>/*", shards, sorted(names), *map(sum, zip(*sizes)))


def class_tars(path):
    """Tars named <wnid>.tar, in a folder or inside one large tar."""
    if os.path.isdir(path):
        tars = {f[:-4]: (os.path.join(path, f), None) for f in os.listdir(path) if f.endswith(".tar")
                and f[0] != "."}
    else:
        with readable(path), tarfile.open(path) as tar:
            tars = {os.path.basename(m.name)[:-4]: (path, m) for m in tar.getmembers()
                    if m.isreg() and m.name.endswith(".tar") and not is_junk(m.name)}
    shards = [Shard(f"{c}.tar of {path}", partial(tar_members, *tars[c]), c) for c in sorted(tars)]
    nbytes = sum(map(os.path.getsize, {tar for tar, _ in tars.values()}))
    return Split(f"class tars in {path}", shards, sorted(tars), nbytes // FILE_BYTES, nbytes)


def mixed(layout, shards, nbytes, class_of, look=True):
    """Pictures of all classes side by side. look: read their names first, to know how many and which
    classes."""
    count, classes = nbytes // FILE_BYTES, None
    if look:
        count, classes = 0, set()
        for shard in shards:
            with readable(shard.where):
                for name, _ in shard.members():
                    classes.add(class_of(name))
                    count += 1
        classes = sorted(classes - {None})
        if not classes:
            fail(f"{layout}: nothing says which class a picture is. Put ILSVRC2012_devkit_t12.tar.gz or "
                 f"Kaggle's LOC_val_solution.csv into --source (LOC_synset_mapping.txt lists only classes), "
                 f"or sort the pictures into folders, one a class.")
    return Split(layout, shards, classes, count, nbytes, class_of)


def val_classes(source):
    """{name without suffix: wnid} of ImageNet's validation pictures, by Kaggle's list or the devkit; {}
    without."""
    path = os.path.join(source, "LOC_val_solution.csv")
    if os.path.exists(path):
        # ImageId, PredictionString: "n03995372 85 1 499 272"
        with open(path, newline="", encoding="utf-8") as f:
            return {row[0]: row[1].split()[0] for row in csv.reader(f) if len(row) > 1 and row[1].strip()}
    members, path = [], os.path.join(source, "ILSVRC2012_devkit_t12")
    if os.path.exists(path + ".tar.gz"):
        members = tar_members(path + ".tar.gz")
    elif os.path.isdir(path):
        members = folder_members(path)
    with readable(path):
        devkit = {os.path.basename(name): read() for name, read in members
                  if name.endswith(("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))}
    if len(devkit) < 2:
        return {}
    try:
        from scipy.io import loadmat # which class has which number says only meta.mat, in MATLAB's own format
    except ImportError as e:
        fail(f"{e}, which reads the devkit's meta.mat. Run: pip install scipy; or put Kaggle's "
             f"LOC_val_solution.csv into {source}")
    synsets = loadmat(io.BytesIO(devkit["meta.mat"]), squeeze_me=True)["synsets"]
    wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()))
    numbers = devkit["ILSVRC2012_validation_ground_truth.txt"].split()
    return {f"ILSVRC2012_val_{i:08d}": wnids.get(int(number)) for i, number in enumerate(numbers, 1)}


def find_split(source, split):
    """The Split in whichever layout is there, or None."""
    table = {}

    def class_of(name):
        if match := re.search(r"_(n\d{8})\.\w+$", name): # Hugging Face's names
            return match[1]
        if not table:
            table.update(val_classes(source) or {"": None})
        return table.get(os.path.splitext(os.path.basename(name))[0])

    for root in (source, os.path.join(source, "data"), os.path.join(source, "ILSVRC", "Data", "CLS-LOC")):
        tar, folder = os.path.join(root, f"ILSVRC2012_img_{split}.tar"), os.path.join(root, split)
        if os.path.exists(tar) and split == "train":
            return class_tars(tar)
        parts = glob.glob(os.path.join(glob.escape(root), f"{split}_images*.tar.gz"))
        parts = [tar] if os.path.exists(tar) else sorted(parts, key=lambda p: (len(p), p)) # 10 after 9
        if parts: # the train parts are not unpacked twice: val has their classes too
            return mixed(", ".join(parts), [Shard(part, partial(tar_members, part)) for part in parts],
                         sum(map(os.path.getsize, parts)), class_of, look=split != "train")
        if os.path.isdir(folder):
            names = [name for name in os.listdir(folder) if not is_junk(name)]
            classes = [name for name in names if os.path.isdir(os.path.join(folder, name))]
            if classes:
                return class_folders(folder, classes)
            if any(name.endswith(".tar") for name in names):
                return class_tars(folder)
            if split != "test": # ImageNet's has no labels
                shard = Shard(folder, partial(folder_members, folder))
                return mixed(f"{folder}/*", [shard], measure(folder)[1], class_of)


def find_folders(args):
    """--source -> {split: Split}, classes."""
    if not args.source:
        fail(f"--data={args.data} needs --source=DIR, a folder in one of the layouts that --help lists"
             f"{nearest(args.data, set(LABELLED) - {args.data}, '--data=')}")
    if not os.path.isdir(args.source):
        fail(f"--source={args.source} is no folder. Give the folder that holds the files.")
    imagenet = args.data == "imagenet"
    found = {s: f for s in ("train", "val", "test")[:2 if imagenet else 3]
             if (f := find_split(args.source, s))}
    missing = [s for s in ("train", "val") if s not in found and not (s == "val" and "test" in found)]
    if missing:
        fail(f"no {' and no '.join(missing)} pictures in {args.source}, in no layout that --help lists. "
             f"There is: {', '.join(sorted(os.listdir(args.source))[:9]) or 'nothing'}")
    first = next(f for f in found.values() if f.classes is not None)
    for f in (f for f in found.values() if f.classes is not None):
        if imagenet and (len(f.classes) != NUM_CLASSES
                         or not all(re.fullmatch(r"n\d{8}", c) for c in f.classes)):
            fail(f"{f.layout}: {len(f.classes):,} classes ({', '.join(f.classes[:3])} ..), but ImageNet has "
                 f"{NUM_CLASSES:,}, named n01440764 and so on. Half a download or extraction? A part of "
                 f"ImageNet needs a name of its own: --data=NAME")
        if unknown := sorted(set(f.classes) - set(first.classes)):
            fail(f"{f.layout} has classes that {first.layout} lacks: {', '.join(unknown[:5])} "
                 f"({len(unknown)} in all)")
    if len(first.classes) < 2:
        fail(f"{first.layout}: {len(first.classes)} class, at least 2 are needed")
    return found, first.classes


def find_cifar(args):
    # here, since it takes a second to import; downloads, and compares checksums
    from torchvision import datasets
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.data]
    root = os.path.normpath(args.source or os.path.join(cache_folder(), "cifar"))
    if os.path.basename(root) == reader.base_folder:
        root = os.path.dirname(root) # torchvision wants the folder above
    if args.source and not any(os.path.exists(os.path.join(root, n))
                               for n in (reader.base_folder, reader.filename)):
        fail(f"{args.source} holds neither {reader.filename} nor {reader.base_folder}/. "
             f"Leave it out to download.")
    try:
        os.makedirs(root, exist_ok=True)
        train, test = (reader(root, train, download=True) for train in (True, False))
    except (RuntimeError, OSError, EOFError, tarfile.TarError, zlib.error) as e: # OSError: of the network too
        fail(f"{reader.filename} cannot be had at {root}: {e}. Fetch {reader.url} where there is a network "
             f"and give its folder with --source=DIR; it is unpacked there")
    return from_arrays(f"torchvision's {reader.__name__} in {root}", train.classes,
                       train=(train.data, train.targets), test=(test.data, test.targets))


def find_digits(args):
    try:
        from sklearn.datasets import load_digits # the package carries the pictures
    except ImportError as e:
        fail(f"{e}. Run: pip install scikit-learn")
    data = load_digits() # (1797, 8, 8), 0 .. 16
    images = [np.asarray(Image.fromarray(np.uint8(x * 15.9)).resize((32, 32), Image.BICUBIC))
              for x in data.images]
    order = np.random.RandomState(0).permutation(len(images)) # the generator whose numbers never change
    splits = {"train": order[:-500], "test": order[-500:]}
    return from_arrays("scikit-learn's load_digits, drawn 32 x 32", [str(i) for i in range(10)],
                       **{split: ([images[i] for i in part], data.target[part])
                          for split, part in splits.items()})


def from_arrays(layout, classes, **splits):
    return {split: Split(layout, [Shard(layout, partial(array_members, images))], classes, len(labels),
                         2500 * len(labels), lambda name, labels=labels: classes[labels[int(name)]])
            for split, (images, labels) in splits.items()}, list(classes)


# -----------------------------------------------------------------------------
# one picture


class Convert(torch.utils.data.Dataset):
    """(entry, bytes of a file) -> (entry, record, why it is skipped or ""). A Dataset, since a DataLoader
    whose "indices" are what stream() yields does the rest: workers in parallel, results in order, few under
    way."""

    def __init__(self, args):
        self.resize, self.quality = args.resize, args.quality
        self.verify = args.data != "imagenet" # whose files are known to be sound when they are whole

    def __getitem__(self, item):
        entry, data = item
        try:
            return entry, to_record(data, self.resize, self.quality, verify=self.verify), ""
        except Bad as e:
            return entry, b"", f"{e} ({e.__cause__})" if e.__cause__ else str(e)


def end_with_parent(worker):
    """In a worker: end when the parent was killed. DataLoader's own watch waits for someone to read the
    results."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


# -----------------------------------------------------------------------------
# writing, and going on


class Journal:
    """What was done of a split, a line for each file: [shard, position in it, name, label, where its record
    ends, why it was skipped]."""

    def __init__(self, prefix):
        self.last, size = (0, -1, None), bytes_left(prefix + "_images")
        self.taken, self.labels, self.ends, self.skipped = Counter(), [], [], []

        def take(entry):
            if entry[4] > size: # after a power cut the records may be behind
                return False
            self.add(*entry)
            return True

        self.file = open_journal(prefix + "_journal.jsonl", f"{prefix}_images.bin", take)

    def add(self, shard, position, name, label, end, problem):
        self.last = shard, position, name
        self.taken[label] += 1
        if problem:
            self.skipped.append(f"{name}: {problem}")
        else:
            self.labels.append(label)
            self.ends.append(end)


def stream(found, classes, journal, limit):
    """Yields ((shard, position, name, label), bytes) of each file that is to be taken and not in the
    journal."""
    rank, C, taken = {c: i for i, c in enumerate(classes)}, len(classes), Counter(journal.taken)
    # N of C classes: N / C of each, rounded down or up so that the sum is N and the larger ones are spread
    quota = [(i + 1) * limit // C - i * limit // C if limit else sys.maxsize for i in range(C)]
    left = (limit or sys.maxsize) - sum(taken[i] for i in range(C))
    first, last, last_name = journal.last
    for s, shard in enumerate(found.shards[first:], first):
        with readable(shard.where):
            for position, (name, read) in enumerate(shard.members()):
                if not left:
                    return
                if (s, position) == (first, last) and name != last_name:
                    fail(f"{shard.where} has changed since this was begun: {name} is where {last_name} was. "
                         f"Remove what was written to start again, or bring the old files back.")
                if (s, position) <= (first, last):
                    continue
                label = rank.get(shard.cls or found.class_of(name), -1) # -1: nothing says what it is
                if label >= 0:
                    if taken[label] == quota[label]:
                        if shard.cls:
                            break
                        continue
                    taken[label] += 1
                    left -= 1
                yield (s, position, name, label), read() if label >= 0 else b""


def write_split(folder, split, found, classes, args):
    """Writes <split>_images and <split>_labels; returns the entry of meta.json."""
    prefix = os.path.join(folder, split)
    journal, lines = Journal(prefix), []
    writer = RecordWriter(prefix + "_images", journal.ends)
    flush = partial(add_lines, journal.file, lines, [writer])
    done, flushed, total = journal.taken.total(), time.time(), min(args.limit or found.count, found.count)
    if done:
        print(f"{split}: {done:,} files were done by an earlier run; going on")
    loader = torch.utils.data.DataLoader(Convert(args), sampler=stream(found, classes, journal, args.limit),
                                         batch_size=None, num_workers=args.num_workers,
                                         worker_init_fn=end_with_parent,
                                         prefetch_factor=8 if args.num_workers else None)
    with going_on(f"{prefix}_images.bin", flush):
        with progress(desc=split, total=max(total, done), initial=done, unit=" images") as bar:
            for (*where, label), record, problem in loader:
                if record:
                    writer.write(record)
                lines.append((*where, label, writer.offsets[-1], problem if label >= 0 else "no known class"))
                journal.add(*lines[-1])
                bar.update()
                if time.time() - flushed > FLUSH_SECONDS:
                    flush()
                    flushed = time.time()
        flush()
        if not journal.labels:
            fail(f"{found.layout}: no picture that can be read. {'; '.join(journal.skipped[:3])}")
        writer.close()
    save_atomic(prefix + "_labels.npy", lambda f: np.save(f, np.asarray(journal.labels, np.int64)))
    return {"images": len(journal.labels), "classes": len(set(journal.labels)), "bytes": writer.offsets[-1],
            "skipped": len(journal.skipped), "skipped_files": journal.skipped[:20]}


def check_disk(folder, found, args):
    """Says how much will be written, and ends the program if there is no room for it."""
    need = 0
    for f in found.values():
        count = min(args.limit or f.count, f.count)
        # 0.35 bytes a pixel at quality 90
        small = count * args.resize ** 2 * 4 / 3 * 0.35 if args.resize else np.inf
        need += min(f.nbytes * count / max(f.count, 1), small)
    have = sum(bytes_left(os.path.join(folder, f"{split}_images")) for split in found)
    free = shutil.disk_usage(folder).free
    print(f"{folder} needs about {need / 1e9:.2f} GB, {have / 1e9:.2f} are there, {free / 1e9:.2f} are free")
    if need - have > free:
        fail("the disk has no room for it. Give another --data_dir, or smaller pictures (--resize=256), or "
             "fewer (--limit=10000).")


# -----------------------------------------------------------------------------


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "imagenet", "which set to prepare: imagenet, cifar10, cifar100, digits, or a new name for "
           "pictures of your own")
    p.knob("data_dir", "data", "folder of all prepared data sets; this one goes to DATA_DIR/DATA")
    p.knob("source", None, "folder with the files, in one of the layouts above; it is only read. CIFAR: the "
           "folder with cifar-10-python.tar.gz, which torchvision unpacks there; "
           "without it, that is downloaded", type=str)
    resize_flags(p)
    p.knob("limit", 0, "pictures of each split at most, for a trial, equally many of each class; 0: all. "
           "Labels are those of the whole set")
    p.knob("num_workers", 0, "processes that decode and resize; 0: none but this one. The result is the same")
    return p.parse(argv)


def main(args):
    folder = os.path.join(args.data_dir, args.data)
    done, begun = os.path.join(folder, "meta.json"), os.path.join(folder, "begun.json")
    if not re.fullmatch(r"\w[\w.-]*", args.data) or args.data in SOURCES:
        fail(f"--data={args.data} is "
             f"{'made by prepare_pairs.py' if args.data in SOURCES else 'no name for a folder'}")
    source = os.path.realpath(args.source) if args.source else None
    if source and os.path.join(source, "").startswith(os.path.join(os.path.realpath(folder), "")):
        fail(f"--source={args.source} lies where the result goes, {folder}. "
             f"Move it, or give another --data_dir.")
    options = {"made_by": "prepare_imagenet.py", # what makes another set of it
               **{k: getattr(args, k) for k in ("resize", "quality", "limit")}}
    meta = prepared(folder, args, options | ({"source": source} if source else {}))
    if os.path.exists(done):
        print(f"{folder} is already prepared; remove it to do it again")
    else:
        find = {"digits": find_digits, "cifar10": find_cifar, "cifar100": find_cifar}.get(
            args.data, find_folders)
        found, classes = find(args)
        for split, f in found.items():
            print(f"{split}: found {f.layout}")
        make_folder(folder, f"--data_dir={args.data_dir}: {folder}")
        check_disk(folder, found, args)
        if meta and meta["classes"] != classes:
            fail(f"{folder} was begun with other classes ({len(meta['classes']):,}, now {len(classes):,}). "
                 f"Remove it to start again.")
        meta = {"data": args.data, "source": source,
                "layout": {split: f.layout for split, f in found.items()}, **options,
                "license": LICENCES.get(args.data.rstrip("0123456789"), "that of the source"),
                "classes": classes}
        write_json(begun, meta)
        # in this order, but the small one first: what is wrong shows early
        meta["splits"] = dict.fromkeys(found)
        for split in sorted(found, key=lambda split: found[split].count):
            meta["splits"][split] = write_split(folder, split, found[split], classes, args)
        write_json(done, meta)
        print(f"wrote {folder}; licence: {meta['license']}")
    for pattern in ("begun.json*", "*_journal.jsonl"): # of begun.json also what a kill left of writing it
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)
    print(f"{'split':8}{'images':>12}{'classes':>10}{'GB':>10}{'skipped':>10}")
    for split, c in meta["splits"].items():
        print(f"{split:8}{c['images']:>12,}{c['classes']:>10,}{c['bytes'] / 1e9:>10.3f}{c['skipped']:>10,}")
        for name in c["skipped_files"]:
            print(f"  skipped {name}")
        files = c["images"] + c["skipped"]
        if args.data == "imagenet" and not args.limit and NUM_IMAGES[split] != files:
            print(f"  note: ImageNet has {NUM_IMAGES[split]:,} of these, {args.source or 'the source'} "
                  f"had {files:,}")
    if "val" in meta["splits"]:
        print(f"next: python distill_image.py --data={args.data} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
