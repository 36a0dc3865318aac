"""
Losses on leaves: whatever the loss, the micro-batches and the ranks, the multimodal loop takes the steps of a
direct computation, and the image and text loops those of one process with whole batches. Two processes as
torchrun starts them (gloo), on toy data; killed, stopped, gone on with by more or fewer.

    pytest tests/test_ddp.py              # some of the losses
    pytest tests/test_ddp.py -m slow      # every loss; kills, signals, torchrun itself
"""
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import distill_multimodal
import model
from conftest import REPO, end, script, slow, start # noqa: F401 (script: see do)
from distill_multimodal import TrainPairs, loss_terms, teacher_target, word_targets
from model import batch_order, read_checkpoint
from prepare_imagenet import augment, visible_patches
from prepare_pairs import open_pairs
from test_loops import (LOOPS, MULTIMODAL, logged, records, same_state, steps_done, wait_for,
                        with_bad_pictures)
from test_loops import knobs_of, run, teacher # noqa: F401 (fixtures)

# every --kd_loss with every --align_loss; the weights stay as they are while the queue fills
FIXED = dict(max_steps=2, lr=0, warmup_steps=0, eval_interval=100, rotate=10, color=0.2)
KD = {"mse": {}, "l1": dict(head=True, unit="image"), "contrastive": dict(queue_size=20, unit="label"),
      "none": {}, "kl": dict(teacher="resnet50", image_init="random", temperature=2, head=True)}
ALIGN = {"none": {}, "contrastive": dict(align_levels=2, shared_norm_first=True, token_types=True),
         "ranking": dict(align_weight=0.1)}
LOSSES = {f"{kd}-{align}": MULTIMODAL | FIXED | dict(kd_loss=kd, align_loss=align) | KD[kd] | ALIGN[align]
          for kd in KD for align in ALIGN}
LOSSES["none-none"] |= dict(word_weight=2.0)
LOSSES["mse-ranking"] |= dict(word_weight=0.5, freeze_embeddings=True)
LOSSES["contrastive-contrastive"] |= dict(mask_ratio=0.5)
LOSSES["kl-ranking"] |= dict(shared="mlp", align_levels=2)
LOSSES["none-contrastive"] |= dict(shared="projection", align_levels=1)
QUICK = ["contrastive-contrastive", "mse-ranking", "kl-ranking", "none-contrastive"]


