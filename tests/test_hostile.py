"""
Bad input, made here: a row for each class of harm, and what becomes of it. The rest is beside what reads it:
urls and answers to them in tests/test_pairs.py, layouts there and in test_imagenet.py.
"""
import io
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from conftest import refused
from model import Encoder, load_encoder
from prepare_imagenet import Bad, Pairs, decode, eval_image, to_record, train_image
from prepare_pairs import read_picture
from server import HTML, encoded
from test_pretrained import Call, touch

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def cut(data):
    return data[:len(data) // 2]


def patch(data, at, new):
    return data[:at] + new + data[at + len(new):]


COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200), "white": (255, 255, 255), "black": (0, 0, 0),
           "dark": (64, 64, 64), "light": (192, 192, 192)}


def halves(left, right, kind=np.uint8):
    """48 x 64 pixels, or channels of pixels."""
    return np.stack([np.asarray(left)] * 32 + [np.asarray(right)] * 32)[None].repeat(48, 0).astype(kind)


PLAIN = Image.fromarray(halves(COLOURS["red"], COLOURS["blue"])) # 64 x 48
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))


def save(kind, image=PLAIN, **kwargs):
    return encoded(image, kind, quality=95, **kwargs)


def with_text_of_100_mb():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "\0" * 10 ** 8, zip=True)
    return save("PNG", Image.new("RGB", PLAIN.size), pnginfo=info)


def half_seen(image):
    image.putalpha(Image.fromarray(halves(255, 0)))
    return save("PNG", image)


def corrupt_exif():
    segment = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03" # of 65,535 entries half of one
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + save("JPEG")[2:]


def png_claiming(width, height):
    header = struct.pack(">4sII5s", b"IHDR", width, height, b"\x08\x02\0\0\0")
    return patch(save("PNG"), 12, header + struct.pack(">I", zlib.crc32(header)))


def more_scans(data):
    return data[:-2] + data[data.rindex(b"\xff\xda"):-2] * 200 + b"\xff\xd9"


# A file; what a prepare script stores of it, as it is or as a JPEG, or the cause for which it is dropped; and
# what a training run makes of the same bytes in a set that nobody verified: the colours that are seen in the
# left and in the right half.
PICTURES = {
    "JPEG, cut": (lambda: cut(save("JPEG", NOISE)), "damaged", "skipped"),
    # zeros decode, to grey
    "JPEG, second half zeros": (lambda: cut(save("JPEG", NOISE)) + bytes(9999), "damaged", "other pixels"),
    "html": (lambda: HTML, "not a picture", "skipped"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
                   "not a picture", "skipped"), # PIL would start Ghostscript
    # bombs: a few bytes that claim, or are, many pixels
    "PNG claims 30000 x 30000": (lambda: png_claiming(30_000, 30_000), "too many pixels", "skipped"),
    "PNG, text of 100 MB": (with_text_of_100_mb, "damaged", "skipped"),
    "GIF, its first frame claims 65535 x 65535": (
        lambda: patch(save("GIF"), save("GIF").index(b",") + 5, b"\xff" * 4), "too many pixels", "skipped"),
    "JPEG of 200 scans": (lambda: more_scans(save("JPEG", progressive=True)), "damaged", "skipped"),
    # sound, and easily read wrongly
    "JPEG, CMYK": (lambda: save("JPEG", PLAIN.convert("CMYK")), "as it is", "red blue"),
    "PNG, RGBA": (lambda: half_seen(PLAIN.copy()), "as it is", "red white"),
    "PNG, 16-bit grey": (lambda: save("PNG", Image.fromarray(halves(16_384, 49_152, np.uint16))),
                         "as it is", "dark light"), # not clipped to white
    "TIFF, 32-bit integers": (lambda: save("TIFF", Image.fromarray(halves(2 ** 29, 2 ** 30, np.int32))),
                              "32-bit values", "skipped"), # nothing says which is white
    "GIF, animated": (lambda: save("GIF", save_all=True, append_images=[Image.new("RGB", (64, 48), "green")]),
                      "as JPEG", "red blue"), # its first picture
    "JPEG, EXIF corrupt": (corrupt_exif, "as it is", "red blue"),
}


def seen(data):
    """What a training run makes of these bytes."""
    try:
        image = eval_image(data, 32, squash=True)
    except Bad:
        with pytest.raises(Bad):
            train_image(data, 8, 0.5, np.random.default_rng(0))
        return "skipped"
    crop = train_image(data, 8, 0.5, np.random.default_rng(0))
    assert image.dtype == crop.dtype == torch.uint8 and crop.shape[-3:] == (3, 8, 8)
    names = [[name for name, colour in COLOURS.items() if max(abs(a - b) for a, b in zip(pixel, colour)) < 9]
             for pixel in image[:, 16, [8, 24]].T.tolist()]
    return " ".join(name for found in names for name in found) if all(names) else "other pixels"


