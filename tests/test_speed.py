"""
What makes a step fast, as far as a machine without a GPU can tell: torch.compile finds one graph and stays
with it, and nothing in a step waits for the GPU. Last, what only a GPU can tell, and the benchmark that runs
it.

    pytest tests/test_speed.py
    pytest tests/test_speed.py -m gpu       # on a card
"""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode

import bench
from conftest import EACH, LOOPS, REPO, assert_same_state, loop_of, records
from model import Encoder, VisionLanguageModel, feature_target
from prepare_imagenet import augment, imagenet_statistics, visible_patches
from test_model import IMAGE, TEXT, assert_close, randn, shake

TEXT = {**TEXT, "depth": 2}


def ids_of(B, T):
    """ids (B, T) and their padding_mask, lengths from 2 on."""
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
    return torch.randint(1, 50, (B, T), generator=generator), torch.arange(T) >= lengths


@pytest.mark.parametrize("n, instance_norm", [(1, True), (2, False), (3, True)])
def test_target_in_passing_equals_that_of_the_list(n, instance_norm):
    """Values and gradients, with and without padding, patches left out and embeddings made elsewhere."""
    image, text = (shake(Encoder(m, **{**c, "depth": 3})) for m, c in (("image", IMAGE), ("text", TEXT)))
    images, (ids, mask) = randn(4, 3, 32, 32), ids_of(4, 9)
    kept = visible_patches(torch.rand(4, 16), 0.5)
    for encoder, x, more in ((image, images, dict(kept=kept)), (text, ids, dict(padding_mask=mask)),
                             (image, image.embed(images).detach(), dict(embedded=True))):
        layers, gradients = encoder(x, return_layers=True, **more)[-n:], []
        outs = [encoder(x, target_layers=n, instance_norm=instance_norm, **more),
                feature_target(layers, more.get("padding_mask"), instance_norm)]
        with torch.no_grad():
            outs.append(encoder(x, target_layers=n, instance_norm=instance_norm, **more))
        for out in outs[:2]:
            assert_close(out, outs[2], 1e-6)
            encoder.zero_grad()
            (out * randn(*out.shape)).sum().backward()
            gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, 1e-5 * b.abs().max().item())


IMAGES = [(randn(4, 3, 32, 32, seed=i),) for i in range(3)]
# captions are padded to the longest of their batch: the second length makes a graph for all lengths, so there
# is nothing to gain from padding further
PAIRS = [(randn(4, 3, 32, 32), *ids_of(4, T)) for T in (9, 12, 5, 7, 3)]
KEPT = torch.arange(7).expand(4, -1)
CALLS = { # class, settings, batches, other arguments, graphs
    "image": (Encoder, dict(modality="image", **IMAGE), IMAGES, dict(target_layers=2), 1),
    "patches left out": (Encoder, dict(modality="image", **IMAGE, attn_bias="relative"), IMAGES,
                         dict(kept=KEPT), 1),
    "registers": (Encoder, dict(modality="image", **IMAGE, positions="rope", registers=2), IMAGES,
                  dict(kept=KEPT), 1),
    "text": (Encoder, dict(modality="text", **TEXT, attn_bias="alibi"), [ids_of(4, 9)] * 3,
             dict(target_layers=2), 1),
    "student": (VisionLanguageModel, dict(image=IMAGE, text=TEXT, token_types=True, align_levels=2), PAIRS,
                {}, 2)}


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
    assert counter.frame_count == number


def losses(folder):
    return [r["loss"] for r in records(folder) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("name, knobs, most", [("features", {}, [2, 2]),
                                               ("queue", dict(micro_batch_size=8), [4, 1])])
def test_loops_compile_each_model_once(run, tmp_path, monkeypatch, name, knobs, most):
    """Student and teacher: one graph for training, one for validation (of pairs the teacher's targets are
    computed before); captions of any length and the pass without a graph that gradient caching makes double
    the student's. The losses are those without torch.compile."""
    counters, compile_module = [], torch.nn.Module.compile

    def counted(module):
        counters.append(CompileCounter())
        compile_module(module, fullgraph=True, backend=counters[-1])
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    for compiled in ("false", "true"):
        run(name, compiled, max_steps=9, eval_interval=4, compile=compiled, **knobs)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)
    assert [c.frame_count for c in counters] == most


