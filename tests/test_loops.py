"""
The three training loops, each through main(get_args([...])): losses fall, every weight learns, the same
command again goes on bit for bit whatever ended it, signals and bad steps end in good order.

    pytest tests/test_loops.py              # a minute, toy models on toy pictures and text
    pytest tests/test_loops.py -m slow      # processes that are killed, the tiny presets
"""
import errno
import fcntl
import functools
import json
import math
import os
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
import distill_text
import model
import prepare_owt
from conftest import (EACH, LOOPS, MULTIMODAL, REPO, SETTINGS, SIGNALS, assert_same_state, at_step, end,
                      flags, killed_at_random, logged, loop_of, records, refused, script, start, steps_done,
                      wait_for)
from model import load_checkpoint, read_checkpoint
from prepare_imagenet import Pairs


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in SETTINGS] + [
    ("mask", "bfloat16"), ("text", "bfloat16"), ("queue", "float16")])
def test_loss_falls_and_is_logged(run, tmp_path, name, dtype):
    checkpoint, (loop, knobs) = run(name, dtype=dtype), SETTINGS[name]
    log = records(tmp_path / "run")
    steps, vals = [r for r in log if "loss" in r], [r for r in log if "loss" not in r]
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["step"] for r in vals] == ([0, 15, 30] if loop == "text" else [15, 30])
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
    if "student" in before: # teacher=ema: what is saved as model is the average, with ema_decay=0.99 here
        average = before["model"]["cls_token"].lerp(after["student"]["cls_token"], 0.01)
        assert torch.allclose(after["model"]["cls_token"], average, atol=1e-7)
    knobs, frozen = SETTINGS[name][1], {"pos_embed", "image_encoder.pos_embed"} # fixed sines and cosines
    before_blocks = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    if knobs.get("share_embed"):
        frozen |= before_blocks
        published = read_checkpoint(teacher)["model"]
        assert all(torch.equal(after["model"][k], published[k]) for k in before_blocks)
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


@pytest.mark.parametrize("init, blocks", [("first", [0, 1]), ("alternate", [0, 2]), ("random", [9, 9])])
def test_init(init, blocks, run, text_data):
    """Which of the teacher's four blocks the student's two are before the first step; its embeddings."""
    student = run("text", max_steps=1, lr=0, init=init)["model"]
    weights = read_checkpoint(f"{text_data}/teacher.pt")["model"]
    equal = [[torch.equal(student[f"blocks.{i}.attn.qkv.weight"], weights[f"blocks.{j}.attn.qkv.weight"])
              for j in range(4)] for i in range(2)]
    assert equal == [[j == k for j in range(4)] for k in blocks]
    assert torch.equal(student["token_embed.weight"], weights["token_embed.weight"]) == (init != "random")


def test_toy_concepts_are_learned(run, tmp_path):
    """On the test split, the training kinds in new positions, retrieval ends far above chance."""
    run("queue", unit="label", max_steps=100, label_smoothing=0.1, queue_size=0, token_types=True, head=True,
        log_interval=50, eval_interval=100)
    result = json.loads((tmp_path / "run" / "retrieval.json").read_text())
    assert result["metrics"]["mean"] > result["chance"]["mean"] + 20, result["metrics"]
    assert (tmp_path / "run" / "retrieval.png").stat().st_size > 1000


def test_log_scale_is_clamped(run):
    """One step of AdamW adds or takes 20 here."""
    scales = run("levels", max_steps=1, warmup_steps=0, lr=20)["model"]["log_scale"].tolist()
    assert all(scale in (0, pytest.approx(math.log(100))) for scale in scales)


@pytest.mark.parametrize("module", LOOPS.values())
def test_learning_rate(module):
    args = module.get_args(["--lr=1", "--warmup_steps=4", "--max_steps=10"])
    assert [module.get_lr(k, args) for k in (0, 1, 3, 4, 7, 10)] \
        == pytest.approx([0.25, 0.5, 1, 1, 0.5, 0])
    args.warmup_steps = 0
    assert module.get_lr(0, args) == 1


