"""
Distils an image student: it regresses what a larger self-supervised teacher computes, without labels. And
makes such a teacher where there is none: --teacher=ema distils an exponential moving average of the student
into itself.

    python prepare_imagenet.py --data=imagenet --source=DIR --resize=256     # then
    python distill_image.py                     # DistilData2Vec2: 6.9 h on one RTX 4090 in the thesis' code,
                                                # validation loss 0.0845 there
    python distill_image.py --preset=shared_encoder  # the thesis' early student
    python distill_image.py --preset=tiny            # a teacher of OpenMoji, from scratch, no download
    python distill_image.py --preset=tiny_half       # three of that teacher's five blocks, distilled from it

The target of each token is the mean over all blocks of their instance-normed outputs (feature_target, eq.
36-38), the loss its mean squared error over all tokens (eq. 39). Ends with out/<run>/ckpt.pt.
"""
import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from model import (Encoder, Parser, Run, batch_order, fail, hash_of, ignore_signals, init_weights,
                   join_ranks, keep_blocks, load_encoder, make_data, make_optimizer, optimizer_step,
                   peak_memory, run_flags, set_up, split_batch, split_name, train_flags)
from prepare_imagenet import Bad, ByLabel, Pairs, augment, normalize, train_image

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
    # data2vec itself, small: OpenMoji, five minutes on two plain CPU cores. The teacher of tiny_half.
    "tiny": dict(
        data="openmoji", unit="label", out_dir="out/tiny_teacher", teacher="ema", img_size=48, patch_size=12,
        embed_dim=192, num_heads=3, depth=5, crop_min=0.3, lr=1e-3, max_steps=300, warmup_steps=25,
        weight_decay=0.05, grad_clip=3.0, log_interval=20, eval_interval=50, save_interval=50),
    # The same pictures: the first three of the tiny teacher's five blocks regress all five, as data2vec2 does
    # at full size.
    "tiny_half": dict(
        data="openmoji", unit="label", out_dir="out/tiny_half", teacher="out/tiny_teacher/ckpt.pt", depth=3,
        crop_min=0.3, lr=5e-4, max_steps=250, warmup_steps=25, log_interval=20, eval_interval=50,
        save_interval=50),
}

# what makes the model: cannot change when a run goes on
MODEL_KNOBS = ["depth", "img_size", "patch_size", "embed_dim", "num_heads", "mlp_ratio", "attn_bias",
               "share_embed"]
# tensors of an Encoder that stand before its blocks
EMBED = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "embed_norm.")


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
    p.knob("rotate", 0.0, "rotate by up to this many degrees; photographs get white corners", most=180)
    p.knob("color", 0.0, "vary colours by up to this share", most=1)
    p.section("model")
    p.knob("teacher", "data2vec2_image", "data2vec2_image, beitv2, dino, dinov2, dinov2_reg (downloaded "
           "once), dinov3, NAME:PATH of such a file, a checkpoint of this script, or ema: an exponential "
           "moving average of the student itself")
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
    p.knob("mask_ratio", 0.6, "teacher=ema: share of each image's patches that the student sees masked; it "
           "predicts what the average of itself, which is kept, computes there", most=0.99)
    p.knob("target_layers", 4, "teacher=ema: the target averages this many of the last blocks", least=1)
    p.knob("ema_decay", 0.99, "teacher=ema: decay of the average at the start; it rises to 1", most=1)
    train_flags(p, "images", max_steps=50040, warmup_steps=5004)
    run_flags(p, "out/data2vec2", eval_interval=5004)
    return p.parse(argv)


# -----------------------------------------------------------------------------
# losses, float32 scalars, means over the images given; images (n, 3, H, W) normalised, T = N + 1 tokens


