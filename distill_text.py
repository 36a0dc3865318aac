"""
Distils a text student: half of a BERT regresses what the whole one computes, without labels.

    python prepare_owt.py --tokenizer=bert      # OpenWebText, then
    python distill_text.py                      # six-layer BERT: 27 h on one RTX 4090 in the thesis' code
    python distill_text.py --preset=data2vec2   # data2vec 2.0's text model, which reads GPT-2's BPE
    python distill_text.py --preset=tiny        # half of a small BERT that pip brings, no other download

The target of each token is the mean over all blocks of their instance-normed outputs (feature_target,
eq. 36-38), the loss its mean squared error over real tokens (eq. 39). Ends with out/<run>/ckpt.pt.
"""
import copy
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

from model import (PRETRAINED, Encoder, Parser, Stop, check_resume, continuing, fail, finite_rows, git_sha,
                   join_ranks, keep_blocks, load_encoder, load_optimizer, load_weights, log_record, open_log,
                   open_run, peak_memory, pick_device, pick_dtype, print_settings, run_script,
                   save_checkpoint, split_batch, sum_over_ranks, use_compile)
from prepare_owt import Tokens

# -----------------------------------------------------------------------------
# presets and knobs

PRESETS = {
    # The distilled BERT of the thesis: the first 6 of 12 blocks, OpenWebText in sequences of 256. Published:
    # GLUE 76.9 with WNLI (BERT 79.5, DistilBERT 77.0). These are the defaults of the knobs below.
    "bert": dict(),
    # The text student of its early systems: 6 of data2vec 2.0's 12 blocks.
    "data2vec2": dict(data="owt_gpt2", teacher="data2vec2_text", out_dir="out/data2vec2_text"),
    # First 3 of the 6 blocks of all-MiniLM-L6-v2, on Python's own documentation, minutes on two CPU cores.
    # Its embedding is the mean token of the last block, which instance norm would take out of the target.
    "tiny": dict(
        data="pydoc_minilm", teacher="minilm", out_dir="out/tiny_text", depth=3, max_length=64, batch_size=64,
        target="last", instance_norm=False, max_steps=200, lr=2e-3, warmup_steps=20, log_interval=20,
        eval_interval=50, save_interval=50, agreement=1000),
}

# what makes the model: cannot change on --resume
MODEL_KNOBS = ["depth", "attn_bias"]


def get_args(argv=None):
    p = Parser(__doc__, PRESETS)
    p.section("data")
    p.knob("data", "owt_bert", "name of the prepared text: DATA_DIR/NAME, in the teacher's vocabulary")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("max_length", 256, "tokens of a sequence with CLS and SEP; documents are packed", least=3)
    p.section("model")
    p.knob("teacher", "bert", "bert or data2vec2_text (downloaded once), minilm (a package carries it), or a "
           "checkpoint of this script")
    p.knob("path", None, "file of its published weights, for a machine without a network", type=str)
    p.knob("init", "first", "where the student starts: with the teacher's first blocks, with blocks spread "
           "evenly over it (every second for half of them), both with all that comes before the blocks, or "
           "random", choices=["first", "alternate", "random"])
    p.knob("depth", 6, "blocks of the student", least=1)
    p.knob("attn_bias", "teacher", "what the student adds to its attention: as the teacher, nothing or "
           "ALiBi; another than the teacher's takes --init=random", choices=["teacher", "none", "alibi"])
    p.section("loss")
    p.knob("target", "all", "what is regressed: all tokens of the mean of all blocks (eq. 36-38); its CLS "
           "token only; all tokens of the last block only", choices=["all", "cls", "last"])
    p.knob("instance_norm", True, "norm each block's output over its tokens before the mean (eq. 36)")
    p.knob("criterion", "mse", "distance: mean squared or mean absolute error over all elements",
           choices=["mse", "l1"])
    p.section("optimisation")
    p.knob("batch_size", 256, "sequences per optimiser step, over all ranks", least=1)
    p.knob("micro_batch_size", 0, "sequences per forward pass of each rank, 0: all; gradients are "
           "accumulated")
    p.knob("max_steps", 60000, "optimiser steps", least=1)
    p.knob("lr", 5e-4, "peak learning rate, used as it is: not scaled by the batch size")
    p.knob("min_lr", 0.0, "learning rate at the end of the cosine")
    p.knob("warmup_steps", 6000, "steps of linear warm-up")
    p.knob("weight_decay", 0.01, "AdamW, on matrices; not on biases, norms, positions, embeddings")
    p.knob("grad_clip", 0.0, "largest norm of the gradient, 0: no clipping")
    p.section("run")
    p.knob("agreement", 0, "sentences of the validation text, at most, whose nearest neighbours by student "
           "and by teacher every validation compares; 0: none")
    p.knob("out_dir", "out/bert", "folder for ckpt.pt and log.jsonl")
    p.knob("resume", False, "continue the run in OUT_DIR")
    p.knob("seed", 0, "of all that is random", most=2 ** 31 - 1)
    p.knob("log_interval", 50, "steps between log lines", least=1)
    p.knob("eval_interval", 6000, "steps between validations", least=1)
    p.knob("save_interval", 1000, "steps between checkpoints", least=1)
    p.knob("device", "auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    p.knob("dtype", "auto", "of autocast; auto: bfloat16 where the device is fast with it, else float16 on "
           "CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    p.knob("compile", "auto", "torch.compile the models; auto: on CUDA under Linux", type=str.lower,
           choices=["auto", "true", "false"], nargs="?", const="true")
    return p.parse(argv)


