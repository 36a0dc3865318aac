"""
Distils a vision-language student: an image encoder, a text encoder and shared blocks on top learn, from
image-text pairs, to predict an image teacher's CLS token from the image and from its caption, and to agree
with each other.

    python distill_multimodal.py --preset=tiny          # no GPU, no download beyond pip: pictures are drawn
    python distill_multimodal.py --batch_size=256       # the thesis' MM-D2V2 with BEiTv2 as teacher, on COCO
    python distill_multimodal.py --preset=smke --data=coco,cc3m,cc12m  # its final form, our recommendation

Ends with a retrieval table, a picture of it and out/<run>/ckpt.pt; the first takes five minutes on two CPU
cores and finds about 36 % of 300 held-out families among its first ten. Any flag below can follow; the same
command again goes on where it stopped. Eq. numbers are those of the thesis (README, "Credits").
"""
import copy
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from model import (CONFIGS, PRETRAINED, Parser, Run, Tokenizer, VisionLanguageModel, all_gather, batch_order,
                   fail, going_on, hash_of, ignore_signals, join_ranks, keep_blocks, load_encoder,
                   load_pretrained, local_folder, make_data, make_once, make_optimizer, nearest,
                   optimizer_step, peak_memory, run_flags, set_up, split_batch, split_name, train_flags)
from prepare_owt import load_text_encoder
from prepare_imagenet import (NO_SOURCE, Bad, ByLabel, Growing, augment, normalize, train_image,
                              visible_patches)
from prepare_pairs import SOURCES, open_pairs

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
    # --align_weight=1). Its teacher is timm's resnet50.a1_in1k, which --teacher=resnet50:FILE takes. Eq. 30
    # is a sum over 256 pairs, which would drown the other term; the weight makes it the mean over them.
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
    # OpenMoji, two plain CPU cores, five minutes; the numbers stand in the README, how they were tuned in
    # tests/experiments.py. Real teachers that pip carries: EfficientNet-Lite0's feature is regressed by image
    # and text, and the text encoder starts from MiniLM's first three of six blocks.
    "tiny": dict(
        data="openmoji", unit="label", out_dir="out/tiny", teacher="efficientnet_lite0", teacher_size=128,
        standardize=True, cache_targets=True, image_init="random", text_init="minilm", img_size=48,
        patch_size=12, embed_dim=384, num_heads=12, depth=1, text_depth=3, max_length=7, crop_min=0.85,
        rotate=5.0, color=0.1, mask_ratio=0.6, head=True, token_types=True, kd_loss="contrastive",
        kd_weight=0.5, align_loss="contrastive", label_smoothing=0.1, batch_size=128, lr=5e-4, max_steps=430,
        warmup_steps=10, weight_decay=0.05, grad_clip=3.0, eval_interval=86, save_interval=86,
        log_interval=43),
}

PUBLISHED = { # the first line of a run: which system of the thesis, COCO R@1 image to text / text to image
    "mmd2v2_beit": "MM-D2V2 with BEiTv2 as teacher, 31.7 / 12.4; its final form, --preset=smke, 53.5 / 35.7",
    "mmd2v2": "MM-D2V2 with data2vec 2.0 as teacher, 4.2 / 1.8", "mmd2v2_7": "MM-D2V2 7, 30.2 / 12.0",
    "mmd2v2_7_2": "MM-D2V2 7_2, 32.8 / 12.8",
    "shre": "SHRe, only with --align_loss=contrastive: 37.1 / 25.3, and --shared=transformer: 44.6 / 31.7",
    "clip": "CLIP, not at all; the nearest, smke without a teacher: mean recall 70.0 / 58.1",
    "smke": "S-SMKE on --data=coco,cc3m,cc12m, 53.5 / 35.7",
    "smke --teacher=dino": "S-SMKE with DINO, not at all; mean recall 71.9 / 57.6 (BEiTv2: 74.7 / 59.8), "
                           "ImageNet zero-shot 37.5 (37.0)"}

CNNS = {"resnet50": 1000, "efficientnet_lite0": 1280} # teachers that are no Encoder: width of their target
# what makes the model: cannot change when a run goes on
MODEL_KNOBS = ["img_size", "patch_size", "embed_dim", "num_heads", "depth", "text_depth", "shared",
               "shared_depth", "shared_init", "max_length", "shared_norm_first", "head", "token_types",
               "image_init", "text_init", "freeze_embeddings", "align_levels"]


