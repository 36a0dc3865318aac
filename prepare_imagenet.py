"""
Prepares pictures with labels: ImageNet in any form it is handed out in, CIFAR, digits, or folders of your
own. Owns the packed records of all sets, the reader of tars and parquet, and all that is done to a picture.

    python prepare_imagenet.py --data=imagenet --source=DIR                 # 155 GB, as fast as the disk
    python prepare_imagenet.py --data=imagenet --source=DIR --resize=256    # about 40 GB, all cores
    python prepare_imagenet.py --data=imagenet --source=DIR --limit=10000   # a trial, ten of each class
    python prepare_imagenet.py --data=cifar10        # or cifar100: downloads 170 MB
    python prepare_imagenet.py --data=digits         # 1,797 digits that scikit-learn carries: two seconds
    python prepare_imagenet.py --data=flowers --source=DIR   # your own: DIR/{train,val,test}/<class>/*

DIR holds, for each split, one of (a split alone will do, as val for zero-shot):

    ILSVRC2012_img_train.tar, or in train/ the tars inside it   image-net.org/download, behind a login
    ILSVRC2012_img_val.tar or val/*, and LOC_val_solution.csv   likewise; the table of labels is Kaggle's
    data/train-00000-of-00294.parquet ..                        huggingface.co/datasets/ILSVRC/imagenet-1k
    *train*.tar, *val*.tar of .jpg and .cls                     webdataset; or in folders train/, val/
    train/<class>/*, val/<class>/* or <class>.tar               extracted, also as Kaggle has it, under
                                                                ILSVRC/Data; valid and dev are val, too

data/imagenet/ then holds <split>_images.bin (encoded pictures end to end), .idx (N + 1 offsets, uint64,
little-endian), <split>_labels.npy (int64) and, written last, meta.json. A label is the rank of the class's
name (ImageNet's wnid) in sorted order, or the number given in CIFAR, digits, parquet or .cls. CIFAR's
official test sets and 500 of the digits are "test". The same command again goes on after a kill.
"""
import concurrent.futures
import contextlib
import csv
import glob
import io
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tarfile
import threading
import time
import warnings
import zlib
from collections import deque
from functools import cache, partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from model import (IMAGENET_MEAN, IMAGENET_STD, Parser, cache_folder, fail, going_on, lock, nearest, prepared,
                   progress, write_json)

LABELLED = ("imagenet", "cifar10", "cifar100", "digits") # the sets that this script knows
NO_SOURCE = ("cifar10", "cifar100", "digits", "openmoji", "coco", "cc3m", "cc12m") # made without --source
NUM_CLASSES, NUM_IMAGES = 1000, {"train": 1_281_167, "val": 50_000} # of ImageNet
LICENCES = {"imagenet": "ImageNet's terms of access: non-commercial research and education",
            "cifar": "none stated; cite Krizhevsky 2009, Learning Multiple Layers of Features ..",
            "digits": "CC BY 4.0; Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits"}

# -----------------------------------------------------------------------------
# the packed-record format

COMMIT_SECONDS = 5 # the most work that a kill costs


class Growing:
    """A file that is appended to as <path>.tmp and appears under its name at close(), when it is whole. Of
    what an earlier writer left the first `size` bytes are kept, and what lies behind them is cut off."""

    def __init__(self, path, size=0):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path = path
        if size and not os.path.exists(path + ".tmp"): # the earlier writer closed it
            os.replace(path, path + ".tmp")
        self.file = open(path + ".tmp", "r+b" if size else "wb", buffering=1 << 20)
        if self.file.seek(0, os.SEEK_END) < size:
            fail(f"{path}.tmp has lost its end. Remove {os.path.dirname(path)} to start again.")
        self.file.truncate(size)
        self.file.seek(size)

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.flush()
        self.file.close()
        os.replace(self.path + ".tmp", self.path)


class RecordWriter:
    """Writes <prefix>.bin and <prefix>.idx, behind the first `count` records of an earlier writer."""

    def __init__(self, prefix, count=0):
        self.index = Growing(prefix + ".idx", 8 * (count + 1) if count else 0)
        self.count, self.nbytes = count, 0
        if count:
            self.index.file.seek(8 * count)
            self.nbytes = int.from_bytes(self.index.file.read(8), "little")
        else:
            self.index.file.write(bytes(8))
        self.records = Growing(prefix + ".bin", self.nbytes)

    def write(self, record):
        """record: bytes. Returns its index."""
        self.records.file.write(record)
        self.nbytes += len(record)
        self.index.file.write(self.nbytes.to_bytes(8, "little"))
        self.count += 1
        return self.count - 1

    def flush(self):
        self.records.flush()
        self.index.flush()

    def close(self):
        self.records.close()
        self.index.close()


class NumberWriter(Growing):
    """Writes <prefix>.npy, an int64 array, behind the first `count` numbers of an earlier writer."""

    def __init__(self, prefix, count=0):
        super().__init__(prefix + ".npy", 128 + 8 * count if count else 0)
        self.count = count
        if not count:
            self.file.write(bytes(128)) # the header, which says how many, comes last

    def write(self, number):
        self.file.write(number.to_bytes(8, "little", signed=True))
        self.count += 1

    def close(self):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({self.count},), }}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n") # 128 bytes
        super().close()


