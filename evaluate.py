"""
Measure a checkpoint and print a table, export it, search by it, draw curves of runs. The metrics are pure
functions, which the training loops import too.

    python evaluate.py retrieval                           # out/tiny/ckpt.pt on the OpenMoji test set
    python evaluate.py retrieval --ckpt=out/mine/ckpt.pt --data=coco --json=coco.json --picture=found.png
    python evaluate.py zeroshot --task=imagenet            # CLIP's: the class whose prompts are closest
    python evaluate.py knn --task=cifar10                  # nearest neighbours of an image encoder's features
    python evaluate.py finetune --task=cifar10             # minutes with: --linear_probe --augment=none
    python evaluate.py glue --ckpt=out/bert/ckpt.pt        # the nine tasks of GLUE; run again, it goes on
    python evaluate.py export --to=student --onnx          # a folder to take home
    python evaluate.py search --images=photos "a red apple" --html=found.html
    python evaluate.py curves --runs=out/a,out/b --picture=curves.png
    python evaluate.py finetune --help

Shapes: N images, M captions, D embed_dim, C classes, Q queries, G gallery items.
"""
import base64
import contextlib
import functools
import html
import importlib
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import (PRETRAINED, GPT2Tokenizer, Parser, Run, batch_order, cache_folder, fail, hash_of,
                   ignore_signals, init_weights, load_checkpoint, load_encoder, nearest, number,
                   optimizer_step, pick_device, pick_dtype, read_checkpoint, run_flags,
                   save_atomic, save_checkpoint, set_up, use_compile, write_json)
from prepare_imagenet import (Bad, Pairs, decode, eval_image, normalize, or_bad, read_file, shown,
                              train_image, walk)
from prepare_owt import load_text_encoder

# -----------------------------------------------------------------------------
# image-text retrieval: metrics


def checked(image_emb, text_emb, text_to_image):
    """Embeddings as float32 unit vectors on the CPU, text_to_image as an int64 tensor. ValueError if the
    three do not belong together, or if an embedding is NaN or infinite."""
    images, texts = (torch.as_tensor(emb).detach().cpu() for emb in (image_emb, text_emb))
    owner = torch.as_tensor(text_to_image).cpu()
    for name, emb in ("image_emb", images), ("text_emb", texts):
        if emb.ndim != 2 or 0 in emb.shape or not emb.isfinite().all():
            raise ValueError(f"{name} must be (n, D), n, D > 0, without NaN and infinite values; it is "
                             f"{tuple(emb.shape)}")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"image_emb has {images.shape[1]} dimensions, text_emb {texts.shape[1]}")
    N, M = len(images), len(texts)
    if owner.shape != (M,) or owner.is_floating_point() or {*owner.tolist()} != {*range(N)}:
        raise ValueError(f"text_to_image must be {M} integers, each of 0 .. {N - 1} at least once")
    # in float64 no norm overflows or vanishes, whatever the scale; a zero vector stays zero
    images, texts = (F.normalize(emb.double(), dim=1, eps=1e-300).float() for emb in (images, texts))
    return images, texts, owner.long()


def gallery_order(size):
    """The order in which equal scores rank: a fixed permutation. A collapsed model, whose scores are all
    equal, must not be right because the right answer happens to be stored first."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def best_ranks(queries, query_owner, gallery, gallery_owner, chunk=256):
    """Rank (1 = best) of each query's best right answer, which is a gallery item of the same owner.
    queries (Q, D), gallery (G, D): unit vectors; owners int64. Returns (Q,) int64, G + 1 where the gallery
    has no right answer. Memory: chunk x G."""
    order = gallery_order(len(gallery)) # before the product: its rounding depends on the column
    gallery, gallery_owner = gallery[order], gallery_owner[order]
    position = torch.arange(len(gallery), device=gallery.device)
    ranks = []
    for q, owner in zip(queries.split(chunk), query_owner.split(chunk)):
        scores = q @ gallery.T # (chunk, G)
        right = owner[:, None] == gallery_owner # (chunk, G)
        best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True) # (chunk, 1)
        equal = scores == best
        first = (equal & right).int().argmax(1, keepdim=True) # argmax: the first of equal values
        ranks.append(1 + ((scores > best) | (equal & (position < first))).sum(1))
    return torch.cat(ranks)


def percent(hits):
    """Share of True in a bool tensor, times 100."""
    return hits.double().mean().item() * 100


def summary(i2t, t2i):
    """Three recalls each way -> the dict of retrieval_metrics; its means are None where a recall is None."""
    mean = lambda values: None if None in values else sum(values) / len(values)
    keys = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    return {**dict(zip(keys, [*i2t, *t2i])),
            "i2t_mean": mean(i2t), "t2i_mean": mean(t2i), "mean": mean([*i2t, *t2i])}


def retrieval_metrics(image_emb, text_emb, text_to_image):
    """Recall at 1, 5 and 10 both ways, in percent, python floats: i2t_rK, the share of images with any own
    caption among the K captions of highest cosine; t2i_rK, of captions whose image is among the K images.
    i2t_mean, t2i_mean: over the three K; mean: over all six, the thesis' average.

    image_emb (N, D), text_emb (M, D): any float dtype, normalised here, compared in float32. text_to_image:
    (M,) integers, numpy or torch. Ties are broken by a fixed permutation of the gallery: equal scores get
    chance, not 100%. ValueError if shapes disagree, an index is out of range, an image has no caption, or a
    value is NaN."""
    images, texts, owner = checked(image_emb, text_emb, text_to_image)
    index = torch.arange(len(images))
    recalls = [[percent(ranks <= k) for k in (1, 5, 10)] for ranks in
               (best_ranks(images, index, texts, owner), best_ranks(texts, owner, images, index))]
    return summary(*recalls)


def median_rank(image_emb, text_emb):
    """Median rank (1 = best) of the true partner, (i2t, t2i), for one-to-one pairs: (N, D) and (N, D), row i
    with row i. Chance is (N + 1) / 2. Ties and errors as in retrieval_metrics."""
    if len(image_emb) != len(text_emb):
        raise ValueError(f"needs one-to-one pairs, not {len(image_emb)} images and {len(text_emb)} texts")
    images, texts, index = checked(image_emb, text_emb, np.arange(len(image_emb)))
    i2t, t2i = best_ranks(images, index, texts, index), best_ranks(texts, index, images, index)
    return float(np.median(i2t.numpy())), float(np.median(t2i.numpy()))


def median_rank_chunks(image_emb, text_emb, text_to_image, chunk=1000):
    """The protocol of SHRe's COCO numbers, (i2t, t2i): in pass c = 0 .. 4 (at most as many as an image has
    captions) each image is paired with its caption c, or c modulo their number, the images are cut into
    chunks of 1,000, without the rest, and the medians are averaged. Arguments as in retrieval_metrics."""
    images, texts, owner = checked(image_emb, text_emb, text_to_image)
    N, counts = len(images), torch.bincount(owner)
    by_image, start = owner.argsort(stable=True), counts.cumsum(0) - counts
    chunk = min(chunk, N)
    medians = []
    for c in range(min(5, counts.max().item())):
        caption = by_image[start + c % counts] # (N,) each image's caption c
        for i in range(0, N - chunk + 1, chunk):
            medians.append(median_rank(images[i:i + chunk], texts[caption[i:i + chunk]]))
    return tuple(float(m) for m in np.mean(medians, axis=0))


def chance_row(text_to_image, num_images):
    """What retrieval_metrics gives for random scores on average, exactly: an image with n of the M captions
    has one in the top K with probability 1 - C(M-n, K) / C(M, K), a caption's image is there with K / N."""
    M, counts = len(text_to_image), np.bincount(np.asarray(text_to_image), minlength=num_images)
    miss = lambda n, k: math.comb(M - n, min(k, M)) / math.comb(M, min(k, M))
    sizes = Counter(counts.tolist()).items() # (n, number of images with n captions)
    i2t = [100 - 100 * sum(images * miss(n, k) for n, images in sizes) / num_images for k in (1, 5, 10)]
    return summary(i2t, [100 * min(k / num_images, 1.0) for k in (1, 5, 10)])


# -----------------------------------------------------------------------------
# from models to embeddings


@contextlib.contextmanager
def evaluating(model):
    """The model in eval mode, and afterwards every part of it in the mode it had: a loop's frozen parts stay
    frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def embed(model, encode, items, batch_size, device, dtype, num_workers=0, collate=None):
    """Every item once, in order, by encode: a batch of items, as collate makes it -> (B, D). Returns (n, D)
    float32 on the CPU. The model, already on device, runs in eval mode under autocast to dtype and gets its
    old mode back."""
    loader = torch.utils.data.DataLoader(
        items, batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=ignore_signals,
        generator=torch.Generator()) # its own: a training loop's random numbers stay as they are
    batches = tqdm(loader, "embedding", leave=False, disable=len(loader) < 20 or not sys.stderr.isatty())
    try:
        with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return torch.cat([encode(batch).float().cpu() for batch in batches])
    except RuntimeError as e:
        if not num_workers or "DataLoader worker" not in str(e):
            raise
    # the workers died, of a signal to the whole group: what called this ends in good order, without them
    return embed(model, encode, items, batch_size, device, dtype, 0, collate)


say_once = functools.cache(print) # loops evaluate again and again


class EvalImages(torch.utils.data.Dataset):
    """Pictures as evaluation sees them, (3, H, W) uint8, each with -1; one that cannot be read is grey, and
    comes with its number."""

    def __init__(self, images, size, squash=False):
        self.images, self.size, self.squash, self.num_grey = images, size, squash, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            return eval_image(self.images[i], self.size, self.squash), -1
        except Bad:
            return torch.full((3, self.size, self.size), 128, dtype=torch.uint8), int(i)

    def images_of(self, batch):
        """A batch of such pairs -> images (B, 3, H, W) uint8. Names the grey ones; ends the program when they
        are more than ten and one in a hundred."""
        images, bad = batch
        for i in bad[bad >= 0].tolist():
            self.num_grey += 1
            say_once(f"{getattr(self.images, 'path', 'data')}: picture {i} of {len(self)} cannot be read: "
                     f"grey in its place")
        if self.num_grey > 10 + len(self) / 100:
            fail(f"{self.num_grey} of {len(self)} pictures cannot be read: prepare the set again")
        return images

    def stack(self, which):
        """Those pictures, in this order, (n, 3, H, W) uint8."""
        return self.images_of(torch.utils.data.default_collate([self[i] for i in which]))


def embed_images(model, encode, images, size, batch_size, device, dtype, squash=False, num_workers=0):
    """As embed; encode: pictures (B, 3, H, W) float32, normalised -> (B, D)."""
    images = EvalImages(images, size, squash)
    return embed(model, lambda batch: encode(normalize(images.images_of(batch).to(device))), images,
                 batch_size, device, dtype, num_workers)


def embed_texts(model, texts, batch_size, device, dtype):
    """As embed, by the model's encode_text."""
    def encode(batch):
        ids, padding_mask = model.tokenizer.encode(batch, model.max_length) # (B, T) each
        return model.encode_text(ids.to(device), padding_mask.to(device))

    return embed(model, encode, texts, batch_size, device, dtype, collate=list)


