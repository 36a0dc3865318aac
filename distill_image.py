"""
Distils an image student: it regresses what a larger self-supervised teacher computes, without labels. And
makes such a teacher where there is none: --teacher=ema distils an exponential moving average of the student
into itself.

    python prepare_imagenet.py --data=imagenet --source=DIR --resize=256     # then
    python distill_image.py                     # DistilData2Vec2: 6.9 h on one RTX 4090 in the thesis' code,
                                                # validation loss 0.0845 there
    python distill_image.py --preset=shared_encoder  # the thesis' early student
    python distill_image.py --preset=tiny            # a teacher for OpenMoji, from scratch, no download
    python distill_image.py --preset=tiny_half       # three of that teacher's five blocks, distilled from it

The target of each token is the mean over all blocks of their instance-normed outputs (feature_target, eq.
36-38), the loss its mean squared error over all tokens (eq. 39). Ends with out/<run>/ckpt.pt.
"""
import copy
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from model import (PRETRAINED, Encoder, Parser, Stop, WholeBatch, continuing, fail, finite_rows, gather,
                   git_sha, ignore_signals, init_weights, join_ranks, keep_blocks, kept_patches, load_encoder,
                   load_optimizer, load_weights, loader_processes, log_record, open_log, open_run,
                   peak_memory, pick_device, pick_dtype, print_settings, random_patch_mask, save_checkpoint,
                   split_batch, sum_over_ranks, use_compile)
from prepare_pairs import Bad, Pairs, augment, train_image

# -----------------------------------------------------------------------------
# presets and knobs

PRESETS = {
    # DistilData2Vec2 of the thesis: the first 6 of the teacher's 12 blocks, 10 epochs of ImageNet at 256.
    # Published: ImageNet 76.1 finetuned, 71.1 linear probe (final text; 75.0 / 56.2 in the draft). These are
    # the defaults of the knobs below.
    "data2vec2": dict(),
    # The early student of the thesis: the teacher's embeddings, frozen, run once and feed both; five fresh
    # blocks, post-norm as data2vec 2.0's, with 2-D ALiBi and narrower MLPs. Judged by kNN on CIFAR every
    # 5,000 steps.
    "shared_encoder": dict(
        out_dir="out/shared_encoder", init="random", share_embed=True, depth=5, mlp_ratio=3.0,
        attn_bias="alibi", grad_clip=2.0, max_steps=30000, warmup_steps=3000, eval_interval=5000,
        knn="cifar10,cifar100"),
    # OpenMoji, two CPU cores, a minute: the teacher of `distill_multimodal.py --preset=tiny`.
    "tiny": dict(
        data="openmoji", unit="label", out_dir="out/tiny_teacher", teacher="ema", objective="views",
        img_size=48, patch_size=12, embed_dim=192, num_heads=3, depth=5, crop_min=0.3, rotate=20.0, color=0.5,
        mask_ratio=0.5, lr=1e-3, max_steps=200, warmup_steps=25, weight_decay=0.05, grad_clip=3.0,
        log_interval=20, eval_interval=50, save_interval=50),
    # The same pictures: the first three of the tiny teacher's five blocks regress all five, as data2vec2 does
    # at full size.
    "tiny_half": dict(
        data="openmoji", unit="label", out_dir="out/tiny_half", teacher="out/tiny_teacher/ckpt.pt", depth=3,
        crop_min=0.3, lr=5e-4, max_steps=250, warmup_steps=25, log_interval=20, eval_interval=50,
        save_interval=50),
}


# what makes the model: cannot change on --resume
MODEL_KNOBS = ["depth", "img_size", "patch_size", "embed_dim", "num_heads", "objective", "mlp_ratio",
               "attn_bias", "share_embed"]
# read only with a teacher that exists before, and only with --teacher=ema
TEACHER_KNOBS = ["path", "init", "mlp_ratio", "attn_bias", "share_embed", "target", "instance_norm",
                 "criterion"]
EMA_KNOBS = ["img_size", "patch_size", "embed_dim", "num_heads", "objective", "mask_ratio", "target_layers",
             "temperature", "ema_decay"]
