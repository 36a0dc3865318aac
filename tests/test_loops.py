"""
The two training loops, each through main(get_args([...])): losses fall, every weight learns, a killed run
resumes bit for bit, a bad step ends the run and keeps the last good checkpoint.

    pytest tests/test_loops.py              # a minute, toy models on toy pictures
    pytest tests/test_loops.py -m slow      # real kills, full-size models, the tiny preset twice
"""
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import distill_image
import distill_multimodal
from conftest import slow
from evaluate import chance_row
from model import Encoder, load_checkpoint, load_optimizer, read_checkpoint, save_checkpoint
from prepare_pairs import Pairs
from test_pretrained import FULL, published, trainer_file

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOOPS = {"image": distill_image, "multimodal": distill_multimodal}
SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
TOY = dict(data="toy", device="cpu", dtype="float32", batch_size=16, max_steps=30, warmup_steps=3, lr=2e-3,
           log_interval=1, eval_interval=15, save_interval=100)
EMA = dict(TOY, **SHAPE, teacher="ema", depth=2, target_layers=2)
SETTINGS = { # name -> (loop, knobs); "TEACHER" becomes the path of the toy teacher
    "mask": ("image", dict(EMA, objective="mask")),
    "views": ("image", dict(EMA, objective="views")),
    "features": ("image", dict(TOY, teacher="TEACHER", depth=1)),
    "shared": ("image", dict(TOY, teacher="TEACHER", depth=1, init="random", share_embed=True, mlp_ratio=3,
                             attn_bias="alibi", target="last", instance_norm=False, criterion="l1")),
    "mse": ("multimodal", dict(TOY, **SHAPE, teacher="TEACHER", image_init="teacher", text_init="random",
                               freeze_embeddings=False, depth=1, text_depth=1, kd_loss="mse")),
}
MULTIMODAL = SETTINGS["mse"][1]
SETTINGS |= {
    "l1": ("multimodal", dict(MULTIMODAL, kd_loss="l1", shared_depth=2, head=True)),
    "kd": ("multimodal", dict(MULTIMODAL, kd_loss="contrastive", kd_target="mean", unit="image")),
    "queue": ("multimodal", dict(MULTIMODAL, kd_loss="contrastive", queue_size=24, align_loss="contrastive")),
    "clip": ("multimodal",
             dict(MULTIMODAL, kd_loss="none", align_loss="contrastive", image_init="random", unit="label",
                  label_smoothing=0.1, shared_depth=0, head=True)),
    "ranking": ("multimodal", dict(MULTIMODAL, kd_loss="none", align_loss="ranking", token_types=True)),
    "both": ("multimodal",
             dict(MULTIMODAL, kd_loss="mse", align_loss="ranking", align_weight=0.01, rotate=10, color=0.2,
                  word_weight=1)),
    "frozen": ("multimodal", dict(MULTIMODAL, freeze_embeddings=True)),
    "levels": ("multimodal", dict(MULTIMODAL, align_loss="contrastive", align_levels=2, token_types=True,
                                  shared_norm_first=True)),
    "mlp": ("multimodal", dict(MULTIMODAL, align_loss="ranking", align_levels=2, align_weight=0.01,
                               shared="mlp", head=True)),
    "projection": ("multimodal", dict(MULTIMODAL, kd_loss="none", align_loss="contrastive",
                                      shared="projection")),
}


@pytest.fixture(scope="session")
def teacher(tiny_data, tmp_path_factory):
    """The path of a toy teacher, made by the loop itself."""
    out_dir = str(tmp_path_factory.mktemp("teacher"))
    distill_image.main(distill_image.get_args(flags(dict(EMA, max_steps=10, data_dir=tiny_data,
                                                         out_dir=out_dir))))
    return os.path.join(out_dir, "ckpt.pt")


def flags(knobs):
    return [f"--{k}={v}" for k, v in knobs.items()]


@pytest.fixture
def run(tiny_data, teacher, tmp_path):
    """run(name, out, **changes) -> the checkpoint, after a run of SETTINGS[name] into tmp_path/out."""
    def run(name, out="run", **changes):
        loop, knobs = SETTINGS[name]
        knobs = {**knobs, "data_dir": tiny_data, "out_dir": f"{tmp_path}/{out}", **changes}
        knobs["teacher"] = str(knobs["teacher"]).replace("TEACHER", teacher)
        LOOPS[loop].main(LOOPS[loop].get_args(flags(knobs)))
        return read_checkpoint(tmp_path / out / "ckpt.pt")
    return run


def records(folder, starts=False):
    """The lines of log.jsonl; with starts those that a start writes. JSON has no NaN: a line with one is no
    record."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    with open(folder / "log.jsonl") as f:
        lines = [json.loads(line, parse_constant=refuse) for line in f]
    return [record for record in lines if ("settings" in record) == starts]


def stop_at(monkeypatch, module, step, exception=KeyboardInterrupt):
    """From now on the loop is stopped at the start of this step, as if by a kill."""
    get_lr = module.get_lr

    def stopping(now, args):
        if now == step:
            raise exception
        return get_lr(now, args)
    monkeypatch.setattr(module, "get_lr", stopping)


def signal_at(monkeypatch, module, function, step, number):
    """From now on this signal arrives while the loop is in this step."""
    inner = getattr(module, function)

    def signalling(now, *rest):
        if now == step:
            os.kill(os.getpid(), number)
        return inner(now, *rest)
    monkeypatch.setattr(module, function, signalling)


def same(a, b):
    """Equal bit for bit, through dictionaries, lists and tensors."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