def get_args(argv=None):
    p = Parser(__doc__, PRESETS)
    p.section("data")
    p.knob("data", "coco", "prepared pairs, DATA_DIR/NAME, or several: coco,cc3m,cc12m trains on all and "
           "validates on the first that has a validation split")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("unit", "caption", "what an epoch runs over once: captions; images, each with a random caption; "
           "labels (OpenMoji: families), each with a random image", choices=["caption", "image", "label"])
    p.knob("max_length", 64, "text tokens with CLS and SEP, at most; longer captions are cut", least=3)
    p.knob("crop_min", 0.6, "smallest area of the random crop, as a share of the picture; near 1 keeps what "
           "the caption speaks of, less makes the images more varied", most=1)
    p.knob("flip", 0.5, "probability of a mirror image", most=1)
    p.knob("rotate", 0.0, "rotate by up to this many degrees; photographs get white corners", most=180)
    p.knob("color", 0.0, "vary colours by up to this share", most=1)
    p.knob("mask_ratio", 0.0, "share of each image's patches that training leaves out, which saves time for "
           "more steps or a larger batch (FLIP, Li et al. 2023); the teacher sees all", most=0.99)
    p.section("model")
    p.knob("teacher", "beitv2", "image teacher: beitv2, dino, dinov2, dinov2_reg, dinov3, data2vec2_image, "
           "efficientnet_lite0 (its pooled feature), NAME:PATH of such a file, or a checkpoint of "
           "distill_image.py; for --kd_loss=kl resnet50")
    p.knob("teacher_size", 0, "side in pixels at which the teacher sees the images, 0: IMG_SIZE")
    p.knob("final_norm", True, "beitv2, dino ..: the target is normed as in the teacher's pretraining")
    p.knob("standardize", False, "with --cache_targets: every channel of the target has mean 0 and standard "
           "deviation 1 over the training images (the first 65,536 of them)")
    p.knob("cache_targets", False, "compute the target of each training image once, from the evaluation "
           "transform, and keep it in DATA_DIR: saves the teacher's pass in every step, and gives image and "
           "caption a target without noise, for one pass over the set")
    p.knob("image_init", "data2vec2_image", "image encoder: embeddings and first DEPTH blocks of the "
           "teacher, data2vec2_image, beitv2, dino .., NAME:PATH or a checkpoint of distill_image.py; or "
           "random")
    p.knob("text_init", "data2vec2_text", "text encoder: embeddings, first TEXT_DEPTH blocks and tokenizer "
           "of data2vec2_text, bert, minilm, NAME:PATH or a checkpoint of distill_text.py; or random, with "
           "the data set's tokenizer")
    p.knob("freeze_embeddings", True, "an encoder that starts from another keeps what is before its blocks")
    p.knob("img_size", 224, "side of the square images in pixels", least=1)
    p.knob("patch_size", 16, "side of a patch in pixels", least=1)
    p.knob("embed_dim", 768, "width of all blocks", least=4)
    p.knob("num_heads", 12, "attention heads of all blocks", least=1)
    p.knob("depth", 5, "modality-specific blocks of the image encoder", least=1)
    p.knob("text_depth", 5, "modality-specific blocks of the text encoder", least=1)
    p.knob("shared", "transformer", "what image and text pass through: SHARED_DEPTH transformer blocks; mlp: "
           "SHRe's, of the CLS token alone, its last layer is --head; projection: nothing shared, one linear "
           "layer for each modality, as in CLIP", choices=["transformer", "mlp", "projection"])
    p.knob("shared_depth", 1, "shared transformer blocks")
    p.knob("shared_init", "random", "shared transformer blocks start as random ones or, text, as the last "
           "SHARED_DEPTH blocks of TEXT_INIT", choices=["random", "text"])
    p.knob("shared_norm_first", False, "shared blocks as in S-SMKE: pre-norm, with LayerScale (token types "
           "get it, too), keys without bias; else post-norm (MM-D2V2), so that the embedding is normed")
    p.knob("head", False, "predict the target by LayerNorm and a linear layer, not by the CLS token itself")
    p.knob("token_types", False, "add a learned vector per modality before the shared blocks")
    p.section("loss")
    p.knob("kd_loss", "mse", "distance to the teacher's target, for image and text: mse and l1 on features; "
           "kl on a classifier's logits; contrastive: find the own target among batch and queue; none",
           choices=["mse", "l1", "kl", "contrastive", "none"])
    p.knob("kd_weight", 1.0, "weight of the sum of the image and the text term")
    p.knob("temperature", 1.0, "kl: divides both logits; above 1, unlikely classes count more", least=0.001)
    p.knob("kd_scale", 1 / 0.07, "contrastive kd_loss: multiplies the cosines (not learned)", least=0.001)
    p.knob("queue_size", 0, "contrastive kd_loss: targets of earlier batches kept as further negatives")
    p.knob("align_loss", "none", "between image and text embeddings: contrastive (eq. 27), with learned "
           "temperature, or ranking (eq. 30)", choices=["contrastive", "ranking", "none"])
    p.knob("align_levels", 1, "where they are compared: 1, the embedding; 2, also the first layer of the "
           "shared MLP or of the last shared block's, with its own temperature; the loss is their mean",
           least=1, most=2)
    p.knob("align_weight", 1.0, "weight of the alignment loss")
    p.knob("label_smoothing", 0.0, "contrastive align_loss: share of the target for all the batch", most=1)
    p.knob("margin", 0.2, "ranking align_loss: margin in cosine")
    train_flags(p, "pairs", max_steps=40000, warmup_steps=4000)
    run_flags(p, "out/mmd2v2_beit", eval_interval=1000)
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
    other's negatives; queue: (targets (Q, D) normalised, groups (Q,)) or empty; scale multiplies the
    cosines."""
    bank, bank_group = F.normalize(target.float(), dim=-1), group
    if queue:
        bank, bank_group = torch.cat([bank, queue[0]]), torch.cat([group, queue[1]]) # (B + Q, D), (B + Q,)
    logits = scale * F.normalize(student_out.float(), dim=-1) @ bank.T # (B, B + Q)
    same = (group[:, None] == bank_group[None]).fill_diagonal_(False) # one's own target stays in
    own = torch.arange(len(group), device=logits.device)
    return F.cross_entropy(logits.masked_fill(same, float("-inf")), own)


def loss_terms(outputs, target, group, queue, student, args):
    """The terms of the loss by name, unweighted, and their weighted sum. outputs: what VisionLanguageModel
    returns, for the whole batch."""
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
        levels = [(image_cls, text_cls), inner] if inner else [(image_cls, text_cls)]
        losses = []
        for (image, text), scale in zip(levels, student.log_scale.exp().view(-1)):
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            losses.append(ranking_loss(image, text, args.margin) if args.align_loss == "ranking" else
                          contrastive_loss(image, text, scale, args.label_smoothing))
        terms["align"] = sum(losses) / len(losses)
        total = total + args.align_weight * terms["align"]
    return total, terms


# -----------------------------------------------------------------------------
# batches: everything random is a function of (seed, epoch, position), so a resumed run sees what it would
# have seen


class TrainPairs(torch.utils.data.Dataset):
    """Samples of a prepared training split; the index is (epoch, position, unit), see batch_order."""

    def __init__(self, pairs, tokenizer, args):
        if args.unit == "label" and pairs.labels is None:
            fail(f"--unit=label, but data set {args.data} has no labels. Use --unit=caption or --unit=image.")
        self.pairs, self.tokenizer, self.args = pairs, tokenizer, args
        self.num_patches = (args.img_size // args.patch_size) ** 2
        # what is never its own negative in the distillation loss: a label (OpenMoji: family) if there is one,
        # since its pictures differ in details only, else the image
        self.group = np.arange(len(pairs.images)) if pairs.labels is None else pairs.labels
        self.captions_of = ByLabel(pairs.text_to_image) if args.unit != "caption" else None # of each image
        self.images_of = ByLabel(self.group) if args.unit == "label" else None # of each label
        self.num_units = {"caption": len(pairs.captions), "image": len(pairs.images),
                          "label": len(self.images_of or ())}[args.unit]

    def __getitem__(self, index):
        """Image (3, H, W) uint8, its caption, its number, the noise of its augmentation, (7 + N,) in [0, 1),
        and its number again if it is grey because it cannot be read, else -1."""
        epoch, position, unit = index
        rng = np.random.default_rng((self.args.seed, epoch, position))
        if self.args.unit == "caption":
            i, caption = self.pairs.text_to_image[unit], unit
        else:
            i = rng.choice(self.images_of[unit]) if self.args.unit == "label" else unit
            caption = rng.choice(self.captions_of[i])
        size = self.args.img_size
        bad = -1
        try:
            image = train_image(self.pairs.images[i], size, self.args.crop_min, rng)
        except Bad:
            image = torch.full((3, size, size), 128, dtype=torch.uint8)
            bad = int(i)
        noise = torch.from_numpy(rng.random(7 + self.num_patches, np.float32))
        return image, self.pairs.captions[caption], int(i), noise, bad

    def collate(self, samples):
        """As __getitem__, stacked, with ids (n, T) and padding_mask (n, T) in place of the captions."""
        images, captions, index, noise, bad = zip(*samples)
        return (torch.stack(images), *self.tokenizer.encode(captions, self.args.max_length),
                torch.tensor(index), torch.stack(noise), torch.tensor(bad))


def offsets(records):
    """Where each record of a set, or of several that were joined, begins: tells two sets apart."""
    return [part.offsets for part in getattr(records, "datasets", [records])]


# -----------------------------------------------------------------------------
# the teacher and its targets


def teacher_side(args):
    """Side in pixels of the images that the teacher sees."""
    return args.teacher_size or args.img_size


def load_teacher(args):
    """The image teacher, frozen, and the width of its target, 0 for no distillation; (None, 0) if nothing
    needs one."""
    if args.kd_loss == "none" and args.image_init != "teacher":
        return None, 0
    name, path = split_name(args.teacher)
    if name in CNNS:
        teacher, width = load_pretrained(name, path, weights_dir=args.weights_dir), CNNS[name]
    else:
        final_norm = args.final_norm and CONFIGS.get(name, {}).get("final_norm", False)
        teacher = load_encoder(args.teacher, "image", args.weights_dir, final_norm)
        width = teacher.config["embed_dim"]
        size = teacher_side(args)
        if args.kd_loss != "none" and size != teacher.config["img_size"]:
            fail(f"--teacher_size={size}, but {args.teacher} reads {teacher.config['img_size']} px")
    if args.kd_loss == "none":
        return teacher, 0
    if not args.head and width != args.embed_dim:
        fail(f"the teacher's target is {width} wide, the student --embed_dim={args.embed_dim}: add --head")
    return teacher, width


@torch.no_grad()
def teacher_target(teacher, images, args, autocast):
    """Normalised images (n, 3, H, W), of any size -> what the student predicts, (n, D) float32."""
    size = teacher_side(args)
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    with autocast:
        x = teacher(images) # (n, T, D); of a CNN (n, D)
    return (x if x.ndim == 2 else x[:, 0]).float()


def cached_targets(teacher, width, images, args, device, dtype, autocast, batch_size):
    """The target of every training image, from the evaluation transform, as (images, width) float16: a file
    beside the data set, mapped into memory. Its name has a hash of the teacher's weights, the transform and
    the images' index, so that no run reads what was made from others."""
    size = teacher_side(args)
    made_from = hash_of(f"{size} {dtype}", teacher, *offsets(images))
    path = os.path.join(args.data_dir, f"{args.data}_targets_{made_from}.bin")
    print(f"teacher's targets of {len(images):,} images, {len(images) * width * 2 / 1e9:.3f} GB, "
          f"{'read from' if os.path.exists(path) else 'go to'} {path}", flush=True)
    with going_on(path):
        make_once(path, write_targets, teacher, width, images, args, device, autocast, batch_size)
    try: # mode c: torch wants to be able to write, nothing here does
        return torch.from_numpy(np.memmap(path, "<f2", "c", shape=(len(images), width)))
    except ValueError:
        fail(f"{path} is damaged, or no file of ours. Remove it and run again.")


