"""
Losses on leaves: whatever the loss, the micro-batches and the ranks, the multimodal loop takes the steps of a
direct computation, and the image and text loops those of one process with whole batches. Two processes as
torchrun starts them (gloo), on toy data; killed, stopped, gone on with.

    pytest tests/test_ddp.py              # a few of the losses
    pytest tests/test_ddp.py -m slow      # every loss; kills, signals, torchrun itself
"""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import distill_multimodal
import evaluate
import model
from conftest import (REPO, assert_same_state, end, logged, records, script, slow, start, steps_done,
                      wait_for)
from distill_multimodal import TrainPairs, load_teacher, loss_terms, teacher_target
from model import batch_order, load_checkpoint, read_checkpoint
from prepare_imagenet import augment, visible_patches
from prepare_pairs import open_pairs
from test_loops import with_bad_pictures

# every --kd_loss with every --align_loss; the weights stay as they are while the queue fills, and overflows
FIXED = dict(max_steps=3, lr=0, warmup_steps=0, eval_interval=100, rotate=10, color=0.2)
KD = {"mse": {}, "l1": dict(head=True, unit="image"), "contrastive": dict(queue_size=20, unit="label"),
      "none": {}, "kl": dict(teacher="resnet50", image_init="random", temperature=2, head=True)}
ALIGN = {"none": {}, "contrastive": dict(align_levels=2, shared_norm_first=True, token_types=True),
         "ranking": dict(align_weight=0.1)}
LOSSES = {f"{kd}-{align}": FIXED | dict(kd_loss=kd, align_loss=align) | KD[kd] | ALIGN[align]
          for kd in KD for align in ALIGN if (kd, align) != ("none", "none")}
LOSSES["contrastive-contrastive"] |= dict(mask_ratio=0.5)
LOSSES["kl-ranking"] |= dict(shared="mlp", align_levels=2)
LOSSES["none-contrastive"] |= dict(shared="projection", align_levels=1)
QUICK = ["contrastive-contrastive", "kl-ranking"]


def classifier():
    """What load_pretrained("resnet50") gives: images to 1000 logits, here always the same ones."""
    linear = torch.nn.Linear(3 * 16, 1000, bias=False)
    linear.weight.data = torch.randn(1000, 48, generator=torch.Generator().manual_seed(0))
    layers = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), linear
    return torch.nn.Sequential(*layers).requires_grad_(False)


