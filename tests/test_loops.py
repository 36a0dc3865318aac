"""
The three training loops, each through main(get_args([...])): losses fall, every weight learns, the same
command again goes on bit for bit whatever ended it, other settings are refused, signals and bad steps end in
good order.

    pytest tests/test_loops.py              # half a minute, toy models on toy pictures and text
    pytest tests/test_loops.py -m slow      # processes that are killed, full-size models, the tiny preset
"""
import errno
import fcntl
import glob
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import distill_image
import distill_multimodal
import distill_text
import model
import prepare_owt
from conftest import REPO, SIGNALS, end, script, slow, start
from evaluate import chance_row
from model import Encoder, read_checkpoint, save_checkpoint
from prepare_imagenet import Pairs
from test_pretrained import FULL, published, trainer_file

LOOPS = {"image": distill_image, "multimodal": distill_multimodal, "text": distill_text}
SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
TOY = dict(data="toy", device="cpu", dtype="float32", batch_size=16, max_steps=30, warmup_steps=3, lr=2e-3,
           log_interval=1, eval_interval=15, save_interval=100)
EMA = dict(TOY, **SHAPE, teacher="ema", depth=2, target_layers=2)
TEXT = dict(TOY, data="toy_text", teacher="TEACHER", max_length=16, depth=2)
SETTINGS = { # name -> (loop, knobs); "TEACHER" becomes the path of the loop's toy teacher
    "mask": ("image", EMA),
    "features": ("image", dict(TOY, teacher="TEACHER", depth=1)),
    "shared": ("image", dict(TOY, teacher="TEACHER", depth=1, init="random", share_embed=True, mlp_ratio=3,
                             attn_bias="alibi", target="last", instance_norm=False, criterion="l1")),
    "text": ("text", TEXT),
    "text_cls": ("text", dict(TEXT, target="cls", init="alternate", agreement=40)),
    "text_l1": ("text", dict(TEXT, target="last", instance_norm=False, criterion="l1", init="random",
                             attn_bias="alibi")),
    "mse": ("multimodal", dict(TOY, **SHAPE, teacher="TEACHER", image_init="teacher", text_init="random",
                               freeze_embeddings=False, depth=1, text_depth=1, kd_loss="mse")),
}
MULTIMODAL = SETTINGS["mse"][1]
SETTINGS |= {
    "l1": ("multimodal", dict(MULTIMODAL, kd_loss="l1", shared_depth=2, head=True)),
    "queue": ("multimodal", dict(MULTIMODAL, kd_loss="contrastive", queue_size=24, align_loss="contrastive",
                                 kd_target="mean", unit="image")),
    "clip": ("multimodal", dict(MULTIMODAL, kd_loss="none", align_loss="contrastive", image_init="random",
                                unit="label", label_smoothing=0.1, shared="projection")),
    "both": ("multimodal", dict(MULTIMODAL, align_loss="ranking", align_weight=0.01, rotate=10, color=0.2,
                                word_weight=1, token_types=True, freeze_embeddings=True)),
    "levels": ("multimodal", dict(MULTIMODAL, align_loss="contrastive", align_levels=2, token_types=True,
                                  shared_norm_first=True)),
    "mlp": ("multimodal", dict(MULTIMODAL, align_loss="ranking", align_levels=2, align_weight=0.01,
                               shared="mlp", head=True)),
}
EACH = ["mask", "text", "queue"] # one of each loop
STATE = ["model", "optimizer", "scaler", "step", "best", "queue", "student", "heads", "records", "unreadable"]


def flags(knobs):
    return [f"--{k}={v}" for k, v in knobs.items()]


@pytest.fixture(scope="session")
def teacher(tiny_data, tmp_path_factory):
    """The path of a toy teacher, made by the loop itself."""
    out_dir = str(tmp_path_factory.mktemp("teacher"))
    distill_image.main(distill_image.get_args(flags(dict(EMA, max_steps=10, data_dir=tiny_data,
                                                         out_dir=out_dir))))
    return os.path.join(out_dir, "ckpt.pt")


@pytest.fixture
def knobs_of(tiny_data, text_data, teacher, tmp_path):
    """knobs_of(name, out, **changes) -> (script, its flags) of SETTINGS[name] into tmp_path/out."""
    def knobs_of(name, out="run", **changes):
        loop, knobs = SETTINGS[name]
        data, path = (text_data, f"{text_data}/teacher.pt") if loop == "text" else (tiny_data, teacher)
        knobs = {**knobs, "data_dir": data, "out_dir": f"{tmp_path}/{out}", **changes}
        knobs["teacher"] = str(knobs["teacher"]).replace("TEACHER", path)
        return f"distill_{loop}.py", flags(knobs)
    return knobs_of


@pytest.fixture
def run(knobs_of, tmp_path):
    """run(name, out, **changes) -> the checkpoint, after a run of SETTINGS[name] into tmp_path/out."""
    def run(name, out="run", **changes):
        module = LOOPS[SETTINGS[name][0]]
        module.main(module.get_args(knobs_of(name, out, **changes)[1]))
        return read_checkpoint(tmp_path / out / "ckpt.pt")
    return run