# tensors of an Encoder that stand before its blocks
EMBED = ("patch_embed.", "cls_token", "pos_embed", "embed_norm.")


def get_args(argv=None):
    p = Parser(__doc__, PRESETS)
    p.section("data")
    p.knob("data", "imagenet", "name of the prepared images: DATA_DIR/NAME")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("unit", "image", "what an epoch runs over once: every image, or every label (OpenMoji: family) "
           "with a random image of it; labels are used for nothing else", choices=["image", "label"])
    p.knob("knn", "", "prepared sets with labels, comma between, whose nearest neighbours are looked up at "
           "every validation (evaluate.py knn); labels are used for nothing else")
    p.knob("crop_min", 0.08, "smallest area of the random crop, as a share of the picture", most=1)
    p.knob("flip", 0.5, "probability of a mirror image", most=1)
    p.knob("rotate", 0.0, "rotate by up to this many degrees; for drawings, photographs get white corners",
           most=180)
    p.knob("color", 0.0, "vary colours by up to this share", most=1)
    p.knob("num_workers", loader_processes(), "processes that decode images, for each rank; 0 decodes "
           "between the steps")
    p.section("model")
    p.knob("teacher", "data2vec2_image", "data2vec2_image or beitv2 (downloaded once), a checkpoint of this "
           "script, or ema: an exponential moving average of the student itself")
    p.knob("path", None, "file of its published weights, for a machine without a network", type=str)
    p.knob("init", "first", "where the student starts: with the teacher's first blocks, with blocks spread "
           "evenly over it (every second for half of them), both with all that comes before the blocks, "
           "or random", choices=["first", "alternate", "random"])
    p.knob("depth", 6, "blocks of the student", least=1)
    p.knob("mlp_ratio", 0.0, "hidden width of the student's MLPs by EMBED_DIM, 0: as the teacher's; "
           "another takes --init=random")
    p.knob("attn_bias", "teacher", "what the student adds to its attention: as the teacher, nothing, or "
           "ALiBi in two dimensions (another than the teacher's takes --init=random)",
           choices=["teacher", "none", "alibi"])
    p.knob("share_embed", False, "the student keeps the teacher's patch embedding, CLS token, positions and "
           "norm before the blocks, frozen: they run once for both, and save their gradients")
    p.knob("img_size", 224, "teacher=ema: side of the square images in pixels", least=1)
    p.knob("patch_size", 16, "teacher=ema: side of a patch in pixels", least=1)
    p.knob("embed_dim", 768, "teacher=ema: width of all blocks", least=4)
    p.knob("num_heads", 12, "teacher=ema: attention heads of all blocks", least=1)
    p.section("loss")
    p.knob("target", "all", "what a teacher that exists before is regressed at: all tokens of the mean of "
           "all blocks (eq. 36-38); its CLS token only; all tokens of the last block only",
           choices=["all", "cls", "last"])
    p.knob("instance_norm", True, "norm each block's output over its tokens before the mean (eq. 36)")
    p.knob("criterion", "mse", "distance: mean squared or mean absolute error over all elements",
           choices=["mse", "l1"])
    p.knob("objective", "mask", "teacher=ema: mask, data2vec's own: the student sees some patches masked and "
           "predicts the target there; views: two crops, turned and coloured differently, find each other "
           "among all of the batch (SimCLR); the average is what is kept", choices=["mask", "views"])
    p.knob("mask_ratio", 0.6, "share of each image's patches hidden from the student: with objective=mask it "
           "predicts what the teacher computes there, with objective=views they are left out, which saves "
           "their time (FLIP)", most=0.99)
    p.knob("target_layers", 4, "objective=mask: the target averages this many of the last blocks", least=1)
    p.knob("temperature", 0.2, "objective=views: divides the cosines", least=0.001)
    p.knob("ema_decay", 0.99, "teacher=ema: decay of the average at the start; "
           "it rises linearly to 1", most=1)
    p.section("optimisation")
    p.knob("batch_size", 256, "images per optimiser step, over all ranks", least=1)
    p.knob("micro_batch_size", 0, "images per forward pass of each rank, 0: all; gradients are "
           "accumulated over the batch")
    p.knob("max_steps", 50040, "optimiser steps", least=1)
    p.knob("lr", 5e-4, "peak learning rate, used as it is: not scaled by the batch size")
    p.knob("min_lr", 0.0, "learning rate at the end of the cosine")
    p.knob("warmup_steps", 5004, "steps of linear warm-up")
    p.knob("weight_decay", 0.01, "AdamW, on matrices; not on biases, norms, positions, tokens")
    p.knob("grad_clip", 0.0, "largest norm of the gradient, 0: no clipping")
    p.section("run")
    p.knob("out_dir", "out/data2vec2", "folder for ckpt.pt and log.jsonl")
    p.knob("resume", False, "continue the run in OUT_DIR")
    p.knob("seed", 0, "of all that is random", most=2 ** 31 - 1)
    p.knob("log_interval", 50, "steps between log lines", least=1)
    p.knob("eval_interval", 5004, "steps between validations", least=1)
    p.knob("save_interval", 1000, "steps between checkpoints", least=1)
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, "
           "else float16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("compile", "auto", "torch.compile the models; auto: on CUDA under Linux", type=str.lower,
           choices=["auto", "true", "false"], nargs="?", const="true")
    return p.parse(argv)


