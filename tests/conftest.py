"""
What several test files share: the repository on sys.path, one torch thread, processes that start in no time,
and three prepared data sets.

    tiny_data   DATA_DIR that holds "toy": 48 / 12 / 12 pictures of coloured shapes, 32 px, in the packed
                format
    text_data   DATA_DIR that holds "toy_text", 3,005 / 600 ids, and "teacher.pt", toy blocks that read them
    openmoji    DATA_DIR that holds "openmoji", made by the real prepare_pairs.py once per session (10 s)
"""
import importlib.util
import io
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
sys.path.insert(0, REPO)
import prepare_pairs
from model import Encoder, Tokenizer, save_atomic, save_checkpoint, write_json
from prepare_imagenet import RecordWriter
from prepare_owt import vocabulary

torch.set_num_threads(1)


def slow(*values):
    """Parameters of a test that run with -m slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


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
    process = context.Process(target=begin, args=(function, args, str(said), ignored, environment))
    process.start()
    os.environ["PYTHONPATH"] = before or ""
    return process


def begin(function, args, said, ignored, environment):
    os.setsid()
    # else a loader's workers come from a server of their own, which a killed loop leaves behind, and them
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


def end(process, timeout=60):
    """Its exit code, minus the signal that ended it; fails if it does not end."""
    process.join(timeout)
    ended = not process.is_alive()
    process.kill()
    process.join()
    assert ended, "still running"
    return process.exitcode


# -----------------------------------------------------------------------------
# data


COLOURS = ["red", "green", "blue", "orange", "purple", "black"]
SHAPES = ["square", "circle", "triangle", "cross"]


def shape_png(colour, shape, rng):
    """A coloured shape somewhere on white, 32 x 32, as PNG bytes."""
    image = Image.new("RGB", (32, 32), "white")
    draw, side = ImageDraw.Draw(image), int(rng.integers(12, 20))
    x, y = (int(v) for v in rng.integers(2, 30 - side, 2))
    if shape == "square":
        draw.rectangle([x, y, x + side, y + side], fill=colour)
    elif shape == "circle":
        draw.ellipse([x, y, x + side, y + side], fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=colour)
    else:
        draw.line([x, y, x + side, y + side], fill=colour, width=4)
        draw.line([x, y + side, x + side, y], fill=colour, width=4)
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def write_toy(data_dir):
    """data_dir/toy: 24 kinds (labels) of coloured shapes, two training pictures of each, the second with two
    captions; 12 kinds in val, the other 12 in test, in new positions and with one caption."""
    folder, rng = os.path.join(data_dir, "toy"), np.random.default_rng(0)
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    members = {"train": [*range(24), *range(24)], "val": range(0, 24, 2), "test": range(1, 24, 2)}
    meta, train_captions = {"data": "toy", "credit": "drawn by tests/conftest.py", "splits": {}}, []
    for split, labels in members.items():
        images, captions = (RecordWriter(os.path.join(folder, f"{split}_{what}"))
                            for what in ("images", "captions"))
        text_to_image = []
        for n, label in enumerate(labels):
            name = " ".join(kinds[label])
            i = images.write(shape_png(*kinds[label], rng))
            for caption in [name, f"a {name}"][:1 + n // 24]:
                captions.write(caption.encode())
                text_to_image.append(i)
                train_captions += [caption] * (split == "train")
        images.close()
        captions.close()
        for what, values in (("text_to_image", text_to_image), ("labels", list(labels))):
            save_atomic(os.path.join(folder, f"{split}_{what}.npy"),
                        lambda f: np.save(f, np.asarray(values, np.int64)))
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


def write_toy_text(data_dir):
    """data_dir/toy_text: lines such as "a red circle and a blue cross ." in documents of one to five, ids as
    prepare_owt.py leaves them; data_dir/teacher.pt: four random blocks, 32 wide, and their tokeniser."""
    rng, folder = np.random.default_rng(0), os.path.join(data_dir, "toy_text")
    names = [f"a {c} {s}" for c in COLOURS for s in SHAPES]
    lines = [" and ".join(rng.choice(names, rng.integers(2, 5))) + " ." for _ in range(600)]
    tokenizer = Tokenizer(prepare_pairs.train_wordpiece(lines, 200))
    name, sha256, end_id = vocabulary(tokenizer)
    stream = []
    for line in lines:
        stream += tokenizer.ids([line], 100)[0][1:-1] + [end_id] * (rng.random() < 0.3)
    splits = {"train": stream[:3005], "val": stream[3005:3605]}
    for split, ids in splits.items():
        save_atomic(os.path.join(folder, f"{split}.bin"), lambda f: f.write(np.array(ids, "<u2").tobytes()))
    write_json(os.path.join(folder, "meta.json"), {
        "splits": {split: {"tokens": len(ids)} for split, ids in splits.items()}, "end_id": end_id,
        "vocabulary": name, "vocab_sha256": sha256})
    torch.manual_seed(0)
    teacher = Encoder("text", 32, 4, 2, norm_first=False, positions="learned", embed_norm=True, token_types=2,
                      vocab_size=tokenizer.vocab_size, max_length=32, pooler=True)
    save_checkpoint(os.path.join(data_dir, "teacher.pt"), teacher, tokenizer=tokenizer.text)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("text_data"))
    write_toy_text(data_dir)
    return data_dir


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("openmoji"))
    prepare_pairs.main(prepare_pairs.get_args([f"--data_dir={data_dir}"]))
    return data_dir