class SetWriter:
    """Appends to the splits of a set. .state, kept in begun.json, says how much of each file counts and, by
    what the caller puts there, where to go on: commit() writes both at once. What a killed run wrote behind
    that is cut off. `head` is what .state begins with; another one later is refused, but for empty {}, which
    the caller fills. `columns` are those of used.tsv, which is kept if there are any."""

    def __init__(self, folder, head, columns=()):
        warnings.filterwarnings("ignore", module="PIL") # corrupt EXIF is common and harmless
        self.folder = folder
        self.begun = os.path.join(folder, "begun.json")
        self.files = {} # (split, what) -> its writer
        self.state = {**head, "splits": {}, "used": 0}
        self.committed = time.monotonic()
        if os.path.exists(self.begun):
            self.state = json.loads(pathlib.Path(self.begun).read_bytes())
            other = [key for key, value in head.items() if value != {} and self.state.get(key) != value]
            if other:
                fail(f"{folder} was begun with other {', '.join(other)}. Bring it back, or remove {folder}.")
        for path in glob.glob(os.path.join(glob.escape(folder), "*")):
            if re.search(r"meta\.json$|\.tmp\d+$", path): # no set until it is whole again; left by a kill
                os.remove(path)
        if columns:
            self.files["used"] = Growing(os.path.join(folder, "used.tsv"), self.state["used"])
            if not self.state["used"]:
                self.note(*columns)

    def count(self, split, what="images"):
        return self.state["splits"].get(split, {}).get(what, 0)

    def file(self, split, what):
        """The writer of <split>_<what>, opened behind what counts of it."""
        if (split, what) not in self.files:
            kind = RecordWriter if what in ("images", "captions") else NumberWriter
            prefix = os.path.join(self.folder, f"{split}_{what}")
            self.files[split, what] = kind(prefix, self.count(split, what))
        return self.files[split, what]

    def write(self, split, what, value):
        self.file(split, what).write(value)
        self.state["splits"].setdefault(split, {})[what] = self.file(split, what).count

    def add(self, split, record, captions=(), label=None):
        """A picture, bytes, with its captions, str, or its label, int. Returns its index."""
        self.write(split, "images", record)
        if label is not None:
            self.write(split, "labels", label)
        self.add_captions(split, self.count(split) - 1, captions)
        return self.count(split) - 1

    def add_captions(self, split, image, captions):
        counts = self.state["splits"][split]
        for caption in captions:
            self.write(split, "captions", caption.encode("utf-8", "replace"))
            self.write(split, "text_to_image", image)
            counts["words"] = counts.get("words", 0) + len(caption.split())

    def note(self, *cells):
        """A line of used.tsv."""
        line = "\t".join(re.sub(r"[\t\r\n]", " ", str(cell)) for cell in cells)
        self.state["used"] += self.files["used"].file.write(f"{line}\n".encode("utf-8", "replace"))

    def notes(self):
        """The lines of used.tsv that count, but the first, as lists of cells."""
        self.files["used"].flush()
        with open(self.files["used"].path + ".tmp", encoding="utf-8", newline="\n") as f:
            yield from (line.rstrip("\n").split("\t") for line in itertools.islice(f, 1, None))

    def commit(self, seconds=0):
        """Makes what was written count, if the last time is at least so many seconds ago."""
        if time.monotonic() - self.committed >= seconds:
            for file in self.files.values():
                file.flush()
            write_json(self.begun, self.state)
            self.committed = time.monotonic()

    def close(self):
        """Gives all files their names -> {split: counts}, what meta.json says of them."""
        self.commit()
        splits = {}
        for split, counts in self.state["splits"].items():
            N, M = counts["images"], counts.get("captions")
            splits[split] = {"images": N, "bytes": self.file(split, "images").nbytes}
            if M:
                splits[split] |= {"captions": M, "captions_per_image": round(M / N, 2),
                                  "words_per_caption": round(counts["words"] / M, 2)}
            for what in counts.keys() & {"captions", "text_to_image", "labels"}:
                self.file(split, what) # opened, so that the next lines close it
        for file in self.files.values():
            file.close()
        return splits


class Records:
    """Reads what RecordWriter wrote: len(records), records[i] -> bytes. Opened for each read, and no memory
    map: there is nothing for workers to share, and resident memory stays flat however long a run is."""

    def __init__(self, prefix):
        self.path = prefix + ".bin"
        self.offsets = np.fromfile(prefix + ".idx", "<u8")
        size = os.path.getsize(self.path)
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != size \
                or (np.diff(self.offsets.astype(np.int64)) < 0).any():
            raise ValueError(f"{self.path} has {size} bytes, its .idx does not describe them: half a copy?")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.path}")
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        return np.fromfile(self.path, np.uint8, end - start, offset=start).tobytes()


class Texts(Records):
    """Records of UTF-8, read as str; texts[a:b] is a list."""

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        # prepare_pairs.py keeps 2,000 characters of at most four bytes; other sets may hold anything
        return super().__getitem__(i)[:8000].decode("utf-8", "replace")


class Pairs:
    """One split of a prepared set: images (Records), captions (Texts, or [] without, unless needs_captions),
    text_to_image (M,) int64, labels (N,) int64 or None, meta (dict). Ends the program, naming the command to
    run, if the set is not there or not whole."""

    def __init__(self, data_dir, name, split, needs_captions=False):
        warnings.filterwarnings("ignore", module="PIL") # corrupt EXIF is common and harmless
        folder = os.path.join(os.path.expanduser(data_dir), name)
        script = "prepare_imagenet.py" if name in LABELLED else "prepare_pairs.py"
        source = "" if name in NO_SOURCE else " --source=DIR"
        advice = f"Run: python {script} --data={name} --data_dir={data_dir}{source} (which --help explains)"
        meta = os.path.join(folder, "meta.json")
        if not name or not os.path.exists(meta):
            what = "is half-written" if os.path.isdir(folder) else "is not there"
            fail(f"data set {name}: {folder} {what} (no meta.json). {advice}")
        try:
            self.meta = json.loads(pathlib.Path(meta).read_bytes())
            if split not in self.meta["splits"]:
                fail(f"data set {name} has no split {split!r}, only {', '.join(self.meta['splits'])}")
            prefix, counts = os.path.join(folder, split), self.meta["splits"][split]
            self.images, self.labels = Records(prefix + "_images"), None
            self.captions, self.text_to_image = [], np.zeros(0, np.int64)
            if counts.get("captions"):
                self.captions = Texts(prefix + "_captions")
                self.text_to_image = np.load(prefix + "_text_to_image.npy")
            elif needs_captions:
                fail(f"data set {name} has no captions, only pictures. Take one that has both, as from: "
                     f"python prepare_pairs.py --data=openmoji")
            if os.path.exists(prefix + "_labels.npy"):
                self.labels = np.load(prefix + "_labels.npy")
            N, M = len(self.images), len(self.captions)
            if (N, M) != (counts["images"], counts.get("captions", 0)):
                raise ValueError(f"{prefix}_*: {N} pictures and {M} captions are not what meta.json says")
            for what, length in (("text_to_image", M), ("labels", N)):
                numbers = getattr(self, what)
                if numbers is not None and (numbers.dtype != np.int64 or numbers.shape != (length,)):
                    raise ValueError(f"{prefix}_{what}.npy: not {length} numbers of int64")
            if M and (self.text_to_image.min() < 0 or self.text_to_image.max() >= N
                      or not np.bincount(self.text_to_image, minlength=N).all()):
                raise ValueError(f"{prefix}_text_to_image.npy: captions or pictures without the other")
        except Exception as e: # numpy and json raise nearly anything on broken files
            fail(f"data set {name} is damaged: {e}. Remove {folder} and prepare it again. {advice}")