def write_targets(path, teacher, width, images, args, device, autocast, batch_size):
    """Writes them, in the order of the images, behind the whole batches that a killed run left."""
    there = os.path.getsize(path + ".tmp") if os.path.exists(path + ".tmp") else 0
    done = there // (2 * width * batch_size) * batch_size # images
    pictures = evaluate.EvalImages(images, teacher_side(args))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(pictures, range(done, len(images))), batch_size,
        num_workers=args.num_workers, worker_init_fn=ignore_signals)
    growing = Growing(path, 2 * width * done)
    with growing.file as f:
        for batch in tqdm(loader, desc="teacher's targets", disable=not sys.stderr.isatty()):
            x = normalize(pictures.images_of(batch).to(device))
            target = teacher_target(teacher, x, args, autocast).half().cpu()
            if not target.isfinite().all():
                fail(f"--teacher={args.teacher} gives targets that are not finite in half precision: run "
                     f"without --cache_targets, or with --dtype=float32")
            f.write(target.numpy().astype("<f2").tobytes())
        growing.close()


def target_statistics(bank, args, device):
    """Returns scale and shift, (width,) each: standard deviation and mean of the cached targets; 1 and 0
    without --standardize."""
    if bank is None or not args.standardize:
        return 1.0, 0.0
    std, mean = (x.to(device) for x in torch.std_mean(bank[:2 ** 16].float(), 0))
    return std.clamp(min=1e-3), mean # some channels are silent