class Classifier(torch.nn.Module):
    """What load_pretrained("resnet50") gives: images to logits, in eval mode; here of ten classes."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 16, 10)

    def forward(self, images):
        return 3 * self.fc(F.adaptive_avg_pool2d(images, 4).flatten(1))


def trace(name, *words):
    """One run of a loop in this process -> of each step the gradients, summed over the ranks, by name, and
    the samples that it saw; the weights at the end; the student and the classifier that may teach it."""
    loop = name[8:-3]
    module, seen = LOOPS[loop], SimpleNamespace(gradients=[], samples=[], names={}, student=None)
    classifier = Classifier()
    for i, p in enumerate(classifier.parameters()): # the same in every process
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    clip, make_optimizer = torch.nn.utils.clip_grad_norm_, module.make_optimizer

    def see_modules(modules, *rest):
        seen.student = modules[0]
        seen.names = {p: f"{i}.{k}" for i, m in enumerate(modules) for k, p in m.named_parameters()}
        return make_optimizer(modules, *rest)

    def see_gradients(parameters, *rest):
        seen.gradients.append({seen.names[p]: p.grad.clone() for p in parameters if p.grad is not None})
        return clip(parameters, *rest)

    def see_samples(inner, first, last):
        def call(*args, **rest):
            if torch.is_grad_enabled(): # not those of a validation
                seen.samples.append([x.clone() for x in args[first:last]])
            return inner(*args, **rest)
        return call
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", see_gradients)
        m.setattr(module, "make_optimizer", see_modules)
        if loop == "text":
            m.setattr(module, "feature_loss", see_samples(module.feature_loss, 2, 3))
        else:
            m.setattr(module, "augment", see_samples(module.augment, 0, 2))
        m.setattr(distill_multimodal, "load_pretrained",
                  lambda name, *_, **__: classifier.eval().requires_grad_(False))
        m.setattr(distill_multimodal.evaluate, "main", lambda command: None)
        module.main(module.get_args(list(words)))
    seen.weights, seen.teacher = {k: p.detach() for p, k in seen.names.items()}, classifier
    return seen


def direct(student, classifier, words):
    """What the same command would do with nothing but a graph from the pictures to the loss: of each step the
    loss and the gradients by name."""
    args, found, queue = distill_multimodal.get_args(list(words)), [], None
    pairs = TrainPairs(open_pairs(args.data_dir, args.data, "train"), student.tokenizer, args)
    teacher = classifier # noqa: F811
    if args.teacher != "resnet50":
        teacher, _ = distill_multimodal.load_teacher(args)
    order = batch_order(pairs.num_units, args.batch_size, args.seed, 0)
    for _ in range(args.max_steps):
        images, ids, padding_mask, index, noise, _ = pairs.collate([pairs[i] for i in next(order)])
        images, target, words = augment(images, noise[:, :7], args.flip, args.rotate, args.color), None, None
        group = torch.from_numpy(pairs.group)[index]
        if args.kd_loss != "none":
            target = teacher_target(teacher, images, args, torch.autocast("cpu", enabled=False))
        if args.word_weight:
            words = word_targets(ids, padding_mask, student.tokenizer.vocab_size)
        student.zero_grad()
        outputs = student(images, ids, padding_mask, visible_patches(noise[:, 7:], args.mask_ratio))
        loss, _ = loss_terms(outputs, target, group, queue, words, student, args)
        loss.backward()
        if args.queue_size:
            new = F.normalize(target, dim=-1), group
            queue = [torch.cat(x)[:args.queue_size] for x in zip(new, queue or [x[:0] for x in new])]
        found.append((loss.item(), {f"0.{k}": p.grad.clone() for k, p in student.named_parameters()
                                    if p.grad is not None}))
    return found


def compare(gradients, expected, rel=1e-5):
    """Each tensor beside its own norm; what is rounding noise (of a key's bias) beside the largest."""
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.keys() == theirs.keys()
        largest = max(x.norm() for x in theirs.values())
        for k in ours:
            assert (ours[k] - theirs[k]).norm() <= rel * theirs[k].norm() + 1e-7 * largest, k


def start_pair(folder, cases, function="trace"):
    """Two processes, ranks 0 and 1, that call trace or script for cases, (name, words) each, one after the
    other."""
    # as torchrun does, the parent holds where they meet; each case has its own place
    stores = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
              for _ in cases]
    todo = [(store.port, name, words) for store, (name, words) in zip(stores, cases)]
    pair = [start(do, function, todo, str(folder / f"rank{rank}.pt"), said=folder / f"rank{rank}",
                  RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
            for rank in range(2)]
    for process in pair:
        process.stores = stores # as long as it runs
    return pair


def do(function, todo, path):
    """What each of the two processes does."""
    found = []
    for port, name, words in todo:
        os.environ["MASTER_PORT"] = str(port)
        seen = globals()[function](name, *words)
        if seen:
            found.append(dict(gradients=seen.gradients, samples=seen.samples, weights=seen.weights))
    torch.save(found, path)


def end_pair(pair, folder, timeout=120):
    """-> what each rank did in each case."""
    codes = [end(process, timeout) for process in pair]
    assert codes == [0, 0], "".join((folder / f"rank{rank}").read_text()[-3000:] for rank in range(2))
    return list(zip(*(torch.load(folder / f"rank{rank}.pt") for rank in range(2))))


# -----------------------------------------------------------------------------
# the same steps


@pytest.mark.parametrize("names", [QUICK, slow([name for name in LOSSES if name not in QUICK])])
def test_gradients_are_those_of_a_direct_computation(names, knobs_of, tmp_path): # noqa: F811
    """One process with whole and with micro-batches, two with both."""
    cases = [(name, micro) for name in names for micro in (0, 4)]

    def words(kind, name, micro):
        knobs = {k: v for k, v in LOSSES[name].items() if v != "TEACHER"}
        return knobs_of("mse", f"{kind}_{name}{micro}", **knobs, micro_batch_size=micro)
    pair = start_pair(tmp_path, [words("pair", *case) for case in cases])
    single = [trace(words("one", *case)[0], *words("one", *case)[1]) for case in cases] # meanwhile
    for case, one, ranks in zip(cases, single, end_pair(pair, tmp_path), strict=True):
        expected = direct(one.student, one.teacher, words("one", *case)[1])
        for seen in (one.gradients, *(rank["gradients"] for rank in ranks)):
            compare(seen, [gradients for _, gradients in expected])
        for kind in ("one", "pair"):
            losses = [r["loss"] for r in records(tmp_path / f"{kind}_{case[0]}{case[1]}") if "loss" in r]
            assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)