class ByLabel:
    """Labels (n,) -> [k]: the positions of the k-th label in rising order. Two arrays, not a list of millions
    of small ones: every worker of a loader would end with a copy of those."""

    def __init__(self, labels):
        self.order = np.argsort(labels, kind="stable") # (n,)
        first = np.flatnonzero(np.diff(labels[self.order])) + 1
        self.starts = np.concatenate([[0], first, [len(labels)]]) # (number of labels + 1,)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, k):
        return self.order[self.starts[k]:self.starts[k + 1]]


# -----------------------------------------------------------------------------
# files, tars and parquet: read as streams, and nothing in them is ever extracted, so that no name, link or
# device in an archive can reach the disk

MOST_BYTES = 2 ** 26 # read of a file: a few bytes of an archive can claim to be a terabyte of zeros
PICTURE_NAMES = ("jpg", "jpeg", "png", "webp") # of a tar's members
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes")
LABEL_FIELDS = ("cls", "label", "labels", "fine_label", "class")
SPLITS = {"train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val",
          "validation": "val", "dev": "val", "test": "test", "testing": "test"}
UNREADABLE = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) # ValueError: pyarrow's are such


def split_of(name):
    """The split that a path relative to its source names, the last part first; or None."""
    for part in reversed(re.split(r"[/\\]", name.lower())):
        for word in re.findall(r"[a-z]+", part):
            if word in SPLITS and word != "restval":
                return SPLITS[word]


def shown(path):
    """A path as text that can be printed and stored: bytes that are no UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_junk(path):
    """What macOS and Windows leave in folders and archives: ._x.JPEG, .DS_Store, __MACOSX/, Thumbs.db."""
    parts = [p for p in path.replace("\\", "/").split("/") if p.strip(".")]
    return not parts or any(p[0] == "." or p in ("__MACOSX", "Thumbs.db", "desktop.ini") for p in parts)


def walk(folder, endings=("",)):
    """Yields the files under a folder with these endings, sorted. Links are followed, but each file and
    folder is read once: what was read under another name is named and left out."""
    seen = set()

    def is_new(path):
        try:
            stat = os.stat(path)
        except OSError: # a link to nothing: the reader finds that out, and counts it
            return True
        if (stat.st_dev, stat.st_ino) in seen:
            print(f"note: {shown(path)} is another name of what is read already: left out")
            return False
        seen.add((stat.st_dev, stat.st_ino))
        return True

    is_new(folder)
    for here, folders, files in os.walk(folder, followlinks=True):
        names = sorted(files, key=lambda name: (os.path.islink(os.path.join(here, name)), name))
        paths = [os.path.join(here, name) for name in names if not is_junk(name)]
        yield from (path for path in paths if path.lower().endswith(endings) and is_new(path))
        folders[:] = [name for name in sorted(folders)
                      if not is_junk(name) and is_new(os.path.join(here, name))]


def read_file(path):
    """The bytes of a file, MOST_BYTES at most; none of what cannot be read."""
    with contextlib.suppress(OSError): # a bad sector: skipped like a broken picture
        if os.path.isfile(path): # no pipe, no device: they never end
            with open(path, "rb") as f:
                return f.read(MOST_BYTES)
    return b""


def folder_members(folder):
    """Yields (name, function that reads the bytes) of all files under a folder."""
    for path in walk(folder):
        yield shown(os.path.relpath(path, os.path.dirname(folder))), partial(read_file, path)


class Member(tarfile.TarInfo):
    """A header in a tar. tarfile takes a damaged one, or the end of the file, for the end of the tar: here
    that is only the mark which writers put there, and all else raises tarfile.ReadError."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"it ends without the mark of an end ({e})") from None


def tar_members(path, inside=None):
    """Yields (name, function that reads the bytes, before the next is asked for) of the files of a tar, or of
    the tar that is its member `inside`."""
    with contextlib.ExitStack() as stack:
        tar = stack.enter_context(tarfile.open(path, tarinfo=Member))
        if inside:
            tar = stack.enter_context(tarfile.open(fileobj=tar.extractfile(inside), tarinfo=Member))
        member = tar.next() if tar.firstmember else None # of an empty one Python 3.10 may not be asked
        while member is not None:
            tar.members.clear() # or tarfile keeps them all, a kilobyte each
            if member.isreg() and not is_junk(member.name):
                yield member.name, lambda: tar.extractfile(member).read(MOST_BYTES)
            member = tar.next()
        if not inside and isinstance(tar.fileobj, io.BufferedReader) \
                and os.path.getsize(path) - tar.offset > 1 << 16:
            raise tarfile.ReadError("there is more behind the mark of its end: several tars in one file?")


