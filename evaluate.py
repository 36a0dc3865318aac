"""
Measure a checkpoint and print a table, export it, search by it, draw curves of runs. The metrics are pure
functions, which the training loops import too.

    python evaluate.py retrieval                           # out/tiny/ckpt.pt on the OpenMoji test set
    python evaluate.py retrieval --data=coco --ckpt=out/smke/ckpt.pt --json=coco.json --picture=found.png
    python evaluate.py zeroshot --task=imagenet            # CLIP's: the class whose prompts are closest
    python evaluate.py knn --task=cifar10                  # nearest neighbours of an image encoder's features
    python evaluate.py finetune --task=cifar10             # minutes with: --linear_probe --augment=none
    python evaluate.py glue --ckpt=out/bert/ckpt.pt        # the nine tasks of GLUE; run again, it goes on
    python evaluate.py export --to=student --onnx          # a folder to take home
    python evaluate.py search --images=photos "a red apple" --html=found.html
    python evaluate.py curves --runs=out/a,out/b --picture=curves.png

Shapes: N images, M captions, D embed_dim, C classes, Q queries, G gallery items.
"""
import argparse
import base64
import contextlib
import functools
import html
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import (PRETRAINED, GPT2Tokenizer, Parser, Run, batch_order, fail, hash_of, ignore_signals,
                   init_weights, load_checkpoint, load_encoder, nearest, number, optimizer_step, pick_device,
                   pick_dtype, ranks, read_checkpoint, run_flags, save_atomic, save_checkpoint, set_up,
                   use_compile, write_json)
from prepare_imagenet import Bad, Pairs, eval_image, normalize, read_file, shown, train_image, walk
from prepare_owt import load_text_encoder

# -----------------------------------------------------------------------------
# image-text retrieval: metrics


def checked(image_emb, text_emb, text_to_image):
    """Returns both embeddings as float32 unit vectors on the CPU, and text_to_image as an int64 tensor.
    Raises ValueError if the three do not belong together, or if an embedding is NaN or infinite."""
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
    """Returns the order in which equal scores rank, a fixed permutation: a collapsed model, whose scores are
    all equal, must not be right because the right answer happens to be stored first."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def best_ranks(queries, query_owner, gallery, gallery_owner, chunk=256):
    """Returns the rank (1 = best) of each query's best right answer, a gallery item of the same owner: (Q,)
    int64, G + 1 where the gallery has none. queries (Q, D), gallery (G, D): unit vectors; owners int64. Needs
    memory for chunk x G scores."""
    order = gallery_order(len(gallery)) # before the product: its rounding depends on the column
    gallery, gallery_owner = gallery[order], gallery_owner[order]
    position = torch.arange(len(gallery), device=gallery.device)
    result = []
    for q, owner in zip(queries.split(chunk), query_owner.split(chunk)):
        scores = q @ gallery.T # (chunk, G)
        right = owner[:, None] == gallery_owner # (chunk, G)
        best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True) # (chunk, 1)
        equal = scores == best
        first = (equal & right).int().argmax(1, keepdim=True) # argmax: the first of equal values
        result.append(1 + ((scores > best) | (equal & (position < first))).sum(1))
    return torch.cat(result)


def percent(hits):
    """Returns the share of True in a bool tensor, times 100."""
    return hits.double().mean().item() * 100


def mean(values):
    """Returns the mean, or None if a value is None."""
    return None if None in values else sum(values) / len(values)


def summary(i2t, t2i):
    """Makes the dict of retrieval_metrics from the three recalls of each way."""
    keys = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    return {**dict(zip(keys, [*i2t, *t2i])),
            "i2t_mean": mean(i2t), "t2i_mean": mean(t2i), "mean": mean([*i2t, *t2i])}


def retrieval_metrics(image_emb, text_emb, text_to_image):
    """Returns recall in percent: i2t_rK, the share of images with any own caption among the K = 1, 5, 10 of
    highest cosine; t2i_rK, of captions whose image is; i2t_mean, t2i_mean and, over all six, mean. image_emb
    (N, D), text_emb (M, D): any float dtype, normalised here; text_to_image (M,) integers. Equal scores get
    chance, not 100%: see gallery_order. ValueError as in checked."""
    images, texts, owner = checked(image_emb, text_emb, text_to_image)
    index = torch.arange(len(images))
    i2t, t2i = best_ranks(images, index, texts, owner), best_ranks(texts, owner, images, index)
    return summary(*[[percent(rank <= k) for k in (1, 5, 10)] for rank in (i2t, t2i)])


def median_rank(image_emb, text_emb):
    """Returns the median rank (1 = best) of the true partner, (i2t, t2i), for one-to-one pairs: (N, D) and
    (N, D), row i with row i. Chance is (N + 1) / 2. Ties and errors as in retrieval_metrics."""
    images, texts, index = checked(image_emb, text_emb, np.arange(len(image_emb)))
    both_ways = best_ranks(images, index, texts, index), best_ranks(texts, index, images, index)
    return tuple(float(np.median(ranks.numpy())) for ranks in both_ways)


def median_rank_chunks(image_emb, text_emb, text_to_image, chunk=1000):
    """Follows the protocol of SHRe's COCO numbers, (i2t, t2i): in pass c = 0 .. 4 (at most as many as an
    image has captions) each image is paired with its caption c, or c modulo their number, the images are cut
    into chunks of 1,000, without the rest, and the medians are averaged."""
    images, texts, owner = checked(image_emb, text_emb, text_to_image)
    chunk = min(chunk, len(images))
    counts = torch.bincount(owner) # captions of each image
    by_image = owner.argsort(stable=True)
    start = counts.cumsum(0) - counts # where each image's captions begin there
    medians = []
    for c in range(min(5, counts.max().item())):
        own = texts[by_image[start + c % counts]] # (N, D) each image's caption c
        for i in range(0, len(images) - chunk + 1, chunk):
            medians.append(median_rank(images[i:i + chunk], own[i:i + chunk]))
    return tuple(float(m) for m in np.mean(medians, axis=0))


def chance_row(text_to_image, num_images):
    """Returns what retrieval_metrics gives for random scores on average, exactly: an image with n of M
    captions has one in the top K with probability 1 - C(M-n, K) / C(M, K), a caption's image is there with K
    / N."""
    M = len(text_to_image)
    counts = np.bincount(np.asarray(text_to_image), minlength=num_images) # captions of each image
    i2t = []
    for k in 1, 5, 10:
        k = min(k, M)
        missed = sum(math.comb(M - n, k) for n in counts.tolist())
        i2t.append(100 - 100 * missed / math.comb(M, k) / num_images)
    return summary(i2t, [100 * min(k / num_images, 1.0) for k in (1, 5, 10)])


# -----------------------------------------------------------------------------
# from flags to models and data, from models to embeddings


def towers(model):
    """Returns the modalities that a model embeds, of "image" and "text"."""
    return [modality for modality in ("image", "text") if hasattr(model, f"encode_{modality}")]


def one_encoder(args, modality):
    """Returns the frozen Encoder that --ckpt, --image_encoder or --text_encoder gives, and its name. Of a
    multimodal checkpoint it is that tower alone, without what both share, as the thesis finetuned them."""
    name = getattr(args, f"{modality}_encoder")
    if name and "ckpt" in args.given:
        fail(f"--ckpt={args.ckpt} and {name} are each an encoder: give one of them")
    if name:
        return (load_encoder(name, "image", args.weights_dir) if modality == "image" else
                load_text_encoder(name, args.weights_dir)), name
    model = load_checkpoint(args.ckpt)
    encoder = getattr(model, f"{modality}_encoder", model)
    if encoder.config["modality"] != modality:
        fail(f"{args.ckpt} is an encoder for {encoder.config['modality']}, and {args.command} needs one for "
             f"{modality}: a checkpoint of distill_{modality}.py or distill_multimodal.py")
    if hasattr(model, "tokenizer"):
        encoder.tokenizer = model.tokenizer
    return encoder, args.ckpt


def two_towers(args, device):
    """Returns the model with encode_image and encode_text that the flags name, on device, and its name."""
    given = [getattr(args, f"{modality}_encoder", None) for modality in ("image", "text")]
    if given == [None, None]:
        model = load_checkpoint(args.ckpt)
        if towers(model) != ["image", "text"] or not hasattr(model, "tokenizer"):
            fail(f"{args.ckpt} does not embed both images and text: give one of distill_multimodal.py")
        return model.to(device), args.ckpt
    if None in given:
        fail("--image_encoder and --text_encoder go together")
    image, text = (one_encoder(args, modality)[0] for modality in ("image", "text"))
    if image.config["embed_dim"] != text.config["embed_dim"]:
        fail(f"{' and '.join(given)} differ in width: their embeddings cannot be compared")
    model = torch.nn.Module() # two that never met, as one: the baseline that says what alignment is worth
    model.image, model.text = image, text
    model.encode_image, model.img_size = image.encode, image.img_size
    model.encode_text, model.max_length, model.tokenizer = text.encode, text.max_length, text.tokenizer
    return model.to(device), " + ".join(given)


def labelled_splits(task, data_dir, names=("train", "val", "test")):
    """Returns the splits of a set, name -> Pairs: train, if it is among names, and val, test or both. Ends
    the program if one has no labels or train lacks a label."""
    folder = os.path.join(data_dir, task)
    found = [s for s in names if s == "train" or os.path.exists(os.path.join(folder, f"{s}_images.idx"))]
    splits = {s: Pairs(data_dir, task, s) for s in found or names}
    if [*splits] == ["train"]:
        fail(f"data set {task} has neither a val nor a test split: nothing to measure on")
    for s, pairs in splits.items():
        if pairs.labels is None:
            fail(f"data set {task} has no labels in its split {s} to compare with. Digits have them: python "
                 f"prepare_imagenet.py --data=digits")
        unknown = np.setdiff1d(pairs.labels, splits["train"].labels).tolist() if "train" in splits else []
        if unknown:
            fail(f"data set {task}: no training image has the labels {unknown[:3]} of its split {s}")
    return splits


@contextlib.contextmanager
def evaluating(model):
    """Puts the model into eval mode, and afterwards every part of it back into the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def embed(model, encode, items, batch_size, device, dtype, num_workers=0, collate=None):
    """Embeds every item once, in order: (n, D) float32 on the CPU. encode takes a batch, as collate makes it
    of items, and returns (B, D). The model, already on device, runs in eval mode under autocast to dtype."""
    loader = torch.utils.data.DataLoader(
        items, batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=ignore_signals,
        generator=torch.Generator()) # its own: a training loop's random numbers stay as they are
    batches = tqdm(loader, "embedding", leave=False, disable=len(loader) < 20 or not sys.stderr.isatty())
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    try:
        with evaluating(model), autocast:
            return torch.cat([encode(batch).float().cpu() for batch in batches])
    except RuntimeError as e:
        if not num_workers or "DataLoader worker" not in str(e):
            raise
    # a signal to the whole group ended the workers: the caller is to end in good order, so without them
    return embed(model, encode, items, batch_size, device, dtype, 0, collate)