@pytest.fixture
def begin(knobs_of, tmp_path):
    """begin(name, out, **changes) -> the same in a process of its own; it prints into tmp_path/said."""
    def begin(name, out="run", ignored=(), function=script, **changes):
        name, words = knobs_of(name, out, **changes)
        return start(function, name, *words, said=tmp_path / "said", ignored=ignored)
    return begin


def records(folder, starts=False):
    """The lines of log.jsonl; with starts those that a start writes. JSON has no NaN: a line with one is no
    record."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    with open(folder / "log.jsonl") as f:
        lines = [json.loads(line, parse_constant=refuse) for line in f]
    return [record for record in lines if ("settings" in record) == starts]


def logged(folder):
    """What every record says of the training, without its times."""
    def is_time(key):
        return key in ("ms", "wait_ms", "memory_gb", "minutes") or key.endswith("_per_s")
    return [{k: v for k, v in r.items() if not is_time(k)} for r in records(folder)]


def stop_at(monkeypatch, module, step, exception=KeyboardInterrupt):
    """From now on the loop is stopped at the start of this step, as if by a kill."""
    get_lr = module.get_lr

    def stopping(now, args):
        if now == step:
            raise exception
        return get_lr(now, args)
    monkeypatch.setattr(module, "get_lr", stopping)


def signal_at(monkeypatch, module, function, step, *numbers, apart=0):
    """From now on these signals arrive while the loop is in this step, so many seconds apart."""
    inner = getattr(module, function)

    def signalling(now, *rest):
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)
            time.sleep(apart)
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


def same_state(a, b, keys=STATE):
    """Names what of two checkpoints is not equal."""
    assert [k for k in keys if not same(a.get(k), b.get(k))] == []


def refused(run, *args, **changes):
    """-> the sentence with which a run ends before its first step."""
    with pytest.raises(SystemExit) as e:
        run(*args, **changes)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    return e.value.code


# -----------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in SETTINGS] + [
    ("mask", "bfloat16"), ("text", "bfloat16"), ("queue", "float16")])
def test_loss_falls_and_is_logged(run, tmp_path, name, dtype):
    checkpoint, (loop, knobs) = run(name, dtype=dtype), SETTINGS[name]
    assert checkpoint["step"] == checkpoint["max_steps"] == 30
    log = records(tmp_path / "run")
    steps, vals = [r for r in log if "loss" in r], [r for r in log if "loss" not in r]
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["step"] for r in vals] == [0] * (loop == "text") + [15, 30]
    first, last = (sum(r["loss"] for r in part) / 8 for part in (steps[:8], steps[-8:]))
    assert last < 0.97 * first, (first, last)
    assert all({"norm", "lr", "memory_gb"} <= {*r} and 0 <= r["wait_ms"] <= r["ms"] for r in steps)
    minutes = [r["minutes"] for r in log]
    assert minutes == sorted(minutes) and 0 < minutes[-1] < 1
    if loop != "multimodal":
        assert vals[-1]["val_loss"] < vals[0]["val_loss"]
        assert checkpoint["best"] == {"loss": vals[-1]["val_loss"], "step": 30}
        return
    for r in steps: # the total is the weighted sum of what is printed
        align = knobs.get("align_weight", 1.0) * r.get("align", 0)
        total = align + r.get("kd_image", 0) + r.get("kd_text", 0) + r.get("words", 0)
        assert r["loss"] == pytest.approx(total, rel=1e-4)
    assert ("kd_text" in r) == ("val_kd_text" in vals[0]) == (knobs["kd_loss"] != "none")
    assert ("align" in r) == ("align_loss" in knobs)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_learns(run, name):
    """One step at lr=0 leaves the initial weights, one at lr=1e-3 changes every tensor that is not fixed by
    design; weight decay then changes matrices, and neither vectors nor embeddings and tokens."""
    one = dict(max_steps=1, warmup_steps=0)
    before, after, decayed = (run(name, out, **one, lr=lr, weight_decay=decay)
                              for out, lr, decay in (("0", 0, 0), ("1", 1e-3, 0), ("2", 1e-3, 50)))
    parts = [part for part in ("model", "student", "heads") if part in before]
    if "student" in before: # teacher=ema: what is saved as model is the average
        old, new, average = (c[part]["cls_token"] for c, part in (
            (before, "model"), (after, "student"), (after, "model")))
        assert torch.allclose(average, old.lerp(new, 0.01), atol=1e-7) # ema_decay=0.99 at the start
    knobs, frozen = SETTINGS[name][1], {"pos_embed", "image_encoder.pos_embed"} # fixed sines and cosines
    if knobs.get("share_embed"):
        frozen |= {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    if knobs.get("freeze_embeddings"): # the text encoder starts at random, and learns all
        frozen |= {f"image_encoder.{k}" for k in ("cls_token", "patch_embed.proj.weight",
                                                  "patch_embed.proj.bias")}
    if SETTINGS[name][0] == "text":
        frozen = {"pooler_weight", "pooler_bias"} # waits for GLUE
    elif knobs.get("align_loss") != "contrastive":
        frozen.add("log_scale")
    for part in parts:
        for k, v in before[part].items():
            assert torch.equal(v, after[part][k]) == (k in frozen), k
            decays = v.ndim > 1 and v.any() and not re.search(r"embed\.w|pos_embed|token", k)
            assert torch.equal(after[part][k], decayed[part][k]) != (decays and k not in frozen), k


@pytest.mark.parametrize("name", ["features", "text"])
@pytest.mark.parametrize("init, blocks", [("first", [0, 1]), ("alternate", [0, 2]), ("random", [9, 9])])
def test_init(init, blocks, run, tmp_path, name, text_data):
    """Which of the teacher's four blocks the student's two are before the first step; its embeddings."""
    path, embed = f"{text_data}/teacher.pt", "token_embed.weight"
    if name == "features":
        path, embed = str(tmp_path / "teacher.pt"), "patch_embed.proj.weight"
        save_checkpoint(path, Encoder("image", 32, 4, 2, img_size=32, patch_size=8))
    student, weights = run(name, max_steps=1, lr=0, init=init, depth=2, teacher=path), read_checkpoint(path)
    key = "blocks.{}.attn.qkv.weight"
    equal = [[torch.equal(student["model"][key.format(i)], weights["model"][key.format(j)]) for j in range(4)]
             for i in range(2)]
    assert equal == [[j == k for j in range(4)] for k in blocks]
    assert torch.equal(student["model"][embed], weights["model"][embed]) == (init != "random")


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
    assert all(0 <= r["knn_toy_top1"] <= r["knn_toy_top3"] <= 100 for r in found)


def test_a_teacher_with_registers(run, tmp_path):
    """The student, its first blocks, has them too, frozen with all that both share before the blocks."""
    teacher = Encoder("image", 32, 2, 2, img_size=32, patch_size=8, positions="rope", registers=2)
    save_checkpoint(path := str(tmp_path / "teacher.pt"), teacher)
    for share in (False, True):
        student = run("features", f"share_{share}", teacher=path, share_embed=share, max_steps=2)["model"]
        assert torch.equal(student["reg_token"], teacher.reg_token) == share
    with pytest.raises(SystemExit, match="registers"):
        run("features", "alibi", teacher=path, init="random", attn_bias="alibi")


def test_toy_concepts_are_learned(run, tmp_path, tiny_data):
    """The tiny preset's losses: on the test split, the training kinds in new positions, far above chance."""
    run("queue", unit="label", max_steps=100, label_smoothing=0.1, queue_size=0, token_types=True, head=True,
        kd_target="cls", log_interval=50)
    with open(tmp_path / "run" / "retrieval.json") as f:
        result = json.load(f)
    chance = chance_row(Pairs(tiny_data, "toy", "test").text_to_image, 12)
    assert result["chance"] == pytest.approx(chance)
    assert result["metrics"]["mean"] > chance["mean"] + 20, result["metrics"]
    assert (tmp_path / "run" / "retrieval.png").stat().st_size > 1000


