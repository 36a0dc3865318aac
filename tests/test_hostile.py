"""
Bad input of every kind but one, made here: what becomes of each is a row of TABLE, and a test. The exception:
the 68 kinds of url and of answers to it are the rows of OUTCOMES and URLS in tests/test_download.py.

    pytest tests/test_hostile.py            # with -m slow also other numbers of workers
"""
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import types
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

import distill_image
import distill_multimodal
import distill_text
import model
import prepare_imagenet
import prepare_pairs
from conftest import write_toy
from model import Encoder, Tokenizer, load_encoder, load_pretrained, read_checkpoint
from prepare_imagenet import Bad, Pairs, RecordWriter, Texts, decode, eval_image, to_record, train_image
from server import HTML, SVG, png_claiming
from test_loops import SHAPE, TOY, flags, records
from test_pretrained import SMALL, Call, published, touch, trainer_file

TABLE = {
    # A file: what prepare_pairs.py makes of it, a pair (the file as it is, or as a JPEG) or a row dropped for
    # a cause; and what a training run makes of the same bytes in a set that nobody verified. Colours: those
    # seen in the left and in the right half.
    "pictures": {
        "PNG": ("as it is", "red blue"),
        "JPEG": ("as it is", "red blue"),
        "JPEG, cut": ("damaged", "skipped"),
        "JPEG, second half zeros": ("damaged", "other pixels"), # zeros decode, to grey
        "JPEG, bytes bent": ("as it is", "other pixels"), # it has no checksum
        "PNG, cut": ("damaged", "skipped"),
        "PNG, a byte bent": ("damaged", "skipped"),
        "GIF, cut": ("damaged", "skipped"),
        "WebP, cut": ("damaged", "skipped"),
        "AVIF, cut": ("not a picture", "skipped"),
        "TIFF, cut": ("damaged", "skipped"),
        "nothing": ("empty", "skipped"),
        "zero bytes": ("not a picture", "skipped"),
        "html": ("not a picture", "skipped"),
        "SVG": ("not a picture", "skipped"),
        "PostScript": ("not a picture", "skipped"), # PIL would start Ghostscript
        "1 x 1": ("tiny", "black black"),
        "30000 x 1": ("tiny", "black black"),
        # bombs: a few bytes that claim, or are, many pixels
        "PNG claims 30000 x 30000": ("too many pixels", "skipped"),
        "PNG is 9000 x 9000": ("too many pixels", "skipped"),
        "PNG, text of 100 MB": ("damaged", "skipped"),
        "PNG, ICC profile of 100 MB": ("damaged", "skipped"),
        "GIF claims 65535 x 65535": ("too many pixels", "skipped"),
        "GIF, first frame claims it": ("too many pixels", "skipped"),
        "WebP is 16000 x 16000": ("too many pixels", "skipped"),
        "BMP claims 50000 x 50000": ("too many pixels", "skipped"),
        "TIFF claims 60000 x 60000": ("too many pixels", "skipped"),
        "JPEG claims 65500 x 65500": ("too many pixels", "skipped"),
        "AVIF claims 30000 x 30000": ("not a picture", "skipped"),
        "JPEG of 200 scans": ("damaged", "skipped"), # each is a pass over all of it
        # sound, and easily read wrongly
        "JPEG, CMYK": ("as it is", "red blue"),
        "PNG, 16-bit grey": ("as it is", "dark light"), # not clipped to white
        "TIFF, 16-bit grey": ("as JPEG", "dark light"),
        "TIFF, 16-bit grey, big-endian": ("as JPEG", "dark light"),
        "PNG, 16-bit colour": ("as it is", "red blue"),
        "TIFF, 32-bit integers": ("32-bit values", "skipped"), # nothing says which is white
        "PNG, palette, half transparent": ("as it is", "red white"),
        "GIF, half transparent": ("as JPEG", "red white"),
        "PNG, one colour transparent": ("as it is", "red white"),
        "PNG, RGBA": ("as it is", "red white"),
        "PNG, LA": ("as it is", "dark white"),
        "WebP, RGBA": ("as JPEG", "red white"),
        "GIF, animated": ("as JPEG", "red blue"), # its first picture; the others are green
        "PNG, animated": ("as it is", "red blue"),
        "WebP, animated": ("as JPEG", "red blue"),
        "AVIF, animated": ("as JPEG", "red blue"),
        "MPO, animated": ("as it is", "red blue"),
        "JPEG, EXIF: turned": ("as it is", "red blue"),
        "PNG, EXIF: turned": ("as it is", "red blue"),
        "WebP, EXIF: turned": ("as JPEG", "red blue"),
        "AVIF, EXIF: turned": ("as JPEG", "red blue"),
        "JPEG, EXIF corrupt": ("as it is", "red blue"),
        "JPEG, ICC profile": ("as it is", "red blue"), # which is not applied
        "JPEG, ICC profile corrupt": ("as it is", "red blue"),
        "WebP": ("as JPEG", "red blue"),
        "AVIF": ("as JPEG", "red blue"),
    },
    # A caption in a table of one's own, and what is stored, or why the row is dropped. In a set that nobody
    # verified each is read, as at most 8,000 bytes of UTF-8, and trained on.
    "captions": {
        "empty": (b"", "no caption"),
        "null bytes": (b"\0\0\0", "no caption"),
        "null byte inside": (b"a\0b", "a b"),
        "1 MB, one word": (b"x" * 10 ** 6, "x" * 2000),
        "1 MB of words": (b"word " * 200_000, "word " * 399 + "word"),
        "1 MB of blanks": (b" " * 10 ** 6, "no caption"),
        "not UTF-8": (b"caf\xe9", "café"), # as Excel saves it, in cp1252
        "UTF-16 surrogates": (b"a \xed\xa0\x80 b", "a í € b"), # likewise
        "control characters": (b"\x07a\x1b[31mred\x08\r\x7f b", "a [31mred b"),
        "two lines": (b"a\nb", "a b"),
        "right to left": ("שלום עולם".encode(), "שלום עולם"),
        "direction turned over": ("a\u202egnp.exe".encode(), "agnp.exe"),
        "nothing that is seen": ("\u200b\ufeff\u2060".encode(), "no caption"),
        "special tokens": (b"[CLS] a [SEP]", "[CLS] a [SEP]"),
    },
    # What stands where a picture should, in COCO's folder or archive (train2014.zip): "pair", or why it is
    # dropped. Archives are read as streams and never extracted: no name in them reaches the disk.
    "files": {
        "path that leads out": "outside the folder",
        "absolute path": "outside the folder",
        "pipe": "no such file", # would wait for ever
        "link to a device": "no such file", # would never end
        "link to a text": "not a picture",
        "21 MB": "too many bytes",
        "zip: name that leads out": "pair",
        "zip: absolute name": "pair",
        "zip: link": "not a picture",
        "zip: bomb": "too many bytes",
        "zip: bomb that lies about its size": "damaged",
        "zip: encrypted": "damaged",
    },
    # A member of a class' tar, as ImageNet comes: "picture", "not read", or why it is skipped; or such a tar
    # as a whole: how prepare_imagenet.py ends. No name in it reaches the disk either.
    "tars": {
        "name that leads out": "picture",
        "absolute name": "picture",
        "symbolic link": "not read",
        "hard link": "not read",
        "device": "not read",
        "pipe": "not read",
        "a terabyte of zeros": "not a picture", # a sparse member; its first 64 MB are read
        "tar cut": "cannot be read, or not to its end",
        "tar empty": "cannot be read, or not to its end",
        "html": "cannot be read, or not to its end",
        "member larger than the tar": "cannot be read, or not to its end",
    },
    # A file given as a checkpoint of ours, or as a published teacher: what the program ends with, or "loads".
    # Whichever it is, nothing of it is run.
    "checkpoints": {
        "ours: hostile pickle": "cannot be read as a checkpoint",
        "ours: truncated": "cannot be read as a checkpoint",
        "ours: empty": "cannot be read as a checkpoint",
        "ours: zip of something else": "cannot be read as a checkpoint",
        "ours: a fairseq file": "cannot be read as a checkpoint",
        "ours: bare weights": "is not a checkpoint of this repository",
        "ours: format of tomorrow": "format 2, expected 1",
        "ours: text model": "is no image encoder",
        "ours: NaN weights": "1 with NaN or infinity: norm.bias",
        "ours: weights of another size": "does not fit this model",
        "ours: a tensor of 10^12 elements": "1 mis-shaped: cls_token",
        "ours: unknown setting": "holds no model or tokenizer of this version",
        "ours: broken tokenizer": "holds no model or tokenizer of this version",
        "teacher: fairseq file": "loads", # argparse's and numpy's objects become stand-ins that keep nothing
        "teacher: unknown classes": "loads",
        "teacher: hostile pickle beside the weights": "loads",
        "teacher: hostile pickle among the weights": "1 missing: blocks.0.norm1.bias",
        "teacher: hostile pickle that calls a result": "cannot be read as weights",
        "teacher: TorchScript": "torchscript checkpoint",
        "teacher: truncated": "cannot be read as weights",
        "teacher: zip of something else": "cannot be read as weights",
        "teacher: safetensors of a huge header": "cannot be read as weights",
        "teacher: other model": "is not data2vec2_image as it was published",
        "teacher: NaN weights": "1 with NaN or infinity: blocks.0.norm1.bias",
        "teacher: a tensor of 10^12 elements": "1 mis-shaped: blocks.0.norm1.bias",
    },
    # A file of a prepared set: what a run says as it ends before its first step; in the last it goes on.
    "indices": {
        ".idx shorter than .bin": "its .idx does not describe them",
        ".idx descends": "its .idx does not describe them",
        ".idx of huge numbers": "its .idx does not describe them",
        "captions point past the pictures": "_text_to_image.npy",
        "pictures without a caption": "_text_to_image.npy",
        ".npy of floats": "numbers of int64",
        ".npy is a pickle": "damaged", # np.load runs none
        ".npy holds objects": "damaged",
        ".npy is an .npz": "damaged",
        ".npy empty": "damaged",
        ".npy claims 70 TB": "damaged",
        "labels too few": "train_labels.npy: not",
        "meta.json cut": "damaged",
        "meta.json of other counts": "not what meta.json says",
        "meta.json without counts": "damaged",
        "meta.json 100,000 deep": "damaged",
        "tokenizer.json cut": "is no tokenizer",
        "tokenizer.json without [PAD]": "is no tokenizer",
        "text: half an id": "has 6,011 bytes, not 6,010",
        "text: shorter than meta.json says": "has 1,000 bytes, not 6,010",
        "text: other vocabulary": "but the model reads WordPiece",
        "text: counts are words": "damaged",
        "text: ids beyond the vocabulary": "ends, saved", # those sequences are skipped and logged
    },
}
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200), "white": (255, 255, 255), "black": (0, 0, 0),
           "dark": (64, 64, 64), "light": (192, 192, 192)}
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def rows(area):
    return pytest.mark.parametrize("kind, expected", TABLE[area].items())