SHORT = dict(max_steps=3, warmup_steps=0, lr=1e-3, eval_interval=100)
RICH = dict(rotate=10, color=0.2)
STEPS = { # name -> (setting, knobs, other knobs that change nothing)
    "mask": ("mask", RICH, [dict(micro_batch_size=4), dict(num_workers=1, micro_batch_size=8)]),
    "features": ("features", RICH, [dict(micro_batch_size=4)]),
    "queue": ("queue", dict(RICH, mask_ratio=0.5, grad_clip=1), [dict(num_workers=2, micro_batch_size=4)]),
    "cached": ("both", dict(cache_targets=True, batch_size=6), [dict(micro_batch_size=3)]),
    # one of 215 sequences is padded
    "text": ("text", dict(batch_size=214), [dict(micro_batch_size=107, num_workers=1)]),
    "text_cls": ("text_cls", {}, [dict(micro_batch_size=4)])}


@pytest.mark.parametrize("names", [["mask", "queue", "text"],
                                   slow(["features", "cached", "text_cls"])])
def test_ranks_micro_batches_and_workers_change_nothing(names, knobs_of, tmp_path): # noqa: F811
    """The same noise bit for bit, the same gradients and weights but for rounding; all ranks end equal."""
    pair = start_pair(tmp_path, [knobs_of(STEPS[name][0], f"pair_{name}", **{**SHORT, **STEPS[name][1]})
                                 for name in names])
    whole, others = {}, {name: [] for name in names}
    for name in names:
        setting, knobs, changes = STEPS[name]
        for i, change in enumerate([{}, *changes]):
            script_name, words = knobs_of(setting, f"{name}{i}", **{**SHORT, **knobs, **change})
            seen = trace(script_name, *words)
            others[name].append(seen)
        whole[name] = others[name][0]
    for name, ranks in zip(names, end_pair(pair, tmp_path), strict=True):
        expected, distance = whole[name], []
        for seen in (*others[name][1:], *(SimpleNamespace(**rank) for rank in ranks)):
            compare(seen.gradients[:1], expected.gradients[:1]) # from here on Adam amplifies rounding
            a, b = (torch.cat([x.flatten() for x in s.weights.values()]) for s in (seen, expected))
            distance.append(((a - b).norm() / b.norm()).item())
        assert max(distance) < 1e-4, distance
        for rows in ([x for seen in others[name][1:] for x in [seen.samples]]):
            assert torch.equal(flat(rows), flat(expected.samples))
        if not name.startswith("text"): # there one step's samples are one call a rank
            steps = [[torch.cat(x) for x in zip(*both)] for both in zip(*(rank["samples"] for rank in ranks))]
            assert torch.equal(flat(steps), flat(expected.samples))
        for k in ranks[0]["weights"]:
            assert torch.equal(ranks[0]["weights"][k], ranks[1]["weights"][k]), k
        for a, b in zip(logged(tmp_path / f"{name}0"), logged(tmp_path / f"pair_{name}"), strict=True):
            a, b = ({k: v for k, v in r.items() if k != "best"} for r in (a, b)) # a name
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


def flat(samples):
    """All values of all calls, in the order of the samples."""
    return torch.cat([torch.cat(list(x)).flatten().double() for x in zip(*samples)])


@pytest.mark.parametrize("B, micro, said", [
    (16, 0, None), (16, 4, None), (15, 0, "--batch_size=15"), (16, 3, "--micro_batch_size=3"),
    (16, 16, "--micro_batch_size=16")])