def feature_loss(student, teacher, images, args, autocast):
    """Returns eq. 39: mean squared error between the averaged, normed layers of student and teacher, over all
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
    """Returns data2vec's objective: the student, some of its patches hidden, predicts for them the target
    that the teacher computes from the whole image; and with weight 0.1 its CLS token predicts the mean target
    of all patches. patch_mask (n, N), True where hidden. Mean over hidden patches and channels."""
    with autocast:
        with torch.no_grad():
            target = teacher(images, target_layers=target_layers) # (n, T, D)
        out = heads["predict"](student(images, patch_mask=patch_mask,
                                       mask_token=heads.mask_token)).float() # (n, T, D)
    whole = F.layer_norm(target[:, 1:].mean(1), target.shape[-1:]) # (n, D)
    error = F.mse_loss(out[:, 1:], target[:, 1:], reduction="none").mean(-1) # (n, N)
    # not error[patch_mask]: to know its size the host would wait for the device
    return (error * patch_mask).sum() / patch_mask.sum() + 0.1 * F.mse_loss(out[:, 0], whole)


def loss_of(student, heads, teacher, images, noise, args, autocast):
    """Returns the loss of this run; noise (n, N) in [0, 1) says which patches are hidden."""
    if args.teacher != "ema":
        return feature_loss(student, teacher, images, args, autocast)
    hidden = hidden_patches(noise, args.mask_ratio)
    return masked_loss(student, heads, teacher, images, hidden, args.target_layers, autocast)


# -----------------------------------------------------------------------------
# batches: everything random is a function of (seed, epoch, position), so a resumed run sees what it would
# have seen


class TrainImages(torch.utils.data.Dataset):
    """Crops of a prepared training split; the index is (epoch, position, unit), see batch_order."""

    def __init__(self, pairs, size, num_patches, args):
        if args.unit == "label" and pairs.labels is None:
            fail(f"--unit=label, but data set {args.data} has no labels. Use --unit=image.")
        self.pairs, self.size, self.num_patches, self.args = pairs, size, num_patches, args
        self.images_of = ByLabel(pairs.labels) if args.unit == "label" else None # of each label
        self.num_units = len(self.images_of or pairs.images)

    def __getitem__(self, index):
        """Returns a crop (3, H, W) uint8, its noise (7 + N,) in [0, 1), and the image's number if it is grey
        because it cannot be read, else -1."""
        epoch, position, unit = index
        rng = np.random.default_rng((self.args.seed, epoch, position))
        i = int(rng.choice(self.images_of[unit])) if self.images_of else unit
        bad = -1
        try:
            crop = train_image(self.pairs.images[i], self.size, self.args.crop_min, rng)
        except Bad:
            crop = torch.full((3, self.size, self.size), 128, dtype=torch.uint8)
            bad = i
        return crop, torch.from_numpy(rng.random(7 + self.num_patches, np.float32)), bad


def hidden_patches(noise, ratio):
    """Returns from noise (n, N) in [0, 1) a mask (n, N), True for the same number of patches in every
    image."""
    return noise.argsort(1).argsort(1) < int(noise.shape[1] * ratio)


# -----------------------------------------------------------------------------
# learning rate and validation


def get_lr(step, args):
    """Rises in a linear warm-up, then falls by half a cosine to 0. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