@functools.cache # a loop evaluates again and again: it is said once
def warn_once(message):
    print(message, file=sys.stderr)


class EvalImages(torch.utils.data.Dataset):
    """Pictures, as bytes or paths, as evaluation sees them. Items are (3, H, W) uint8 and -1, or, where a
    picture cannot be read, grey and the picture's number."""

    def __init__(self, images, size, squash=False):
        self.images, self.size, self.squash = images, size, squash
        self.grey = set() # numbers of those that could not be read

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        data = self.images[i]
        try:
            return eval_image(read_file(data) if isinstance(data, str) else data, self.size, self.squash), -1
        except Bad:
            return torch.full((3, self.size, self.size), 128, dtype=torch.uint8), int(i)

    def images_of(self, batch):
        """Returns the images (B, 3, H, W) uint8 of collated items. Names the grey ones, and ends the program
        when they are more than ten and one in a hundred."""
        images, bad = batch
        for i in bad[bad >= 0].tolist():
            self.grey.add(i)
            warn_once(f"{getattr(self.images, 'path', 'data')}: picture {i} of {len(self)} cannot be read: "
                      f"grey in its place")
        if len(self.grey) > 10 + len(self) / 100:
            fail(f"{len(self.grey)} of {len(self)} pictures cannot be read: prepare the set again")
        return images

    def stack(self, numbers):
        """Returns the pictures of these numbers, in this order, (n, 3, H, W) uint8."""
        return self.images_of(torch.utils.data.default_collate([self[i] for i in numbers]))


def embed_images(model, encode, images, size, batch_size, device, dtype, squash=False, num_workers=0):
    """Embeds encoded pictures: (n, D) as embed returns it. encode: (B, 3, H, W), normalised -> (B, D)."""
    images = EvalImages(images, size, squash)
    return embed(model, lambda batch: encode(normalize(images.images_of(batch).to(device))), images,
                 batch_size, device, dtype, num_workers)


def embed_texts(model, texts, batch_size, device, dtype):
    """Embeds strings by the model's encode_text: (n, D) as embed returns it."""
    def encode(batch):
        ids, padding_mask = model.tokenizer.encode(batch, model.max_length) # (B, T) each
        return model.encode_text(ids.to(device), padding_mask.to(device))

    return embed(model, encode, texts, batch_size, device, dtype, collate=list)


def evaluate_retrieval(model, pairs, batch_size=256, device=torch.device("cpu"), dtype=torch.float32,
                       squash=False, num_workers=0):
    """Embeds each image and caption once. Returns retrieval_metrics, image_emb (N, D), text_emb (M, D)."""
    image_emb = embed_images(model, model.encode_image, pairs.images, model.img_size, batch_size, device,
                             dtype, squash, num_workers)
    text_emb = embed_texts(model, pairs.captions, batch_size, device, dtype)
    return retrieval_metrics(image_emb, text_emb, pairs.text_to_image), image_emb, text_emb


# -----------------------------------------------------------------------------
# image-text retrieval: tables and the picture

# Karpathy's test sets: images, captions (all there are, or the first five each; COCO has 10 more)
TEST_SETS = {"coco": [(5000, 25_010), (5000, 25_000)], "flickr30k": [(1000, 5000)]}
PUBLISHED = { # R@1, 5, 10 image -> text, then text -> image; on COCO, then on Flickr30K (!: by a wrong index)
    "data2vec 2.0, unaligned (!)": (0.02, 0.08, 0.19, 0.01, 0.1, 0.19, 0.02, 0.12, 0.18, 0.02, 0.06, 0.12),
    "MM-D2V2, data2vec2 (!)": (4.24, 12.12, 17.96, 1.77, 6.54, 10.91, 1.2, 4.88, 8.18, 0.54, 2.52, 4.58),
    "MM-D2V2, BEiTv2 (!)": (31.72, 56.78, 67.9, 12.42, 31.05, 42.5, 7.7, 26.18, 37.6, 4.08, 17.01, 24.26),
    "MM-D2V2 7_2 (!)": (32.78, 58.34, 69.3, 12.83, 31.85, 43.4, 8.08, 27.92, 38.6, 4.14, 17.5, 24.82),
    "SHRe_T, MLP": (37.06, 67.74, 79.7, 25.3, 54.73, 68.19, 49.9, 78.5, 88.5, 37.04, 67.34, 77.38),
    "SHRe_T, Transformer": (44.6, 75.3, 85.64, 31.69, 62.1, 74.48, 58.8, 85.6, 92.4, 43.92, 74.06, 82.8),
    "S-SMKE_CDL_MB": (53.54, 81.1, 89.52, 35.65, 66.0, 77.77, 70.9, 92.1, 96.0, 52.72, 80.2, 87.46),
    "CLIP L/14-336": (58.4, 81.5, 88.1, 37.8, 62.4, 72.2, 88.0, 98.7, 99.4, 68.7, 90.6, 95.2)}


def table(head, rows, published={}, column=16, above=""):
    """Returns the text of a table. head: over the names, then over each column of `column` characters; rows:
    name -> numbers, None where there is none; published: more of them, marked so; above: a line over the
    head."""
    rows = rows | {f"{name}, published": row for name, row in published.items()}
    width = max(map(len, [head[0], *rows]))
    lines = [f"{'':{width}}{above}"] if above else []
    lines.append(f"{head[0]:{width}}" + "".join(f"{word:>{column}}" for word in head[1:]))
    lines.append("-" * len(lines[-1]))
    for name, row in rows.items():
        cells = ["-" if x is None else f"{x:.2f}" for x in row]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


GREY, LINE, PALE, GREEN = "#6e7781", "#e3e6ea", "#f6f7f9", "#1a8f3c"
CELL = 96 # pixels of a result; to the next 14 more, to the next row 28


def thumbnail(images, i, side):
    """Returns the centre of picture i, as a model sees it, as a PIL image; grey if it cannot be read."""
    return Image.fromarray(EvalImages(images, side)[i][0].permute(1, 2, 0).numpy())


def draw_retrieval(pairs, image_emb, text_emb, path, rows=4):
    """Draws the five pictures found for some captions, and the reverse, into a PNG: right answers in green,
    and at the right the rank of the first of them."""
    images, texts, owner = checked(image_emb, text_emb, pairs.text_to_image)
    drawn = gallery_order(len(images)).repeat(2 * rows)[:2 * rows].tolist()
    captions = [owner.tolist().index(i) for i in drawn[:rows]] # the first of each picture
    canvas = Image.new("RGB", (844, 236 + 2 * rows * (CELL + 28)), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text, x, y, size, fill="#1f2328", width=796, max_lines=1, anchor="lm"):
        text = text.translate({0x2013: "-", 0x2014: "-", 0x2019: "'"}) # Pillow's own font lacks them
        font = ImageFont.load_default(size)
        for columns in range(120, 3, -1): # characters a line: the most that fit
            lines = textwrap.wrap(text, columns, max_lines=max_lines, placeholder="...")
            if all(font.getlength(line) <= width for line in lines):
                break
        align = "center" if anchor == "mm" else "left"
        draw.multiline_text((x, y), "\n".join(lines), fill, font, anchor, align=align)

    def show(items, i, x, y, is_right=False):
        frame = (GREEN, 3) if is_right else (LINE, 1)
        draw.rounded_rectangle((x - 4, y - 4, x + CELL + 3, y + CELL + 3), 8, PALE, *frame)
        if items is pairs.captions:
            write(items[i], x + CELL / 2, y + CELL / 2, 14, width=CELL - 6, max_lines=5, anchor="mm")
        else:
            canvas.paste(thumbnail(items, i, CELL), (x, y))

    write("What the model finds", 24, 34, 26)
    y = 62
    sides = {"picture": (images, pairs.images, torch.arange(len(images))),
             "caption": (texts, pairs.captions, owner)}
    for given, wanted, queries in ("caption", "picture", captions), ("picture", "caption", drawn[rows:]):
        query_emb, query_items, query_owner = sides[given]
        gallery_emb, gallery, gallery_owner = sides[wanted]
        draw.rectangle((0, y, 844, y + 42), PALE)
        write(f"{given.title()}s to {wanted}s: the best five of {len(gallery):,}", 24, y + 21, 20)
        y += 56
        order = gallery_order(len(gallery)) # ties as in best_ranks
        for q in queries:
            found = order[(gallery_emb[order] @ query_emb[q]).argsort(descending=True, stable=True)] # (G,)
            right = gallery_owner[found] == query_owner[q] # (G,)
            if given == "caption":
                write(query_items[q], 24, y + CELL / 2, 17, width=152, max_lines=4)
            else:
                show(query_items, q, 28, y)
            for k, j in enumerate(found[:5].tolist()):
                show(gallery, j, 196 + k * (CELL + 14), y, right[k])
            rank = right.int().argmax() + 1 # of the first that is right
            write(f"{rank:,}", 783, y + CELL / 2, 22, GREEN if rank == 1 else GREY, anchor="mm")
            y += CELL + 28
    credit, licence = (str(pairs.meta.get(key, "")) for key in ("credit", "license"))
    write("Green: right; at the right its rank. Queries drawn with seed 0, not picked.", 24, y + 12, 16, GREY)
    write(credit if licence in credit else f"{credit} {licence}", 24, y + 38, 16, GREY)
    small = canvas.quantize(64, dither=Image.Dither.NONE)
    save_atomic(path, lambda f: small.save(f, "PNG", optimize=True))