def grouped(members):
    """Members of a tar or folder -> samples. Consecutive names that are equal up to the first dot of their
    last part are one sample, in any order."""
    key, data, fields, kinds = None, b"", {}, set()
    for name, read in members:
        folder, slash, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        stem, kind = folder + slash + stem, kind.lower()
        if kinds and (stem != key or kind in kinds):
            yield key, data, fields
            data, fields, kinds = b"", {}, set()
        key = stem
        if kind in PICTURE_NAMES and not data:
            data = read()
        elif kind in ("txt", "cls"):
            fields[kind] = read().decode("utf-8", "replace")
        elif kind == "json" and not stem.endswith(("_stats", "_info")):
            with contextlib.suppress(ValueError): # what it should have said is missing then, and counted so
                found = json.loads(read())
                fields = {**found, **fields} if isinstance(found, dict) else fields
        else:
            continue
        kinds.add(kind)
    if kinds:
        yield key, data, fields


def table_samples(path):
    """Yields the samples of a parquet file."""
    try:
        from pyarrow import parquet
    except ImportError as e:
        fail(f"{e}, which reads {path}. Run: pip install pyarrow")
    with parquet.ParquetFile(path, buffer_size=1 << 20) as file: # else a row group is read at once
        # bytes, or a struct that holds them, as the hub's libraries write it
        found = [field.name for field in file.schema_arrow if str(field.type) in ("binary", "large_binary")
                 or str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0]
        if not found:
            fail(f"{path} has no column of pictures, only {', '.join(file.schema_arrow.names)}. Of urls "
                 "img2dataset makes shards (python prepare_pairs.py --help); a .csv can name urls and files.")
        column = min(found, key=lambda name: (*PICTURE_COLUMNS, name).index(name))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(32))
        for n, row in enumerate(rows):
            data = row.pop(column)
            yield str(row.get("key") or n), (data["bytes"] if isinstance(data, dict) else data) or b"", row


def samples(path):
    """Yields key, bytes of the picture (or b"") and fields, {name: value}, of a webdataset tar, a parquet
    file, or a folder of key.jpg, key.txt, key.json. Fields are the columns, or the keys of .json and "txt"
    and "cls", the contents of such members. Raises one of UNREADABLE for what is torn."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not is_junk(name))
        return grouped((name, partial(read_file, os.path.join(path, name))) for name in names)
    return table_samples(path) if path.endswith(".parquet") else grouped(tar_members(path))


def find_shards(source):
    """What samples() reads in a folder, or the one file that source is: [(name relative to source, path)]. A
    parquet file beside a tar or folder of its name is what img2dataset noted about it."""
    if not os.path.isdir(source):
        return [(os.path.basename(source), source)]
    found = list(walk(source, (".tar", ".parquet")))
    paths = [path for path in found if path.endswith(".tar") or path[:-8] + ".tar" not in found
             and not os.path.isdir(path[:-8])]
    if len({path.endswith(".tar") for path in paths}) > 1:
        fail(f"--source={source} holds both .tar and .parquet: give the folder of one of them.")
    if not paths: # img2dataset's "files"
        endings = tuple(f".{kind}" for kind in PICTURE_NAMES)
        paths = sorted({os.path.dirname(path) for path in walk(source, endings)})
    return [(shown(os.path.relpath(path, source)), path) for path in paths]


def in_order(work, items, threads=0):
    """Yields (item, work(item)) in the order of items, some at a time in so many threads (0: one a core):
    Pillow reads and writes pictures without Python's lock, which is handed over once for eight of them."""
    threads = threads or os.cpu_count()
    items, under_way = iter(items), deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while (batch := list(itertools.islice(items, 8))) or under_way:
            if batch:
                under_way.append((batch, pool.submit(lambda batch: [work(item) for item in batch], batch)))
            if not batch or len(under_way) > 2 * threads:
                batch, future = under_way.popleft()
                yield from zip(batch, future.result())


# -----------------------------------------------------------------------------
# pictures: bytes to tensors

Image.init() # of the formats below; EPS, for one, PIL hands to another program
FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF") if f in Image.OPEN]
MAX_PIXELS = 2 ** 26 # 67 million; PIL decodes to memory that a crafted file of a kilobyte can claim
LARGE = threading.Semaphore(2) # pictures of more than ten million pixels that are decoded at once
QUALITY = 90 # of the JPEGs that --resize makes; 95 takes half as much space again

# EXIF's ways to hold a camera, from 2 on; from 5 on, width and height change places
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270",
                        "TRANSVERSE", "ROTATE_90"), 2))


class Bad(Exception):
    """A picture or row that is not taken. The message is its cause, one of few, for the report.
    may_come_right: whether it is worth to ask again; wait: seconds before that, if a server said so."""

    def __init__(self, cause, may_come_right=False, wait=0):
        super().__init__(cause)
        self.may_come_right = may_come_right
        self.wait = wait


@contextlib.contextmanager
def or_bad():
    """Around work on a stranger's picture: whatever that raises becomes Bad."""
    try:
        yield
    except Bad:
        raise
    except UnidentifiedImageError:
        raise Bad("not a picture") from None
    except Image.DecompressionBombError:
        raise Bad("too many pixels") from None
    except Exception as e: # PIL raises nearly anything on broken files
        raise Bad("damaged") from e


def orientation(image):
    """How the camera was held, 1 .. 8: 1 is upright, and what is said where the EXIF is corrupt, as in some
    files of every large collection. PIL's exif_transpose also writes the EXIF anew, which fails there."""
    try: # a TIFF turns itself
        turn = image.getexif().get(0x0112) if "exif" in image.info and image.format != "TIFF" else 1
    except Exception: # what PIL raises here is as varied as the damage
        turn = 1
    return turn if turn in TURNS else 1


