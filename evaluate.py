"""
Measure a checkpoint and print a table. The metrics are pure functions, which the training loops import too.

    python evaluate.py retrieval                           # out/tiny/ckpt.pt on the OpenMoji test set
    python evaluate.py retrieval --ckpt=out/mine/ckpt.pt --data=coco --json=coco.json
    python evaluate.py retrieval --picture=retrieval.png   # what it finds, drawn as a grid
    python evaluate.py zeroshot --task=imagenet            # CLIP's: the class whose prompts are closest
    python evaluate.py knn --task=cifar10                  # nearest neighbours of an image encoder's features
    python evaluate.py finetune --task=cifar10             # 15 epochs of finetuning
    python evaluate.py finetune --task=cifar10 --linear_probe --augment=none  # minutes: features are
                                                                                extracted once
    python evaluate.py glue --ckpt=out/bert/ckpt.pt        # the nine tasks of GLUE; run again, it goes on
    python evaluate.py glue --task=cola --text_encoder=bert
    python evaluate.py finetune --help

Shapes: N images, M captions, D embed_dim, C classes, Q queries, G gallery items, K the length of a result
list.
"""
import contextlib
import functools
import hashlib
import importlib.resources
import inspect
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import (GPT2Tokenizer, Parser, Stop, continuing, fail, finite_rows, git_sha, ignore_signals,
                   init_weights, load_checkpoint, load_encoder, load_optimizer, load_weights, log_record,
                   nearest, normalize, number, open_log, open_run, peak_memory, pick_device, pick_dtype,
                   print_settings, read_checkpoint, save_atomic, save_checkpoint, use_compile, write_json)
from prepare_pairs import Bad, Pairs, crop_box, decode, eval_image, or_bad, to_tensor

# -----------------------------------------------------------------------------
# image-text retrieval: metrics


def checked(image_emb, text_emb, text_to_image):
    """Embeddings as float32 unit vectors on the CPU, text_to_image as an int64 tensor. ValueError if the
    three do not belong together, or if an embedding is NaN or infinite."""
    normed = []
    for name, emb in ("image_emb", image_emb), ("text_emb", text_emb):
        emb = torch.as_tensor(emb).detach().cpu()
        if emb.ndim != 2 or 0 in emb.shape:
            raise ValueError(f"{name} must be (n, D) with n, D > 0, but is {tuple(emb.shape)}")
        if not emb.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
        # in float64 no norm overflows or vanishes, whatever the scale; a zero vector stays zero
        normed.append(F.normalize(emb.double(), dim=1, eps=1e-300).float())
    images, texts = normed
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"image_emb has {images.shape[1]} dimensions, text_emb {texts.shape[1]}")
    owner = np.asarray(text_to_image.cpu() if torch.is_tensor(text_to_image) else text_to_image)
    if owner.shape != (len(texts),) or owner.dtype.kind not in "iu":
        raise ValueError(f"text_to_image must be {len(texts)} integers, but is {owner.shape} {owner.dtype}")
    if owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"text_to_image holds {owner.min()} .. {owner.max()}, for {len(images)} images")
    lonely = np.setdiff1d(np.arange(len(images)), owner)
    if len(lonely):
        raise ValueError(f"{len(lonely)} images have no caption, the first is image {lonely[0]}")
    return images, texts, torch.from_numpy(owner.astype(np.int64))


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
    """Recall at 1, 5 and 10 both ways, in percent, python floats.

    i2t_rK: share of images with any own caption among the K captions of highest cosine, out of all M.
    t2i_rK: share of captions whose image is among the K images of highest cosine, out of all N.
    i2t_mean, t2i_mean: over the three K; mean: over all six numbers, the thesis' average.

    image_emb (N, D), text_emb (M, D): any float dtype, normalised here, compared in float32. text_to_image:
    (M,) integers, numpy or torch. Ties are broken by a fixed permutation of the gallery: equal scores get
    chance, not 100%. ValueError if shapes disagree, an index is out of range, an image has no caption, or a
    value is NaN.
    """
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
    """The protocol of SHRe's COCO numbers, (i2t, t2i): in pass c = 0..4 each image is paired with its caption
    c, the images are cut into chunks of 1,000, and the medians are averaged over chunks and passes.

    An image with fewer captions starts over (c modulo their number); there are no more passes than the image
    with most captions has. A rest smaller than a chunk is left out, since the median grows with the gallery;
    fewer images than one chunk are one chunk. Arguments as in retrieval_metrics."""
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
    """What retrieval_metrics gives on average for random scores, exactly: an image with n of the M captions
    has one in the top K with probability 1 - C(M-n, K) / C(M, K); a caption's image is there with K / N."""
    M, counts = len(text_to_image), np.bincount(np.asarray(text_to_image), minlength=num_images)
    miss = lambda n, k: math.comb(M - n, min(k, M)) / math.comb(M, min(k, M))
    sizes = Counter(counts.tolist()).items() # (n, number of images with n captions)
    i2t = [100 - 100 * sum(images * miss(n, k) for n, images in sizes) / num_images for k in (1, 5, 10)]
    return summary(i2t, [100 * min(k / num_images, 1.0) for k in (1, 5, 10)])


# -----------------------------------------------------------------------------
# image-text retrieval: from a model to a table

TEST_IMAGES = {"coco": 5000, "flickr30k": 1000} # Karpathy's splits, five captions an image, COCO 10 more
TEST_CAPTIONS = {"coco": (25_010, 25_000), "flickr30k": (5_000,)} # all there are, or the first five each
PUBLISHED = { # R@1, 5, 10 image -> text, then text -> image; on COCO, then on Flickr30K
    "data2vec 2.0, unaligned": (0.02, 0.08, 0.19, 0.01, 0.1, 0.19, 0.02, 0.12, 0.18, 0.02, 0.06, 0.12),
    "MM-D2V2, data2vec2 teacher": (4.24, 12.12, 17.96, 1.77, 6.54, 10.91, 1.2, 4.88, 8.18, 0.54, 2.52, 4.58),
    "MM-D2V2, BEiTv2 teacher": (31.72, 56.78, 67.9, 12.42, 31.05, 42.5, 7.7, 26.18, 37.6, 4.08, 17.01, 24.26),
    "MM-D2V2 7": (30.24, 56.48, 67.46, 11.96, 30.48, 41.88, 7.36, 26.42, 36.6, 3.7, 16.58, 23.84),
    "MM-D2V2 7_2": (32.78, 58.34, 69.3, 12.83, 31.85, 43.4, 8.08, 27.92, 38.6, 4.14, 17.5, 24.82),
    "SHRe_T, MLP": (37.06, 67.74, 79.7, 25.3, 54.73, 68.19, 49.9, 78.5, 88.5, 37.04, 67.34, 77.38),
    "SHRe_T, MLP, 2 GPUs": (41.88, 71.86, 83.06, 29.4, 59.3, 72.06, 56.1, 83.5, 90.7, 41.8, 71.36, 81.14),
    "SHRe_T, Transformer": (44.6, 75.3, 85.64, 31.69, 62.1, 74.48, 58.8, 85.6, 92.4, 43.92, 74.06, 82.8),
    "S-SMKE": (51.66, 79.9, 88.66, 36.17, 66.55, 78.28, 64.5, 88.4, 93.0, 51.78, 78.54, 86.46),
    "S-SMKE_CDL": (52.68, 80.56, 88.3, 36.5, 66.58, 78.28, 69.0, 89.2, 94.3, 51.48, 79.18, 86.66),
    "S-SMKE_CDL_MB": (53.54, 81.1, 89.52, 35.65, 66.0, 77.77, 70.9, 92.1, 96.0, 52.72, 80.2, 87.46),
    "S-SMKE_CDL_MB, finetuned": (56.2, 83.3, 91.1, 39.8, 69.2, 79.8, 82.0, 95.4, 98.0, 64.6, 87.5, 93.1),
    "FLAVA": (42.74, 76.76, None, 38.38, 67.47, None, 67.7, 94.0, None, 65.22, 89.38, None),
    "CLIP L/14-336": (58.4, 81.5, 88.1, 37.8, 62.4, 72.2, 88.0, 98.7, 99.4, 68.7, 90.6, 95.2),
    "VLMo base, finetuned": (74.8, 93.1, 96.9, 57.2, 82.6, 89.8, 92.3, 99.4, 99.9, 79.3, 95.7, 97.8),
    "VLMo, larger, finetuned": (83.1, 96.0, 98.2, 65.2, 86.5, 92.2, 96.8, 100, 100, 88.1, 98.4, 99.3),
    "BEiT-3, finetuned": (84.8, 96.5, 98.3, 67.2, 87.7, 92.8, 98.0, 100, 100, 90.3, 98.7, 99.5)}