def train(name, *words):
    """A loop, where a classifier may teach; without the table at its end."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(model, "load_pretrained", lambda *_, **__: classifier())
        m.setattr(evaluate, "main", lambda command: None)
        script(name, *words)


def direct(words, student):
    """Loss and norm of the gradient of each step, with a graph from the pictures to the loss."""
    args, steps, queue = distill_multimodal.get_args(list(words)), [], None
    student.train().requires_grad_(True)
    pairs = TrainPairs(open_pairs(args.data_dir, args.data, "train"), student.tokenizer, args)
    teacher = classifier() if args.teacher == "resnet50" else load_teacher(args)[0]
    order = batch_order(pairs.num_units, args.batch_size, args.seed, 0)
    for _ in range(args.max_steps):
        images, ids, padding_mask, index, noise, _ = pairs.collate([pairs[i] for i in next(order)])
        images = augment(images, noise[:, :7], args.flip, args.rotate, args.color)
        target, group = None, torch.from_numpy(pairs.group)[index]
        if args.kd_loss != "none":
            target = teacher_target(teacher, images, args, torch.autocast("cpu", enabled=False))
        student.zero_grad()
        outputs = student(images, ids, padding_mask, visible_patches(noise[:, 7:], args.mask_ratio))
        loss, _ = loss_terms(outputs, target, group, queue, student, args)
        loss.backward()
        if args.queue_size:
            new = F.normalize(target, dim=-1), group
            queue = [torch.cat(x)[:args.queue_size] for x in zip(new, queue or [x[:0] for x in new])]
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        steps += [loss.item(), sum(x.square().sum() for x in gradients).sqrt().item()]
    return steps


def start_pair(folder, cases):
    """Two processes, ranks 0 and 1, that train cases, (name, words) each, one after the other."""
    # as torchrun does, the parent holds where they meet; each case has its own place
    stores = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
              for _ in cases]
    cases = [(store.port, name, words) for store, (name, words) in zip(stores, cases)]
    pair = [start(in_rank, cases, said=folder / f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True",
                  TORCHELASTIC_RESTART_COUNT="0") for rank in range(2)]
    for process in pair:
        process.stores = stores # as long as it runs
    return pair


def in_rank(cases):
    for port, name, words in cases:
        os.environ["MASTER_PORT"] = str(port)
        train(name, *words)


def end_pair(pair, folder, timeout=120):
    codes = [end(process, timeout) for process in pair]
    assert codes == [0, 0], "".join((folder / f"rank{rank}").read_text()[-3000:] for rank in range(2))


def losses_and_norms(folder):
    return [x for r in records(folder) if "loss" in r for x in (r["loss"], r["norm"])]


@pytest.mark.parametrize("names", [QUICK, slow([name for name in LOSSES if name not in QUICK])])
def test_gradients_are_those_of_a_direct_computation(names, knobs_of, tmp_path):
    """One process with whole and with micro-batches, two with both."""
    cases = [(name, micro) for name in names for micro in (0, 4)]

    def words(kind, name, micro):
        return knobs_of("mse", f"{kind}_{name}{micro}", **LOSSES[name], micro_batch_size=micro)
    pair = start_pair(tmp_path, [words("pair", *case) for case in cases])
    for case in cases: # meanwhile
        script_name, flags = words("one", *case)
        train(script_name, *flags)
    end_pair(pair, tmp_path, 300)
    for name, micro in cases:
        expected = direct(words("one", name, micro)[1],
                          load_checkpoint(tmp_path / f"one_{name}{micro}" / "ckpt.pt"))
        for kind in ("one", "pair"):
            found = losses_and_norms(tmp_path / f"{kind}_{name}{micro}")
            assert found == pytest.approx(expected, rel=1e-5), name


SHORT = dict(max_steps=3, warmup_steps=0, lr=1e-3, eval_interval=100, rotate=10, color=0.2)
STEPS = { # setting -> knobs, other knobs that change nothing
    "mask": (SHORT, dict(num_workers=1, micro_batch_size=4)),
    # one of 215 sequences is padded
    "text": (dict(max_steps=3, lr=1e-3, batch_size=214), dict(micro_batch_size=107, num_workers=1)),
    "queue": (dict(SHORT, mask_ratio=0.5, grad_clip=1), dict(num_workers=2, micro_batch_size=4)),
    "both": (dict(SHORT, cache_targets=True, batch_size=6), dict(micro_batch_size=3))}


@pytest.mark.parametrize("names", [["mask", "text"], slow(["queue", "both"])])
def test_ranks_micro_batches_and_workers_change_nothing(names, knobs_of, tmp_path, tiny_data):
    """The same losses, gradients and weights but for rounding, and the same count of unreadable pictures."""
    data = dict(data_dir=with_bad_pictures(tiny_data, tmp_path / "data", (3, 40)))

    def words(kind, name, **changes):
        knobs = STEPS[name][0] | ({} if name == "text" else data) | changes
        return knobs_of(name, f"{kind}_{name}", **knobs)
    pair = start_pair(tmp_path, [words("pair", name) for name in names])
    for name in names: # meanwhile
        for kind, changes in (("whole", {}), ("other", STEPS[name][1])):
            script_name, flags = words(kind, name, **changes)
            train(script_name, *flags)
    end_pair(pair, tmp_path)
    for name in names:
        results = []
        for kind in ("whole", "other", "pair"):
            checkpoint = read_checkpoint(tmp_path / f"{kind}_{name}" / "ckpt.pt")
            weights = torch.cat([x.flatten() for x in checkpoint["model"].values()])
            rows = losses_and_norms(tmp_path / f"{kind}_{name}")
            results.append((weights, rows, checkpoint["unreadable"]))
        whole, *others = results
        assert whole[2] > 0 or name in ("text", "both")
        for weights, rows, unreadable in others:
            assert (weights - whole[0]).norm() < 1e-4 * whole[0].norm()
            assert rows == pytest.approx(whole[1], rel=1e-4) and unreadable == whole[2]


@pytest.mark.slow
def test_killed_pair(knobs_of, tmp_path):
    """The weights of two that were not, bit for bit; SIGTERM to both: rank 0 has saved."""
    knobs = dict(max_steps=24, save_interval=3, eval_interval=12)
    end_pair(start_pair(tmp_path, [knobs_of("queue", "whole", **knobs)]), tmp_path)
    for n, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        pair = start_pair(tmp_path, [knobs_of("queue", "parts", **knobs)])
        wait_for(lambda: steps_done(tmp_path / "parts") > 4 + 6 * n, pair[0])
        for process in pair:
            os.kill(process.pid, number)
        codes = [end(process) for process in pair]
        assert codes[0] == (143 if number == signal.SIGTERM else -9), (tmp_path / "rank0").read_text()[-3000:]
        if number == signal.SIGTERM:
            assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] > 10
    end_pair(start_pair(tmp_path, [knobs_of("queue", "parts", **knobs)]), tmp_path)
    whole, parts = (read_checkpoint(tmp_path / out / "ckpt.pt") for out in ("whole", "parts"))
    assert_same_state(whole, parts)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def torchrun(name, words):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc_per_node=2", os.path.join(REPO, name), *words],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_torchrun(knobs_of, tmp_path):
    """The real one; SIGTERM to it alone reaches both ranks, which save; the same command goes on."""
    process = torchrun(*knobs_of("queue", "pair", max_steps=300))
    while process.poll() is None and steps_done(tmp_path / "pair") < 5:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=100)
    step = read_checkpoint(tmp_path / "pair" / "ckpt.pt")["step"]
    assert 4 < step < 300
    process = torchrun(*knobs_of("queue", "pair", max_steps=step + 2, resume=True))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and said.count(f"step {step + 2:>6}/") == 1, said
    assert (tmp_path / "pair" / "retrieval.json").exists()