def retrieval(args, device, dtype):
    """Measures image-text retrieval: recall at 1, 5 and 10 both ways, and the median rank of the true
    partner. For the whole test sets of coco and flickr30k published rows are printed."""
    model, name = two_towers(args, device)
    pairs = Pairs(args.data_dir, args.data, args.split, needs_captions=True)
    N, M = len(pairs.images), len(pairs.captions)
    print(f"{args.data} {args.split}: {N:,} images, {M:,} captions, squash={args.squash}")
    metrics, image_emb, text_emb = evaluate_retrieval(
        model, pairs, args.batch_size, device, dtype, args.squash, args.num_workers)
    chance = chance_row(pairs.text_to_image, N)
    published = {}
    if args.split == "test" and (N, M) in TEST_SETS.get(args.data, []):
        first = 6 if args.data == "flickr30k" else 0
        published = {title: summary(row[first:first + 3], row[first + 3:first + 6])
                     for title, row in PUBLISHED.items()}
    keys = [f"{way}_{k}" for way in ("i2t", "t2i") for k in ("r1", "r5", "r10", "mean")] + ["mean"]
    in_order = lambda rows: {title: [row[k] for k in keys] for title, row in rows.items()}
    print(table(["Model", *["R@1", "R@5", "R@10", "mean"] * 2, "mean"],
                in_order({name: metrics, "chance": chance}), in_order(published), 7,
                f"{'Image -> Text':>28}{'Text -> Image':>28}{'both':>7}"))
    if published and args.data == "flickr30k":
        print("(!) scored by a wrong index: expect much higher numbers from the same model here")
    size = min(N, 1000)
    i2t, t2i = median_rank_chunks(image_emb, text_emb, pairs.text_to_image, size)
    print(f"median rank among {size:,}: image -> text {i2t:g}, text -> image {t2i:g} (1 = best, chance "
          f"{(size + 1) / 2:g})")
    if args.picture:
        draw_retrieval(pairs, image_emb, text_emb, args.picture)
    return {"ckpt": name, "images": N, "captions": M, "metrics": metrics, "chance": chance,
            "published": published, "median_rank": {"i2t": i2t, "t2i": t2i, "among": size}}


# -----------------------------------------------------------------------------
# classification without training: nearest neighbours; zero-shot, where classes are prompts


def image_features(encoder, pairs, batch_size, device, dtype, num_workers=0):
    """Embeds every image of a split by the mean of its patch tokens, as in the thesis: (N, D)."""
    return embed_images(encoder, lambda images: encoder(images)[:, 1:].float().mean(1), pairs.images,
                        encoder.config["img_size"], batch_size, device, dtype, num_workers=num_workers)