# -----------------------------------------------------------------------------
# losses, all float32 scalars; images (n, 3, H, W) normalised, T = N + 1 tokens


def feature_loss(student, teacher, images, args, autocast):
    """Eq. 39: mean squared error between the averaged, normed layers of student and teacher, over all
    elements; or what --target, --instance_norm and --criterion make of it."""
    def target_of(encoder, x):
        x = encoder(x, embedded=args.share_embed, instance_norm=args.instance_norm,
                    target_layers=1 if args.target == "last" else len(encoder.blocks)) # (n, T, D)
        return x[:, :1] if args.target == "cls" else x

    with autocast:
        with torch.no_grad():
            x = teacher.embed(images) if args.share_embed else images
            target = target_of(teacher, x)
        out = target_of(student, x)
    return {"mse": F.mse_loss, "l1": F.l1_loss}[args.criterion](out, target)


def masked_loss(student, heads, teacher, images, patch_mask, target_layers, autocast):
    """data2vec's objective: the student, some of its patches hidden, predicts for them the target that the
    teacher computes from the whole image; and with weight 0.1 its CLS token predicts the mean target of all
    patches. patch_mask (n, N), True where hidden. Mean over hidden patches and channels."""
    with autocast:
        with torch.no_grad():
            target = teacher(images, target_layers=target_layers) # (n, T, D)
        out = heads["predict"](student(images, patch_mask=patch_mask,
                                       mask_token=heads.mask_token)).float() # (n, T, D)
    whole = F.layer_norm(target[:, 1:].mean(1), target.shape[-1:]) # (n, D)
    error = F.mse_loss(out[:, 1:], target[:, 1:], reduction="none").mean(-1) # (n, N)
    # not error[patch_mask]: to know its size the host would wait for the device
    return (error * patch_mask).sum() / patch_mask.sum() + 0.1 * F.mse_loss(out[:, 0], whole)


def views_loss(student, heads, views, kept, temperature, autocast):
    """SimCLR's objective (NT-Xent): each view's projected CLS token finds that of the other view of its image
    among all 2n - 1 others. views: two tensors of images (n, 3, H, W); kept (n, 2, K): the patches that the
    student sees of each. Mean over the 2n views."""
    with autocast:
        kept = kept.transpose(0, 1).flatten(0, 1) # (2n, K)
        z = heads["project"](student(torch.cat(views), kept=kept)[:, 0]) # (2n, 128)
    z = F.normalize(z.float(), dim=-1) # (2n, 128)
    if torch.is_grad_enabled(): # in training, with what the other ranks have; validation is one's alone
        z = torch.cat([gather(x) for x in z.chunk(2)])
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf")) # (2n, 2n), nobody finds itself
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


# -----------------------------------------------------------------------------
# batches: everything random is a function of (seed, epoch, position), so a resumed run sees what it would
# have seen