@pytest.mark.parametrize("kind", PICTURES)
def test_picture(kind):
    make, stored, trained = PICTURES[kind]
    data = make()
    assert seen(data) == trained
    if not stored.startswith("as "):
        with pytest.raises(Bad, match=stored):
            to_record(data, min_side=2)
        return
    record = to_record(data)
    assert seen(record) == trained and (record == data) == (stored == "as it is")
    assert stored == "as it is" or Image.open(io.BytesIO(record)).format == "JPEG"
    assert to_record(data, resize=48) == record # never enlarged
    small = to_record(data, resize=24) # the other way through it
    assert seen(small) == trained and decode(small).size == (32, 24)


def test_files_that_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "device")
    for name in ("pipe", "device"):
        with pytest.raises(Bad, match="no such file"):
            read_picture(tmp_path, name)


@pytest.mark.parametrize("size, said", [(30 * 10 ** 6, "too many bytes"), (999, "damaged")])
def test_zip_bombs(size, said, tmp_path):
    """One that says its size, and one that lies about it."""
    with zipfile.ZipFile(tmp_path / "it.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("it/bad.png", bytes(30 * 10 ** 6))
    body = (tmp_path / "it.zip").read_bytes()
    where = body.rindex(b"PK\1\2") + 24
    (tmp_path / "it.zip").write_bytes(patch(body, where, struct.pack("<I", size)))
    with pytest.raises(Bad, match=said):
        read_picture(f"{tmp_path}/it.zip", "bad.png")


# checkpoints of ours; teachers' files are in tests/test_pretrained.py
HUGE = {"cls_token": torch.ones(1).expand(10 ** 12)} # a few bytes
CHECKPOINTS = { # what is another in it; what the program names as it ends
    "hostile pickle": (lambda marker: dict(step=Call(touch, marker)), "cannot be read"),
    "format of tomorrow": (lambda _: dict(format=3), "format 3"),
    "a tensor of 10^12 elements": (lambda _: dict(model=HUGE), "mis-shaped: cls_token"),
    "unknown setting": (lambda _: dict(config={"modality": "image", "shell": "rm"}), "shell"),
    "broken tokenizer": (lambda _: dict(tokenizer='{"version": "1.0"}'), "holds no model"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint(kind, tmp_path):
    changes, expected = CHECKPOINTS[kind]
    path, marker = tmp_path / "weights.pt", tmp_path / "marker"
    encoder = Encoder("image", embed_dim=24, depth=2, num_heads=2, img_size=32, final_norm=True)
    checkpoint = {"format": 2, "kind": "Encoder", "config": encoder.config, "model": {}}
    checkpoint |= changes(str(marker))
    torch.save({**checkpoint, "model": encoder.state_dict() | checkpoint["model"]}, path)
    assert expected in refused(load_encoder, str(path), "image")
    assert not marker.exists()
    if kind == "hostile pickle":
        torch.load(path, weights_only=False) # and it would have
        assert marker.exists()


def npy(value):
    data = io.BytesIO()
    np.save(data, value)
    return data.getvalue()


def array(change):
    return lambda data, _: npy(change(np.load(io.BytesIO(data))))


OWNER, META = "train_text_to_image.npy", "meta.json"
CLAIM = b"(72,), }" + b" " * 12, b"(10000000000000,), }" # shapes in a header
# kind -> a file of a prepared set, a function of (its bytes, what a hostile pickle would make) -> its bytes
# spoilt, and what is named as the program ends
INDICES = {
    ".idx of huge numbers": ("train_images.idx", lambda data, _: patch(data, 72, b"\xff" * 8),
                             "train_images"),
    "captions point past the pictures": (OWNER, array(lambda x: x + 1), OWNER),
    "pictures without a caption": (OWNER, array(lambda x: 0 * x), OWNER),
    ".npy of floats": (OWNER, array(lambda x: x.astype(float)), "int64"),
    ".npy holds objects": (OWNER, lambda _, marker: npy(np.array([Call(touch, marker)] * 72)), "damaged"),
    ".npy claims 70 TB": (OWNER, lambda data, _: data.replace(*CLAIM), "damaged"),
    "labels too few": ("train_labels.npy", array(lambda x: x[:-1]), "train_labels.npy"),
    "meta.json of other counts": (META, lambda data, _: data.replace(b" 48,", b" 47,"), META),
    "meta.json 100,000 deep": (META, lambda *_: b"[" * 100_000, "damaged"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_index(kind, tmp_path, tiny_data):
    name, spoil, expected = INDICES[kind]
    path = shutil.copytree(f"{tiny_data}/toy", tmp_path / "toy") / name
    before = path.read_bytes()
    path.write_bytes(spoil(before, str(tmp_path / "marker")))
    assert path.read_bytes() != before
    assert expected in refused(Pairs, str(tmp_path), "toy", "train")
    assert not (tmp_path / "marker").exists()