def knn_ranks(bank, bank_labels, queries, query_labels):
    """Returns the rank (Q,) int64 (1 = nearest) of each query's nearest bank item of its own label, len(bank)
    + 1 where there is none. Arguments as in knn_accuracy."""
    sides = []
    for name, emb, labels in ("queries", queries, query_labels), ("bank", bank, bank_labels):
        emb, labels = torch.as_tensor(emb).detach(), torch.as_tensor(labels)
        if emb.ndim != 2 or 0 in emb.shape or labels.shape != emb.shape[:1] or not emb.isfinite().all():
            raise ValueError(f"{name} must be (n, D) finite numbers with n labels, but are "
                             f"{tuple(emb.shape)} with {tuple(labels.shape)}")
        sides += [F.normalize(emb.float(), dim=1), labels.to(emb.device)]
    return best_ranks(*sides, chunk=max(1, 2 ** 25 // len(bank))) # 128 MiB of scores, whatever the bank


def knn_accuracy(bank, bank_labels, queries, query_labels, k):
    """Returns the share of queries, in percent, with their label among their k nearest neighbours in the
    bank: a hit if any of the k has it, no vote. bank (G, D), queries (Q, D): any float dtype, on one device,
    normalised here; labels (G,) and (Q,) integers. Equal cosines rank as in retrieval_metrics."""
    return percent(knn_ranks(bank, bank_labels, queries, query_labels) <= min(k, len(bank)))


def evaluate_knn(encoder, bank_pairs, query_pairs, batch_size=256, device=torch.device("cpu"),
                 dtype=torch.float32, num_workers=0):
    """Looks up the images of one labelled split in another. Returns top1 and top3 of the queries in the bank,
    and the other way round reverse_top1 and reverse_top3, in percent."""
    bank, queries = (image_features(encoder, pairs, batch_size, device, dtype, num_workers).to(device)
                     for pairs in (bank_pairs, query_pairs))
    forth = knn_ranks(bank, bank_pairs.labels, queries, query_pairs.labels)
    back = knn_ranks(queries, query_pairs.labels, bank, bank_pairs.labels)
    result = {f"top{k}": percent(forth <= min(k, len(bank))) for k in (1, 3)}
    return result | {f"reverse_top{k}": percent(back <= min(k, len(queries))) for k in (1, 3)}


def knn(args, device, dtype):
    """Looks for nearest neighbours of frozen image features: the share of images with their label among their
    1 and 3 nearest, held-out images searched in the training images and the other way round."""
    encoder, ckpt = one_encoder(args, "image")
    splits = labelled_splits(args.task, args.data_dir)
    train = splits["train"]
    name, held_out = splits.popitem() # the last: test if there is one
    print(f"{args.task}: {len(train.images):,} training images, {len(held_out.images):,} of {name}")
    metrics = evaluate_knn(encoder.to(device), train, held_out, args.batch_size, device, dtype,
                           args.num_workers)
    top = [*metrics.values()]
    print(table([ckpt, "top-1", "top-3"], {f"train -> {name}": top[:2], f"{name} -> train": top[2:]}))
    return {"ckpt": ckpt, "split": name, "images": len(held_out.images), "metrics": metrics}


PUBLISHED_ZERO_SHOT = { # top-1 on ImageNet's 50,000, CLIP's 80 prompts; SHRe's teacher has learned its labels
    "SHRe_T, MLP": 40.26, "SHRe_T, Transformer": 44.57, "S-SMKE_CDL_MB": 37.0,
    "S-SMKE_CDL_MB, no teacher": 25.8, "CLIP L/14-336": 76.2}


def class_names(task, classes, path):
    """Returns what prompts call the classes of a set, in the order of its labels, and who says so: path, with
    a name a line, CLIP or meta.json. Where folders were numbers, line n + 1 names folder n."""
    are_numbers = sorted(classes) == sorted(map(str, range(len(classes))))
    are_wordnet = all(re.fullmatch(r"n\d{8}", name) for name in classes)
    if path:
        try:
            with open(path, encoding="utf-8-sig") as f:
                names = [line.strip() for line in f if line.strip()]
        except (ValueError, OSError) as e: # no UTF-8, no file
            fail(f"--classes={path} cannot be read: {e}")
        if len(names) != len(classes or names):
            fail(f"--classes={path} holds {len(names):,} names, but {task} has {len(classes):,} classes")
        return [names[int(name)] for name in classes] if classes and are_numbers else names, path
    is_imagenet = task == "imagenet" or are_wordnet and classes == sorted(classes)
    if is_imagenet and len(classes) == 1000 and not are_numbers: # in the order of our labels
        import open_clip # here, not above: optional
        return open_clip.IMAGENET_CLASSNAMES, "CLIP"
    if are_wordnet or are_numbers and len(classes) == 1000: # or there are none
        fail(f"the classes of {task} are no words, at most ImageNet's numbers: name them with --classes=FILE")
    return [name.replace("_", " ") for name in classes], "meta.json"


@torch.no_grad()
def zero_shot_weights(encode_text, classnames, templates):
    """Returns an embedding of each class, (C, D) float32: the mean of its prompts' embeddings, normalised
    before and after. encode_text: list of n strings -> (n, D), any float dtype and length; templates: strings
    with {} for the name, or functions name -> prompt."""
    fill = [template if callable(template) else template.format for template in templates]
    emb = encode_text([prompt(name) for name in classnames for prompt in fill]) # (C * prompts, D)
    emb = F.normalize(emb.float(), dim=1).view(len(classnames), len(fill), -1)
    return F.normalize(emb.mean(1), dim=1) # (C, D)


def zeroshot(args, device, dtype):
    """Classifies zero-shot, as CLIP does: a picture's class is the one whose prompts, embedded and averaged,
    are closest to it. The prompts are CLIP's 80: pip install open_clip_torch. Measured on the split test, or
    val where there is none; for ImageNet's whole val published rows are printed."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES as templates # here, not above: optional
    split, pairs = labelled_splits(args.task, args.data_dir, ("val", "test")).popitem()
    names, named_by = class_names(args.task, pairs.meta.get("classes") or [], args.classes)
    N, C = len(pairs.images), len(names)
    if pairs.labels.min() < 0 or pairs.labels.max() >= C:
        fail(f"data set {args.task} has the label {pairs.labels.max()}, but {named_by} names {C} classes")
    model, name = two_towers(args, device)
    print(f"{args.task} {split}: {N:,} images, {C:,} classes named by {named_by}, {len(templates)} prompts "
          f"for each; squash={args.squash}")
    encode_text = lambda prompts: embed_texts(model, prompts, args.batch_size, device, dtype)
    weights = zero_shot_weights(encode_text, names, templates) # (C, D)
    image_emb = embed_images(model, model.encode_image, pairs.images, model.img_size, args.batch_size, device,
                             dtype, args.squash, args.num_workers) # (N, D)
    found = knn_ranks(weights, np.arange(C), image_emb, pairs.labels)
    metrics = {f"top{k}": percent(found <= k) for k in (1, 3, 5)}
    is_whole = (args.task, split, N, named_by) == ("imagenet", "val", 50_000, "CLIP")
    published = PUBLISHED_ZERO_SHOT if is_whole else {}
    print(table([args.task, "top-1", "top-3", "top-5"],
                {name: metrics.values(), "chance": [100 * min(k / C, 1) for k in (1, 3, 5)]},
                {title: (top1, None, None) for title, top1 in published.items()}))
    return {"ckpt": name, "split": split, "images": N, "num_classes": C, "named_by": named_by,
            "metrics": metrics, "published": published}


# -----------------------------------------------------------------------------
# training for some epochs, of which the best is kept: images (seeds' tables 3-5 and 8), GLUE (table 6)

WARMUP_SHARE = 0.1 # of the steps, in which the learning rate rises; then it falls to 0


def lr_share(step, warmup_steps, max_steps, linear=False):
    """Returns the learning rate over its peak: linear warm-up, then half a cosine or a line to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - done if linear else (1 + math.cos(math.pi * done)) / 2


def train_epochs(run, read, model, head, optimizer, batches, loss_of, measure, **extras):
    """Trains a new or an interrupted run. Returns the measures of the best epoch and, as "epoch", its number.
    OUT_DIR/best.pt holds that epoch's weights, ckpt.pt what a killed run goes on from.

    read, extras  hashes of what is read besides the flags; what else goes into both checkpoints
    optimizer     every group has a "peak_lr"
    batches       step -> iterator from that step on; a batch ends with numbers of unreadable pictures and -1
    loss_of       batch, step -> float32 scalar
    measure       () -> dict of percents, after each epoch; by the first of them epochs are compared"""
    args = run.args
    per_epoch = run.max_steps // args.epochs
    warmup_steps = round(WARMUP_SHARE * run.max_steps)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.settings["autocast"] == "torch.float16")
    parts = {"head": head, "optimizer": optimizer, "scaler": scaler}
    best = run.restore(read, model=model, **parts).get("best", {})
    step = run.step
    peak = max(group["peak_lr"] for group in optimizer.param_groups)
    print(f"{args.epochs} epochs of {per_epoch} steps, {warmup_steps} of warm-up")
    if use_compile(args.compile, run.device): # in place: the weights keep their names
        model.compile()
    for *batch, bad in run.batches(batches(step)):
        share = lr_share(step, warmup_steps, run.max_steps, args.command == "glue")
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        unreadable = run.name_unreadable(step, bad)
        loss = loss_of(batch, step)
        scaler.scale(loss).backward()
        run.add(loss=loss, norm=optimizer_step(optimizer, scaler, 0.0), unreadable=unreadable)
        step += 1

        if step % args.log_interval == 0 or step == run.max_steps:
            means, pace = run.means(step, "examples")
            words = f"loss {means['loss']:.4f}  norm {means['norm']:.2f}  lr {share * peak:.2e}  {pace}"
            run.log(step, f"step {step:>6}/{run.max_steps}  {words}", lr=share * peak, **means)
        if step % per_epoch == 0:
            with run.paused(step):
                result = measure()
            epoch = step // per_epoch
            first = next(iter(result))
            if not best or result[first] > best[first]:
                best = {**result, "epoch": epoch}
                save_checkpoint(os.path.join(args.out_dir, "best.pt"), model, head=head.state_dict(),
                                best=best, settings=run.settings, step=step, **extras)
            values = ", ".join(f"{k} {v:.2f}" for k, v in result.items())
            record = {"epoch": epoch, "best": f"val_{first}"} | {f"val_{k}": v for k, v in result.items()}
            run.log(step, f"epoch {epoch}/{args.epochs}: {values} (best in epoch {best['epoch']})", **record)
        if step % per_epoch == 0 or step % args.save_interval == 0:
            run.save(step, model, best=best, **parts, **extras)
    run.save(step, model, best=best, **parts, **extras)
    run.end(step)
    print(f"trained {step} steps in {run.minutes():.1f} min")
    return best


PUBLISHED_VISION = { # set, images measured on -> top-1 finetuned and of a linear probe
    ("imagenet", 50_000): {"DistilData2Vec2": (76.1, 71.1), "S-SMKE images": (75.5, 65.0),
                           "data2vec 2.0": (84.5, None), "BEiTv2": (85.0, 80.1)},
    ("cifar10", 10_000): {"DistilData2Vec2": (97.7, 93.2), "S-SMKE images": (97.6, 89.7),
                          "BEiTv2": (98.8, 94.4)},
    ("cifar100", 10_000): {"DistilData2Vec2": (87.2, 77.3), "S-SMKE images": (85.2, 71.3),
                           "BEiTv2": (91.1, 78.5)}}
SMOOTHING = 0.1 # share of each target that is spread evenly over all classes
MIX_SHARE = 0.9 # of the batches, half of them by mixup, half by cutmix


@functools.cache
def train_transform():
    """The thesis' transform of uint8 images to normalised ones, but for RandAugment: timm's m9-mstd0.5-inc1
    skips every second operation, varies the magnitude, posterizes to 1 bit, not 4, inverts and adds, too."""
    from torchvision.transforms import v2 # here, not above: a second, and the loops import this file
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR,
                       fill=[124, 116, 104]), # ImageNet's mean comes in at the edges
        v2.Lambda(lambda image: normalize(image[None])[0]),
        v2.RandomErasing(0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")]) # noise, spread as pixels are now


class LabelledImages(torch.utils.data.Dataset):
    """Training images. The index is (epoch, position, number), of which all randomness is a function. Items
    are a normalised image (3, H, W) float32, its class, and its number if it cannot be read, else -1."""

    def __init__(self, images, targets, size, args):
        self.images, self.targets, self.size, self.args = images, targets, size, args

    def __getitem__(self, index):
        epoch, position, i = index
        rng = np.random.default_rng((self.args.seed, epoch, position))
        try:
            if self.args.augment == "none":
                return normalize(eval_image(self.images[i], self.size)[None])[0], self.targets[i], -1
            image = train_image(self.images[i], self.size, 0.08, rng)
        except Bad:
            return torch.zeros(3, self.size, self.size), self.targets[i], i
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63))) # torchvision draws from it
        return train_transform()(image), self.targets[i], -1


def mix(images, targets, rng):
    """Mixes images (B, 3, H, W) with their neighbours, and so their targets (B, C), whose rows sum to 1: by
    mixup or, as often, by cutmix; one batch in ten stays as it is. Returns both."""
    if rng.random() >= MIX_SHARE:
        return images, targets
    from torchvision.transforms import v2 # here, not above: see train_transform
    mixer = v2.CutMix(alpha=1.0) if rng.random() < 0.5 else v2.MixUp(alpha=0.8) # as BEiT
    torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
    return mixer(images, targets)