# -----------------------------------------------------------------------------
# loss, and how far student and teacher agree


def feature_loss(student, teacher, ids, padding_mask, args, autocast):
    """Eq. 39 as a sum: squared error between the averaged, normed layers of student and teacher, mean over
    channels, sum over real tokens (target=cls: CLS tokens); or what --instance_norm, --criterion make of it.
    ids (n, T), padding_mask (n, T) or None. float32 scalar; the caller divides by the tokens of the whole
    batch, since a mean in each micro-batch would weigh the tokens of short sequences more."""
    def target_of(encoder):
        x = encoder(ids, padding_mask, instance_norm=args.instance_norm,
                    target_layers=1 if args.target == "last" else len(encoder.blocks))
        return x[:, :1] if args.target == "cls" else x # (n, T, D)

    with autocast:
        with torch.no_grad():
            target = target_of(teacher)
        out = target_of(student)
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[args.criterion]
    error = distance(out, target, reduction="none").mean(-1) # (n, T), or (n, 1) for CLS alone
    if padding_mask is not None:
        error = error.masked_fill(padding_mask[:, :error.shape[1]], 0.0)
    return error.sum()


def neighbour_agreement(student_emb, teacher_emb, k):
    """Share of texts, in percent, whose nearest neighbour by the teacher, the text itself left out, is among
    the k nearest by the student. Chance: 100 k / (n - 1).

    student_emb (n, D), teacher_emb (n, E): any float dtype, normalised here. Equal cosines of the student
    count as if in random order: embeddings that are all the same get chance."""
    normed = (F.normalize(x.float(), dim=-1) for x in (student_emb, teacher_emb))
    student, teacher = ((x @ x.T).fill_diagonal_(-math.inf) for x in normed) # (n, n) each
    own = student.gather(1, teacher.argmax(1, keepdim=True)) # (n, 1)
    before, equal = (~(student <= own)).sum(1), (student == own).sum(1) # before: NaN, too; equal: itself, too
    return ((k - before) / equal).clamp(0, 1).mean().item() * 100


# -----------------------------------------------------------------------------
# batches: what comes when is a function of (seed, epoch), so a resumed run sees what it would have seen


