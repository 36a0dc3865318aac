"""
Data parallel: two processes, on the CPU, take the steps that one takes with the same batches, whatever the
loss; only the first writes; a run can go on with more or fewer processes.

    pytest tests/test_ddp.py              # a pair of processes for a few small runs
    pytest tests/test_ddp.py -m slow      # every loss; torchrun itself, and how it ends
"""
import contextlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import distill_image
import distill_multimodal
import distill_text
import model
from test_loops import EMA, MULTIMODAL, SETTINGS, flags, records
from test_loops import teacher # noqa: F401 (a fixture)
from test_losses import Classifier

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = {"image": distill_image, "multimodal": distill_multimodal, "text": distill_text}
SHORT = dict(max_steps=3, warmup_steps=0, lr=1e-3, eval_interval=100)
TEXT = dict(data="toy_text", device="cpu", dtype="float32", max_length=16, depth=2, log_interval=1)
PADDED = dict(TEXT, batch_size=214) # of 215 sequences, of which one is shorter and padded


def trace(loop, knobs, stop=None):
    """One run of a loop in this process -> what it did: the gradients of its first step, summed over the
    ranks; the widths of its texts; the weights at the end, an average of them too. Stopped before step
    `stop` as if by a kill."""
    module, seen = MODULES[loop], SimpleNamespace(gradients=None, parameters=[], average=[], widths=[])
    classifier = Classifier()
    for i, p in enumerate(classifier.parameters()): # the same in every process
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    clip, lerp, get_lr = torch.nn.utils.clip_grad_norm_, torch._foreach_lerp_, module.get_lr
    words = distill_multimodal.word_targets

    def see_gradients(parameters, *rest):
        seen.parameters = list(parameters)
        if seen.gradients is None:
            seen.gradients = [None if p.grad is None else p.grad.clone() for p in seen.parameters]
        return clip(seen.parameters, *rest)

    def see_average(average, *rest):
        seen.average = average
        return lerp(average, *rest)

    def see_widths(ids, *rest):
        seen.widths.append(ids.shape[1])
        return words(ids, *rest)

    def stopping(step, args):
        if step == stop:
            raise KeyboardInterrupt
        return get_lr(step, args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", see_gradients)
        m.setattr(torch, "_foreach_lerp_", see_average)
        m.setattr(module, "get_lr", stopping)
        m.setattr(distill_multimodal, "word_targets", see_widths)
        m.setattr(distill_multimodal, "load_pretrained", lambda name, path: classifier.requires_grad_(False))
        m.setattr(distill_multimodal.evaluate, "main", lambda command: None)
        try:
            module.main(module.get_args(flags(knobs)))
        except KeyboardInterrupt:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return dict(gradients=seen.gradients, weights=[p.detach() for p in seen.parameters], average=seen.average,
                widths=seen.widths)


@contextlib.contextmanager
def pair_of_processes(folder, cases):
    """Two processes that trace the cases (loop, knobs, stop), one after the other -> the function that waits
    for them and returns, of each case, what each rank did."""
    # as torchrun does, the parent holds where they meet; each case has its own place
    stores = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
              for _ in cases]
    (folder / "cases.json").write_text(json.dumps([(s.port, *case) for s, case in zip(stores, cases)]))
    children = [subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                 TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", PYTHONPATH=REPO))
        for rank in range(2)]

    def wait():
        said = [children[0].communicate(timeout=300)[0]]
        if children[0].returncode:
            time.sleep(1)
            children[1].kill() # which may wait for the first
        said.append(children[1].communicate(timeout=60)[0])
        assert [child.returncode for child in children] == [0, 0], "".join(said)
        assert "ranks x micro-batches x" in said[0] and not said[1], said[1] # the first alone prints
        return list(zip(*(torch.load(folder / f"rank{rank}.pt") for rank in range(2))))
    try:
        yield wait
    finally:
        for child in children:
            child.kill()
            child.wait()