# -----------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in SETTINGS] +
                         [("mask", "bfloat16"), ("queue", "bfloat16")])
def test_loss_falls_and_is_logged(run, tmp_path, name, dtype):
    checkpoint = run(name, dtype=dtype, max_steps=40)
    assert checkpoint["finished"] and checkpoint["step"] == 40
    log = records(tmp_path / "run")
    steps, vals = [r for r in log if "loss" in r], [r for r in log if "loss" not in r]
    assert [r["step"] for r in steps] == list(range(1, 41)) and [r["step"] for r in vals] == [15, 30, 40]
    first, last = (sum(r["loss"] for r in part) / 8 for part in (steps[:8], steps[-8:]))
    assert last < 0.95 * first, (first, last)
    rate = "images_per_s" if SETTINGS[name][0] == "image" else "pairs_per_s"
    for r in steps:
        assert {"loss", "norm", "lr", rate, "ms", "wait_ms", "memory_gb", "minutes_left"} <= set(r)
        assert 0 <= r["wait_ms"] <= r["ms"]
    if SETTINGS[name][0] == "image":
        assert vals[-1]["val_loss"] < vals[0]["val_loss"]
        return
    weight = SETTINGS[name][1].get("align_weight", 1.0)
    for r in steps: # the total is the weighted sum of what is printed
        words = SETTINGS[name][1].get("word_weight", 0) * r.get("words", 0)
        total = r.get("kd_image", 0) + r.get("kd_text", 0) + weight * r.get("align", 0) + words
        assert r["loss"] == pytest.approx(total, rel=1e-4)
        assert ("kd_image" in r) == ("kd_text" in r) == (SETTINGS[name][1]["kd_loss"] != "none")
        assert ("align" in r) == ("align_loss" in SETTINGS[name][1])
    assert ("val_kd_text" in vals[0]) == (SETTINGS[name][1]["kd_loss"] != "none")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_learns(run, name):
    """One step at lr=0 leaves the initial weights, one at lr=1e-3 changes every tensor that is not fixed by
    design."""
    start, after = (run(name, out, max_steps=1, warmup_steps=0, lr=lr)
                    for out, lr in (("start", 0), ("after", 1e-3)))
    weights = [(k, v, after["model"][k]) for k, v in start["model"].items()]
    if "student" in start: # teacher=ema: what is saved as model is the average
        weights += [(k, v, after["student"][k]) for k, v in start["student"].items()]
        weights += [(k, v, after["heads"][k]) for k, v in start["heads"].items()]
        cls = [c[part]["cls_token"] for c in (start, after) for part in ("model", "student")]
        assert torch.allclose(cls[2], cls[0].lerp(cls[3], 0.01), atol=1e-7) # ema_decay=0.99 at the start
    frozen = {"pos_embed", "image_encoder.pos_embed"} # fixed sines and cosines
    if SETTINGS[name][1].get("share_embed"):
        frozen |= {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    if SETTINGS[name][1].get("freeze_embeddings"): # the text encoder starts at random, and learns all
        frozen |= {f"image_encoder.{k}" for k in ("cls_token", "patch_embed.proj.weight",
                                                  "patch_embed.proj.bias")}
    if SETTINGS[name][1].get("align_loss") != "contrastive":
        frozen.add("log_scale")
    assert {k for k, a, b in weights if torch.equal(a, b)} == {k for k, _, _ in weights} & frozen


@pytest.mark.parametrize("name", ["features", "queue"])
def test_what_decays(run, monkeypatch, name):
    """Weight decay is for matrices: not for biases, norms, positions, tokens and their embeddings."""
    made, adamw = [], torch.optim.AdamW

    def spy(groups, **rest):
        made.extend(groups)
        return adamw(groups, **rest)
    monkeypatch.setattr(torch.optim, "AdamW", spy)
    weights = run(name, max_steps=1, weight_decay=0.5)["model"]
    shapes = [sorted(tuple(p.shape) for p in group["params"]) for group in made]
    assert [group["weight_decay"] for group in made] == [0.5, 0.0]
    assert shapes[0] == sorted(tuple(v.shape) for k, v in weights.items() if k.endswith(".weight")
                               and v.ndim > 1 and not k.endswith("embed.weight"))


def test_the_average_slows_down(run, monkeypatch):
    """The decay rises in a line from --ema_decay to 1."""
    shares, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_",
                        lambda a, b, share: shares.append(share) or lerp(a, b, share))
    run("mask", max_steps=4, ema_decay=0.8)
    assert shares == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_student_starts_from_the_teacher(run, teacher):
    weights = read_checkpoint(teacher)["model"]
    for name, prefix in (("features", ""), ("mse", "image_encoder.")):
        student = run(name, name, max_steps=1, lr=0)["model"]
        for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token"):
            assert torch.equal(student[prefix + key], weights[key])
        assert prefix + "blocks.1.attn.qkv.weight" not in student # depth=1 of 2