def test_a_text_checkpoint_starts_other_students(run, tmp_path, tiny_data):
    checkpoint, path = run("text", max_steps=2), tmp_path / "run" / "ckpt.pt"
    words = dict(MULTIMODAL, data_dir=tiny_data, out_dir=tmp_path / "both", image_init="random",
                 kd_loss="none", align_loss="contrastive", text_init=path, text_depth=2, max_length=16,
                 max_steps=1, lr=0)
    distill_multimodal.main(distill_multimodal.get_args(flags(words)))
    both = load_checkpoint(tmp_path / "both" / "ckpt.pt")
    for k, v in both.text_encoder.state_dict().items():
        assert torch.equal(v, checkpoint["model"][k]), k
    assert both.tokenizer.text == checkpoint["tokenizer"]
    assert "another --out_dir" in refused(run, "text", teacher=path) # which it would write


# -----------------------------------------------------------------------------
# the same command again


@pytest.mark.parametrize("name, knobs", [
    ("mask", dict(dtype="float16", micro_batch_size=8, rotate=10)), ("text_cls", dict(micro_batch_size=8)),
    ("queue", dict(micro_batch_size=8, color=0.2, unit="label", cache_targets=True))])
def test_going_on_is_exact(run, run_until, tmp_path, tiny_data, name, knobs):
    """Stopped in an unsaved step, over epochs of 1, 3 or 13 steps; with unreadable pictures."""
    knobs = dict(max_steps=15, save_interval=3, eval_interval=6, **knobs)
    if name != "text_cls":
        knobs["data_dir"] = with_bad_pictures(tiny_data, tmp_path / "data", (3, 40))
    whole = run(name, "whole", **knobs)
    run_until(14, name, "parts", **knobs)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 12
    assert records(tmp_path / "parts")[-1]["step"] == 14
    (tmp_path / "parts" / "ckpt.pt.tmp99").write_bytes(b"cut short by the kill")
    with open(tmp_path / "parts" / "log.jsonl", "a") as f:
        f.write('{"step": 12, "lo') # as this line was
    resumed = run(name, "parts", **knobs | dict(save_interval=50, compile=False, num_workers=1))
    assert_same_state(whole, resumed)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") # no step twice, none missing
    first, second = records(tmp_path / "parts", starts=True) # what each start could be repeated from
    assert (first["step"], second["step"]) == (0, 12) and "code " in first["with"]
    assert first["settings"] == second["settings"] == resumed["settings"]
    minutes = [r["minutes"] for r in records(tmp_path / "parts")]
    assert minutes == sorted(minutes) # went on, not from 0
    assert {p.name for p in (tmp_path / "parts").glob("ckpt*")} == {"ckpt.pt"}