def opened(data):
    """Encoded picture -> PIL image, not decoded. Raises Bad for what would take more memory or time than any
    sound one."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Bad("too many pixels")
    if image.info.get("progressive") and data.count(b"\xff\xda") > 100:
        raise Bad("damaged") # each scan is a pass over it all
    return image


def decode(data, reduce=1):
    """Encoded picture, or an opened one -> RGB PIL image, transparent parts on white, rotated as its EXIF
    says. reduce: a JPEG may come this much smaller (1/2, 1/4 or 1/8, rounded up), which takes less time."""
    image = opened(data) if isinstance(data, bytes) else data
    if image.mode in ("I", "F") and image.format != "PNG": # a PNG has 16 bits, "I" in older versions of PIL
        raise Bad("32-bit values") # a measurement: nothing says what is white
    if reduce > 1 and image.format in ("JPEG", "MPO"): # MPO: a JPEG with more pictures behind the first
        image.draft(None, [-(-n // reduce) for n in image.size])
    if (turn := orientation(image)) > 1:
        image = image.transpose(Image.Transpose[TURNS[turn]])
    if image.mode.startswith("I"): # 16-bit grayscale, which convert() would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image.info.pop("transparency", None)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load() # now, not at the first use
    return image if image.mode == "RGB" else image.convert("RGB") # which would copy it


@or_bad()
def to_record(data, resize=0, min_side=1, verify=True):
    """Bytes of a file -> what is stored of it: a whole JPEG or PNG as it is, another format as a JPEG; the
    shorter side at most resize, if that is given. The format is read off the bytes. verify=False: a file that
    ends as it should is not decoded to see whether it is sound. Raises Bad."""
    if not data:
        raise Bad("empty")
    # half a download: zeros decode, to grey
    body = data.rstrip(b"\0") if data[:2] == b"\xff\xd8" else data
    image = opened(body)
    side, pixels = min(image.size), image.width * image.height
    if side < min_side:
        raise Bad("tiny")
    shrink = 0 < resize < side
    as_it_is = image.format in ("JPEG", "MPO", "PNG") and not shrink
    whole = body[-8:-4] == b"IEND" if image.format == "PNG" else body[-2:] == b"\xff\xd9"
    if as_it_is and whole and not verify:
        return data
    with LARGE if pixels > 10_000_000 else contextlib.nullcontext(): # a few threads' memory, not all's
        if as_it_is: # small and grey is enough to see whether it is sound
            image.draft("L", [-(-n // 8) for n in image.size])
            image.decodermaxblock = len(body) # in one go
            image.load()
            return data
        image = decode(image, max(1, side // (2 * resize)) if shrink else 1)
        if shrink:
            side = min(image.size)
            image = image.resize([max(resize, round(n * resize / side)) for n in image.size], Image.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=QUALITY if shrink else 95)
        return jpeg.getvalue()


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) # (3, H, W) uint8


@or_bad()
def eval_image(data, size, squash=False):
    """Encoded picture -> (3, size, size) uint8: short side to size and the centre cut out, or, as the thesis
    evaluated, the whole picture squashed to a square. Raises Bad."""
    image = decode(data)
    if squash:
        return to_tensor(image.resize((size, size), Image.BICUBIC))
    return to_tensor(ImageOps.fit(image, (size, size), Image.BICUBIC))


def crop_box(width, height, scale_min, rng):
    """Random resized crop, torchvision's distribution -> (left, upper, right, lower): area uniform in
    [scale_min, 1] of the picture, log of the aspect ratio uniform in [log 3/4, log 4/3]; after ten misses the
    largest centred crop of allowed ratio. rng: numpy Generator."""
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@or_bad()
def train_image(data, size, scale_min, rng):
    """Encoded picture -> a random resized crop, (3, size, size) uint8. It is drawn from the size in the
    header, so that a JPEG is decoded no larger than it needs. Flip, colour and normalisation come later, a
    batch at a time on the device: see augment. Raises Bad."""
    image = opened(data)
    width, height = image.size
    turn = orientation(image)
    if turn >= 5:
        width, height = height, width
    box = crop_box(width, height, scale_min, rng)
    side = min(box[2] - box[0], box[3] - box[1])
    image = decode(image, max(1, side // size) if turn == 1 else 1) # turned, odd sizes would be off by half
    reduced = round(width / image.width) # 1, 2, 4 or 8 times
    crop = to_tensor(image.crop([round(n / reduced) for n in box]))
    # five times as fast as Pillow's, and the same to a rounding
    return F.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0] # (3, size, size)


@cache
def imagenet_statistics(device): # once: to make them there, the host waits for the device
    return [torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)]


def normalize(images):
    """(n, 3, H, W) in [0, 255], uint8 or float -> float32, with ImageNet's mean and standard deviation."""
    mean, std = imagenet_statistics(images.device)
    return (images.float() / 255 - mean) / std


def augment(images, noise, flip=0.5, rotate=0.0, color=0.0):
    """Second half of the training transform, a batch at a time: (n, 3, H, W) uint8 on any device -> float32,
    ImageNet-normalised. noise (n, 7) float32 in [0, 1), on the same device, is all the randomness: flip,
    angle, saturation, gain of each channel, brightness.

    flip: probability of a mirror image; rotate: up to this many degrees either way, white corners; color:
    each channel's gain up to this share either way, saturation 1.5 times and brightness half as much."""
    n, u = len(images), noise * 2 - 1
    mirror = torch.where(noise[:, 0] < flip, -1.0, 1.0)
    if rotate:
        angle = u[:, 1] * math.pi / 180 * rotate
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        matrix = torch.stack([cos * mirror, -sin, zero, sin * mirror, cos, zero], dim=1).view(n, 2, 3)
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        # grid_sample fills with zeros what lies outside: make white zero first
        x = F.grid_sample(images.float() / 255 - 1, grid, align_corners=False) + 1
    else:
        x = torch.where(mirror[:, None, None, None] < 0, images.flip(-1), images).float() / 255
    if color:
        saturation, gain, brightness = (part[:, :, None, None] for part in u[:, 2:].split([1, 3, 1], dim=1))
        gray = x.mean(1, keepdim=True)
        x = gray + (x - gray) * (1 + 1.5 * color * saturation)
        x = (x * (1 + color * gain) + 0.5 * color * brightness).clamp(0, 1)
    return normalize(x * 255)