MEDIAN_RANKS = { # COCO, image -> text and text -> image; which 5 x 1,000 pairs SHRe took was not published
    "SHRe": (5.8, 6.0), "SHRe_T, MLP": (1.5, 2.0), "SHRe_T, MLP, 2 GPUs": (1.0, 1.04),
    "SHRe_T, Transformer": (1.0, 1.0)}
NOTES = {
    "coco": "MM-D2V2, SHRe_T and S-SMKE were trained on COCO's training images: in-domain for them, and not\n"
            "zero-shot as for CLIP.",
    "flickr30k": "(!) scored with a wrong index, each image five times with one valid caption each; it was\n"
                 "corrected later: expect much higher numbers from the same model here."}


def published_retrieval(data, split, num_images, num_captions):
    """name -> what retrieval_metrics gives, as published for this test set; none for another or a part."""
    if split != "test" or num_images != TEST_IMAGES.get(data) or num_captions not in TEST_CAPTIONS[data]:
        return {}
    i = 6 * (data == "flickr30k")
    wrong = lambda name: " (!)" * (i and name.startswith(("data2vec", "MM-D2V2")))
    return {name + wrong(name): summary(row[i:i + 3], row[i + 3:i + 6]) for name, row in PUBLISHED.items()}


def table(head, rows, published={}, column=16, above=""):
    """head: over the names, then over the columns, which are `column` wide. rows: dict name -> as many
    numbers, None where there is none; published: more of them, marked so."""
    rows = rows | {f"{name}, published": row for name, row in published.items()}
    width = max(map(len, [head[0], *rows]))
    lines = [f"{'':{width}}{above}"] * bool(above)
    lines += [f"{head[0]:{width}}" + "".join(f"{word:>{column}}" for word in head[1:])]
    lines += ["-" * len(lines[-1])]
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
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([encode(batch).float().cpu() for batch in batches])


class EvalImages(torch.utils.data.Dataset):
    """Pictures as evaluation sees them, (3, H, W) uint8, each with -1; one that cannot be read is grey, and
    comes with its number."""

    def __init__(self, images, size, squash=False):
        self.images, self.size, self.squash, self.bad = images, size, squash, 0

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
            self.bad += 1
            say_once(f"{getattr(self.images, 'path', 'data')}: picture {i} of {len(self)} cannot be read: "
                     f"grey in its place")
        if self.bad > 10 + len(self) / 100:
            fail(f"{self.bad} of {len(self)} pictures cannot be read: prepare the set again")
        return images

    def stack(self, which):
        """Those pictures, in this order, (n, 3, H, W) uint8."""
        return self.images_of(torch.utils.data.default_collate([self[i] for i in which]))


@functools.cache
def say_once(text):
    print(text, file=sys.stderr)


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


# -----------------------------------------------------------------------------
# image-text retrieval: the picture

INK, GREY, LINE, PALE, GREEN, MINT = "#1f2328", "#6e7781", "#e3e6ea", "#f6f7f9", "#1a8f3c", "#e9f7ee"


def fit_text(text, width, height, size):
    """Word-wrapped text and its font: the largest, from size down to 11 px, with which it fits into the box.
    From 14 px on words too long for a line are broken; what does not fit even at 11 px is cut."""
    text = text.translate({0x2013: "-", 0x2014: "-", 0x2019: "'"}) # Pillow's own font lacks them
    for size in range(size, 10, -1):
        font, lines, room = ImageFont.load_default(size), [], int(height / (1.25 * size)) # room in lines
        for word in text.split():
            while size <= 14 and font.getlength(word) > width:
                cut = next(n for n in range(len(word), 0, -1) if font.getlength(f"{word[:n]}-") <= width)
                lines.append(f"{word[:cut]}-")
                word = word[cut:]
            if lines and font.getlength(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        if len(lines) <= room and all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines), font
    return "\n".join([*lines[:room - 1], "..."]), font


def draw_retrieval(pairs, image_emb, text_emb, path, rows=4):
    """A PNG of at most 150 KB: captions with the five pictures found for each, pictures with the five
    captions found, the right ones in green, and the rank of the best right one."""
    images, texts, owner = checked(image_emb, text_emb, pairs.text_to_image)
    N, cell, gap, edge, head, band = len(images), 96, 14, 24, 62, 56
    left, row = edge + 172, cell + 2 * gap # x of the results, height of a row
    right = left + 5 * (cell + gap) + 74
    canvas = Image.new("RGB", (right + edge, head + 2 * (band + rows * row) + 62), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text, x, y, w, h, size, fill=INK, centred=False):
        text, font = fit_text(text, w, h, size)
        x, anchor, align = (x + w / 2, "mm", "center") if centred else (x, "lm", "left")
        draw.multiline_text((x, y + h / 2), text, fill, font, anchor, align=align)

    def show(item, x, y, is_text, frame=None):
        box = (x - 4, y - 4, x + cell + 3, y + cell + 3)
        if is_text:
            draw.rounded_rectangle(box, 8, MINT if frame else PALE, frame, 3)
            write(pairs.captions[item], x + 2, y + 2, cell - 4, cell - 4, 17, centred=True)
        else:
            try:
                with or_bad():
                    image = decode(pairs.images[item]) # all of it, whatever its shape
            except Bad:
                image = Image.new("RGB", (cell, cell), LINE)
            w, h = (max(1, round(side * cell / max(image.size))) for side in image.size)
            canvas.paste(image.resize((w, h), Image.LANCZOS), (x + (cell - w) // 2, y + (cell - h) // 2))
            draw.rounded_rectangle(box, 8, None, frame or LINE, 3 if frame else 1)

    # the first rows images ask with their first caption, the next rows with themselves
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(0)).repeat(2 * rows)[:2 * rows]
    caption = torch.stack([(owner == i).nonzero()[0, 0] for i in drawn[:rows]])
    y = head
    write("What the model finds", edge, 14, right - edge, 40, 26)
    for title, is_text, asked, own, queries, gallery, gallery_owner in (
            ("Captions to pictures", True, caption, drawn[:rows], texts, images, torch.arange(N)),
            ("Pictures to captions", False, drawn[rows:], drawn[rows:], images, texts, owner)):
        draw.rectangle((0, y, canvas.width, y + band - 14), PALE)
        write(f"{title}: the best five of {len(gallery):,}", edge, y, right - edge - 90, band - 14, 20)
        write("rank", right - 74, y, 74, band - 14, 17, GREY, centred=True)
        y += band
        order = gallery_order(len(gallery)) # ties as in best_ranks
        scores = queries[asked] @ gallery[order].T # (rows, G)
        found = order[scores.argsort(dim=1, descending=True, stable=True)] # (rows, G)
        correct = gallery_owner[found] == own[:, None] # (rows, G)
        for r in range(rows):
            if is_text:
                write(pairs.captions[asked[r]], edge, y, 152, cell, 19)
            else:
                show(asked[r], edge + 4, y, False)
            for k, j in enumerate(found[r, :5].tolist()):
                show(j, left + k * (cell + gap), y, not is_text, GREEN if correct[r, k] else None)
            rank = correct[r].int().argmax().item() + 1
            write(f"{rank:,}", right - 74, y, 74, cell, 24, GREEN if rank <= 5 else GREY, centred=True)
            y += row
            if r < rows - 1:
                draw.line((edge, y - gap, right, y - gap), LINE)
    credit, licence = (str(pairs.meta.get(key, "")) for key in ("credit", "license"))
    credit = credit if licence in credit else f"{credit} {licence}".strip()
    legend = "Green: the right answer. Rank: its place. Queries drawn with seed 0, not picked by hand."
    write(legend, edge, y, right - edge, 24, 16, GREY)
    write(credit, edge, y + 26, right - edge, 24, 16, GREY)
    for colours in 256, 128, 64, 32, 16: # drawings need few, photographs get as many as fit
        file = io.BytesIO()
        canvas.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= 150_000:
            break
    save_atomic(path, lambda f: f.write(file.getvalue()))


# -----------------------------------------------------------------------------
# image features and their nearest neighbours


def pool_tokens(tokens, pool):
    """An encoder's output (B, T, D) -> (B, D) float32: its CLS token, or, as the thesis does, the mean of all
    others."""
    return tokens[:, 0].float() if pool == "cls" else tokens[:, 1:].float().mean(1)


def image_features(encoder, pairs, batch_size, device, dtype, pool="mean", num_workers=0):
    """Every image of a split once, in order -> (N, D). As embed."""
    return embed_images(encoder, lambda images: pool_tokens(encoder(images), pool), pairs.images,
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
                 dtype=torch.float32, pool="mean", num_workers=0):
    """Two labelled splits -> top1 and top3, queries searched in the bank, and reverse_top1 and reverse_top3,
    the bank's images searched among the queries; in percent."""
    features_of = lambda pairs: image_features(encoder, pairs, batch_size, device, dtype, pool, num_workers)
    sides = [(features_of(pairs).to(device), pairs.labels) for pairs in (bank_pairs, query_pairs)]
    result = {}
    for way, (bank, queries) in (("", sides), ("reverse_", sides[::-1])):
        ranks = knn_ranks(*bank, *queries)
        result |= {f"{way}top{k}": percent(ranks <= min(k, len(bank[0]))) for k in (1, 3)}
    return result


# -----------------------------------------------------------------------------
# zero-shot classification: classes are prompts

TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of one {}.", "a close-up of a {}.",
             "a drawing of a {}.", "{}"] # where no package has CLIP's