def child(folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    traces = []
    with open(os.path.join(folder, "cases.json")) as f:
        for port, *case in json.load(f):
            os.environ["MASTER_PORT"] = str(port)
            traces.append(trace(*case))
    torch.save(traces, os.path.join(folder, f"rank{os.environ['RANK']}.pt"))


def near(a, b, least=1e-8):
    assert (a - b).norm() <= 1e-5 * a.norm() + least, ((a - b).norm() / a.norm()).item()


def vector(tensors):
    """All in one: Adam makes whole steps of the rounding noise that is the gradient of a key's bias."""
    return torch.cat([x.flatten().float() for x in tensors])


def compare(single, pair, folders):
    """A run of one process with the same of two: gradients, log, weights; and the two with each other."""
    for a, b in zip(single["gradients"], pair[0]["gradients"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            near(a, b)
    same_log(*folders)
    near(vector(single["weights"]), vector(pair[0]["weights"]))
    for key in ("weights", "average"):
        assert len(pair[0][key]) == len(single[key])
        assert all(torch.equal(a, b) for a, b in zip(pair[0][key], pair[1][key], strict=True))


def same_log(*folders):
    logs = [[{k: v for k, v in r.items() if k not in ("ms", "wait_ms", "memory_gb", "minutes_left") and
              not k.endswith("_per_s")} for r in records(folder)] for folder in folders]
    assert len(logs[0]) == len(logs[1]) > 2
    for a, b in zip(*logs):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7)


@pytest.fixture
def knobs_of(tiny_data, text_data, teacher, tmp_path): # noqa: F811
    """knobs_of(loop, out, **knobs) -> all knobs of a short run into tmp_path/out."""
    def knobs_of(loop, out, **knobs):
        if loop == "text":
            knobs |= dict(teacher=f"{text_data}/teacher.pt", data_dir=text_data)
        else:
            knobs |= dict(teacher=knobs["teacher"].replace("TEACHER", teacher), data_dir=tiny_data)
        return {**knobs, **SHORT, "out_dir": f"{tmp_path}/{out}"}
    return knobs_of


def check_pair(cases, knobs_of, tmp_path):
    """cases: name -> (loop, knobs, what of them the single process has otherwise)."""
    todo = [(loop, knobs_of(loop, f"pair_{name}", **knobs), None)
            for name, (loop, knobs, _) in cases.items()]
    with pair_of_processes(tmp_path, todo) as wait:
        single = [trace(loop, knobs_of(loop, f"one_{name}", **{**knobs, **other}))
                  for name, (loop, knobs, other) in cases.items()] # meanwhile
        pairs = wait()
    for name, one, pair in zip(cases, single, pairs, strict=True):
        compare(one, pair, [tmp_path / f"{kind}_{name}" for kind in ("one", "pair")])
    return pairs


# -----------------------------------------------------------------------------
# the same steps

WHOLE = dict(micro_batch_size=0)
RICH = dict(rotate=10, color=0.2)
QUICK = {
    "queue": ("multimodal", dict(SETTINGS["queue"][1], **RICH, mask_ratio=0.5, grad_clip=1), {}),
    "cached": ("multimodal", dict(SETTINGS["both"][1], micro_batch_size=1, batch_size=4), WHOLE),
    "views": ("image", dict(SETTINGS["views"][1], **RICH), {}),
    # its validation masks depend on the micro-batches
    "mask": ("image", dict(SETTINGS["mask"][1], micro_batch_size=4), {}),
    "text": ("text", dict(PADDED), {}),
}
CLASSIFIER = dict(MULTIMODAL, teacher="resnet50", image_init="random", kd_loss="kl", temperature=2)
MATRIX = {f"{name}{micro}": (loop, dict(knobs, micro_batch_size=micro),
                               {} if name == "mask" else WHOLE)
          for name, (loop, knobs) in SETTINGS.items() for micro in (0, 4) if name != "views" or not micro}
MATRIX |= {
    "kl": ("multimodal", dict(CLASSIFIER, align_loss="ranking", align_levels=2, shared="mlp",
                              align_weight=0.1, head=True), {}),
    "kl4": ("multimodal", dict(CLASSIFIER, align_loss="contrastive", align_levels=2, micro_batch_size=4,
                               head=True), WHOLE),
    "cached_targets": ("multimodal", dict(SETTINGS["queue"][1], cache_targets=True), {}),
    "workers": ("multimodal", dict(SETTINGS["queue"][1], num_workers=1), dict(num_workers=0)),
    "image_workers": ("image", dict(SETTINGS["features"][1], num_workers=1), dict(num_workers=0)),
    "odd": ("multimodal", dict(SETTINGS["queue"][1], batch_size=6, queue_size=9), {}),
    "text_cls": ("text", dict(PADDED, target="cls", init="alternate"), {}),
    "text_micro": ("text", dict(PADDED, batch_size=40, micro_batch_size=10, criterion="l1", agreement=40),
                   WHOLE),
}


def test_two_processes_take_the_steps_of_one(knobs_of, tmp_path):
    pairs = dict(zip(QUICK, check_pair(QUICK, knobs_of, tmp_path)))
    assert pairs["cached"][0]["widths"] != pairs["cached"][1]["widths"] # texts padded to another length


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_whatever_the_loss(knobs_of, tmp_path):
    check_pair(MATRIX, knobs_of, tmp_path)


def test_ranks_draw_their_rows_of_the_whole_batch(monkeypatch):
    generator = torch.Generator()
    whole = [torch.rand(6, generator=generator.manual_seed(1)), torch.rand(6, 3, 1, generator=generator)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        with model.WholeBatch():
            rows = [torch.rand(2, generator=generator.manual_seed(1)),
                    torch.rand(2, 3, 1, generator=generator)]
        assert all(torch.equal(x[2 * rank:2 * rank + 2], y) for x, y in zip(whole, rows))


@pytest.mark.parametrize("B, micro, said", [
    (16, 0, None), (16, 4, None), (15, 0, "--batch_size=15 is no multiple of the 2 ranks"),
    (16, 3, "--micro_batch_size=3 does not divide --batch_size=16 / 2 ranks"),
    (16, 16, "--micro_batch_size=16 does not divide --batch_size=16 / 2 ranks")])
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
        assert {m.get_args([]).num_workers for m in (distill_image, distill_multimodal)} == {expected}


# -----------------------------------------------------------------------------
# stopped, and gone on with by more or fewer


@pytest.mark.slow
def test_resume_with_another_number_of_processes(knobs_of, tmp_path):
    cases = {"queue": ("multimodal", SETTINGS["queue"][1]), "views": ("image", SETTINGS["views"][1]),
             "text": ("text", dict(TEXT, batch_size=16))}
    more = dict(max_steps=6, save_interval=3)
    for name, (loop, knobs) in cases.items():
        trace(loop, knobs_of(loop, f"whole_{name}", **knobs) | more)
        trace(loop, knobs_of(loop, f"fewer_{name}", **knobs) | more, stop=5)
    todo = [(loop, knobs_of(loop, f"pair_{name}", **knobs) | more, 5)
            for name, (loop, knobs) in cases.items()]
    todo += [(loop, knobs_of(loop, f"fewer_{name}", **knobs) | more | dict(resume=True), None)
             for name, (loop, knobs) in cases.items()]
    with pair_of_processes(tmp_path, todo) as wait:
        wait()
    for name, (loop, knobs) in cases.items():
        trace(loop, knobs_of(loop, f"pair_{name}", **knobs) | more | dict(resume=True))
        whole, *parts = [tmp_path / f"{kind}_{name}" for kind in ("whole", "pair", "fewer")]
        for part in parts:
            same_log(whole, part)
            a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, part))
            assert b["step"] == 6 and b["finished"]
            near(vector(a["model"].values()), vector(b["model"].values()))


# -----------------------------------------------------------------------------
# torchrun itself


def torchrun(script, knobs, *more):
    """-> exit code, what was printed, seconds."""
    started = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", os.path.join(REPO, script), *flags(knobs), *more],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout, time.time() - started


@pytest.mark.slow
def test_torchrun(knobs_of, tmp_path):
    knobs = knobs_of("multimodal", "pair", **SETTINGS["queue"][1])
    code, said, _ = torchrun("distill_multimodal.py", knobs)
    assert code == 0 and said.count("16 = 2 x 1 x 8 pairs") == said.count("step      3/3") == 1, said
    trace("multimodal", knobs_of("multimodal", "one", **SETTINGS["queue"][1]))
    same_log(tmp_path / "one", tmp_path / "pair")
    assert sorted(os.listdir(tmp_path / "pair")) == sorted(os.listdir(tmp_path / "one")) + [
        "retrieval.json", "retrieval.png"] # which trace leaves out


@pytest.mark.slow
@pytest.mark.parametrize("script, changes, said", [
    ("distill_image.py", ["--data=nothing"], "data set nothing"),
    ("distill_image.py", ["--bach_size=3"], "unknown flag --bach_size"),
    ("distill_image.py", ["--batch_size=15"], "--batch_size=15 is no multiple of the 2 ranks"),
    ("distill_image.py", ["--lr=1e38", "--max_steps=1000"], "not finite at step"),
    ("distill_multimodal.py", ["--teacher=none.pt"], "none.pt is neither")])
def test_a_failure_is_said_once_and_ends_all(knobs_of, script, changes, said):
    loop = script[8:-3]
    knobs = knobs_of(loop, "run", **(EMA if loop == "image" else MULTIMODAL))
    code, printed, seconds = torchrun(script, knobs, *changes)
    assert code and printed.count(said) == 1 and seconds < 40, printed
    assert printed.count("error: ") == 1, printed
    assert "not finite" in said or "File \"" + REPO not in printed, printed # no traceback before they meet


if __name__ == "__main__":
    child(sys.argv[1])
