"""
Bad input, made here: a row for each class of harm, and what becomes of it. The rest is beside what reads it:
kinds of url and of answers to it in tests/test_download.py, layouts in test_imagenet.py and test_pairs.py.

    pytest tests/test_hostile.py
"""
import io
import json
import math
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import prepare_pairs
from conftest import refused
from model import Encoder, load_encoder
from prepare_imagenet import Bad, Pairs, decode, eval_image, to_record, train_image
from server import HTML
from test_pretrained import Call, touch

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def cut(data):
    return data[:len(data) // 2]


def patch(data, at, new):
    return data[:at] + new + data[at + len(new):]


# -----------------------------------------------------------------------------
# pictures

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200), "white": (255, 255, 255), "black": (0, 0, 0),
           "dark": (64, 64, 64), "light": (192, 192, 192)}


def halves(left, right, kind=np.uint8):
    """48 x 64 pixels, or channels of pixels."""
    return np.stack([np.asarray(left)] * 32 + [np.asarray(right)] * 32)[None].repeat(48, 0).astype(kind)


PLAIN = Image.fromarray(halves(COLOURS["red"], COLOURS["blue"])) # 64 x 48
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))


def save(kind, image=PLAIN, **kwargs):
    data = io.BytesIO()
    image.save(data, kind, quality=95, **kwargs)
    return data.getvalue()


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
    """A PNG of a few bytes whose header claims so many pixels."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") +
            chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


def bent(data, count):
    middle = len(data) // 2
    return patch(data, middle, bytes(x ^ 85 for x in data[middle:middle + count]))


def more_scans(data):
    """A progressive JPEG whose last scan comes 200 times."""
    return data[:-2] + data[data.rindex(b"\xff\xda"):-2] * 200 + b"\xff\xd9"


# A file; what a prepare script stores of it, as it is or as a JPEG, or the cause for which it is dropped; and
# what a training run makes of the same bytes in a set that nobody verified: the colours that are seen in the
# left and in the right half.
PICTURES = {
    "JPEG, cut": (lambda: cut(save("JPEG", NOISE)), "damaged", "skipped"),
    # zeros decode, to grey
    "JPEG, second half zeros": (lambda: cut(save("JPEG", NOISE)) + bytes(9999), "damaged", "other pixels"),
    "JPEG, bytes bent": (lambda: bent(save("JPEG", NOISE), 40), "as it is", "other pixels"), # no checksum
    "PNG, a byte bent": (lambda: bent(save("PNG", NOISE), 1), "damaged", "skipped"),
    "nothing": (lambda: b"", "empty", "skipped"),
    "html": (lambda: HTML, "not a picture", "skipped"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
                   "not a picture", "skipped"), # PIL would start Ghostscript
    "30000 x 1": (lambda: save("PNG", Image.new("L", (30_000, 1))), "tiny", "black black"),
    # bombs: a few bytes that claim, or are, many pixels
    "PNG claims 30000 x 30000": (lambda: png_claiming(30_000, 30_000), "too many pixels", "skipped"),
    "PNG is 9000 x 9000": (lambda: save("PNG", Image.new("1", (9000, 9000))), "too many pixels", "skipped"),
    "PNG, text of 100 MB": (with_text_of_100_mb, "damaged", "skipped"),
    "GIF, its first frame claims 65535 x 65535": (
        lambda: patch(save("GIF"), save("GIF").index(b",") + 5, b"\xff" * 4), "too many pixels", "skipped"),
    "GIF, wider than any JPEG": (lambda: save("GIF", Image.new("P", (65_535, 40))), "damaged", "black black"),
    "JPEG of 200 scans": (lambda: more_scans(save("JPEG", progressive=True)), "damaged", "skipped"),
    # sound, and easily read wrongly
    "JPEG, CMYK": (lambda: save("JPEG", PLAIN.convert("CMYK")), "as it is", "red blue"),
    "PNG, RGBA": (lambda: half_seen(PLAIN.copy()), "as it is", "red white"),
    "PNG, LA": (lambda: half_seen(Image.fromarray(halves(64, 64))), "as it is", "dark white"),
    "PNG, 16-bit grey": (lambda: save("PNG", Image.fromarray(halves(16_384, 49_152, np.uint16))),
                         "as it is", "dark light"), # not clipped to white
    "TIFF, 16-bit grey": (lambda: save("TIFF", Image.fromarray(halves(16_384, 49_152, np.uint16))),
                          "as JPEG", "dark light"),
    "TIFF, 32-bit integers": (lambda: save("TIFF", Image.fromarray(halves(2 ** 29, 2 ** 30, np.int32))),
                              "32-bit values", "skipped"), # nothing says which is white
    "PNG, palette, half transparent": (lambda: save("PNG", PLAIN.quantize(2), transparency=1),
                                       "as it is", "red white"),
    "GIF, animated": (lambda: save("GIF", save_all=True, append_images=[Image.new("RGB", (64, 48), "green")]),
                      "as JPEG", "red blue"), # its first picture
    "JPEG, EXIF corrupt": (corrupt_exif, "as it is", "red blue"),
    "JPEG, bytes behind its end": (lambda: save("JPEG") + b"written by a camera", "as it is", "red blue"),
    "JPEG, ICC profile corrupt": (lambda: save("JPEG", icc_profile=b"\xff" * 500), "as it is", "red blue"),
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
    small = to_record(data, resize=24) # the other way through it
    assert seen(small) == trained and min(decode(small).size) == 24


# -----------------------------------------------------------------------------
# files in folders and in archives

# What stands where a picture should, in COCO's folder or archive (train2014.zip), and why it is dropped.
FILES = {
    "pipe": "no such file", # would wait for ever
    "link to a device": "no such file", # would never end
    "zip: bomb": "too many bytes",
    "zip: bomb that lies about its size": "damaged",
}


@pytest.mark.parametrize("kind", FILES)
def test_file(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    listed = [{"filepath": "train2014", "filename": f"{name}.png", "imgid": i, "split": "train",
               "sentences": [{"raw": f"caption {i}"}]} for i, name in enumerate(("good", "bad"))]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    if kind.startswith("zip"):
        with zipfile.ZipFile("train2014.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("train2014/good.png", save("PNG"))
            z.writestr("train2014/bad.png", save("PNG", NOISE) + bytes(30 * 10 ** 6))
        body = (tmp_path / "train2014.zip").read_bytes()
        if "lies" in kind:
            body = patch(body, body.rindex(b"PK\1\2") + 24, struct.pack("<I", 999))
        (tmp_path / "train2014.zip").write_bytes(body)
    else:
        os.mkdir("train2014")
        (tmp_path / "train2014" / "good.png").write_bytes(save("PNG"))
        os.mkfifo("train2014/bad.png") if kind == "pipe" else os.symlink("/dev/zero", "train2014/bad.png")
    prepare_pairs.main(prepare_pairs.get_args(["--data=coco", "--source=.", "--data_dir=out"]))
    assert len(Pairs("out", "coco", "train").images) == 1 and FILES[kind] in capsys.readouterr().out


# -----------------------------------------------------------------------------
# checkpoints of ours (teachers' files are in tests/test_pretrained.py)


def write_checkpoint(path, has_nan=False, **changes):
    encoder = Encoder("image", embed_dim=24, depth=2, num_heads=2, img_size=32, final_norm=True)
    if has_nan:
        encoder.norm.bias.data[3] = math.nan
    torch.save({"format": 1, "kind": "Encoder", "config": encoder.config, "model": encoder.state_dict(),
                **changes}, path)


HUGE = {"cls_token": torch.ones(1).expand(10 ** 12)} # a few bytes
CHECKPOINTS = { # what is another in it; what the program names as it ends
    "hostile pickle": (lambda marker: dict(step=Call(touch, marker)), "cannot be read"),
    "format of tomorrow": (lambda _: dict(format=2), "format 2"),
    "NaN weights": (lambda _: dict(has_nan=True), "norm.bias"),
    "a tensor of 10^12 elements": (lambda _: dict(model=HUGE), "mis-shaped: cls_token"),
    "unknown setting": (lambda _: dict(config={"modality": "image", "shell": "rm"}), "shell"),
    "broken tokenizer": (lambda _: dict(tokenizer='{"version": "1.0"}'), "holds no model"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint(kind, tmp_path):
    changes, expected = CHECKPOINTS[kind]
    path, marker = tmp_path / "weights.pt", tmp_path / "marker"
    write_checkpoint(path, **changes(str(marker)))
    assert expected in refused(load_encoder, str(path), "image")
    assert not marker.exists()
    if kind == "hostile pickle":
        torch.load(path, weights_only=False) # and it would have
        assert marker.exists()


# -----------------------------------------------------------------------------
# prepared sets


def npy(value, write=np.save):
    data = io.BytesIO()
    write(data, value)
    return data.getvalue()


def array(change):
    return lambda data, _: npy(change(np.load(io.BytesIO(data))))


def claim(f, shape):
    np.lib.format.write_array_header_1_0(f, {"descr": "<i8", "fortran_order": False, "shape": shape})


OWNER, META = "train_text_to_image.npy", "meta.json"
# kind -> a file of a prepared set, a function of (its bytes, what a hostile pickle would make) -> its bytes
# spoilt, and what is named as the program ends
INDICES = {
    ".idx of huge numbers": ("train_images.idx", lambda data, _: patch(data, 72, b"\xff" * 8),
                             "train_images"),
    "captions point past the pictures": (OWNER, array(lambda x: x + 1), OWNER),
    "pictures without a caption": (OWNER, array(lambda x: 0 * x), OWNER),
    ".npy of floats": (OWNER, array(lambda x: x.astype(float)), "int64"),
    ".npy holds objects": (OWNER, lambda _, marker: npy(np.array([Call(touch, marker)] * 72)), "damaged"),
    ".npy claims 70 TB": (OWNER, lambda *_: npy((10 ** 13,), claim), "damaged"),
    "labels too few": ("train_labels.npy", array(lambda x: x[:-1]), "train_labels.npy"),
    "meta.json of other counts": (META, lambda data, _: data.replace(b" 48,", b" 47,"), META),
    "meta.json 100,000 deep": (META, lambda *_: b"[" * 100_000, "damaged"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_index(kind, tmp_path, tiny_data):
    name, spoil, expected = INDICES[kind]
    path = shutil.copytree(f"{tiny_data}/toy", tmp_path / "toy") / name
    path.write_bytes(spoil(path.read_bytes(), str(tmp_path / "marker")))
    assert expected in refused(Pairs, str(tmp_path), "toy", "train")
    assert not (tmp_path / "marker").exists()