PUBLISHED_ZERO_SHOT = { # top-1 on ImageNet's 50,000, CLIP's 80 prompts
    "SHRe_T, MLP (!)": 40.26, "SHRe_T, MLP, 2 GPUs (!)": 40.0, "SHRe_T, Transformer (!)": 44.57,
    "S-SMKE": 30.4, "S-SMKE, token types": 30.3, "S-SMKE_CDL": 33.0, "S-SMKE_CDL_MB": 37.0,
    "S-SMKE_CDL_MB, BEiTv2-FT teacher (!)": 34.6, "S-SMKE_CDL_MB, data2vec2 teacher": 24.5,
    "S-SMKE_CDL_MB, DINO teacher": 37.5, "S-SMKE_CDL_MB, no teacher": 25.8, "Visual N-Grams": 11.5,
    "CLIP L/14-336": 76.2, "TinyCLIP ViT-8M/16": 41.1, "TinyCLIP ViT-39M/16": 63.5, "MobileCLIP-S0": 67.8}


def class_prompts(task, classes):
    """What prompts call a set's classes, in the order of their labels, the templates of the prompts, and in
    words where the two come from. Packages with CLIP's own are read if they are there."""
    imagenet = classes and all(re.fullmatch(r"n\d{8}", name) for name in classes)
    if not classes or imagenet and (len(classes) != 1000 or list(classes) != sorted(classes)):
        fail(f"data set {task} has no names of classes{', only numbers of WordNet' * bool(imagenet)}: write "
             f"them into its meta.json, in the order of the labels, as \"classes\": [\"cat\", \"dog\", ..]")
    names, named_by = [name.replace("_", " ") for name in classes], "meta.json"
    templates, made_by = TEMPLATES, "this script's"
    try:
        import open_clip # here, not above: optional
        templates, made_by = open_clip.OPENAI_IMAGENET_TEMPLATES, "CLIP's for ImageNet"
        if imagenet: # in the order of the sorted numbers, which our labels are
            names, named_by = open_clip.IMAGENET_CLASSNAMES, "CLIP"
    except ImportError:
        if imagenet:
            from torchvision.models import ResNet50_Weights # here, not above: see rand_augment_table
            names, named_by = ResNet50_Weights.DEFAULT.meta["categories"], "torchvision"
    if task in ("cifar10", "cifar100"):
        with contextlib.suppress(ImportError, OSError): # optional too
            file = importlib.resources.files("clip_benchmark") / "datasets"
            text = (file / "en_zeroshot_classification_templates.json").read_text(encoding="utf-8")
            templates, made_by = [x.replace("{c}", "{}") for x in json.loads(text)[task]], "CLIP's for CIFAR"
    if templates is TEMPLATES:
        print("not CLIP's prompts, so no published number compares; for them: pip install open_clip_torch")
    return names, templates, f"named by {named_by}, {len(templates)} prompts for each: {made_by}"


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


# -----------------------------------------------------------------------------
# image classification: finetuning and linear probe (seeds' tables 3-5 and 8)

PUBLISHED_VISION = { # top-1 finetuned and of a linear probe: on ImageNet, CIFAR-10, CIFAR-100
    "DistilData2Vec2": (76.1, 71.1, 97.7, 93.2, 87.2, 77.3),
    "DistilData2Vec2, draft": (75.0, 56.2, 97.0, 68.4, 85.1, 46.2),
    "S-SMKE image encoder": (75.5, 65.0, 97.6, 89.7, 85.2, 71.3),
    "Data2Vec2": (84.5, None),
    "BEiTv2": (85.0, 80.1, 98.8, 94.4, 91.1, 78.5), # ImageNet: 300 epochs of pretraining
    "BEiTv2, 1600 epochs": (85.5, None),
    "FLAVA": (None, 75.54),
    "ResNet-101": (80.1, None)}


def vision_rows(task):
    """name -> the two published numbers, for the models that have any on this task."""
    i = {"imagenet": 0, "cifar10": 2, "cifar100": 4}.get(task, 6)
    return {name: row[i:i + 2] for name, row in PUBLISHED_VISION.items() if row[i:i + 2]}


@functools.cache
def rand_augment_table():
    """RandAugment's operations on the scale of timm's rand-m9-mstd0.5-inc1, where severity 1 always changes
    most: name -> (its argument at severity s = 0 .. 1, sign = 1 or -1; the operation on a PIL image, given
    the argument)."""
    import torchvision.transforms.functional as TF # here, not above: a second, and the loops import this file
    # ImageNet's mean comes in at the edges
    moved = dict(interpolation=TF.InterpolationMode.BICUBIC, fill=[124, 116, 104])

    def affine(image, translate=(0.0, 0.0), slope=(0.0, 0.0)):
        return TF.affine(image, 0, translate, 1, [math.degrees(math.atan(v)) for v in slope], center=[0, 0],
                         **moved)

    nothing, enhance = (lambda s, sign: None), (lambda s, sign: max(0.1, 1 + sign * 0.9 * s))
    return {
        "AutoContrast": (nothing, lambda image, _: TF.autocontrast(image)),
        "Equalize": (nothing, lambda image, _: TF.equalize(image)),
        "Invert": (nothing, lambda image, _: TF.invert(image)),
        "Rotate": (lambda s, sign: sign * 30 * s, lambda image, degrees: TF.rotate(image, degrees, **moved)),
        # 0 bits too, which Pillow refuses
        "Posterize": (lambda s, sign: 4 - int(4 * s), lambda image, bits: image.point(
            [v & 256 - 2 ** (8 - bits) for v in range(256)] * 3)),
        "Solarize": (lambda s, sign: 256 - int(256 * s), TF.solarize), # inverts what is brighter
        "SolarizeAdd": (lambda s, sign: int(110 * s), lambda image, add: image.point(
            [v + add if v < 128 else v for v in range(256)] * 3)),
        "Color": (enhance, TF.adjust_saturation),
        "Contrast": (enhance, TF.adjust_contrast),
        "Brightness": (enhance, TF.adjust_brightness),
        "Sharpness": (enhance, TF.adjust_sharpness),
        "ShearX": (lambda s, sign: sign * 0.3 * s, lambda image, v: affine(image, slope=(v, 0.0))),
        "ShearY": (lambda s, sign: sign * 0.3 * s, lambda image, v: affine(image, slope=(0.0, v))),
        "TranslateX": (lambda s, sign: sign * 0.45 * s,
                       lambda image, v: affine(image, (-v * image.width, 0.0))),
        "TranslateY": (lambda s, sign: sign * 0.45 * s,
                       lambda image, v: affine(image, (0.0, -v * image.height)))}