@pytest.mark.parametrize("init, blocks", [("first", [0, 1]), ("alternate", [0, 2]), ("random", [])])
def test_init(init, blocks, run, tmp_path):
    """Which of the teacher's four blocks the student's two are before the first step."""
    teacher = Encoder("image", 32, 4, 2, img_size=32, patch_size=8)
    save_checkpoint(str(tmp_path / "teacher.pt"), teacher)
    SETTINGS["init"] = ("image", dict(TOY, teacher=str(tmp_path / "teacher.pt"), depth=2, init=init))
    student, weights = run("init", max_steps=1, lr=0)["model"], teacher.state_dict()
    same = [[torch.equal(student[f"blocks.{i}.attn.qkv.weight"], weights[f"blocks.{j}.attn.qkv.weight"])
             for j in range(4)]
            for i in range(2)]
    assert same == [[j == k for j in range(4)] for k in blocks or (9, 9)]
    assert torch.equal(student["patch_embed.proj.weight"], weights["patch_embed.proj.weight"]) \
        == (init != "random")


def test_shared_embeddings_stay_the_teachers(run, teacher, tmp_path):
    """What stands before the blocks is the teacher's and stays; blocks are narrower, with ALiBi; neighbours
    are looked up."""
    checkpoint, weights = run("shared", knn="toy"), read_checkpoint(teacher)["model"]
    before = [k for k in weights if not k.startswith("blocks.")]
    assert len(before) == 4 and all(torch.equal(checkpoint["model"][k], weights[k]) for k in before)
    assert checkpoint["model"]["blocks.0.mlp.fc1.weight"].shape == (96, 32) \
        and checkpoint["config"]["attn_bias"] == "alibi"
    found = [r for r in records(tmp_path / "run") if "knn_toy_top1" in r]
    assert [r["step"] for r in found] == [15, 30]
    assert all(0 <= r["knn_toy_top1"] <= r["knn_toy_top3"] <= 100 and "knn_toy_reverse_top3" in r
               for r in found)


def test_toy_concepts_are_learned(run, tmp_path, tiny_data):
    """The tiny preset's losses: on the test split, the training kinds in new positions, far above chance."""
    run("queue", unit="label", max_steps=100, label_smoothing=0.1, queue_size=0, token_types=True, head=True)
    with open(tmp_path / "run" / "retrieval.json") as f:
        result = json.load(f)
    pairs = Pairs(tiny_data, "toy", "test")
    assert result["chance"] == pytest.approx(chance_row(pairs.text_to_image, 12))
    assert result["metrics"]["mean"] > result["chance"]["mean"] + 20, result["metrics"]
    model = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    ids, padding_mask = model.tokenizer.encode(["red circle", "a green cross"], model.max_length)
    assert model.encode_text(ids, padding_mask).norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert (tmp_path / "run" / "retrieval.png").stat().st_size > 1000


@pytest.mark.parametrize("name, seen", [("views", 5), ("kd", 9)])
def test_hidden_patches_are_left_out(run, monkeypatch, name, seen):
    """Of 16 patches the student's blocks get those that mask_ratio leaves, the teacher's and evaluation's
    all."""
    seen_by, forward = {True: set(), False: set()}, Encoder.forward

    def watching(encoder, *inputs, **more):
        out = forward(encoder, *inputs, **more)
        if encoder.config["modality"] == "image":
            seen_by[encoder.training].add(out.shape[1])
        return out
    monkeypatch.setattr(Encoder, "forward", watching)
    run(name, max_steps=2, mask_ratio=(16.5 - seen) / 16)
    assert seen_by == {True: {seen + 1}, False: {17} if name == "kd" else set()}


def test_queue_holds_the_latest_targets(run, monkeypatch):
    seen, loss = [], distill_multimodal.contrastive_kd_loss

    def spy(out, target, group, queue, scale):
        seen.append((target, queue))
        return loss(out, target, group, queue, scale)
    monkeypatch.setattr(distill_multimodal, "contrastive_kd_loss", spy)
    checkpoint = run("queue", max_steps=4, eval_interval=100, queue_size=40)
    seen = seen[:8:2] # of image and text the first, without the last validation
    assert [0 if queue is None else len(queue[0]) for _, queue in seen] == [0, 16, 32, 40]
    latest = torch.nn.functional.normalize(torch.cat([target for target, _ in seen[::-1]])[:40], dim=-1)
    assert torch.equal(checkpoint["queue"][0], latest) and len(checkpoint["queue"][1]) == 40


@pytest.mark.parametrize("name, value, clamped", [("queue", 9.0, [math.log(100)]), ("queue", -9.0, [0.0]),
                                                  ("levels", 9.0, [math.log(100)] * 2)])
def test_log_scale_is_clamped(run, monkeypatch, name, value, clamped):
    build = distill_multimodal.build_student

    def build_extreme(*args):
        student = build(*args)
        student.log_scale.data.fill_(value)
        return student
    monkeypatch.setattr(distill_multimodal, "build_student", build_extreme)
    assert run(name, max_steps=1)["model"]["log_scale"].view(-1).tolist() == pytest.approx(clamped)