class Unaligned(torch.nn.Module):
    """Two encoders that never met, as one model: the baseline that says what alignment is worth."""

    def __init__(self, image, text):
        super().__init__()
        widths = image.config["embed_dim"], text.config["embed_dim"]
        if widths[0] != widths[1]:
            fail(f"the image encoder is {widths[0]} wide, the text encoder {widths[1]}: "
                 f"their embeddings cannot be compared")
        self.image, self.text, self.tokenizer = image, text, text.tokenizer
        self.encode_image, self.encode_text = image.encode, text.encode
        self.img_size, self.max_length = image.img_size, text.max_length


def evaluate_retrieval(model, pairs, batch_size=256, device=torch.device("cpu"), dtype=torch.float32,
                       squash=False, num_workers=0):
    """Each image and caption once, then retrieval_metrics -> (metrics, image_emb (N, D), text_emb (M, D))."""
    image_emb = embed_images(model, model.encode_image, pairs.images, model.img_size, batch_size, device,
                             dtype, squash, num_workers)
    text_emb = embed_texts(model, pairs.captions, batch_size, device, dtype)
    return retrieval_metrics(image_emb, text_emb, pairs.text_to_image), image_emb, text_emb


def optional(module, packages):
    """A module that few need and requirements.txt does not bring, or how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        fail(f"{e.name} is not installed: pip install {packages}")


def towers(model):
    """Which of "image" and "text" a model embeds."""
    return [modality for modality in ("image", "text") if hasattr(model, f"encode_{modality}")]


def student(args):
    """The model in args.ckpt, which embeds both images and text."""
    model = load_checkpoint(args.ckpt)
    if towers(model) != ["image", "text"] or not hasattr(model, "tokenizer"):
        fail(f"{args.ckpt} does not embed both images and text, and {args.command} needs a checkpoint that "
             "distill_multimodal.py wrote: python distill_multimodal.py --preset=tiny")
    return model


def two_towers(args, device):
    """The model with encode_image and encode_text that the flags name, on device, and its name."""
    if (args.image_encoder is None) != (args.text_encoder is None):
        fail("--image_encoder and --text_encoder go together")
    if args.image_encoder is None:
        return student(args).to(device), args.ckpt
    if "ckpt" in args.given:
        fail("--ckpt is a model with both encoders: give it or --image_encoder and --text_encoder")
    model = Unaligned(load_encoder(args.image_encoder, "image", args.weights_dir),
                      load_text_encoder(args.text_encoder, args.weights_dir))
    return model.to(device), f"{args.image_encoder} + {args.text_encoder}"


def one_encoder(args, modality):
    """The frozen Encoder that --ckpt or, by its name, --encoder or --text_encoder gives. Of a multimodal
    checkpoint it is that tower alone, without what both share, as the thesis finetuned them."""
    which = args.encoder if modality == "image" else args.text_encoder
    if which and "ckpt" in args.given:
        fail(f"--ckpt={args.ckpt} and {which} are each an encoder: give one of them")
    if which:
        load = load_text_encoder if modality == "text" else functools.partial(load_encoder, modality="image")
        return load(which, weights_dir=args.weights_dir)
    model = load_checkpoint(args.ckpt)
    encoder = getattr(model, f"{modality}_encoder", model)
    if encoder.config["modality"] != modality:
        fail(f"{args.ckpt} is an encoder for {encoder.config['modality']}, and {args.command} needs one for "
             f"{modality}: a checkpoint of distill_{modality}.py or distill_multimodal.py")
    if hasattr(model, "tokenizer"):
        encoder.tokenizer = model.tokenizer
    return encoder


def labelled_splits(task, data_dir, asks, names=("train", "val", "test")):
    """A set's splits of these names: train, if it is asked for, and val, test or both. All have labels, and
    train has every label. asks: what needs them, for the messages."""
    folder = os.path.join(data_dir, task)
    there = [s for s in names if s == "train" or os.path.exists(os.path.join(folder, f"{s}_images.idx"))]
    splits = {s: Pairs(data_dir, task, s) for s in there or names[-1:]}
    if [*splits] == ["train"]:
        fail(f"data set {task} has neither a val nor a test split: nothing to measure on")
    for s, pairs in splits.items():
        if pairs.labels is None:
            fail(f"data set {task} has no labels in its split {s}, and {asks} compares labels. To see it "
                 f"with a set that has them, digits: python prepare_imagenet.py --data=digits")
        unknown = np.setdiff1d(pairs.labels, splits["train"].labels).tolist() if "train" in splits else []
        if unknown:
            fail(f"data set {task}: no training image has the label {unknown[0]}, which {s} has "
                 f"({len(unknown)} such labels): their images can only be wrong")
    return splits


# -----------------------------------------------------------------------------
# image-text retrieval: the table and the picture

# Karpathy's test sets: images, captions (all there are, or the first five each; COCO has 10 more)
TEST_SETS = {"coco": (5000, 25_010, 25_000), "flickr30k": (1000, 5_000)}
PUBLISHED = { # R@1, 5, 10 image -> text, then text -> image; on COCO, then on Flickr30K
    "data2vec 2.0, unaligned": (0.02, 0.08, 0.19, 0.01, 0.1, 0.19, 0.02, 0.12, 0.18, 0.02, 0.06, 0.12),
    "MM-D2V2, data2vec2 teacher": (4.24, 12.12, 17.96, 1.77, 6.54, 10.91, 1.2, 4.88, 8.18, 0.54, 2.52, 4.58),
    "MM-D2V2, BEiTv2 teacher": (31.72, 56.78, 67.9, 12.42, 31.05, 42.5, 7.7, 26.18, 37.6, 4.08, 17.01, 24.26),
    "MM-D2V2 7": (30.24, 56.48, 67.46, 11.96, 30.48, 41.88, 7.36, 26.42, 36.6, 3.7, 16.58, 23.84),
    "MM-D2V2 7_2": (32.78, 58.34, 69.3, 12.83, 31.85, 43.4, 8.08, 27.92, 38.6, 4.14, 17.5, 24.82),
    "SHRe_T, MLP": (37.06, 67.74, 79.7, 25.3, 54.73, 68.19, 49.9, 78.5, 88.5, 37.04, 67.34, 77.38),
    "SHRe_T, Transformer": (44.6, 75.3, 85.64, 31.69, 62.1, 74.48, 58.8, 85.6, 92.4, 43.92, 74.06, 82.8),
    "S-SMKE_CDL_MB": (53.54, 81.1, 89.52, 35.65, 66.0, 77.77, 70.9, 92.1, 96.0, 52.72, 80.2, 87.46),
    "CLIP L/14-336": (58.4, 81.5, 88.1, 37.8, 62.4, 72.2, 88.0, 98.7, 99.4, 68.7, 90.6, 95.2)}
NOTES = {
    "coco": "All but CLIP and data2vec 2.0 were trained on COCO's training images. Published median ranks,\n"
            "image -> text / text -> image: SHRe 5.8 / 6.0; SHRe_T with the MLP 1.5 / 2.0, else 1.0 / 1.0",
    "flickr30k": "data2vec 2.0 and MM-D2V2 were scored by a wrong index, each image five times with one\n"
                 "valid caption: expect much higher numbers from the same model here."}


def published_retrieval(data, split, num_images, num_captions):
    """name -> what retrieval_metrics gives, as published for this test set; none for another or a part."""
    images, *captions = TEST_SETS.get(data, (0,))
    if split != "test" or num_images != images or num_captions not in captions:
        return {}
    i = 6 if data == "flickr30k" else 0
    return {name: summary(row[i:i + 3], row[i + 3:i + 6]) for name, row in PUBLISHED.items()}


def table(head, rows, published={}, column=16, above=""):
    """head: over the names, then over the columns, which are `column` wide. rows: dict name -> as many
    numbers, None where there is none; published: more of them, marked so."""
    rows = rows | {f"{name}, published": row for name, row in published.items()}
    width = max(map(len, [head[0], *rows]))
    lines = [f"{'':{width}}{above}"] if above else []
    lines.append(f"{head[0]:{width}}" + "".join(f"{word:>{column}}" for word in head[1:]))
    lines.append("-" * len(lines[-1]))
    for name, row in rows.items():
        cells = ["-" if x is None else f"{x:.2f}" for x in row]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def retrieval_table(rows, published={}):
    """As table; rows and published: dict name -> what retrieval_metrics gives."""
    keys = [f"{way}_{k}" for way in ("i2t", "t2i") for k in ("r1", "r5", "r10", "mean")] + ["mean"]
    rows, published = ({name: [row[k] for k in keys] for name, row in x.items()} for x in (rows, published))
    return table(["Model", *["R@1", "R@5", "R@10", "mean"] * 2, "mean"], rows, published, 7,
                 f"{'Image -> Text':>28}{'Text -> Image':>28}{'both':>7}")


INK, GREY, LINE, PALE, GREEN = "#1f2328", "#6e7781", "#e3e6ea", "#f6f7f9", "#1a8f3c"
CELL = 96 # pixels of a result; to the next 14 more, to the next row 28


def small_picture(data, side):
    """Encoded picture -> PIL image, its longer side that long; grey if it cannot be read."""
    try:
        with or_bad():
            image = decode(data)
    except Bad:
        image = Image.new("RGB", (side, side), LINE)
    return image.resize([max(1, round(n * side / max(image.size))) for n in image.size], Image.LANCZOS)


def draw_sheet(path, sections, notes):
    """A PNG. sections: (heading, rows); rows: (query, results, a word for the right edge); results: at most
    five (item, whether it is right). Queries and items are texts, or pictures as bytes."""
    height = 72 + sum(56 + (CELL + 28) * len(rows) for _, rows in sections) + 26 * len(notes)
    canvas = Image.new("RGB", (844, height), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text, x, y, size, width=796, max_lines=1, fill=INK, anchor="lm"):
        text = text.translate({0x2013: "-", 0x2014: "-", 0x2019: "'"}) # Pillow's own font lacks them
        font = ImageFont.load_default(size)
        for columns in range(120, 3, -1): # characters a line: the most that fit
            lines = textwrap.wrap(text, columns, max_lines=max_lines, placeholder="...")
            if all(font.getlength(line) <= width for line in lines):
                break
        align = "center" if anchor == "mm" else "left"
        draw.multiline_text((x, y), "\n".join(lines), fill, font, anchor, align=align)

    def show(item, x, y, is_right=False):
        frame = (GREEN, 3) if is_right else (LINE, 1)
        draw.rounded_rectangle((x - 4, y - 4, x + CELL + 3, y + CELL + 3), 8, PALE, *frame)
        if isinstance(item, str):
            write(item, x + CELL / 2, y + CELL / 2, 14, CELL - 6, 5, anchor="mm")
        else:
            image = small_picture(item, CELL)
            canvas.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))

    write("What the model finds", 24, 34, 26)
    y = 62
    for heading, rows in sections:
        write(heading, 24, y + 21, 20)
        y += 56
        for query, results, word in rows:
            if isinstance(query, str):
                write(query, 24, y + CELL / 2, 17, 152, 4)
            else:
                show(query, 28, y)
            for k, (item, is_right) in enumerate(results):
                show(item, 196 + k * (CELL + 14), y, is_right)
            write(word, 783, y + CELL / 2, 22, fill=GREY, anchor="mm")
            y += CELL + 28
    for i, note in enumerate(notes):
        write(note, 24, y + 12 + 26 * i, 16, fill=GREY)
    small = canvas.quantize(64, dither=Image.Dither.NONE)
    save_atomic(path, lambda f: small.save(f, "PNG", optimize=True))


def draw_retrieval(pairs, image_emb, text_emb, path, rows=4):
    """Captions with the five pictures found for each, pictures with the five captions found, the right ones
    in green, and the rank of the best right one."""
    images, texts, owner = checked(image_emb, text_emb, pairs.text_to_image)
    drawn = gallery_order(len(images)).repeat(2 * rows)[:2 * rows]
    captions = [(owner == i).nonzero()[0, 0] for i in drawn[:rows]] # the first of each picture
    of_images, of_texts = (images, pairs.images, torch.arange(len(images))), (texts, pairs.captions, owner)
    sections = []
    for heading, asked, (query_emb, queries, query_owner), (gallery_emb, gallery, gallery_owner) in (
            ("Captions to pictures", captions, of_texts, of_images),
            ("Pictures to captions", drawn[rows:], of_images, of_texts)):
        order, section = gallery_order(len(gallery)), [] # ties as in best_ranks
        for q in asked:
            found = order[(gallery_emb[order] @ query_emb[q]).argsort(descending=True, stable=True)] # (G,)
            right = gallery_owner[found] == query_owner[q] # (G,)
            best = [(gallery[j], bool(hit)) for j, hit in zip(found[:5], right)]
            section.append((queries[q], best, f"{right.int().argmax() + 1:,}")) # the first that is right
        sections.append((f"{heading}: the best five of {len(gallery):,}", section))
    credit, licence = (str(pairs.meta.get(key, "")) for key in ("credit", "license"))
    draw_sheet(path, sections, [
        "Green: the right answer; at the right its rank. Queries drawn with seed 0, not picked by hand.",
        credit if licence in credit else f"{credit} {licence}"])


TRANSFORMS = ["images resized by the short side, centre crop", "images squashed to a square"] # args.squash


def retrieval(args, device, dtype):
    """Image-text retrieval: recall at 1, 5 and 10 both ways, and the median rank of the true partner. For the
    whole test sets of coco and flickr30k published rows are printed."""
    model, name = two_towers(args, device)
    pairs = Pairs(args.data_dir, args.data, args.split, needs_captions=True)
    N, M = len(pairs.images), len(pairs.captions)
    print(f"{args.data} {args.split}: {N:,} images, {M:,} captions, {TRANSFORMS[args.squash]}")
    metrics, image_emb, text_emb = evaluate_retrieval(
        model, pairs, args.batch_size, device, dtype, args.squash, args.num_workers)
    chance, published = chance_row(pairs.text_to_image, N), published_retrieval(args.data, args.split, N, M)
    print(retrieval_table({name: metrics, "chance": chance}, published))
    if published:
        print(NOTES[args.data])
    (i2t, t2i), size = median_rank_chunks(image_emb, text_emb, pairs.text_to_image), min(N, 1000)
    print(f"median rank among {size:,}: image -> text {i2t:g}, text -> image {t2i:g} (1 = best, chance "
          f"{(size + 1) / 2:g})")
    if args.picture:
        draw_retrieval(pairs, image_emb, text_emb, args.picture)
    return {"ckpt": name, "data": args.data, "split": args.split, "squash": args.squash, "images": N,
            "captions": M, "metrics": metrics, "chance": chance, "published": published,
            "median_rank": {"i2t": i2t, "t2i": t2i, "among": size, "chance": (size + 1) / 2}}


# -----------------------------------------------------------------------------
# image features and their nearest neighbours


def pool_patches(tokens):
    """An encoder's output (B, T, D) -> (B, D) float32: the mean of the patch tokens, as in the thesis."""
    return tokens[:, 1:].float().mean(1)


