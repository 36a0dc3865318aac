"""
Flags and wrong input: every script explains itself, and every mistake ends at once, with its name and the way
out.

    pytest tests/test_cli.py
"""
import os
import re
import shlex
import shutil
import sys

import pytest
import torch

import distill_multimodal
import distill_text
import evaluate
import model
import prepare_imagenet
import prepare_owt
import prepare_pairs
from conftest import EMA, LOOPS, MULTIMODAL, REPO, SHAPE, TEXT, end, flags, refused, script, start
from model import Encoder, VisionLanguageModel, save_checkpoint, use_compile

SCRIPTS = { # name -> get_args; evaluate.py has a set of flags for each subcommand
    **{f"distill_{name}.py": module.get_args for name, module in LOOPS.items()},
    "prepare_pairs.py": prepare_pairs.get_args, "prepare_imagenet.py": prepare_imagenet.get_args,
    "prepare_owt.py": prepare_owt.get_args,
    **{f"evaluate.py {c}": lambda argv, c=c: evaluate.get_args([c, *argv]) for c in evaluate.COMMANDS}}
PRESETS = [(module, preset) for module in LOOPS.values() for preset in module.PRESETS]
NOT_KNOBS = {"preset", "given", "command", "queries"} # the last are words, not a flag


def knobs(name):
    return {k: v for k, v in vars(SCRIPTS[name]([])).items() if k not in NOT_KNOBS}