@pytest.mark.parametrize("name", ["mask", "features", "mse", "queue", "ranking", "levels", "mlp"])
def test_micro_batches_change_nothing(run, tmp_path, name):
    for micro in (0, 4):
        run(name, f"micro{micro}", micro_batch_size=micro, max_steps=4, rotate=10, color=0.2)
    whole, parts = ([(r["loss"], r["norm"]) for r in records(tmp_path / f"micro{m}") if "loss" in r]
                    for m in (0, 4))
    for a, b in zip(whole, parts):
        assert b == pytest.approx(a, rel=1e-5)


def test_float16_and_gradient_scaling(run, tmp_path):
    """The scaler starts at 65,536: the first steps may overflow and be skipped; none is logged as
    infinite."""
    checkpoint = run("queue", dtype="float16", max_steps=12)
    assert checkpoint["scaler"]["scale"] > 0 \
        and all(torch.isfinite(x).all() for x in checkpoint["model"].values())
    log = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert log[-1] < log[0]


# -----------------------------------------------------------------------------
# stopped and resumed


@pytest.mark.parametrize("name, knobs", [
    ("mask", {}), ("mask", dict(dtype="float16")), ("views", dict(rotate=10)),
    slow("features", dict(micro_batch_size=8)), slow("features", dict(num_workers=1)), ("queue", {}),
    slow("queue", dict(cache_targets=True)), ("queue", dict(micro_batch_size=8, color=0.2)),
    slow("queue", dict(num_workers=1, unit="label")), ("clip", dict(dtype="float16")), slow("frozen", {}),
    slow("levels", {}), ("l1", dict(dtype="bfloat16", grad_clip=1.0))])
def test_resume_is_exact(run, tmp_path, monkeypatch, name, knobs):
    knobs = dict(max_steps=11, save_interval=3, eval_interval=4, **knobs) # over epochs of 1, 3 or 4 steps
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m:
        stop_at(m, LOOPS[SETTINGS[name][0]], 8)
        with pytest.raises(KeyboardInterrupt):
            run(name, "parts", **knobs)
    assert records(tmp_path / "parts")[-1]["step"] == 8 \
        and read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 6
    with open(tmp_path / "parts" / "log.jsonl", "a") as f:
        f.write('{"step": 8, "lo') # the kill cut a line short
    resumed = run(name, "parts", **knobs, resume=True)
    first, second = records(tmp_path / "parts", starts=True) # what each start could be repeated from
    assert (first["step"], second["step"]) == (0, 6) and "code " in first["with"]
    for start, done in ((first, whole), (second, resumed)):
        assert start["settings"] == {k: v for k, v in done["args"].items() if k != "given"} \
            | dict(out_dir=f"{tmp_path}/parts")
    for key in ("model", "optimizer", "scaler", "step", "best", "finished", "queue", "student", "heads"):
        assert same(whole.get(key), resumed.get(key)), key
    logs = [[(r["step"], r.get("loss"), r.get("val_loss", r.get("val_mean")))
             for r in records(tmp_path / out)]
            for out in ("whole", "parts")]
    assert logs[0] == logs[1] # no step twice, none missing, the same numbers


@pytest.mark.parametrize("name, number, workers", [
    ("mask", signal.SIGTERM, 0), slow("mask", signal.SIGINT, 2), slow("queue", signal.SIGTERM, 2),
    ("queue", signal.SIGINT, 0)])
def test_signals_save_and_leave(run, tmp_path, monkeypatch, capsys, name, number, workers):
    """The step under way is finished and saved, the command to go on is printed, and that gives the same
    weights."""
    knobs, handler = dict(max_steps=11, eval_interval=4, num_workers=workers), signal.getsignal(number)
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        signal_at(m, LOOPS[SETTINGS[name][0]], "get_lr", 6, number)
        run(name, "parts", **knobs)
    assert ended.value.code == 128 + number and signal.getsignal(number) == handler
    *_, why, command = capsys.readouterr().out.splitlines()
    assert why.startswith(f"stopped by {number.name}; wrote ") and command.endswith(" --resume")
    checkpoint = read_checkpoint(tmp_path / "parts" / "ckpt.pt")
    assert checkpoint["step"] == 7 and not checkpoint["finished"]
    resumed = run(name, "parts", **knobs, resume=True)
    for key in ("model", "optimizer", "scaler", "step", "best", "finished", "queue", "student", "heads"):
        assert same(whole.get(key), resumed.get(key)), key


def with_bad_pictures(data_dir, copy, bad):
    """A copy of the toy data in which these training pictures, and the first ten for test, are zeros."""
    shutil.copytree(data_dir, copy)
    for split, which in (("train", bad), ("test", range(10))):
        offsets = Pairs(data_dir, "toy", split).images.offsets
        with open(copy / "toy" / f"{split}_images.bin", "r+b") as f:
            for i in which:
                f.seek(int(offsets[i]))
                f.write(bytes(int(offsets[i + 1] - offsets[i])))
    return str(copy)