def parameter_groups(encoder, head, args):
    """Returns AdamW's groups, one or two a layer, with "layer", "peak_lr" and "weight_decay". Eq. 40: layer l
    = 1 .. L, a block, learns at lr * decay^(L + 1 - l); all that stands before the blocks is layer 0, the
    head layer L + 1. No decay for biases, norms, positions, tokens. Frozen parameters are left out."""
    L = encoder.config["depth"]
    groups = {}
    # the thesis' code; 0.81, the root of data2vec 2.0's 0.65, elsewhere
    decay = args.layer_decay or (0.75 if args.task in ("cifar10", "cifar100") else 0.81)
    for name, p in [*encoder.named_parameters(), *head.named_parameters("head")]:
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        if name.startswith(("head.", "norm.", "relative_position")): # one table for all blocks: so in BEiT
            layer = L + 1
        decayed = p.ndim > 1 and not any(word in name for word in ("pos_embed", "token", "relative_position"))
        group = {"params": [], "layer": layer, "peak_lr": args.lr * decay ** (L + 1 - layer),
                 "weight_decay": args.weight_decay if decayed else 0.0}
        if p.requires_grad:
            groups.setdefault((layer, decayed), group)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def finetune(args, device, dtype):
    """Finetunes an image encoder with a linear classifier on top (mean of the patch tokens -> LayerNorm ->
    Linear), or trains the classifier alone, and measures how many held-out images it names right."""
    # -- data: the best epoch is chosen on val, and a test set, where there is one, is used once, at the end
    splits = labelled_splits(args.task, args.data_dir)
    train = splits["train"]
    val, test = [*splits][1], [*splits][-1] # names of splits, the same where there is but one
    classes = np.unique(train.labels)
    targets = {s: torch.from_numpy(np.searchsorted(classes, pairs.labels)) for s, pairs in splits.items()}
    N, C, B = len(train.images), len(classes), args.batch_size
    if B > N:
        fail(f"--batch_size={B}, but there are {N} training images: give at most that")

    # -- encoder, head, optimizer
    encoder, name = one_encoder(args, "image")
    read = {"the encoder": hash_of(encoder), "the data set": hash_of(train.images.offsets, train.labels)}
    run = Run(args, __file__, ["task", "ckpt", "image_encoder", "linear_probe"], device, dtype,
              args.epochs * (N // B))
    D = encoder.config["embed_dim"]
    head = torch.nn.Sequential(torch.nn.LayerNorm(D, eps=1e-6), torch.nn.Linear(D, C))
    torch.nn.init.trunc_normal_(head[1].weight, std=0.02)
    torch.nn.init.zeros_(head[1].bias)
    encoder, head = encoder.to(device), head.to(device)
    if not args.linear_probe:
        encoder.train().requires_grad_(True)
    groups = parameter_groups(encoder, head, args)
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.999), 1e-8, fused=device.type in ("cuda", "cpu"))
    counts = ", ".join(f"{len(pairs.images):,} {s}" for s, pairs in splits.items())
    rates = ", ".join(f"{lr:.1e}" for lr in sorted({group["peak_lr"] for group in groups}))
    print(f"{C:,} classes, images: {counts}; learning rates {rates}")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    features_of = lambda split: image_features(encoder, splits[split], B, device, dtype, args.num_workers)
    if args.linear_probe: # these never change
        features_of = functools.cache(features_of)
    is_cached = args.linear_probe and args.augment == "none" # nothing random stands before the head

    @torch.no_grad()
    def measure(split): # percent of its images whose class is the first, and among the first five
        logits = head(features_of(split).to(device)) # (N, C)
        right = logits.topk(min(5, C)).indices.cpu() == targets[split][:, None]
        return {"top1": percent(right[:, 0]), "top5": percent(right.any(1))}

    def batches(step): # images (B, 3, H, W) or features (B, D), classes (B,), numbers of unreadable ones
        order = batch_order(N, B, args.seed, step)
        if is_cached:
            numbers = (torch.tensor(batch)[:, 2] for batch in order)
            return ((features_of("train")[i], targets["train"][i], torch.tensor([-1])) for i in numbers)
        images = LabelledImages(train.images, targets["train"], encoder.config["img_size"], args)
        return torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=args.num_workers,
                                           worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")

    def loss_of(batch, step):
        x = batch[0].to(device, non_blocking=True)
        target = F.one_hot(batch[1].to(device, non_blocking=True), C).float() # (B, C)
        if args.augment == "default":
            x, target = mix(x, target, np.random.default_rng((args.seed, step, 0, 1)))
        with autocast:
            pooled = x if is_cached else encoder(x)[:, 1:].float().mean(1) # (B, D)
        # a mean over the batch; the thesis' code divides by C as well
        return F.cross_entropy(head(pooled), target, label_smoothing=SMOOTHING)

    best = train_epochs(run, read, encoder, head, optimizer, batches, loss_of, lambda: measure(val),
                        classes=classes.tolist())
    best_path = os.path.join(args.out_dir, "best.pt")
    metrics = {k: best[k] for k in ("top1", "top5")}
    if test != val:
        checkpoint = read_checkpoint(best_path)
        encoder.load_state_dict(checkpoint["model"])
        head.load_state_dict(checkpoint["head"])
        metrics = measure(test)
    published = PUBLISHED_VISION.get((args.task, len(splits[test].images)), {})
    row = (None, metrics["top1"]) if args.linear_probe else (metrics["top1"], None)
    print(table([args.task, "Finetune", "Linear Probe"], {name: row}, published))
    print(f"{test}: top-1 {metrics['top1']:.2f}, top-5 {metrics['top5']:.2f} after epoch {best['epoch']} of "
          f"{args.epochs}, the best on {val}; wrote {best_path}")
    return {"ckpt": name, "split": test, "images": len(splits[test].images), "num_classes": C,
            "epoch": best["epoch"], "chosen_on": val, "metrics": metrics, "published": published}


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
    "CLIP": (33.5, 50.5, 55.2, 65.0, 53.9, 16.0, 25.4, 88.2, None)}
GLUE_NOTE = """Chosen on dev. F1 for MRPC and QQP, Spearman for STS-B, Matthews for CoLA, else accuracy.
Score: mean without WNLI and -mm (mismatched). (!) Averaged over batches, MRPC on its test set."""


def glue_score(task, predictions, labels, metric=None):
    """Returns a task's own metric of all examples at once, times 100: F1 of class 1 for mrpc and qqp,
    Spearman for stsb, Matthews for cola, else accuracy; 0 where undefined, as for constant predictions.
    metric: another than its own. predictions, labels: (n,) class numbers, for stsb any. Raises ValueError for
    another task, shape or value."""
    if task not in GLUE:
        raise ValueError(f"no GLUE task is called {task!r}{nearest(str(task), GLUE)}")
    classes = GLUE[task].classes
    metric = metric or GLUE[task].metrics[0]
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if p.ndim != 1 or p.shape != y.shape or not p.size:
        raise ValueError(f"needs a prediction for each label, not {p.shape} for {y.shape}")
    if not (np.isin([p, y], range(len(classes))) if classes else np.isfinite([p, y])).all():
        raise ValueError(f"{task} has predictions or labels that are no {'class' if classes else 'number'}")
    if metric == "accuracy":
        return 100 * float((p == y).mean())
    if metric == "f1":
        return 100 * float(2 * (p * y).sum() / max(1, (p + y).sum()))
    if metric == "spearman": # Pearson's of the ranks, equal values sharing the mean of theirs
        unique = [np.unique(x, return_inverse=True, return_counts=True)[1:] for x in (p, y)]
        p, y = ((counts.cumsum() - (counts - 1) / 2)[inverse] for inverse, counts in unique)
    # Pearson's, of two binary variables Matthews'; not defined where one is constant
    return 100 * float(np.corrcoef(p, y)[0, 1]) if np.ptp(p) and np.ptp(y) else 0.0


def read_rows(path):
    """Yields the rows of a tab-separated or parquet file as cells of text, its columns' names first."""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet # here, not above: optional
            contents = parquet.read_table(path)
            yield contents.column_names
            yield from zip(*([str(x) for x in column.to_pylist()] for column in contents.columns))
        else:
            with open(path, encoding="utf-8-sig", newline="\n") as f: # no quotes; only a newline ends a row
                yield from (line.rstrip("\r\n").split("\t") for line in f)
    except (ValueError, OSError) as e: # no UTF-8, no parquet
        fail(f"{path} cannot be read: {e}")


def read_glue(task, glue_dir):
    """Reads split -> (tuples of one or two texts, labels (n,) int64, of stsb float32), train first. What is
    missing or malformed ends the program with file and line."""
    title, columns, classes = GLUE[task][:3]
    splits = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    paths = [os.path.join(glue_dir, title, f"{split}.tsv") for split in splits]
    hub = [os.path.join(glue_dir, task, f"{split.replace('dev', 'validation')}-00000-of-00001.parquet")
           for split in splits]
    is_hub = not any(map(os.path.isfile, paths)) and any(map(os.path.isfile, hub))
    if is_hub:
        paths, columns = hub, [*HUB_TEXTS.get(task, columns[:-1]), "label"]
        classes = classes and [str(i) for i in range(len(classes))]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        fail(f"GLUE's {task}: no {', '.join(missing)}. Unpack the archives of gluebenchmark.com there, or "
             f"fetch all as parquet (pip install huggingface_hub pyarrow): "
             f"hf download nyu-mll/glue --repo-type=dataset --local-dir={glue_dir}")
    examples, is_score = {}, re.compile(r"[0-4](\.\d+)?|5(\.0+)?").fullmatch
    for split, path in zip(splits, paths):
        texts, labels, torn = [], [], []
        rows, is_headless = read_rows(path), task == "cola" and not is_hub
        header = ["source", "label", "star", "sentence"] if is_headless else next(rows, [])
        if not set(columns) <= set(header):
            fail(f"{path}: columns {', '.join(header)}, not with {', '.join(columns)}")
        for n, row in enumerate(rows, 1 if is_headless else 2):
            if len(row) != len(header): # some of qqp, by a newline within a question
                torn.append(n)
                continue
            *text, label = (row[header.index(column)] for column in columns)
            if not (label in classes if classes else is_score(label)):
                fail(f"{path} line {n}: label {label[:40]!r}, not "
                     f"{' or '.join(classes or ['a score from 0 to 5'])}. Are its columns shifted?")
            texts.append(tuple(text))
            labels.append(classes.index(label) if classes else float(label))
        if torn:
            print(f"{path}: {len(torn)} lines without {len(header)} columns are left out: {torn[:3]}")
        if not texts or len(torn) > 0.001 * len(texts):
            fail(f"{path} is damaged: {len(texts):,} examples are whole")
        print(f"{path}: {len(texts):,} examples")
        examples[split] = texts, np.array(labels, np.int64 if classes else np.float32)
    return examples