# -----------------------------------------------------------------------------
# learning rate and validation


def get_lr(step, args):
    """Linear warm-up, then half a cosine down to 0. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


@torch.no_grad()
def validation_batch(pairs, teacher, tokenizer, scale, shift, args, device, autocast, micro):
    """The first images of the split, at most 1,024, evaluation transform, with their first captions and their
    targets: images (N, 3, H, W) uint8, ids, padding_mask, target (N, D) on the device; None without
    distillation. scale, shift: from target_statistics."""
    if args.kd_loss == "none":
        return None
    numbers = range(min(1024, len(pairs.images)))
    images = evaluate.EvalImages(pairs.images, args.img_size).stack(numbers)
    seen = images # by the teacher
    if teacher_side(args) != args.img_size:
        seen = evaluate.EvalImages(pairs.images, teacher_side(args)).stack(numbers)
    _, first = np.unique(pairs.text_to_image, return_index=True)
    target = [teacher_target(teacher, normalize(x.to(device)), args, autocast) for x in seen.split(micro)]
    ids, padding_mask = tokenizer.encode([pairs.captions[j] for j in first[:len(numbers)]], args.max_length)
    return images, ids, padding_mask, (torch.cat(target) - shift) / scale


@torch.no_grad()
def validate(student, pairs, held_out, args, device, dtype, autocast, micro):
    """Retrieval on the validation split, and the distillation loss there for image and for text: a record for
    log.jsonl. held_out: from validation_batch."""
    metrics, _, _ = evaluate.evaluate_retrieval(student, pairs, micro, device, dtype,
                                                num_workers=args.num_workers)
    record = {f"val_{k}": round(v, 3) for k, v in metrics.items()}
    if held_out:
        *inputs, target = held_out
        outputs = []
        for images, ids, padding_mask in zip(*(x.split(micro) for x in inputs)):
            with evaluate.evaluating(student), autocast:
                outputs.append(student(normalize(images.to(device)), ids.to(device), padding_mask.to(device)))
        group = torch.arange(len(target), device=device)
        _, terms = loss_terms([torch.cat(x) for x in zip(*outputs)], target, group, [], student, args)
        record |= {f"val_{k}": terms[k].item() for k in ("kd_image", "kd_text")}
    return record


def judge(args, checkpoint, device):
    """Retrieval on the test split of the first set, if it has one: prints the table and draws the picture."""
    data = args.data.split(",")[0]
    if os.path.exists(os.path.join(args.data_dir, data, "test_images.idx")):
        command = ["retrieval", f"--ckpt={checkpoint}", f"--data={data}", f"--data_dir={args.data_dir}",
                   f"--device={device}", f"--dtype={args.dtype}", f"--num_workers={args.num_workers}",
                   f"--json={args.out_dir}/retrieval.json", f"--picture={args.out_dir}/retrieval.png"]
        print("$ python evaluate.py", *command)
        evaluate.main(command)


# -----------------------------------------------------------------------------
# before time is spent


def check(args):
    """Ends the program in seconds, with the commands to run, if the run cannot start; else says which system
    of the thesis it is."""
    if args.img_size % args.patch_size or args.embed_dim % args.num_heads or args.embed_dim % 4:
        fail(f"--patch_size={args.patch_size} must divide --img_size={args.img_size}; "
             f"--num_heads={args.num_heads} and 4 must divide --embed_dim={args.embed_dim}")
    split_batch(args)
    has_kd, has_align = args.kd_loss != "none", args.align_loss != "none"
    if not (has_kd and args.kd_weight or has_align and args.align_weight):
        fail(f"--kd_loss={args.kd_loss} --kd_weight={args.kd_weight} and --align_loss={args.align_loss} "
             f"--align_weight={args.align_weight} leave nothing to learn")
    name = split_name(args.teacher)[0]
    if has_kd and (args.kd_loss == "kl") != (name == "resnet50"):
        fail(f"--kd_loss={args.kd_loss} --teacher={args.teacher}: kl is for the logits of resnet50, and "
             f"resnet50 for nothing else")
    if args.image_init == "teacher" and name in CNNS:
        fail(f"--image_init=teacher, but {name} has no blocks to start from: --image_init=random")
    if args.standardize and not args.cache_targets:
        fail("--standardize takes its mean and standard deviation from cached targets: add --cache_targets")
    if args.standardize and args.kd_loss == "kl":
        fail("--standardize: the logits of --kd_loss=kl mean something as they are")
    has_blocks = args.shared == "transformer" and args.shared_depth > 0
    if args.shared_init == "text" and (
            not has_blocks or args.shared_norm_first or args.text_init == "random"):
        fail("--shared_init=text takes the last blocks of --text_init=data2vec2_text, bert or minilm, for "
             "--shared=transformer --shared_norm_first=False, at least one")
    if args.align_levels == 2 and not has_blocks and args.shared != "mlp":
        fail("--align_levels=2 needs a shared MLP or a shared block: --shared_depth=1")

    problems, commands = [], []
    for name in args.data.split(","):
        is_there = os.path.exists(os.path.join(args.data_dir, name, "meta.json"))
        if not is_there and (args.preset, args.data) != ("tiny", "openmoji"): # which main() draws
            meant = "" if name in SOURCES else nearest(name, SOURCES)
            problems.append(f"data set {name} is not in {args.data_dir}/{meant}")
            if not meant:
                source = "" if name in NO_SOURCE else " --source=DIR"
                commands.append(f"  python prepare_pairs.py --data={name} --data_dir={args.data_dir}{source}")
    models = ["image_init", "text_init"] + (["teacher"] if has_kd or args.image_init == "teacher" else [])
    for key in models:
        which = getattr(args, key)
        name, path = split_name(which)
        if name and not path:
            local_folder(name, args.weights_dir) # its package must be there before a picture is drawn
        if which not in ("random", "teacher") and path and not os.path.exists(path):
            problems.append(f"--{key}={which} is neither a published model ({', '.join(PRETRAINED)}) nor a "
                            f"file{nearest(which, PRETRAINED)}")
    if problems:
        fail("\n  ".join(["cannot start:", *problems]) + "\nPublished weights are downloaded when first "
             f"needed, to --weights_dir={args.weights_dir}. Pairs are prepared by the first commands, and "
             "the last shows a whole run now, with nothing to download:\n" +
             "\n".join([*commands, "  python distill_multimodal.py --preset=tiny"]))
    if args.preset in PUBLISHED:
        row = PUBLISHED.get(f"{args.preset} --teacher={args.teacher}", PUBLISHED[args.preset])
        print(f"preset {args.preset}, published COCO R@1, image to text / text to image: {row}")


# -----------------------------------------------------------------------------
# the student


def own_tokenizer(args):
    """That of the first prepared set."""
    path = os.path.join(args.data_dir, args.data.split(",")[0], "tokenizer.json")
    try:
        with open(path, encoding="utf-8") as f:
            return Tokenizer(f.read())
    except Exception as e: # tokenizers raises nothing more specific
        fail(f"{path} is no tokenizer ({e}). Put one there, or take a published one with --text_init=bert; "
             f"of a set that prepare_pairs.py makes, remove the folder and prepare it again")


def start_encoder(modality, source, args, vocab_size):
    """Settings of one of the student's encoders, and the weights it starts from: those of the Encoder source,
    or None for random ones."""
    depth = args.depth if modality == "image" else args.text_depth
    settings = dict(embed_dim=args.embed_dim, num_heads=args.num_heads)
    if modality == "image":
        settings |= dict(img_size=args.img_size, patch_size=args.patch_size)
    if source is None:
        if modality == "text":
            settings |= dict(vocab_size=vocab_size, max_length=args.max_length)
        return {**settings, "depth": depth}, None
    config = source.config
    wrong = [f"--{k}={v}, but it has {config[k]}" for k, v in settings.items() if v != config[k]]
    num_blocks = depth + (args.shared_depth if modality == "text" and args.shared_init == "text" else 0)
    if num_blocks > config["depth"]:
        wrong.append(f"{num_blocks} blocks, but it has {config['depth']} (--depth, --text_depth, "
                     f"--shared_depth)")
    if modality == "text" and args.max_length > config["max_length"]:
        wrong.append(f"--max_length={args.max_length}, but it has {config['max_length']}")
    if wrong:
        fail(f"--{modality}_init={getattr(args, f'{modality}_init')}: {'; '.join(wrong)}. Change these flags "
             f"or use --{modality}_init=random.")
    encoder = copy.deepcopy(source)
    keep_blocks(encoder, range(depth))
    encoder.norm = None
    settings = {k: v for k, v in encoder.config.items() if k != "modality"} | {"final_norm": False}
    return settings, encoder.state_dict()


def load_sources(args, teacher):
    """The Encoders that the student's image and text encoder start from, {"image": .., "text": ..}; None for
    random weights."""
    sources = {"image": None, "text": None}
    if args.text_init != "random":
        sources["text"] = load_text_encoder(args.text_init, args.weights_dir)
    if args.image_init == "teacher":
        sources["image"] = teacher
    elif args.image_init != "random":
        sources["image"] = load_encoder(args.image_init, "image", args.weights_dir)
    return sources


def build_student(args, sources, vocab_size, target_width):
    """The student. sources: for "image" and "text" the Encoder whose embeddings and first blocks it starts
    from, or None; target_width: of the teacher's target."""
    starts = {m: start_encoder(m, source, args, vocab_size) for m, source in sources.items()}
    shared = {"norm_first": args.shared_norm_first}
    token_scale = None
    if args.shared_norm_first: # BEiT's blocks
        shared |= dict(layer_scale=0.2, key_bias=False)
        token_scale = 1e-5 if args.token_types else None
    if args.shared_init == "text":
        shared = {k: sources["text"].config[k] for k in ("num_heads", "mlp_ratio", "norm_first", "eps")}
    student = VisionLanguageModel(
        starts["image"][0], starts["text"][0], args.shared_depth, shared, args.token_types,
        target_width if args.head else 0, args.max_length, args.shared, token_scale, args.align_levels)
    if args.shared_init == "text":
        student.blocks.load_state_dict(sources["text"].blocks[-args.shared_depth:].state_dict())
    for modality, (_, weights) in starts.items():
        encoder = getattr(student, f"{modality}_encoder")
        if weights is not None:
            encoder.load_state_dict(weights)
        if weights is not None and args.freeze_embeddings: # what stands before the blocks
            for name, p in encoder.named_parameters():
                p.requires_grad_("embed" not in name and "relative_position" not in name
                                 and name not in ("cls_token", "reg_token"))
    return student