class Sequences:
    """The tokens of one split as sequences: CLS, the next max_length - 2 ids of the stream, of whatever
    documents, SEP. The last sequence is padded."""

    def __init__(self, tokens, tokenizer, max_length):
        self.tokens, self.max_length, self.pad = tokens, max_length, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        self.cls, self.sep = tokenizer.encode([""], 2)[0][0].tolist()

    def __len__(self):
        return -(-len(self.tokens) // (self.max_length - 2))

    def batch(self, which):
        """As frame; and the numbers of sequences with ids beyond the vocabulary, which have the next in their
        place."""
        n, rows, bad = self.max_length - 2, [], []
        for i in which:
            while (row := self.tokens[i * n:i * n + n]).max() >= self.vocab_size and len(bad) <= len(self):
                bad.append(int(i)) # as many as there are would be too many
                i = (i + 1) % len(self)
            rows.append(row)
        return *self.frame(rows), bad

    def frame(self, rows):
        """Rows of ids -> the same between CLS and SEP, (n, T) int64; padding_mask (n, T); T: the longest."""
        rows = [torch.from_numpy(np.concatenate([[self.cls], row, [self.sep]])) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        return ids, ids == self.pad # which no text holds


def sentences(sequences, stop, limit):
    """At most limit different sentences, spread evenly over the first million tokens: ids, padding_mask, both
    (n, T). A sentence ends after a full stop, whose id is stop, or with its document; 8 to 62 tokens long."""
    stream, end = sequences.tokens[:1_000_000], sequences.tokens.end_id
    rows = np.split(stream, np.flatnonzero((stream == stop) | (stream == end)) + 1)
    rows = dict.fromkeys(tuple(row[row != end].tolist()) for row in rows) # each once, in order
    rows = [row for row in rows if 8 <= len(row) <= min(62, sequences.max_length - 2)]
    if len(rows) < 2:
        fail(f"--agreement={limit}, but the validation text has {len(rows)} sentences of 8 to 62 tokens")
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), limit)).astype(int)
    return sequences.frame([rows[i] for i in chosen])


def batch_order(num_sequences, batch_size, seed, step):
    """Yields for each step, from `step` on and for ever, the numbers of its sequences. An epoch is one
    permutation; the rest that fills no batch is left out, other sequences in each epoch."""
    per_epoch = num_sequences // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(num_sequences)
        for k in range(first, per_epoch):
            yield order[k * batch_size:(k + 1) * batch_size].tolist()
            step += 1


# -----------------------------------------------------------------------------
# learning rate; what is checked before time is spent


def get_lr(step, args):
    """Linear warm-up, then half a cosine down to min_lr. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def check(args):
    """What the flags cannot say by themselves, before time is spent."""
    if args.teacher not in PRETRAINED and not os.path.isfile(args.teacher):
        fail(f"--teacher={args.teacher} is neither bert, data2vec2_text nor minilm, nor a file")
    split_batch(args)
    if os.path.abspath(args.teacher) == os.path.abspath(os.path.join(args.out_dir, "ckpt.pt")):
        fail(f"--teacher={args.teacher} is what this run would write: give another --out_dir")
    check_resume(args)
    if args.agreement == 1:
        fail("--agreement=1: a sentence alone has no neighbours; give more, or 0 for none")
    if args.init != "random" and args.attn_bias != "teacher":
        fail(f"--attn_bias={args.attn_bias} makes blocks that are not the teacher's: add --init=random")


def prepare(args):
    """Data that are not there: the tiny preset's are made, others end the program with the command to run."""
    if os.path.exists(os.path.join(args.data_dir, args.data, "meta.json")):
        return
    if args.data != PRESETS["tiny"]["data"]:
        tokenizer = {"data2vec2_text": "gpt2", "minilm": "minilm"}.get(args.teacher, "bert")
        fail(f"data set {args.data} is not in {args.data_dir}/. OpenWebText for this teacher:\n"
             f"  python prepare_owt.py --tokenizer={tokenizer} --data_dir={args.data_dir}\n"
             "A whole run without it, minutes on two CPU cores:\n  python distill_text.py --preset=tiny")
    run_script("prepare_owt.py", "--data=pydoc", f"--data_dir={args.data_dir}")