def visible_patches(noise, ratio):
    """noise (n, N) -> the numbers of the patches that are seen, (n, K) int64 in rising order, where
    K = N - int(N * ratio); None, which stands for all, where ratio is 0."""
    if not ratio:
        return None
    hidden = int(noise.shape[1] * ratio)
    return noise.argsort(1)[:, hidden:].sort(1).values


# -----------------------------------------------------------------------------
# labelled sets: a split is a list of shards, each read from its start to its end, always in the same order


class Shard(NamedTuple):
    where: str # file or folder, for messages
    members: Callable # () -> iterator of (name, function that reads the bytes) and, of samples, their fields
    cls: str = None # of all its members, if it is one class


class File(NamedTuple): # of a shard
    shard: int # its number in the split
    position: int # in the shard
    name: str
    label: int # -1: nothing says what it is


class Split(NamedTuple):
    layout: str # what was found, in words
    shards: list
    classes: list # sorted names
    class_of: Callable = None # name, and fields -> class, its number, or None; for shards of many classes


@contextlib.contextmanager
def readable(path):
    """Around the reading of a file: ends the program, naming it, if it is torn."""
    try:
        yield
    except UNREADABLE as e:
        fail(f"{shown(path)} cannot be read, or not to its end: {e}. Half a download? Put the whole file "
             "there and give the same command again.")


def class_folders(folder, names):
    """A folder for each class. One that is a link to another counts once."""
    shards, first = [], {}
    for name in sorted(names, key=lambda name: (os.path.islink(os.path.join(folder, name)), name)):
        path = os.path.join(folder, name)
        twin = first.setdefault(os.path.realpath(path), name)
        if twin != name:
            print(f"note: {shown(path)} is a link to the class {shown(twin)}, which is there: left out")
        elif all(map(is_junk, os.listdir(path))):
            fail(f"{shown(path)} is a class without pictures. Did the extraction stop? Fill or remove it.")
        else:
            shards.append(Shard(path, partial(folder_members, path), shown(name)))
    shards.sort(key=lambda shard: shard.cls)
    return Split(f"{shown(folder)}/<class>/*", shards, [shard.cls for shard in shards])


def class_tars(paths):
    """Tars named <class>.tar, or one large tar that holds such."""
    tars = {shown(os.path.basename(path)[:-4]): (path, None) for path in paths}
    if len(paths) == 1:
        with readable(paths[0]), tarfile.open(paths[0], tarinfo=Member) as tar:
            tars = {os.path.basename(m.name)[:-4]: (paths[0], m) for m in tar.getmembers()
                    if m.isreg() and m.name.endswith(".tar") and not is_junk(m.name)}
    shards = [Shard(f"{c}.tar of {os.path.dirname(path) if inside is None else path}",
                    partial(tar_members, path, inside), c) for c, (path, inside) in sorted(tars.items())]
    return Split(f"class tars, {shown(paths[0])} first", shards, sorted(tars))


def by_name(path, source):
    """A tar or a folder of pictures of all classes: a name ends in its class, or Kaggle's list says it. All
    names are read once to know which classes there are."""
    kaggle = os.path.join(source, "LOC_val_solution.csv")
    table = {} # name -> class
    if os.path.exists(kaggle):
        with open(kaggle, newline="", encoding="utf-8") as f: # ImageId, "n03995372 85 1 499 272"
            table = {row[0]: row[1].split()[0] for row in csv.reader(f) if len(row) > 1 and row[1].strip()}

    def class_of(name):
        match = re.search(r"_(n\d{8})\.\w+$", name)
        return match[1] if match else table.get(os.path.splitext(os.path.basename(name))[0])

    shard = Shard(path, partial(folder_members if os.path.isdir(path) else tar_members, path))
    with readable(path):
        classes = sorted({class_of(name) for name, _ in shard.members()} - {None})
    if not classes:
        fail(f"{path}: nothing says which class a picture is. Put Kaggle's LOC_val_solution.csv into "
             f"--source, or sort the pictures into folders, one a class.")
    return Split(f"{shown(path)}, classes by name", [shard], classes, class_of)


def label_of(fields):
    """The class number that the fields of a sample give; None without, and for the -1 of a hidden one."""
    value = next((fields[name] for name in LABEL_FIELDS if name in fields), None)
    return int(value) if value is not None and re.fullmatch(r"\s*\d+\s*", str(value)) else None


def by_number(paths, imagenet):
    """Samples with a label of their own: parquet as on the hub, tars of .jpg and .cls. Classes have the hub's
    or ImageNet's names; of other sets all is read once to know how many there are."""
    names = None
    if paths[0].endswith(".parquet"):
        from pyarrow import parquet
        metadata = parquet.read_schema(paths[0]).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = next((features[name].get("names") for name in LABEL_FIELDS if name in features), None)
    if imagenet and not names:
        from torchvision.models import ResNet50_Weights # which has their names, in the order of the labels
        names = ResNet50_Weights.DEFAULT.meta["categories"][:NUM_CLASSES]
    if not names:
        labels = {-1}
        for path in paths:
            with readable(path):
                labels |= {label_of(fields) for *_, fields in samples(path)} - {None}
        names = [str(n) for n in range(max(labels) + 1)]

    def members(path):
        for key, data, fields in samples(path):
            yield key, partial(bytes, data), fields

    return Split(f"{len(paths)} files such as {shown(paths[0])}", [Shard(path, partial(members, path))
                 for path in paths], list(names), lambda name, fields: label_of(fields))