def encode_examples(tokenizer, texts, max_length):
    """Encodes tuples of one or two texts: ids, padding_mask and segments (1 for a second text), (B, T) each.
    BERT: [CLS] a [SEP] b [SEP]; GPT-2's, as RoBERTa: <s> a </s></s> b </s>. The longer is cut first."""
    if isinstance(tokenizer, GPT2Tokenizer):
        rows = []
        for sides in zip(*(tokenizer.ids(side, sys.maxsize) for side in zip(*texts))): # <s> .. </s> each
            while sum(map(len, sides)) > max_length:
                del max(reversed(sides), key=len)[-2]
            rows.append(sides[0] + [i for side in sides[1:] for i in (2, *side[1:])])
        segments = [[0] * len(row) for row in rows]
    else:
        tokenizer.tokenizer.enable_truncation(max_length) # longest first
        encodings = tokenizer.tokenizer.encode_batch([text if len(text) > 1 else text[0] for text in texts])
        rows = [encoding.ids for encoding in encodings]
        segments = [encoding.type_ids for encoding in encodings]
    T = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (T - len(row)) for row in rows]) # (B, T)
    segments = torch.tensor([row + [0] * (T - len(row)) for row in segments]) # (B, T)
    return ids, torch.arange(T) >= torch.tensor([[len(row)] for row in rows]), segments


def finetune_task(run, read, splits, encoder, dtype):
    """Trains a text encoder and a new head on one task. Returns what train_epochs does."""
    args, device, config = run.args, run.device, encoder.config
    texts, labels = splits["train"]
    classes, D = GLUE[args.task].classes, config["embed_dim"]
    torch.manual_seed(args.seed)
    head = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh(), torch.nn.Dropout(0.1),
                               torch.nn.Linear(D, len(classes or "1")))
    init_weights(head, D)
    if config["pooler"]: # BERT's own
        head[0].load_state_dict({"weight": encoder.pooler_weight, "bias": encoder.pooler_bias})
    encoder.train().requires_grad_(True).to(device)
    head.to(device)
    group = {"params": [*encoder.parameters(), *head.parameters()], "peak_lr": args.lr}
    optimizer = torch.optim.AdamW([group], args.lr, (0.9, 0.98), 1e-6, args.weight_decay,
                                  fused=device.type in ("cuda", "cpu"))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"\n{args.task}: {args.batch_size} examples a step, peak lr {args.lr:g}")

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
            for split in [*splits][1:]: # of mnli matched and mismatched
                held_out, truth = splits[split]
                starts = range(0, len(held_out), args.batch_size)
                out = torch.cat([logits_of(held_out[i:i + args.batch_size]).cpu() for i in starts])
                found = out.argmax(1) if classes else out[:, 0]
                for metric in GLUE[args.task].metrics:
                    result[split.partition("_")[2] or metric] = glue_score(args.task, found, truth, metric)
        return result

    def batches(step):
        for batch in batch_order(len(texts), args.batch_size, args.seed, step):
            numbers = [i for _, _, i in batch]
            yield [texts[i] for i in numbers], torch.from_numpy(labels[numbers]), torch.tensor([-1])

    def loss_of(batch, step):
        torch.manual_seed(args.seed << 32 | step) # dropout follows from seed and step, as the order does
        out, target = logits_of(batch[0]), batch[1].to(device, non_blocking=True)
        return F.cross_entropy(out, target) if classes else F.mse_loss(out[:, 0], target)

    return train_epochs(run, read, encoder, head, optimizer, batches, loss_of, measure,
                        tokenizer=encoder.tokenizer.text)


def glue_row(scores):
    """Makes a row of the table from task -> score; last come the means of eight and of all nine tasks."""
    nine = [scores.get(task) for task in GLUE]
    return [nine[0], scores.get("mismatched"), *nine[1:], mean(nine[:8]), mean(nine)]


def glue(args, device, dtype):
    """Finetunes a text encoder on GLUE's tasks, each from the same weights (CLS token -> pooler, tanh,
    dropout -> linear), and prints the dev scores. The same command again skips finished tasks. Where
    --batch_size, --epochs or --lr is None, it is the thesis' for each task: see GLUE in this script."""
    # -- flags and examples of all tasks, before the first is trained
    chosen = ["batch_size", "epochs", "lr"]
    tasks = {}
    for task in GLUE if args.task == "all" else [args.task]:
        own = {key: getattr(GLUE[task], key) for key in chosen if getattr(args, key) is None}
        own |= dict(task=task, out_dir=os.path.join(args.out_dir, task))
        own |= dict(glue_dir="", ckpt="", text_encoder="") # what is read from there is hashed
        flags = argparse.Namespace(**vars(args) | own)
        flags.resume = args.resume and os.path.exists(os.path.join(flags.out_dir, "ckpt.pt"))
        splits = read_glue(task, args.glue_dir)
        N = len(splits["train"][0])
        if flags.batch_size > N:
            fail(f"{task}: --batch_size={flags.batch_size}, but there are {N} training examples: too few")
        tasks[task] = flags, splits, flags.epochs * (N // flags.batch_size)
    encoder, name = one_encoder(args, "text")
    if not hasattr(encoder, "tokenizer"):
        fail(f"{name} has no tokenizer: give a checkpoint of distill_text.py or distill_multimodal.py")
    if args.max_length > encoder.config["max_length"]:
        fail(f"--max_length={args.max_length}, but {name} has {encoder.config['max_length']} positions")
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    hashes = {"the encoder": hash_of(encoder), "tokenizer": hash_of(encoder.tokenizer.text)}

    # -- the tasks
    results = {}
    for task, (flags, splits, max_steps) in tasks.items():
        run = Run(flags, __file__, [*chosen, "seed", "max_length", "weight_decay"], device, dtype, max_steps)
        examples = repr([(texts, labels.tolist()) for texts, labels in splits.values()])
        read = hashes | {f"the examples of {task}": hash_of(examples)}
        if run.checkpoint and "optimizer" not in run.checkpoint: # best.pt took its place, so the task is done
            run.compare(read)
            results[task] = run.checkpoint["best"]
            print(f"{task} is finished: {run.path}")
            continue
        encoder.load_state_dict(start)
        results[task] = finetune_task(run, read, splits, encoder, dtype)
        best_path = os.path.join(flags.out_dir, "best.pt")
        if os.path.exists(best_path):
            os.replace(best_path, run.path)

    # -- the table
    scores = {task: next(iter(metrics.values())) for task, metrics in results.items()}
    row = glue_row(scores | {"mismatched": results.get("mnli", {}).get("mismatched")})
    published = {title: dict(zip(GLUE, values)) for title, values in PUBLISHED_GLUE.items()}
    mnli, *titles = [task.title for task in GLUE.values()]
    print(table(["Model", mnli, "-mm", *titles, "Score", "+WNLI"], {name: row},
                {title: glue_row(values) for title, values in published.items()}, 8))
    print(GLUE_NOTE)
    return {"ckpt": name, "split": "dev", "chosen_on": "dev", "tasks": results, "score": row[-2],
            "score_with_wnli": row[-1], "published": published}


# -----------------------------------------------------------------------------
# a student to take home, a search over one's own pictures, and curves of runs

EXPORTED = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "image.onnx", "text.onnx"]
CARD = """# {title}

{facts}

Embeddings have length 1. In a checkout of the code that made it, whose scripts also take `--ckpt={title}`:

```python
from evaluate import eval_image, load_checkpoint, normalize
model = load_checkpoint("{title}")
{lines}
```
"""
USE = { # modality -> lines of the card
    "image": '# short side to {size} px, bicubic, centre crop, ImageNet\'s mean and deviation\n'
             'images = normalize(eval_image(open("picture.jpg", "rb").read(), {size})[None])\n'
             "print(model.encode_image(images)) # (1, D)",
    "text": 'print(model.encode_text(*model.tokenizer.encode(["a red apple"], model.max_length))) # (1, D)'}


def make_onnx(model, modality):
    """Returns one tower, for any batch size and length, as the bytes of an ONNX file, and the largest
    difference of its features (B, D) from torch's, on random input of another batch size than in tracing."""
    import onnxruntime # here, not above: optional
    import onnxscript # noqa: torch.onnx imports it, and says less if it is not there
    encode = getattr(model, f"encode_{modality}")
    batch = torch.export.Dim("batch")
    if modality == "image":
        inputs = {"images": torch.randn(3, 3, model.img_size, model.img_size)}
        shapes = ({0: batch},)
    else:
        config = getattr(model, "text_encoder", model).config
        longest = model.max_length
        if config["attn_bias"] != "none": # a whole table is another program than a part of it
            longest = min(longest, config["max_length"] - 1)
        T = min(7, longest)
        inputs = {"ids": torch.randint(config["vocab_size"], (3, T)),
                  "padding_mask": torch.arange(T).expand(3, T) >= torch.tensor([[T], [T - 1], [2]])}
        shapes = ({0: batch, 1: torch.export.Dim("length", max=longest)},) * 2
    tower = torch.nn.Module() # whose weights are the model's
    tower.model, tower.forward = model, encode
    with warnings.catch_warnings(): # of torch.onnx about itself
        warnings.simplefilter("ignore")
        program = torch.export.export(tower, (*inputs.values(),), dynamic_shapes=shapes)
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[*inputs],
                                 output_names=["features"])
    data = onnx.model_proto.SerializeToString()
    inputs = {name: x[[0, 1, 2, 1, 0]] for name, x in inputs.items()}
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found, = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return data, (encode(*inputs.values()) - torch.from_numpy(found)).abs().max().item()