class Waits(TorchDispatchMode):
    """Lists the operations for which the host waits for a GPU: copies between the two that do not say
    non_blocking, and those whose result the host must know."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        device = None # that something is copied to
        if name == "aten._to_copy.default":
            source, device, non_blocking = args[0], kwargs.get("device"), kwargs.get("non_blocking")
        elif name == "aten.copy_.default":
            source, device, non_blocking = args[1], args[0].device, args[2:] == (True,)
        if device and torch.device(device).type != source.device.type and not non_blocking:
            self.found.append(name)
        indexed = name.startswith("aten.index") and any(
            x is not None and (x.dtype == torch.bool or x.device.type == "cpu")
            for arg in args if isinstance(arg, (list, tuple)) for x in arg)
        if indexed or any(word in name for word in ("_local_scalar", "nonzero", "masked_select")):
            self.found.append(name)
        return function(*args, **kwargs)


def test_waits_are_found():
    """The instrument itself: each of these is one, and what the loops do instead is none."""
    with FakeTensorMode(), torch.device("cuda"):
        x, mask, here = torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.ones(4, device="cpu")
        for wait in (lambda: x[mask], lambda: x.cpu(), lambda: here.to("cuda"), lambda: x.sum().item(),
                     lambda: x[torch.arange(4, device="cpu")], lambda: torch.tensor([1.0, 2.0])):
            with Waits() as waits, contextlib.suppress(DataDependentOutputException,
                                                       DynamicOutputShapeException):
                wait()
            assert waits.found
        with Waits() as waits:
            here.to("cuda", non_blocking=True), x * mask[:, None], x[torch.arange(4)], x.clamp(0, 1)
        assert not waits.found


@pytest.mark.parametrize("name, words", [
    ("image", ["--target=cls"]), ("image", ["--teacher=ema"]), ("text", ["--target=cls"]),
    ("multimodal", []), ("multimodal", ["--preset=smke"]), ("multimodal", ["--preset=clip"]),
    ("multimodal", ["--kd_loss=none", "--align_loss=ranking"])])
def test_no_operation_of_the_loss_waits_for_the_gpu(name, words):
    """Augmentation, forward and loss on GPU tensors that have no data, which needs no GPU."""
    loop, autocast = LOOPS[name], contextlib.nullcontext()
    args = loop.get_args(words)
    imagenet_statistics.cache_clear() # what it holds is of another test
    with FakeTensorMode() as fake, torch.device("cuda"):
        image, text = Encoder("image", **IMAGE), Encoder("text", **TEXT)
        raw, noise = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 7 + 16)
        ids, padding_mask = torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9, dtype=torch.bool)
        imagenet_statistics(raw.device)
        if name == "multimodal":
            student = VisionLanguageModel(IMAGE, TEXT, head_dim=48 * args.head,
                                          align_levels=args.align_levels, shared_kind=args.shared)
        heads = torch.nn.ModuleDict({"predict": torch.nn.Linear(48, 48)})
        heads.register_parameter("mask_token", torch.nn.Parameter(torch.zeros(1, 1, 48)))
        group, queue = ids[:, 0], (torch.zeros(6, 48), torch.zeros(6, dtype=torch.int64))
    with fake, Waits() as waits: # no default device now
        images = augment(raw, noise[:, :7], getattr(args, "flip", 0.5), getattr(args, "rotate", 9.0), 0.1)
        visible = visible_patches(noise[:, 7:], 0.5)
        if name == "text":
            loss = loop.feature_loss(text, text, ids, padding_mask, args, autocast)
        elif name == "multimodal":
            outputs = student(images, ids, padding_mask, visible)
            loss, _ = loop.loss_terms(outputs, image(images)[:, 0], group, queue, student, args)
        else:
            loss = loop.loss_of(image, heads, image, images, noise[:, 7:], args, autocast)
    imagenet_statistics.cache_clear()
    assert not waits.found and loss.device.type == "cuda"


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


# -----------------------------------------------------------------------------
# the benchmark of a card


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
    assert bench.run_parts([(part, 1, [part]) for part in works], args, minutes=0.5) == ["machine", "tests"]
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