class TrainImages(torch.utils.data.Dataset):
    """Crops of a prepared training split, two per image for objective=views; the index is (epoch, position,
    unit)."""

    def __init__(self, pairs, size, args):
        self.pairs, self.size, self.args = pairs, size, args
        self.crops = 2 if args.teacher == "ema" and args.objective == "views" else 1
        if args.unit == "label" and pairs.labels is None:
            fail(f"--unit=label, but data set {args.data} has no labels. Use --unit=image.")
        labels = pairs.labels if args.unit == "label" else np.arange(len(pairs.images))
        order = np.argsort(labels, kind="stable")
        self.images_of = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)

    def __getitem__(self, index):
        """Crops (c, 3, H, W) uint8, and which images could not be read before."""
        epoch, position, unit = index
        rng, bad = np.random.default_rng((self.args.seed, epoch, position)), []
        while len(bad) <= 10: # or are too many
            images = self.images_of[unit]
            i = int(images[rng.integers(len(images))])
            try:
                return train_image(self.pairs.images[i], self.size, self.args.crop_min, rng, self.crops), bad
            except Bad: # another in its place
                bad.append(i)
                unit = rng.integers(len(self.images_of))
        return torch.zeros(self.crops, 3, self.size, self.size, dtype=torch.uint8), bad

    def collate(self, samples):
        crops, bad = zip(*samples)
        return torch.stack(crops), sum(bad, []) # (n, c, 3, H, W)


def batch_order(num_units, batch_size, seed, step):
    """Yields for each step, from `step` on and for ever, its list of (epoch, position, unit). An epoch is one
    permutation of the units; the rest that fills no batch is left out, other units in each epoch."""
    per_epoch = num_units // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(num_units)
        for k in range(first, per_epoch):
            yield [(epoch, position, int(order[position]))
                   for position in range(k * batch_size, (k + 1) * batch_size)]
            step += 1


# -----------------------------------------------------------------------------
# learning rate