def rand_augment(image, magnitude, rng):
    """Two operations drawn with replacement, each applied with probability 1/2, at a magnitude ~ N(magnitude,
    0.5) cut to 0 .. 10. image: PIL, RGB; rng: numpy Generator."""
    table = rand_augment_table()
    for name in rng.choice(list(table), 2):
        if rng.random() < 0.5:
            severity = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            argument, operation = table[name]
            image = operation(image, argument(severity, int(rng.choice([-1, 1]))))
    return image


@contextlib.contextmanager
def torch_seeded(rng):
    """Inside, torch's own CPU randomness, all that torchvision's transforms know, follows from a numpy
    Generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
        yield


class LabelledImages(torch.utils.data.Dataset):
    """Training images; the index is (epoch, position, image), which all randomness is a function of. Items:
    image (3, H, W) float32, ImageNet-normalised, its class 0 .. C-1, and which images could not be read
    before."""

    def __init__(self, images, targets, size, args):
        self.images, self.targets, self.size, self.args = images, targets, size, args

    def __getitem__(self, index):
        epoch, position, i = index
        rng, bad = np.random.default_rng((self.args.seed, epoch, position)), []
        while len(bad) <= 10: # or are too many
            try:
                return self.image(i, rng), self.targets[i], bad
            except Bad: # another in its place
                bad.append(int(i))
                i = int(rng.integers(len(self.images)))
        return torch.zeros(3, self.size, self.size), self.targets[i], bad

    def image(self, i, rng):
        if self.args.augment == "none":
            return normalize(eval_image(self.images[i], self.size)[None])[0]
        from torchvision.transforms import v2 # here, not above: see rand_augment_table
        with or_bad():
            image = decode(self.images[i])
        image = image.resize((self.size, self.size), Image.BICUBIC,
                             box=crop_box(*image.size, self.args.crop_min, rng))
        if rng.random() < self.args.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = normalize(to_tensor(rand_augment(image, 9.0, rng))[None])[0]
        with torch_seeded(rng): # the noise of erased boxes has the distribution of normalised pixels
            return v2.RandomErasing(self.args.erase, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")(image)

    def collate(self, samples):
        images, targets, bad = zip(*samples)
        return torch.stack(images), torch.stack(targets), sum(bad, [])


def mix(images, targets, args, rng):
    """With probability mix_prob mixup or, as often, cutmix of a whole batch, each image with its neighbour,
    and of its targets. images (B, 3, H, W) float, targets (B, C) whose rows sum to 1 -> the same shapes."""
    if rng.random() >= args.mix_prob:
        return images, targets
    from torchvision.transforms import v2 # here, not above: see rand_augment_table
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


# -----------------------------------------------------------------------------
# training for some epochs, of which the best is kept: image finetuning and GLUE


def lr_share(step, warmup_steps, max_steps, linear=False):
    """Learning rate over its peak: linear warm-up, then half a cosine or a line to 0. step counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - done if linear else (1 + math.cos(math.pi * done)) / 2


def epoch_batches(num_examples, batch_size, seed, step):
    """Yields for each step, from `step` on and for ever, its list of (epoch, position, example): each epoch
    in its own order, without the rest that fills no batch."""
    per_epoch = num_examples // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        for k in range(first, per_epoch):
            positions = range(k * batch_size, (k + 1) * batch_size)
            yield [(epoch, position, int(order[position])) for position in positions]
            step += 1


