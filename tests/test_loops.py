"""
The three training loops, each through main(get_args([...])): losses fall, every weight learns, the same
command again goes on bit for bit whatever ended it, other settings are refused, signals and bad steps end in
good order.

    pytest tests/test_loops.py              # a minute, toy models on toy pictures and text
    pytest tests/test_loops.py -m slow      # processes that are killed, the tiny presets
"""
import errno
import fcntl
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

import distill_image
import distill_multimodal
import model
from conftest import (EACH, LOOPS, REPO, SETTINGS, SIGNALS, assert_same_state, end, logged, records,
                      refused, script, start, steps_done, wait_for)
from evaluate import chance_row
from model import Encoder, read_checkpoint, save_checkpoint
from prepare_imagenet import Pairs


def signal_at(monkeypatch, module, step, *numbers, apart=0):
    """From now on these signals arrive while the loop is in this step, so many seconds apart."""
    get_lr = module.get_lr

    def signalling(now, args):
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)
            time.sleep(apart)
        return get_lr(now, args)
    monkeypatch.setattr(module, "get_lr", signalling)


# -----------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in SETTINGS] + [
    ("mask", "bfloat16"), ("text", "bfloat16"), ("queue", "float16")])
def test_loss_falls_and_is_logged(run, tmp_path, name, dtype):
    checkpoint, (loop, knobs) = run(name, dtype=dtype), SETTINGS[name]
    log = records(tmp_path / "run")
    steps, vals = [r for r in log if "loss" in r], [r for r in log if "loss" not in r]
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["step"] for r in vals] == [0] * (loop == "text") + [15, 30]
    first, last = (sum(r["loss"] for r in part) / 8 for part in (steps[:8], steps[-8:]))
    assert last < 0.97 * first, (first, last)
    assert all({"norm", "lr", "memory_gb"} <= {*r} and 0 <= r["wait_ms"] <= r["ms"] for r in steps)
    if loop != "multimodal":
        assert vals[-1]["val_loss"] < vals[0]["val_loss"]
        assert checkpoint["best"] == {"loss": vals[-1]["val_loss"], "step": 30}
        return
    for r in steps: # the total is the weighted sum of what is printed
        align = knobs.get("align_weight", 1.0) * r.get("align", 0)
        total = align + r.get("kd_image", 0) + r.get("kd_text", 0)
        assert r["loss"] == pytest.approx(total, rel=1e-4)
    assert ("kd_text" in r) == ("val_kd_text" in vals[0]) == (knobs["kd_loss"] != "none")
    assert ("align" in r) == ("align_loss" in knobs)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_learns(run, name, teacher):
    """One step at lr=0 leaves the initial weights, one at lr=1e-3 changes every tensor that is not fixed by
    design; weight decay then changes matrices, and neither vectors nor embeddings and tokens."""
    one = dict(max_steps=1, warmup_steps=0, eval_interval=100)
    before, after, decayed = (run(name, out, **one, lr=lr, weight_decay=decay)
                              for out, lr, decay in (("0", 0, 0), ("1", 1e-3, 0), ("2", 1e-3, 50)))
    parts = [part for part in ("model", "student", "heads") if part in before]
    if "student" in before: # teacher=ema: what is saved as model is the average
        old, new, average = (c[part]["cls_token"] for c, part in (
            (before, "model"), (after, "student"), (after, "model")))
        assert torch.allclose(average, old.lerp(new, 0.01), atol=1e-7) # ema_decay=0.99 at the start
    knobs, frozen = SETTINGS[name][1], {"pos_embed", "image_encoder.pos_embed"} # fixed sines and cosines
    before_blocks = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    if knobs.get("share_embed"):
        frozen |= before_blocks
        assert all(torch.equal(after["model"][k], read_checkpoint(teacher)["model"][k]) for k in frozen - {
            "image_encoder.pos_embed"})
    if knobs.get("freeze_embeddings"): # the text encoder starts at random, and learns all
        frozen |= {f"image_encoder.{k}" for k in before_blocks}
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
    """On the test split, the training kinds in new positions, retrieval ends far above chance."""
    run("queue", unit="label", max_steps=100, label_smoothing=0.1, queue_size=0, token_types=True, head=True,
        log_interval=50, eval_interval=100)
    result = json.loads((tmp_path / "run" / "retrieval.json").read_text())
    chance = chance_row(Pairs(tiny_data, "toy", "test").text_to_image, 12)
    assert result["chance"] == pytest.approx(chance)
    assert result["metrics"]["mean"] > chance["mean"] + 20, result["metrics"]
    assert (tmp_path / "run" / "retrieval.png").stat().st_size > 1000


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
    args = module.get_args(["--lr=1", "--warmup_steps=4", "--max_steps=10"])
    assert [module.get_lr(k, args) for k in (0, 1, 3, 4, 7, 10)] \
        == pytest.approx([0.25, 0.5, 1, 1, 0.5, 0])
    args.warmup_steps = 0
    assert module.get_lr(0, args) == 1


