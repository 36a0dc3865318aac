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
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from model import (Encoder, Parser, Run, all_gather, batch_order, fail, hash_of, ignore_signals, join_ranks,
                   keep_blocks, make_data, make_optimizer, optimizer_step, peak_memory, run_flags, set_up,
                   split_batch, split_name, train_flags)
from prepare_owt import Tokens, load_text_encoder

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
        target="last", instance_norm=False, max_steps=130, lr=2e-3, warmup_steps=13, log_interval=13,
        eval_interval=65, save_interval=65, agreement=1000),
}

# what makes the model: cannot change when a run goes on
MODEL_KNOBS = ["depth", "attn_bias"]


def get_args(argv=None):
    p = Parser(__doc__, PRESETS)
    p.section("data")
    p.knob("data", "owt_bert", "name of the prepared text: DATA_DIR/NAME, in the teacher's vocabulary")
    p.knob("data_dir", "data", "folder of all prepared data sets")
    p.knob("max_length", 256, "tokens of a sequence with CLS and SEP; documents are packed", least=3)
    p.section("model")
    p.knob("teacher", "bert", "bert or data2vec2_text (downloaded once), minilm (a package carries it), "
           "NAME:PATH of such a file or folder, or a checkpoint of this script")
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
    p.knob("agreement", 0, "sentences of the validation text, at most, whose nearest neighbours by student "
           "and by teacher every validation compares; 0: none")
    train_flags(p, "sequences", max_steps=60000, warmup_steps=6000)
    run_flags(p, "out/bert", eval_interval=6000)
    return p.parse(argv)


# -----------------------------------------------------------------------------
# loss, and how far student and teacher agree


def feature_loss(student, teacher, ids, padding_mask, args, autocast):
    """Returns eq. 39 as a sum: squared error between the averaged, normed layers of student and teacher, mean
    over channels, sum over real tokens (target=cls: CLS tokens); or what --instance_norm, --criterion make of
    it. ids (n, T), padding_mask (n, T) or None. float32 scalar; the caller divides by the tokens of the whole
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
    """Returns the share of texts, in percent, whose nearest neighbour by the teacher, the text itself left
    out, is among the k nearest by the student. Chance is 100 k / (n - 1).

    student_emb (n, D), teacher_emb (n, E): any float dtype, normalised here. Equal cosines of the student
    count as if in random order: embeddings that are all the same get chance."""
    normed = (F.normalize(x.float(), dim=-1) for x in (student_emb, teacher_emb))
    student, teacher = ((x @ x.T).fill_diagonal_(-math.inf) for x in normed) # (n, n) each
    cosine = student.gather(1, teacher.argmax(1, keepdim=True)) # (n, 1), of the teacher's neighbour
    before = (~(student <= cosine)).sum(1) # NaN counts, too
    equal = (student == cosine).sum(1) # the neighbour itself among them
    return ((k - before) / equal).clamp(0, 1).mean().item() * 100


# -----------------------------------------------------------------------------
# batches: what comes when is a function of (seed, epoch), so a resumed run sees what it would have seen


class Sequences(torch.utils.data.Dataset):
    """The tokens of one split as sequences: CLS, the next max_length - 2 ids of the stream, of whatever
    documents, SEP. The last sequence is padded. The index is (epoch, position, number), see batch_order."""

    def __init__(self, tokens, tokenizer, max_length):
        self.tokens, self.max_length, self.pad = tokens, max_length, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        self.cls, self.sep = tokenizer.encode([""], 2)[0][0].tolist()

    def __len__(self):
        return -(-len(self.tokens) // (self.max_length - 2))

    def __getitem__(self, index):
        n, i = self.max_length - 2, index[2]
        row = self.tokens[i * n:i * n + n] # (n,) int64
        if row.max() >= self.vocab_size: # on a GPU the embedding would end the process without a word
            raise ValueError(f"{self.tokens.path}: ids beyond the vocabulary from token {i * n:,} on: remove "
                             f"the set and prepare it again")
        return row

    def collate(self, rows):
        """Puts rows of ids between CLS and SEP. Returns ids (n, T) int64 and padding_mask (n, T); T: the
        longest."""
        rows = [torch.from_numpy(np.concatenate([[self.cls], row, [self.sep]])) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        return ids, ids == self.pad # which no text holds


def sentences(sequences, stop, limit):
    """Returns at most limit different sentences of 8 to 62 tokens, spread evenly over the first million
    tokens: ids, padding_mask, both (n, T). A sentence ends after a full stop, whose id is stop, or with its
    document."""
    stream, end = sequences.tokens[:1_000_000], sequences.tokens.end_id
    rows = np.split(stream, np.flatnonzero((stream == stop) | (stream == end)) + 1)
    rows = dict.fromkeys(tuple(row[row != end].tolist()) for row in rows) # each once, in order
    rows = [row for row in rows if 8 <= len(row) <= min(62, sequences.max_length - 2)]
    if len(rows) < 2:
        fail(f"--agreement={limit}, but the validation text has {len(rows)} sentences of 8 to 62 tokens")
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), limit)).astype(int)
    return sequences.collate([rows[i] for i in chosen])


# -----------------------------------------------------------------------------
# learning rate and validation


def get_lr(step, args):
    """Rises in a linear warm-up, then falls by half a cosine to 0. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def loss_tokens(padding_mask, target):
    """Returns of how many tokens of a batch the loss is a mean, as a tensor (1,): real ones, or CLS alone."""
    return torch.tensor([len(padding_mask) if target == "cls" else (~padding_mask).sum().item()])