def train_epochs(args, model, head, optimizer, per_epoch, batches, losses, measure, unit, split, model_knobs,
                 kept, device, dtype, linear=False):
    """Trains for args.epochs -> the best epoch's measures and, as "epoch", its number. OUT_DIR/best.pt
    holds its weights, ckpt.pt what a killed run resumes from.

    optimizer            every group has its "peak_lr"
    batches(step)        iterator over the batches from that step on, per_epoch an epoch, made of `unit`
    losses(batch, step)  yields float32 scalars, one a micro-batch, that add up to the step's loss
    measure()            dict of percents on `split`, after each epoch; the first decides
    model_knobs, kept    flags that may not change on resume; what else goes into checkpoints"""
    max_steps = args.epochs * per_epoch
    warmup_steps = round(args.warmup_share * max_steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if use_compile(args.compile, device): # in place: the weights keep their names
        model.compile()
    print(f"{args.epochs} epochs of {per_epoch} steps, {warmup_steps} of warm-up; {split} says which is best")

    # -- resume
    path, step, best = os.path.join(args.out_dir, "ckpt.pt"), 0, {}
    checkpoint = open_run(args, model_knobs, max_steps, f"--epochs={args.epochs}, {max_steps} steps,")
    if checkpoint:
        with continuing(path):
            load_weights(model, checkpoint["model"], path)
            load_weights(head, checkpoint["head"], path)
            load_optimizer(optimizer, checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            step, best = checkpoint["step"], checkpoint["best"]
    open_log(args, step, device, dtype)

    def save(name, **rest):
        save_checkpoint(os.path.join(args.out_dir, name), model, head=head.state_dict(), step=step, best=best,
                        args=vars(args), code=git_sha(), torch=str(torch.__version__), **kept, **rest)

    def log(text, **record):
        log_record(args, step, text, **record)

    # -- loop
    stop, peak = Stop(), max(group["peak_lr"] for group in optimizer.param_groups)
    loader = stop.until(batches(step), max_steps - step)
    rows, waited, first_step, loop_start = [], 0.0, step, time.time() # rows: loss, norm of steps not logged
    since = loop_start
    while True:
        wait_start = time.time()
        batch = next(loader, None)
        if batch is None:
            break
        waited += time.time() - wait_start
        if stop.count(batch[2], args.batch_size, log):
            break
        share = lr_share(step, warmup_steps, max_steps, linear)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        total = 0.0
        for loss in losses(batch, step):
            scaler.scale(loss).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip or float("inf"))
        if scaler.is_enabled(): # it skips a step whose gradient overflowed
            norm = norm.nan_to_num(0, 0, 0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        rows.append(torch.stack([total, norm.float()])) # stays on the device: no waiting for it
        epoch_ends = step % per_epoch == 0
        logs, saves = step % args.log_interval == 0, epoch_ends or step % args.save_interval == 0
        if logs or saves: # no measuring or saving after a bad step
            table = finite_rows(rows, ("loss", "norm"), step, args) # (seen, 2)
        if logs or step == max_steps:
            (mean, norm), seen, now = table.double().mean(0).tolist(), len(rows), time.time()
            ms, wait_ms, memory = 1000 * (now - since) / seen, 1000 * waited / seen, peak_memory(device)
            left = (max_steps - step) * (now - loop_start) / (step - first_step) / 60
            log(f"step {step:>6}/{max_steps}  loss {mean:.4f}  norm {norm:.2f}  lr {share * peak:.2e}  "
                f"{1000 * args.batch_size / ms:.0f} {unit}/s  {ms:.0f} ms ({wait_ms:.0f} for data)  "
                f"{memory:.2f} GB  {left:.1f} min left", loss=mean, norm=norm, lr=share * peak, ms=ms,
                wait_ms=wait_ms, memory_gb=memory, minutes_left=left,
                **{f"{unit}_per_s": 1000 * args.batch_size / ms})
            rows, waited, since = [], 0.0, now
        if epoch_ends:
            paused, epoch, result = time.time(), step // per_epoch, measure()
            first = next(iter(result))
            if not best or result[first] > best[first]:
                best = {**result, "epoch": epoch}
                save("best.pt")
            values = ", ".join(f"{k} {v:.2f}" for k, v in result.items())
            log(f"epoch {epoch}/{args.epochs}: {split} {values} (best {first} {best[first]:.2f} in epoch "
                f"{best['epoch']})", epoch=epoch, **{f"{split}_{k}": v for k, v in result.items()})
            since += time.time() - paused # ms counts training alone
        if saves and step < max_steps:
            save("ckpt.pt", finished=False, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    finite_rows(rows, ("loss", "norm"), step, args)
    save("ckpt.pt", finished=step == max_steps, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    stop.end(path, "--resume" if args.command == "finetune" else "") # glue goes on by itself
    return best


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
    "ELMo": (68.6, 71.1, 53.4, 76.7, 86.2, 70.4, 44.1, 91.5, 56.3),
    "BERT base": (86.7, 91.8, 69.3, 88.6, 89.6, 89.0, 56.3, 92.7, 53.5), # seeds' 92.7 on STS-B is a slip
    "DistilBERT": (82.2, 89.2, 59.9, 87.5, 88.5, 86.9, 51.3, 91.3, 56.3),
    "6-layer BERT of the thesis (!)": (81.2, 88.0, 67.64, 85.0, 86.5, 81.0, 55.1, 91.4, 56.4),
    "S-SMKE text encoder (!)": (73.88, 78.71, 51.6, 79.9, 81.2, 57.5, 14.2, 83.5, 45.04),
    "FLAVA": (80.3, 87.3, 57.8, 86.9, 87.2, 85.7, 50.7, 90.9),
    "CLIP": (33.5, 50.5, 55.2, 65.0, 53.9, 16.0, 25.4, 88.2)}
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
    if not path.endswith(".parquet"):
        with open(path, encoding="utf-8-sig", newline="\n") as f: # no quotes; only a newline ends a row
            yield from (line.rstrip("\r\n").split("\t") for line in f)
        return
    try:
        import pyarrow.parquet # here, not above: optional
    except ImportError:
        fail(f"{path} takes pyarrow to read: pip install pyarrow")
    table = pyarrow.parquet.read_table(path)
    yield table.column_names
    yield from zip(*([x if x is None else str(x) for x in column.to_pylist()] for column in table.columns))


def read_glue(task, glue_dir, limit=0):
    """The first `limit` examples (0: all) of each split, train first: split -> (tuples of one or two texts,
    labels (n,) int64, of stsb float32). What is missing or malformed ends the program with file and line."""
    title, columns, classes = GLUE[task][:3]
    splits = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    hub = [f"{split.replace('dev', 'validation')}-00000-of-00001.parquet" for split in splits]
    layouts = [(title, [f"{split}.tsv" for split in splits]), (task, hub), # of the archives, of the hub,
               (title, ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"])] # of MRPC's publishers
    layouts = [[os.path.join(glue_dir, folder, name) for name in names] for folder, names in layouts]
    paths = max(layouts, key=lambda paths: sum(map(os.path.isfile, paths))) # the first of equals
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        fail(f"GLUE's {task}: no {', '.join(missing)}. Unpack the archives of gluebenchmark.com there, or "
             f"fetch all as parquet (pip install huggingface_hub pyarrow): "
             f"hf download nyu-mll/glue --repo-type=dataset --local-dir={glue_dir}")
    examples, raw = {}, paths is not layouts[1]
    if not raw:
        columns = [*HUB_TEXTS.get(task, columns[:-1]), "label"]
        classes = classes and [str(i) for i in range(len(classes))]
    for split, path in zip(splits, paths):
        texts, labels, torn, n, rows = [], [], [], 0, glue_rows(path)
        try:
            names = ["source", "label", "star", "sentence"] if raw and task == "cola" else next(rows, [])
            absent = [column for column in columns if column not in names]
            if absent:
                fail(f"{path}: no column {', '.join(absent)} among {', '.join(names)}")
            where = [names.index(column) for column in columns]
            for n, row in enumerate(rows, 1 if raw and task == "cola" else 2):
                if task == "qqp" and len(row) < len(names): # by a newline within a question
                    torn.append(n)
                    continue
                if len(row) != len(names):
                    fail(f"{path} line {n}: {len(row)} columns instead of {len(names)}")
                *text, label = (row[i] for i in where)
                if None in (*text, label):
                    fail(f"{path} line {n}: a text or label is null")
                if not (label in classes if classes else re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", label)):
                    fail(f"{path} line {n}: label {label[:40]!r}, not "
                         f"{' or '.join(classes or ['a score from 0 to 5'])}. Are its columns shifted?")
                texts.append(tuple(text))
                labels.append(classes.index(label) if classes else float(label))
        except (ValueError, OSError) as e: # no UTF-8, no parquet
            fail(f"{path} is damaged after line {n}: {e}")
        print(f"{path}: {len(texts):,} examples" + f", {len(torn)} torn lines left out" * bool(torn) +
              ", MRPC's test set, here called dev" * path.endswith("paraphrase_test.txt"))
        if not texts or len(torn) > 0.001 * n:
            fail(f"{path} holds {len(texts)} examples and {len(torn)} lines with too few columns {torn[:3]}")
        labels = np.array(labels[:limit or None], np.int64 if classes else np.float32)
        examples[split] = texts[:limit or None], labels
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


def finetune_task(task, args, splits, encoder, kept, device, dtype):
    """Trains a text encoder and a new head on one task, into args.out_dir; arguments and result as in
    train_epochs."""
    (texts, labels), B = splits["train"], args.batch_size
    classes, config, D = GLUE[task].classes, encoder.config, encoder.config["embed_dim"]
    torch.manual_seed(args.seed)
    head = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh(), torch.nn.Dropout(args.dropout),
                               torch.nn.Linear(D, len(classes or "1")))
    init_weights(head, D)
    if config["pooler"]: # BERT's own
        head[0].load_state_dict({"weight": encoder.pooler_weight, "bias": encoder.pooler_bias})
    encoder.train().requires_grad_(True).to(device)
    head.to(device)
    trained = [*encoder.parameters(), *head.parameters()]
    groups = [{"params": trained, "peak_lr": args.lr, "weight_decay": args.weight_decay}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.98), 1e-6, fused=device.type in ("cuda", "cpu"))
    print(f"\n{task}: {sum(p.numel() for p in trained) / 1e6:.2f}M parameters, {B} examples a step, peak lr "
          f"{args.lr:g}, {'pretrained' if config['pooler'] else 'new'} pooler")

    encode = lambda texts: encode_examples(encoder.tokenizer, texts, args.max_length)

    def logits(encoded):
        ids, mask, segments = (x.to(device, non_blocking=True) for x in encoded)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = encoder(ids, mask, token_type_ids=segments if config["token_types"] > 1 else None) # (B, T, D)
        return head(x[:, 0].float()) # (B, C)

    def losses(batch, step):
        torch.manual_seed(args.seed << 32 | step) # dropout follows from seed and step, as the order does
        out, target = logits(batch[0]), batch[1].to(device)
        yield F.cross_entropy(out, target) if classes else F.mse_loss(out[:, 0], target)

    @torch.no_grad()
    def measure():
        result = {}
        with evaluating(encoder), evaluating(head):
            for split, (texts, labels) in [*splits.items()][1:]: # mnli: matched and mismatched
                out = torch.cat([logits(encode(texts[i:i + B])).cpu() for i in range(0, len(texts), B)])
                found = out.argmax(1) if classes else out[:, 0]
                result |= {split.partition("_")[2] or metric: glue_score(task, found, labels, metric)
                           for metric in GLUE[task].metrics}
        return result

    def batches(step):
        for batch in epoch_batches(len(texts), B, args.seed, step):
            index = [i for _, _, i in batch]
            yield encode([texts[i] for i in index]), torch.from_numpy(labels[index]), []

    return train_epochs(args, encoder, head, optimizer, len(texts) // B, batches, losses, measure, "examples",
                        "dev", [], kept, device, dtype, linear=True)


def glue_row(scores):
    """dict task -> score, "mismatched" among them -> a row of the table, with the means of eight tasks and of
    nine; None for what is missing."""
    nine = [*map(scores.get, GLUE)]
    means = [None if None in values else sum(values) / len(values) for values in (nine[:8], nine)]
    return [nine[0], scores.get("mismatched"), *nine[1:], *means]


# -----------------------------------------------------------------------------
# subcommands: each is a pair of functions, its flags and its work

CKPT_HELP = ("checkpoint of a distill script, with what is measured: image encoder, text encoder, or for "
             "retrieval and zeroshot both")
TRANSFORMS = ["images resized by the short side, centre crop", "images squashed to a square"] # args.squash
WORKERS_HELP = "processes that decode images; 0 decodes between the steps"
TEXT_ENCODER_HELP = ("instead of CKPT: a text encoder, data2vec2_text, bert, minilm or a checkpoint of "
                     "distill_text.py")


def two_tower_flags(p):
    """The flags of the subcommands that judge an image encoder and a text encoder together."""
    p.knob("squash", False, "squash images to a square, as the thesis does, and do not crop")
    p.section("run")
    p.knob("ckpt", "out/tiny/ckpt.pt", CKPT_HELP)
    p.knob("image_encoder", None, "instead of CKPT: an image encoder that never met TEXT_ENCODER, as wide: "
           "data2vec2_image, beitv2 or a checkpoint of distill_image.py", type=str)
    p.knob("text_encoder", None, TEXT_ENCODER_HELP, type=str)
    p.knob("image_path", None, "file of the image encoder's published weights, for a machine "
           "without a network", type=str)
    p.knob("text_path", None, "file of the text encoder's published weights, its tokenizer's files beside it",
           type=str)
    p.knob("batch_size", 256, "images or texts at a time: memory and speed", least=1)
    p.knob("num_workers", 0, WORKERS_HELP)
    run_flags(p)


def two_towers(args, device):
    """The model with encode_image and encode_text that the flags name, on device, and its name."""
    if (args.image_encoder is None) != (args.text_encoder is None):
        fail("--image_encoder and --text_encoder go together")
    if args.image_encoder and "ckpt" in args.given:
        fail("--ckpt is a model with both encoders: give it or --image_encoder and --text_encoder")
    if args.image_encoder:
        model = Unaligned(load_encoder(args.image_encoder, "image", args.image_path),
                          load_encoder(args.text_encoder, "text", args.text_path))
        return model.to(device), f"{args.image_encoder} + {args.text_encoder}"
    if args.image_path or args.text_path:
        fail("--image_path and --text_path are files of published encoders: say which, with --image_encoder "
             "and --text_encoder")
    model = load_checkpoint(args.ckpt)
    if not all(hasattr(model, name) for name in ("encode_image", "encode_text", "tokenizer")):
        fail(f"{args.ckpt} does not embed both images and text, and {args.command} needs a checkpoint that "
             "distill_multimodal.py wrote: python distill_multimodal.py --preset=tiny")
    return model.to(device), args.ckpt


def retrieval_flags(p):
    p.section("data")
    p.knob("data", "openmoji", "name of the prepared pairs: DATA_DIR/NAME; for the test sets of coco and "
           "flickr30k, if whole, published rows are printed")
    p.knob("split", "test", "which of its splits")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    two_tower_flags(p)
    p.knob("picture", None, "draw some queries and what was found for them, as a PNG", type=str)


def retrieval(args, device, dtype):
    """Image-text retrieval: recall at 1, 5 and 10 both ways, and the median rank of the true partner."""
    model, name = two_towers(args, device)
    pairs = Pairs(args.data_dir, args.data, args.split, needs_captions=True)
    N, M = len(pairs.images), len(pairs.captions)
    five = int(np.minimum(np.bincount(pairs.text_to_image), 5).sum())
    print(f"{args.data} {args.split}: {N:,} images, {M:,} captions (all there are"
          f"{f'; others take the first five, {five:,}' * (five < M)}), {TRANSFORMS[args.squash]}")
    metrics, image_emb, text_emb = evaluate_retrieval(
        model, pairs, args.batch_size, device, dtype, args.squash, args.num_workers)
    chance, published = chance_row(pairs.text_to_image, N), published_retrieval(args.data, args.split, N, M)
    print(retrieval_table({name: metrics, "chance": chance}, published))
    if published:
        print(NOTES[args.data])
    elif args.data in TEST_IMAGES:
        print(f"no published rows: they are of {TEST_IMAGES[args.data]:,} test images, five captions each")
    ranks, size = median_rank_chunks(image_emb, text_emb, pairs.text_to_image), min(N, 1000)
    print(f"median rank among {size:,}: image -> text {ranks[0]:g}, text -> image {ranks[1]:g} (1 = best, "
          f"chance {(size + 1) / 2:g})")
    published_ranks = MEDIAN_RANKS if published and args.data == "coco" else {}
    if published_ranks:
        print(table(["Median rank", "Image -> Text", "Text -> Image"], {name: ranks}, published_ranks))
    if args.picture:
        draw_retrieval(pairs, image_emb, text_emb, args.picture)
        print(f"wrote {args.picture}")
    return {"ckpt": name, "data": args.data, "split": args.split, "squash": args.squash, "images": N,
            "captions": M, "metrics": metrics, "chance": chance, "published": published,
            "median_rank": {"i2t": ranks[0], "t2i": ranks[1], "among": size, "chance": (size + 1) / 2,
                            "published": published_ranks}}


def zeroshot_flags(p):
    p.section("data")
    task_flags(p, "imagenet")
    two_tower_flags(p)


def zeroshot(args, device, dtype):
    """Zero-shot classification as CLIP does it: a picture's class is the one whose prompts, embedded and
    averaged, are closest to it. Measured on the split test, or val where there is none; for ImageNet's whole
    val and CLIP's 80 prompts (pip install open_clip_torch) published rows are printed."""
    split, pairs = labelled_splits(args.task, args.data_dir, args.command, ("val", "test")).popitem()
    names, templates, words = class_prompts(args.task, pairs.meta.get("classes"))
    N, C = len(pairs.images), len(names)
    if len(unknown := np.setdiff1d(pairs.labels, np.arange(C))):
        fail(f"data set {args.task} has the label {unknown[0]}, but its meta.json names {C} classes")
    model, name = two_towers(args, device)
    print(f"{args.task} {split}: {N:,} images of {C:,} classes, {words}; {TRANSFORMS[args.squash]}")
    encode_text = lambda prompts: embed_texts(model, prompts, args.batch_size, device, dtype)
    weights = zero_shot_weights(encode_text, names, templates, len(names) * len(templates)) # batched there
    image_emb = embed_images(model, model.encode_image, pairs.images, model.img_size, args.batch_size, device,
                             dtype, args.squash, args.num_workers) # (N, D)
    ranks = knn_ranks(weights, np.arange(C), image_emb, pairs.labels)
    metrics = {f"top{k}": percent(ranks <= k) for k in (1, 3, 5)}
    whole = (args.task, split, N, len(templates)) == ("imagenet", "val", 50_000, 80) \
        and words.startswith("named by CLIP,")
    published = PUBLISHED_ZERO_SHOT if whole else {}
    print(table([args.task, "top-1", "top-3", "top-5"],
                {name: metrics.values(), "chance": [100 * min(k / C, 1) for k in (1, 3, 5)]},
                {title: (top1, None, None) for title, top1 in published.items()}))
    if published:
        print("(!) the teacher learned from ImageNet's labels: not zero-shot")
    return {"ckpt": name, "task": args.task, "split": split, "squash": args.squash, "images": N, "classes": C,
            "prompts": len(templates), "source": words, "metrics": metrics, "published": published}


def task_flags(p, task):
    p.knob("task", task, "name of the prepared images with labels: DATA_DIR/NAME, for instance "
           "imagenet or cifar100")
    p.knob("data_dir", "data", "folder of all prepared data sets")


def image_flags(p):
    """The flags of all subcommands that judge an image encoder by a labelled set."""
    p.section("data and encoder")
    task_flags(p, "cifar10")
    p.knob("ckpt", "out/data2vec2/ckpt.pt", CKPT_HELP)
    p.knob("encoder", None, "instead of CKPT: a published encoder, downloaded once",
           choices=["data2vec2_image", "beitv2"])
    p.knob("path", None, "file of its published weights, for a machine without a network", type=str)
    p.knob("num_workers", 0, WORKERS_HELP)


def train_flags(p, epochs, lr, out_dir, compiled):
    """The flags of train_epochs. Defaults are None where they depend on the task."""
    p.knob("epochs", epochs, "passes over the training data", type=number(int, 1, math.inf))
    p.knob("warmup_share", 0.1, "share of the steps in which the learning rate rises; then it falls to 0, in "
           "finetune along a cosine, in glue along a line", most=1)
    p.knob("lr", lr, "peak learning rate, used as it is: not scaled by the batch size",
           type=number(float, 0, math.inf))
    p.knob("grad_clip", 0.0, "largest norm of the gradient, 0: no clipping")
    p.section("run")
    p.knob("out_dir", out_dir, "folder for ckpt.pt, best.pt (encoder and head of the best epoch) and "
           "log.jsonl; in glue a folder of folders, one a task, where best.pt becomes ckpt.pt in the end")
    p.knob("seed", 0, "of all that is random", most=2 ** 31 - 1)
    p.knob("log_interval", 50, "steps between log lines", least=1)
    p.knob("save_interval", 1000, "steps between checkpoints", least=1)
    p.knob("compile", compiled, "torch.compile the models; auto: on CUDA under Linux", type=str.lower,
           choices=["auto", "true", "false"], nargs="?", const="true")
    run_flags(p)


def run_flags(p):
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, "
           "else float16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("json", None, "write the numbers to this file too", type=str)


def one_encoder(args, modality):
    """The frozen Encoder that --ckpt or, by its name, --encoder or --text_encoder gives. Of a multimodal
    checkpoint it is that tower alone, without what both share, as the thesis finetuned them."""
    flag = "encoder" if modality == "image" else "text_encoder"
    if getattr(args, flag):
        if "ckpt" in args.given:
            fail(f"--ckpt and --{flag} each name an encoder: give one of them")
        return load_encoder(getattr(args, flag), modality, args.path)
    if args.path:
        fail(f"--path is the file of a published encoder: say which, with --{flag} (see --help)")
    model = load_checkpoint(args.ckpt)
    encoder = getattr(model, f"{modality}_encoder", model)
    if encoder.config["modality"] != modality:
        fail(f"{args.ckpt} is {'a text' if modality == 'image' else 'an image'} encoder, and {args.command} "
             f"needs one for {modality}: a checkpoint of distill_{modality}.py or distill_multimodal.py")
    if hasattr(model, "tokenizer"):
        encoder.tokenizer = model.tokenizer
    return encoder


def labelled_splits(task, data_dir, asks, names=("train", "val", "test")):
    """A set's splits of these names: val, test or both, and train. All have labels, and train has every
    label. asks: what needs them, for the messages."""
    folder = os.path.join(data_dir, task)
    first = names[0] if "train" in names else next(
        (s for s in names if os.path.exists(os.path.join(folder, f"{s}_images.idx"))), "test")
    there = Pairs(data_dir, task, first).meta["splits"]
    splits = {s: Pairs(data_dir, task, s) for s in names if s in there}
    if not {"val", "test"} & set(splits):
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


def knn_flags(p):
    image_flags(p)
    p.section("run")
    p.knob("pool", "mean", "an image's feature: the mean of its patch tokens, or its CLS token",
           choices=["mean", "cls"])
    p.knob("batch_size", 256, "images at a time: memory and speed", least=1)
    run_flags(p)


def knn(args, device, dtype):
    """Nearest neighbours of frozen image features: the share of images with their label among their 1 and 3
    nearest, held-out images searched in the training images and the other way round."""
    encoder = one_encoder(args, "image").to(device)
    splits = labelled_splits(args.task, args.data_dir, args.command)
    train, (name, held_out) = splits["train"], splits.popitem() # the last: test if there is one
    print(f"{args.task}: {len(train.images):,} training images, {len(held_out.images):,} of {name}; feature: "
          f"{'CLS token' if args.pool == 'cls' else 'mean of the patch tokens'}")
    metrics = evaluate_knn(encoder, train, held_out, args.batch_size, device, dtype, args.pool,
                           args.num_workers)
    top, ckpt = [*metrics.values()], args.encoder or args.ckpt
    print(table([ckpt, "top-1", "top-3"], {f"train -> {name}": top[:2], f"{name} -> train": top[2:]}))
    return {"ckpt": ckpt, "task": args.task, "split": name, "pool": args.pool,
            "train_images": len(train.images), "images": len(held_out.images), "metrics": metrics}


def finetune_flags(p):
    image_flags(p)
    p.knob("linear_probe", False, "freeze the encoder and train the head alone; with --augment=none its "
           "features are extracted once, which makes 15 epochs hardly longer than one")
    p.section("augmentation")
    p.knob("augment", "default", "none: training images as in evaluation, short side to size and centre "
           "crop; default: all that follows", choices=["default", "none"])
    p.knob("crop_min", 0.08, "smallest area of the random crop, as a share of the picture", most=1)
    p.knob("flip", 0.5, "probability of a mirror image", most=1)
    p.knob("erase", 0.25, "probability of random erasing: a box of noise", most=1)
    p.knob("mix_prob", 0.9, "share of batches that are mixed, half of them by mixup, half by cutmix", most=1)
    p.section("optimisation")
    p.knob("smoothing", 0.1, "share of each target that is spread evenly over all classes", most=1)
    p.knob("batch_size", 256, "images per optimiser step", least=1)
    p.knob("micro_batch_size", 0, "images per forward pass, 0: all; gradients are accumulated over the batch")
    p.knob("layer_decay", 0.0, "the head learns at LR, each layer below it at this share of the one above "
           "(eq. 40); 0: 0.75 for cifar10 and cifar100, else 0.81", most=1)
    p.knob("weight_decay", 0.01, "AdamW, on matrices; not on biases, norms, positions, tokens")
    train_flags(p, 15, 1e-3, "out/finetune", "auto")
    p.knob("resume", False, "continue the run in OUT_DIR")


def finetune(args, device, dtype):
    """Finetunes an image encoder with a linear classifier on top (mean of the patch tokens -> LayerNorm ->
    Linear), or trains the classifier alone, and measures how many held-out images it names right."""
    # -- set up
    useless = [f"--{k}" for k in ("crop_min", "erase", "flip", "mix_prob") if k in args.given]
    if useless and args.augment == "none":
        fail(f"{', '.join(useless)}: only for --augment=default")
    if args.linear_probe and "layer_decay" in args.given:
        fail("--layer_decay: a linear probe trains the head alone, at --lr")
    B, micro = args.batch_size, args.micro_batch_size or args.batch_size
    if B % micro:
        fail(f"--micro_batch_size={micro} does not divide --batch_size={B}")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # -- data: the best epoch is chosen on val, and a test set, where there is one, is used once, at the end
    splits = labelled_splits(args.task, args.data_dir, args.command)
    train, val, test = splits["train"], list(splits)[1], list(splits)[-1]
    classes = np.unique(train.labels)
    targets = {s: torch.from_numpy(np.searchsorted(classes, pairs.labels)) for s, pairs in splits.items()}
    N, C = len(train.images), len(classes)
    if B > N:
        fail(f"--batch_size={B}, but there are {N} training images. Use at most that many.")

    # -- encoder, head, optimizer
    encoder = one_encoder(args, "image")
    print_settings(args, device, dtype, use_compile(args.compile, device))
    torch.manual_seed(args.seed)
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
          f"{B} = {B // micro} x {micro} images per step")
    for layer in sorted({group["layer"] for group in groups}): # as seeds' table 3
        own = [group for group in groups if group["layer"] == layer]
        what = "embeddings" if layer == 0 else "head" if layer > encoder.config["depth"] else f"block {layer}"
        print(f"layer {layer:>2}  learning rate {own[0]['peak_lr']:.1e}  {what}, "
              f"{sum(p.numel() for group in own for p in group['params']) / 1e6:.2f}M parameters")

    features_of = lambda pairs: image_features(encoder, pairs, micro, device, dtype, "mean", args.num_workers)
    if args.linear_probe: # these never change
        features_of = functools.cache(features_of)
    cached = args.linear_probe and args.augment == "none" # nothing random stands before the head

    @torch.no_grad()
    def measure(split):
        """Percent of the split's images whose class is the first, and among the first five."""
        logits = head(features_of(splits[split]).to(device)) # (N, C)
        right = logits.topk(min(5, C)).indices.cpu() == targets[split][:, None]
        return {"top1": percent(right[:, 0]), "top5": percent(right.any(1))}

    def batches(step):
        """From this step on: images (B, 3, H, W) or features (B, D), and classes (B,)."""
        order = epoch_batches(N, B, args.seed, step)
        if cached:
            features = features_of(train)
            order = (torch.tensor(batch)[:, 2] for batch in order)
            return ((features[i], targets["train"][i], []) for i in order)
        images = LabelledImages(train.images, targets["train"], encoder.config["img_size"], args)
        return iter(torch.utils.data.DataLoader(images, batch_sampler=order, collate_fn=images.collate,
                                                num_workers=args.num_workers, worker_init_fn=ignore_signals,
                                                pin_memory=device.type == "cuda"))

    def losses(batch, step):
        x, target = batch[0].to(device, non_blocking=True), F.one_hot(batch[1], C).float().to(device) # (B, C)
        if args.augment == "default": # the whole batch: micro-batches change nothing
            x, target = mix(x, target, args, np.random.default_rng((args.seed, step, 0, 1)))
        for start in range(0, B, micro):
            c = slice(start, start + micro)
            with autocast:
                pooled = x[c] if cached else pool_tokens(encoder(x[c]), "mean") # (micro, D) float32
            loss = F.cross_entropy(head(pooled), target[c], label_smoothing=args.smoothing)
            yield loss * (micro / B) # a mean over the batch; the thesis' code divides by C as well

    start = time.time()
    best = train_epochs(args, encoder, head, optimizer, N // B, batches, losses, lambda: measure(val),
                        "images", val, ["task", "ckpt", "encoder", "linear_probe"],
                        {"classes": classes.tolist()}, device, dtype)
    metrics = {k: best[k] for k in ("top1", "top5")}
    if test != val:
        kept = read_checkpoint(os.path.join(args.out_dir, "best.pt"))
        encoder.load_state_dict(kept["model"])
        head.load_state_dict(kept["head"])
        metrics = measure(test)
    name, published = args.encoder or args.ckpt, vision_rows(args.task)
    row = (None, metrics["top1"]) if args.linear_probe else (metrics["top1"], None)
    print(table([args.task, "Finetune", "Linear Probe"], {name: row}, published))
    print(f"{test}: top-1 {metrics['top1']:.2f}, top-5 {metrics['top5']:.2f} after epoch {best['epoch']} of "
          f"{args.epochs}, the best on {val}; {(time.time() - start) / 60:.1f} min, peak memory "
          f"{peak_memory(device):.2f} GB; wrote {os.path.join(args.out_dir, 'best.pt')}")
    return {"ckpt": name, "task": args.task, "split": test, "linear_probe": args.linear_probe,
            "augment": args.augment, "images": len(splits[test].images), "classes": C, "epochs": args.epochs,
            "epoch": best["epoch"], "chosen_on": val, "seed": args.seed, "metrics": metrics,
            "published": published}


def glue_flags(p):
    own = [f"{t:>6}{x.batch_size:>6} per step,{x.epochs:>3} epochs, lr {x.lr:g}" for t, x in GLUE.items()]
    p.description = "\n".join([p.description, "", "Where --batch_size, --epochs or --lr is None:", *own])
    p.section("data and encoder")
    p.knob("task", "all", "one of the nine tasks, or all in turn", choices=["all", *GLUE])
    p.knob("glue_dir", "data/glue", "folder of the tasks' folders, as the official archives unpack "
           "(CoLA/train.tsv) or as the hub has them (cola/train-00000-of-00001.parquet)")
    p.knob("ckpt", "out/bert/ckpt.pt", CKPT_HELP)
    p.knob("text_encoder", None, TEXT_ENCODER_HELP, type=str)
    p.knob("path", None, "file of its published weights, for a machine without a network", type=str)
    p.knob("max_length", 256, "tokens of a text or pair, special ones included; longer ones are cut", least=8)
    p.knob("limit", 0, "examples of each split, for a trial; 0: all")
    p.section("optimisation")
    p.knob("batch_size", None, "examples per optimiser step", type=number(int, 1, math.inf))
    p.knob("dropout", 0.1, "share of what the pooler gives that is dropped in training", most=0.99)
    p.knob("weight_decay", 0.1, "AdamW, on everything")
    train_flags(p, None, None, "out/glue", "false") # batches have many lengths, and each is compiled anew


def glue(args, device, dtype):
    """Finetunes a text encoder (of a multimodal checkpoint without what images share) on GLUE's tasks, each
    from the same weights (CLS token -> pooler, tanh, dropout -> linear), and prints the dev scores. The same
    command again skips finished tasks and continues an unfinished one."""
    # -- all that can be wrong, with any task, before the first is trained
    print_settings(args, device, dtype, use_compile(args.compile, device))
    tasks = [*GLUE] if args.task == "all" else [args.task]
    splits = {task: read_glue(task, args.glue_dir, args.limit) for task in tasks}
    encoder, name = one_encoder(args, "text"), args.text_encoder or args.ckpt
    if not hasattr(encoder, "tokenizer"):
        fail(f"{name} has no tokenizer: give a checkpoint of distill_text.py or distill_multimodal.py")
    if args.max_length > (positions := encoder.config["max_length"]):
        fail(f"--max_length={args.max_length}, but {name} has {positions} positions: give at most that")
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in start.values())).hexdigest()
    # may differ in a continued task; all else, and weights and examples, makes its number
    free = {"task", "glue_dir", "ckpt", "text_encoder", "path", "out_dir", "json", "device", "dtype",
            "compile", "log_interval", "save_interval", "resume", "given"}
    kept, runs, results = {}, {}, {}
    for task in tasks:
        own = {"out_dir": os.path.join(args.out_dir, task), "resume": False}
        for k in "batch_size", "epochs", "lr":
            own[k] = getattr(GLUE[task] if getattr(args, k) is None else args, k)
        runs[task] = run = type(args)(**{**vars(args), **own})
        path, N = os.path.join(run.out_dir, "ckpt.pt"), len(splits[task]["train"][0])
        examples = hashlib.sha256(repr([(texts, y.tolist()) for texts, y in splits[task].values()]).encode())
        kept[task] = {"weights": weights, "examples": examples.hexdigest()}
        if run.batch_size > N:
            fail(f"{task}: --batch_size={run.batch_size}, but there are {N} training examples: too few")
        if os.path.exists(path):
            old = read_checkpoint(path)
            changed = [f"--{k}={v}, not --{k}={getattr(run, k)}" for k, v in old["args"].items()
                       if k not in free and v != getattr(run, k)]
            changed = changed or [f"other {k} than {name if k == 'weights' else args.glue_dir} has now"
                                  for k, v in kept[task].items() if old.get(k) != v]
            if changed:
                fail(f"{path} was made with {'; '.join(changed)}. Use the same, or another --out_dir.")
            run.resume = not old.get("finished", True)
            if not run.resume:
                results[task] = old["best"]

    # -- each in turn
    for task, run in runs.items():
        if task not in results:
            encoder.load_state_dict(start)
            kept[task]["tokenizer"] = encoder.tokenizer.text
            results[task] = finetune_task(task, run, splits[task], encoder, kept[task], device, dtype)
        if os.path.exists(best := os.path.join(run.out_dir, "best.pt")): # nothing is left to resume
            os.replace(best, os.path.join(run.out_dir, "ckpt.pt"))
        found = ", ".join(f"{k} {v:.2f}" for k, v in results[task].items() if k != "epoch")
        print(f"{task}: {found} on dev in epoch {results[task]['epoch']} of {run.epochs}: {run.out_dir}")

    scores = {task: next(iter(metrics.values())) for task, metrics in results.items()}
    row = glue_row(scores | {"mismatched": results.get("mnli", {}).get("mismatched")})
    published = {name: dict(zip(GLUE, values)) for name, values in PUBLISHED_GLUE.items()}
    mnli, *titles = [task.title for task in GLUE.values()]
    print(table(["Model", mnli, "-mm", *titles, "Score", "+WNLI"], {name: row},
                {name: glue_row(values) for name, values in published.items()}, 8))
    print(GLUE_NOTE)
    return {"ckpt": name, "split": "dev", "chosen_on": "dev", "seed": args.seed, "limit": args.limit,
            "tasks": results, "score": row[-2], "score_with_wnli": row[-1], "published": published}


COMMANDS = {"retrieval": (retrieval_flags, retrieval), "zeroshot": (zeroshot_flags, zeroshot),
            "knn": (knn_flags, knn), "finetune": (finetune_flags, finetune), "glue": (glue_flags, glue)}


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
    flags, work = COMMANDS[command]
    parser = Parser(inspect.getdoc(work)) # without the indentation
    parser.prog = f"evaluate.py {command}"
    flags(parser)
    args = parser.parse(argv[1:])
    args.command = command
    return args


def main(argv=None):
    args = get_args(sys.argv[1:] if argv is None else argv)
    device = pick_device(args.device)
    result = COMMANDS[args.command][1](args, device, pick_dtype(args.dtype, device))
    if args.json:
        write_json(args.json, result)
        print(f"wrote {args.json}")
    return result


if __name__ == "__main__":
    main()