def image_features(encoder, pairs, batch_size, device, dtype, num_workers=0):
    """Every image of a split once, in order -> (N, D). As embed."""
    return embed_images(encoder, lambda images: pool_patches(encoder(images)), pairs.images,
                        encoder.config["img_size"], batch_size, device, dtype, num_workers=num_workers)


def knn_ranks(bank, bank_labels, queries, query_labels):
    """Rank (1 = nearest) of each query's nearest bank item of its label, by cosine, len(bank) + 1 if there is
    none. Arguments as in knn_accuracy. Returns (Q,) int64."""
    sides = []
    for name, emb, labels in ("queries", queries, query_labels), ("bank", bank, bank_labels):
        emb, labels = torch.as_tensor(emb).detach(), torch.as_tensor(labels)
        if emb.ndim != 2 or 0 in emb.shape or labels.shape != emb.shape[:1] or not emb.isfinite().all():
            raise ValueError(f"{name} must be (n, D) finite numbers with n labels, but are "
                             f"{tuple(emb.shape)} with {tuple(labels.shape)}")
        sides += [F.normalize(emb.float(), dim=1), labels.to(emb.device)]
    return best_ranks(*sides, chunk=max(1, 2 ** 25 // len(bank))) # 128 MB of scores, whatever the bank


def knn_accuracy(bank, bank_labels, queries, query_labels, k):
    """Share of queries, in percent, with their label among their k nearest neighbours in the bank: a hit if
    any of the k has it, no vote; k beyond the bank means all of it.

    bank (G, D), queries (Q, D): any float dtype, on one device, normalised here; labels (G,) and (Q,)
    integers. Equal cosines rank in an order fixed once for all, as in retrieval_metrics."""
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}")
    return percent(knn_ranks(bank, bank_labels, queries, query_labels) <= min(k, len(bank)))


def evaluate_knn(encoder, bank_pairs, query_pairs, batch_size=256, device=torch.device("cpu"),
                 dtype=torch.float32, num_workers=0):
    """Two labelled splits -> top1 and top3, queries searched in the bank, and reverse_top1 and reverse_top3,
    the bank's images searched among the queries; in percent."""
    features_of = lambda pairs: image_features(encoder, pairs, batch_size, device, dtype, num_workers)
    sides = [(features_of(pairs).to(device), pairs.labels) for pairs in (bank_pairs, query_pairs)]
    result = {}
    for way, (bank, queries) in (("", sides), ("reverse_", sides[::-1])):
        ranks = knn_ranks(*bank, *queries)
        result |= {f"{way}top{k}": percent(ranks <= min(k, len(bank[0]))) for k in (1, 3)}
    return result


def knn(args, device, dtype):
    """Nearest neighbours of frozen image features: the share of images with their label among their 1 and 3
    nearest, held-out images searched in the training images and the other way round."""
    encoder = one_encoder(args, "image").to(device)
    splits = labelled_splits(args.task, args.data_dir, args.command)
    train, (name, held_out) = splits["train"], splits.popitem() # the last: test if there is one
    print(f"{args.task}: {len(train.images):,} training images, {len(held_out.images):,} of {name}")
    metrics = evaluate_knn(encoder, train, held_out, args.batch_size, device, dtype, args.num_workers)
    top, ckpt = [*metrics.values()], args.encoder or args.ckpt
    print(table([ckpt, "top-1", "top-3"], {f"train -> {name}": top[:2], f"{name} -> train": top[2:]}))
    return {"ckpt": ckpt, "task": args.task, "split": name,
            "train_images": len(train.images), "images": len(held_out.images), "metrics": metrics}



# -----------------------------------------------------------------------------
# zero-shot classification: classes are prompts

TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of one {}.", "a close-up of a {}.",
             "a drawing of a {}.", "{}"] # where no package has CLIP's
PUBLISHED_ZERO_SHOT = { # top-1 on ImageNet's 50,000, CLIP's 80 prompts
    "SHRe_T, MLP (!)": 40.26, "SHRe_T, Transformer (!)": 44.57, "S-SMKE_CDL_MB": 37.0,
    "S-SMKE_CDL_MB, no teacher": 25.8, "CLIP L/14-336": 76.2}


def class_names(task, classes, path):
    """What prompts call the classes of a set, in the order of its labels, and who says so: path, a file with
    a name a line, or its meta.json. Where folders were numbers, line n + 1 names folder n."""
    classes = classes or []
    are_numbers = {*classes} == {*map(str, range(len(classes)))}
    are_wordnet = all(re.fullmatch(r"n\d{8}", name) for name in classes)
    if path:
        try:
            with open(path, encoding="utf-8") as f:
                names = [line.strip() for line in f if line.strip()]
        except (OSError, ValueError) as e:
            fail(f"--classes={path} cannot be read: {e}")
        if classes and len(names) != len(classes):
            fail(f"--classes={path} holds {len(names):,} names, but {task} has {len(classes):,} classes")
        return [names[int(name)] for name in classes] if classes and are_numbers else names, path
    if are_wordnet and len(classes) == 1000 and list(classes) == sorted(classes): # ImageNet's, as our labels
        return optional("open_clip", "open_clip_torch").IMAGENET_CLASSNAMES, "CLIP"
    if are_wordnet or are_numbers and len(classes) == 1000:
        fail(f"the classes of data set {task} have no names, at most numbers as of ImageNet's folders: give "
             f"them with --classes=FILE, one a line, in the order of the labels")
    return [name.replace("_", " ") for name in classes], "meta.json"


def prompt_templates():
    """CLIP's 80 for ImageNet, if a package has them, else a few of our own; and in words which."""
    try:
        import open_clip # here, not above: optional
        return open_clip.OPENAI_IMAGENET_TEMPLATES, "CLIP's for ImageNet"
    except ImportError:
        print("not CLIP's prompts, so no published number compares; for them: pip install open_clip_torch")
        return TEMPLATES, "this script's"


@torch.no_grad()
def zero_shot_weights(encode_text, classnames, templates, batch_size=256):
    """One embedding a class, (C, D) float32 of length 1: the mean of its prompts' embeddings, each normalised
    before, normalised again.

    encode_text: list of at most batch_size strings -> (n, D), any float dtype and length. templates: strings
    with {} for the name, or functions name -> prompt. ValueError without a class or template."""
    fill = [template if callable(template) else template.format for template in templates]
    prompts = [prompt(name) for name in classnames for prompt in fill]
    if not prompts:
        raise ValueError(f"{len(classnames)} classes and {len(fill)} templates give no prompt")
    emb = torch.cat([F.normalize(encode_text(prompts[i:i + batch_size]).float(), dim=1)
                     for i in range(0, len(prompts), batch_size)]) # (C * prompts, D)
    return F.normalize(emb.view(len(classnames), len(fill), -1).mean(1), dim=1) # (C, D)