@pytest.mark.parametrize("name", ["views", "queue", "clip"]) # units: image, caption, label
def test_bad_pictures_are_skipped(run, tmp_path, tiny_data, monkeypatch, name):
    """Another is drawn in their place, as a function of seed and step: with workers and after a kill the
    weights are the same."""
    knobs = dict(data_dir=with_bad_pictures(tiny_data, tmp_path / "data", (3, 40)), max_steps=11,
                 save_interval=3, eval_interval=4)
    whole = run(name, "whole", **knobs)
    skipped = [(r["step"], r["skipped"]) for r in records(tmp_path / "whole") if "skipped" in r]
    assert {i for _, bad in skipped for i in bad} == {3, 40}
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, LOOPS[SETTINGS[name][0]], 8)
        run(name, "parts", **knobs)
    resumed = run(name, "parts", **knobs, num_workers=2, resume=True)
    assert all(same(whole.get(key), resumed.get(key)) for key in ("model", "optimizer", "best", "queue"))
    assert skipped == [(r["step"], r["skipped"]) for r in records(tmp_path / "parts") if "skipped" in r]


@pytest.mark.parametrize("name", ["mask", "queue"])
def test_too_many_bad_pictures(run, tmp_path, tiny_data, capsys, name):
    """The run ends, but saved, and goes on with sound ones."""
    data_dir = with_bad_pictures(tiny_data, tmp_path / "data", range(0, 48, 4))
    with pytest.raises(SystemExit) as ended:
        run(name, data_dir=data_dir)
    assert ended.value.code == 1
    assert re.search(r"stopped by \d+ of \d+ samples that cannot be read \(prepare the set again\); wrote ",
                     capsys.readouterr().out)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert 0 < checkpoint["step"] < 8 and not checkpoint["finished"]
    assert run(name, data_dir=tiny_data, resume=True)["finished"]
    with pytest.raises(SystemExit): # none is sound: not one step
        run(name, "other", data_dir=with_bad_pictures(tiny_data, tmp_path / "none", range(48)))
    assert read_checkpoint(tmp_path / "other" / "ckpt.pt")["step"] == 0


@pytest.mark.parametrize("what", ["ckpt.pt", "log.jsonl"])
def test_full_disk(run, tmp_path, monkeypatch, what):
    """Said, and what was there is as it was: with room again --resume ends in the same weights."""
    knobs, unlimited = dict(max_steps=11, save_interval=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = run("mask", "whole", **knobs)
    log, get_lr = tmp_path / "parts" / "log.jsonl", distill_image.get_lr

    def fill(step, args):
        if step == 7 and what == "ckpt.pt": # no file may become larger: what a disk with little room does
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        elif step == 7:
            log.rename(tmp_path / "kept")
            log.symlink_to("/dev/full")
        return get_lr(step, args)
    with monkeypatch.context() as m, pytest.raises(SystemExit, match=f"cannot write .*{what}: [FN]"):
        m.setattr(distill_image, "get_lr", fill)
        try:
            run("mask", "parts", **knobs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 6
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"ckpt.pt", "log.jsonl"}
    if what == "log.jsonl":
        (tmp_path / "kept").rename(log)
    resumed = run("mask", "parts", **knobs, resume=True)
    assert all(same(whole[k], resumed[k]) for k in ("model", "optimizer", "student", "heads"))


@pytest.mark.parametrize("apart, step", [(0, 7), (1.1, None)])
def test_a_second_signal_ends_at_once(run, tmp_path, monkeypatch, apart, step):
    """But not the same one that came twice, to all processes and from a parent."""
    get_lr = distill_image.get_lr

    def twice(now, args):
        if now == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(apart)
            os.kill(os.getpid(), signal.SIGINT)
        return get_lr(now, args)
    monkeypatch.setattr(distill_image, "get_lr", twice)
    with pytest.raises(KeyboardInterrupt if step is None else SystemExit):
        run("mask")
    path = tmp_path / "run" / "ckpt.pt"
    assert read_checkpoint(path)["step"] == step if step else not path.exists()


def test_what_is_ignored_stays_so(run, monkeypatch):
    """A shell that starts a run in the background lets it ignore Ctrl-C, which is meant for another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_at(monkeypatch, distill_image, "get_lr", 2, signal.SIGINT)
    assert run("mask", max_steps=4)["finished"]


def test_a_signal_in_the_last_save(run, tmp_path, monkeypatch, capsys):
    """The run is finished, and says so; what would come after it does not begin."""
    def save(path, *rest, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, *rest, **kwargs)
    monkeypatch.setattr(distill_multimodal, "save_checkpoint", save)
    with pytest.raises(SystemExit) as ended:
        run("queue", max_steps=3)
    assert ended.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["finished"]
    assert capsys.readouterr().out.endswith("ckpt.pt. The run is finished.\n")


@pytest.mark.parametrize("key, value", [
    ("step", "x"), slow("args", None), ("optimizer", {}), slow("best", None), slow("queue", 3),
    slow("model", {})])
def test_resume_from_a_damaged_checkpoint(run, tmp_path, monkeypatch, key, value):
    """Or from one of another program in our format: a sentence."""
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        signal_at(m, distill_multimodal, "get_lr", 2, signal.SIGTERM)
        run("queue")
    path = tmp_path / "run" / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    for damaged in ({**checkpoint, key: value}, {k: v for k, v in checkpoint.items() if k != key}):
        torch.save(damaged, path)
        with pytest.raises(SystemExit, match="cannot be continued|does not fit"):
            run("queue", resume=True)
    torch.save(checkpoint, path)
    (tmp_path / "run" / "ckpt.pt.tmp99").write_bytes(b"cut short by a kill")
    with open(tmp_path / "run" / "log.jsonl", "ab") as f:
        f.write(bytes(40) + b"\n[3]\n") # what a lost power leaves
    assert run("queue", resume=True)["finished"] and len(records(tmp_path / "run")) == 32
    assert not (tmp_path / "run" / "ckpt.pt.tmp99").exists()


def test_optimizer_of_other_parameters():
    """To load moments of another shape ends in torch's fused kernels, and the process with them."""
    def adamw(sizes, **settings):
        layers = [torch.nn.Linear(3, n) for n in sizes]
        optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in layers], fused=True,
                                      **settings)
        sum(layer(torch.ones(3)).sum() for layer in layers).backward()
        optimizer.step()
        return optimizer
    ours, saved = adamw([2, 4], lr=1, weight_decay=2), adamw([2, 4], lr=3, weight_decay=4).state_dict()
    load_optimizer(ours, saved)
    assert same(ours.state_dict()["state"], saved["state"])
    assert [(g["lr"], g["weight_decay"]) for g in ours.param_groups] == [(1, 2)] * 2
    for other in (adamw([2]), adamw([4, 2]), adamw([2, 4, 4])):
        with pytest.raises(ValueError, match="other parameters"):
            load_optimizer(ours, other.state_dict())