@pytest.mark.parametrize("name", EACH)
def test_one_rule(run, run_until, tmp_path, tiny_data, text_data, name):
    """Finished: the same command changes nothing, and judges. Other settings are refused by name, finished or
    not, unless they change no result; --resume takes all but those that make the model."""
    knobs, path = dict(max_steps=4, eval_interval=2), tmp_path / "run" / "ckpt.pt"
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
        for change, said in ((dict(lr=1e-3), "--lr"), (dict(max_steps=5), "--max_steps"),
                             (dict(weight_decay=0.5, batch_size=8), "--batch_size"),
                             (dict(dtype="bfloat16"), "autocast"), (dict(depth=3, resume=True), "--depth"),
                             (dict(max_steps=1, resume=True), "step")):
            error = refused(run, name, **unfinished | change)
            assert said in error and ("or --resume" in error) == ("resume" not in change)
        assert path.read_bytes() == before
        assert run(name, **knobs | harmless)["step"] == 4
    for result in tmp_path.glob("run/retrieval*"):
        result.unlink()
    log = records(tmp_path / "run")
    run(name, **knobs)
    assert path.read_bytes() == before and records(tmp_path / "run") == log
    assert (tmp_path / "run" / "retrieval.json").exists() == (name == "queue") # judged again
    changed = run(name, **knobs | dict(max_steps=6, weight_decay=0.3, resume=True))
    assert changed["step"] == 6 and changed["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    assert sorted(os.listdir(tmp_path)) == ["moved", "run"] # no folder is renamed


def test_an_edited_copy_never_meets_an_old_run(tmp_path, monkeypatch, knobs_of):
    """One line of a copied loop changed, or of model.py."""
    path, edited = tmp_path / "my_loss.py", tmp_path / "model.py"
    shutil.copy(os.path.join(REPO, "distill_image.py"), path)
    edited.write_text("# a line more")

    def copy(max_steps, **changes):
        script(str(path), *knobs_of("mask", max_steps=max_steps, **changes)[1])
    monkeypatch.setattr(sys, "argv", [])
    copy(2)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(model, "__file__", str(edited))
        assert "model.py" in refused(copy, 2)
    path.write_text(path.read_text().replace("lr = get_lr(", "lr = 0.5 * get_lr("))
    said = refused(copy, 2)
    assert "my_loss.py" in said and "--resume" in said and "--out_dir" in said
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    copy(3, resume=True)
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3


@pytest.mark.parametrize("name, what", [
    ("mask", "the data set"), ("features", "the teacher"), ("text", "the data set"), ("text", "the teacher"),
    ("queue", "the data set"), ("queue", "tokenizer")])
def test_what_is_read_has_changed(run, run_until, tmp_path, tiny_data, text_data, teacher, name, what):
    """Refused by name, the tokenizer even with --resume."""
    data = tmp_path / "data"
    shutil.copytree(text_data if name == "text" else tiny_data, data)
    if name != "text":
        shutil.copy(teacher, data)
    knobs = dict(max_steps=4, save_interval=2, data_dir=data)
    if name != "mask":
        knobs["teacher"] = data / ("teacher.pt" if name == "text" else "ckpt.pt")
    run_until(3, name, **knobs)
    if what == "the teacher":
        checkpoint = read_checkpoint(knobs["teacher"])
        checkpoint["model"]["blocks.1.attn.proj.bias"] += 0.1
        torch.save(checkpoint, knobs["teacher"])
    elif what == "tokenizer": # two words change places
        path = data / "toy" / "tokenizer.json"
        text = path.read_text().replace('"red"', '"x"').replace('"green"', '"red"').replace('"x"', '"green"')
        path.write_text(text)
    elif name == "text":
        path = data / "toy_text" / "train.bin"
        path.write_bytes(path.read_bytes()[100:] + path.read_bytes()[:100])
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


def test_a_damaged_checkpoint_is_a_sentence(run, run_until, tmp_path):
    """Or one of another program in our format; a log that lost its end is none."""
    knobs, path = dict(max_steps=4, save_interval=2), tmp_path / "run" / "ckpt.pt"
    run_until(3, "queue", **knobs)
    checkpoint = read_checkpoint(path)
    # moments of another shape: torch's fused kernels would write past their end
    state = {i: {k: x[..., :1] if x.ndim else x for k, x in kept.items()}
             for i, kept in checkpoint["optimizer"]["state"].items()}
    for damage in (dict(step="x"), dict(settings=None), dict(model={}), dict(optimizer={}),
                   dict(optimizer={**checkpoint["optimizer"], "state": state})):
        torch.save({**checkpoint, **damage}, path)
        refused(run, "queue", **knobs)
    torch.save(checkpoint, path)
    with open(tmp_path / "run" / "log.jsonl", "ab") as f:
        f.write(bytes(40) + b"\n[3]\n") # what a lost power leaves
    assert run("queue", **knobs)["step"] == 4


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


def send(*numbers, apart=0):
    """These signals to this process, so many seconds apart."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(apart)


@pytest.mark.parametrize("name, number, workers", [
    ("mask", signal.SIGTERM, 2), ("mask", signal.SIGHUP, 0), ("text", signal.SIGINT, 1),
    ("queue", signal.SIGUSR1, 0)])
def test_signals_save_and_leave(run, tmp_path, monkeypatch, name, number, workers):
    """The step under way is finished and saved, going on is exact, no handler is left."""
    knobs = dict(max_steps=11, eval_interval=4, num_workers=workers)
    if signal.getsignal(number) == signal.SIG_IGN: # as these tests under nohup
        signal.signal(number, signal.SIG_DFL)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    whole = run(name, "whole", **knobs)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        at_step(m, loop_of(name), 6, send, number, number) # from the group and a parent: one
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
    sending = functools.partial(send, apart=apart)
    at_step(pytest.MonkeyPatch(), distill_image, 6, sending, signal.SIGTERM, second)
    distill_image.main(distill_image.get_args(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize("name, number, is_ignored", [
    ("mask", signal.SIGTERM, False), ("queue", signal.SIGINT, False), ("mask", signal.SIGHUP, True)])
def test_signal_to_the_whole_group(begin, run, tmp_path, name, number, is_ignored):
    """The loader's workers get it, too. What was ignored at the start, as under nohup, stays so."""
    knobs = dict(max_steps=40, num_workers=2, save_interval=50)
    process = begin(name, ignored=[number] if is_ignored else [], **knobs)
    wait_for(lambda: steps_done(tmp_path / "run") > 4, process)
    os.killpg(process.pid, number)
    if not is_ignored:
        assert end(process) == 128 + number, (tmp_path / "said").read_text()
        assert 4 < read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 40
        process = begin(name, **knobs)
    assert end(process) == 0
    assert_same_state(run(name, "whole", **knobs), read_checkpoint(tmp_path / "run" / "ckpt.pt"))


@pytest.mark.slow
def test_a_dead_worker_ends_with_a_save(begin, tmp_path):
    process = begin("queue", max_steps=5000, num_workers=2)
    wait_for(lambda: steps_done(tmp_path / "run") > 9, process)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        os.kill(int(f.read().split()[-1]), signal.SIGKILL)
    assert end(process) == 1, (tmp_path / "said").read_text()
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == steps_done(tmp_path / "run") > 9


def into_a_closed_pipe(number, name, *words):
    """The reader goes away in step 6: `| head`; or Ctrl-C, which ends `2>&1 | tee`, too."""
    reader, writer = os.pipe()
    for stream in [1, 2] if number else [1]:
        os.dup2(writer, stream)

    def close():
        os.close(reader)
        if number:
            send(number)
    at_step(pytest.MonkeyPatch(), distill_text, 5, close)
    distill_text.main(distill_text.get_args(list(words)))


@pytest.mark.parametrize("number, code", [(None, signal.SIGPIPE), (signal.SIGINT, signal.SIGINT)])
def test_a_closed_pipe_ends_with_a_save(begin, tmp_path, number, code):
    process = begin("text", function=functools.partial(into_a_closed_pipe, number), max_steps=5000)
    assert end(process) == 128 + code, (tmp_path / "said").read_text()
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [
    ("mask", dict(micro_batch_size=4)), ("text", dict(num_workers=2, save_interval=1)),
    ("queue", dict(micro_batch_size=4, num_workers=2))])