def zeroshot(args, device, dtype):
    """Zero-shot classification as CLIP does it: a picture's class is the one whose prompts, embedded and
    averaged, are closest to it. Measured on the split test, or val where there is none; for ImageNet's whole
    val and CLIP's 80 prompts (pip install open_clip_torch) published rows are printed."""
    split, pairs = labelled_splits(args.task, args.data_dir, args.command, ("val", "test")).popitem()
    names, named_by = class_names(args.task, pairs.meta.get("classes"), args.classes)
    templates, made_by = prompt_templates()
    N, C = len(pairs.images), len(names)
    if pairs.labels.min() < 0 or pairs.labels.max() >= C:
        fail(f"data set {args.task} has the label {pairs.labels.max()}, but {named_by} names {C} classes")
    model, name = two_towers(args, device)
    words = f"named by {named_by}, {len(templates)} prompts for each: {made_by}"
    print(f"{args.task} {split}: {N:,} images of {C:,} classes, {words}; {TRANSFORMS[args.squash]}")
    encode_text = lambda prompts: embed_texts(model, prompts, args.batch_size, device, dtype)
    weights = zero_shot_weights(encode_text, names, templates, len(names) * len(templates)) # batched there
    image_emb = embed_images(model, model.encode_image, pairs.images, model.img_size, args.batch_size, device,
                             dtype, args.squash, args.num_workers) # (N, D)
    ranks = knn_ranks(weights, np.arange(C), image_emb, pairs.labels)
    metrics = {f"top{k}": percent(ranks <= k) for k in (1, 3, 5)}
    is_whole = (args.task, split, N, len(templates), named_by) == ("imagenet", "val", 50_000, 80, "CLIP")
    published = PUBLISHED_ZERO_SHOT if is_whole else {}
    print(table([args.task, "top-1", "top-3", "top-5"],
                {name: metrics.values(), "chance": [100 * min(k / C, 1) for k in (1, 3, 5)]},
                {title: (top1, None, None) for title, top1 in published.items()}))
    if published:
        print("(!) the teacher learned from ImageNet's labels: not zero-shot")
    return {"ckpt": name, "task": args.task, "split": split, "squash": args.squash, "images": N, "classes": C,
            "prompts": len(templates), "source": words, "metrics": metrics, "published": published}


# -----------------------------------------------------------------------------
# training for some epochs, of which the best is kept: image finetuning and GLUE

WARMUP_SHARE = 0.1 # of the steps, in which the learning rate rises; then it falls to 0


def lr_share(step, warmup_steps, max_steps, linear=False):
    """Learning rate over its peak: linear warm-up, then half a cosine or a line to 0. step counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - done if linear else (1 + math.cos(math.pi * done)) / 2


def train_epochs(run, read, model, head, optimizer, batches, loss_of, measure, **kept):
    """Trains a new or an interrupted run -> the best epoch's measures and, as "epoch", its number.
    OUT_DIR/best.pt holds its weights, ckpt.pt what a killed run goes on from.

    read, kept           hashes of what is read besides flags; what else goes into checkpoints
    optimizer            every group has its "peak_lr"
    batches(step)        iterator over the batches from that step on, the same number in each epoch; the last
                         of a batch: numbers of what cannot be read, and -1
    loss_of(batch, step) a float32 scalar
    measure()            dict of percents, after each epoch; the first decides"""
    args, per_epoch = run.args, run.max_steps // run.args.epochs
    warmup_steps = round(WARMUP_SHARE * run.max_steps)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.settings["autocast"] == "torch.float16")
    parts = {"head": head, "optimizer": optimizer, "scaler": scaler}
    best = run.restore(read, model=model, **parts).get("best", {})
    step, peak = run.step, max(group["peak_lr"] for group in optimizer.param_groups)
    print(f"{run.path} is finished" if step == run.max_steps else
          f"{args.epochs} epochs of {per_epoch} steps, {warmup_steps} of warm-up")
    if use_compile(args.compile, run.device): # in place: the weights keep their names
        model.compile()
    for *batch, bad in run.batches(batches(step)):
        share = lr_share(step, warmup_steps, run.max_steps, args.command == "glue")
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        unreadable, loss = run.name_unreadable(step, bad), loss_of(batch, step)
        scaler.scale(loss).backward()
        norm = optimizer_step(optimizer, scaler, 0.0)
        step += 1

        run.add(loss=loss, norm=norm, unreadable=unreadable)
        if step % args.log_interval == 0 or step == run.max_steps:
            means, pace = run.means(step, "examples")
            words = f"loss {means['loss']:.4f}  norm {means['norm']:.2f}  lr {share * peak:.2e}  {pace}"
            run.log(step, f"step {step:>6}/{run.max_steps}  {words}", lr=share * peak, **means)
        if step % per_epoch == 0:
            with run.paused(step):
                result = measure()
            first, epoch = next(iter(result)), step // per_epoch
            if not best or result[first] > best[first]:
                best = {**result, "epoch": epoch}
                save_checkpoint(os.path.join(args.out_dir, "best.pt"), model, head=head.state_dict(),
                                best=best, settings=run.settings, step=step, **kept)
            values = ", ".join(f"{k} {v:.2f}" for k, v in result.items())
            run.log(step, f"epoch {epoch}/{args.epochs}: {values} (best {first} {best[first]:.2f} in epoch "
                    f"{best['epoch']})", epoch=epoch, best=f"val_{first}",
                    **{f"val_{k}": v for k, v in result.items()})
        if step % per_epoch == 0 or step % args.save_interval == 0:
            run.save(step, model, best=best, **parts, **kept)
    run.save(step, model, best=best, **parts, **kept)
    run.end(step)
    return best


# -----------------------------------------------------------------------------
# image classification: finetuning and linear probe (seeds' tables 3-5 and 8)

PUBLISHED_VISION = { # top-1 finetuned and of a linear probe
    "imagenet": {"DistilData2Vec2": (76.1, 71.1), "S-SMKE image encoder": (75.5, 65.0),
                 "Data2Vec2": (84.5, None), "BEiTv2, 300 epochs": (85.0, 80.1)},
    "cifar10": {"DistilData2Vec2": (97.7, 93.2), "S-SMKE image encoder": (97.6, 89.7),
                "BEiTv2": (98.8, 94.4)},
    "cifar100": {"DistilData2Vec2": (87.2, 77.3), "S-SMKE image encoder": (85.2, 71.3),
                 "BEiTv2": (91.1, 78.5)}}
MIX_SHARE = 0.9 # of the batches, half of them by mixup, half by cutmix


@contextlib.contextmanager
def torch_seeded(rng):
    """Inside, torch's own CPU randomness, all that torchvision's transforms know, follows from a numpy
    Generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
        yield