@torch.no_grad()
def embed(encoder, held_out, device, autocast, micro):
    """Embeds sentences (ids, padding_mask), as encode_text does, (n, D) float32."""
    with autocast:
        return torch.cat([encoder.encode(ids.to(device), padding_mask.to(device))
                          for ids, padding_mask in zip(*(x.split(micro) for x in held_out))])


@torch.no_grad()
def validate(student, teacher, batch, held_out, teacher_emb, args, device, autocast, micro):
    """Returns a record for log.jsonl: the training loss on a batch (ids, padding_mask), and how often the
    nearest neighbour of a sentence is the teacher's."""
    total = sum(feature_loss(student, teacher, *to_device(device, *part), args, autocast).item()
                for part in zip(*(x.split(micro) for x in batch)))
    record = {"val_loss": total / loss_tokens(batch[1], args.target).item()}
    if args.agreement:
        student_emb = embed(student, held_out, device, autocast, micro)
        record |= {f"agreement_{k}": neighbour_agreement(student_emb, teacher_emb, k) for k in (1, 10)}
    return record


def to_device(device, ids, padding_mask):
    """Moves both to the device; a mask that hides nothing, as almost all do, becomes None: attention is then
    faster."""
    ids = ids.to(device, non_blocking=True)
    return ids, padding_mask.to(device, non_blocking=True) if padding_mask.any() else None


# -----------------------------------------------------------------------------


def check(args):
    """Refuses what the flags cannot refuse by themselves, before time is spent."""
    name, path = split_name(args.teacher)
    if path and not os.path.exists(path):
        fail(f"--teacher={args.teacher} is neither bert, data2vec2_text nor minilm, nor a file")
    split_batch(args)
    if args.agreement == 1:
        fail("--agreement=1: a sentence alone has no neighbours; give more, or 0 for none")
    if args.init != "random" and args.attn_bias != "teacher":
        fail(f"--attn_bias={args.attn_bias} makes blocks that are not the teacher's: add --init=random")
    if args.data != PRESETS["tiny"]["data"] and not os.path.exists(f"{args.data_dir}/{args.data}/meta.json"):
        tokenizer = {"data2vec2_text": "gpt2", "minilm": "minilm"}.get(name, "bert")
        fail(f"data set {args.data} is not in {args.data_dir}/. OpenWebText for this teacher:\n"
             f"  python prepare_owt.py --tokenizer={tokenizer} --data_dir={args.data_dir}\n"
             "A whole run without it, minutes on two CPU cores:\n  python distill_text.py --preset=tiny")