def find_split(source, split, imagenet):
    """The Split in whichever layout is there, or None."""
    for root in (source, os.path.join(source, "ILSVRC", "Data", "CLS-LOC")):
        entries = sorted(os.listdir(root)) if os.path.isdir(root) else []
        folders = [os.path.join(root, name) for name in entries if SPLITS.get(name.lower()) == split
                   and os.path.isdir(os.path.join(root, name))]
        if len(folders) > 1:
            fail(f"{' and '.join(folders)} are both {split}. Rename one of them.")
        names = [name for folder in folders for name in os.listdir(folder) if not is_junk(name)]
        classes = [name for name in names if os.path.isdir(os.path.join(folders[0], name))]
        if classes:
            return class_folders(folders[0], classes)
        if names and split != "test" and not any(name.endswith((".tar", ".parquet")) for name in names):
            return by_name(folders[0], source) # but ImageNet's test, which has no labels
    paths = [path for path in walk(source, (".tar", ".parquet"))
             if split_of(os.path.relpath(path, source)) == split]
    official = [path for path in paths if os.path.basename(path) == f"ILSVRC2012_img_{split}.tar"]
    paths = official or paths
    if not paths:
        return None
    with readable(f"{os.path.basename(paths[0])} of {os.path.dirname(paths[0])}"):
        _, _, fields = next(samples(paths[0]), (None, None, {}))
    if label_of(fields) is not None:
        return by_number(paths, imagenet)
    if paths[0].endswith(".parquet"):
        print(f"note: {shown(paths[0])} has no labels: left out")
        return None
    return by_name(paths[0], source) if len(paths) == 1 and split != "train" else class_tars(paths)


def find_folders(args):
    """--source -> {split: Split}, classes."""
    if not args.source or not os.path.isdir(args.source):
        fail(f"--data={args.data} needs --source=DIR, as --help says; {args.source} is no folder"
             f"{nearest(args.data, set(LABELLED) - {args.data}, '--data=')}")
    imagenet, splits = args.data == "imagenet", ("train", "val", "test")
    found = {split: find_split(args.source, split, imagenet) for split in splits[:2 if imagenet else 3]}
    found = {split: f for split, f in found.items() if f}
    unknown = [shown(name) for name in sorted(os.listdir(args.source)) if split_of(name) is None
               and name not in ("data", "ILSVRC") and os.path.isdir(os.path.join(args.source, name))]
    if unknown:
        print(f"note: left out, since no split is called so: {', '.join(unknown[:9])}")
    if not found:
        fail(f"no pictures of train, val or test in {args.source}, in no layout that --help lists")
    first = next(iter(found.values()))
    for f in found.values():
        wnids = all(re.fullmatch(r"n\d{8}", c) for c in f.classes) or f.shards[0].cls is None
        if imagenet and (len(f.classes) != NUM_CLASSES or not wnids):
            fail(f"{f.layout}: {len(f.classes):,} classes ({', '.join(f.classes[:3])} ..), but ImageNet has "
                 f"{NUM_CLASSES:,}, named n01440764 and so on. Half a download? A part needs --data=NAME")
        if lacking := sorted(set(f.classes) - set(first.classes)):
            fail(f"{f.layout} has {len(lacking)} classes that {first.layout} lacks: {', '.join(lacking[:5])}")
    if len(first.classes) < 2:
        fail(f"{first.layout}: {len(first.classes)} class, at least 2 are needed")
    return found, first.classes


def find_arrays(args):
    """What torchvision or scikit-learn read into memory -> {split: Split}, classes."""
    if args.data == "digits" and args.source:
        fail("--source is not for digits, which scikit-learn carries")
    if args.data == "digits":
        try:
            from sklearn.datasets import load_digits # the package carries the pictures
        except ImportError as e:
            fail(f"{e}. Run: pip install scikit-learn")
        layout, classes = "scikit-learn's load_digits, drawn 32 x 32", list("0123456789")
        data = load_digits()
        images = np.stack([Image.fromarray(np.uint8(x * 15.9)).resize((32, 32), Image.BICUBIC)
                           for x in data.images]) # (1797, 8, 8), 0 .. 16 -> (1797, 32, 32)
        order = np.random.RandomState(0).permutation(len(images)) # the generator whose numbers never change
        splits = {split: (images[part], data.target[part])
                  for split, part in (("train", order[:-500]), ("test", order[-500:]))}
    else:
        from torchvision import datasets # here, since it takes a second; downloads, and compares checksums
        reader = getattr(datasets, args.data.upper())
        root = args.source or os.path.join(cache_folder(), "cifar")
        names = (reader.filename, reader.base_folder)
        if args.source and not any(os.path.exists(os.path.join(root, name)) for name in names):
            fail(f"{root} holds neither {reader.filename} nor {reader.base_folder}/: leave --source out")
        try:
            parts = {split: reader(root, split == "train", download=True) for split in ("train", "test")}
        except (RuntimeError, *UNREADABLE) as e: # OSError: of the network too
            fail(f"{reader.filename} cannot be had at {root}: {e}. Fetch {reader.url} where there is a "
                 "network and give its folder with --source=DIR; it is unpacked there")
        layout, classes = f"torchvision's {reader.__name__} in {root}", parts["train"].classes
        splits = {split: (part.data, part.targets) for split, part in parts.items()}

    def members(images):
        for i, pixels in enumerate(images):
            png = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(png, "PNG")
            yield str(i), png.getvalue

    return {split: Split(layout, [Shard(layout, partial(members, images))], classes,
                         lambda name, labels=labels: int(labels[int(name)]))
            for split, (images, labels) in splits.items()}, classes