def main(args):
    # -- set up
    started = time.monotonic()
    rank, world = join_ranks(ready=False) # the first prepares and downloads, the others wait for it
    check(args)
    device, dtype, compiled, autocast = set_up(args)
    run = Run(args, __file__, MODEL_KNOBS, device, dtype)
    if args.data == "openmoji": # only the tiny preset's can be missing, see check
        make_data(os.path.join(args.data_dir, args.data), "prepare_pairs.py", f"--data={args.data}",
                  f"--data_dir={args.data_dir}")

    # -- data and teacher, frozen
    train, val = (open_pairs(args.data_dir, args.data, split) for split in ("train", "val"))
    teacher, width = load_teacher(args)
    sources = load_sources(args, teacher)
    tokenizer = sources["text"].tokenizer if sources["text"] else own_tokenizer(args)
    pairs = TrainPairs(train, tokenizer, args)
    print(f"{len(train.images):,} training images, {len(train.captions):,} captions; validation "
          f"{len(val.images):,} and {len(val.captions):,}; an epoch is every {args.unit} once")
    n, micro = split_batch(args, pairs.num_units) # pairs of this rank in a step, and of a forward pass

    # -- student
    student = build_student(args, sources, tokenizer.vocab_size, width).to(device)
    student.tokenizer = tokenizer # evaluation asks the model for it
    if width: # else it was a start, if anything
        teacher = teacher.to(device)
    del sources

    # -- optimizer; what an earlier run left
    optimizer, scaler = make_optimizer([student], args, device, dtype)
    print(f"student {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters; "
          f"teacher {args.teacher if width else 'none'}")
    read = {"the data set": hash_of(*offsets(train.images), *offsets(train.captions), train.text_to_image,
                                    pairs.group), "tokenizer": hash_of(tokenizer.text)}
    if width:
        read["the teacher"] = hash_of(teacher)
    checkpoint = run.restore(read, model=student, optimizer=optimizer, scaler=scaler)
    best = checkpoint.get("best", {"mean": -1.0, "step": 0})
    # targets (Q, D), groups (Q,); empty at first
    queue = [x[:args.queue_size].to(device) for x in checkpoint.pop("queue", [])]
    saved = dict(optimizer=optimizer, scaler=scaler, tokenizer=tokenizer.text, teacher=args.teacher)
    bank = None # the teacher's targets of all training images, (images, width) float16
    if args.cache_targets and width:
        bank = cached_targets(teacher, width, train.images, args, device, dtype, autocast, micro)
    scale, shift = target_statistics(bank, args, device)
    held_out = None # for validations, which the first rank makes
    if not rank and run.step < args.max_steps:
        held_out = validation_batch(val, teacher, tokenizer, scale, shift, args, device, autocast, micro)
    if compiled: # in place: the weights keep their names
        student.compile()
        if width:
            teacher.compile()
    join_ranks(ready=True)

    # -- loop
    order = batch_order(pairs.num_units, args.batch_size, args.seed, run.step, rank, world)
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=order, collate_fn=pairs.collate,
                                         num_workers=args.num_workers, worker_init_fn=ignore_signals,
                                         pin_memory=device.type == "cuda")
    group_of = torch.from_numpy(pairs.group)
    step = run.step
    student.train()
    for images, ids, padding_mask, index, noise, bad in run.batches(loader):
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        unreadable = run.name_unreadable(step, bad)

        # the batch. Pictures come cropped; flip, turn, colour and hidden patches follow from each one's noise
        images, ids, padding_mask, noise, group = (
            x.to(device, non_blocking=True) for x in (images, ids, padding_mask, noise, group_of[index]))
        images = augment(images, noise[:, :7], args.flip, args.rotate, args.color) # (n, 3, H, W) float32
        visible = visible_patches(noise[:, 7:], args.mask_ratio) # (n, K), None for all
        chunks = [slice(i, i + micro) for i in range(0, n, micro)]
        parts = [[None if x is None else x[c] for x in (images, ids, padding_mask, visible)] for c in chunks]

        # what the loss reads besides the student's outputs is of the whole batch, (B, ..), on every rank
        group = all_gather(group)
        target = None
        if bank is not None:
            target = bank[index] # (n, D) float16; pinned, so that the host does not wait for the copy
            target = (target.pin_memory() if device.type == "cuda" else target).to(device, non_blocking=True)
            target = all_gather((target.float() - shift) / scale)
        elif width:
            target = all_gather(torch.cat([teacher_target(teacher, x, args, autocast) for x, *_ in parts]))

        # the student's outputs, 4 or 6 x (n, ..); with a graph if one micro-batch is all
        with torch.set_grad_enabled(len(parts) == 1), autocast:
            outputs = [student(*part) for part in parts]
        # the loss of all B pairs, on leaves; its gradient for each output, and for what only the loss reads
        leaves = [all_gather(torch.cat(x).detach().float()).requires_grad_() for x in zip(*outputs)] # (B, ..)
        loss, terms = loss_terms(leaves, target, group, queue, student, args)
        scaler.scale(loss / world).backward() # each rank has the whole loss: gradients are summed over ranks
        # from there back through the student. Micro-batches run again, with graph: the memory of one, the
        # gradient of all (gradient caching, Gao et al. 2021)
        for c, part in zip(chunks, parts):
            with autocast:
                part_outputs = outputs[0] if len(parts) == 1 else student(*part)
            rows = slice(rank * n + c.start, rank * n + c.stop) # of this part among the B
            backward = [(x, world * leaf.grad[rows].to(x.dtype)) for x, leaf in zip(part_outputs, leaves)
                        if leaf.grad is not None]
            torch.autograd.backward(*zip(*backward))

        norm = optimizer_step(optimizer, scaler, args.grad_clip, also=[unreadable])
        with torch.no_grad():
            student.log_scale.clamp_(0, math.log(100)) # as CLIP
        if args.queue_size and args.kd_loss == "contrastive": # the oldest fall out
            new = [F.normalize(target, dim=-1), group]
            old = queue or [target[:0], group[:0]]
            queue = [torch.cat(pair)[:args.queue_size] for pair in zip(new, old)]
        step += 1
        if rank: # the first logs, validates and saves for all
            continue

        run.add(loss=loss, **terms, norm=norm, unreadable=unreadable)
        if step % args.log_interval == 0 or step == args.max_steps:
            means, pace = run.means(step, "pairs")
            means |= {"scale": student.log_scale.exp().view(-1)[0].item(), "lr": lr}
            shown = "  ".join(f"{k} {means[k]:.4f}" for k in ("loss", *terms, "norm", "scale"))
            run.log(step, f"step {step:>6}/{args.max_steps}  {shown}  lr {lr:.2e}  {pace}", **means)
        if step % args.eval_interval == 0 or step == args.max_steps:
            with run.paused(step):
                record = validate(student, val, held_out, args, device, dtype, autocast, micro)
            if record["val_mean"] > best["mean"]:
                best = {"mean": record["val_mean"], "step": step}
            kd = "".join(f", {k[4:]} {v:.4f}" for k, v in record.items() if k.startswith("val_kd"))
            run.log(step, f"validation at step {step}: R@10 image to text {record['val_i2t_r10']:.1f}, text "
                    f"to image {record['val_t2i_r10']:.1f}, mean recall {record['val_mean']:.1f} (best "
                    f"{best['mean']:.1f} at {best['step']}){kd}", best="val_mean", **record)
        if step % args.save_interval == 0:
            run.save(step, student, best=best, queue=queue, **saved)

    # -- end
    run.save(step, student, best=best, queue=queue, **saved)
    run.end(step)
    if not rank:
        judge(args, run.path, device)
        print(f"trained {step} steps in {run.minutes():.1f} min, peak memory {peak_memory(device):.2f} GB, "
              f"best validation mean recall {best['mean']:.1f} (step {best['step']}); wrote {run.path}\n"
              f"{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main(get_args())