@torch.no_grad()
def validate(student, heads, teacher, images, args, device, autocast, micro):
    """Returns the training loss on these images (N, 3, H, W) uint8, unchanged, in fixed order; patches are
    always hidden in the same way."""
    num_patches = (images.shape[-1] // student.config["patch_size"]) ** 2
    noise = torch.from_numpy(np.random.default_rng(0).random((len(images), num_patches), np.float32))
    total = 0.0
    for x, u in zip(images.split(micro), noise.split(micro)):
        x = normalize(x.to(device))
        total += loss_of(student, heads, teacher, x, u.to(device), args, autocast).item() * len(x)
    return total / len(images)


# -----------------------------------------------------------------------------


def check(args):
    """Refuses what the flags cannot refuse by themselves, before time is spent."""
    name, path = split_name(args.teacher)
    if args.teacher != "ema" and path and not os.path.exists(path):
        fail(f"--teacher={args.teacher} is neither ema nor a published teacher (data2vec2_image, dino ..) "
             f"nor a file.\nTo make the tiny one, nothing to download:\n"
             f"  python distill_image.py --preset=tiny --data_dir={args.data_dir}")
    if args.init != "random" and (args.mlp_ratio or args.attn_bias != "teacher"):
        fail(f"--mlp_ratio={args.mlp_ratio} --attn_bias={args.attn_bias} make blocks that are not the "
             f"teacher's: add --init=random")
    split_batch(args)
    if args.teacher != "ema":
        return
    if args.img_size % args.patch_size or args.embed_dim % args.num_heads or args.embed_dim % 4:
        fail(f"--patch_size={args.patch_size} must divide --img_size={args.img_size}; "
             f"--num_heads={args.num_heads} and 4 must divide --embed_dim={args.embed_dim}")
    num_patches = (args.img_size // args.patch_size) ** 2
    if int(num_patches * args.mask_ratio) < 1:
        fail(f"--mask_ratio={args.mask_ratio} of {num_patches} patches hides none")
    if args.target_layers > args.depth:
        fail(f"--target_layers={args.target_layers}, but --depth={args.depth}")


def make_models(args):
    """Makes teacher, student and heads. --teacher=ema: both are new and equal, and the heads, which are
    thrown away with the student in the end, predict; else the student is made from the teacher."""
    heads = torch.nn.ModuleDict()
    if args.teacher == "ema":
        D = args.embed_dim
        student = Encoder("image", embed_dim=D, depth=args.depth, num_heads=args.num_heads,
                          img_size=args.img_size, patch_size=args.patch_size)
        heads["predict"] = torch.nn.Linear(D, D)
        heads.register_parameter("mask_token", torch.nn.Parameter(torch.randn(1, 1, D) * 0.02))
        init_weights(heads, D)
        return copy.deepcopy(student).requires_grad_(False), student, heads

    teacher = load_encoder(args.teacher, "image", args.weights_dir)
    L = teacher.config["depth"]
    if args.depth > L:
        fail(f"--depth={args.depth}, but the teacher {args.teacher} has {L} blocks")
    if args.init == "random":
        bias = teacher.config["attn_bias"] if args.attn_bias == "teacher" else args.attn_bias
        if bias != "none" and teacher.config["registers"]:
            fail(f"--attn_bias={bias} has none for the registers of {args.teacher}: use --attn_bias=teacher")
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
    return teacher, student, heads


def main(args):
    # -- set up
    rank, world = join_ranks(ready=False) # the first prepares and downloads, the others wait for it
    check(args)
    device, dtype, compiled, autocast = set_up(args)
    run = Run(args, __file__, MODEL_KNOBS, device, dtype)
    if args.preset.startswith("tiny") and args.data == "openmoji": # these start from nothing
        make_data(os.path.join(args.data_dir, args.data), "prepare_pairs.py", f"--data={args.data}",
                  f"--data_dir={args.data_dir}")

    # -- data, teacher and student
    train = Pairs(args.data_dir, args.data, "train")
    val = Pairs(args.data_dir, args.data, "val" if "val" in train.meta["splits"] else "test")
    knn_sets = {name: evaluate.labelled_splits(name, args.data_dir) for name in args.knn.split(",") if name}
    teacher, student, heads = (m.to(device) for m in make_models(args))
    is_ema = args.teacher == "ema"
    product = teacher if is_ema else student # what the run is for
    size = student.config["img_size"]
    images = TrainImages(train, size, (size // student.config["patch_size"]) ** 2, args)
    optimizer, scaler = make_optimizer([student, heads], args, device, dtype)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    print(f"student {trained / 1e6:.2f}M parameters trained; teacher {args.teacher}; {len(train.images):,} "
          f"training images, {min(len(val.images), 5000):,} of {len(val.images):,} for validation; an epoch "
          f"is every {args.unit} once")
    n, micro = split_batch(args, images.num_units) # images of this rank in a step, and of a forward pass

    # -- what an earlier run left
    labels = train.labels if args.unit == "label" else np.zeros(0)
    read = {"the data set": hash_of(train.images.offsets, labels)}
    parts = {"optimizer": optimizer, "scaler": scaler}
    if is_ema: # what is made is the average; to go on, the student itself is needed, too
        parts |= {"student": student, "heads": heads}
    else:
        read["the teacher"] = hash_of(teacher)
    checkpoint = run.restore(read, model=product, **parts)
    best = checkpoint.get("best", {"loss": math.inf, "step": 0})
    if not rank: # ImageNet's may lie class by class
        chosen = np.linspace(0, len(val.images) - 1, min(len(val.images), 5000)).astype(int)
        val_images = evaluate.EvalImages(val.images, size).stack(chosen)
    if compiled: # in place: the weights keep their names
        student.compile()
        teacher.compile()
    join_ranks(ready=True)

    # -- loop
    order = batch_order(images.num_units, args.batch_size, args.seed, run.step, rank, world)
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=args.num_workers,
                                         worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    step = run.step
    student.train()
    for crops, noise, bad in run.batches(loader):
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        unreadable = run.name_unreadable(step, bad)
        total = torch.zeros((), device=device)

        # the batch: flip, turn, colour and hidden patches follow from each picture's noise
        noise = noise.to(device, non_blocking=True)
        x = crops.to(device, non_blocking=True)
        x = augment(x, noise[:, :7], args.flip, args.rotate, args.color) # (n, 3, H, W) float32

        # a mean over images: each micro-batch has its share, and their sum is that of the batch
        for i in range(0, n, micro):
            c = slice(i, i + micro)
            loss = loss_of(student, heads, teacher, x[c], noise[c, 7:], args, autocast)
            loss = loss * (micro / args.batch_size)
            scaler.scale(loss).backward()
            total += loss.detach()

        norm = optimizer_step(optimizer, scaler, args.grad_clip, also=[total, unreadable])
        if is_ema:
            decay = 1 - (1 - args.ema_decay) * (1 - step / args.max_steps)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
        step += 1
        if rank: # the first logs, validates and saves for all
            continue

        run.add(loss=total, norm=norm, unreadable=unreadable)
        if step % args.log_interval == 0 or step == args.max_steps:
            means, pace = run.means(step, "images")
            run.log(step, f"step {step:>6}/{args.max_steps}  loss {means['loss']:.4f}  norm "
                    f"{means['norm']:.2f}  lr {lr:.2e}  {pace}", lr=lr, **means)
        if step % args.eval_interval == 0 or step == args.max_steps:
            with run.paused(step):
                loss = validate(student, heads, teacher, val_images, args, device, autocast,
                                args.micro_batch_size or args.batch_size) # whatever a rank's share is
                knn = {name: evaluate.evaluate_knn(product, splits["train"], list(splits.values())[-1], micro,
                                                   device, dtype, num_workers=args.num_workers)
                       for name, splits in knn_sets.items()}
            if loss < best["loss"]:
                best = {"loss": loss, "step": step}
            run.log(step, f"validation at step {step}: loss {loss:.4f} (best {best['loss']:.4f} at "
                    f"{best['step']})", best="val_loss", val_loss=loss)
            for name, metrics in knn.items():
                run.log(step, f"nearest neighbours at step {step}: {name} " +
                        ", ".join(f"{k} {v:.2f}" for k, v in metrics.items()),
                        **{f"knn_{name}_{k}": round(v, 3) for k, v in metrics.items()})
        if step % args.save_interval == 0:
            run.save(step, product, **parts, best=best, teacher=args.teacher)

    # -- end
    run.save(step, product, **parts, best=best, teacher=args.teacher)
    run.end(step)
    if rank:
        return
    print(f"trained {step} steps in {run.minutes():.1f} min, peak memory {peak_memory(device):.2f} GB, "
          f"validation loss {best['loss']:.4f} at best; wrote {run.path}")
    task = "digits" if args.data == "openmoji" else "cifar10" # what needs no download either
    print(f"next, what it is worth: python evaluate.py knn --ckpt={run.path} --task={task} "
          f"--data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