def test_hidden_patches_are_left_out(run, monkeypatch):
    """Of 16 patches the student's blocks get the 9 that mask_ratio leaves, the teacher's and evaluation's
    all."""
    seen_by, forward = {True: set(), False: set()}, Encoder.forward

    def watching(encoder, *inputs, **more):
        out = forward(encoder, *inputs, **more)
        if encoder.config["modality"] == "image":
            seen_by[encoder.training].add(out.shape[1])
        return out
    monkeypatch.setattr(Encoder, "forward", watching)
    run("queue", max_steps=2, mask_ratio=7.5 / 16)
    assert seen_by == {True: {9 + 1}, False: {17}}


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
    assert len(run("queue", max_steps=5, queue_size=5, resume=True)["queue"][0]) == 5
    assert len(seen[0][0]) == 16


@pytest.mark.parametrize("value, clamped", [(9.0, math.log(100)), (-9.0, 0.0)])
def test_log_scale_is_clamped(run, monkeypatch, value, clamped):
    build = distill_multimodal.build_student

    def build_extreme(*args):
        student = build(*args)
        student.log_scale.data.fill_(value)
        return student
    monkeypatch.setattr(distill_multimodal, "build_student", build_extreme)
    assert run("levels", max_steps=1)["model"]["log_scale"].tolist() == pytest.approx([clamped] * 2)


@pytest.mark.parametrize("module", LOOPS.values())
def test_learning_rate(module):
    """Also of a run that ends within its warm-up, which says so."""
    args = module.get_args(["--lr=1", "--warmup_steps=4", "--max_steps=10"])
    assert [module.get_lr(k, args) for k in (0, 1, 3, 4, 7, 10)] \
        == pytest.approx([0.25, 0.5, 1, 1, 0.5, 0])
    args.warmup_steps = 0
    assert module.get_lr(0, args) == 1


@pytest.mark.parametrize("steps, warmup, said", [(4, 40, "2.0e-04"), (3, 3, "2.0e-03"), (4, 3, None)])
def test_a_warm_up_that_never_ends_is_said(run, tmp_path, capsys, steps, warmup, said):
    run("mask", max_steps=steps, warmup_steps=warmup)
    words = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"--max_steps={steps} ")]
    assert len(words) == bool(said) and (not said or said in words[0] and "--warmup_steps" in words[0])
    highest = max(r["lr"] for r in records(tmp_path / "run") if "lr" in r)
    assert highest == pytest.approx(float(said or 2e-3))


