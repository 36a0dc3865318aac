"""
Flags and wrong input: scripts explain themselves, a mistake ends at once, with its name and the way out.
"""
import os
import re
import shlex
import shutil

import pytest
import torch

import evaluate
import model
import prepare_imagenet
import prepare_owt
import prepare_pairs
from conftest import EMA, LOOPS, MULTIMODAL, REPO, SHAPE, TEXT, flags, refused
from model import Encoder, save_checkpoint

MODULES = {f"{m.__name__}.py": m for m in (*LOOPS.values(), prepare_pairs, prepare_imagenet, prepare_owt)}
SCRIPTS = { # name -> get_args; evaluate.py has a set of flags for each subcommand
    **{name: module.get_args for name, module in MODULES.items()},
    **{f"evaluate.py {c}": lambda argv, c=c: evaluate.get_args([c, *argv]) for c in evaluate.COMMANDS}}
NOT_KNOBS = {"preset", "given", "command", "queries"} # the last are words, not a flag


def knobs(name, *words):
    return {k: v for k, v in vars(SCRIPTS[name](list(words))).items() if k not in NOT_KNOBS}


def parse_command(line):
    """Checks one printed command: the script exists and takes these flags."""
    python, name, *words = shlex.split(line)
    assert python == "python" and os.path.exists(os.path.join(REPO, name)), line
    return (MODULES | {"evaluate.py": evaluate})[name].get_args(words)


def commands_in(text):
    commands = "|".join(evaluate.COMMANDS)
    return re.findall(rf"python \w+\.py(?: (?:{commands})\b)?(?: --\w+(?:=[^\s;,`)]+)?)*", text)


@pytest.mark.parametrize("module, preset", [(m, preset) for m in LOOPS.values() for preset in m.PRESETS])
def test_presets(module, preset):
    """Its keys are knobs, its values have the type, range and choices of a flag's; flags win."""
    args = module.get_args([f"--preset={preset}"])
    written = module.get_args(flags(module.PRESETS[preset])) # the same, flag by flag
    for k in knobs(f"{module.__name__}.py"):
        assert repr(getattr(args, k)) == repr(getattr(written, k)), k
    for words in (["--lr=0.5", f"--preset={preset}"], ["--preset", preset, "--lr", "0.5"]):
        mixed = module.get_args(words)
        assert mixed.lr == 0.5 and mixed.max_steps == args.max_steps and "lr" in mixed.given