@functools.cache
def train_transform():
    """uint8 images to normalised ones, as the thesis trained but for RandAugment: timm's m9-mstd0.5-inc1
    skips every second operation, varies the magnitude, posterizes to 1 bit, not 4, inverts and adds, too."""
    from torchvision.transforms import v2 # here, not above: a second, and the loops import this file
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR,
                       fill=[124, 116, 104]), # ImageNet's mean comes in at the edges
        v2.Lambda(lambda image: normalize(image[None])[0]),
        v2.RandomErasing(0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")]) # noise, spread as pixels are now


class LabelledImages(torch.utils.data.Dataset):
    """Training images; the index is (epoch, position, image), which all randomness is a function of. Items:
    image (3, H, W) float32, ImageNet-normalised, its class 0 .. C-1, and its number if it is grey because it
    cannot be read, else -1."""

    def __init__(self, images, targets, size, args):
        self.images, self.targets, self.size, self.args = images, targets, size, args

    def __getitem__(self, index):
        epoch, position, i = index
        rng = np.random.default_rng((self.args.seed, epoch, position))
        try:
            if self.args.augment == "none":
                return normalize(eval_image(self.images[i], self.size)[None])[0], self.targets[i], -1
            image, = train_image(self.images[i], self.size, 0.08, rng)
        except Bad:
            return torch.zeros(3, self.size, self.size), self.targets[i], i
        with torch_seeded(rng):
            return train_transform()(image), self.targets[i], -1


def mix(images, targets, rng):
    """Mostly mixup or, as often, cutmix of a whole batch, each image with its neighbour, and of its targets.
    images (B, 3, H, W) float, targets (B, C) whose rows sum to 1 -> the same shapes."""
    if rng.random() >= MIX_SHARE:
        return images, targets
    from torchvision.transforms import v2 # here, not above: see train_transform
    mixer = v2.CutMix(alpha=1.0) if rng.random() < 0.5 else v2.MixUp(alpha=0.8) # as BEiT
    with torch_seeded(rng):
        return mixer(images, targets)


def parameter_groups(encoder, head, args):
    """AdamW's groups, one or two a layer, with "layer", "peak_lr" and "weight_decay". Eq. 40: layer l =
    1 .. L, a block, learns at lr * decay^(L + 1 - l); all that stands before the blocks is layer 0, the head
    layer L + 1. No decay for biases, norms, positions, tokens. Frozen parameters are left out."""
    L, groups = encoder.config["depth"], {}
    # the thesis' code; 0.81, the root of data2vec 2.0's 0.65, elsewhere
    decay = args.layer_decay or (0.75 if args.task in ("cifar10", "cifar100") else 0.81)
    for name, p in [*encoder.named_parameters(), *head.named_parameters("head")]:
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        # the table serves all blocks: its rate in BEiT too
        if name.startswith(("head.", "norm.", "relative_position")):
            layer = L + 1
        decayed = p.ndim > 1 and not any(word in name for word in ("pos_embed", "token", "relative_position"))
        if p.requires_grad:
            group = {"params": [], "layer": layer, "peak_lr": args.lr * decay ** (L + 1 - layer),
                     "weight_decay": args.weight_decay * decayed}
            groups.setdefault((layer, decayed), group)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def finetune(args, device, dtype):
    """Finetunes an image encoder with a linear classifier on top (mean of the patch tokens -> LayerNorm ->
    Linear), or trains the classifier alone, and measures how many held-out images it names right."""
    # -- data: the best epoch is chosen on val, and a test set, where there is one, is used once, at the end
    if args.linear_probe and "layer_decay" in args.given:
        fail("--layer_decay: a linear probe trains the head alone, at --lr")
    splits = labelled_splits(args.task, args.data_dir, args.command)
    train, val, test = splits["train"], list(splits)[1], list(splits)[-1]
    classes = np.unique(train.labels)
    targets = {s: torch.from_numpy(np.searchsorted(classes, pairs.labels)) for s, pairs in splits.items()}
    N, C, B = len(train.images), len(classes), args.batch_size
    if B > N:
        fail(f"--batch_size={B}, but there are {N} training images. Use at most that many.")

    # -- encoder, head, optimizer
    encoder = one_encoder(args, "image")
    autocast = set_up(args)[-1]
    read = {"the encoder": hash_of(encoder), "the data set": hash_of(train.images.offsets, train.labels)}
    run = Run(args, __file__, ["task", "ckpt", "encoder", "linear_probe"], device, dtype,
              args.epochs * (N // B))
    head = torch.nn.Sequential(torch.nn.LayerNorm(encoder.config["embed_dim"], eps=1e-6),
                               torch.nn.Linear(encoder.config["embed_dim"], C))
    torch.nn.init.trunc_normal_(head[1].weight, std=0.02)
    torch.nn.init.zeros_(head[1].bias)
    encoder, head = encoder.to(device), head.to(device)
    if not args.linear_probe:
        encoder.train().requires_grad_(True)
    groups = parameter_groups(encoder, head, args)
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.999), 1e-8, fused=device.type in ("cuda", "cpu"))
    print(f"{C:,} classes, images: {', '.join(f'{len(pairs.images):,} {s}' for s, pairs in splits.items())}; "
          f"learning rates {', '.join(f'{lr:.1e}' for lr in sorted({group['peak_lr'] for group in groups}))}")

    features_of = lambda pairs: image_features(encoder, pairs, B, device, dtype, args.num_workers)
    if args.linear_probe: # these never change
        features_of = functools.cache(features_of)
    is_cached = args.linear_probe and args.augment == "none" # nothing random stands before the head

    @torch.no_grad()
    def measure(split):
        """Percent of the split's images whose class is the first, and among the first five."""
        logits = head(features_of(splits[split]).to(device)) # (N, C)
        right = logits.topk(min(5, C)).indices.cpu() == targets[split][:, None]
        return {"top1": percent(right[:, 0]), "top5": percent(right.any(1))}

    def batches(step):
        """From this step on: images (B, 3, H, W) or features (B, D), and classes (B,)."""
        order = batch_order(N, B, args.seed, step)
        if is_cached:
            features = features_of(train)
            order = (torch.tensor(batch)[:, 2] for batch in order)
            return ((features[i], targets["train"][i], torch.tensor([-1])) for i in order)
        images = LabelledImages(train.images, targets["train"], encoder.config["img_size"], args)
        return torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=args.num_workers,
                                           worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")

    def loss_of(batch, step):
        x, target = batch[0].to(device, non_blocking=True), F.one_hot(batch[1], C).float().to(device) # (B, C)
        if args.augment == "default":
            x, target = mix(x, target, np.random.default_rng((args.seed, step, 0, 1)))
        with autocast:
            pooled = x if is_cached else pool_patches(encoder(x)) # (B, D) float32
        # a mean over the batch; the thesis' code divides by C as well
        return F.cross_entropy(head(pooled), target, label_smoothing=args.smoothing)

    best = train_epochs(run, read, encoder, head, optimizer, batches, loss_of, lambda: measure(val),
                        classes=classes.tolist())
    metrics = {k: best[k] for k in ("top1", "top5")}
    if test != val:
        kept = read_checkpoint(os.path.join(args.out_dir, "best.pt"))
        encoder.load_state_dict(kept["model"])
        head.load_state_dict(kept["head"])
        metrics = measure(test)
    name, published = args.encoder or args.ckpt, PUBLISHED_VISION.get(args.task, {})
    row = (None, metrics["top1"]) if args.linear_probe else (metrics["top1"], None)
    print(table([args.task, "Finetune", "Linear Probe"], {name: row}, published))
    print(f"{test}: top-1 {metrics['top1']:.2f}, top-5 {metrics['top5']:.2f} after epoch {best['epoch']} of "
          f"{args.epochs}, the best on {val}; wrote {os.path.join(args.out_dir, 'best.pt')}")
    return {"ckpt": name, "task": args.task, "split": test, "linear_probe": args.linear_probe,
            "augment": args.augment, "images": len(splits[test].images), "classes": C, "epochs": args.epochs,
            "epoch": best["epoch"], "chosen_on": val, "seed": args.seed, "metrics": metrics,
            "published": published}


# -----------------------------------------------------------------------------
# GLUE: nine tasks of sentences and pairs of sentences (seeds' table 6)

# columns: of the raw files, texts then label; classes: as the label column spells them, in the hub's order,
# None for a score from 0 to 5; metrics: the score, then what is beside it; the rest as in the thesis' code
Task = namedtuple("Task", "title columns classes metrics batch_size epochs lr")
PAIR, BINARY = ["sentence1", "sentence2", "label"], ["0", "1"]
MNLI, ENTAILS = ["entailment", "neutral", "contradiction"], ["entailment", "not_entailment"]
GLUE = { # in the order of seeds' table 6
    "mnli": Task("MNLI", [*PAIR[:2], "gold_label"], MNLI, ["accuracy"], 64, 10, 2e-5),
    "qnli": Task("QNLI", ["question", "sentence", "label"], ENTAILS, ["accuracy"], 32, 10, 2e-5),
    "rte": Task("RTE", PAIR, ENTAILS, ["accuracy"], 16, 20, 2e-5),
    "mrpc": Task("MRPC", ["#1 String", "#2 String", "Quality"], BINARY, ["f1", "accuracy"], 16, 20, 2e-5),
    "qqp": Task("QQP", ["question1", "question2", "is_duplicate"], BINARY, ["f1", "accuracy"], 128, 10, 2e-5),
    "stsb": Task("STS-B", [*PAIR[:2], "score"], None, ["spearman", "pearson"], 16, 20, 4e-5),
    "cola": Task("CoLA", ["sentence", "label"], BINARY, ["matthews", "accuracy"], 16, 20, 1e-5),
    "sst2": Task("SST-2", ["sentence", "label"], BINARY, ["accuracy"], 32, 10, 2e-5),
    "wnli": Task("WNLI", PAIR, BINARY, ["accuracy"], 8, 20, 1e-5)} # 1 is entailment, unlike rte's
HUB_TEXTS = {"mnli": ["premise", "hypothesis"], "mrpc": PAIR[:2]} # elsewhere named as in the raw files
PUBLISHED_GLUE = { # in the order of GLUE
    "BERT base": (86.7, 91.8, 69.3, 88.6, 89.6, 89.0, 56.3, 92.7, 53.5), # seeds' 92.7 on STS-B is a slip
    "6-layer BERT of the thesis (!)": (81.2, 88.0, 67.64, 85.0, 86.5, 81.0, 55.1, 91.4, 56.4),
    "S-SMKE text encoder (!)": (73.88, 78.71, 51.6, 79.9, 81.2, 57.5, 14.2, 83.5, 45.04),
    "CLIP": (33.5, 50.5, 55.2, 65.0, 53.9, 16.0, 25.4, 88.2)}
DROPOUT = 0.1 # of what the pooler gives, in training
GLUE_NOTE = """Chosen on dev, as published rows. F1 for MRPC and QQP, Spearman for STS-B, Matthews for CoLA,
else accuracy; -mm: MNLI mismatched. Score: mean of the row without WNLI and -mm; +WNLI: with WNLI.
(!) F1, Spearman and Matthews averaged over batches; MRPC on its test set. S-SMKE: under BERT's pooler."""


def correlation(x, y):
    """Pearson's, of two binary variables Matthews'; 0 where one is constant and it is not defined."""
    return np.corrcoef(x, y)[0, 1] if np.ptp(x) and np.ptp(y) else 0.0


def tied_ranks(x):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


METRICS = {
    "accuracy": lambda p, y: (p == y).mean(), "f1": lambda p, y: 2 * (p * y).sum() / max(1, (p + y).sum()),
    "spearman": lambda p, y: correlation(tied_ranks(p), tied_ranks(y)), "pearson": correlation,
    "matthews": correlation}


def glue_score(task, predictions, labels, metric=None):
    """A task's own metric of all examples at once, times 100: F1 of class 1 for mrpc and qqp, Spearman for
    stsb, Matthews for cola, else accuracy; 0 where undefined, as for constant predictions. metric: another.

    predictions, labels: (n,) class numbers, for stsb any. ValueError for another task, shape or value."""
    if task not in GLUE:
        raise ValueError(f"no GLUE task is called {task!r}{nearest(str(task), GLUE)}")
    (p, y), classes = (np.asarray(values, np.float64) for values in (predictions, labels)), GLUE[task].classes
    if p.ndim != 1 or p.shape != y.shape or not p.size:
        raise ValueError(f"needs a prediction for each label, not {p.shape} for {y.shape}")
    if not (np.isin([p, y], range(len(classes))) if classes else np.isfinite([p, y])).all():
        raise ValueError(f"{task} has predictions or labels that are no {'class' if classes else 'number'}")
    return 100 * float(METRICS[metric or GLUE[task].metrics[0]](p, y))


def glue_rows(path):
    """Yields the rows of a file as cells of text; first the names of its columns, but for raw CoLA."""
    if path.endswith(".parquet"):
        table = optional("pyarrow.parquet", "pyarrow").read_table(path)
        yield table.column_names
        yield from zip(*([str(x) for x in column.to_pylist()] for column in table.columns))
    else:
        with open(path, encoding="utf-8-sig", newline="\n") as f: # no quotes; only a newline ends a row
            yield from (line.rstrip("\r\n").split("\t") for line in f)


def read_glue(task, glue_dir):
    """The examples of each split, train first: split -> (tuples of one or two texts, labels (n,) int64, of
    stsb float32). What is missing or malformed ends the program with file and line."""
    title, columns, classes = GLUE[task][:3]
    splits = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    raw = [os.path.join(glue_dir, title, f"{split}.tsv") for split in splits]
    hub = [os.path.join(glue_dir, task, f"{split.replace('dev', 'validation')}-00000-of-00001.parquet")
           for split in splits]
    is_hub = not any(map(os.path.isfile, raw)) and any(map(os.path.isfile, hub))
    missing = [path for path in (hub if is_hub else raw) if not os.path.isfile(path)]
    if missing:
        fail(f"GLUE's {task}: no {', '.join(missing)}. Unpack the archives of gluebenchmark.com there, or "
             f"fetch all as parquet (pip install huggingface_hub pyarrow): "
             f"hf download nyu-mll/glue --repo-type=dataset --local-dir={glue_dir}")
    is_headless = task == "cola" and not is_hub
    if is_hub:
        columns = [*HUB_TEXTS.get(task, columns[:-1]), "label"]
        classes = classes and [str(i) for i in range(len(classes))]
    examples, is_score = {}, re.compile(r"[0-4](\.\d+)?|5(\.0+)?").fullmatch
    for split, path in zip(splits, hub if is_hub else raw):
        texts, labels, torn, n, rows = [], [], [], 0, glue_rows(path)
        try:
            names = ["source", "label", "star", "sentence"] if is_headless else next(rows, [])
            if not set(columns) <= set(names):
                fail(f"{path}: columns {', '.join(names)}, not with {', '.join(columns)}")
            for n, row in enumerate(rows, 1 if is_headless else 2):
                if len(row) < len(names) and task == "qqp": # by a newline within a question
                    torn.append(n)
                    continue
                if len(row) != len(names):
                    fail(f"{path} line {n}: {len(row)} columns instead of {len(names)}")
                *text, label = (row[names.index(column)] for column in columns)
                if not (label in classes if classes else is_score(label)):
                    fail(f"{path} line {n}: label {label[:40]!r}, not "
                         f"{' or '.join(classes or ['a score from 0 to 5'])}. Are its columns shifted?")
                texts.append(tuple(text))
                labels.append(classes.index(label) if classes else float(label))
        except (ValueError, OSError) as e: # no UTF-8, no parquet
            fail(f"{path} is damaged after line {n}: {e}")
        if not texts or len(torn) > 0.001 * n:
            fail(f"{path} holds {len(texts)} examples and {len(torn)} lines with too few columns {torn[:3]}")
        print(f"{path}: {len(texts):,} examples, {len(torn)} torn lines left out")
        examples[split] = texts, np.array(labels, np.int64 if classes else np.float32)
    return examples


def encode_examples(tokenizer, texts, max_length):
    """Tuples of one or two texts -> ids, padding_mask and segments (1 for a second text), (B, T) each. BERT:
    [CLS] a [SEP] b [SEP]; GPT-2's vocabulary, as RoBERTa: <s> a </s></s> b </s>. The longer is cut first."""
    if isinstance(tokenizer, GPT2Tokenizer):
        rows = []
        for sides in zip(*(tokenizer.ids(side, sys.maxsize) for side in zip(*texts))): # <s> .. </s> each
            while sum(map(len, sides)) > max_length:
                del max(reversed(sides), key=len)[-2]
            rows.append((sum(([2, *side[1:]] for side in sides[1:]), sides[0]), [0] * sum(map(len, sides))))
    else:
        tokenizer.tokenizer.enable_truncation(max_length) # longest first
        encodings = tokenizer.tokenizer.encode_batch([text if len(text) > 1 else text[0] for text in texts])
        rows = [(e.ids, e.type_ids) for e in encodings]
    ids, segments = (torch.nn.utils.rnn.pad_sequence([torch.tensor(row[k]) for row in rows], True, value)
                     for k, value in ((0, tokenizer.pad_id), (1, 0)))
    return ids, torch.arange(ids.shape[1]) >= torch.tensor([len(row[0]) for row in rows])[:, None], segments


def finetune_task(run, read, splits, encoder, autocast):
    """Trains a text encoder and a new head on one task -> what train_epochs returns."""
    args, device, (texts, labels) = run.args, run.device, splits["train"]
    classes, config, D = GLUE[args.task].classes, encoder.config, encoder.config["embed_dim"]
    torch.manual_seed(args.seed)
    head = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh(), torch.nn.Dropout(DROPOUT),
                               torch.nn.Linear(D, len(classes or "1")))
    init_weights(head, D)
    if config["pooler"]: # BERT's own
        head[0].load_state_dict({"weight": encoder.pooler_weight, "bias": encoder.pooler_bias})
    encoder.train().requires_grad_(True).to(device)
    head.to(device)
    groups = [{"params": [*encoder.parameters(), *head.parameters()], "peak_lr": args.lr,
               "weight_decay": args.weight_decay}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.98), 1e-6, fused=device.type in ("cuda", "cpu"))
    print(f"\n{args.task}: {args.batch_size} examples a step, peak lr {args.lr:g}, "
          f"{'pretrained' if config['pooler'] else 'new'} pooler")

    def logits_of(texts):
        encoded = encode_examples(encoder.tokenizer, texts, args.max_length)
        ids, mask, segments = (x.to(device, non_blocking=True) for x in encoded)
        with autocast:
            x = encoder(ids, mask, token_type_ids=segments if config["token_types"] > 1 else None) # (B, T, D)
        return head(x[:, 0].float()) # (B, C)

    @torch.no_grad()
    def measure():
        result = {}
        with evaluating(encoder), evaluating(head):
            for split, (held_out, truth) in [*splits.items()][1:]: # mnli: matched and mismatched
                out = torch.cat([logits_of(held_out[i:i + args.batch_size]).cpu()
                                 for i in range(0, len(held_out), args.batch_size)])
                found = out.argmax(1) if classes else out[:, 0]
                result |= {split.partition("_")[2] or metric: glue_score(args.task, found, truth, metric)
                           for metric in GLUE[args.task].metrics}
        return result

    def batches(step):
        for batch in batch_order(len(texts), args.batch_size, args.seed, step):
            index = [i for _, _, i in batch]
            yield [texts[i] for i in index], torch.from_numpy(labels[index]), torch.tensor([-1])

    def loss_of(batch, step):
        torch.manual_seed(args.seed << 32 | step) # dropout follows from seed and step, as the order does
        out, target = logits_of(batch[0]), batch[1].to(device)
        return F.cross_entropy(out, target) if classes else F.mse_loss(out[:, 0], target)

    return train_epochs(run, read, encoder, head, optimizer, batches, loss_of, measure,
                        tokenizer=encoder.tokenizer.text)