def test_stopped_before_the_first_checkpoint(run, tmp_path, monkeypatch):
    """Nothing to resume: the next run starts over, and its log with it."""
    with monkeypatch.context() as m:
        stop_at(m, distill_image, 3)
        with pytest.raises(KeyboardInterrupt):
            run("features")
    with pytest.raises(SystemExit, match="there is no .*Leave --resume out"):
        run("features", resume=True)
    run("features", max_steps=2)
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 2]


@pytest.mark.parametrize("name", ["mask", "features", "queue"])
def test_run_folders(run, tmp_path, monkeypatch, name):
    short = dict(max_steps=4, save_interval=2, eval_interval=2)
    with monkeypatch.context() as m:
        stop_at(m, LOOPS[SETTINGS[name][0]], 3)
        with pytest.raises(KeyboardInterrupt):
            run(name, **short)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"unfinished run \(step 2\).*--resume"):
        run(name, **short)
    depth = SETTINGS[name][1]["depth"]
    with pytest.raises(SystemExit, match=f"--depth={depth}, not --depth={depth + 1}"):
        run(name, **dict(short, depth=depth + 1), resume=True)
    with pytest.raises(SystemExit, match="2 steps already: --max_steps=2"):
        run(name, **dict(short, max_steps=2), resume=True)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    run(name, **short, resume=True)
    with pytest.raises(SystemExit, match="is finished"):
        run(name, **short, resume=True)
    with pytest.raises(SystemExit, match="does not divide"): # before anything is renamed
        run(name, **short, micro_batch_size=5)
    assert sorted(os.listdir(tmp_path)) == ["run"]
    run(name, out="run/", **short) # finished: kept under another name
    run(name, **short)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1", "run.2"]
    assert all(len(records(tmp_path / out)) == 6 for out in os.listdir(tmp_path))


def test_resume_takes_changed_knobs(run, capsys, monkeypatch):
    """What is no part of the model may change; it is printed, and it counts."""
    with monkeypatch.context() as m:
        stop_at(m, distill_multimodal, 3)
        with pytest.raises(KeyboardInterrupt):
            run("queue", save_interval=2)
    capsys.readouterr()
    lengths, loss = [], distill_multimodal.contrastive_kd_loss
    monkeypatch.setattr(distill_multimodal, "contrastive_kd_loss",
                        lambda out, target, group, queue, scale: lengths.append(queue and len(queue[0])) or
                        loss(out, target, group, queue, scale))
    checkpoint = run("queue", max_steps=4, weight_decay=0.3, queue_size=5, resume=True)
    assert "weight_decay was 0.01, is 0.3" in capsys.readouterr().out
    assert [g["weight_decay"] for g in checkpoint["optimizer"]["param_groups"]] == [0.3, 0.0]
    # from the first step on; image, text each
    assert len(checkpoint["queue"][0]) == 5 and lengths[:4] == [5] * 4


# -----------------------------------------------------------------------------
# a step that is not finite


@pytest.mark.parametrize("name, function, term",
                         [("features", "feature_loss", "loss"), ("mask", "masked_loss", "loss"),
                          ("mse", "loss_terms", "kd_text"), ("queue", "loss_terms", "kd_text")])
@pytest.mark.parametrize("log_interval", [1, 50])
def test_not_finite(run, tmp_path, monkeypatch, name, function, term, log_interval):
    """Step 6 gives NaN: named whatever the log interval, and neither step 6 nor what follows is saved."""
    module, calls = LOOPS[SETTINGS[name][0]], [0]
    original = getattr(module, function)

    def poisoned(*args):
        out = original(*args)
        calls[0] += torch.is_grad_enabled() # not those of the validation
        if calls[0] != 6:
            return out
        if function != "loss_terms":
            return out * math.nan
        return out[0] * math.nan, {**out[1], "kd_text": out[1]["kd_text"] * math.nan}
    with monkeypatch.context() as m:
        m.setattr(module, function, poisoned)
        with pytest.raises(SystemExit, match=f"{term}, norm not finite at step 6.*--resume") as e:
            run(name, log_interval=log_interval, save_interval=4, eval_interval=100)
    assert e.value.code not in (0, None)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["model"].values())
    assert run(name, max_steps=8, resume=True)["finished"]