@pytest.mark.parametrize("steps, warmup, highest", [(4, 40, "2.0e-04"), (3, 3, "2.0e-03"), (4, 3, None)])
def test_a_warm_up_that_never_ends_is_said(run, tmp_path, capsys, steps, warmup, highest):
    run("mask", max_steps=steps, warmup_steps=warmup)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"--max_steps={steps} ")]
    assert len(said) == (highest is not None)
    assert not said or highest in said[0] and "--warmup_steps" in said[0]
    lr = max(r["lr"] for r in records(tmp_path / "run") if "lr" in r)
    assert lr == pytest.approx(float(highest or 2e-3))


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
    ("mask", dict(dtype="float16", micro_batch_size=8, rotate=10)), ("text_cls", dict(micro_batch_size=8)),
    ("queue", dict(micro_batch_size=8, color=0.2, unit="label", cache_targets=True))])
def test_going_on_is_exact(run, run_until, tmp_path, name, knobs):
    """Stopped in an unsaved step, over epochs of 1, 3 or 13 steps."""
    knobs = dict(max_steps=15, save_interval=3, eval_interval=6, **knobs)
    whole = run(name, "whole", **knobs)
    run_until(14, name, "parts", **knobs)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 12
    assert records(tmp_path / "parts")[-1]["step"] == 14
    (tmp_path / "parts" / "ckpt.pt.tmp99").write_bytes(b"cut short by the kill")
    with open(tmp_path / "parts" / "log.jsonl", "a") as f:
        f.write('{"step": 12, "lo') # as this line was
    resumed = run(name, "parts", **knobs | dict(save_interval=50, compile=False))
    assert_same_state(whole, resumed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") # no step twice, none missing
    first, second = records(tmp_path / "parts", starts=True) # what each start could be repeated from
    assert (first["step"], second["step"]) == (0, 12) and "code " in first["with"]
    assert first["settings"] == second["settings"] == resumed["settings"]
    minutes = [r["minutes"] for r in records(tmp_path / "parts")]
    assert minutes == sorted(minutes) and second["minutes"] >= minutes[-5] # went on, not from 0
    assert {p.name for p in (tmp_path / "parts").glob("ckpt*")} == {"ckpt.pt"}


@pytest.mark.parametrize("name", EACH)
def test_one_rule(run, run_until, tmp_path, tiny_data, text_data, name):
    """Finished: the same command changes nothing, and judges. Other settings are refused by name, finished or
    not, unless they change no result; --resume takes all but those that make the model."""
    knobs, path = dict(max_steps=4, eval_interval=2), tmp_path / "run" / "ckpt.pt"
    assert "--resume" in refused(run, name, **knobs, resume=True) # there is nothing
    run_until(1, name, **knobs)
    assert not path.exists() # nothing to go on from: it starts
    unfinished = dict(knobs, save_interval=2)
    run_until(3, name, **unfinished)
    # what changes no result: the data elsewhere, too
    shutil.copytree(text_data if name == "text" else tiny_data, tmp_path / "moved")
    harmless = dict(num_workers=1, micro_batch_size=8, log_interval=3, save_interval=7, eval_interval=3,
                    compile=False, weights_dir=tmp_path, data_dir=tmp_path / "moved")
    for _ in ("unfinished", "finished"):
        before = path.read_bytes()
        for change in (dict(lr=1e-3), dict(max_steps=5), dict(weight_decay=0.5, batch_size=8),
                       dict(dtype="bfloat16")):
            said = refused(run, name, **{**unfinished, **change})
            assert all((k if k != "dtype" else "autocast") in said for k in change), said
        depth = SETTINGS[name][1]["depth"]
        assert f"--depth={depth}, not --depth={depth + 1}" in refused(
            run, name, **{**unfinished, "depth": depth + 1, "resume": True})
        assert "step" in refused(run, name, **{**unfinished, "max_steps": 1, "resume": True})
        assert path.read_bytes() == before
        assert run(name, **{**knobs, **harmless})["step"] == 4
    for result in tmp_path.glob("run/retrieval*"):
        result.unlink()
    log = records(tmp_path / "run")
    run(name, **knobs)
    assert path.read_bytes() == before and records(tmp_path / "run") == log
    assert (tmp_path / "run" / "retrieval.json").exists() == (name == "queue") # judged again
    changed = run(name, **{**knobs, "max_steps": 6, "weight_decay": 0.3, "resume": True})
    assert changed["step"] == 6 and changed["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r][-1] == 6
    assert sorted(os.listdir(tmp_path)) == ["moved", "run"] # no folder is renamed


def test_an_edited_copy_never_meets_an_old_run(tmp_path, monkeypatch, knobs_of):
    """One line of a copied loop changed, or of model.py."""
    path, edited = tmp_path / "my_loss.py", tmp_path / "model.py"
    with open(os.path.join(REPO, "distill_image.py")) as f:
        source = f.read()
    line = "lr = get_lr(step, args)\n"
    assert source.count(line) == 1
    path.write_text(source)
    edited.write_text("# a line more")

    def copy(max_steps, **changes):
        script(str(path), *knobs_of("mask", max_steps=max_steps, **changes)[1])
    monkeypatch.setattr(sys, "argv", [])
    copy(2)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(model, "__file__", str(edited))
        assert "model.py" in refused(copy, 2)
    path.write_text(source.replace(line, "lr = 0.5 * " + line[5:]))
    said = refused(copy, 2)
    assert "my_loss.py" in said and "--resume" in said and "--out_dir" in said
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    copy(3, resume=True)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3


@pytest.mark.parametrize("name, what", [
    ("mask", "the data set"), ("features", "the teacher"), ("text", "the data set"), ("text", "the teacher"),
    ("queue", "the data set"), ("queue", "the teacher"), ("queue", "tokenizer")])
def test_what_is_read_has_changed(run, run_until, tmp_path, tiny_data, text_data, teacher, name, what):
    """A data set prepared again under the same name, another teacher's file, another tokenizer: refused by
    name; the tokenizer even with --resume."""
    is_text, data = name == "text", tmp_path / "data"
    shutil.copytree(text_data if is_text else tiny_data, data)
    path = data / "teacher.pt"
    if not is_text:
        shutil.copy(teacher, path)
    knobs = dict(max_steps=4, save_interval=2, data_dir=data)
    if name != "mask":
        knobs["teacher"] = path
    run_until(3, name, **knobs)
    if what == "the teacher":
        checkpoint = read_checkpoint(path)
        checkpoint["model"]["blocks.1.attn.proj.bias"] += 0.1
        torch.save(checkpoint, path)
    elif what == "tokenizer": # two words change places
        file = data / "toy" / "tokenizer.json"
        text = file.read_text()
        file.write_text(text.replace('"red"', '"x"').replace('"green"', '"red"').replace('"x"', '"green"'))
        assert file.read_text() != text
    elif is_text:
        ids = np.fromfile(data / "toy_text" / "train.bin", "<u2")
        ids[100:120] = ids[120:140]
        ids.tofile(data / "toy_text" / "train.bin")
    else:
        lengthen_last_picture(data / "toy")
    assert what in refused(run, name, **knobs)
    if what == "tokenizer":
        assert what in refused(run, name, **knobs, resume=True)
    else:
        assert run(name, **knobs, resume=True)["step"] == 4


def lengthen_last_picture(folder):
    """Of a set's training split: the index differs."""
    with open(folder / "train_images.bin", "ab") as f:
        f.write(b"more")
    offsets = np.fromfile(folder / "train_images.idx", "<u8")
    offsets[-1] += 4
    offsets.tofile(folder / "train_images.idx")


def of_other_parameters(optimizer):
    """Moments of another shape: torch's fused kernels would write past their end."""
    state = {i: {k: x[..., :1] if x.ndim else x for k, x in kept.items()}
             for i, kept in optimizer["state"].items()}
    return {**optimizer, "state": state}


def test_a_damaged_checkpoint_is_a_sentence(run, run_until, tmp_path):
    """Or one of another program in our format; a log that lost its end is none."""
    knobs, path = dict(max_steps=4, save_interval=2), tmp_path / "run" / "ckpt.pt"
    run_until(3, "queue", **knobs)
    checkpoint = read_checkpoint(path)
    for damage in (dict(step="x"), dict(settings=None), dict(model={}), dict(optimizer={}),
                   dict(optimizer=of_other_parameters(checkpoint["optimizer"]))):
        torch.save({**checkpoint, **damage}, path)
        refused(run, "queue", **knobs)
    torch.save(checkpoint, path)
    with open(tmp_path / "run" / "log.jsonl", "ab") as f:
        f.write(bytes(40) + b"\n[3]\n") # what a lost power leaves
    assert run("queue", **knobs)["step"] == 4
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == [1, 2, 3, 4]


# -----------------------------------------------------------------------------
# out_dir has one writer


def test_a_second_process_into_out_dir_ends(begin, tmp_path):
    first = begin("mask", max_steps=5000)
    wait_for((tmp_path / "run" / "log.jsonl").exists, first)
    second = begin("mask", max_steps=5000)
    assert end(second) == 1 and f"process {first.pid} " in (tmp_path / "said").read_text()
    os.kill(first.pid, signal.SIGKILL)
    assert end(first) == -signal.SIGKILL
    assert end(begin("mask", max_steps=3)) == 0 # a kill leaves no lock


def test_a_file_system_without_locks_is_no_error(run, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run("mask", max_steps=2)["step"] == 2


# -----------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("name, number, workers", [
    ("mask", signal.SIGTERM, 2), ("mask", signal.SIGHUP, 0), ("text", signal.SIGINT, 1),
    ("queue", signal.SIGUSR1, 0)])
def test_signals_save_and_leave(run, tmp_path, monkeypatch, name, number, workers):
    """The step under way is finished and saved; the same command gives the weights of an uninterrupted run.
    No handler is left."""
    knobs = dict(max_steps=11, eval_interval=4, num_workers=workers)
    if signal.getsignal(number) == signal.SIG_IGN: # as these tests under nohup
        signal.signal(number, signal.SIG_DFL)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        signal_at(m, LOOPS[SETTINGS[name][0]], 6, number, number) # from the group and a parent: one
        run(name, "parts", **knobs)
    assert ended.value.code == 128 + number
    checkpoint = read_checkpoint(tmp_path / "parts" / "ckpt.pt")
    assert (checkpoint["step"], checkpoint["max_steps"]) == (7, 11)
    assert_same_state(whole, run(name, "parts", **knobs))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("second, apart", [(signal.SIGINT, 0), (signal.SIGTERM, 1.1)])
def test_a_second_signal_ends_at_once(begin, tmp_path, second, apart):
    process = begin("mask", function=functools.partial(signalled_twice, second, apart), max_steps=200)
    assert end(process) == -second and not (tmp_path / "run" / "ckpt.pt").exists()


def signalled_twice(second, apart, name, *words):
    signal_at(pytest.MonkeyPatch(), distill_image, 6, signal.SIGTERM, second, apart=apart)
    distill_image.main(distill_image.get_args(list(words)))


@pytest.mark.slow
def test_nohup(begin, tmp_path):
    """What was ignored at the start stays so: hangups under nohup, Ctrl-C of a shell's background."""
    process = begin("mask", ignored=[signal.SIGHUP, signal.SIGINT], max_steps=60)
    wait_for(lambda: steps_done(tmp_path / "run") > 3, process)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(process.pid, number)
    assert end(process) == 0 and read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 60


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [
    ("mask", signal.SIGTERM), ("text", signal.SIGINT), ("queue", signal.SIGTERM)])