@pytest.mark.parametrize("first", [0, 4])
def test_batch_order(first):
    """Each epoch is a new permutation, each unit at most once; from any step on the same batches come; ranks
    have their shares of them."""
    batches = model.batch_order(10, 4, seed=0, step=0)
    whole = [next(batches) for _ in range(6)]
    units = [[u for batch in whole[e:e + 2] for _, _, u in batch] for e in (0, 2)]
    assert all(len(set(u)) == 8 for u in units) and units[0] != units[1]
    assert [batch[0][:2] for batch in whole] == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 4)]
    ranks = [model.batch_order(10, 4, 0, first, rank, 2) for rank in (0, 1)]
    assert [next(ranks[0]) + next(ranks[1]) for _ in range(2)] == whole[first:first + 2]
    assert next(model.batch_order(10, 4, seed=1, step=0)) != whole[0]


# -----------------------------------------------------------------------------
# the same command again


@pytest.mark.parametrize("name, knobs", [
    ("mask", dict(dtype="float16", micro_batch_size=8, rotate=10)),
    ("text_cls", dict(micro_batch_size=8)), slow("text_l1", dict(dtype="float16", grad_clip=1.0)),
    slow("queue", dict(cache_targets=True)), ("queue", dict(micro_batch_size=8, color=0.2, unit="label")),
    slow("clip", dict(dtype="float16")), slow("l1", dict(dtype="bfloat16", grad_clip=1.0))])