def stream(found, classes, at, limit):
    """Yields the File, and the bytes, of each that is to be taken, behind where `at` says that an earlier run
    was. Meanwhile the caller moves `at` on, always behind what was yielded."""
    C, taken = len(classes), list(at["taken"])
    rank = {c: i for i, c in enumerate(classes)} | {i: i for i in range(C)}
    # N of C classes: N / C of each, rounded down or up so that the sum is N and the larger ones are spread
    quota = [(i + 1) * limit // C - i * limit // C if limit else sys.maxsize for i in range(C)]
    for s, shard in enumerate(found.shards[at["shard"]:], at["shard"]):
        with readable(shard.where):
            for position, (name, read, *fields) in enumerate(shard.members()):
                if limit and sum(taken) >= limit:
                    return
                if s == at["shard"] and position <= at["position"]:
                    if position == at["position"] and name != at["name"]:
                        fail(f"{shown(shard.where)} has changed since this was begun. Bring it back, or "
                             "remove what was written.")
                    continue
                label = rank.get(shard.cls or found.class_of(name, *fields), -1)
                if label >= 0:
                    if taken[label] >= quota[label] and shard.cls:
                        break
                    if taken[label] >= quota[label]:
                        continue
                    taken[label] += 1
                yield File(s, position, name, label), read() if label >= 0 else b""


def write_split(writer, split, found, classes, args):
    """Writes <split>_images and <split>_labels, behind what an earlier run left."""
    at = writer.state["at"].setdefault(split, {"shard": 0, "position": -1, "name": None, "skipped": 0,
                                               "skipped_files": [], "taken": [0] * len(classes)})
    if done := sum(at["taken"]):
        print(f"{split}: {done:,} files were done by an earlier run; going on")

    def convert(item):
        file, data = item
        if file.label < 0:
            return b"", "no known class"
        try: # ImageNet's files are known to be sound when they are whole
            return to_record(data, args.resize, verify=args.data != "imagenet"), ""
        except Bad as e:
            return b"", f"{e} ({e.__cause__})" if e.__cause__ else str(e)

    total = args.limit or (NUM_IMAGES[split] if args.data == "imagenet" else None)
    files = stream(found, classes, at, args.limit)
    with progress(desc=split, total=total, initial=done, unit=" images") as bar:
        for (file, _), (record, problem) in in_order(convert, files, args.num_workers):
            if problem:
                at["skipped"] += 1
                at["skipped_files"] = [*at["skipped_files"], f"{file.name}: {problem}"][:20]
            else:
                writer.add(split, record, label=file.label)
            if file.label >= 0:
                at["taken"][file.label] += 1
            at.update(shard=file.shard, position=file.position, name=file.name)
            bar.update()
            writer.commit(COMMIT_SECONDS)
    writer.commit()
    if not writer.count(split):
        fail(f"{found.layout}: no picture that can be read. {'; '.join(at['skipped_files'][:3])}")


def prepare(folder, args, options, found, classes):
    """Makes a set."""
    writer = SetWriter(folder, {**options, "classes": classes, "at": {}})
    for split in reversed(found): # the small ones first: what is wrong shows early
        write_split(writer, split, found[split], classes, args)
    splits = writer.close()
    for split, counts in splits.items():
        at = writer.state["at"][split]
        counts |= {"skipped": at["skipped"], "skipped_files": at["skipped_files"],
                   "classes": sum(n > 0 for n in at["taken"])}
    licence = LICENCES.get(args.data.rstrip("0123456789"), "that of the source")
    write_json(os.path.join(folder, "meta.json"), {
        "data": args.data, **options, "layout": {split: f.layout for split, f in found.items()},
        "license": licence, "classes": classes, "splits": {split: splits[split] for split in found}})
    os.remove(writer.begun)
    print(f"wrote {folder}; licence: {licence}")


# -----------------------------------------------------------------------------


def shared_knobs(p):
    """The flags that both scripts for pictures have."""
    p.knob("data_dir", "data", "folder of all prepared data sets; this one goes to DATA_DIR/DATA")
    p.knob("resize", 0, "shorter side of the stored pictures; 0: files stay as they are. 256 takes about a "
           "quarter of the space and half the time to decode. The price: a random crop of a smaller picture "
           "is enlarged more, hence softer, and JPEG loses twice. Small pictures are never enlarged")


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "imagenet", "which set to prepare: imagenet, cifar10, cifar100, digits, or a new name for "
           "pictures of your own")
    shared_knobs(p)
    p.knob("source", None, "folder with the files, in one of the layouts above; it is only read. CIFAR: the "
           "folder with cifar-10-python.tar.gz, which is unpacked there; without it, that is downloaded")
    p.knob("limit", 0, "pictures of each split at most, for a trial, equally many of each class; 0: all. "
           "Labels are those of the whole set")
    p.knob("num_workers", 0, "threads that decode and resize; 0: one a core. The result is the same")
    return p.parse(argv)


def main(args):
    for console in (sys.stdout, sys.stderr): # one that lacks a letter is no reason to stop
        console.reconfigure(errors="backslashreplace")
    folder = os.path.join(args.data_dir, args.data)
    done = os.path.join(folder, "meta.json")
    if not re.fullmatch(r"\w[\w.-]*", args.data):
        fail(f"--data={args.data} is no name for a folder")
    source = os.path.realpath(args.source) if args.source else None
    options = {"made_by": "prepare_imagenet.py", "resize": args.resize, "limit": args.limit}
    if source or not os.path.exists(done):
        options["source"] = source
    prepared(folder, args, options)
    if os.path.exists(done):
        print(f"{folder} is already prepared; remove it to do it again")
    else:
        find = find_folders if args.data not in LABELLED or args.data == "imagenet" else find_arrays
        found, classes = find(args)
        for split, f in found.items():
            print(f"{split}: found {f.layout}")
        with lock(os.path.join(folder, "lock"), folder), going_on(folder):
            if not os.path.exists(done): # by now, another process may have made it
                prepare(folder, args, options, found, classes)
    print(f"{'split':8}{'images':>12}{'classes':>10}{'GB':>10}{'skipped':>10}")
    splits = prepared(folder, args, options)["splits"]
    for split, c in splits.items():
        print(f"{split:8}{c['images']:>12,}{c['classes']:>10,}{c['bytes'] / 1e9:>10.3f}{c['skipped']:>10,}")
        for name in c["skipped_files"]:
            print(f"  skipped {name}")
        files = c["images"] + c["skipped"]
        if args.data == "imagenet" and not args.limit and NUM_IMAGES[split] != files:
            print(f"  note: ImageNet has {NUM_IMAGES[split]:,} of these, {args.source} had {files:,}")
    if {"train", "val"} <= set(splits):
        print(f"next: python distill_image.py --data={args.data} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