def help_of(name, capsys, *words):
    """{knob: its help text, default included} of a script, from what --help prints."""
    with pytest.raises(SystemExit) as e:
        SCRIPTS[name]([*words, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    entries = re.findall(r"^  --(\w+)(?: [^ ]+)*?(?:\n|  )(.*(?:\n {8,}.*)*)", text, re.M)
    return {k: " ".join(v.split()) for k, v in entries}


def parse_command(line):
    """Checks one printed command: the script exists and takes these flags."""
    python, script, *words = shlex.split(line)
    assert python == "python" and os.path.exists(os.path.join(REPO, script)), line
    module = {f"{m.__name__}.py": m
              for m in (*LOOPS.values(), evaluate, prepare_pairs, prepare_imagenet, prepare_owt)}[script]
    return module.get_args(words)


def commands_in(text):
    commands = "|".join(evaluate.COMMANDS)
    return re.findall(rf"python \w+\.py(?: (?:{commands})\b)?(?: --\w+(?:=[^\s;,`)]+)?)*", text)


# -----------------------------------------------------------------------------
# flags


@pytest.mark.parametrize("module, preset", PRESETS)
def test_presets(module, preset):
    """Every preset parses, its keys are knobs, its values have the type, range and choices of a flag's; flags
    win."""
    args = module.get_args([f"--preset={preset}"])
    written = module.get_args(flags(module.PRESETS[preset])) # the same, flag by flag
    for k in knobs(f"{module.__name__}.py"):
        assert repr(getattr(args, k)) == repr(getattr(written, k)), k
    for k, v in module.PRESETS[preset].items():
        assert getattr(args, k) == v and type(v) is type(getattr(module.get_args([]), k)), k
    for words in (["--lr=0.5", f"--preset={preset}"], ["--preset", preset, "--lr", "0.5"]):
        mixed = module.get_args(words)
        assert mixed.lr == 0.5 and mixed.max_steps == args.max_steps and mixed.preset == preset \
            and "lr" in mixed.given


def test_a_misspelt_key_of_a_preset_is_an_error(monkeypatch):
    monkeypatch.setitem(distill_text.PRESETS, "wrong", {"no_such_knob": 1})
    with pytest.raises(AssertionError, match="no_such_knob"):
        distill_text.get_args([])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_knob(name, capsys):
    texts = help_of(name, capsys)
    assert set(texts) - NOT_KNOBS == set(knobs(name))
    for k, default in knobs(name).items():
        assert f"(default: {default})" in texts[k] and len(texts[k]) > len(f"(default: {default})") + 10, k


def test_help_of_a_preset_shows_its_defaults(capsys):
    texts = help_of("distill_multimodal.py", capsys, "--preset=tiny")
    for k, v in distill_multimodal.PRESETS["tiny"].items():
        assert f"(default: {v})" in texts[k], k


@pytest.mark.parametrize("name", SCRIPTS)
def test_home_is_home_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    paths = {k for k in knobs(name) if re.search("dir$|path$|^(source|images|ckpt|json|picture|to|teacher)$|"
                                                 "_init$|_encoder$", k)}
    for k in paths - {"shared_init"}:
        assert getattr(SCRIPTS[name]([f"--{k}=~/x"]), k) == "/somewhere/x", k
    for which, expected in (("beitv2:~/x.pt", "beitv2"), ("~/x.pt", None)):
        assert model.split_name(which) == (expected, "/somewhere/x.pt")


MALFORMED = [("--bach_size=3", "--batch_size"), ("--batch=3", "--batch_size"), ("--lr", "expected one"),
             ("-x", "-x"), ("data", "'data'"), ("--batch_size=", "''"), ("--batch_size=2.5", "'2.5'"),
             ("--batch_size=0", "'0'"), ("--lr=nan", "'nan'"), ("--flip=1.5", "'1.5'"),
             ("--resume=maybe", "'maybe'"), ("--compile=maybe", "'maybe'"), ("--dtype=half", "float16"),
             ("--preset=tinny", "mean tiny"), ("--preset", "preset")]


@pytest.mark.parametrize("name, word, said", [*((name, "--zzz=3", "--zzz") for name in SCRIPTS),
                                              *(("distill_multimodal.py", *row) for row in MALFORMED)])
def test_malformed_flags(name, word, said, capsys):
    """The nearest right one is named, in two lines, with exit code 2."""
    with pytest.raises(SystemExit) as e:
        SCRIPTS[name]([word])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and "error:" in err and len(err.splitlines()) == 2, err


def test_booleans():
    get_args = distill_multimodal.get_args
    assert [get_args(w).resume for w in ([], ["--resume"], ["--resume=True"], ["--resume=false"])] \
        == [False, True, True, False]
    assert get_args(["--preset=tiny", "--head=False"]).head is False
    assert [get_args(w).compile for w in ([], ["--compile"], ["--compile=True"], ["--compile=false"])] \
        == ["auto", "true", "true", "false"]


# -----------------------------------------------------------------------------
# wrong input: exit code not 0, a message, nothing written, no picture decoded


@pytest.fixture(scope="module")
def wrong_things(tiny_data, text_data, tmp_path_factory):
    """A folder with things that are wrong, and data/ with what is right."""
    folder = tmp_path_factory.mktemp("wrong")
    save_checkpoint(folder / "teacher.pt", Encoder("image", depth=2, **SHAPE))
    with open(f"{tiny_data}/toy/tokenizer.json") as f:
        save_checkpoint(folder / "student.pt", VisionLanguageModel(
            dict(SHAPE, depth=1), dict(embed_dim=32, num_heads=2, depth=1, vocab_size=200)),
            tokenizer=f.read())
    torch.save({"some": "thing"}, folder / "foreign.pt")
    (folder / "text.txt").write_text("hello")
    (folder / "data").mkdir()
    (folder / "data" / "toy").symlink_to(f"{tiny_data}/toy")
    (folder / "data" / "toy_text").symlink_to(f"{text_data}/toy_text")
    shutil.copy(f"{text_data}/teacher.pt", folder / "text.pt")
    for name, missing in (("half", "meta.json"), ("no_tokenizer", "tokenizer.json"),
                          ("no_labels", "train_labels.npy"), ("no_index", "train_captions.idx")):
        shutil.copytree(f"{tiny_data}/toy", folder / name / "toy")
        os.remove(folder / name / "toy" / missing)
    return folder


@pytest.fixture
def wrong(wrong_things, monkeypatch):
    monkeypatch.chdir(wrong_things)
    yield
    shutil.rmtree("new", ignore_errors=True)


PICTURES = [ # flags, what the message names
    ("--data=nothing", "nothing"), ("--data_dir=half", "half"), ("--data_dir=no_index", "captions.idx"),
    ("--data_dir=no_labels --unit=label", "--unit=image"), ("--teacher=text.txt", "text.txt"),
    ("--teacher=none.pt", "none.pt"), ("--teacher=foreign.pt", "foreign.pt"),
    ("--teacher=beitv2:none.pt", "none.pt"), ("--teacher=bert:text.txt", "no image encoder"),
    ("--teacher=student.pt", "no image encoder"), ("--teacher=teacher.pt --depth=3", "depth"),
    ("--batch_size=1000", "--batch_size=1000"), ("--micro_batch_size=5", "--micro_batch_size=5"),
    ("--device=gpu", "--device=gpu"), ("--resume", "new/ckpt.pt"), ("--out_dir=text.txt", "cannot write")]
IMAGE = [("--teacher=teacher.pt --depth=1 --mlp_ratio=3", "--init=random"), ("--knn=nothing", "nothing"),
         ("--patch_size=7", "--img_size=32"), ("--num_heads=3", "--embed_dim=32"),
         ("--mask_ratio=0.01", "--mask_ratio"), ("--target_layers=3", "--depth=2")]
PAIRS = [("--patch_size=7", "--img_size=32"), ("--num_heads=3", "--embed_dim=32"),
         ("--patch_size=16", "--patch_size=16"), ("--embed_dim=64 --image_init=random", "--head"),
         ("--img_size=48 --image_init=random", "32"), ("--kd_loss=none", "nothing to learn"),
         ("--shared=projection --align_loss=contrastive --align_levels=2", "--align_levels=2"),
         ("--standardize", "--cache_targets"),
         ("--teacher=resnet50 --image_init=random --kd_loss=kl --cache_targets --standardize", "logits"),
         ("--teacher=efficientnet_lite0 --image_init=teacher", "no blocks to start from"),
         ("--shared_init=text", "--text_init"), ("--kd_loss=kl", "resnet50"), ("--teacher=resnet50", "kl"),
         ("--data_dir=no_tokenizer", "tokenizer.json"), ("--text_init=brt", "mean bert"),
         ("--image_init=none.pt", "--image_init=none.pt"), ("--text_init=bert:none.pt", "none.pt"),
         ("--text_init=teacher.pt", "no text encoder"), ("--teacher=new/ckpt.pt", "another --out_dir")]
WORDS = [("--data_dir=nowhere", "prepare_owt.py --tokenizer=bert"),
         ("--data_dir=nowhere --teacher=data2vec2_text", "--tokenizer=gpt2"),
         ("--teacher=minilm", "WordPiece of 82"), ("--teacher=none.pt", "none.pt"),
         ("--teacher=teacher.pt", "no text encoder"), ("--depth=5", "--depth=5"),
         ("--max_length=33", "--max_length=33"), ("--batch_size=216", "--batch_size=216"),
         ("--micro_batch_size=5", "--micro_batch_size=5"), ("--attn_bias=alibi", "--init=random"),
         ("--agreement=5 --max_length=8", "sentences"), ("--resume", "new/ckpt.pt")]
RETRIEVAL = [("--ckpt=none.pt", "none.pt"), ("--ckpt=foreign.pt", "foreign.pt"),
             ("--ckpt=teacher.pt", "both"), ("--image_encoder=teacher.pt", "together"),
             ("--image_encoder=teacher.pt --text_encoder=bert", "--ckpt"),
             ("--split=dev", "train, val, test"), ("--data_dir=half", "half"), ("--data=coco", "coco")]
BASES = {"image": dict(EMA, data_dir="data", out_dir="new"),
         "text": dict(TEXT, data_dir="data", out_dir="new", teacher="text.pt"),
         "multimodal": dict(MULTIMODAL, data_dir="data", out_dir="new", teacher="teacher.pt"),
         "retrieval": dict(data="toy", data_dir="data", ckpt="student.pt", device="cpu", json="new.json")}
WRONG = [(which, *row) for which, rows in (("image", PICTURES + IMAGE), ("text", WORDS),
                                           ("multimodal", PICTURES + PAIRS), ("retrieval", RETRIEVAL))
         for row in rows]


@pytest.mark.parametrize("which, words, said", WRONG)
def test_wrong_input(wrong, which, words, said, monkeypatch):
    def decode(data, reduce=1):
        raise AssertionError("a picture was decoded before the input was refused")
    monkeypatch.setattr(prepare_imagenet, "decode", decode)
    before, words = {*os.listdir()}, [*flags(BASES[which]), *words.split()]
    if which == "retrieval":
        error = refused(evaluate.main, ["retrieval", *words])
    else:
        error = refused(LOOPS[which].main, LOOPS[which].get_args(words))
    assert said in error, error
    for line in commands_in(error):
        parse_command(line)
    assert {*os.listdir()} - before <= {"new"} # the folder with its lock
    assert not os.path.exists("new") or os.listdir("new") == ["lock"]


def test_compile_is_on_where_it_works(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for platform, works in (("linux", True), ("win32", False)):
        monkeypatch.setattr(sys, "platform", platform)
        assert use_compile("true", cpu) and not use_compile("auto", cpu)
        assert use_compile("auto", cuda) == works and not use_compile("false", cuda)


def test_the_command_users_type_first(tmp_path, monkeypatch):
    """Without data it ends before anything is read or made, with the way out."""
    monkeypatch.chdir(tmp_path)
    process = start(script, "distill_multimodal.py", "--batch_size=256", said=tmp_path / "said")
    assert end(process) == 1
    commands = [line for line in commands_in((tmp_path / "said").read_text()) if "--" in line]
    parsed = {line.split()[1]: parse_command(line) for line in commands}
    assert parsed["prepare_pairs.py"].data == "coco" and parsed["distill_multimodal.py"].preset == "tiny"
    assert os.listdir(tmp_path) == ["said"]


@pytest.mark.parametrize("loop, data", [("multimodal", "openmoji"), ("text", "pydoc")])
def test_tiny_prepares_its_data(loop, data, tmp_path, monkeypatch):
    """From nothing, --preset=tiny starts the prepare script, with flags that it takes."""
    started = []

    def run_script(*command):
        started.append(parse_command(shlex.join(["python", *command])))
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "run_script", run_script)
    words = ["--preset=tiny", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/run"]
    with pytest.raises(KeyboardInterrupt):
        LOOPS[loop].main(LOOPS[loop].get_args(words))
    assert (started[0].data, started[0].data_dir) == (data, str(tmp_path))