def test_going_on_is_exact(run, tmp_path, monkeypatch, name, knobs):
    """Stopped in an unsaved step, over epochs of 1, 3 or 13 steps."""
    knobs = dict(max_steps=15, save_interval=3, eval_interval=6, **knobs)
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, LOOPS[SETTINGS[name][0]], 14)
        run(name, "parts", **knobs)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 12
    assert records(tmp_path / "parts")[-1]["step"] == 14
    (tmp_path / "parts" / "ckpt.pt.tmp99").write_bytes(b"cut short by the kill")
    with open(tmp_path / "parts" / "log.jsonl", "a") as f:
        f.write('{"step": 12, "lo') # as this line was
    resumed = run(name, "parts", **knobs | dict(save_interval=50, compile=False))
    same_state(whole, resumed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") # no step twice, none missing
    first, second = records(tmp_path / "parts", starts=True) # what each start could be repeated from
    assert (first["step"], second["step"]) == (0, 12) and "code " in first["with"]
    assert first["settings"] == second["settings"] == resumed["settings"]
    minutes = [r["minutes"] for r in records(tmp_path / "parts")]
    assert minutes == sorted(minutes) and second["minutes"] >= minutes[-5] # went on, not from 0
    assert {p.name for p in (tmp_path / "parts").glob("ckpt*")} == {"ckpt.pt"}


@pytest.mark.parametrize("name", EACH)
def test_one_rule(run, tmp_path, tiny_data, text_data, monkeypatch, name):
    """Finished: the same command changes nothing, and judges. Other settings are refused by name, finished or
    not, unless they change no result; --resume takes all but those that make the model."""
    knobs, path = dict(max_steps=4, eval_interval=2), tmp_path / "run" / "ckpt.pt"
    module = LOOPS[SETTINGS[name][0]]
    assert "--resume" in refused(run, name, **knobs, resume=True) # there is nothing
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, module, 1)
        run(name, **knobs)
    assert not path.exists() # nothing to go on from: it starts
    unfinished = dict(knobs, save_interval=2)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, module, 3)
        run(name, **unfinished)
    # what changes no result: the data elsewhere, too
    shutil.copytree(text_data if name == "text" else tiny_data, tmp_path / "moved")
    harmless = dict(num_workers=1, micro_batch_size=8, log_interval=3, save_interval=7, eval_interval=3,
                    compile=False, weights_dir=tmp_path, data_dir=tmp_path / "moved")
    for done in (False, True):
        before = path.read_bytes()
        for change in (dict(lr=1e-3), dict(seed=1), dict(max_steps=5), dict(weight_decay=0.5, batch_size=8),
                       dict(dtype="bfloat16")):
            said = refused(run, name, **{**unfinished, **change})
            assert all((k if k != "dtype" else "autocast") in said for k in change), said
        depth = SETTINGS[name][1]["depth"]
        assert f"--depth={depth}, not --depth={depth + 1}" in refused(
            run, name, **{**unfinished, "depth": depth + 1, "resume": True})
        assert "step" in refused(run, name, **{**unfinished, "max_steps": 1, "resume": True})
        assert path.read_bytes() == before
        assert run(name, **{**knobs, **harmless})["step"] == 4
    for result in glob.glob(f"{tmp_path}/run/retrieval*"):
        os.remove(result)
    log = records(tmp_path / "run")
    run(name, **knobs)
    assert path.read_bytes() == before and records(tmp_path / "run") == log
    assert os.path.exists(tmp_path / "run" / "retrieval.json") == (name == "queue") # judged again
    changed = run(name, **{**knobs, "max_steps": 6, "weight_decay": 0.3, "resume": True})
    assert changed["step"] == 6 and changed["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r][-1] == 6
    assert sorted(os.listdir(tmp_path)) == ["moved", "run"] # no folder is renamed


@pytest.mark.parametrize("name", EACH)
def test_an_edited_copy_never_meets_an_old_run(tmp_path, monkeypatch, knobs_of, name):
    """One line of a copied loop changed, or of model.py, run into a finished and an unfinished folder."""
    path, edited = tmp_path / "my_loss.py", tmp_path / "model.py"
    with open(os.path.join(REPO, knobs_of(name)[0])) as f:
        source = f.read()
    line = "lr = get_lr(step, args)\n"
    assert source.count(line) == 1
    path.write_text(source)
    edited.write_text("# a line more")

    def copy(out, **changes):
        script(str(path), *knobs_of(name, out, max_steps=4, save_interval=2, **changes)[1])
    monkeypatch.setattr(sys, "argv", [])
    copy("finished")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(model, "optimizer_step", stopping_at_three(model.optimizer_step))
        copy("unfinished")
    for out in ("finished", "unfinished"):
        path.write_text(source.replace(line, "lr = 0.5 * " + line[5:]))
        before = (tmp_path / out / "ckpt.pt").read_bytes()
        said = refused(copy, out)
        assert "my_loss.py" in said and "step" in said and "--resume" in said and "--out_dir" in said
        path.write_text(source)
        with monkeypatch.context() as m:
            m.setattr(model, "__file__", str(edited))
            assert "model.py" in refused(copy, out)
        assert (tmp_path / out / "ckpt.pt").read_bytes() == before
        path.write_text(source.replace(line, "lr = 0.5 * " + line[5:]))
        copy(out, resume=True)
        assert read_checkpoint(tmp_path / out / "ckpt.pt")["step"] == 4


def stopping_at_three(optimizer_step):
    calls = []

    def step(*args, **rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return optimizer_step(*args, **rest)
    return step


@pytest.mark.parametrize("name, what", [
    ("mask", "data"), ("features", "teacher"), ("text", "data"), ("text", "teacher"), ("text", "tokenizer"),
    ("queue", "data"), ("queue", "teacher"), ("queue", "tokenizer")])
def test_what_is_read_has_changed(run, tmp_path, tiny_data, text_data, teacher, monkeypatch, name, what):
    """A data set prepared again under the same name, another teacher's file, another tokenizer: refused by
    name; the tokenizer even with --resume."""
    is_text, data = name == "text", tmp_path / "data"
    shutil.copytree(text_data if is_text else tiny_data, data)
    path = data / "teacher.pt"
    if not is_text:
        shutil.copy(teacher, path)
    knobs = dict(max_steps=4, save_interval=2, data_dir=data, **{} if name == "mask" else {"teacher": path})
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, LOOPS[SETTINGS[name][0]], 3)
        run(name, **knobs)
    if what == "data" and is_text:
        ids = np.fromfile(data / "toy_text" / "train.bin", "<u2")
        ids[100:120] = ids[120:140]
        ids.tofile(data / "toy_text" / "train.bin")
    elif what == "data": # one picture is another: the index differs
        with open(data / "toy" / "train_images.bin", "ab") as f:
            f.write(b"more")
        offsets = np.fromfile(data / "toy" / "train_images.idx", "<u8")
        offsets[-1] += 4
        offsets.tofile(data / "toy" / "train_images.idx")
    elif what == "tokenizer": # two words change places
        texts = path if is_text else data / "toy" / "tokenizer.json"
        text = read_checkpoint(path)["tokenizer"] if is_text else texts.read_text()
        swapped = text.replace('"red"', '"x"').replace('"green"', '"red"').replace('"x"', '"green"')
        assert swapped != text
        if is_text: # so that the data fit it
            torch.save({**read_checkpoint(path), "tokenizer": swapped}, path)
            meta = json.loads((data / "toy_text" / "meta.json").read_text())
            meta["vocab_sha256"] = prepare_owt.vocabulary(model.make_tokenizer(swapped))[1]
            (data / "toy_text" / "meta.json").write_text(json.dumps(meta))
        else:
            texts.write_text(swapped)
    else:
        checkpoint = read_checkpoint(path)
        checkpoint["model"]["blocks.1.attn.proj.bias"] += 0.1
        torch.save(checkpoint, path)
    said = refused(run, name, **knobs)
    assert {"data": "the data set", "teacher": "the teacher", "tokenizer": "tokenizer"}[what] in said, said
    if what == "tokenizer":
        assert "tokenizer" in refused(run, name, **knobs, resume=True)
    else:
        assert run(name, **knobs, resume=True)["step"] == 4


@pytest.mark.parametrize("key, value", [("step", "x"), ("settings", None), ("optimizer", {}), ("model", {})])
def test_a_damaged_checkpoint_is_a_sentence(run, tmp_path, monkeypatch, key, value):
    """Or one of another program in our format; a log that lost its end is none."""
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        signal_at(m, distill_multimodal, "get_lr", 2, signal.SIGTERM)
        run("queue")
    path = tmp_path / "run" / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    for damaged in ({**checkpoint, key: value}, {k: v for k, v in checkpoint.items() if k != key}):
        torch.save(damaged, path)
        refused(run, "queue")
    torch.save(checkpoint, path)
    with open(tmp_path / "run" / "log.jsonl", "ab") as f:
        f.write(bytes(40) + b"\n[3]\n") # what a lost power leaves
    assert run("queue")["step"] == 30 and len(records(tmp_path / "run")) == 32


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
    model.load_optimizer(ours, saved)
    assert same(ours.state_dict()["state"], saved["state"])
    assert [(g["lr"], g["weight_decay"]) for g in ours.param_groups] == [(1, 2)] * 2
    for other in (adamw([2]), adamw([4, 2]), adamw([2, 4, 4])):
        with pytest.raises(ValueError):
            model.load_optimizer(ours, other.state_dict())


# -----------------------------------------------------------------------------
# out_dir has one writer


def test_a_second_process_into_out_dir_ends(begin, tmp_path):
    first = begin("mask", max_steps=5000)
    path = tmp_path / "run" / "log.jsonl"
    wait_for(path.exists, first)
    second = begin("mask", max_steps=5000)
    assert end(second) == 1 and f"process {first.pid} " in (tmp_path / "said").read_text()
    os.kill(first.pid, signal.SIGKILL)
    assert end(first) == -signal.SIGKILL
    assert end(begin("mask", max_steps=3)) == 0 # a kill leaves no lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_error(run, monkeypatch, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run("mask", max_steps=2)["step"] == 2


# -----------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("name, number, workers", [
    ("mask", signal.SIGTERM, 0), ("mask", signal.SIGHUP, 2), ("text", signal.SIGINT, 1),
    ("queue", signal.SIGUSR1, 0), ("queue", signal.SIGINT, 2)])