def test_signal_to_the_whole_group(begin, run, tmp_path, name, number):
    """As a terminal, a scheduler or a container ends a run: the loader's workers get the signal, too."""
    knobs = dict(max_steps=40, num_workers=2, save_interval=50)
    for n in range(2):
        process = begin(name, **knobs)
        wait_for(lambda: steps_done(tmp_path / "run") > 4 + 8 * n, process)
        os.killpg(process.pid, number)
        assert end(process) == 128 + number, (tmp_path / "said").read_text()
        assert 4 + 8 * n < read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 40
    assert end(begin(name, **knobs)) == 0
    assert_same_state(run(name, "whole", **knobs), read_checkpoint(tmp_path / "run" / "ckpt.pt"))


@pytest.mark.slow
def test_a_dead_worker_ends_with_a_save(begin, tmp_path):
    process = begin("queue", max_steps=5000, num_workers=2)
    wait_for(lambda: steps_done(tmp_path / "run") > 9, process)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        os.kill(int(f.read().split()[-1]), signal.SIGKILL)
    assert end(process) == 1, (tmp_path / "said").read_text()
    step = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    assert step == steps_done(tmp_path / "run") > 9
    assert end(begin("queue", max_steps=step + 1, resume=True)) == 0


def into_a_closed_pipe(name, *words):
    """As `| head` does it: the reader goes away in step 6."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    module = LOOPS[name[8:-3]]
    get_lr = module.get_lr
    module.get_lr = lambda step, args: (os.close(reader) if step == 5 else None, get_lr(step, args))[1]
    module.main(module.get_args(list(words)))


@pytest.mark.slow
def test_a_closed_stdout_ends_with_a_save(begin, tmp_path):
    process = begin("text", function=into_a_closed_pipe, max_steps=5000)
    assert end(process) == 128 + signal.SIGPIPE, (tmp_path / "said").read_text()
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 6


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
    ("mask", dict(micro_batch_size=4)), ("text", dict(num_workers=2, save_interval=1)),
    ("queue", dict(micro_batch_size=4, num_workers=2))])
def test_killed_at_random(run, tmp_path, knobs_of, name, changes):
    knobs = {"max_steps": 90, "save_interval": 3, "eval_interval": 50, **changes}
    whole = run(name, "whole", **knobs)
    resumed = kill_and_resume(*knobs_of(name, "parts", **knobs), tmp_path / "parts", 0.4)
    assert_same_state(whole, resumed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_full_disk(run, tmp_path, monkeypatch):
    """Said, and what was there is as it was: with room the same command ends in the same weights."""
    knobs, unlimited = dict(max_steps=11, save_interval=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, get_lr = run("mask", "whole", **knobs), distill_image.get_lr

    def fill(step, args):
        if step == 7: # no file may become larger: what a disk with little room does
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        return get_lr(step, args)
    with monkeypatch.context() as m:
        m.setattr(distill_image, "get_lr", fill)
        try:
            assert "ckpt.pt" in refused(run, "mask", "parts", **knobs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 6
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"ckpt.pt", "lock", "log.jsonl"}
    assert_same_state(whole, run("mask", "parts", **knobs))


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


@pytest.mark.parametrize("name", ["mask", "queue"])
def test_unreadable_pictures_are_grey(run, run_until, tmp_path, tiny_data, monkeypatch, capfd, name):
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
    assert sum((x == 128).all(dim=(1, 2, 3)).sum() for x in seen) >= count # grey
    assert re.search(r"\b(3|40)\b", capfd.readouterr().err)
    run_until(8, name, "parts", **knobs)
    assert_same_state(whole, run(name, "parts", **knobs, num_workers=2))
    assert named == [(r["step"], r["unreadable"]) for r in records(tmp_path / "parts") if "unreadable" in r]


def test_too_many_unreadable_pictures(run, tmp_path, tiny_data):
    """More than ten and one in a hundred: the run ends, but saved, and goes on with sound ones."""
    data_dir = with_bad_pictures(tiny_data, tmp_path / "data", range(0, 48, 4))
    with pytest.raises(SystemExit) as ended:
        run("queue", data_dir=data_dir)
    assert ended.value.code == 1
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert 0 < checkpoint["step"] < 8 and checkpoint["unreadable"] > 10
    with pytest.raises(SystemExit): # the count is kept: the same command ends again, a step on
        run("queue", data_dir=data_dir)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == checkpoint["step"] + 1


@pytest.mark.parametrize("name, function, term, log_interval", [
    ("mask", "masked_loss", "loss", 50), ("text", "feature_loss", "loss", 1),
    ("queue", "loss_terms", "kd_text", 50), ("mse", "loss_terms", "norm", 50)])
def test_not_finite(run, tmp_path, monkeypatch, name, function, term, log_interval):
    """Step 6 gives NaN, or an infinite gradient of a finite loss: named whatever the log interval, and
    neither step 6 nor what follows is saved."""
    module, calls = LOOPS[SETTINGS[name][0]], [0]
    original = getattr(module, function)

    def poisoned(*args):
        out = original(*args)
        loss, terms = out if function == "loss_terms" else (out, {})
        calls[0] += torch.is_grad_enabled() # not those of the validation
        if calls[0] == 6 and term == "norm":
            loss.register_hook(lambda grad: grad * math.inf)
        elif calls[0] == 6:
            loss, terms = loss * math.nan, {k: v * math.nan if k == term else v for k, v in terms.items()}
        return (loss, terms) if function == "loss_terms" else loss
    with monkeypatch.context() as m:
        m.setattr(module, function, poisoned)
        said = refused(run, name, log_interval=log_interval, save_interval=4, eval_interval=100)
    assert re.search(f"{term}.* not finite at step 6", said)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["model"].values())
    assert run(name, max_steps=8, resume=True)["step"] == 8


# -----------------------------------------------------------------------------
# slow: the tiny presets


@pytest.mark.slow
def test_tiny_presets(openmoji, tmp_path, monkeypatch):
    """The README's commands in a fresh folder, each two steps: the last ends with table and picture, and
    judges again when it is given again."""
    monkeypatch.chdir(tmp_path)
    for loop, preset in (("text", "tiny"), ("image", "tiny"), ("image", "tiny_half"), ("multimodal", "tiny"),
                         ("multimodal", "tiny")):
        for result in tmp_path.glob("out/tiny/retrieval.*"):
            result.unlink()
        process = start(script, f"distill_{loop}.py", f"--preset={preset}", f"--data_dir={openmoji}",
                        "--max_steps=2", "--batch_size=64", said="said")
        assert end(process, 900) == 0, (tmp_path / "said").read_text()
    assert {"ckpt.pt", "retrieval.json", "retrieval.png"} <= {*os.listdir("out/tiny")}
    assert "R@10" in (tmp_path / "said").read_text()