def test_killed_at_random(run, begin, tmp_path, name, changes):
    knobs = {"max_steps": 90, "save_interval": 3, "eval_interval": 50, **changes}
    whole = run(name, "whole", **knobs)
    assert killed_at_random(lambda: begin(name, "parts", **knobs), tmp_path / "parts" / "ckpt.pt") > 1
    assert_same_state(whole, run(name, "parts", **knobs))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_full_disk(run, tmp_path, monkeypatch):
    """Said, and what was there is as it was: with room the same command ends in the same weights."""
    knobs, unlimited = dict(max_steps=11, save_interval=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = run("mask", "whole", **knobs)
    with monkeypatch.context() as m: # no file may become larger: what a disk with little room does
        at_step(m, distill_image, 7, resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        try:
            assert "ckpt.pt" in refused(run, "mask", "parts", **knobs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 6
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
def test_unreadable_pictures_are_grey_and_named(run, tmp_path, tiny_data, monkeypatch, capfd, name):
    data_dir = with_bad_pictures(tiny_data, tmp_path / "data", (3, 40))
    module, seen = loop_of(name), []
    augment = module.augment
    monkeypatch.setattr(module, "augment", lambda x, *rest: seen.append(x) or augment(x, *rest))
    checkpoint = run(name, data_dir=data_dir, max_steps=9, eval_interval=100)
    named = [i for r in records(tmp_path / "run") for i in r.get("unreadable", [])]
    assert {*named} == {3, 40} and len(named) == checkpoint["unreadable"] <= 20
    assert sum((x == 128).all(dim=(1, 2, 3)).sum() for x in seen) >= len(named) # grey
    assert re.search(r"\b(3|40)\b", capfd.readouterr().err)


def test_too_many_unreadable_pictures(run, tmp_path, tiny_data):
    """More than ten and one in a hundred: the run ends, but saved."""
    data_dir, steps = with_bad_pictures(tiny_data, tmp_path / "data", range(0, 48, 4)), []
    for _ in range(2): # the count is kept: the same command ends again, a step on
        with pytest.raises(SystemExit) as ended:
            run("queue", data_dir=data_dir)
        checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
        assert ended.value.code == 1 and checkpoint["unreadable"] > 10
        steps.append(checkpoint["step"])
    assert 0 < steps[0] < 8 and steps[1] == steps[0] + 1


@pytest.mark.parametrize("name, function, log_interval", [
    ("mask", "masked_loss", 50), ("text", "feature_loss", 1), ("queue", "contrastive_kd_loss", 50)])
@pytest.mark.parametrize("term", ["loss", "norm"])
def test_not_finite(run, tmp_path, monkeypatch, name, function, log_interval, term):
    """Step 6 gives NaN, or an infinite gradient of a finite loss: named whatever the log interval, and
    neither step 6 nor what follows is saved."""
    module = loop_of(name)
    original = getattr(module, function)

    def poisoned(*args):
        loss = original(*args)
        if term == "loss":
            return loss * math.nan
        if loss.requires_grad: # not in the validation
            loss.register_hook(lambda grad: grad * math.inf)
        return loss
    with monkeypatch.context() as m:
        at_step(m, module, 5, m.setattr, module, function, poisoned)
        said = refused(run, name, log_interval=log_interval, save_interval=4, eval_interval=100)
    term = "kd_" if (name, term) == ("queue", "loss") else term
    assert re.search(f"{term}.* not finite at step 6", said)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(x.isfinite().all() for x in checkpoint["model"].values())


@pytest.mark.slow
def test_tiny_presets(tmp_path, monkeypatch):
    """The README's commands in an empty folder, each three steps: the first draws its own pictures, and ends
    with table and picture."""
    monkeypatch.chdir(tmp_path)
    # less text than distill_text.py would take: its two validations read all that is held out
    prepare_owt.main(prepare_owt.get_args(["--data=pydoc", "--limit=2"]))
    for loop, *words in (("multimodal", "--preset=tiny", "--batch_size=64", "--teacher_size=32"),
                         ("text", "--preset=tiny", "--batch_size=8"),
                         ("image", "--preset=tiny", "--batch_size=64"),
                         ("image", "--preset=tiny_half", "--batch_size=64")):
        process = start(script, f"distill_{loop}.py", "--max_steps=3", *words, said="said")
        assert end(process, 900) == 0, (tmp_path / "said").read_text()
    assert {"ckpt.pt", "retrieval.json", "retrieval.png"} <= {*os.listdir("out/tiny")}


def test_a_warm_up_that_never_ends_is_said(run, capsys):
    run("mask", max_steps=2, warmup_steps=4)
    said = capsys.readouterr().out
    assert "--max_steps=2 ends within the warm-up" in said and "1.0e-03" in said