def test_signals_save_and_leave(run, tmp_path, monkeypatch, name, number, workers):
    """The step under way is finished and saved; the same command gives the weights of an uninterrupted run.
    No handler is left."""
    knobs = dict(max_steps=11, eval_interval=4, num_workers=workers)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        signal_at(m, LOOPS[SETTINGS[name][0]], "get_lr", 6, number, number) # from the group and a parent: one
        run(name, "parts", **knobs)
    assert ended.value.code == 128 + number
    checkpoint = read_checkpoint(tmp_path / "parts" / "ckpt.pt")
    assert (checkpoint["step"], checkpoint["max_steps"]) == (7, 11)
    same_state(whole, run(name, "parts", **knobs))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("second, apart", [("SIGINT", 0), ("SIGTERM", 1.1)])
def test_a_second_signal_ends_at_once(begin, tmp_path, second, apart):
    process = begin("mask", function=signalled_by_sigint if apart == 0 else signalled_late, max_steps=200)
    assert end(process) == -getattr(signal, second) and not (tmp_path / "run" / "ckpt.pt").exists()


def signalled_by_sigint(name, *words, second=signal.SIGINT, apart=0):
    signal_at(pytest.MonkeyPatch(), distill_image, "get_lr", 6, signal.SIGTERM, second, apart=apart)
    distill_image.main(distill_image.get_args(list(words)))


def signalled_late(*command):
    signalled_by_sigint(*command, second=signal.SIGTERM, apart=1.1)


def test_a_signal_in_the_last_save(run, tmp_path, monkeypatch):
    """The run is finished, and what would come after it does not begin."""
    def save(path, *rest, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, *rest, **kwargs)
    monkeypatch.setattr(model, "save_checkpoint", save)
    with pytest.raises(SystemExit) as ended:
        run("queue", max_steps=3)
    assert ended.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3
    assert not (tmp_path / "run" / "retrieval.json").exists()


def wait_for(condition, process):
    """Until it holds, or the process ends."""
    while process.is_alive() and not condition():
        time.sleep(0.01)
    assert condition()


def steps_done(folder):
    """What the log of a running process has reached."""
    path = folder / "log.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', path.read_text(), re.M) if path.exists() else []
    return int(steps[-1]) if steps else -1


@pytest.mark.slow
def test_nohup(begin, tmp_path):
    """What was ignored at the start stays so: hangups under nohup, Ctrl-C of a shell's background."""
    process = begin("mask", ignored=[signal.SIGHUP, signal.SIGINT], max_steps=60)
    wait_for(lambda: steps_done(tmp_path / "run") > 3, process)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(process.pid, number)
    assert end(process) == 0 and read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 60


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [("mask", signal.SIGTERM), ("text", signal.SIGINT),
                                          ("queue", signal.SIGTERM), ("slow_data", signal.SIGTERM)])
def test_signal_to_the_whole_group(begin, run, tmp_path, name, number):
    """As a terminal, a scheduler or a container ends a run: the loader's workers get the signal, too; also
    while the loop waits for them."""
    function = waiting if name == "slow_data" else script
    name, knobs = "mask" if function == waiting else name, dict(max_steps=40, num_workers=2, save_interval=50)
    for n in range(2):
        process = begin(name, function=function, **knobs)
        wait_for(lambda: steps_done(tmp_path / "run") > 4 + 8 * n, process)
        os.killpg(process.pid, number)
        assert end(process) == 128 + number, (tmp_path / "said").read_text()
        assert 4 + 8 * n < read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 40
    assert end(begin(name, **knobs)) == 0
    same_state(run(name, "whole", **knobs), read_checkpoint(tmp_path / "run" / "ckpt.pt"))


