"""
Distils a vision-language student: an image encoder, a text encoder and shared blocks on top learn, from
image-text pairs, to predict an image teacher's CLS token from the image and from its caption, and to agree
with each other.

    python distill_multimodal.py --preset=tiny          # no download, no GPU: data and teacher are made first
    python distill_multimodal.py --batch_size=256       # the thesis' MM-D2V2 with BEiTv2 as teacher, on COCO
    python distill_multimodal.py --preset=smke --data=coco,cc3m,cc12m  # its final form, our recommendation

Ends with a retrieval table, a picture of it and out/<run>/ckpt.pt; the first takes five minutes on two CPU
cores and finds about 26 % of 300 held-out families among its first ten. Any flag below can follow; --resume
continues a run that was stopped. Eq. numbers are those of the thesis (README, "Credits").
"""
import argparse
import copy
import glob
import hashlib
import math
import os
import shlex
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from model import (PRETRAINED, Parser, Stop, Tokenizer, VisionLanguageModel, WholeBatch, cache_folder,
                   check_resume, continuing, fail, finite_rows, gather, git_sha, ignore_signals, is_finished,
                   join_ranks, keep_blocks, kept_patches, load_encoder, load_optimizer, load_pretrained,
                   load_weights, loader_processes, log_record, nearest, normalize, open_log, open_run,
                   peak_memory, pick_device, pick_dtype, print_settings, random_patch_mask, run_script,
                   save_atomic, save_checkpoint, split_batch, sum_over_ranks, use_compile)
from prepare_pairs import SOURCES, Bad, augment, open_pairs, train_image

# -----------------------------------------------------------------------------
# presets and knobs

PRESETS = {
    # 5 modality-specific blocks and 1 shared block regress BEiTv2's CLS token from image and text, MSE + MSE,
    # no alignment loss. These are the defaults of the knobs below. Different here: no weight decay on biases
    # and norms; the thesis' documents say 40,000 steps, and 60,000.
    "mmd2v2_beit": dict(lr=5e-4, max_steps=40000, warmup_steps=4000),
    # the same with data2vec 2.0's own image model as teacher
    "mmd2v2": dict(teacher="data2vec2_image", max_length=197, lr=5e-4, max_steps=40000, warmup_steps=4000,
                   out_dir="out/mmd2v2"),
    # mmd2v2_beit with one more block for each modality
    "mmd2v2_7": dict(depth=6, text_depth=6, lr=5e-4, max_steps=40000, warmup_steps=4000,
                     out_dir="out/mmd2v2_7"),
    # mmd2v2_beit with one more shared block
    "mmd2v2_7_2": dict(shared_depth=2, lr=5e-4, max_steps=40000, warmup_steps=4000,
                       out_dir="out/mmd2v2_7_2"),
    # SHRe (eq. 28-31) with Transformers as encoders: the logits of a supervised ResNet-50, a shared MLP, the
    # ranking loss inside it. The thesis' own, SHRe_T, has --align_loss=contrastive, at the MLP's logits too;
    # later --shared=transformer --batch_size=512 --lr=2e-4 --max_steps=44636 --warmup_steps=4463 with it (and
    # --align_weight=1). Its teacher is timm's resnet50.a1_in1k: --path takes that file. Eq. 30 is a sum over
    # 256 pairs, which would drown the other term; the weight makes it the mean over them.
    "shre": dict(teacher="resnet50", text_init="bert", freeze_embeddings=False, depth=6, text_depth=6,
                 shared="mlp", shared_norm_first=True, head=True, kd_loss="kl", kd_weight=0.5,
                 align_loss="ranking", align_weight=1 / 256, align_levels=2, crop_min=0.9, lr=1e-4,
                 max_steps=89273, warmup_steps=8927, eval_interval=5000, out_dir="out/shre"),
    # CLIP's loss and projections on the encoders of smke, no teacher
    "clip": dict(text_init="bert", freeze_embeddings=False, depth=6, text_depth=6, shared="projection",
                 kd_loss="none", align_loss="contrastive", crop_min=0.9, batch_size=512, lr=2e-4,
                 max_steps=44636, warmup_steps=4463, eval_interval=5000, out_dir="out/clip"),
    # S-SMKE with contrastive distillation and memory bank: 11.2 hours on two RTX 4090 in the thesis.
    # Different here: all 512 pairs on one card (--micro_batch_size=256 if they do not fit), a queue that
    # starts empty, no image as its own negative; the teacher sees the student's crop, there one of its own
    "smke": dict(final_norm=False, text_init="bert", freeze_embeddings=False, depth=6, text_depth=6,
                 shared_norm_first=True, head=True, token_types=True, kd_loss="contrastive", kd_weight=0.5,
                 queue_size=65536, align_loss="contrastive", align_levels=2, crop_min=0.9, batch_size=512,
                 lr=2e-4, max_steps=44636, warmup_steps=4463, eval_interval=5000, out_dir="out/smke"),
    # OpenMoji, two CPU cores, five minutes with the teacher; the numbers stand in the README. Everything was
    # tuned on families of the training split (README, "How the tiny preset was tuned").
    "tiny": dict(
        data="openmoji", unit="label", out_dir="out/tiny", teacher="out/tiny_teacher/ckpt.pt",
        image_init="teacher", text_init="random", freeze_embeddings=False, img_size=48, patch_size=12,
        embed_dim=192, num_heads=3, depth=4, text_depth=2, max_length=24, rotate=15.0, color=0.2,
        mask_ratio=0.5, head=True, token_types=True, kd_loss="contrastive", kd_target="mean", kd_weight=0.2,
        align_loss="contrastive", word_weight=2.0, cache_targets=True, label_smoothing=0.1, batch_size=512,
        lr=1e-3, max_steps=450, warmup_steps=30, weight_decay=0.05, grad_clip=3.0, eval_interval=80,
        save_interval=80, log_interval=20),
}