@pytest.mark.parametrize("which", LOOPS)
def test_the_tiny_preset_makes_its_data(which, tmp_path, monkeypatch):
    def make_data(folder, *command):
        raise KeyboardInterrupt(folder)
    monkeypatch.setattr(LOOPS[which], "make_data", make_data)
    args = LOOPS[which].get_args(["--preset=tiny", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"])
    with pytest.raises(KeyboardInterrupt, match=f"{tmp_path}/{args.data}"):
        LOOPS[which].main(args)


@pytest.mark.parametrize("words", [*([name] for name in SCRIPTS), ["distill_multimodal.py", "--preset=tiny"]])
def test_help_says_what_every_knob_means_and_its_default(words, capsys):
    with pytest.raises(SystemExit) as e:
        SCRIPTS[words[0]]([*words[1:], "--help"])
    assert e.value.code == 0
    entries = re.findall(r"^  --(\w+)(?: [^ ]+)*?(?:\n|  )(.*(?:\n {8,}.*)*)", capsys.readouterr().out, re.M)
    texts = {k: " ".join(v.split()) for k, v in entries}
    assert set(texts) - NOT_KNOBS == set(knobs(*words))
    for k, default in knobs(*words).items():
        assert f"(default: {default})" in texts[k] and len(texts[k]) > len(f"(default: {default})") + 10, k


@pytest.mark.parametrize("name", SCRIPTS)
def test_home_is_home_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    paths = {k for k in knobs(name) if re.search("dir$|path$|^(source|images|ckpt|json|picture|to|teacher)$|"
                                                 "_init$|_encoder$", k)}
    for k in paths - {"shared_init"}:
        assert getattr(SCRIPTS[name]([f"--{k}=~/x"]), k) == "/somewhere/x", k
    assert model.split_name("beitv2:~/x.pt") == ("beitv2", "/somewhere/x.pt")


@pytest.mark.parametrize("name, word, said", [*((name, "--zzz=3", "--zzz") for name in SCRIPTS), *(
    ("distill_multimodal.py", *row) for row in [
        ("--bach_size=3", "--batch_size"), ("--batch=3", "--batch_size"), ("--lr", "expected one"),
        ("data", "'data'"), ("--batch_size=", "''"), ("--batch_size=2.5", "'2.5'"), ("--batch_size=0", "'0'"),
        ("--lr=nan", "'nan'"), ("--flip=1.5", "'1.5'"), ("--resume=maybe", "'maybe'"),
        ("--compile=maybe", "'maybe'"), ("--dtype=half", "float16"), ("--preset=tinny", "mean tiny")])])
def test_malformed_flags(name, word, said, capsys):
    """The nearest right one is named, with exit code 2."""
    with pytest.raises(SystemExit) as e:
        SCRIPTS[name]([word])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and len(err.splitlines()) == 2, err


@pytest.fixture(scope="module")
def wrong_things(tiny_data, text_data, tmp_path_factory):
    """A folder with things that are wrong, and data/ with what is right."""
    folder = tmp_path_factory.mktemp("wrong")
    save_checkpoint(folder / "teacher.pt", Encoder("image", depth=2, **SHAPE))
    torch.save({"some": "thing"}, folder / "foreign.pt")
    (folder / "text.txt").write_text("hello")
    (folder / "data").mkdir()
    (folder / "data" / "toy").symlink_to(f"{tiny_data}/toy")
    (folder / "data" / "toy_text").symlink_to(f"{text_data}/toy_text")
    shutil.copy(f"{text_data}/teacher.pt", folder / "text.pt")
    for name, missing in (("half", "meta.json"), ("no_tokenizer", "tokenizer.json"),
                          ("no_labels", "train_labels.npy")):
        shutil.copytree(f"{tiny_data}/toy", folder / name / "toy")
        os.remove(folder / name / "toy" / missing)
    return folder


BASES = {"image": dict(EMA, data_dir="data", out_dir="new"),
         "text": dict(TEXT, data_dir="data", out_dir="new", teacher="text.pt"),
         "multimodal": dict(MULTIMODAL, data_dir="data", out_dir="new", teacher="teacher.pt")}
PICTURES = [ # flags, what the message names: one row for a class of mistakes
    ("--data=coco", "prepare_pairs.py --data=coco"), ("--data_dir=half", "half"),
    ("--data=sbu", "--data=sbu --data_dir=data --source=DIR"),
    ("--data_dir=no_labels --unit=label", "--unit=image"), ("--teacher=text.txt", "text.txt"),
    ("--teacher=foreign.pt", "foreign.pt"), ("--teacher=bert:text.txt", "no image encoder"),
    ("--teacher=text.pt", "no image encoder"), ("--teacher=teacher.pt --depth=3", "depth"),
    ("--batch_size=1000", "--batch_size=1000"), ("--micro_batch_size=5", "--micro_batch_size=5"),
    ("--device=gpu", "--device=gpu"), ("--resume", "new/ckpt.pt"), ("--out_dir=text.txt", "cannot write"),
    ("--patch_size=7", "--img_size=32"), ("--num_heads=3", "--embed_dim=32")]
WRONG = {
    "image": PICTURES + [
        ("--teacher=teacher.pt --depth=1 --mlp_ratio=3", "--init=random"), ("--knn=nothing", "nothing"),
        ("--mask_ratio=0.01", "--mask_ratio"), ("--target_layers=3", "--depth=2")],
    "multimodal": PICTURES + [
        ("--embed_dim=64 --image_init=random", "--head"), ("--kd_loss=none", "nothing to learn"),
        ("--shared=projection --align_loss=contrastive --align_levels=2", "--align_levels=2"),
        ("--standardize", "--cache_targets"), ("--teacher=resnet50", "kl"),
        ("--shared_init=text", "--text_init"), ("--data_dir=no_tokenizer", "tokenizer.json"),
        ("--text_init=brt", "mean bert"), ("--text_init=teacher.pt", "no text encoder")],
    "text": [
        ("--data_dir=nowhere --teacher=data2vec2_text", "prepare_owt.py --tokenizer=gpt2"),
        ("--teacher=minilm", "WordPiece of 82"), ("--teacher=none.pt", "none.pt"),
        ("--teacher=teacher.pt", "no text encoder"), ("--depth=5", "--depth=5"),
        ("--max_length=33", "--max_length=33"), ("--batch_size=216", "--batch_size=216"),
        ("--attn_bias=alibi", "--init=random"), ("--agreement=5 --max_length=8", "sentences")]}


@pytest.mark.parametrize("which, words, said", [(which, *row) for which in WRONG for row in WRONG[which]])
def test_wrong_input(which, words, said, wrong_things, monkeypatch):
    def decode(data, reduce=1):
        raise AssertionError("a picture was decoded before the input was refused")
    monkeypatch.setattr(prepare_imagenet, "decode", decode)
    monkeypatch.chdir(wrong_things)
    before, words = {*os.listdir()}, [*flags(BASES[which]), *words.split()]
    error = refused(LOOPS[which].main, LOOPS[which].get_args(words))
    assert said in error, error
    for line in commands_in(error):
        parse_command(line)
    assert {*os.listdir()} - before <= {"new"} # the folder with its lock
    assert not os.path.exists("new") or os.listdir("new") == ["lock"]
    shutil.rmtree("new", ignore_errors=True)