def glue_row(scores):
    """dict task -> score, "mismatched" among them -> a row of the table, with the means of eight tasks and of
    nine; None for what is missing."""
    nine = [*map(scores.get, GLUE)]
    means = [None if None in values else sum(values) / len(values) for values in (nine[:8], nine)]
    return [nine[0], scores.get("mismatched"), *nine[1:], *means]


def glue(args, device, dtype):
    """Finetunes a text encoder (of a multimodal checkpoint without what images share) on GLUE's tasks, each
    from the same weights (CLS token -> pooler, tanh, dropout -> linear), and prints the dev scores. The same
    command again skips finished tasks and continues an unfinished one."""
    # -- all that can be wrong, with any task, before the first is trained
    autocast = set_up(args)[-1]
    tasks = [*GLUE] if args.task == "all" else [args.task]
    splits = {task: read_glue(task, args.glue_dir) for task in tasks}
    encoder, name = one_encoder(args, "text"), args.text_encoder or args.ckpt
    if not hasattr(encoder, "tokenizer"):
        fail(f"{name} has no tokenizer: give a checkpoint of distill_text.py or distill_multimodal.py")
    if args.max_length > (positions := encoder.config["max_length"]):
        fail(f"--max_length={args.max_length}, but {name} has {positions} positions: give at most that")
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    read = {"the encoder": hash_of(encoder), "tokenizer": hash_of(encoder.tokenizer.text)}
    runs, reads = {}, {}
    for task in tasks:
        flags, N = type(args)(**vars(args)), len(splits[task]["train"][0])
        flags.task, flags.out_dir = task, os.path.join(args.out_dir, task)
        flags.glue_dir = flags.ckpt = flags.text_encoder = "" # what is read from there is hashed
        for k in ("batch_size", "epochs", "lr"):
            setattr(flags, k, getattr(GLUE[task] if getattr(args, k) is None else args, k))
        if flags.batch_size > N:
            fail(f"{task}: --batch_size={flags.batch_size}, but there are {N} training examples: too few")
        runs[task] = Run(flags, __file__, [], device, dtype, flags.epochs * (N // flags.batch_size))
        examples = repr([(texts, labels.tolist()) for texts, labels in splits[task].values()])
        reads[task] = read | {f"the examples of {task}": hash_of(examples)}
        if runs[task].kept:
            runs[task].compare(reads[task])

    # -- each in turn
    results = {}
    for task, run in runs.items():
        encoder.load_state_dict(start)
        results[task] = finetune_task(run, reads[task], splits[task], encoder, autocast)
        best = os.path.join(run.args.out_dir, "best.pt")
        if os.path.exists(best): # it takes the place of the last epoch: nothing is left to go on from
            whole = {**read_checkpoint(run.path), **read_checkpoint(best), "step": run.max_steps}
            for part in ("optimizer", "scaler"):
                whole.pop(part, None)
            save_atomic(run.path, lambda f: torch.save(whole, f))
            os.remove(best)

    scores = {task: next(iter(metrics.values())) for task, metrics in results.items()}
    row = glue_row(scores | {"mismatched": results.get("mnli", {}).get("mismatched")})
    published = {name: dict(zip(GLUE, values)) for name, values in PUBLISHED_GLUE.items()}
    mnli, *titles = [task.title for task in GLUE.values()]
    print(table(["Model", mnli, "-mm", *titles, "Score", "+WNLI"], {name: row},
                {name: glue_row(values) for name, values in published.items()}, 8))
    print(GLUE_NOTE)
    return {"ckpt": name, "split": "dev", "chosen_on": "dev", "seed": args.seed, "tasks": results,
            "score": row[-2], "score_with_wnli": row[-1], "published": published}


# -----------------------------------------------------------------------------
# a student to take home: a folder of safetensors with a card, and ONNX

EXPORTED = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "image.onnx", "text.onnx"]
CARD = """# {title}

Encoders of {towers}, {millions:.2f}M parameters. Pictures: short side to {size} px, bicubic, centre crop,
ImageNet's mean and deviation; texts: at most {max_length} tokens. Embeddings have length 1. Made with:

{facts}

{numbers}Licences of what it came from, which bind its use too:

{licences}

To use it, in a checkout of the code that made it, whose scripts also take `--ckpt={title}`:

```python
from evaluate import eval_image, load_checkpoint, normalize
model = load_checkpoint("{title}")
{lines}
```
"""
USE = { # modality -> lines of the card
    "image": 'images = normalize(eval_image(open("picture.jpg", "rb").read(), model.img_size)[None])\n'
             "print(model.encode_image(images)) # (1, D)",
    "text": 'ids, padding_mask = model.tokenizer.encode(["a red apple"], model.max_length)\n'
            "print(model.encode_text(ids, padding_mask)) # (1, D)"}


def tower_program(model, modality):
    """encode_image or encode_text as a program of torch.export that takes any batch size and any length of
    text, and three random inputs of it."""
    tower = torch.nn.Module() # whose weights are the model's
    tower.model = model
    tower.forward = getattr(model, f"encode_{modality}")
    batch = torch.export.Dim("batch")
    inputs = (torch.randn(3, 3, model.img_size, model.img_size),)
    shapes = ({0: batch},)
    if modality == "text":
        config = getattr(model, "text_encoder", model).config
        longest = model.max_length
        if config["attn_bias"] != "none": # a whole table is another program than a part of it
            longest = min(longest, config["max_length"] - 1)
        T = min(7, longest)
        inputs = (torch.randint(config["vocab_size"], (3, T)),
                  torch.arange(T).expand(3, T) >= torch.tensor([[T], [T - 1], [2]]))
        shapes = ({0: batch, 1: torch.export.Dim("length", max=longest)},) * 2
    return torch.export.export(tower, inputs, dynamic_shapes=shapes), inputs


def make_onnx(model, modality):
    """One tower as the bytes of an ONNX file: images (B, 3, H, W) float32, ImageNet-normalised, or ids (B, T)
    int64 and padding_mask (B, T) bool -> embeddings (B, D). Also returns the largest difference from torch,
    on random input of another batch size than the one it was traced with."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        runtime = optional(package, "onnx onnxscript onnxruntime")
    program, inputs = tower_program(model, modality)
    with warnings.catch_warnings(): # of torch.onnx about itself
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(program, inputs, dynamo=True, verbose=False, output_names=["features"],
                                 input_names=["images"] if modality == "image" else ["ids", "padding_mask"])
    data = onnx.model_proto.SerializeToString()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    inputs = [x[[0, 1, 2, 1, 0]] for x in inputs]
    found, = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
    return data, (getattr(model, f"encode_{modality}")(*inputs) - torch.from_numpy(found)).abs().max().item()


def read_json(*path):
    """What a JSON file holds, {} where it is not there or is none."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)
    return {}


def card(args, checkpoint, model):
    """The README of an export: what it is, data, teacher, the run's numbers, licences, how to use it."""
    settings = checkpoint.get("settings", {})
    sources = ["image_init", "text_init"] + (["teacher"] if settings.get("kd_loss") != "none" else [])
    facts = {k: settings.get(k) for k in ("preset", "data", *sources, "batch_size", "lr", "seed")}
    facts |= {k: checkpoint.get(k) for k in ("step", "best", "commit")}
    names = {str(facts[k]).partition(":")[0] for k in sources} # NAME or NAME:PATH
    licences = [f"- {k}, weights: {v['licence']}" for k, v in PRETRAINED.items() if k in names]
    licences += [f"- {k}, weights: as of what it was made from" for k in sorted(names) if k.endswith(".pt")]
    for name in filter(None, (facts["data"] or "").split(",")):
        meta = read_json(settings.get("data_dir", "data"), name, "meta.json")
        licences.append(f"- {name}, data: {meta.get('license', 'not noted')}. {meta.get('credit', '')}")
    result, numbers = read_json(os.path.dirname(args.ckpt), "retrieval.json"), "" # a loop's last act
    if "chance" in result:
        rows = retrieval_table({"this model": result["metrics"], "chance": result["chance"]})
        numbers = f"On {result['data']} {result['split']}, {result['images']} images:\n\n```\n{rows}\n```\n\n"
    return CARD.format(
        title=os.path.basename(os.path.abspath(args.to)), towers=" and ".join(towers(model)),
        size=model.img_size, max_length=model.max_length, numbers=numbers, licences="\n".join(licences),
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        facts="\n".join(f"- {k}: {v}" for k, v in facts.items() if v is not None),
        lines="\n".join(USE[modality] for modality in towers(model)))


def export(args, device, dtype):
    """Writes a student, or an encoder of one track, as a folder to keep and to pass on: config.json,
    model.safetensors, the tokenizer's file and a README."""
    if args.to is None:
        fail("--to=DIR: the folder to write")
    from safetensors.torch import save # here, not above: nothing else needs it
    model, checkpoint = load_checkpoint(args.ckpt), read_checkpoint(args.ckpt)
    there = {*os.listdir(args.to)} if os.path.isdir(args.to) else set()
    if there - {*EXPORTED}:
        fail(f"{args.to} holds {min(there - {*EXPORTED})}, which no export wrote: give another --to")
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    files = {"model.safetensors": save(weights, {"format": "pt"}),
             "README.md": card(args, checkpoint, model).encode()}
    if hasattr(model, "tokenizer"):
        files["tokenizer.json"] = model.tokenizer.text.encode()
    differences = {}
    for modality in towers(model) if args.onnx else []:
        files[f"{modality}.onnx"], differences[modality] = make_onnx(model, modality)
        print(f"{modality}.onnx differs from torch by at most {differences[modality]:.1e}, on random input")
    for name in sorted(there, key=EXPORTED.index): # config.json first, which comes last: it makes an export
        os.remove(os.path.join(args.to, name))
    for name, data in files.items():
        save_atomic(os.path.join(args.to, name), lambda f: f.write(data))
    config = {k: checkpoint[k] for k in ("format", "kind", "config")}
    write_json(os.path.join(args.to, "config.json"), config | {"tokenizer": "tokenizer.json" in files})
    print(f"wrote {args.to}: {', '.join(sorted(os.listdir(args.to)))}; read it with --ckpt={args.to}")
    return {"ckpt": args.ckpt, "to": args.to, "onnx": differences}


# -----------------------------------------------------------------------------
# a search over one's own pictures

PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>What the model finds</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><style>
body { font: 16px/1.4 system-ui, sans-serif; color: #1f2328; margin: auto; padding: 1em; max-width: 70em }
h2 { font-size: 1.2em; border-top: 1px solid #e3e6ea; padding-top: 1em }
div { display: grid; grid-template-columns: repeat(auto-fill, minmax(10em, 1fr)); gap: 1em }
figure { margin: 0; padding: .5em; border: 1px solid #e3e6ea; border-radius: 8px; overflow-wrap: anywhere }
img { width: 100%; height: 10em; object-fit: contain } figcaption, p { font-size: .8em; color: #6e7781 }
</style><h1>What the model finds</h1>
"""


class Files(list):
    """Paths of pictures, which reads as their bytes; none for a file that cannot be opened."""

    def __getitem__(self, i):
        return read_file(super().__getitem__(i))


def embed_folder(model, args, device, dtype):
    """Path -> embedding (D,), NaN where it cannot be read, of all pictures in the folder args.images. Those
    that neither their size nor their time says are new come from a file beside the checkpoint."""
    stamp = lambda path: [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    stamps = {path: stamp(path) for path in walk(args.images, PICTURES) if os.path.isfile(path)}
    if not stamps:
        fail(f"no pictures in {args.images}: no file there ends in {', '.join(PICTURES)}")
    weights = os.path.join(args.ckpt, "model.safetensors") if os.path.isdir(args.ckpt) else args.ckpt
    made_by = [stamp(weights), args.squash, str(dtype)]
    folder_hash = hash_of(os.fsencode(os.path.abspath(args.images)))[:8]
    cache_path = f"{os.path.normpath(args.ckpt)}.{folder_hash}.search"
    old_stamps, known = {}, {}
    with contextlib.suppress(Exception): # it is not there, or damaged: all pictures are new
        cache = torch.load(cache_path, weights_only=True)
        if cache["made_by"] == made_by:
            old_stamps = cache["stamps"]
            known = {path: x for path, x in zip(old_stamps, cache["emb"])
                     if stamps.get(path) == old_stamps[path]}
    todo = [path for path in stamps if path not in known]
    changed, removed = len(old_stamps.keys() & todo), len(old_stamps.keys() - stamps)
    print(f"{args.images}: {len(stamps):,} pictures, {len(todo) - changed:,} new, {changed:,} changed, "
          f"{removed:,} removed")

    def encode(batch):
        images, bad = (x.to(device) for x in batch)
        return model.encode_image(normalize(images)).masked_fill(bad[:, None] >= 0, math.nan)

    if todo:
        pictures = EvalImages(Files(todo), model.img_size, args.squash)
        known |= zip(todo, embed(model, encode, pictures, args.batch_size, device, dtype, args.num_workers))
    emb = {path: known[path] for path in stamps}
    if todo or removed:
        cache = {"made_by": made_by, "stamps": stamps, "emb": torch.stack([*emb.values()])}
        try:
            save_atomic(cache_path, lambda f: torch.save(cache, f))
        except OSError as e:
            print(f"{cache_path} cannot be written, so the next search embeds them again: {e.strerror}")
    return emb


def unknown_words(tokenizer, query):
    """The words of a query of which a WordPiece tokeniser knows no part; a byte-level one knows all."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return []
    unk = tokenizer.tokenizer.token_to_id("[UNK]")
    ids_of_words = tokenizer.ids(query.split(), 64) # [CLS] .. [SEP] each
    return [word for word, ids in zip(query.split(), ids_of_words) if set(ids[1:-1]) <= {unk}]


def write_page(path, results):
    """An HTML page with small copies of the pictures in it. results: query -> [(score, path), ..]."""
    page = [PAGE]
    for query, found in results.items():
        page.append(f"<h2>{html.escape(query)}</h2><div>")
        for score, name in found:
            file = io.BytesIO()
            small_picture(read_file(name), 256).save(file, "JPEG", quality=85)
            source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
            page.append(f'<figure><img alt="" src="{source}"><figcaption>{score:.3f} '
                        f"{html.escape(shown(name))}</figcaption></figure>")
        page.append("</div>")
    save_atomic(path, lambda f: f.write("\n".join(page).encode("utf-8", "replace")))


def search(args, device, dtype):
    """Finds pictures by what they show: embeds a folder once, and prints for each query the pictures whose
    embeddings are closest, with their cosines."""
    if not args.queries:
        fail('no query: add what to look for, such as "a red apple"')
    if args.images is None or not os.path.isdir(args.images):
        fail(f"--images={args.images}: give a folder of pictures")
    model = student(args).to(device)
    for query in args.queries:
        unknown = unknown_words(model.tokenizer, query)
        if len(unknown) == len(query.split()):
            fail(f"{query!r}: the tokeniser of {args.ckpt} knows no part of it. Ask in the language and "
                 f"script of the captions that the student has read.")
        if unknown:
            print(f"{query!r}: the tokeniser does not know {', '.join(unknown)}")
    emb = embed_folder(model, args, device, dtype)
    paths = [path for path in emb if emb[path].isfinite().all()]
    unreadable = [shown(path) for path in emb if not emb[path].isfinite().all()]
    if unreadable:
        print(f"{len(unreadable):,} cannot be read as a picture: {', '.join(unreadable[:5])}")
    if not paths:
        fail(f"none of the {len(emb):,} files in {args.images} can be read as a picture")
    text_emb = embed_texts(model, args.queries, args.batch_size, device, dtype)
    scores = text_emb @ torch.stack([emb[path] for path in paths]).T # (Q, N)
    best, results = scores.topk(min(args.top, len(paths)), dim=1), {}
    for query, values, places in zip(args.queries, best.values.tolist(), best.indices.tolist()):
        results[query] = [(value, paths[i]) for value, i in zip(values, places)]
        print(f"\n{query}", *(f"{value:8.3f}  {shown(path)}" for value, path in results[query]), sep="\n")
    if args.picture:
        rows = [(query, [(read_file(path), False) for _, path in found[:5]], f"{found[0][0]:.2f}")
                for query, found in results.items()]
        draw_sheet(args.picture, [(f"The best of {len(paths):,} pictures", rows)],
                   ["At the right the cosine of the first."])
    if args.html:
        write_page(args.html, results)
    named = {query: [{"file": shown(path), "score": value} for value, path in found]
             for query, found in results.items()}
    return {"ckpt": args.ckpt, "images": len(paths), "unreadable": unreadable, "results": named}


# -----------------------------------------------------------------------------
# curves of runs


def read_log(run):
    """A run's folder or log.jsonl -> its records, their numbers only; the settings of its last start; the key
    by which it chooses its best, which its validations name."""
    path = os.path.join(run, "log.jsonl") if os.path.isdir(run) else run
    if not os.path.isfile(path):
        fail(f"no log at {path}: --runs are folders of runs, as --out_dir named them, with commas between")
    records, settings, best, torn = [], {}, None, 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                record = json.loads(line)
                settings, best = record.get("settings", settings), record.get("best", best)
                records.append({k: v for k, v in record.items()
                                if isinstance(v, (int, float)) and abs(v) < math.inf})
            except (ValueError, AttributeError):
                torn += 1
    if torn:
        print(f"{path}: {torn} lines are torn and left out (the last one may just be written)")
    keys = {key for record in records for key in record if key.startswith("val_")}
    best = next((key for key in (best, "val_mean", "val_loss", *sorted(keys)) if key in keys), None)
    return records, settings, best


def draw_curves(arms, path, xlabel, ylabel):
    """A PNG. arms: label -> runs, each a list of (x, y): a line for each run and, where an arm has several, a
    thick one for their mean, all of one colour."""
    figure_class = optional("matplotlib.figure", "matplotlib").Figure
    ax = figure_class(figsize=(7, 4.6), dpi=110, layout="constrained").subplots()
    for n, (label, runs) in enumerate(arms.items()):
        lines = [np.array(points, dtype=float).T for points in runs] # (2, points) each
        x = min((x for x, _ in lines), key=lambda x: x[-1]) # as far as the shortest goes
        for line in lines:
            ax.plot(*line, color=f"C{n}", linewidth=0.8, alpha=0.6)
        mean = np.mean([np.interp(x, *line) for line in lines], axis=0)
        ax.plot(x, mean, ".-", color=f"C{n}", linewidth=2.5,
                label=f"{label}, {len(runs)} seeds" if len(runs) > 1 else label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    save_atomic(path, lambda f: ax.figure.savefig(f, format="png"))


def curves(args, device, dtype):
    """What runs have logged, over their steps or minutes: first, best and last values, and a picture. A run
    may still be going."""
    logs = {os.path.normpath(run): read_log(run) for run in args.runs.split(",") if run}
    key = args.key or next(filter(None, (key for *_, key in logs.values())), None)
    arms, result = {}, {}
    for run, (records, settings, _) in logs.items():
        last, max_steps = max([r.get("step", 0) for r in records], default=0), settings.get("max_steps", 0)
        if last < max_steps:
            print(f"{run}: at step {last:,} of {max_steps:,}, still going or stopped")
        points = [(r[args.over], r[key]) for r in records if key in r and args.over in r]
        if not points:
            there = sorted(set().union(*records) - {"step"})
            print(f"{run}: no {key} over {args.over}; it has {', '.join(there) or 'no numbers yet'}")
            continue
        x, y = (min if "loss" in key else max)(points, key=lambda point: point[1])
        print(f"{run}: {key} {y:.4g} at best ({args.over} {x:g}), from {points[0][1]:.4g} to "
              f"{points[-1][1]:.4g} ({args.over} {points[-1][0]:g})")
        arm = re.sub(rf"[-_.]?(seed)?{settings.get('seed', '')}$", "", run) or run
        arms.setdefault(arm, []).append(points)
        result[run] = {"points": points, "best": y}
    if not arms:
        fail(f"no run has {key} over {args.over}: see above what there is, and give --key")
    if args.picture:
        draw_curves(arms, args.picture, {"step": "steps", "minutes": "minutes of training"}[args.over], key)
    return {"key": key, "over": args.over, "runs": result}


# -----------------------------------------------------------------------------
# command line

KNOBS = { # what a flag means, and what Parser.knob takes besides; "glue task": where glue's is another
    "data": "name of the prepared pairs: DATA_DIR/NAME",
    "split": "which of its splits",
    "task": "name of the prepared images with labels, such as imagenet or cifar100: DATA_DIR/NAME",
    "data_dir": "folder of all prepared data sets",
    "classes": "file that names the classes, one a line, in the order of the labels",
    "images": "folder of pictures and folders; their embeddings are kept beside CKPT",
    "glue task": dict(help="one of the nine tasks, or all in turn", choices=["all", *GLUE]),
    "glue_dir": "folder of the tasks' folders, as of the archives (CoLA/train.tsv) or of the hub (cola/..)",
    "max_length": dict(help="tokens of a text or pair, special ones included; longer ones are cut", least=8),
    "ckpt": "checkpoint of a distill script, or folder of an export, with the encoders that are needed",
    "image_encoder": "instead of CKPT: one that never met TEXT_ENCODER, as wide; named as ENCODER of knn",
    "text_encoder": "instead of CKPT: data2vec2_text, bert or minilm, NAME:PATH or a checkpoint of your own",
    "encoder": "instead of CKPT: data2vec2_image or beitv2, NAME:PATH or a checkpoint of distill_image.py",
    "weights_dir": "published weights are looked for as WEIGHTS_DIR/NAME/<file>, and downloaded to there",
    "squash": "squash images to a square, as the thesis does, and do not crop",
    "linear_probe": "train the head alone; with --augment=none features are extracted once, in minutes",
    "augment": dict(help="none: training images as in evaluation; default: random crop, flip, RandAugment, "
                         "erasing, mixup and cutmix", choices=["default", "none"]),
    "smoothing": dict(help="share of each target that is spread evenly over all classes", most=1),
    "epochs": dict(help="passes over the training data", type=number(int, 1, math.inf)),
    "batch_size": dict(help="images or texts at a time: memory and speed", least=1),
    "finetune batch_size": dict(help="images per optimiser step", least=1),
    "glue batch_size": dict(help="examples per optimiser step", type=number(int, 1, math.inf)),
    "lr": dict(help="peak learning rate, used as it is: not scaled by the batch size",
               type=number(float, 0, math.inf)),
    "layer_decay": dict(help="the head learns at LR, each layer below at this share of the one above (eq. "
                             "40); 0: 0.75 for cifar10 and cifar100, else 0.81", most=1),
    "weight_decay": "AdamW, on matrices; not on biases, norms, positions, tokens",
    "glue weight_decay": "AdamW, on everything",
    "to": "folder to write; an older export there is replaced",
    "onnx": "add image.onnx and text.onnx, of any batch size (pip install onnx onnxscript onnxruntime)",
    "top": dict(help="pictures to show for a query", least=1),
    "html": "write a page that shows them, with small copies of the pictures in it",
    "runs": "folders of runs, with commas between; names that differ by the --seed at their end are one arm",
    "key": "any number in log.jsonl; None: what the first run chooses its best by",
    "over": dict(help="what is to the right: steps, or minutes of training", choices=["step", "minutes"]),
    "picture": "draw it, or some of it, as a PNG (curves: pip install matplotlib)",
    "num_workers": "processes that decode images; 0 decodes between the steps",
    "device": "cpu, cuda, cuda:1, mps; auto takes what is there",
    "dtype": dict(help="of autocast; auto: bfloat16 where the device is fast with it, else float16 on CUDA",
                  choices=["auto", "float32", "bfloat16", "float16"]),
    "json": "write the numbers to this file too"}
RUN = dict(batch_size=256, num_workers=0, device="auto", dtype="auto", json=None)
TOWERS = dict(ckpt="out/tiny/ckpt.pt", image_encoder=None, text_encoder=None, weights_dir=cache_folder(),
              squash=False, **RUN)
IMAGES = dict(task="cifar10", data_dir="data", ckpt="out/data2vec2/ckpt.pt", encoder=None)
COMMANDS = { # name -> its work, the defaults of its flags
    "retrieval": (retrieval, dict(data="openmoji", split="test", data_dir="data", picture=None, **TOWERS)),
    "zeroshot": (zeroshot, dict(task="imagenet", data_dir="data", classes=None, **TOWERS)),
    "knn": (knn, dict(**IMAGES, weights_dir=cache_folder(), **RUN)),
    "finetune": (finetune, dict(**IMAGES, linear_probe=False, augment="default", smoothing=0.1, epochs=15,
                                batch_size=256, lr=1e-3, layer_decay=0.0, weight_decay=0.01, json=None)),
    "glue": (glue, dict(task="all", glue_dir="data/glue", ckpt="out/bert/ckpt.pt", text_encoder=None,
                        max_length=256, epochs=None, batch_size=None, lr=None, weight_decay=0.1, json=None)),
    "export": (export, dict(ckpt="out/tiny/ckpt.pt", to=None, onnx=False, json=None)),
    "search": (search, dict(ckpt="out/tiny/ckpt.pt", images=None, top=5, picture=None, html=None,
                            squash=False, **RUN)),
    "curves": (curves, dict(runs="out/tiny", key=None, over="step", picture=None, json=None))}


def get_args(argv):
    """["retrieval", "--key=value", ..] -> Namespace of that subcommand's flags, its name as .command."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    if command not in COMMANDS:
        said = f"unknown subcommand {command!r}{nearest(command, COMMANDS)}" if command else "no subcommand"
        print(f"evaluate.py: error: {said}\nusage: python evaluate.py SUBCOMMAND [--key=value ..], "
              f"SUBCOMMAND one of: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    work, defaults = COMMANDS[command]
    parser = Parser(inspect.getdoc(work)) # without the indentation
    parser.prog = f"evaluate.py {command}"
    if command == "glue":
        parser.description += "\n\nWhere --batch_size, --epochs or --lr is None:" + "".join(
            f"\n{t:>6}{x.batch_size:>6} per step,{x.epochs:>3} epochs, lr {x.lr:g}" for t, x in GLUE.items())
    if command == "search":
        parser.add_argument("queries", nargs="*", help='texts in quotes: "a red apple" "a cat"')
    for key, default in defaults.items():
        words = KNOBS.get(f"{command} {key}", KNOBS.get(key))
        parser.knob(key, default, **({"help": words} if isinstance(words, str) else words))
    if command in ("finetune", "glue"): # GLUE's batches have many lengths, and each is compiled anew
        run_flags(parser, f"out/{command}", compiled="false" if command == "glue" else "auto")
    args = parser.parse(argv[1:])
    args.command = command
    return args


def main(argv=None):
    args = get_args(sys.argv[1:] if argv is None else argv)
    device = pick_device(args.device if "device" in args else "cpu") # some compute nothing
    dtype = pick_dtype(args.dtype if "dtype" in args else "float32", device)
    result = COMMANDS[args.command][0](args, device, dtype)
    for key in ("picture", "html"):
        if getattr(args, key, None):
            print(f"wrote {getattr(args, key)}")
    if args.json:
        write_json(args.json, result)
        print(f"wrote {args.json}")
    return result


if __name__ == "__main__":
    main()
