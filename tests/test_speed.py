"""
What makes a step fast, as far as a machine without a GPU can tell: torch.compile finds one graph, in which
the host never has to know a number. Last, what only a GPU can tell, and the benchmark that runs it.

    pytest tests/test_speed.py -m gpu       # on a card
"""
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import bench
import distill_multimodal
from conftest import EACH, REPO, assert_close, assert_same_state, loop_of, losses, randn
from model import Encoder, VisionLanguageModel
from prepare_imagenet import augment, visible_patches
from test_model import IMAGE, TEXT

TEXT = {**TEXT, "depth": 2}


def ids_of(B, T):
    """ids (B, T) and their padding_mask, lengths from 2 on."""
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
    return torch.randint(1, 50, (B, T), generator=generator), torch.arange(T) >= lengths


IMAGES = [(randn(4, 3, 32, 32, seed=i),) for i in range(3)]
# captions are padded to the longest of their batch: the second length makes a graph for all lengths, so there
# is nothing to gain from padding further
PAIRS = [(randn(4, 3, 32, 32), *ids_of(4, T)) for T in (9, 12, 5, 7, 3)]
CALLS = { # class, settings, batches, other arguments, graphs at most (torch 2.6 makes one more of lengths)
    "image": (Encoder, dict(modality="image", **IMAGE), IMAGES, dict(target_layers=2), 1),
    "patches left out": (Encoder, dict(modality="image", **IMAGE, positions="rope", registers=2), IMAGES,
                         dict(kept=torch.arange(7).expand(4, -1)), 1),
    "text": (Encoder, dict(modality="text", **TEXT, attn_bias="alibi"), [ids_of(4, 9)] * 3,
             dict(target_layers=2), 1),
    "student": (VisionLanguageModel, dict(image=IMAGE, text=TEXT, token_types=True, align_levels=2), PAIRS,
                {}, 3)}


@pytest.mark.parametrize("name", CALLS)
def test_graphs(name):
    """Backward included. Where a graph would break, or the host wait for a number, torch.compile raises."""
    kind, settings, batches, more, number = CALLS[name]
    net, counter = kind(**settings), CompileCounter()
    torch._dynamo.reset()
    expected = [net(*batch, **more) for batch in batches]
    net.compile(fullgraph=True, backend=counter)
    for batch, right in zip(batches, expected):
        outs, rights = ((x,) if torch.is_tensor(x) else x for x in (net(*batch, **more), right))
        for a, b in zip(outs, rights, strict=True):
            assert_close(a, b, 1e-5)
        sum(x.sum() for x in outs).backward()
    torch._dynamo.reset()
    assert 0 < counter.frame_count <= number


@pytest.mark.filterwarnings("ignore:Dynamo detected a call") # to a cached function, which it enters
@pytest.mark.parametrize("words", [["--preset=smke"], ["--kd_loss=mse", "--align_loss=ranking"]])
def test_augmentation_and_loss_are_a_graph(words):
    args = distill_multimodal.get_args(words)
    student, queue = SimpleNamespace(log_scale=torch.tensor(1.5)), (randn(6, 48), torch.arange(6))

    @functools.partial(torch.compile, fullgraph=True, backend="eager")
    def loss_of(outputs, target, group, raw, noise):
        images, visible = augment(raw, noise[:, :7], 0.5, 9.0, 0.1), visible_patches(noise[:, 7:], 0.5)
        loss, _ = distill_multimodal.loss_terms(outputs, target, group, queue, student, args)
        return loss + images.sum() + visible.sum()
    outputs, raw = [randn(4, 48, seed=i) for i in range(4)], torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert loss_of(outputs, randn(4, 48), torch.arange(4), raw, torch.rand(4, 7 + 16)).isfinite()


# -----------------------------------------------------------------------------
# on a GPU

ON_GPU = dict(device="cuda", compile=False, num_workers=0)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") # read once; without it cuBLAS promises nothing