def test_not_finite_and_then_a_signal(run, tmp_path, monkeypatch):
    """Between two log lines nobody has looked yet: what was saved before stays."""
    def loss(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(math.nan, requires_grad=True)
    with monkeypatch.context() as m:
        stop_at(m, distill_image, 5)
        with pytest.raises(KeyboardInterrupt):
            run("mask", save_interval=4, log_interval=50)
    monkeypatch.setattr(distill_image, "masked_loss", loss)
    with pytest.raises(SystemExit, match="loss not finite at step 5"):
        run("mask", save_interval=50, log_interval=50, resume=True)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 4


def test_infinite_gradient_of_a_finite_loss(run, tmp_path, monkeypatch):
    """The loss of step 4 is fine, its gradient is not: the weights after it must not be saved."""
    loss_terms, calls = distill_multimodal.loss_terms, [0]

    def poisoned(*args):
        total, terms = loss_terms(*args)
        calls[0] += 1
        if calls[0] == 4:
            total.register_hook(lambda grad: grad * math.inf)
        return total, terms
    monkeypatch.setattr(distill_multimodal, "loss_terms", poisoned)
    with pytest.raises(SystemExit, match="norm not finite at step 4"):
        run("mse", save_interval=2, eval_interval=100)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


# -----------------------------------------------------------------------------
# batches


def test_training_pairs_travel_to_workers(tiny_data):
    """Windows and macOS spawn their workers: data set and collate are pickled."""
    args = distill_multimodal.get_args(flags(dict(TOY, data_dir=tiny_data, img_size=32)))
    pairs = Pairs(tiny_data, "toy", "train")
    with open(os.path.join(tiny_data, "toy", "tokenizer.json")) as f:
        data = distill_multimodal.TrainPairs(pairs, distill_multimodal.Tokenizer(f.read()), args)
    collate = pickle.loads(pickle.dumps(data.collate))
    indices = [(0, 0, 5), (0, 1, 60)]
    assert same(collate([collate.__self__[i] for i in indices]), data.collate([data[i] for i in indices]))


@pytest.mark.parametrize("module", LOOPS.values())
def test_batch_order(module):
    """Each epoch is a new permutation, each unit at most once; from any step on the same batches come."""
    batches = module.batch_order(10, 3, seed=0, step=0)
    first = [next(batches) for _ in range(7)]
    units = [[u for batch in first[e:e + 3] for _, _, u in batch] for e in (0, 3)]
    assert all(len(set(u)) == 9 for u in units) and units[0] != units[1]
    assert [batch[0][:2] for batch in first] == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]
    for step in range(7):
        assert next(module.batch_order(10, 3, seed=0, step=step)) == first[step]
    assert next(module.batch_order(10, 3, seed=1, step=0)) != first[0]


@pytest.mark.parametrize("module", LOOPS.values())
def test_learning_rate(module):
    args = module.get_args(["--lr=1", "--min_lr=0.1", "--warmup_steps=4", "--max_steps=10"])
    assert [module.get_lr(k, args) for k in (0, 1, 3, 4, 7, 10)] \
        == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1])
    args.warmup_steps = 0
    assert module.get_lr(0, args) == 1


# -----------------------------------------------------------------------------
# slow: processes, full-size models


def script(name, *words, cwd, **options):
    return subprocess.Popen([sys.executable, os.path.join(REPO, name), *words], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def kill_and_resume(name, words, folder, pause):
    """A loop that saves after every step, killed four times within `pause` seconds of a save and resumed each
    time -> its checkpoint at the end. Whenever it is killed there is a whole one, of a later step."""
    path, rng, kills, steps = folder / "ckpt.pt", random.Random(0), 0, [0]
    while not (path.exists() and read_checkpoint(path)["finished"]):
        process = script(name, *words, f"--resume={path.exists()}", cwd=folder.parent)
        begin = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == begin):
            time.sleep(0.01) # until it saves
        if kills < 4:
            time.sleep(pause * rng.random())
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        steps.append(read_checkpoint(path)["step"])
        assert steps[-1] > steps[-2], said
    assert kills > 0
    return read_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [
    ("mask", {}), ("mask", dict(num_workers=2, micro_batch_size=8)), ("queue", dict(num_workers=2)),
    ("queue", dict(micro_batch_size=8))])