PUBLISHED = { # the first line of a run: which system of the thesis, COCO R@1 image to text / text to image
    "mmd2v2_beit": "MM-D2V2 with BEiTv2 as teacher, 31.7 / 12.4; its final form, --preset=smke, 53.5 / 35.7",
    "mmd2v2": "MM-D2V2 with data2vec 2.0 as teacher, 4.2 / 1.8", "mmd2v2_7": "MM-D2V2 7, 30.2 / 12.0",
    "mmd2v2_7_2": "MM-D2V2 7_2, 32.8 / 12.8",
    "shre": "SHRe, only with --align_loss=contrastive: 37.1 / 25.3, and --shared=transformer: 44.6 / 31.7",
    "clip": "CLIP, not at all; the nearest, smke without a teacher: mean recall 70.0 / 58.1",
    "smke": "S-SMKE on --data=coco,cc3m,cc12m, 53.5 / 35.7"}

# what makes the model: cannot change on --resume
MODEL_KNOBS = ["img_size", "patch_size", "embed_dim", "num_heads", "depth", "text_depth", "shared",
               "shared_depth", "shared_init", "max_length", "shared_norm_first", "head", "token_types",
               "image_init", "text_init", "freeze_embeddings", "align_levels", "word_weight"]
# flag -> another flag and its values with which it has no effect; given with them, it is refused
NO_EFFECT = {"temperature": ("kd_loss", "mse l1 contrastive none"), "kd_scale": ("kd_loss", "mse l1 kl none"),
             "queue_size": ("kd_loss", "mse l1 kl none"), "kd_target": ("kd_loss", "kl none"),
             "cache_targets": ("kd_loss", "none"), "kd_weight": ("kd_loss", "none"),
             "margin": ("align_loss", "contrastive none"), "label_smoothing": ("align_loss", "ranking none"),
             "align_weight": ("align_loss", "none"), "align_levels": ("align_loss", "none"),
             "shared_depth": ("shared", "mlp projection"), "shared_norm_first": ("shared", "mlp projection")}


def get_args(argv=None):
    p = Parser(__doc__, PRESETS)
    p.section("data")
    p.knob("data", "coco", "name of the prepared pairs, DATA_DIR/NAME, or of several: coco,cc3m,cc12m trains "
           "on all and validates on the first that has a validation split")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("unit", "caption", "what an epoch runs over once: every caption; every image, with a random "
           "caption; every label (OpenMoji: family), with a random image of it",
           choices=["caption", "image", "label"])
    p.knob("max_length", 64, "text tokens with CLS and SEP, at most; longer captions are cut", least=3)
    p.knob("crop_min", 0.6, "smallest area of the random crop, as a share of the picture; near 1 keeps what "
           "the caption speaks of, less makes the images more varied", most=1)
    p.knob("flip", 0.5, "probability of a mirror image", most=1)
    p.knob("rotate", 0.0, "rotate by up to this many degrees; for drawings, photographs get white corners",
           most=180)
    p.knob("color", 0.0, "vary colours by up to this share", most=1)
    p.knob("mask_ratio", 0.0, "share of each image's patches hidden from the student in training: left out, "
           "which saves their time for more steps or a larger batch (FLIP, Li et al. 2023); "
           "teacher and evaluation see all", most=0.99)
    p.knob("num_workers", loader_processes(), "processes that decode images, for each rank; 0 decodes "
           "between the steps")
    p.section("model")
    p.knob("teacher", "beitv2", "image teacher: beitv2 or data2vec2_image (downloaded once), or a checkpoint "
           "of distill_image.py; for --kd_loss=kl resnet50")
    p.knob("path", None, "file of its published weights, for a machine without a network", type=str)
    p.knob("final_norm", True, "beitv2: the target is normed as in the teacher's pretraining")
    p.knob("kd_target", "cls", "what the student predicts: the teacher's CLS token or the mean of "
           "its patch tokens", choices=["cls", "mean"])
    p.knob("cache_targets", False, "compute the teacher's target of each training image once, before the "
           "first step, from the evaluation transform (the student still sees random crops), and keep it in "
           "DATA_DIR for later runs; saves the teacher's pass in every step and gives image and caption a "
           "target without noise, but costs one pass over the set")
    p.knob("image_init", "data2vec2_image", "image encoder: embeddings and first DEPTH blocks of the "
           "teacher, of data2vec2_image, of beitv2, of a checkpoint of distill_image.py; or random")
    p.knob("image_path", None, "file of the image encoder's published weights, for a machine "
           "without a network", type=str)
    p.knob("text_init", "data2vec2_text", "text encoder: embeddings and first TEXT_DEPTH blocks of "
           "data2vec2_text, bert or minilm, whose tokenizer is taken too; "
           "or random, with the data set's tokenizer")
    p.knob("text_path", None, "file of the text encoder's published weights, its tokenizer's files beside it",
           type=str)
    p.knob("freeze_embeddings", True, "an encoder that starts from a published one keeps its patch or token "
           "embeddings, positions and their norm")
    p.knob("img_size", 224, "side of the square images in pixels", least=1)
    p.knob("patch_size", 16, "side of a patch in pixels", least=1)
    p.knob("embed_dim", 768, "width of all blocks", least=4)
    p.knob("num_heads", 12, "attention heads of all blocks", least=1)
    p.knob("depth", 5, "modality-specific blocks of the image encoder", least=1)
    p.knob("text_depth", 5, "modality-specific blocks of the text encoder", least=1)
    p.knob("shared", "transformer", "what image and text pass through on top: SHARED_DEPTH transformer "
           "blocks; mlp: SHRe's, of the CLS token alone, its last layer is --head; projection: nothing "
           "shared, one linear layer for each modality, as in CLIP",
           choices=["transformer", "mlp", "projection"])
    p.knob("shared_depth", 1, "shared transformer blocks")
    p.knob("shared_init", "random", "shared transformer blocks start as random ones or, text, as the last "
           "SHARED_DEPTH blocks of the model that TEXT_INIT names", choices=["random", "text"])
    p.knob("shared_norm_first", False, "shared blocks as in S-SMKE: pre-norm, with LayerScale (which token "
           "types get too), keys without bias; instead of post-norm ones (MM-D2V2), whose output, the "
           "embedding, comes out of a LayerNorm")
    p.knob("head", False, "predict the target through LayerNorm and a linear layer instead of the "
           "CLS token itself")
    p.knob("token_types", False, "add a learned vector per modality before the shared blocks")
    p.section("loss")
    p.knob("kd_loss", "mse", "distance to the teacher's target, for image and for text: mse and l1 on the "
           "features; kl on a classifier's logits (resnet50); contrastive: find the own target among those "
           "of the batch and the queue; none", choices=["mse", "l1", "kl", "contrastive", "none"])
    p.knob("kd_weight", 1.0, "weight of the sum of the image and the text term")
    p.knob("temperature", 1.0, "kl: divides the logits of both; above 1, unlikely classes count more",
           least=0.001)
    p.knob("kd_scale", 1 / 0.07, "contrastive kd_loss: what multiplies the cosines (not learned)",
           least=0.001)
    p.knob("queue_size", 0, "contrastive kd_loss: targets of earlier batches kept as further negatives")
    p.knob("align_loss", "none", "between image and text embeddings: contrastive (eq. 27), with learned "
           "temperature, or ranking (eq. 30)", choices=["contrastive", "ranking", "none"])
    p.knob("align_levels", 1, "where they are compared: 1, the embedding; 2, also the first layer of the "
           "MLP that is shared or in the last shared block, with a temperature of its own; the loss is their "
           "mean", least=1, most=2)
    p.knob("align_weight", 1.0, "weight of the alignment loss")
    p.knob("label_smoothing", 0.0, "contrastive align_loss: share of the target spread over the whole batch",
           most=1)
    p.knob("word_weight", 0.0, "weight of the word loss: each embedding predicts the tokens of its caption, "
           "which ties captions that share a word; helps where pairs are few")
    p.knob("margin", 0.2, "ranking align_loss: margin in cosine")
    p.section("optimisation")
    p.knob("batch_size", 256, "pairs per optimiser step, over all ranks", least=2)
    p.knob("micro_batch_size", 0, "pairs per forward pass of each rank, 0: all; the result is the same "
           "(gradient caching), memory falls, one forward pass more is paid")
    p.knob("max_steps", 40000, "optimiser steps", least=1)
    p.knob("lr", 5e-4, "peak learning rate, used as it is: not scaled by the batch size")
    p.knob("min_lr", 0.0, "learning rate at the end of the cosine")
    p.knob("warmup_steps", 4000, "steps of linear warm-up")
    p.knob("weight_decay", 0.01, "AdamW, on matrices; not on biases, norms, positions, embeddings")
    p.knob("grad_clip", 0.0, "largest norm of the gradient, 0: no clipping")
    p.section("run")
    p.knob("out_dir", "out/mmd2v2_beit", "folder for ckpt.pt, log.jsonl, retrieval.png, retrieval.json")
    p.knob("resume", False, "continue the run in OUT_DIR")
    p.knob("seed", 0, "of all that is random", most=2 ** 31 - 1)
    p.knob("log_interval", 50, "steps between log lines", least=1)
    p.knob("eval_interval", 1000, "steps between validations", least=1)
    p.knob("save_interval", 1000, "steps between checkpoints", least=1)
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, "
           "else float16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("compile", "auto", "torch.compile the models; auto: on CUDA under Linux", type=str.lower,
           choices=["auto", "true", "false"], nargs="?", const="true")
    return p.parse(argv)