def make_student(teacher, args):
    """Makes a student of the teacher's first blocks, of such as are spread evenly over it, or of random
    ones."""
    L = teacher.config["depth"]
    if args.depth > L:
        fail(f"--depth={args.depth}, but the teacher {args.teacher} has {L} blocks")
    if args.max_length > teacher.max_length:
        fail(f"--max_length={args.max_length}, but the teacher {args.teacher} takes {teacher.max_length}")
    if args.init == "random": # without BERT's pooler, which nothing here would train
        bias = teacher.config["attn_bias"] if args.attn_bias == "teacher" else args.attn_bias
        return Encoder(**{**teacher.config, "depth": args.depth, "attn_bias": bias, "pooler": False})
    student = copy.deepcopy(teacher).train().requires_grad_(True) # with what stands before the blocks
    keep_blocks(student, [i * L // args.depth if args.init == "alternate" else i for i in range(args.depth)])
    return student


def main(args):
    # -- set up
    rank, world = join_ranks(ready=False) # the first prepares and downloads, the others wait for it
    check(args)
    device, dtype, compiled, autocast = set_up(args)
    run = Run(args, __file__, MODEL_KNOBS, device, dtype)
    data = os.path.join(args.data_dir, args.data)
    # only the tiny preset's can be missing, see check
    make_data(data, "prepare_owt.py", "--data=pydoc", f"--data_dir={args.data_dir}")

    # -- teacher, student and data
    teacher = load_text_encoder(args.teacher, args.weights_dir)
    tokenizer = teacher.tokenizer
    student = make_student(teacher, args).to(device)
    teacher.to(device)
    train, val = (Sequences(Tokens(args.data_dir, args.data, split, tokenizer), tokenizer, args.max_length)
                  for split in ("train", "val"))
    chosen = np.linspace(0, len(val) - 1, min(len(val), 2000)).astype(int)
    val_batch = val.collate([val[0, 0, i] for i in chosen])
    print(f"student {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters trained; teacher "
          f"{args.teacher}; {len(train):,} training sequences, {len(chosen):,} of {len(val):,} for "
          f"validation")
    _, micro = split_batch(args, len(train)) # sequences of a forward pass
    held_out = teacher_emb = None
    if args.agreement and not rank:
        held_out = sentences(val, tokenizer.encode(["."], 3)[0][0, 1].item(), args.agreement)
        teacher_emb = embed(teacher, held_out, device, autocast, micro)

    # -- optimizer; what an earlier run left
    optimizer, scaler = make_optimizer([student], args, device, dtype)
    read = {"the data set": hash_of(str(train.tokens.meta["splits"]), train.tokens[:10 ** 6]),
            "tokenizer": hash_of(tokenizer.text), "the teacher": hash_of(teacher)}
    checkpoint = run.restore(read, model=student, optimizer=optimizer, scaler=scaler)
    best = checkpoint.get("best", {"loss": math.inf, "step": 0})
    records = checkpoint.get("records", []) # of the validations before the first step and at the end
    saved = dict(optimizer=optimizer, scaler=scaler, tokenizer=tokenizer.text, teacher=args.teacher)
    if compiled: # in place: the weights keep their names
        student.compile()
        teacher.compile()
    join_ranks(ready=True)

    # -- loop
    order = batch_order(len(train), args.batch_size, args.seed, run.step, rank, world)
    loader = torch.utils.data.DataLoader(train, batch_sampler=order, collate_fn=train.collate,
                                         num_workers=args.num_workers, worker_init_fn=ignore_signals,
                                         pin_memory=device.type == "cuda")
    measure = functools.partial(validate, student, teacher, val_batch, held_out, teacher_emb, args, device,
                                autocast, micro)
    step = run.step
    student.train()
    if not rank and not records:
        with run.paused(step):
            records.append(measure())
        run.log(step, f"before the first step: loss {records[0]['val_loss']:.4f}", **records[0])
    for ids, padding_mask in run.batches(loader):
        lr = get_lr(step, args)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        # a mean over the tokens of the whole batch, of all ranks; each micro-batch adds its share
        count = all_gather(loss_tokens(padding_mask, args.target)).sum().item()
        total = 0.0
        for part in zip(ids.split(micro), padding_mask.split(micro)):
            loss = feature_loss(student, teacher, *to_device(device, *part), args, autocast) / count
            scaler.scale(loss).backward()
            total = total + loss.detach()

        norm = optimizer_step(optimizer, scaler, args.grad_clip, also=[total])
        step += 1
        if rank: # the first logs, validates and saves for all
            continue

        run.add(loss=total, norm=norm)
        if step % args.log_interval == 0 or step == args.max_steps:
            means, pace = run.means(step, "sequences")
            run.log(step, f"step {step:>6}/{args.max_steps}  loss {means['loss']:.4f}  norm "
                    f"{means['norm']:.2f}  lr {lr:.2e}  {pace}", lr=lr, **means)
        if step % args.eval_interval == 0 or step == args.max_steps:
            with run.paused(step):
                record = measure()
            if record["val_loss"] < best["loss"]:
                best = {"loss": record["val_loss"], "step": step}
            records = [records[0], record]
            values = ", ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in record.items())
            run.log(step, f"validation at step {step}: {values} (best loss {best['loss']:.4f} at "
                    f"{best['step']})", best="val_loss", **record)
        if step % args.save_interval == 0:
            run.save(step, student, best=best, records=records, **saved)

    # -- end
    run.save(step, student, best=best, records=records, **saved)
    run.end(step)
    if rank:
        return
    print(f"trained {step} steps in {run.minutes():.1f} min, peak memory {peak_memory(device):.2f} GB, "
          f"validation loss {best['loss']:.4f} at best; wrote {run.path}")
    if args.agreement and "agreement_1" in records[0]: # a continued run may have begun without
        N = len(held_out[0])
        print(f"{'':20} val loss    @1   @10   (nearest neighbours as the teacher's, {N} held-out sentences)")
        for name, row in (("distilled", records[-1]), ("before the training", records[0])):
            print(f"{name:20} {row['val_loss']:8.4f} {row['agreement_1']:5.1f} {row['agreement_10']:5.1f}")
        print(f"{'chance':29} {100 / (N - 1):5.1f} {100 * min(1, 10 / (N - 1)):5.1f}")
    print(f"next, what it is worth: python evaluate.py glue --ckpt={run.path}")


if __name__ == "__main__":
    main(get_args())