def test_killed_at_random(run, tmp_path, tiny_data, teacher, name, changes):
    """SIGKILL at random moments, a checkpoint after every step: always a whole one, and in the end the same
    weights."""
    knobs = dict(max_steps=150, save_interval=1, eval_interval=50, **changes)
    whole = run(name, "whole", **knobs)
    loop, base = SETTINGS[name]
    words = flags({k: teacher if v == "TEACHER" else v for k, v in
                   dict(base, **knobs, data_dir=tiny_data, out_dir=tmp_path / "parts").items()})
    resumed = kill_and_resume(f"distill_{loop}.py", words, tmp_path / "parts", 1.0)
    assert all(same(whole.get(k), resumed.get(k))
               for k in ("model", "optimizer", "best", "queue", "student", "heads"))
    assert [r["step"] for r in records(tmp_path / "parts")] == [r["step"]
                                                                for r in records(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exception", "twice"])
def test_workers_never_keep_a_process(tmp_path, tiny_data, how):
    """They ignore the signals by which Python ends its children as it exits."""
    words = flags(dict(SETTINGS["mask"][1], data_dir=tiny_data, out_dir=tmp_path / "run", num_workers=2))
    code = ("import os, signal, sys, time, distill_image as d\ndef twice(*_):\n"
            "    os.kill(os.getpid(), signal.SIGINT); time.sleep(1.2); os.kill(os.getpid(), signal.SIGINT)\n"
            f"d.get_lr = {'twice' if how == 'twice' else 'None'}\nd.main(d.get_args(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, text=True, capture_output=True,
                          timeout=60)
    error = {"exception": "TypeError: 'NoneType' object is not callable", "twice": "KeyboardInterrupt"}[how]
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].startswith(error), done.stderr
    assert done.stderr.count("Traceback") == 1


@pytest.mark.slow
def test_a_script_that_another_started_is_not_left_alone(tmp_path, tiny_data):
    """SIGTERM to the parent alone: the teacher's loop saves, both end."""
    words = flags(dict(SETTINGS["mask"][1], data_dir=tiny_data, out_dir=tmp_path / "run", max_steps=5000))
    code = f"import sys; sys.path.insert(0, {REPO!r}); import model; model.run_script(*sys.argv[1:])"
    parent = subprocess.Popen([sys.executable, "-c", code, "distill_image.py", *words], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while parent.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; wrote " in said, said
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes(tmp_path, tiny_data, number):
    """As a terminal, a scheduler or a container ends a run: the loader's workers get the signal, too."""
    knobs = dict(max_steps=1000, save_interval=5, num_workers=2)
    words = flags(dict(SETTINGS["mask"][1], **knobs, data_dir=tiny_data, out_dir=tmp_path / "parts"))
    process = script("distill_image.py", *words, cwd=tmp_path, start_new_session=True)
    while process.poll() is None and not (tmp_path / "parts" / "ckpt.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said, _ = process.communicate()
    step = read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"]
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert f"stopped by {number.name}; wrote " in said and step > 5, said


@pytest.mark.slow
def test_default_presets_from_published_files(tiny_data, tmp_path, capsys):
    """The image presets at full size, from a file in the published layout with random weights: what the
    teacher is and what the student starts from."""
    path = tmp_path / "weights.pt"
    torch.save(trainer_file(published("data2vec2_image", **FULL)), path)
    few = dict(data="toy", data_dir=tiny_data, batch_size=4, max_steps=3, warmup_steps=1, log_interval=1,
               eval_interval=3, save_interval=3, device="cpu", dtype="float32")
    for n, (more, said) in enumerate((
            ({}, "student 43.12M parameters trained; teacher 85.65M, frozen"),
            (dict(preset="shared_encoder", knn="toy"), "student 29.54M parameters trained"),
            # the comparisons of the thesis
            (dict(init="alternate", target="cls"), "student 43.12M parameters trained"),
            (dict(init="random", target="last", instance_norm=False, criterion="l1"),
             "student 43.12M parameters trained"))):
        out_dir = tmp_path / f"run{n}"
        distill_image.main(distill_image.get_args(flags(dict(few, path=path, **more, out_dir=out_dir))))
        assert said in capsys.readouterr().out
        assert [r["step"] for r in records(out_dir) if "knn_toy_top1" not in r] == [1, 2, 3, 3]


@pytest.mark.slow
def test_tiny_preset_twice(openmoji, tmp_path):
    """The README's command in a fresh folder, shortened: makes the teacher, ends with table, picture and next
    command; the second time the teacher is there, and the first run is kept."""
    made = script("distill_image.py", "--preset=tiny", f"--data_dir={openmoji}", "--max_steps=2",
                  cwd=tmp_path)
    assert made.communicate() and made.returncode == 0
    for n in (0, 1):
        process = script("distill_multimodal.py", "--preset=tiny", f"--data_dir={openmoji}", "--max_steps=8",
                         cwd=tmp_path)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "R@10" in said and "chance" in said and "wrote out/tiny/retrieval.png" in said
        following = said.splitlines()[-1].split()
        assert following[:3] == ["python", "distill_multimodal.py", "--preset=tiny"]
        assert ("renamed to out/tiny.1" in said) == (n == 1)
    process = script(*following[1:], cwd=tmp_path) # the command it ends with runs, too
    said, _ = process.communicate()
    assert process.returncode == 0 and "R@10" in said, said
    assert sorted(os.listdir(tmp_path / "out")) == ["tiny", "tiny.1", "tiny_alone", "tiny_teacher"]
    assert sorted(os.listdir(tmp_path / "out" / "tiny")) == ["ckpt.pt", "log.jsonl", "retrieval.json",
                                                             "retrieval.png"]