# -----------------------------------------------------------------------------
# losses, all float32 scalars


def contrastive_loss(image, text, logit_scale, label_smoothing=0.0):
    """Eq. 27: mean of the cross-entropies of image to text and text to image, each a mean over the batch; the
    other pairs of the batch are the negatives. image, text (B, D), L2-normalised; logit_scale multiplies the
    cosines."""
    logits = torch.as_tensor(logit_scale).float() * image.float() @ text.float().T # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own, label_smoothing=label_smoothing)
            + F.cross_entropy(logits.T, own, label_smoothing=label_smoothing)) / 2


def ranking_loss(image, text, margin):
    """Eq. 30, one direction, the plain sum over i and j != i of max(0, margin - cos(x_i, y_i) +
    cos(x_i, y_j)). image, text (B, D), L2-normalised. 0 for B = 1."""
    cosine = image.float() @ text.float().T # (B, B)
    violation = (margin - cosine.diagonal()[:, None] + cosine).clamp(min=0)
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    return violation.masked_fill(own, 0).sum()


def kl_loss(student_logits, teacher_logits, temperature):
    """One term of eq. 28: KL(teacher || student) between the softmax of logits / temperature, (B, C) each;
    sum over classes, mean over the batch, not multiplied by temperature^2."""
    student, teacher = (F.log_softmax(x.float() / temperature, dim=-1)
                        for x in (student_logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def contrastive_kd_loss(student_out, target, group, queue, scale):
    """Cross-entropy of finding one's own target among those of the batch and of the queue, mean over the
    batch.

    student_out, target (B, D), any norm; group (B,): samples of one group (the same image) are never each
    other's negatives; queue: (targets (Q, D) normalised, groups (Q,)) or None; scale multiplies the
    cosines."""
    bank, bank_group = F.normalize(target.float(), dim=-1), group
    if queue is not None:
        bank, bank_group = torch.cat([bank, queue[0]]), torch.cat([group, queue[1]]) # (B + Q, D), (B + Q,)
    logits = scale * F.normalize(student_out.float(), dim=-1) @ bank.T # (B, B + Q)
    same = (group[:, None] == bank_group[None]).fill_diagonal_(False) # one's own target stays in
    own = torch.arange(len(group), device=logits.device)
    return F.cross_entropy(logits.masked_fill(same, float("-inf")), own)


def word_targets(ids, padding_mask, vocab_size):
    """What the word loss predicts, (B, vocab_size) float32: the distinct tokens of each caption, without CLS
    and SEP, all equally likely."""
    real = ~padding_mask # (B, T)
    real.scatter_(1, real.sum(1, keepdim=True) - 1, False) # SEP
    real[:, 0] = False # CLS
    words = torch.zeros(len(ids), vocab_size, device=ids.device).scatter_add_(
        1, ids, real.float()).clamp(max=1)
    return words / words.sum(1, keepdim=True).clamp(min=1)


def loss_terms(outputs, target, group, queue, words, student, args):
    """The terms of the loss by name, unweighted, and their weighted sum. outputs: what VisionLanguageModel
    returns, for the whole batch; words: from word_targets, None without word loss."""
    image_cls, text_cls, image_out, text_out, *inner = (x.float() for x in outputs)
    terms, total = {}, 0.0
    for name, out in (("kd_image", image_out), ("kd_text", text_out)):
        if args.kd_loss == "mse":
            terms[name] = F.mse_loss(out, target) # mean over batch and channels
        elif args.kd_loss == "l1":
            terms[name] = F.l1_loss(out, target)
        elif args.kd_loss == "kl":
            terms[name] = kl_loss(out, target, args.temperature)
        elif args.kd_loss == "contrastive":
            terms[name] = contrastive_kd_loss(out, target, group, queue, args.kd_scale)
        total = total + args.kd_weight * terms.get(name, 0.0)
    if args.align_loss != "none":
        levels = [(image_cls, text_cls), inner][:1 + bool(inner)]
        losses = []
        for (image, text), scale in zip(levels, student.log_scale.exp().view(-1)):
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            losses.append(ranking_loss(image, text, args.margin) if args.align_loss == "ranking" else
                          contrastive_loss(image, text, scale, args.label_smoothing))
        terms["align"] = sum(losses) / len(losses)
        total = total + args.align_weight * terms["align"]
    if words is not None: # Joulin et al. 2016, for the image and for the text
        terms["words"] = (F.cross_entropy(student.words(image_cls), words) +
                          F.cross_entropy(student.words(text_cls), words)) / 2
        total = total + args.word_weight * terms["words"]
    return total, terms


# -----------------------------------------------------------------------------
# batches: everything random is a function of (seed, epoch, position), so a resumed run sees what it would
# have seen


class TrainPairs(torch.utils.data.Dataset):
    """Samples of a prepared training split; the index is (epoch, position, unit), see batch_order."""

    def __init__(self, pairs, tokenizer, args):
        self.pairs, self.tokenizer, self.args = pairs, tokenizer, args
        owner = pairs.text_to_image
        counts = np.bincount(owner, minlength=len(pairs.images))
        self.by_image, self.first = np.argsort(owner, kind="stable"), np.cumsum([0, *counts])
        if args.unit == "label" and pairs.labels is None:
            fail(f"--unit=label, but data set {args.data} has no labels. Use --unit=caption or --unit=image.")
        # group: what is never its own negative in the distillation loss; a label (OpenMoji: family) if there
        # is one, since its pictures differ in details only, else the image
        self.group = np.arange(len(pairs.images)) if pairs.labels is None else pairs.labels
        self.images_of = []
        if args.unit == "label":
            order = np.argsort(self.group, kind="stable")
            self.images_of = np.split(order, np.flatnonzero(np.diff(self.group[order])) + 1)
        self.num_units = {"caption": len(pairs.captions), "image": len(pairs.images),
                          "label": len(self.images_of)}[args.unit]

    def __getitem__(self, index):
        """Image (3, H, W) uint8, caption, number of the image, and which images could not be read before."""
        epoch, position, unit = index
        rng, bad = np.random.default_rng((self.args.seed, epoch, position)), []
        while len(bad) <= 10: # or are too many
            if self.args.unit == "caption":
                i, caption = self.pairs.text_to_image[unit], unit
            else:
                images = self.images_of[unit] if self.args.unit == "label" else [unit]
                i = images[rng.integers(len(images))]
                caption = self.by_image[rng.integers(self.first[i], self.first[i + 1])]
            try:
                image = train_image(self.pairs.images[i], self.args.img_size, self.args.crop_min, rng)[0]
                return image, self.pairs.captions[caption], int(i), bad
            except Bad: # another in its place
                bad.append(int(i))
                unit = rng.integers(self.num_units)
        return torch.zeros(3, self.args.img_size, self.args.img_size, dtype=torch.uint8), "", 0, bad

    def collate(self, samples):
        """Samples -> images (B, 3, H, W) uint8, ids (B, T), padding_mask (B, T), index of each image (B,) and
        of those that could not be read."""
        images, captions, index, bad = zip(*samples)
        return (torch.stack(images), *self.tokenizer.encode(captions, self.args.max_length),
                torch.tensor(index), sum(bad, []))


def batch_order(num_units, batch_size, seed, step):
    """Yields for each step, from `step` on and for ever, its list of (epoch, position, unit). An epoch is one
    permutation of the units; the rest that fills no batch is left out, other units in each epoch."""
    per_epoch = num_units // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(num_units)
        for k in range(first, per_epoch):
            where = range(k * batch_size, (k + 1) * batch_size)
            yield [(epoch, position, int(order[position])) for position in where]
            step += 1


def validation_batch(pairs, tokenizer, args):
    """Every image of the split, evaluation transform, with its first caption: images (N, 3, H, W) uint8, ids,
    mask."""
    _, first = np.unique(pairs.text_to_image, return_index=True)
    images = evaluate.EvalImages(pairs.images, args.img_size).stack(range(len(pairs.images)))
    return images, *tokenizer.encode([pairs.captions[j] for j in first], args.max_length)


# -----------------------------------------------------------------------------
# the teacher's targets, once for all runs


def cached_targets(target_of, teacher, dim, images, args, device, batch_size):
    """The target of every training image, from the evaluation transform, as (images, dim) float16: a file
    beside the data set, mapped into memory. Its name has a hash of the teacher's weights, the transform and
    the images' index (the lengths of the records), so that no run reads what was made from others."""
    digest = hashlib.sha256(f"{args.kd_target} {args.img_size} {args.dtype} {device.type}".encode())
    for x in teacher.state_dict().values(): # the final norm is among them, or not
        digest.update(x.cpu().numpy().tobytes())
    for part in getattr(images, "datasets", [images]): # of sets that were joined
        digest.update(part.offsets.tobytes())
    start = os.path.join(args.data_dir, f"{args.data}_targets_")
    path = f"{start}{digest.hexdigest()[:12]}.npy"
    print(f"teacher's targets of {len(images):,} images, {len(images) * dim * 2 / 1e9:.3f} GB, "
          f"{'read from' if os.path.exists(path) else 'go to'} {path}", flush=True)
    for other in sorted({*glob.glob(glob.escape(start) + "*.npy*")} - {path}): # and what a kill left
        print(f"  {other} is not used: of another teacher, transform or state of the data set, or cut short. "
              f"Remove it if no run needs it.")

    def write(f):
        np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False,
                                                 "shape": (len(images), dim)})
        pictures = evaluate.EvalImages(images, args.img_size)
        loader = torch.utils.data.DataLoader(pictures, batch_size, num_workers=args.num_workers)
        for batch in tqdm(loader, desc="teacher's targets", disable=not sys.stderr.isatty()):
            target = target_of(normalize(pictures.images_of(batch).to(device))).half().cpu()
            if not target.isfinite().all():
                fail(f"--teacher={args.teacher} gives targets that are not finite in half precision: run "
                     f"without --cache_targets, or with --dtype=float32")
            f.write(target.numpy().astype("<f2").tobytes())
    if not os.path.exists(path):
        save_atomic(path, write)
    try: # mode c: torch wants to be able to write, nothing here does
        return torch.from_numpy(np.load(path, mmap_mode="c").reshape(len(images), dim))
    except (ValueError, EOFError):
        fail(f"{path} is damaged, or no file of ours. Remove it and run again.")