def message(call, *args):
    """What the program says as it ends."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    return str(e.value)


def everything(folder):
    return {os.path.join(here, name) for here, _, names in os.walk(folder) for name in names}


def cut(data):
    return data[:len(data) // 2]


def patch(data, at, new):
    return data[:at] + new + data[at + len(new):]


# -----------------------------------------------------------------------------
# pictures


def halves(left, right, kind=np.uint8):
    """48 x 64 pixels, or channels of pixels."""
    return np.stack([np.asarray(left)] * 32 + [np.asarray(right)] * 32)[None].repeat(48, 0).astype(kind)


PLAIN = Image.fromarray(halves(COLOURS["red"], COLOURS["blue"])) # 64 x 48
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def save(kind, image=PLAIN, **kwargs):
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 95} if kind in ("JPEG", "AVIF", "MPO") else {}), **kwargs)
    return data.getvalue()


def png(pixels, *chunks, width=64, height=48, depth=8, colour=2):
    """A PNG written by hand."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks,
             (b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body +
                                           struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)


def tiff(order, pixels, width=64, height=48):
    """A grey TIFF written by hand; order: < or >."""
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: pixels.nbytes}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return ({"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + pixels.nbytes)
            + pixels.tobytes() + struct.pack(order + "H", len(tags)) + entries + bytes(4))


def half_seen(kind, image, **kwargs):
    image.putalpha(Image.fromarray(halves(255, 0)))
    return save(kind, image, **kwargs)


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(kind, PLAIN.transpose(Image.Transpose.ROTATE_90), exif=exif)


def corrupt_exif():
    segment = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03" # of 65,535 entries half of one
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + save("JPEG")[2:]


def bent(data, count):
    middle = len(data) // 2
    return patch(data, middle, bytes(x ^ 85 for x in data[middle:middle + count]))


def more_scans(data):
    """A progressive JPEG whose last scan comes 200 times."""
    return data[:-2] + data[data.rindex(b"\xff\xda"):-2] * 200 + b"\xff\xd9"


BOMB = b"a\0\0" + zlib.compress(bytes(10 ** 8))
PICTURES = {
    **{kind: lambda kind=kind: save(kind.upper()) for kind in ("PNG", "JPEG", "WebP", "AVIF")},
    **{f"{kind}, cut": lambda kind=kind: cut(save(kind.upper(), NOISE))
       for kind in ("JPEG", "PNG", "GIF", "WebP", "AVIF", "TIFF")},
    "JPEG, second half zeros": lambda: cut(save("JPEG", NOISE)) + bytes(9999),
    "JPEG, bytes bent": lambda: bent(save("JPEG", NOISE), 40),
    "PNG, a byte bent": lambda: bent(save("PNG", NOISE), 1),
    "nothing": lambda: b"", "zero bytes": lambda: bytes(5000), "html": lambda: HTML, "SVG": lambda: SVG,
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
    "1 x 1": lambda: save("GIF", Image.new("RGB", (1, 1))),
    "30000 x 1": lambda: save("PNG", Image.new("L", (30_000, 1))),
    "PNG claims 30000 x 30000": lambda: png_claiming(30_000, 30_000),
    "PNG is 9000 x 9000": lambda: png(np.zeros((9000, 1125), np.uint8), width=9000, height=9000, depth=1,
                                      colour=0),
    "PNG, text of 100 MB": lambda: png(halves((0,) * 3, (0,) * 3), (b"zTXt", BOMB)),
    "PNG, ICC profile of 100 MB": lambda: png(halves((0,) * 3, (0,) * 3), (b"iCCP", BOMB)),
    "GIF claims 65535 x 65535": lambda: patch(save("GIF"), 6, b"\xff" * 4),
    "GIF, first frame claims it": lambda: patch(save("GIF"), save("GIF").index(b",") + 5, b"\xff" * 4),
    "WebP is 16000 x 16000": lambda: patch(save("WEBP", Image.new("RGB", (1, 1)), lossless=True), 21,
                                           struct.pack("<I", 15_999 | 15_999 << 14)),
    "BMP claims 50000 x 50000": lambda: patch(save("BMP"), 18, struct.pack("<ii", 50_000, 50_000)),
    "TIFF claims 60000 x 60000": lambda: tiff("<", halves(0, 255), 60_000, 60_000),
    "JPEG claims 65500 x 65500": lambda: patch(save("JPEG"), save("JPEG").index(b"\xff\xc0") + 5,
                                               struct.pack(">HH", 65_500, 65_500)),
    "AVIF claims 30000 x 30000": lambda: patch(save("AVIF"), save("AVIF").index(b"ispe") + 8,
                                               struct.pack(">II", 30_000, 30_000)),
    "JPEG of 200 scans": lambda: more_scans(save("JPEG", progressive=True)),
    "JPEG, CMYK": lambda: save("JPEG", PLAIN.convert("CMYK")),
    "PNG, 16-bit grey": lambda: png(halves(16_384, 49_152, ">u2"), depth=16, colour=0),
    "TIFF, 16-bit grey": lambda: tiff("<", halves(16_384, 49_152, "<u2")),
    "TIFF, 16-bit grey, big-endian": lambda: tiff(">", halves(16_384, 49_152, ">u2")),
    "PNG, 16-bit colour": lambda: png(np.asarray(PLAIN).astype(">u2") * 257, depth=16),
    "TIFF, 32-bit integers": lambda: save("TIFF", Image.fromarray(halves(2 ** 29, 2 ** 30, np.int32))),
    "PNG, palette, half transparent": lambda: save("PNG", PLAIN.quantize(2), transparency=1),
    "GIF, half transparent": lambda: save("GIF", PLAIN.quantize(2), transparency=1),
    "PNG, one colour transparent": lambda: save("PNG", transparency=COLOURS["blue"]),
    "PNG, RGBA": lambda: half_seen("PNG", PLAIN.copy()),
    "PNG, LA": lambda: half_seen("PNG", Image.fromarray(halves(64, 64))),
    "WebP, RGBA": lambda: half_seen("WEBP", PLAIN.copy(), lossless=True),
    **{f"{kind}, animated": lambda kind=kind: save(kind.upper(), save_all=True, append_images=[
        Image.new("RGB", PLAIN.size, "green")] * 3) for kind in ("GIF", "PNG", "WebP", "AVIF", "MPO")},
    **{f"{kind}, EXIF: turned": lambda kind=kind: turned(kind.upper())
       for kind in ("JPEG", "PNG", "WebP", "AVIF")},
    "JPEG, EXIF corrupt": corrupt_exif, "JPEG, ICC profile": lambda: save("JPEG", icc_profile=PROFILE),
    "JPEG, ICC profile corrupt": lambda: save("JPEG", icc_profile=b"\xff" * 500)}


@pytest.fixture(scope="module")
def made():
    """{kind: bytes} of the pictures that this Pillow can make."""
    lacking = [kind for kind in ("WebP", "AVIF") if not features.check(kind.lower())]
    return {kind: make() for kind, make in PICTURES.items() if not kind.startswith(tuple(lacking))}


def seen(data):
    """What a training run makes of these bytes."""
    try:
        image = eval_image(data, 32, squash=True)
    except Bad:
        with pytest.raises(Bad):
            train_image(data, 8, 0.5, np.random.default_rng(0))
        return "skipped"
    crops = train_image(data, 8, 0.5, np.random.default_rng(0), views=2)
    assert image.dtype == crops.dtype == torch.uint8 and crops.shape == (2, 3, 8, 8)
    names = [[name for name, colour in COLOURS.items() if max(abs(a - b) for a, b in zip(pixel, colour)) < 9]
             for pixel in image[:, 16, [8, 24]].T.tolist()]
    return " ".join(name for found in names for name in found) if all(names) else "other pixels"


def prepare(folder, data):
    """{where: cause, or "" for a pair} of every row, and Pairs of the training split."""
    args = prepare_pairs.get_args([f"--data={data}", f"--source={folder}", f"--data_dir={folder}/out",
                                   "--threads=1"])
    prepare_pairs.main(args)
    source = (prepare_pairs.find_coco if data == "coco" else prepare_pairs.find_own)(args)
    with open(folder / "out" / data / "used.tsv", encoding="utf-8") as f:
        lines = list(csv.DictReader(f, delimiter="\t"))
    causes = prepare_pairs.survey(source)[0] | {int(line["row"]): line["cause"] for line in lines}
    return ({row.where: causes[n] for n, row in enumerate(source.rows())},
            Pairs(f"{folder}/out", data, "train"))


@pytest.fixture(scope="module")
def table(made, tmp_path_factory):
    """One run over all pictures and captions -> {kind: cause or ""}, {kind: (record, caption)}."""
    folder = tmp_path_factory.mktemp("table")
    files = {kind: (data, kind.encode()) for kind, data in made.items()}
    files |= {f"{kind}!": (save("PNG", NOISE.rotate(n + 1)), caption)
              for n, (kind, (caption, _)) in enumerate(TABLE["captions"].items())}
    lines = [b"image,caption,split"]
    for n, (data, caption) in enumerate(files.values()):
        (folder / f"{n}.png").write_bytes(data) # whatever it is: the format is read off the bytes
        lines.append(b'%d.png,"%s",train' % (n, caption))
    (folder / "list.csv").write_bytes(b"\n".join(lines))
    outcomes, pairs = prepare(folder, "mine")
    assert list(outcomes) == [f"{n}.png" for n in range(len(files))]
    assert pairs.text_to_image.tolist() == list(range(len(pairs.images)))
    outcomes = dict(zip(files, outcomes.values()))
    kept = zip((kind for kind, cause in outcomes.items() if not cause),
               ((pairs.images[i], pairs.captions[i]) for i in range(len(pairs.images))), strict=True)
    return outcomes, dict(kept)


@rows("pictures")
def test_picture(kind, expected, made, table):
    prepared, trained = expected
    if kind not in made:
        pytest.skip(f"this Pillow was built without {kind[:4]}")
    assert seen(made[kind]) == trained
    outcomes, kept = table
    if not prepared.startswith("as "):
        assert outcomes[kind] == prepared
        return
    record, caption = kept[kind]
    assert caption == kind and seen(record) == trained
    assert (record == made[kind]) == (prepared == "as it is")
    assert prepared == "as it is" or Image.open(io.BytesIO(record)).format == "JPEG"
    small = to_record(made[kind], resize=24) # the other way through it
    assert seen(small) == trained and min(decode(small).size) == 24


@rows("captions")
def test_caption(kind, expected, table, tmp_path, tiny_data):
    raw, stored = expected
    outcomes, kept = table
    assert outcomes[f"{kind}!"] == ("" if f"{kind}!" in kept else stored)
    assert f"{kind}!" not in kept or kept[f"{kind}!"][1] == stored
    writer = RecordWriter(str(tmp_path / "raw"))
    writer.write(raw)
    writer.close()
    with open(f"{tiny_data}/toy/tokenizer.json") as f:
        tokenizer = Tokenizer(f.read())
    text = Texts(str(tmp_path / "raw"))[0]
    ids, padding_mask = tokenizer.encode([text], 16)
    assert 2 <= ids.shape[1] <= 16 and ids.max() < tokenizer.vocab_size and not padding_mask.any()
    assert len(text) <= 8000


# -----------------------------------------------------------------------------
# files in folders and in archives


def write_zip(path, kind, name):
    """train2014.zip with a good picture and, under that name, what the kind says."""
    data, entry, bomb = save("PNG", NOISE), zipfile.ZipInfo(f"train2014/{name}"), "bomb" in kind
    entry.compress_type = zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED
    entry.external_attr = (0o120777 if "link" in kind else 0o100644) << 16
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("train2014/good.png", save("PNG"))
        z.writestr(entry, b"/etc/passwd" if "link" in kind else data + bytes(bomb * 30 * 10 ** 6))
    body = path.read_bytes()
    local, central = body.rindex(b"PK\3\4"), body.rindex(b"PK\1\2")
    if "lies" in kind:
        body = patch(body, central + 24, struct.pack("<I", 999))
    if "encrypted" in kind:
        body = patch(patch(body, central + 8, b"\1\0"), local + 6, b"\1\0")
    path.write_bytes(body)


@rows("files")
def test_file(kind, expected, tmp_path, monkeypatch):
    here = tmp_path / "a" / "b"
    name = {"path that leads out": "../../evil.png", "absolute path": f"{tmp_path}/evil.png",
            "zip: name that leads out": "../../../new.png", "zip: absolute name": f"{tmp_path}/new.png",
            }.get(kind, "it.png")
    os.makedirs(here / "train2014")
    monkeypatch.chdir(here)
    (tmp_path / "evil.png").write_bytes(save("PNG", NOISE))
    (here / "train2014" / "good.png").write_bytes(save("PNG"))
    path = here / "train2014" / "it.png"
    if kind.startswith("zip"):
        shutil.rmtree(here / "train2014")
        write_zip(here / "train2014.zip", kind, name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind.startswith("link"):
        os.symlink("/dev/zero" if "device" in kind else __file__, path)
    elif kind == "21 MB":
        path.write_bytes(save("PNG") + bytes(21 * 10 ** 6))
    listed = [{"filepath": "train2014", "filename": n, "imgid": i, "split": "train",
               "sentences": [{"raw": f"caption {i}"}]} for i, n in enumerate(("good.png", name))]
    (here / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    before = everything(tmp_path)
    outcome, pairs = prepare(here, "coco")
    assert outcome == {"train2014/good.png": "", f"train2014/{name}": expected.replace("pair", "")}
    assert len(pairs.images) == 1 + (expected == "pair")
    assert all(f.startswith(f"{here}/out/coco/") for f in everything(tmp_path) - before)


MEMBERS = {"symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE,
           "pipe": tarfile.FIFOTYPE, "a terabyte of zeros": tarfile.GNUTYPE_SPARSE}


def class_tar(kind, folder):
    """A tar of a good picture and the member of this kind, or one that is spoilt as a whole."""
    data, out = save("PNG", NOISE), io.BytesIO()
    name = {"name that leads out": "../../../evil.png", "absolute name": f"{folder}/evil.png"}
    name = name.get(kind, "it.png")
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in map(tarfile.TarInfo, ("good.png", name)):
            if member.name == "good.png" or kind not in MEMBERS:
                member.size = len(data)
            else:
                member.type, member.linkname = MEMBERS[kind], "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    body = out.getvalue()
    at = body.rfind(b"it.png\0")
    # in a header: 124 the bytes stored, 483 those that a sparse member stands for, 148 the checksum
    if where := {"member larger than the tar": 124, "a terabyte of zeros": 483}.get(kind):
        header = patch(body[at:at + 512], where, b"\x80" + (10 ** 12).to_bytes(11, "big"))
        header = patch(header, 148, b" " * 8)
        body = patch(body, at, patch(header, 148, b"%06o\0 " % sum(header)))
    return {"tar cut": body[:at + 700], "tar empty": b"", "html": HTML * 99}.get(kind, body)


@rows("tars")
def test_tar(kind, expected, tmp_path, monkeypatch):
    here = tmp_path / "a" / "b"
    os.makedirs(here / "train")
    monkeypatch.chdir(here)
    for c, spoilt in (("cat", kind), ("dog", "plain")):
        (here / "train" / f"{c}.tar").write_bytes(class_tar(spoilt, tmp_path))
        os.makedirs(here / "val" / c)
        (here / "val" / c / "0.png").write_bytes(save("PNG"))
    before = everything(tmp_path)
    args = prepare_imagenet.get_args([f"--source={here}", f"--data_dir={here}/out", "--data=mine"])
    if expected.startswith("cannot"):
        assert f"cat.tar of {here}/train {expected}" in message(prepare_imagenet.main, args)
    else:
        prepare_imagenet.main(args)
        pairs = Pairs(str(here / "out"), "mine", "train")
        assert pairs.labels.tolist() == [0] * (1 + (expected == "picture")) + [1, 1]
        assert all(pairs.images[i] == save("PNG", NOISE) for i in range(len(pairs.images)))
        skipped = pairs.meta["splits"]["train"]["skipped_files"]
        assert skipped == ([f"it.png: {expected}"] if expected == "not a picture" else [])
    assert all(f.startswith(f"{here}/out/mine/") for f in everything(tmp_path) - before)


# -----------------------------------------------------------------------------
# checkpoints


def ours(path, changes=None, half=False, spoil=False, **rest):
    """A checkpoint of a small encoder; changes: of its constructor's arguments; spoil: with a NaN."""
    config = dict(modality="image", embed_dim=24, depth=2, num_heads=2, img_size=32, final_norm=True)
    encoder = Encoder(**{**config, **(changes or {})})
    encoder.norm.bias.data[3] = math.nan if spoil else 0
    torch.save({"format": 1, "kind": "Encoder", "config": encoder.config, "model": encoder.state_dict(),
                **rest}, path)
    path.write_bytes(cut(path.read_bytes()) if half else path.read_bytes())


def theirs(path, weights, half=False, **rest):
    torch.save({"cfg": rest.pop("cfg", None), "model": {**weights, **rest}}, path)
    path.write_bytes(cut(path.read_bytes()) if half else path.read_bytes())


def letter(path, *_):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("letter.txt", "dear reader")


def unknown_classes(path, weights, _):
    package = sys.modules["fairseq_like"] = types.ModuleType("fairseq_like")
    package.Config = type("Config", (), {"__module__": "fairseq_like"})
    theirs(path, weights, cfg=[package.Config()])
    del sys.modules["fairseq_like"]


ONE = "blocks.0.norm1.bias"
MKDIR = lambda marker: Call(Call(getattr, Call(__import__, "os"), "mkdir"), marker)
CHECKPOINTS = { # kind -> function of (path, a teacher's weights, what a hostile pickle would make)
    "ours: hostile pickle": lambda path, w, marker: ours(path, step=Call(touch, marker)),
    "ours: truncated": lambda path, *_: ours(path, half=True), "ours: empty": lambda path, *_: path.touch(),
    "ours: zip of something else": letter,
    "ours: a fairseq file": lambda path, w, _: torch.save(trainer_file(w), path),
    "ours: bare weights": lambda path, w, _: torch.save(w, path),
    "ours: format of tomorrow": lambda path, *_: ours(path, format=2),
    "ours: text model": lambda path, *_: ours(path, dict(modality="text", vocab_size=9, max_length=9)),
    "ours: NaN weights": lambda path, *_: ours(path, spoil=True),
    "ours: weights of another size": lambda path, w, _: ours(path, model={**w, "cls_token": torch.ones(2)}),
    "ours: a tensor of 10^12 elements": lambda path, w, _: ours(
        path, model={**w, "cls_token": torch.ones(1).expand(10 ** 12)}),
    "ours: unknown setting": lambda path, *_: ours(path, config={"modality": "image", "shell": "rm"}),
    "ours: broken tokenizer": lambda path, *_: ours(path, tokenizer='{"version": "1.0"}'),
    "teacher: fairseq file": lambda path, w, _: torch.save(trainer_file(w), path),
    "teacher: unknown classes": unknown_classes,
    "teacher: hostile pickle beside the weights": lambda path, w, marker: theirs(
        path, w, cfg=[Call(touch, marker)]),
    "teacher: hostile pickle among the weights": lambda path, w, marker: theirs(
        path, w, **{ONE: Call(touch, marker)}),
    "teacher: hostile pickle that calls a result": lambda path, w, marker: theirs(path, w, cfg=MKDIR(marker)),
    "teacher: TorchScript": lambda path, *_: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "teacher: truncated": lambda path, w, _: theirs(path, w, half=True),
    "teacher: zip of something else": letter,
    "teacher: safetensors of a huge header": lambda path, *_: path.write_bytes(b"\0" * 7 + b"\x10{}"),
    "teacher: other model": lambda path, *_: theirs(path, published("beitv2", **SMALL)),
    "teacher: NaN weights": lambda path, w, _: theirs(path, w, **{ONE: w[ONE] * math.nan}),
    "teacher: a tensor of 10^12 elements": lambda path, w, _: theirs(
        path, w, **{ONE: torch.ones(1).expand(10 ** 12)})}


@rows("checkpoints")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_checkpoint(kind, expected, tmp_path, monkeypatch):
    small = dict(embed_dim=SMALL["D"], depth=SMALL["L"], num_heads=SMALL["h"], img_size=SMALL["img"])
    monkeypatch.setitem(model.CONFIGS, "data2vec2_image", {**model.CONFIGS["data2vec2_image"], **small})
    weights, marker = published("data2vec2_image", **SMALL), str(tmp_path / "marker")
    path = tmp_path / ("weights.safetensors" if "safetensors" in kind else "weights.pt")
    CHECKPOINTS[kind](path, weights, marker)
    load = ((lambda: load_encoder(str(path), "image")) if kind.startswith("ours") else
            (lambda: load_pretrained("data2vec2_image", str(path))))
    if expected == "loads":
        assert torch.equal(load().blocks[0].norm1.bias, weights[ONE])
    else:
        assert expected in message(load)
    if kind.startswith("ours") and expected.startswith("cannot"): # nor is it run by --resume
        assert expected in message(read_checkpoint, str(path))
    assert os.listdir(tmp_path) == [path.name]
    if "hostile" in kind:
        torch.load(path, weights_only=False) # and it would have
        assert os.path.exists(marker)


# -----------------------------------------------------------------------------
# prepared sets


def npy(value, write=np.save):
    data = io.BytesIO()
    write(data, value)
    return data.getvalue()


def numbers(change, kind="<u8"):
    return lambda data, _: np.asarray(change(np.frombuffer(data, kind).copy()), kind).tobytes()


def array(change):
    return lambda data, _: npy(change(np.load(io.BytesIO(data))))


def claim(f, shape):
    np.lib.format.write_array_header_1_0(f, {"descr": "<i8", "fortran_order": False, "shape": shape})


IDX, OWNER = "train_images.idx", "train_text_to_image.npy"
INDICES = { # kind -> file, function of (its bytes, what a hostile pickle would make) -> its bytes spoilt
    ".idx shorter than .bin": (IDX, lambda data, _: data[:-8]),
    ".idx descends": (IDX, numbers(lambda x: np.r_[x[:9], x[10], x[9], x[11:]])),
    ".idx of huge numbers": (IDX, numbers(lambda x: np.r_[x[:9], np.uint64(2 ** 64 - 1), x[10:]])),
    "captions point past the pictures": (OWNER, array(lambda x: x + 1)),
    "pictures without a caption": (OWNER, array(lambda x: 0 * x)),
    ".npy of floats": (OWNER, array(lambda x: x.astype(float))),
    ".npy is a pickle": (OWNER, lambda _, marker: pickle.dumps(Call(touch, marker))),
    ".npy holds objects": (OWNER, lambda _, marker: npy(np.array([Call(touch, marker)] * 72))),
    ".npy is an .npz": (OWNER, lambda *_: npy(np.arange(72), np.savez)),
    ".npy empty": (OWNER, lambda *_: b""),
    ".npy claims 70 TB": (OWNER, lambda *_: npy((10 ** 13,), claim)),
    "labels too few": ("train_labels.npy", array(lambda x: x[:-1])),
    "meta.json cut": ("meta.json", lambda data, _: cut(data)),
    "meta.json of other counts": ("meta.json", lambda data, _: data.replace(b" 48,", b" 47,")),
    "meta.json without counts": ("meta.json", lambda *_: b'{"splits": {"train": null}}'),
    "meta.json 100,000 deep": ("meta.json", lambda *_: b"[" * 100_000),
    "tokenizer.json cut": ("tokenizer.json", lambda data, _: cut(data)),
    "tokenizer.json without [PAD]": ("tokenizer.json", lambda data, _: data.replace(b"[PAD]", b"[PUD]")),
    "text: half an id": ("train.bin", lambda data, _: data + b"x"),
    "text: shorter than meta.json says": ("train.bin", lambda data, _: data[:1000]),
    "text: other vocabulary": ("meta.json", lambda data, _: re.sub(rb'(_sha256": ")\w', rb"\1", data)),
    "text: counts are words": ("meta.json", lambda data, _: re.sub(rb'(tokens": )\d+', rb'\1"many"', data)),
    "text: ids beyond the vocabulary": ("train.bin", numbers(lambda x: np.where(
        np.isin(np.arange(len(x)) // 14, [3, 7]), 65_000, x), "<u2"))}
PAIRS = dict(TOY, **SHAPE, kd_loss="none", align_loss="contrastive", image_init="random", text_init="random",
             depth=1, text_depth=1)


@rows("indices")
def test_index(kind, expected, tmp_path, tiny_data, text_data):
    text, (name, spoil), marker = kind.startswith("text"), INDICES[kind], str(tmp_path / "marker")
    folder = shutil.copytree(text_data if text else tiny_data, tmp_path / "data") / f"toy{'_text' * text}"
    (folder / name).write_bytes(spoil((folder / name).read_bytes(), marker))
    loop, knobs = distill_multimodal, PAIRS
    if text:
        loop, knobs = distill_text, dict(TOY, data="toy_text", teacher=tmp_path / "data/teacher.pt",
                                         max_length=16, depth=1)
    args = loop.get_args(flags(dict(knobs, data_dir=tmp_path / "data", out_dir=tmp_path / "run",
                                    max_steps=16)))
    if expected != "ends, saved":
        assert expected in message(loop.main, args)
        assert not os.path.exists(tmp_path / "run" / "ckpt.pt") and not os.path.exists(marker)
        return
    with pytest.raises(ValueError, match="ids beyond the vocabulary"):
        loop.main(args)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 16 # what was trained is saved


# -----------------------------------------------------------------------------
# all of it at once


@pytest.mark.parametrize("loop, num_workers", [
    (distill_image, 0), (distill_multimodal, 1), pytest.param(distill_image, 1, marks=pytest.mark.slow),
    pytest.param(distill_multimodal, 0, marks=pytest.mark.slow)])
def test_a_run_over_all_of_it(loop, num_workers, made, tmp_path, capfd):
    """One epoch over a set that holds every picture and caption above as it came, among good ones, and a bad
    picture in its validation split: the run ends with the loss finite, and says which are grey."""
    write_toy(str(tmp_path))
    folder = tmp_path / "toy"
    good, captions = Pairs(str(tmp_path), "toy", "train"), [raw for raw, _ in TABLE["captions"].values()]
    N, kinds = 2304, dict(zip(np.random.default_rng(1).permutation(2304).tolist(), made))
    for split, count in (("train", N), ("val", 12)):
        writers = [RecordWriter(f"{folder}/{split}_{what}") for what in ("images", "captions")]
        for i in range(count):
            bad = made.get(kinds.get(i)) if split == "train" else HTML if i == 3 else None
            writers[0].write(good.images[i % 48] if bad is None else bad)
            writers[1].write(captions[i] if i < len(captions) else b"a red square %d" % i)
        for writer in writers:
            writer.close()
        np.save(folder / f"{split}_text_to_image.npy", np.arange(count))
        os.remove(folder / f"{split}_labels.npy")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"] = {"images": N, "captions": N}
    (folder / "meta.json").write_text(json.dumps(meta))
    knobs = dict(TOY, **SHAPE, teacher="ema", depth=1, target_layers=1) if loop is distill_image else PAIRS
    loop.main(loop.get_args(flags(dict(knobs, data_dir=tmp_path, out_dir=tmp_path / "run", batch_size=N // 9,
                                       max_steps=9, eval_interval=9, num_workers=num_workers))))
    log, said = records(tmp_path / "run"), "".join(capfd.readouterr())
    bad = {i for i, kind in kinds.items() if TABLE["pictures"][kind][1] == "skipped"}
    assert {i for r in log for i in r.get("unreadable", [])} == bad and len(bad) > 20
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 10))
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["norm"]) for r in log if "loss" in r)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["unreadable"] == len(bad)
    assert "cannot be read, grey" in said and "picture 3 of 12 cannot be read: grey" in said