def test_a_batch_must_come_out_even(B, micro, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = SimpleNamespace(batch_size=B, micro_batch_size=micro)
    if said:
        with pytest.raises(SystemExit, match=said):
            model.split_batch(args)
    else:
        assert model.split_batch(args) == (8, micro or 8)


def test_the_default_of_num_workers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for cuda, expected in ((False, 0), (True, 3)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        assert {module.get_args([]).num_workers for module in LOOPS.values()} == {expected}


# -----------------------------------------------------------------------------
# stopped, killed, gone on with


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask", "text", "queue"])
def test_killed_pair(knobs_of, run, tmp_path, name): # noqa: F811
    """Two ranks killed together: in the end the weights of two that were not, bit for bit, and those of one
    but for rounding. SIGTERM to both: rank 0 has saved, exit code 143."""
    knobs = dict(max_steps=24, save_interval=3, eval_interval=12)
    end_pair(start_pair(tmp_path, [knobs_of(name, "whole", **knobs)], "script"), tmp_path)
    for n, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        pair = start_pair(tmp_path, [knobs_of(name, "parts", **knobs)], "script")
        wait_for(lambda: steps_done(tmp_path / "parts") > 4 + 6 * n, pair[0])
        for process in pair:
            os.kill(process.pid, number)
        codes = [end(process) for process in pair]
        assert codes[0] == (143 if number == signal.SIGTERM else -9), (tmp_path / "rank0").read_text()[-3000:]
        if number == signal.SIGTERM:
            assert read_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] > 10
            one = dict(run(name, "one", **knobs)) # meanwhile
    end_pair(start_pair(tmp_path, [knobs_of(name, "parts", **knobs)], "script"), tmp_path)
    whole, parts = (read_checkpoint(tmp_path / out / "ckpt.pt") for out in ("whole", "parts"))
    same_state(whole, parts)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    distance = sum((one["model"][k] - v).norm() ** 2 for k, v in whole["model"].items()) ** 0.5
    assert distance < 1e-3 * sum(v.norm() ** 2 for v in whole["model"].values()) ** 0.5


@pytest.mark.slow
def test_unreadable_pictures_are_counted_over_ranks(knobs_of, run, tmp_path, tiny_data): # noqa: F811
    data_dir = with_bad_pictures(tiny_data, tmp_path / "data", (3, 40))
    knobs = dict(data_dir=data_dir, max_steps=6, log_interval=2)
    end_pair(start_pair(tmp_path, [knobs_of("queue", "pair", **knobs)], "script"), tmp_path)
    pair = read_checkpoint(tmp_path / "pair" / "ckpt.pt")["unreadable"]
    assert pair == run("queue", "one", **knobs)["unreadable"] > 0


def torchrun(name, words, *changes):
    """-> exit code, what was printed, seconds."""
    started = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", os.path.join(REPO, name), *words, *changes],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    return done.returncode, done.stdout, time.time() - started


@pytest.mark.slow
def test_torchrun(knobs_of, tmp_path): # noqa: F811
    """The real one; SIGTERM to it alone reaches both ranks, which save; the same command goes on."""
    name, words = knobs_of("queue", "pair", max_steps=300)
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node=2", os.path.join(REPO, name), *words],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and steps_done(tmp_path / "pair") < 5:
        time.sleep(0.05)
    process.terminate()
    process.wait(100)
    step = read_checkpoint(tmp_path / "pair" / "ckpt.pt")["step"]
    assert 4 < step < 300
    code, said, _ = torchrun(name, words, f"--max_steps={step + 2}", "--resume")
    assert code == 0 and said.count(f"step {step + 2:>6}/") == 1, said
    assert (tmp_path / "pair" / "retrieval.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changes, said", [
    (["--data=nothing"], "data set nothing"), (["--bach_size=3"], "unknown flag --bach_size"),
    (["--lr=1e38", "--max_steps=1000"], "not finite at step")])
def test_a_failure_is_said_once_and_ends_all(knobs_of, changes, said): # noqa: F811
    code, printed, seconds = torchrun(*knobs_of("mask"), *changes)
    assert code and printed.count(said) == 1 and seconds < 100, printed
    assert printed.count("error: ") == 1, printed