def get_lr(step, args):
    """Linear warm-up, then half a cosine down to min_lr. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


# -----------------------------------------------------------------------------


def check(args):
    """What the flags cannot say by themselves, before time is spent."""
    if args.teacher not in ("ema", *PRETRAINED) and not os.path.isfile(args.teacher):
        fail(f"--teacher={args.teacher} is neither ema nor a published teacher (data2vec2_image, beitv2) "
             f"nor a file.\n"
             f"To make a teacher, nothing to download:\n"
             f"  python prepare_pairs.py --data=openmoji\n  python distill_image.py --preset=tiny")
    split_batch(args)
    if args.micro_batch_size and args.teacher == "ema" and args.objective == "views":
        fail("--objective=views compares all images of a batch, so it takes no --micro_batch_size: "
             "lower --batch_size")
    if os.path.abspath(args.teacher) == os.path.abspath(os.path.join(args.out_dir, "ckpt.pt")):
        fail(f"--teacher={args.teacher} is what this run would write: give another --out_dir")
    useless = [f"--{k}" for k in args.given if k in TEACHER_KNOBS]
    if args.teacher == "ema" and useless:
        fail(f"{', '.join(useless)}: for a teacher that exists before, not for --teacher=ema")
    if args.init != "random" and (args.mlp_ratio or args.attn_bias != "teacher"):
        fail(f"--mlp_ratio={args.mlp_ratio} --attn_bias={args.attn_bias} make blocks that are not the "
             f"teacher's: add --init=random")
    useless = [f"--{k}" for k in args.given if k in EMA_KNOBS]
    if args.teacher != "ema" and useless:
        fail(f"{', '.join(useless)}: only for --teacher=ema; here {args.teacher} says it")
    if args.img_size % args.patch_size or args.embed_dim % args.num_heads or args.embed_dim % 4:
        fail(f"--patch_size={args.patch_size} must divide --img_size={args.img_size}; "
             f"--num_heads={args.num_heads} and 4 must divide --embed_dim={args.embed_dim}")
    num_patches = (args.img_size // args.patch_size) ** 2
    if args.teacher == "ema" and args.objective == "mask" and int(num_patches * args.mask_ratio) < 1:
        fail(f"--mask_ratio={args.mask_ratio} of {num_patches} patches hides none")
    if args.teacher == "ema" and args.objective == "mask" and args.target_layers > args.depth:
        fail(f"--target_layers={args.target_layers}, but --depth={args.depth}")
    if args.teacher == "ema" and args.objective == "views" and args.batch_size < 2:
        fail("--objective=views tells the images of a batch apart: --batch_size must be at least 2")


def main(args):
    # -- set up
    rank, world = join_ranks(ready=False)
    check(args)
    train = Pairs(args.data_dir, args.data, "train")
    val = Pairs(args.data_dir, args.data, "val" if "val" in train.meta["splits"] else "test")
    knn_sets = [(name, evaluate.labelled_splits(name, args.data_dir, "--knn"))
                for name in args.knn.split(",") if name]
    device = pick_device(args.device)
    dtype, compiled = pick_dtype(args.dtype, device), use_compile(args.compile, device)
    print_settings(args, device, dtype, compiled)
    torch.manual_seed(args.seed)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # -- teacher and student
    self_distilled = args.teacher == "ema"
    heads = torch.nn.ModuleDict() # only --teacher=ema has any; they are thrown away with the student
    if self_distilled:
        student = Encoder("image", embed_dim=args.embed_dim, depth=args.depth, num_heads=args.num_heads,
                          img_size=args.img_size, patch_size=args.patch_size)
        D = args.embed_dim
        if args.objective == "mask":
            heads["predict"] = torch.nn.Linear(D, D)
            init_weights(heads, D)
            heads.register_parameter("mask_token", torch.nn.Parameter(torch.randn(1, 1, D) * 0.02))
        else:
            heads["project"] = torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.Linear(D, 512),
                                                   torch.nn.GELU(), torch.nn.Linear(512, 128))
            init_weights(heads, D)
        teacher = copy.deepcopy(student).requires_grad_(False)
    else:
        teacher = load_encoder(args.teacher, "image", args.path)
        L = teacher.config["depth"]
        if args.depth > L:
            fail(f"--depth={args.depth}, but the teacher {args.teacher} has {L} blocks")
        if args.init == "random":
            bias = teacher.config["attn_bias"] if args.attn_bias == "teacher" else args.attn_bias
            student = Encoder(**{**teacher.config, "depth": args.depth, "attn_bias": bias,
                                 "mlp_ratio": args.mlp_ratio or teacher.config["mlp_ratio"]})
        else: # with the embeddings that stand before the blocks
            student = copy.deepcopy(teacher).train().requires_grad_(True)
            keep_blocks(student, [i * L // args.depth if args.init == "alternate" else i
                                  for i in range(args.depth)])
        if args.share_embed:
            before = {k: v for k, v in teacher.state_dict().items() if k.startswith(EMBED)}
            student.load_state_dict({**student.state_dict(), **before})
            for name, p in student.named_parameters():
                p.requires_grad_(not name.startswith(EMBED))
    student, teacher, heads = student.to(device), teacher.to(device), heads.to(device)
    size, patch_size = student.config["img_size"], student.config["patch_size"]
    num_params = sum(p.numel() for m in (student, heads) for p in m.parameters() if p.requires_grad)
    print(f"student {num_params / 1e6:.2f}M parameters trained; teacher "
          f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M, " +
          ("an average of the student" if self_distilled else "frozen"))

    # -- data
    images = TrainImages(train, size, args)
    B, (n, micro), num_units = args.batch_size, split_batch(args), len(images.images_of)
    if B > num_units:
        fail(f"--batch_size={B}, but an epoch has {num_units} units (--unit={args.unit}). "
             f"Use at most that many.")
    print(f"{len(train.images):,} training images, {min(len(val.images), 5000):,} of {len(val.images):,} for "
          f"validation; {num_units // B} steps of {B} per epoch (one epoch = every {args.unit} once); "
          f"{B} = {world} x {n // micro} x {micro} images per step (ranks x micro-batches x images)")

    def inputs_of(raw, generator, augmented=True):
        """Crops (n, c, 3, H, W) uint8 -> all that is random about a batch: c tensors of images and, for
        --teacher=ema, which patches are hidden (n, c, N) or, for views, which are not (n, c, K)."""
        change = dict(flip=args.flip, rotate=args.rotate, color=args.color) if augmented else dict(flip=0.0)
        views = [augment(x.to(device, non_blocking=True), generator, **change) for x in raw.unbind(1)]
        if not self_distilled:
            return views
        patches = random_patch_mask(len(raw) * len(views), (size // patch_size) ** 2, args.mask_ratio,
                                    generator)
        patches = kept_patches(patches) if args.objective == "views" else patches
        return *views, patches.view(len(raw), len(views), -1).to(device, non_blocking=True)

    def loss_of(*inputs):
        """The loss, a mean over the images given; inputs as from inputs_of."""
        if not self_distilled:
            return feature_loss(student, teacher, *inputs, args, autocast)
        *views, patches = inputs
        if args.objective == "views":
            return views_loss(student, heads, views, patches, args.temperature, autocast)
        return masked_loss(student, heads, teacher, views[0], patches[:, 0], args.target_layers, autocast)

    # -- optimizer: no decay for biases, norms, positions, tokens
    named = [(n, p) for m in (student, heads) for n, p in m.named_parameters() if p.requires_grad]
    is_decayed = [p.ndim >= 2 and "pos_embed" not in n and "token" not in n for n, p in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p for (_, p), d in zip(named, is_decayed) if d], "weight_decay": args.weight_decay},
         {"params": [p for (_, p), d in zip(named, is_decayed) if not d], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best = 0, {"loss": math.inf, "step": 0}

    # -- resume
    path = os.path.join(args.out_dir, "ckpt.pt")
    checkpoint = open_run(args, MODEL_KNOBS)
    if checkpoint:
        with continuing(path):
            if (checkpoint["teacher"] == "ema") != self_distilled:
                fail(f"{path} was made with --teacher={checkpoint['teacher']}, not --teacher={args.teacher}")
            load_weights(teacher if self_distilled else student, checkpoint["model"], path)
            if self_distilled:
                load_weights(student, checkpoint["student"], path)
                load_weights(heads, checkpoint["heads"], path)
            load_optimizer(optimizer, checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            step, best = checkpoint["step"], dict(checkpoint["best"])
    if not rank: # the first validates and writes for all
        open_log(args, step, device, dtype)
        # ImageNet's may lie class by class
        chosen = np.linspace(0, len(val.images) - 1, min(len(val.images), 5000)).astype(int)
        val_images = evaluate.EvalImages(val.images, size).stack(chosen)
    if compiled: # in place: the weights keep their names
        student.compile()
        teacher.compile()

    def save(finished=False):
        # what --teacher=ema makes is the average; to resume, the student itself is needed too
        rest = dict(student=student.state_dict(), heads=heads.state_dict())
        save_checkpoint(path, teacher if self_distilled else student, step=step, best=best, finished=finished,
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), args=vars(args),
                        code=git_sha(), torch=str(torch.__version__), teacher=args.teacher,
                        **(rest if self_distilled else {}))

    def log(text, **record):
        log_record(args, step, text, **record)

    @torch.no_grad()
    def validate():
        """The training loss on the validation images in fixed order; crops only for views, masks always the
        same."""
        generator, losses, views = (torch.Generator().manual_seed(0), [],
                                    self_distilled and args.objective == "views")
        for raw in val_images[:, None].split(args.micro_batch_size or B): # (n, 1, 3, H, W)
            inputs = inputs_of(raw.expand(-1, 2, -1, -1, -1) if views else raw, generator, views)
            losses.append(loss_of(*inputs).item() * len(raw))
        loss = sum(losses) / len(val_images)
        if loss < best["loss"]:
            best.update(loss=loss, step=step)
        log(f"validation at step {step}: loss {loss:.4f} (best {best['loss']:.4f} at {best['step']})",
            val_loss=loss)
        for name, splits in knn_sets:
            metrics = evaluate.evaluate_knn(teacher if self_distilled else student, splits["train"],
                                            list(splits.values())[-1], micro, device, dtype,
                                            num_workers=args.num_workers)
            log(f"nearest neighbours at step {step}: {name} top-1 {metrics['top1']:.2f}, top-3 "
                f"{metrics['top3']:.2f}; the other way {metrics['reverse_top1']:.2f}, "
                f"{metrics['reverse_top3']:.2f}",
                **{f"knn_{name}_{k}": round(v, 3) for k, v in metrics.items()})

    # -- loop
    join_ranks(ready=True)
    order = (batch[rank * n:(rank + 1) * n] for batch in batch_order(num_units, B, args.seed, step))
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, collate_fn=images.collate,
                                         num_workers=args.num_workers, worker_init_fn=ignore_signals,
                                         pin_memory=device.type == "cuda")
    stop = Stop()
    batches = stop.until(iter(loader), args.max_steps - step)
    # rows: loss, norm of steps not logged
    rows, waited, since, first_step, loop_start = [], 0.0, time.time(), step, time.time()
    student.train()
    while True:
        wait_start = time.time()
        raw, bad = next(batches, (None, None)) # (n, crops, 3, H, W) uint8
        if raw is None:
            break
        waited += time.time() - wait_start
        if stop.count(bad, n, log):
            break
        # a generator for each step: what was drawn before a kill need not be saved
        generator = torch.Generator().manual_seed(args.seed * 2 ** 32 + step)
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        with WholeBatch(): # drawn for all images at once: ranks and micro-batches change nothing
            total, inputs = 0.0, inputs_of(raw, generator)
        for start in range(0, n, micro):
            c = slice(start, start + micro)
            loss = loss_of(*(x[c] for x in inputs)) * (micro / B)
            scaler.scale(loss).backward()
            total = total + loss.detach()
        sum_over_ranks([total, *(p.grad for _, p in named)])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], args.grad_clip or float("inf"))
        if scaler.is_enabled(): # it skips a step whose gradient overflowed
            norm = norm.nan_to_num(0, 0, 0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self_distilled:
            decay = 1 - (1 - args.ema_decay) * (1 - step / args.max_steps)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
        step += 1
        if rank:
            continue

        rows.append(torch.stack([total, norm.float()])) # stays on the device: no waiting for it
        due = [step % n == 0 or step == args.max_steps
               for n in (args.log_interval, args.eval_interval, args.save_interval)]
        if any(due): # nothing is measured or saved after a bad step
            table = finite_rows(rows, ("loss", "norm"), step, args) # (seen, 2)
        if due[0]:
            (mean, norm), seen = table.double().mean(0).tolist(), len(rows)
            ms = 1000 * (time.time() - since) / seen
            left = (args.max_steps - step) * (time.time() - loop_start) / (step - first_step)
            log(f"step {step:>6}/{args.max_steps}  loss {mean:.4f}  norm {norm:.2f}  lr {lr:.2e}  "
                f"{1000 * B / ms:.0f} images/s  {ms:.0f} ms ({1000 * waited / seen:.0f} for data)  "
                f"{peak_memory(device):.2f} GB  {left / 60:.1f} min left", loss=mean, norm=norm, lr=lr,
                images_per_s=1000 * B / ms, ms=ms, wait_ms=1000 * waited / seen,
                memory_gb=peak_memory(device), minutes_left=left / 60)
            rows, waited, since = [], 0.0, time.time()
        if due[1]:
            paused = time.time()
            validate()
            since += time.time() - paused # ms counts training alone
        if due[2] and step < args.max_steps:
            save()

    # -- end
    if not rank:
        finite_rows(rows, ("loss", "norm"), step, args) # those since the last log line
        save(finished=step == args.max_steps)
    stop.end(path, None if step == args.max_steps else "--resume")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return
    print(f"trained {step - first_step} steps in {(time.time() - loop_start) / 60:.1f} min, peak memory "
          f"{peak_memory(device):.2f} GB, validation loss {best['loss']:.4f} at best; wrote {path}")
    task = "digits" if args.data == "openmoji" else "cifar10" # what needs no download either
    print(f"next, what it is worth: python evaluate.py knn --ckpt={path} --task={task} "
          f"--data_dir={args.data_dir}")
    if args.preset == "tiny":
        print(f"next: python distill_multimodal.py --preset=tiny --teacher={path} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