# -----------------------------------------------------------------------------
# learning rate


def get_lr(step, args):
    """Linear warm-up, then half a cosine down to min_lr. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


# -----------------------------------------------------------------------------


def needs_teacher(args):
    return args.kd_loss != "none" or args.image_init == "teacher"


def what_is_missing(args, made=()):
    """Ends the program in seconds, with the commands to run, if the run cannot start. made: what will be
    there by then."""
    missing = [name for name in args.data.split(",") if name not in made
               and not os.path.exists(os.path.join(args.data_dir, name, "meta.json"))]
    problems = [f"data set {name} is not in {args.data_dir}/" + nearest(name, SOURCES) * (name not in SOURCES)
                for name in missing]
    asked = ([("teacher", args.teacher)] * needs_teacher(args) +
             [(k, getattr(args, k)) for k in ("image_init", "text_init")])
    problems += [f"--{k}={name} is neither a published teacher ({', '.join(PRETRAINED)}) nor a file"
                 f"{nearest(name, PRETRAINED)}"
                 for k, name in asked if name not in ("random", "teacher", *PRETRAINED, *made)
                 and not os.path.isfile(name)]
    problems += [f"--{k}={getattr(args, k)} is no file" for k in ("path", "image_path", "text_path")
                 if getattr(args, k) and not os.path.exists(getattr(args, k))]
    if problems:
        fail("\n  ".join(["cannot start:", *problems]) + "\n"
             + "".join(f"Pairs are prepared by: python prepare_pairs.py --data={name} "
                       f"--data_dir={args.data_dir}{' --source=DIR' * (name in ('flickr30k', 'cc3m'))}\n"
                       for name in missing if name in SOURCES) +
             f"Published weights are downloaded when first needed, to {cache_folder()}, or read from\n"
             "--path, --image_path and --text_path.\n"
             "To see a whole run now, nothing to download, five minutes on two CPU cores:\n"
             "  python distill_multimodal.py --preset=tiny")


def prepare_tiny(args):
    """Data and teacher of the tiny preset, if they are not there yet, each by the command that it prints."""
    commands = {} # what it makes -> the command
    if args.data == "openmoji" and not os.path.exists(os.path.join(args.data_dir, args.data, "meta.json")):
        commands[args.data] = ["prepare_pairs.py", f"--data={args.data}", f"--data_dir={args.data_dir}"]
    folder, name = os.path.split(args.teacher)
    if needs_teacher(args) and name == "ckpt.pt" and not is_finished(args.teacher):
        commands[args.teacher] = [
            "distill_image.py", "--preset=tiny", f"--data_dir={args.data_dir}", f"--out_dir={folder or '.'}",
            f"--seed={args.seed}", f"--device={args.device}", f"--dtype={args.dtype}",
            f"--img_size={args.img_size}", f"--patch_size={args.patch_size}", f"--embed_dim={args.embed_dim}",
            f"--num_heads={args.num_heads}", f"--resume={os.path.exists(args.teacher)}"]
    what_is_missing(args, commands) # before anything is made
    for command in commands.values():
        run_script(*command)


def check(args):
    """What the flags cannot say by themselves, before time is spent."""
    if args.img_size % args.patch_size or args.embed_dim % args.num_heads or args.embed_dim % 4:
        fail(f"--patch_size={args.patch_size} must divide --img_size={args.img_size}; "
             f"--num_heads={args.num_heads} and 4 must divide --embed_dim={args.embed_dim}")
    split_batch(args)
    if (args.kd_loss == "none" or not args.kd_weight) \
            and (args.align_loss == "none" or not args.align_weight) and not args.word_weight:
        fail(f"--kd_loss={args.kd_loss} --kd_weight={args.kd_weight} and --align_loss={args.align_loss} "
             f"--align_weight={args.align_weight} leave nothing to learn")
    if os.path.abspath(args.teacher) == os.path.abspath(os.path.join(args.out_dir, "ckpt.pt")):
        fail(f"--teacher={args.teacher} is what this run would write: give another --out_dir")
    check_resume(args)
    for key in unread(args):
        flag = NO_EFFECT[key][0]
        fail(f"--{key}={getattr(args, key)} has no effect with --{flag}={getattr(args, flag)}")
    classifier = args.teacher == "resnet50"
    if needs_teacher(args) and ((args.kd_loss == "kl") != classifier
                                or classifier and args.image_init == "teacher"):
        fail(f"--kd_loss={args.kd_loss} --teacher={args.teacher} --image_init={args.image_init}: kl is for "
             f"the logits of resnet50, and resnet50 for nothing else")
    if args.shared_init == "text" and (args.shared != "transformer" or not args.shared_depth
                                       or args.shared_norm_first or args.text_init == "random"):
        fail("--shared_init=text takes the last blocks of --text_init=data2vec2_text, bert or minilm, for "
             "--shared=transformer --shared_norm_first=False, at least one")
    if args.align_levels == 2 and (args.shared == "projection"
                                   or args.shared == "transformer" and not args.shared_depth):
        fail("--align_levels=2 needs a shared MLP or a shared block: --shared_depth=1")


def unread(args):
    """The flags that were given and that the values of others leave without effect."""
    plain = get_args([]) # to give a flag its default says nothing
    return [k for k, (flag, values) in NO_EFFECT.items() if k in args.given
            and getattr(args, k) != getattr(plain, k) and getattr(args, flag) in values.split()]


def own_tokenizer(path):
    """That of a prepared set."""
    try:
        with open(path, encoding="utf-8") as f:
            return Tokenizer(f.read())
    except Exception as e: # tokenizers raises nothing more specific
        fail(f"{path} is no tokenizer ({e}). Put one there, or take a published one with --text_init=bert; "
             f"of a set that prepare_pairs.py makes, remove the folder and prepare it again")


def build_student(args, sources, vocab_size, head_dim):
    """The student. sources: for "image" and "text" the Encoder whose embeddings and first blocks it starts
    from, or None."""
    configs, weights = {}, {}
    for modality, flag, depth, more in (
            ("image", "depth", args.depth, dict(img_size=args.img_size, patch_size=args.patch_size)),
            ("text", "text_depth", args.text_depth, dict(vocab_size=vocab_size))):
        asked = dict(embed_dim=args.embed_dim, num_heads=args.num_heads, **more)
        encoder = copy.deepcopy(sources[modality])
        if encoder is None:
            configs[modality] = {**asked, "depth": depth}
            if modality == "text":
                configs[modality] |= dict(positions="learned", max_length=args.max_length)
            continue
        has = encoder.config
        wrong = [f"--{k}={v}, but it has {has[k]}" for k, v in asked.items() if v != has[k]]
        if depth > has["depth"]:
            wrong.append(f"--{flag}={depth}, but it has {has['depth']}")
        if modality == "text" and args.shared_init == "text" and depth + args.shared_depth > has["depth"]:
            wrong.append(f"--{flag}={depth} and --shared_depth={args.shared_depth} with --shared_init=text, "
                         f"but it has {has['depth']}")
        if modality == "text" and args.max_length > has["max_length"]:
            wrong.append(f"--max_length={args.max_length}, but it has {has['max_length']}")
        if wrong:
            fail(f"--{modality}_init={getattr(args, f'{modality}_init')}: {'; '.join(wrong)}. Change these "
                 f"flags or use --{modality}_init=random.")
        keep_blocks(encoder, range(depth))
        weights[modality] = {k: v for k, v in encoder.state_dict().items() if not k.startswith("norm.")}
        configs[modality] = {k: v for k, v in {**encoder.config, "final_norm": False}.items()
                             if k != "modality"}
    shared = {"norm_first": args.shared_norm_first}
    if args.shared_norm_first: # BEiT's blocks
        shared |= dict(layer_scale=0.2, key_bias=False)
    if args.shared_init == "text":
        last = sources["text"].blocks[-args.shared_depth:]
        shared = {k: sources["text"].config[k] for k in ("num_heads", "mlp_ratio", "norm_first", "eps")}
    student = VisionLanguageModel(configs["image"], configs["text"], args.shared_depth, shared,
                                  args.token_types, head_dim, args.max_length, bool(args.word_weight),
                                  shared_kind=args.shared, align_levels=args.align_levels, token_scale=
                                  1e-5 if args.token_types and args.shared_norm_first else None)
    if args.shared_init == "text":
        student.blocks.load_state_dict(last.state_dict())
    for modality in weights:
        encoder = getattr(student, f"{modality}_encoder")
        encoder.load_state_dict(weights[modality])
        if args.freeze_embeddings: # what stands before the blocks
            for name, p in encoder.named_parameters():
                p.requires_grad_("embed" not in name and "relative_position" not in name
                                 and name != "cls_token")
    return student


def without_teacher(args):
    """The command that trains the same without the teacher."""
    new = dict(kd_loss="none", out_dir=f"{args.out_dir}_alone")
    if args.align_loss == "none" or not args.align_weight:
        new |= dict(align_loss="contrastive", align_weight=1.0)
    if args.image_init == "teacher":
        new["image_init"] = "random"
    after = argparse.Namespace(**{**vars(args), **new})
    same = {k: getattr(args, k) for k in args.given if k not in (*new, *unread(after), "preset", "resume")}
    return shlex.join(["python", os.path.basename(sys.argv[0]), f"--preset={args.preset}",
                       *(f"--{k}={v}" for k, v in {**same, **new}.items())])


def main(args):
    # -- set up
    started = time.time()
    rank, world = join_ranks(ready=False)
    check(args)
    changed = [f"--{k}" for k in args.given if k in MODEL_KNOBS or k.startswith(("kd_", "align_", "teacher"))
               or k in ("data", "margin", "temperature", "queue_size", "final_norm")]
    if args.preset in PUBLISHED:
        print(f"preset {args.preset}, published COCO R@1, image to text / text to image: "
              f"{PUBLISHED[args.preset]}" + f" (but changed here: {', '.join(changed)})" * bool(changed))
    device = pick_device(args.device)
    if args.preset == "tiny":
        prepare_tiny(args)
    what_is_missing(args)
    dtype, compiled = pick_dtype(args.dtype, device), use_compile(args.compile, device)
    print_settings(args, device, dtype, compiled)
    torch.manual_seed(args.seed)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # -- data
    train_pairs, val_pairs = (open_pairs(args.data_dir, args.data, split) for split in ("train", "val"))
    first_set = args.data.split(",")[0] # its tokenizer, if the text encoder has none, and its test split
    sources = {"image": None, "text": None} # where the student's encoders start from
    if args.text_init != "random":
        sources["text"] = load_encoder(args.text_init, "text", args.text_path)
        tokenizer = sources["text"].tokenizer
    else:
        tokenizer = own_tokenizer(os.path.join(args.data_dir, first_set, "tokenizer.json"))
    pairs = TrainPairs(train_pairs, tokenizer, args)
    B, (n, micro) = args.batch_size, split_batch(args)
    if B > pairs.num_units:
        fail(f"--batch_size={B}, but an epoch has {pairs.num_units} units (--unit={args.unit}). "
             f"Use at most that many.")
    print(f"{len(pairs.pairs.images):,} training images, {len(pairs.pairs.captions):,} captions; validation "
          f"{len(val_pairs.images):,} and {len(val_pairs.captions):,}; {pairs.num_units // B} steps of {B} "
          f"per epoch (one epoch = every {args.unit} once); {B} = {world} x {n // micro} x {micro} pairs "
          f"per step (ranks x micro-batches x pairs)")

    # -- teacher: frozen, whatever the student becomes
    teacher = None
    if needs_teacher(args):
        teacher = (load_pretrained("resnet50", args.path) if args.teacher == "resnet50" else
                   load_encoder(args.teacher, "image", args.path,
                                args.final_norm and args.teacher == "beitv2")).to(device)
    if args.image_init == "teacher":
        sources["image"] = teacher
    elif args.image_init != "random":
        sources["image"] = load_encoder(args.image_init, "image", args.image_path)

    @torch.no_grad()
    def target_of(images):
        """Normalised images (n, 3, H, W) -> what the student predicts, (n, D) float32."""
        if args.kd_loss == "none":
            return None
        with autocast:
            x = teacher(images) # (n, T, D); a classifier's logits are (n, D)
        if x.ndim == 2:
            return x.float()
        return (x[:, 0] if args.kd_target == "cls" else x[:, 1:].mean(1)).float()

    # -- student
    target_dim = 0 if args.kd_loss == "none" else (teacher.fc.out_features if args.kd_loss == "kl" else
                                                   teacher.config["embed_dim"])
    student = build_student(args, sources, tokenizer.vocab_size, args.head * target_dim).to(device)
    del sources
    student.tokenizer = tokenizer # evaluation asks the model for it
    trained, total, frozen = (sum(p.numel() for p in ps) / 1e6 for ps in (
        [p for p in student.parameters() if p.requires_grad], student.parameters(),
        teacher.parameters() if target_dim else []))
    print(f"student {total:.2f}M parameters, {trained:.2f}M of them trained; "
          + (f"teacher {frozen:.2f}M, frozen" if frozen else "no teacher"))
    if target_dim and not args.head and target_dim != args.embed_dim:
        fail(f"the teacher is {target_dim} wide, the student {args.embed_dim}: add --head")
    if target_dim and args.kd_loss != "kl" and teacher.config["img_size"] != args.img_size:
        fail(f"--img_size={args.img_size}, but the teacher reads {teacher.config['img_size']} px")

    # -- optimizer: no decay for biases, norms, positions, tokens
    decayed = [p for n, p in student.named_parameters() if p.requires_grad and p.ndim >= 2
               and all(word not in n for word in ("embed.weight", "pos_embed", "token", "relative_position"))]
    rest = [p for p in student.parameters() if p.requires_grad and all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6,
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    queue, best, step = None, {"mean": -1.0, "step": 0}, 0

    # -- resume
    path = os.path.join(args.out_dir, "ckpt.pt")
    checkpoint = open_run(args, MODEL_KNOBS)
    if checkpoint:
        with continuing(path):
            load_weights(student, checkpoint["model"], path)
            load_optimizer(optimizer, checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            step, best = checkpoint["step"], dict(checkpoint["best"])
            if checkpoint["queue"] and args.queue_size:
                queue = tuple(x[:args.queue_size].to(device) for x in checkpoint["queue"])
    if not rank: # the first validates and writes for all
        open_log(args, step, device, dtype)
        val_images, *val_text = validation_batch(val_pairs, tokenizer, args)
    if compiled: # in place: the weights keep their names
        student.compile()
        if teacher is not None:
            teacher.compile()

    def save(finished=False):
        save_checkpoint(path, student, tokenizer=tokenizer.text, step=step, best=best,
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), queue=queue,
                        finished=finished, args=vars(args), teacher=args.teacher, code=git_sha(),
                        torch=str(torch.__version__))

    def log(text, **record):
        log_record(args, step, text, **record)

    group_of, target_bank = torch.from_numpy(pairs.group), None
    if args.cache_targets and target_dim:
        target_bank = cached_targets(target_of, teacher, target_dim, train_pairs.images, args, device, micro)

    val_target = None

    @torch.no_grad()
    def validate():
        """Retrieval on the validation split, and the distillation loss there for image and for text."""
        nonlocal val_target
        student.eval()
        metrics, _, _ = evaluate.evaluate_retrieval(student, val_pairs, micro, device, dtype,
                                                    num_workers=args.num_workers)
        record = {f"val_{k}": round(v, 3) for k, v in metrics.items()}
        if args.kd_loss != "none":
            outputs, targets = [], []
            for i in range(0, len(val_images), micro):
                images = normalize(val_images[i:i + micro].to(device))
                with autocast:
                    outputs.append(student(images, *(x[i:i + micro].to(device) for x in val_text)))
                if val_target is None:
                    targets.append(target_of(images))
            val_target = torch.cat(targets) if val_target is None else val_target
            _, terms = loss_terms([torch.cat(x) for x in zip(*outputs)], val_target,
                                  torch.arange(len(val_images), device=device), None, None, student, args)
            record |= {f"val_{k}": terms[k].item() for k in ("kd_image", "kd_text")}
        student.train()
        if metrics["mean"] > best["mean"]:
            best.update(mean=metrics["mean"], step=step)
        kd = "".join(f", {k[4:]} {v:.4f}" for k, v in record.items() if k.startswith("val_kd"))
        log(f"validation at step {step}: R@10 image to text {metrics['i2t_r10']:.1f}, text to image "
            f"{metrics['t2i_r10']:.1f}, mean recall {metrics['mean']:.1f} (best {best['mean']:.1f} at "
            f"{best['step']}){kd}", **record)

    # -- loop
    join_ranks(ready=True)
    order = (batch[rank * n:(rank + 1) * n] for batch in batch_order(pairs.num_units, B, args.seed, step))
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=order, collate_fn=pairs.collate,
                                         num_workers=args.num_workers, worker_init_fn=ignore_signals,
                                         pin_memory=device.type == "cuda")
    stop = Stop()
    batches = stop.until(iter(loader), args.max_steps - step)
    # rows: terms of steps not logged
    rows, terms, waited, since, first_step, loop_start = [], {}, 0.0, time.time(), step, time.time()
    student.train()
    while True:
        wait_start = time.time()
        *inputs, index, bad = next(batches, (None,) * 2)
        if bad is None:
            break
        if stop.count(bad, n, log):
            break
        images, ids, padding_mask, group = (x.to(device, non_blocking=True)
                                            for x in (*inputs, group_of[index]))
        waited += time.time() - wait_start
        # a generator for each step: what was drawn before a kill need not be saved
        generator, kept = torch.Generator().manual_seed(args.seed * 2 ** 32 + step), None
        with WholeBatch(): # drawn for all pairs at once: ranks change nothing
            images = augment(images, generator, args.flip, args.rotate, args.color)
            if args.mask_ratio:
                kept = kept_patches(random_patch_mask(n, (args.img_size // args.patch_size) ** 2,
                                                      args.mask_ratio, generator))
                kept = kept.to(device, non_blocking=True)
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        chunks = [slice(i, i + micro) for i in range(0, n, micro)]
        # what the loss reads is of the whole batch, (B, ..), on every rank
        group, target, words = gather(group), None, None
        if args.word_weight:
            words = gather(word_targets(ids, padding_mask, tokenizer.vocab_size))
        if args.kd_loss != "none":
            target = gather(target_bank[index].to(device, non_blocking=True).float()
                            if target_bank is not None else
                            torch.cat([target_of(images[c]) for c in chunks])) # (B, D)

        def forward(c):
            with autocast:
                return student(images[c], ids[c], padding_mask[c], None if kept is None else kept[c])

        if len(chunks) == 1:
            outputs = forward(chunks[0])
        else:
            # gradient caching (Gao et al. 2021), so that every pair still meets the whole batch: all outputs
            # without graph, the gradient of the loss with respect to them, then each micro-batch again, with
            # graph
            with torch.no_grad():
                parts = [forward(c) for c in chunks]
            outputs = [torch.cat(x).detach().requires_grad_() for x in zip(*parts)] # 4 or 6 x (n, ..)
        loss, terms = loss_terms([gather(x) for x in outputs], target, group, queue, words, student, args)
        scaler.scale(loss / world).backward() # each rank has the whole loss: its share
        for c in chunks if len(chunks) > 1 else ():
            used = [(x, own.grad[c]) for x, own in zip(forward(c), outputs) if own.grad is not None]
            torch.autograd.backward(*zip(*used))
        sum_over_ranks([p.grad for p in student.parameters()])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.grad_clip or float("inf"))
        if scaler.is_enabled(): # it skips a step whose gradient overflowed
            norm = norm.nan_to_num(0, 0, 0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            student.log_scale.clamp_(0, math.log(100)) # as CLIP
        if args.queue_size and args.kd_loss == "contrastive":
            new = F.normalize(target, dim=-1)[:args.queue_size], group[:args.queue_size]
            queue = new if queue is None else tuple(torch.cat([x, old])[:args.queue_size]
                                                    for x, old in zip(new, queue))
        step += 1
        if rank:
            continue

        terms = {"loss": loss, **terms, "norm": norm}
        # stays on the device: no waiting for it
        rows.append(torch.stack([x.detach().float() for x in terms.values()]))
        due = [step % n == 0 or step == args.max_steps
               for n in (args.log_interval, args.eval_interval, args.save_interval)]
        if any(due): # nothing is measured or saved after a bad step
            table = finite_rows(rows, terms, step, args) # (seen, terms)
        if due[0]:
            means, seen = dict(zip(terms, table.double().mean(0).tolist())), len(rows)
            ms, scale = 1000 * (time.time() - since) / seen, student.log_scale.exp().view(-1)[0].item()
            left = (args.max_steps - step) * (time.time() - loop_start) / (step - first_step)
            log(f"step {step:>6}/{args.max_steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()) +
                f"  scale {scale:.1f}  lr {lr:.2e}  {1000 * B / ms:.0f} pairs/s  "
                f"{ms:.0f} ms ({1000 * waited / seen:.0f} for data)  {peak_memory(device):.2f} GB  "
                f"{left / 60:.1f} min left", **means, scale=scale, lr=lr,
                pairs_per_s=1000 * B / ms, ms=ms, wait_ms=1000 * waited / seen, memory_gb=peak_memory(device),
                minutes_left=left / 60)
            rows, waited, since = [], 0.0, time.time()
        if due[1]:
            paused = time.time()
            validate()
            since += time.time() - paused # ms counts training alone
        if due[2] and step < args.max_steps:
            save()

    # -- end
    if not rank:
        finite_rows(rows, terms, step, args) # those since the last log line
        save(finished=step == args.max_steps)
    stop.end(path, None if step == args.max_steps else "--resume")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return
    print(f"trained {step - first_step} steps in {(time.time() - loop_start) / 60:.1f} min, peak memory "
          f"{peak_memory(device):.2f} GB, validation mean recall "
          f"{best['mean']:.1f} at best (step {best['step']}); wrote {path}")
    if os.path.exists(os.path.join(args.data_dir, first_set, "test_images.idx")):
        command = ["retrieval", f"--ckpt={path}", f"--data={first_set}", f"--data_dir={args.data_dir}",
                   f"--device={device}", f"--dtype={args.dtype}", f"--num_workers={args.num_workers}",
                   f"--json={args.out_dir}/retrieval.json", f"--picture={args.out_dir}/retrieval.png"]
        print("$ python evaluate.py", *command)
        evaluate.main(command)
    print(f"{(time.time() - started) / 60:.1f} minutes in all")
    if args.kd_loss != "none":
        print(f"next, the same without the teacher:\n  {without_teacher(args)}")


if __name__ == "__main__":
    main(get_args())