def on_gpu(test):
    """pytest -m gpu runs these alone, and skips them where they cannot run."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@on_gpu
@pytest.mark.parametrize("name, compiled", [*((name, False) for name in EACH), ("features", False),
                                            ("queue", True)])
def test_losses_are_those_of_the_cpu(run, tmp_path, monkeypatch, name, compiled):
    """In float32. Compiled, no graph breaks, and after four steps none is made any more."""
    module, graphs = loop_of(name), []
    get_lr, counters = module.get_lr, torch._dynamo.utils.counters

    def counted(step, args):
        graphs.append(counters["stats"]["unique_graphs"])
        return get_lr(step, args)
    knobs = dict(max_steps=8, eval_interval=8)
    run(name, "cpu", **knobs)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(module, "get_lr", counted)
    run(name, "gpu", **knobs, **{**ON_GPU, "compile": compiled})
    here, there = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert there[0] == pytest.approx(here[0], rel=1e-4) and there == pytest.approx(here, rel=1e-2)
    assert not counters["graph_break"] and graphs[4] == graphs[7] and (graphs[7] > 0) == compiled


@on_gpu
@pytest.mark.parametrize("name", EACH)
def test_float16_learns_as_float32_does(run, tmp_path, name):
    for dtype in ("float32", "float16"):
        checkpoint = run(name, dtype, **ON_GPU, dtype=dtype, eval_interval=30)
    assert checkpoint["scaler"]["_growth_tracker"] > 0 # steps in a row that did not overflow
    full, half = (sum(losses(tmp_path / dtype)[-8:]) / 8 for dtype in ("float32", "float16"))
    assert half == pytest.approx(full, rel=0.1)


@on_gpu
@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in EACH] + [("queue", "float16")])
def test_no_step_waits_for_the_gpu(run, monkeypatch, name, dtype):
    """Of these two whole steps torch would raise an error."""
    module = loop_of(name)
    get_lr = module.get_lr

    def watched(step, args):
        torch.cuda.set_sync_debug_mode("error" if step in (4, 5) else "default")
        return get_lr(step, args)
    monkeypatch.setattr(module, "get_lr", watched)
    try:
        run(name, **ON_GPU, dtype=dtype, max_steps=8, log_interval=8, eval_interval=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("name", EACH)
def test_going_on_is_exact_on_a_gpu(run, run_until, name):
    """With torch's deterministic algorithms, which is where it promises that."""
    knobs = dict(ON_GPU, max_steps=8, save_interval=3, eval_interval=4)
    torch.use_deterministic_algorithms(True)
    try:
        whole = run(name, "whole", **knobs)
        run_until(5, name, "parts", **knobs)
        assert_same_state(whole, run(name, "parts", **knobs))
    finally:
        torch.use_deterministic_algorithms(False)


def read_table(path):
    """The records of bench.py by part and row."""
    with open(path) as f:
        return {(r["part"], r["row"]): r for r in map(json.loads, f)}


def test_a_part_that_hangs_or_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def hang(args):
        bench.record(args, "before", seconds=1.5)
        subprocess.run(["sleep", "1000"])

    def crash(args):
        raise ValueError("this part is broken")
    works = {"machine": hang, "tests": crash, "tiny": lambda args: bench.record(args, "works", seconds=2.25)}
    monkeypatch.setattr(bench, "COMMANDS", bench.COMMANDS | works)
    args = bench.get_args(["gpu", f"--out={tmp_path}/out.jsonl", "--device=cpu"])
    assert bench.run_parts([(part, 1, [part]) for part in works], args, minutes=0.1) == ["machine", "tests"]
    found = read_table(tmp_path / "out.jsonl")
    assert {*found} == {("machine", "before"), ("failed", "machine: machine"), ("failed", "tests: tests"),
                        ("tiny", "works")}
    assert "this part is broken" in found["failed", "tests: tests"]["reason"]
    with open(tmp_path / "out.jsonl", "a") as f:
        f.write('{"part": "tiny", "row": "cut sh')
    capsys.readouterr()
    bench.main(["table", str(tmp_path / "out.jsonl")])
    assert "2.25" in capsys.readouterr().out


def test_parts_whose_packages_or_data_are_missing_are_left_out(tmp_path, monkeypatch):
    """Data that are there need no package that makes them."""
    find_spec = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec",
                        lambda name: None if name in ("pytest", "resvg_py") else find_spec(name))
    args = bench.get_args(["gpu", f"--data_dir={tmp_path}", f"--out={tmp_path}/out.jsonl"])
    assert bench.lacking(args) == {"tests": ["pytest"], "tiny": ["resvg_py"]}
    os.makedirs(tmp_path / "openmoji")
    (tmp_path / "openmoji" / "meta.json").write_text("{}")
    assert bench.lacking(args)["tiny"] == []
    started = []
    monkeypatch.setattr(bench, "run_parts", lambda parts, *rest: started.extend(parts))
    bench.gpu(args)
    assert {words[0] for _, _, words in started} == {"machine", "step", "attention", "tiny"}
    assert {*read_table(tmp_path / "out.jsonl")} == {("left out", "tests")}


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path, openmoji):
    """Every row is there, with numbers; the tests of CUDA are skipped for one reason."""
    out = tmp_path / "out.jsonl"
    flags = ["--small", "--device=cpu", f"--out={out}", f"--data_dir={openmoji}"]
    done = subprocess.run([sys.executable, os.path.join(REPO, "tests", "bench.py"), "gpu", *flags], text=True,
                          capture_output=True)
    found = read_table(out)
    assert not done.returncode and not {"failed", "left out"} & {part for part, _ in found}, done.stdout
    rows = {part: [row for p, row in found if p == part] for part, _ in found}
    expected = {"steps": 15, "memory": 4, "dearest of smke 16": 10, "machine": 3, "tiny": 1}
    assert {part: len(rows[part]) for part in expected} == expected
    assert all("attention" in found["attention", row]["kernels"] for row in rows["attention"])
    for row in rows["steps"]:
        r = found["steps", row]
        assert r["samples/s"] > 0 and r["MFU %"] > 0 and 0 < r["ms"] <= r["slowest"] and r["GB"] > 0
    whole, padded, half = (found["steps", row]["tokens"] for row in rows["steps"][-3:])
    assert whole == 32 > padded == half # captions padded to their batch; then half of the patches, too
    outcomes = {(found["tests", row]["outcome"], found["tests", row]["reason"]) for row in rows["tests"]}
    assert outcomes == {("passed", "") if torch.cuda.is_available() else ("skipped", "Skipped: no GPU")}