def waiting(name, *words):
    """A loop whose workers are slow."""
    read = distill_image.TrainImages.__getitem__
    distill_image.TrainImages.__getitem__ = lambda data, index: (time.sleep(0.01), read(data, index))[1]
    distill_image.main(distill_image.get_args(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("what", ["worker", "stdout"])
def test_a_dead_worker_or_a_closed_stdout_ends_with_a_save(begin, tmp_path, name, what):
    function = script if what == "worker" else into_a_closed_pipe
    # a worker would hold the reading end of the pipe, too
    process = begin(name, function=function, max_steps=5000, num_workers=2 if what == "worker" else 0)
    if what == "worker":
        wait_for(lambda: steps_done(tmp_path / "run") > 9, process)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
            os.kill(int(f.read().split()[-1]), signal.SIGKILL)
    assert end(process) == (1 if what == "worker" else 128 + signal.SIGPIPE), (tmp_path / "said").read_text()
    step = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    assert step == (steps_done(tmp_path / "run") if what == "worker" else 6)
    changes = dict(max_steps=step + 1, resume=True, num_workers=0)
    assert end(begin(name, **changes)) == 0


def into_a_closed_pipe(name, *words):
    """As `| head` does it: the reader goes away in step 6."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    module = LOOPS[name[8:-3]]
    get_lr = module.get_lr
    module.get_lr = lambda step, args: (os.close(reader) if step == 5 else None, get_lr(step, args))[1]
    module.main(module.get_args(list(words)))


@pytest.mark.slow
def test_a_script_that_another_started_is_not_left_alone(begin, tmp_path):
    """SIGTERM to the parent alone: the loop that it runs saves, both end."""
    process = begin("mask", function=as_a_parent, max_steps=5000)
    wait_for(lambda: steps_done(tmp_path / "run") > 2, process)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] > 2


def as_a_parent(*command):
    model.run_script(*command)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_an_error_in_the_loop_leaves_no_process(begin, name):
    process = begin(name, function=failing, num_workers=2)
    assert end(process) == 1
    for _ in range(50):
        time.sleep(0.1)
        if subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode == 1:
            return
    assert not "nothing is left of the group"


def failing(name, *words):
    module = LOOPS[name[8:-3]]
    stop_at(pytest.MonkeyPatch(), module, 3, TypeError)
    module.main(module.get_args(list(words)))


# -----------------------------------------------------------------------------
# kills


def kill_and_resume(name, words, folder, pause, kills=4):
    """A script killed that many times within `pause` seconds of a save, each time given again as it was ->
    its checkpoint at the end. Whenever it is killed there is a whole one."""
    path, rng, done, steps = folder / "ckpt.pt", random.Random(0), 0, [0]
    while not path.exists() or steps[-1] < read_checkpoint(path)["max_steps"]:
        begun = path.stat().st_mtime_ns if path.exists() else 0
        process = start(script, name, *words, said=folder.parent / "killed")
        while process.is_alive() and (not path.exists() or path.stat().st_mtime_ns == begun):
            time.sleep(0.005) # until it saves
        if done < kills:
            time.sleep(pause * rng.random())
            process.kill()
        code = end(process, 200)
        done += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (folder.parent / "killed").read_text()
        steps.append(read_checkpoint(path)["step"])
        assert steps[-1] > steps[-2]
    assert done > 1
    return read_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [
    ("mask", dict(num_workers=1)), *((name, changes) for name in EACH for changes in (
        dict(micro_batch_size=4), dict(num_workers=2, save_interval=1)))])
def test_killed_at_random(run, tmp_path, knobs_of, name, changes):
    knobs = {"max_steps": 90, "save_interval": 3, "eval_interval": 50, **changes}
    whole = run(name, "whole", **knobs)
    resumed = kill_and_resume(*knobs_of(name, "parts", **knobs), tmp_path / "parts", 0.4)
    same_state(whole, resumed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.mark.parametrize("what", ["ckpt.pt", "log.jsonl"])
def test_full_disk(run, tmp_path, monkeypatch, what):
    """Said, and what was there is as it was: with room the same command ends in the same weights."""
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
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"ckpt.pt", "lock", "log.jsonl"}
    if what == "log.jsonl":
        (tmp_path / "kept").rename(log)
    same_state(whole, run("mask", "parts", **knobs))


# -----------------------------------------------------------------------------
# unreadable pictures, steps that are not finite


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


@pytest.mark.parametrize("name", ["mask", "queue", "clip"]) # units: image, caption, label
def test_unreadable_pictures_are_grey(run, tmp_path, tiny_data, monkeypatch, capfd, name):
    """As in the evaluation: named on standard error and in the log, counted over restarts; with workers and
    after a kill the weights are the same."""
    knobs = dict(data_dir=with_bad_pictures(tiny_data, tmp_path / "data", (3, 40)), max_steps=9,
                 save_interval=3, eval_interval=4)
    module, seen = LOOPS[SETTINGS[name][0]], []
    with monkeypatch.context() as m:
        augment = module.augment
        m.setattr(module, "augment", lambda x, *rest: seen.append(x) or augment(x, *rest))
        whole = run(name, "whole", **knobs)
    named = [(r["step"], r["unreadable"]) for r in records(tmp_path / "whole") if "unreadable" in r]
    count = sum(len(bad) for _, bad in named)
    assert {i for _, bad in named for i in bad} == {3, 40} and count == whole["unreadable"] <= 20
    grey = sum(len(x) for x in seen) and sum(int((x == 128).all(dim=(1, 2, 3)).sum()) for x in seen)
    assert grey >= count
    assert re.search(r"\b(3|40)\b", capfd.readouterr().err)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, module, 8)
        run(name, "parts", **knobs)
    same_state(whole, run(name, "parts", **knobs, num_workers=2))
    assert named == [(r["step"], r["unreadable"]) for r in records(tmp_path / "parts") if "unreadable" in r]


@pytest.mark.parametrize("name", ["mask", "queue"])
def test_too_many_unreadable_pictures(run, tmp_path, tiny_data, name):
    """More than ten and one in a hundred: the run ends, but saved, and goes on with sound ones."""
    data_dir = with_bad_pictures(tiny_data, tmp_path / "data", range(0, 48, 4))
    with pytest.raises(SystemExit) as ended:
        run(name, data_dir=data_dir)
    assert ended.value.code == 1
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert 0 < checkpoint["step"] < 8 and checkpoint["unreadable"] > 10
    with pytest.raises(SystemExit): # the count is kept: the same command ends again, a step on
        run(name, data_dir=data_dir)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == checkpoint["step"] + 1


@pytest.mark.parametrize("name, function, term", [
    ("features", "feature_loss", "loss"), ("mask", "masked_loss", "loss"), ("text", "feature_loss", "loss"),
    ("queue", "loss_terms", "kd_text")])
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
        return out[0] * math.nan, out[1] | {term: out[1][term] * math.nan}
    with monkeypatch.context() as m:
        m.setattr(module, function, poisoned)
        with pytest.raises(SystemExit, match=f"{term}.* not finite at step 6"):
            run(name, log_interval=log_interval, save_interval=4, eval_interval=100)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["model"].values())
    assert run(name, max_steps=8, resume=True)["step"] == 8


@pytest.mark.parametrize("ends", ["signal", "log"])
def test_infinite_gradient_of_a_finite_loss(run, tmp_path, monkeypatch, ends):
    """The loss of step 4 is fine, its gradient is not: the weights after it are not saved, be it that a
    signal arrives before the next log line."""
    loss_terms, calls = distill_multimodal.loss_terms, [0]

    def poisoned(*args):
        total, terms = loss_terms(*args)
        calls[0] += 1
        if calls[0] == 4:
            total.register_hook(lambda grad: grad * math.inf)
            if ends == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
        return total, terms
    monkeypatch.setattr(distill_multimodal, "loss_terms", poisoned)
    with pytest.raises(SystemExit, match="norm not finite at step 4"):
        run("mse", save_interval=2, eval_interval=100, log_interval=1 if ends == "log" else 50)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


# -----------------------------------------------------------------------------
# slow: full-size models, the tiny preset


@pytest.mark.slow
def test_default_presets_from_published_files(tiny_data, tmp_path, capsys):
    """The image presets at full size, from a file in the published layout with random weights: what the
    teacher is and what the student starts from."""
    path = tmp_path / "weights.pt"
    torch.save(trainer_file(published("data2vec2_image", **FULL)), path)
    few = dict(data="toy", data_dir=tiny_data, batch_size=1, max_steps=1, warmup_steps=1, log_interval=1,
               eval_interval=2, device="cpu", dtype="float32", teacher=f"data2vec2_image:{path}")
    for n, (changes, millions) in enumerate((
            ({}, 43.12), (dict(preset="shared_encoder", knn="toy"), 29.54))):
        out_dir = tmp_path / f"run{n}"
        distill_image.main(distill_image.get_args(flags(dict(few, **changes, out_dir=out_dir))))
        assert f"student {millions}M parameters trained; " in capsys.readouterr().out
        assert [r["step"] for r in records(out_dir) if "knn_toy_top1" not in r] == [1, 1]
        shutil.rmtree(out_dir)


@pytest.mark.slow
def test_tiny_preset_twice(openmoji, tmp_path, monkeypatch):
    """The README's command in a fresh folder, shortened, two processes at once that need the same teacher:
    the second waits for the first's. Both end with table and picture; given again they judge again."""
    monkeypatch.chdir(tmp_path)
    words = [f"--data_dir={openmoji}", "--device=cpu"]
    teacher = "out/tiny_teacher/ckpt.pt"
    both = [start(short_tiny, f"--out_dir=out/{n}", *words, said=tmp_path / f"said{n}") for n in "ab"]
    assert [end(p, 200) for p in both] == [0, 0], (tmp_path / "saida").read_text()
    said = [(tmp_path / f"said{n}").read_text() for n in "ab"]
    assert sum("waiting" in x for x in said) == 1 and os.path.exists(teacher)
    assert all("R@10" in x for x in said)
    weights = [open(f"out/{n}/ckpt.pt", "rb").read() for n in "ab"]
    os.remove("out/a/retrieval.json")
    assert end(start(short_tiny, "--out_dir=out/a", *words), 200) == 0
    assert open("out/a/ckpt.pt", "rb").read() == weights[0]
    assert {"retrieval.json", "retrieval.png"} <= {*os.listdir("out/a")}


def short_tiny(*words):
    """The preset with two steps and a teacher of twelve."""
    run_script = model.run_script
    distill_multimodal.run_script = lambda *command: run_script(*command, "--max_steps=12", "--batch_size=64")
    distill_multimodal.main(distill_multimodal.get_args(["--preset=tiny", "--max_steps=2", "--batch_size=64",
                                                         *words]))