def main(args):
    # -- set up
    rank, world = join_ranks(ready=False)
    check(args)
    device = pick_device(args.device)
    prepare(args)
    dtype, compiled = pick_dtype(args.dtype, device), use_compile(args.compile, device)
    print_settings(args, device, dtype, compiled)
    torch.manual_seed(args.seed)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # -- teacher and student
    teacher = load_encoder(args.teacher, "text", args.path)
    tokenizer, L = teacher.tokenizer, teacher.config["depth"]
    if args.depth > L:
        fail(f"--depth={args.depth}, but the teacher {args.teacher} has {L} blocks")
    if args.max_length > teacher.max_length:
        fail(f"--max_length={args.max_length}, but the teacher {args.teacher} takes {teacher.max_length}")
    if args.init == "random": # without BERT's pooler, which nothing here would train
        bias = teacher.config["attn_bias"] if args.attn_bias == "teacher" else args.attn_bias
        student = Encoder(**{**teacher.config, "depth": args.depth, "attn_bias": bias, "pooler": False})
    else: # with the embeddings that stand before the blocks
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        keep_blocks(student, range(args.depth) if args.init == "first" else
                    [i * L // args.depth for i in range(args.depth)])
    student, teacher = student.to(device), teacher.to(device)
    print(f"student {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters trained; teacher "
          f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M, frozen")

    # -- data
    train, val = (Sequences(Tokens(args.data_dir, args.data, split, tokenizer), tokenizer, args.max_length)
                  for split in ("train", "val"))
    B, (n, micro) = args.batch_size, split_batch(args)
    if B > len(train):
        fail(f"--batch_size={B}, but an epoch has {len(train)} sequences. Use at most that many.")
    val_ids, val_mask, _ = val.batch(np.linspace(0, len(val) - 1, min(len(val), 2000)).astype(int))
    print(f"{len(train):,} training sequences, {len(val_ids):,} of {len(val):,} for validation; "
          f"{len(train) // B} steps of {B} per epoch; {B} = {world} x {n // micro} x {micro} sequences per "
          f"step (ranks x micro-batches x sequences)")

    def loss_of(ids, padding_mask, whole):
        """The share of these sequences in the loss of a batch, whole: its padding mask; all on the CPU."""
        count = len(whole) if args.target == "cls" else (~whole).sum().item()
        # almost no sequence is padded, and attention without a mask is faster
        padding_mask = padding_mask.to(device, non_blocking=True) if padding_mask.any() else None
        ids = ids.to(device, non_blocking=True)
        return feature_loss(student, teacher, ids, padding_mask, args, autocast) / count

    @torch.no_grad()
    def embed(encoder):
        """Embeddings of the held-out sentences as encode_text gives them, (n, D) float32."""
        with autocast:
            parts = zip(*(x.to(device).split(micro) for x in held_out))
            return torch.cat([encoder.encode(*part) for part in parts])

    if args.agreement:
        held_out = sentences(val, tokenizer.encode(["."], 3)[0][0, 1].item(), args.agreement)
        teacher_emb = embed(teacher)

    # -- optimizer: no decay for biases, norms, positions, embeddings
    named = list(student.named_parameters())
    is_decayed = [p.ndim >= 2 and "embed" not in n for n, p in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p for (_, p), d in zip(named, is_decayed) if d], "weight_decay": args.weight_decay},
         {"params": [p for (_, p), d in zip(named, is_decayed) if not d], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, start = 0, {"loss": math.inf, "step": 0}, None # start: what validate gave at step 0

    # -- resume
    path = os.path.join(args.out_dir, "ckpt.pt")
    checkpoint = open_run(args, MODEL_KNOBS)
    if checkpoint:
        with continuing(path):
            load_weights(student, checkpoint["model"], path)
            load_optimizer(optimizer, checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            step, best, start = checkpoint["step"], checkpoint["best"], checkpoint["start"]
    if not rank: # the first validates and writes for all
        open_log(args, step, device, dtype)
    if compiled: # in place: the weights keep their names
        student.compile()
        teacher.compile()

    def save(finished=False):
        save_checkpoint(path, student, tokenizer=tokenizer.text, step=step, best=best, start=start,
                        finished=finished, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        args=vars(args), code=git_sha(), torch=str(torch.__version__), teacher=args.teacher)

    def log(text, **record):
        log_record(args, step, text, **record)

    @torch.no_grad()
    def validate():
        """The training loss on the validation sequences in fixed order, and the agreement of neighbours."""
        parts = zip(val_ids.split(micro), val_mask.split(micro))
        loss = sum(loss_of(*part, val_mask).item() for part in parts)
        if loss < best["loss"]:
            best.update(loss=loss, step=step)
        record, text = {"val_loss": loss}, f"loss {loss:.4f} (best {best['loss']:.4f} at {best['step']})"
        if args.agreement:
            student_emb = embed(student)
            record |= {f"agreement_{k}": neighbour_agreement(student_emb, teacher_emb, k) for k in (1, 10)}
            text += "; agreement @1 {agreement_1:.1f}, @10 {agreement_10:.1f}".format(**record)
        log(f"validation at step {step}: {text}", **record)
        return record

    # -- loop
    join_ranks(ready=True)
    stop = Stop()
    batches = stop.until(map(train.batch, batch_order(len(train), B, args.seed, step)), args.max_steps - step)
    start = start or rank or validate()
    rows, waited, since, first_step, loop_start = [], 0.0, time.time(), step, time.time() # rows: loss, norm
    student.train()
    while True:
        wait_start = time.time()
        ids, padding_mask, bad = next(batches, (None,) * 3) # (B, T) each; all of it, to count the tokens
        if ids is None:
            break
        waited += time.time() - wait_start
        if stop.count(bad * (not rank), B, log): # all ranks see the same
            break
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        total = 0.0
        for part in zip(*(x[rank * n:(rank + 1) * n].split(micro) for x in (ids, padding_mask))):
            loss = loss_of(*part, padding_mask)
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
        step += 1
        if rank:
            continue

        rows.append(torch.stack([total, norm.float()])) # stays on the device: no waiting for it
        intervals = args.log_interval, args.eval_interval, args.save_interval
        due = [step % n == 0 or step == args.max_steps for n in intervals]
        if any(due): # nothing is measured or saved after a bad step
            table = finite_rows(rows, ("loss", "norm"), step, args) # (seen, 2)
        if due[0]:
            (mean, norm), seen = table.double().mean(0).tolist(), len(rows)
            ms = 1000 * (time.time() - since) / seen
            left = (args.max_steps - step) * (time.time() - loop_start) / (step - first_step)
            log(f"step {step:>6}/{args.max_steps}  loss {mean:.4f}  norm {norm:.2f}  lr {lr:.2e}  "
                f"{1000 * B / ms:.0f} sequences/s  {ms:.0f} ms ({1000 * waited / seen:.0f} for data)  "
                f"{peak_memory(device):.2f} GB  {left / 60:.1f} min left", loss=mean, norm=norm, lr=lr, ms=ms,
                sequences_per_s=1000 * B / ms, wait_ms=1000 * waited / seen, memory_gb=peak_memory(device),
                minutes_left=left / 60)
            rows, waited, since = [], 0.0, time.time()
        if due[1]:
            paused = time.time()
            end = validate()
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
    if args.agreement and "agreement_1" in start: # a resumed run may have begun without
        n = len(held_out[0])
        print(f"{'':20} val loss    @1   @10   (nearest neighbours as the teacher's, {n} held-out sentences)")
        for name, row in (("distilled", end), ("before the training", start)):
            print(f"{name:20} {row['val_loss']:8.4f} {row['agreement_1']:5.1f} {row['agreement_10']:5.1f}")
        print(f"{'chance':29} {100 / (n - 1):5.1f} {100 * min(1, 10 / (n - 1)):5.1f}")
    print(f"next, what it is worth: python evaluate.py glue --ckpt={path}")


if __name__ == "__main__":
    main(get_args())
