"""
Measure a checkpoint and print a table. The metrics are pure functions, which the training loops import too.

    python evaluate.py retrieval                              # out/tiny/ckpt.pt on the OpenMoji test set
    python evaluate.py retrieval --ckpt=out/mine/ckpt.pt --data=coco --json=coco.json
    python evaluate.py retrieval --picture=retrieval.png      # what it finds, drawn as a grid
    python evaluate.py retrieval --help

Shapes: N images, M captions, D embed_dim, Q queries, G gallery items, K the length of a result list.
"""
import io
import math
import sys
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from model import (Parser, fail, load_checkpoint, load_encoder, nearest, normalize, pick_device, pick_dtype, save_atomic,
                   write_json)
from prepare_pairs import Pairs, decode, eval_image

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
    if torch.is_tensor(text_to_image):
        text_to_image = text_to_image.cpu().numpy()
    owner = np.asarray(text_to_image)
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
    queries (Q, D), gallery (G, D): unit vectors; owners int64. Returns (Q,) int64. Memory: chunk x G."""
    order = gallery_order(len(gallery)) # before the product: its rounding depends on the column
    gallery, gallery_owner = gallery[order], gallery_owner[order]
    position = torch.arange(len(gallery))
    ranks = []
    for q, owner in zip(queries.split(chunk), query_owner.split(chunk)):
        scores = q @ gallery.T # (chunk, G)
        right = owner[:, None] == gallery_owner # (chunk, G)
        best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True) # (chunk, 1)
        equal = scores == best
        first = (equal & right).int().argmax(1, keepdim=True) # argmax: the first of equal values
        ranks.append(1 + ((scores > best) | (equal & (position < first))).sum(1))
    return torch.cat(ranks)


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
    recalls = [[(ranks <= k).double().mean().item() * 100 for k in (1, 5, 10)] for ranks in
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

# R@1, 5, 10 image -> text, then text -> image, on the test sets of 5,000 and 1,000 images. (!): see NOTES
PUBLISHED = {
    "coco": {
        "data2vec 2.0 image + text, unaligned": (0.02, 0.08, 0.19, 0.01, 0.10, 0.19),
        "MM-D2V2, data2vec 2.0 teacher": (4.24, 12.12, 17.96, 1.77, 6.54, 10.91),
        "MM-D2V2, BEiTv2 teacher": (31.72, 56.78, 67.9, 12.42, 31.05, 42.5),
        "MM-D2V2 7": (30.24, 56.48, 67.46, 11.96, 30.48, 41.88),
        "MM-D2V2 7_2": (32.78, 58.34, 69.3, 12.83, 31.85, 43.4),
        "S-SMKE_CDL_MB": (53.54, 81.1, 89.52, 35.65, 66.0, 77.77),
        "FLAVA": (42.74, 76.76, None, 38.38, 67.47, None),
        "CLIP L/14-336": (58.4, 81.5, 88.1, 37.8, 62.4, 72.2)},
    "flickr30k": {
        "data2vec 2.0 image + text, unaligned (!)": (0.02, 0.12, 0.18, 0.02, 0.06, 0.12),
        "MM-D2V2, data2vec 2.0 teacher (!)": (1.2, 4.88, 8.18, 0.54, 2.52, 4.58),
        "MM-D2V2, BEiTv2 teacher (!)": (7.7, 26.18, 37.6, 4.08, 17.01, 24.26),
        "MM-D2V2 7 (!)": (7.36, 26.42, 36.6, 3.7, 16.58, 23.84),
        "MM-D2V2 7_2 (!)": (8.08, 27.92, 38.6, 4.14, 17.5, 24.82),
        "S-SMKE_CDL_MB": (70.9, 92.1, 96.0, 52.72, 80.2, 87.46),
        "FLAVA": (67.7, 94.0, None, 65.22, 89.38, None),
        "CLIP L/14-336": (88.0, 98.7, 99.4, 68.7, 90.6, 95.2)}}
NOTES = {
    "coco": "MM-D2V2 and S-SMKE were trained on COCO's training images: COCO is not zero-shot for them.",
    "flickr30k": "(!) scored with a wrong index, each image five times with one valid caption each;\n"
                 "corrected by the author later: expect much higher numbers from the same model here."}


def retrieval_table(rows):
    """rows: pairs of a name and a dict as from retrieval_metrics, None where none was published -> text."""
    keys = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + ["mean"]
    width = max(len(name) for name, _ in [("Model", {}), *rows])
    cells = lambda values: "{:>8}{:>7}{:>7}  {:>8}{:>7}{:>7}  {:>7}".format(*values)
    lines = [" " * width + f"{'Image -> Text':>22}  {'Text -> Image':>22}",
             f"{'Model':{width}}" + cells(["R@1", "R@5", "R@10"] * 2 + ["mean"])]
    lines.append("-" * len(lines[1]))
    for name, row in rows:
        lines.append(f"{name:{width}}" + cells(["-" if row[k] is None else f"{row[k]:.2f}" for k in keys]))
    return "\n".join(lines)


@torch.no_grad()
def embed_pairs(model, pairs, batch_size, device, dtype, squash=False):
    """Every image and every caption once, in order -> image_emb (N, D), text_emb (M, D), float32 on the CPU.
    The model, already on device, runs in eval mode under autocast to dtype and gets its old mode back."""
    def encode_images(batch):
        images = torch.stack([eval_image(data, model.img_size, squash) for data in batch]) # (B, 3, H, W)
        return model.encode_image(normalize(images.to(device)))

    def encode_texts(batch):
        ids, padding_mask = model.tokenizer.encode(batch, model.max_length) # (B, T) each
        return model.encode_text(ids.to(device), padding_mask.to(device))

    modes = {module: module.training for module in model.modules()}
    model.eval()
    embs = []
    for items, encode in (pairs.images, encode_images), (pairs.captions, encode_texts):
        starts, out = range(0, len(items), batch_size), []
        for i in tqdm(starts, desc="embedding", leave=False, disable=len(starts) < 20):
            batch = [items[j] for j in range(i, min(i + batch_size, len(items)))]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                out.append(encode(batch).float().cpu()) # (B, D)
        embs.append(torch.cat(out))
    for module, mode in modes.items():
        module.training = mode
    return tuple(embs)


class Unaligned(torch.nn.Module):
    """Two encoders that never met, as one model: the baseline that says what alignment is worth."""

    def __init__(self, image, text):
        super().__init__()
        widths = image.config["embed_dim"], text.config["embed_dim"]
        if widths[0] != widths[1]:
            fail(f"the image encoder is {widths[0]} wide, the text encoder {widths[1]}: their embeddings cannot be compared")
        self.image, self.text, self.tokenizer = image, text, text.tokenizer
        self.encode_image, self.encode_text = image.encode, text.encode
        self.img_size, self.max_length = image.img_size, text.max_length


def evaluate_retrieval(model, pairs, batch_size=256, device=torch.device("cpu"), dtype=torch.float32,
                       squash=False):
    """embed_pairs, then retrieval_metrics -> (metrics, image_emb, text_emb)."""
    image_emb, text_emb = embed_pairs(model, pairs, batch_size, device, dtype, squash)
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
            canvas.paste(ImageOps.fit(decode(pairs.images[item]), (cell, cell), Image.LANCZOS), (x, y))
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
# subcommands: each is a pair of functions, its flags and its work


def retrieval_flags(doc):
    p = Parser(doc)
    p.section("data")
    p.knob("data", "openmoji", "name of the prepared pairs: DATA_DIR/NAME; for coco and flickr30k published rows are printed")
    p.knob("split", "test", "which of its splits")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("squash", False, "squash images to a square, as the thesis does, and do not crop")
    p.section("run")
    p.knob("ckpt", "out/tiny/ckpt.pt", "checkpoint of a model with both encoders")
    p.knob("image_encoder", None, "instead of CKPT: an image encoder that knows nothing of the text encoder, data2vec2_image, "
           "beitv2 or a checkpoint of distill_image.py", type=str)
    p.knob("text_encoder", None, "and a text encoder as wide: data2vec2_text or bert", type=str)
    p.knob("image_path", None, "file of the image encoder's published weights, for a machine without a network", type=str)
    p.knob("text_path", None, "file of the text encoder's published weights, its tokenizer's files beside it", type=str)
    p.knob("batch_size", 256, "images or captions at a time: memory and speed", least=1)
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, else float16 on CUDA",
           choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("json", None, "write the numbers to this file too", type=str)
    p.knob("picture", None, "draw some queries and what was found for them, as a PNG", type=str)
    return p


def retrieval(args):
    """Image-text retrieval: recall at 1, 5 and 10 both ways, and the median rank of the true partner."""
    device = pick_device(args.device)
    if (args.image_encoder is None) != (args.text_encoder is None):
        fail("--image_encoder and --text_encoder go together")
    if args.image_encoder and "ckpt" in args.given:
        fail("--ckpt is a model with both encoders: give it or --image_encoder and --text_encoder")
    name = args.ckpt
    if args.image_encoder:
        name = f"{args.image_encoder} + {args.text_encoder}"
        model = Unaligned(load_encoder(args.image_encoder, "image", args.image_path),
                          load_encoder(args.text_encoder, "text", args.text_path)).to(device)
    else:
        model = load_checkpoint(args.ckpt).to(device)
    if not all(hasattr(model, name) for name in ("encode_image", "encode_text", "tokenizer")):
        fail(f"{args.ckpt} does not embed both images and text. Retrieval needs a checkpoint that "
             "distill_multimodal.py wrote: python distill_multimodal.py --preset=tiny")
    pairs = Pairs(args.data_dir, args.data, args.split)
    N, M = len(pairs.images), len(pairs.captions)
    print(f"{args.data} {args.split}: {N:,} images, {M:,} captions (all there are), images "
          f"{'squashed to a square' if args.squash else 'resized by the short side, centre crop'}")
    metrics, image_emb, text_emb = evaluate_retrieval(model, pairs, args.batch_size, device,
                                                      pick_dtype(args.dtype, device), args.squash)
    chance = chance_row(pairs.text_to_image, N)
    published = PUBLISHED.get(args.data, {}) if args.split == "test" else {}
    published = {name: summary(row[:3], row[3:]) for name, row in published.items()}
    print(retrieval_table([(name, metrics), ("chance", chance)] +
                          [(f"{name}, published", row) for name, row in published.items()]))
    if published:
        print(NOTES[args.data])
    i2t, t2i = median_rank_chunks(image_emb, text_emb, pairs.text_to_image)
    size = min(N, 1000)
    print(f"median rank among {size:,}: image -> text {i2t:g}, text -> image {t2i:g} (1 = best, "
          f"chance {(size + 1) / 2:g})")
    result = {"ckpt": name, "data": args.data, "split": args.split, "squash": args.squash, "images": N,
              "captions": M, "metrics": metrics, "chance": chance, "published": published,
              "median_rank": {"i2t": i2t, "t2i": t2i, "among": size, "chance": (size + 1) / 2}}
    if args.json:
        write_json(args.json, result)
        print(f"wrote {args.json}")
    if args.picture:
        draw_retrieval(pairs, image_emb, text_emb, args.picture)
        print(f"wrote {args.picture}")
    return result


COMMANDS = {"retrieval": (retrieval_flags, retrieval)}


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
    parser = flags(work.__doc__)
    parser.prog = f"evaluate.py {command}"
    args = parser.parse(argv[1:])
    args.command = command
    return args


def main(argv=None):
    args = get_args(sys.argv[1:] if argv is None else argv)
    return COMMANDS[args.command][1](args)


if __name__ == "__main__":
    main()