def facts_of(checkpoint, data_dir):
    """Returns what the card of an export says: of what the model was made, the run's numbers, licences."""
    settings = checkpoint.get("settings", {})
    facts = settings | {k: checkpoint[k] for k in ("step", "best", "commit") if k in checkpoint}
    sources = ["image_init", "text_init", "image_encoder"]
    if settings.get("kd_loss") != "none" or settings.get("image_init") == "teacher":
        sources.append("teacher")
    for source in sources:
        name = str(settings.get(source)).partition(":")[0] # NAME or NAME:PATH
        if name in PRETRAINED:
            facts[f"licence of {name}, which binds this too"] = PRETRAINED[name]["licence"]
    for name in filter(None, settings.get("data", "").split(",")):
        path = os.path.join(data_dir, name, "meta.json")
        meta = {"license": f"not found, there is no {path}"}
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
            meta = json.load(f)
        facts[f"licence of {name}, which binds this too"] = f"{meta.get('license')}. {meta.get('credit', '')}"
    return {k: str(v) for k, v in facts.items()} # JSON has no infinity, as the best loss before a validation


def export(args, device, dtype):
    """Writes a student, or an encoder of one track, as a folder: config, safetensors, tokenizer, README."""
    from safetensors.torch import save # here, not above: nothing else needs it
    if args.to is None:
        fail("--to=DIR: the folder to write")
    if os.path.realpath(args.to) == os.path.realpath(args.ckpt):
        fail(f"--to={args.to} is what --ckpt reads, and would be replaced: give another folder")
    model, checkpoint = load_checkpoint(args.ckpt), read_checkpoint(args.ckpt)
    before = {*os.listdir(args.to)} if os.path.isdir(args.to) else set()
    foreign = before - {*EXPORTED}
    if foreign:
        fail(f"{args.to} holds {min(foreign)}, which no export wrote: give another --to")
    facts = checkpoint.get("facts") or facts_of(checkpoint, args.data_dir) # of an export they come along
    readme = CARD.format(title=os.path.basename(os.path.abspath(args.to)),
                         facts="\n".join(f"- {k}: {v}" for k, v in facts.items()),
                         lines="\n".join(USE[m].format(size=model.img_size) for m in towers(model)))
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    files = {"model.safetensors": save(weights, {"format": "pt"}), "README.md": readme.encode()}
    if hasattr(model, "tokenizer"):
        files["tokenizer.json"] = model.tokenizer.text.encode()
    differences = {}
    for modality in towers(model) if args.onnx else []:
        files[f"{modality}.onnx"], differences[modality] = make_onnx(model, modality)
        print(f"{modality}.onnx differs from torch by at most {differences[modality]:.1e}, on random input")
    config = {k: checkpoint[k] for k in ("format", "kind", "config")} | {"facts": facts}
    config["tokenizer"] = "tokenizer.json" in files
    files["config.json"] = json.dumps(config, indent=1).encode() # goes first, comes last: it makes an export
    for name in sorted(before, key=EXPORTED.index):
        os.remove(os.path.join(args.to, name))
    for name, data in files.items():
        save_atomic(os.path.join(args.to, name), lambda f: f.write(data))
    print(f"wrote {args.to}: {', '.join(files)}; read it with --ckpt={args.to}")
    return {"onnx": differences}


PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>What the model finds</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><style>
body { font: 16px/1.4 system-ui; margin: auto; padding: 1em; max-width: 70em; overflow-wrap: anywhere }
div { display: grid; grid-template-columns: repeat(auto-fill, minmax(10em, 1fr)); gap: 1em }
figure { margin: 0; color: #6e7781 } img { width: 100%; border-radius: 8px }
</style><h1>What the model finds</h1>"""
FIGURE = '<figure><img alt="" src="data:image/jpeg;base64,{}"><figcaption>{:.3f} {}</figcaption></figure>'

SEARCH_CHUNK = 2048 # pictures between two writes of the cache, at least: what a killed search loses


def embed_folder(model, args, device, dtype):
    """Returns the paths of the pictures in the folder args.images, and their embeddings (N, D), NaN where one
    cannot be read. Those whose size and time have not changed come from a file beside the checkpoint."""
    stamp = lambda path: [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    stamps = {path: stamp(path) for path in walk(args.images, PICTURES) if os.path.isfile(path)}
    if not stamps:
        fail(f"no pictures in {args.images}: no file there ends in {', '.join(PICTURES)}")
    weights = os.path.join(args.ckpt, "model.safetensors") if os.path.isdir(args.ckpt) else args.ckpt
    made_by = [stamp(weights), args.squash, str(dtype)]
    folder_hash = hash_of(os.fsencode(os.path.abspath(args.images)))[:8]
    cache_path = f"{os.path.normpath(args.ckpt)}.{folder_hash}.search"
    known = {}
    with contextlib.suppress(Exception): # it is not there, or damaged: all pictures are new
        cache = torch.load(cache_path, weights_only=True)
        if cache["made_by"] == made_by:
            known = {path: x for path, x in zip(cache["stamps"], cache["emb"])
                     if stamps.get(path) == cache["stamps"][path]}
    todo = [path for path in stamps if path not in known]
    print(f"{args.images}: {len(stamps):,} pictures, {len(todo):,} of them new or changed")

    def encode(batch):
        images, bad = (x.to(device) for x in batch)
        return model.encode_image(normalize(images)).masked_fill(bad[:, None] >= 0, math.nan)

    while todo:
        # more where there are many, since each time all are written: nine times the cache in sum, at most
        chunk = max(SEARCH_CHUNK, len(known) // 8)
        paths, todo = todo[:chunk], todo[chunk:]
        pictures = EvalImages(paths, model.img_size, args.squash)
        known |= zip(paths, embed(model, encode, pictures, args.batch_size, device, dtype, args.num_workers))
        cache = {"made_by": made_by, "stamps": {path: stamps[path] for path in known},
                 "emb": torch.stack([*known.values()])}
        if os.access(os.path.dirname(cache_path) or ".", os.W_OK):
            save_atomic(cache_path, lambda f: torch.save(cache, f))
    return [*stamps], torch.stack([known[path] for path in stamps])


def search(args, device, dtype):
    """Finds pictures of a folder by what they show: for each query those whose embeddings are closest."""
    if not args.queries:
        fail('no query: add what to look for, such as "a red apple"')
    if args.images is None or not os.path.isdir(args.images):
        fail(f"--images={args.images}: give a folder of pictures")
    model, _ = two_towers(args, device)
    tokenizer = model.tokenizer
    unk = 3 if isinstance(tokenizer, GPT2Tokenizer) else tokenizer.tokenizer.token_to_id("[UNK]")
    for query in args.queries:
        ids, = tokenizer.ids([query], 64)
        if {*ids[1:-1]} <= {unk}: # or no words at all
            fail(f"{query!r}: the tokeniser of {args.ckpt} knows no part of it: ask as its captions spell")
    paths, emb = embed_folder(model, args, device, dtype)
    is_read = emb.isfinite().all(1) # (N,)
    unreadable = [shown(path) for path, ok in zip(paths, is_read) if not ok]
    if unreadable:
        print(f"{len(unreadable):,} cannot be read as a picture: {', '.join(unreadable[:5])}")
    scores = embed_texts(model, args.queries, args.batch_size, device, dtype) @ emb.T # (Q, N)
    scores = scores.masked_fill(~is_read, -math.inf)
    results, page = {}, [PAGE]
    num_shown = min(args.top, len(paths) - len(unreadable))
    for query, row in zip(args.queries, scores):
        print(f"\n{query}")
        page.append(f"<h2>{html.escape(query)}</h2><div>")
        results[query] = []
        for i in row.argsort(descending=True)[:num_shown].tolist():
            name, score = shown(paths[i]), row[i].item()
            print(f"{score:8.3f}  {name}")
            results[query].append({"file": name, "score": score})
            if args.html:
                jpeg = io.BytesIO()
                thumbnail(paths, i, 256).save(jpeg, "JPEG", quality=85)
                source = base64.b64encode(jpeg.getvalue()).decode()
                page.append(FIGURE.format(source, score, html.escape(name)))
        page.append("</div>")
    if args.html:
        save_atomic(args.html, lambda f: f.write("\n".join(page).encode("utf-8", "replace")))
    return {"images": len(paths) - len(unreadable), "unreadable": unreadable, "results": results}


def read_log(run):
    """Reads a run's folder or log.jsonl. Returns its records and the settings of its last start, of both the
    numbers only, and the key by which it chooses its best, None where no validation was logged."""
    path = os.path.join(run, "log.jsonl") if os.path.isdir(run) else run
    if not os.path.isfile(path):
        fail(f"no log at {path}: --runs are folders of runs, as --out_dir named them, with commas between")
    numbers = lambda record: {k: v for k, v in record.items()
                              if isinstance(v, (int, float)) and abs(v) < math.inf}
    records, settings, key = [], {}, None
    with open(path, encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                settings = numbers(record.get("settings", settings))
                records.append(numbers(record))
                key = record["best"] if isinstance(record.get("best"), str) else key
            except (ValueError, AttributeError, RecursionError): # the last may just be written
                print(f"{path} line {n} is torn, and left out")
    return records, settings, key


def draw_curves(arms, path, xlabel, ylabel):
    """Draws into a PNG a line for each run, the runs of an arm in one colour. arms: label -> its runs, each a
    list of (x, y)."""
    from matplotlib.figure import Figure # here, not above: optional
    ax = Figure((8, 4.2), 110, layout="constrained").subplots()
    for n, (label, runs) in enumerate(arms.items()):
        for points in runs:
            line, = ax.plot(*zip(*points), ".-", color=f"C{n}", linewidth=1.5, alpha=0.8)
        line.set_label(label if len(runs) == 1 else f"{label}, {len(runs)} seeds")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1)) # beside the lines, not over them
    save_atomic(path, lambda f: ax.figure.savefig(f, format="png"))


def curves(args, device, dtype):
    """Prints what runs have logged, first, best and last values, and draws it. A run may still be going."""
    runs = [os.path.normpath(os.path.expanduser(run)) for run in args.runs.split(",") if run]
    logs = {run: read_log(run) for run in runs}
    keys = [args.key, *(best_key for _, _, best_key in logs.values()), "loss"]
    key = next(filter(None, keys))
    arms, result = {}, {}
    for run, (records, settings, _) in logs.items():
        last = max([record.get("step", 0) for record in records], default=0)
        if last < settings.get("max_steps", 0):
            print(f"{run}: at step {last:,} of {settings['max_steps']:,}, still going or stopped")
        points = [(record[args.over], record[key]) for record in records if {args.over, key} <= {*record}]
        if not points:
            logged = sorted(set().union(*records) - {"step"})
            print(f"{run}: no {key} over {args.over}; it has {', '.join(logged) or 'no numbers yet'}")
            continue
        is_loss = re.search("loss|kd_|align", key)
        x, y = (min if is_loss else max)(points, key=lambda point: point[1])
        print(f"{run}: {key} {y:.4g} at best ({args.over} {x:g}), from {points[0][1]:.4g} to "
              f"{points[-1][1]:.4g} ({args.over} {points[-1][0]:g})")
        arm = re.sub(rf"[-_.]?(seed)?{settings.get('seed', '')}$", "", run) or run
        arms.setdefault(arm, []).append(points)
        result[run] = {"points": points, "best": y}
    if not arms:
        fail(f"no run has {key} over {args.over}: see above what there is, and give --key")
    if args.picture:
        draw_curves(arms, args.picture, args.over, key)
    return {"key": key, "runs": result}


# -----------------------------------------------------------------------------
# command line

FLAGS = { # flag, or subcommand and flag -> its default, its meaning, what Parser.knob takes besides, if any
    "data": ("openmoji", "name of the prepared pairs: DATA_DIR/NAME"),
    "split": ("test", "which of its splits"),
    "task": ("cifar10", "name of the prepared images with labels, such as imagenet or digits: DATA_DIR/NAME"),
    "glue task": ("all", "one of the nine tasks, or all in turn", dict(choices=["all", *GLUE])),
    "data_dir": ("data", "folder of all prepared data sets"),
    "glue_dir": ("data/glue", "folder of the tasks' folders: CoLA/train.tsv.. or, as on the hub, cola/.."),
    "classes": (None, "file that names the classes, one a line, in the order of the labels"),
    "images": (None, "folder of pictures and folders; their embeddings are kept beside CKPT"),
    "ckpt": ("out/tiny/ckpt.pt", "checkpoint of a distill script, or folder of an export"),
    "image_encoder": (None, "instead of CKPT: data2vec2_image, beitv2, dino .., NAME:PATH or a checkpoint"),
    "text_encoder": (None, "instead of CKPT: data2vec2_text, bert or minilm, NAME:PATH or your checkpoint"),
    "squash": (False, "squash images to a square, as the thesis does, and do not crop"),
    "linear_probe": (False, "train the head alone; with --augment=none features are extracted once"),
    "augment": ("default", "of training images: as the thesis, or none", dict(choices=["default", "none"])),
    "max_length": (256, "tokens of a text or pair, with special ones; longer are cut", dict(least=8)),
    "epochs": (15, "passes over the training data", dict(type=number(int, 1, math.inf))),
    "batch_size": (256, "examples at a time, in training in a step", dict(type=number(int, 1, math.inf))),
    "lr": (1e-3, "peak learning rate, used as it is", dict(type=number(float, 0, math.inf))),
    "layer_decay": (0.0, "the head learns at LR, each layer below at this share of the one above (eq. 40); "
                    "0: 0.75 for cifar10 and cifar100, else 0.81", dict(most=1)),
    "weight_decay": (0.01, "AdamW, on matrices; not on biases, norms, positions, tokens"),
    "glue weight_decay": (0.1, "AdamW, on everything"),
    "to": (None, "folder to write; an older export there is replaced"),
    "onnx": (False, "add image.onnx and text.onnx (pip install onnx onnxscript onnxruntime)"),
    "top": (5, "pictures to show for a query", dict(least=1)),
    "html": (None, "write a page that shows them, with small copies of the pictures in it"),
    "runs": ("out/tiny", "folders of runs, with commas; those that differ by a seed at the end are one arm"),
    "key": (None, "any number in log.jsonl; None: what a run chooses its best by, or else the loss"),
    "over": ("step", "what is to the right: steps or minutes", dict(choices=["step", "minutes"])),
    "picture": (None, "draw it, or some of it, as a PNG (curves: pip install matplotlib)"),
    "json": (None, "write the numbers to this file too")}
BOTH = "ckpt image_encoder text_encoder weights_dir squash" # what embeds images and text
RUN = "batch_size num_workers device dtype"
COMMANDS = { # name -> its function, its flags, defaults that are others than in FLAGS
    "retrieval": (retrieval, f"data split data_dir picture {BOTH} {RUN}", {}),
    "zeroshot": (zeroshot, f"task data_dir classes {BOTH} {RUN}", dict(task="imagenet")),
    "knn": (knn, f"task data_dir ckpt image_encoder weights_dir {RUN}", dict(ckpt="out/data2vec2/ckpt.pt")),
    "finetune": (finetune, "task data_dir ckpt image_encoder linear_probe augment epochs batch_size lr "
                 "layer_decay weight_decay", dict(ckpt="out/data2vec2/ckpt.pt")),
    "glue": (glue, "task glue_dir ckpt text_encoder max_length epochs batch_size lr weight_decay",
             dict(ckpt="out/bert/ckpt.pt", epochs=None, batch_size=None, lr=None)),
    "export": (export, "ckpt data_dir to onnx", {}),
    "search": (search, f"ckpt images top html squash {RUN}", {}),
    "curves": (curves, "runs key over picture", {})}


def get_args(argv):
    """Parses ["retrieval", "--key=value", ..] to a Namespace of that subcommand's flags, its name as
    .command."""
    first = argparse.ArgumentParser("evaluate.py", "%(prog)s COMMAND [--key=value ..]", __doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    first.add_argument("command", choices=COMMANDS)
    command = first.parse_args(argv[:1]).command
    function, names, defaults = COMMANDS[command]
    parser = Parser(inspect.getdoc(function)) # without the indentation
    parser.prog = f"evaluate.py {command}"
    loops = Parser("")
    run_flags(loops, "")
    flags = dict(FLAGS) # and those that mean here what they mean in the loops: device, dtype ..
    for action in loops._actions:
        flags[action.dest] = (action.default, action.help, dict(choices=action.choices))
    if command == "search":
        parser.add_argument("queries", nargs="*", help='texts in quotes: "a red apple" "a cat"')
    for name in [*names.split(), "json"]:
        default, meaning, *limits = flags.get(f"{command} {name}", flags[name])
        parser.knob(name, defaults.get(name, default), meaning, **dict(*limits))
    if command in ("finetune", "glue"): # GLUE's batches have many lengths, and each is compiled anew
        run_flags(parser, f"out/{command}", compiled="false" if command == "glue" else "auto")
    args = parser.parse(argv[1:])
    args.command = command
    return args


def check_outputs(args):
    """Ends the program, before anything is measured, if a file that is to be written cannot be."""
    for path in (getattr(args, key, None) for key in ("json", "picture", "html")):
        if path and os.path.isdir(path):
            fail(f"cannot write {path}: it is a folder")
        if path:
            save_atomic(f"{path}.tmp", lambda f: None) # ends the program, and says why
            os.remove(f"{path}.tmp")


def main(argv=None):
    args = get_args(sys.argv[1:] if argv is None else argv)
    check_outputs(args)
    if "out_dir" in args: # it trains
        if ranks()[1] > 1:
            fail(f"{args.command} runs in one process: start it with python, not with torchrun")
        device, dtype, _, _ = set_up(args)
    else:
        device = pick_device(getattr(args, "device", "cpu")) # some compute nothing
        dtype = pick_dtype(getattr(args, "dtype", "float32"), device)
    try:
        result = COMMANDS[args.command][0](args, device, dtype)
    except ModuleNotFoundError as e: # what few need, requirements.txt does not bring
        fail(f"{e.name} is not installed: pip install {e.name.replace('open_clip', 'open_clip_torch')}")
    result = {k: v for k, v in vars(args).items() if k not in ("given", "json")} | result
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
