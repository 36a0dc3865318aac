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
from types import SimpleNamespace

import pytest
import torch

import distill_image
import distill_multimodal
import distill_text
import evaluate
import model
import prepare_imagenet
import prepare_owt
import prepare_pairs
from conftest import REPO, end, script, start
from model import Encoder, VisionLanguageModel, save_checkpoint, use_compile

LOOPS = [distill_image, distill_multimodal, distill_text]
SCRIPTS = { # name -> get_args; evaluate.py has a set of flags for each subcommand
    "distill_image.py": distill_image.get_args, "distill_multimodal.py": distill_multimodal.get_args,
    "distill_text.py": distill_text.get_args,
    "prepare_pairs.py": prepare_pairs.get_args, "prepare_imagenet.py": prepare_imagenet.get_args,
    "prepare_owt.py": prepare_owt.get_args,
    **{f"evaluate.py {c}": lambda argv, c=c: evaluate.get_args([c, *argv]) for c in evaluate.COMMANDS}}
PRESETS = [(module, preset) for module in LOOPS for preset in module.PRESETS]
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
              for m in (*LOOPS, evaluate, prepare_pairs, prepare_imagenet, prepare_owt)}[script]
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
    # the same, flag by flag
    written = module.get_args([f"--{k}={v}" for k, v in module.PRESETS[preset].items()])
    for k in knobs(f"{module.__name__}.py"):
        assert getattr(args, k) == getattr(written, k) \
            and type(getattr(args, k)) is type(getattr(written, k)), k
    for k, v in module.PRESETS[preset].items():
        assert getattr(args, k) == v and type(v) is type(getattr(module.get_args([]), k)), k
    for words in (["--lr=0.5", f"--preset={preset}"], ["--preset", preset, "--lr", "0.5"]):
        mixed = module.get_args(words)
        assert mixed.lr == 0.5 and mixed.max_steps == args.max_steps and mixed.preset == preset \
            and "lr" in mixed.given
    # a preset's misspelt key does not pass in silence
    with pytest.raises(AssertionError, match="no_such_knob"):
        presets = module.PRESETS
        try:
            module.PRESETS = {**presets, "wrong": {"no_such_knob": 1}}
            module.get_args([])
        finally:
            module.PRESETS = presets


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


def test_equal_knobs_mean_the_same(capsys):
    """A knob of two loops has one type, and one help text, but for those of pictures here and text there."""
    other = {"data", "unit", "crop_min", "img_size", "patch_size", "embed_dim", "num_heads", "teacher",
             "depth", "rotate", "batch_size", "micro_batch_size", "mask_ratio", "temperature",
             "attn_bias", "target", "max_length", "weight_decay"}
    loops = [f"{m.__name__}.py" for m in LOOPS]
    texts = {name: help_of(name, capsys) for name in SCRIPTS}
    alike = {"seed", "device", "dtype", "compile", "lr", "max_steps", "warmup_steps", "grad_clip", "resume",
             "log_interval", "eval_interval", "save_interval", "out_dir", "data_dir", "weights_dir",
             "num_workers"}
    assert all(alike <= {*knobs(name)} for name in loops)
    for a in SCRIPTS:
        for b in SCRIPTS:
            for k in {*knobs(a)} & {*knobs(b)} if a < b else ():
                if None not in (knobs(a)[k], knobs(b)[k]):
                    assert type(knobs(a)[k]) is type(knobs(b)[k]), (a, b, k)
                if a in loops and b in loops and k not in other or k in ("weights_dir", "device", "dtype"):
                    assert re.sub(r" \(default: .*", "", texts[a][k]) == re.sub(r" \(default: .*", "",
                                                                               texts[b][k]), (a, b, k)


@pytest.mark.parametrize("name", SCRIPTS)
def test_home_is_home_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    paths = {k for k in knobs(name) if re.search("dir$|path$|^(source|images|ckpt|json|picture|to)$|teacher|"
                                                 "_init|_encoder", k)}
    for k in paths - {"shared_init"}:
        value = getattr(SCRIPTS[name]([f"--{k}=~/x"]), k)
        assert value == "/somewhere/x", k


def test_home_in_name_and_path(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    args = distill_multimodal.get_args(["--teacher=beitv2:~/x.pt"])
    assert model.split_name(args.teacher) == ("beitv2", "/somewhere/x.pt")
    assert model.split_name("~/x.pt") == (None, "/somewhere/x.pt")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("word, said", [
    ("--bach_size=3", "did you mean --batch_size"), ("--batch=3", "did you mean --batch_size"),
    ("--dat_dir=x", "--data_dir"), ("--zzz", "unknown flag --zzz"), ("-x", "-x"),
    ("data", "unexpected argument 'data'"), ("--data_dir", "expected one"), ("--device", "expected one"),
    ("--batch_size=", "''"), ("--batch_size=2.5", "'2.5'"), ("--batch_size=0", "'0'"),
    ("--batch_size=-3", "'-3'"), ("--dtype=half", "float16")])
def test_malformed_flags(name, word, said, capsys):
    """The nearest is named, in two lines, with exit code 2."""
    flags = {said.replace("did you mean ", "").lstrip("-"), word.lstrip("-").partition("=")[0]}
    if word.startswith("--") and word != "--zzz" and not flags & {*knobs(name)}:
        said = "error:" # a flag of other scripts
    if name == "evaluate.py search" and word == "data": # what is looked for
        return
    with pytest.raises(SystemExit) as e:
        SCRIPTS[name]([word])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and "error:" in err and len(err.splitlines()) == 2, err


@pytest.mark.parametrize("module", LOOPS)
@pytest.mark.parametrize("word, said", [
    ("--preset=tinny", "did you mean tiny"), ("--preset=", "preset"), ("--preset", "preset"),
    ("--resume=maybe", "'maybe'"), ("--compile=maybe", "'maybe'"), ("--lr=nan", "'nan'"),
    ("--lr=inf", "'inf'"), ("--lr=-1", "'-1'"), ("--max_steps=0", "'0'"), ("--max_steps=1e3", "'1e3'"),
    ("--patch_size=0", "'0'"), ("--depth=0", "'0'"), ("--embed_dim=0", "'0'"), ("--flip=1.5", "'1.5'"),
    ("--crop_min=2", "'2'"), ("--num_workers=-1", "'-1'"), ("--log_interval=0", "'0'"),
    ("--eval_interval=0", "'0'"), ("--save_interval=0", "'0'"), ("--micro_batch_size=-4", "'-4'")])
def test_malformed_values(module, word, said, capsys):
    if not hasattr(module.get_args([]), word[2:].partition("=")[0]): # a knob of the other loops
        said = "unknown flag"
    with pytest.raises(SystemExit) as e:
        module.get_args([word])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and word[2:].partition("=")[0] in err, err


def test_booleans():
    get_args = distill_multimodal.get_args
    assert [get_args(w).resume for w in ([], ["--resume"], ["--resume=True"], ["--resume=false"])] \
        == [False, True, True, False]
    assert get_args(["--preset=tiny", "--head=False"]).head is False
    assert [get_args(w).compile for w in ([], ["--compile"], ["--compile=True"], ["--compile=false"])] \
        == ["auto", "true", "true", "false"]


# -----------------------------------------------------------------------------
# wrong input: exit code not 0, a message, nothing written, no picture decoded


@pytest.fixture
def bad(tiny_data, tmp_path, monkeypatch):
    """A folder with things that are wrong: paths by name."""
    monkeypatch.chdir(tmp_path)
    shape = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
    save_checkpoint("teacher.pt", Encoder("image", depth=2, **shape))
    save_checkpoint("student.pt", VisionLanguageModel(
        dict(depth=1, **shape), dict(embed_dim=32, num_heads=2, depth=1, vocab_size=50)))
    save_checkpoint("wrong_shape.pt", Encoder("image", depth=1, **shape))
    broken = torch.load("wrong_shape.pt")
    broken["model"]["cls_token"] = torch.zeros(1, 1, 7)
    torch.save(broken, "wrong_shape.pt")
    torch.save({"some": "thing"}, "foreign.pt")
    with open("text.pt", "w") as f:
        f.write("hello")
    with open("teacher.pt", "rb") as f, open("cut.pt", "wb") as g:
        g.write(f.read()[:5000])
    for name, victim, content in (("half", "meta.json", None), ("garbled", "meta.json", b"[]"),
                                  ("no_tokenizer", "tokenizer.json", None),
                                  ("odd_tokenizer", "tokenizer.json", b"{}"),
                                  ("no_labels", "train_labels.npy", None),
                                  ("short", "train_images.bin", b"short"),
                                  ("no_index", "train_captions.idx", None)):
        shutil.copytree(os.path.join(tiny_data, "toy"), f"{name}/toy")
        os.remove(f"{name}/toy/{victim}")
        if content is not None:
            with open(f"{name}/toy/{victim}", "wb") as f:
                f.write(content)
    return SimpleNamespace(data_dir=tiny_data)


COMMON = ["--data=toy", "--device=cpu", "--out_dir=new", "--batch_size=16", "--max_steps=2"]
SHAPE = ["--img_size=32", "--patch_size=8", "--embed_dim=32", "--num_heads=2"]
EMA = ["--teacher=ema", "--depth=2", "--target_layers=2", *SHAPE]
STUDENT = ["--teacher=teacher.pt", "--image_init=teacher", "--text_init=random", "--depth=1",
           "--text_depth=1", *SHAPE]
BOTH_LOOPS = [ # flags, what the message says
    ("--data_dir=half", "half is|toy is"), ("--data_dir=nowhere", "toy is not"), ("--data=", "data set "),
    ("--data=nothing", "data set nothing"), ("--data_dir=garbled", "is damaged"),
    ("--data_dir=short", "is damaged"), ("--data_dir=no_index", "train_captions.idx"),
    ("--data_dir=no_labels --unit=label", "has no labels.*--unit=image"),
    ("--teacher=text.pt", "text.pt cannot be read"), ("--teacher=cut.pt", "cut.pt cannot be read"),
    ("--teacher=none.pt", "none.pt is neither .*nor a file"), ("--teacher=.", "no export|no checkpoint|is neither"),
    ("--teacher=foreign.pt", "not a checkpoint of this repository"),
    ("--teacher=student.pt", "is no image encoder"),
    ("--teacher=wrong_shape.pt", r"mis-shaped: cls_token \(1, 1, 7\)"),
    ("--teacher=teacher.pt --depth=3", "depth=3, but|3 blocks, but"),
    ("--batch_size=1000", "--batch_size=1000, but an epoch has"),
    ("--micro_batch_size=5", "--micro_batch_size=5 does not"), ("--micro_batch_size=32", "does not divide"),
    ("--device=gpu", "--device=gpu is no device"), ("--device=meta", "is no device"),
    ("--resume", "there is no new/ckpt.pt"), ("--out_dir=text.pt", "cannot write"),
    ("--teacher=beitv2:text.pt", "text.pt cannot be read"), ("--teacher=beitv2:none.pt", "none.pt")]
IMAGE = [("--teacher=teacher.pt --depth=1 --mlp_ratio=3", "add --init=random"),
         ("--teacher=teacher.pt --depth=1 --knn=nothing", "data set nothing"),
         ("--patch_size=7", "--patch_size=7 must divide --img_size=32"),
         ("--num_heads=3", "--num_heads=3 and 4 must divide"), ("--mask_ratio=0.01", "hides none"),
         ("--target_layers=3", "--depth=2")]
MULTIMODAL = [("--patch_size=7", "--patch_size=7 must divide"), ("--num_heads=3", "--num_heads=3 and 4"),
              ("--patch_size=16", "--patch_size=16, but it has 8"),
              ("--embed_dim=64", "--embed_dim=64"),
              ("--embed_dim=64 --image_init=random", "add --head"),
              ("--img_size=48 --image_init=random", "--img_size=48, but the teacher reads 32"),
              ("--kd_loss=none", "nothing to learn"),
              ("--kd_loss=none --align_loss=ranking --align_weight=0", "nothing to learn"),
              ("--shared=projection --align_loss=contrastive --align_levels=2", "--align_levels=2 needs"),
              ("--shared_init=text", "takes the last blocks of --text_init=data2vec2_text"),
              ("--kd_loss=kl", "kl is for the logits of resnet50"),
              ("--teacher=resnet50", "resnet50 for nothing else"),
              ("--data_dir=no_tokenizer", "tokenizer.json is no tokenizer"),
              ("--data_dir=odd_tokenizer", "tokenizer.json is no tokenizer"),
              ("--preset=tiny --teacher=none.pt", "none.pt is neither"),
              ("--text_init=brt", r"--text_init=brt is neither.*\(did you mean bert\?\)"),
              ("--image_init=none.pt", "--image_init=none.pt is neither"),
              ("--text_init=bert:none.pt", "--text_init=bert:none.pt is neither"),
              ("--text_init=teacher.pt", "is no text encoder"),
              ("--teacher=bert:text.pt", "is no image encoder"),
              ("--teacher=new/ckpt.pt", "this run would write")]
WRONG = ([(distill_image, EMA, *case) for case in BOTH_LOOPS + IMAGE] +
         [(distill_multimodal, STUDENT, *case) for case in BOTH_LOOPS + MULTIMODAL])


@pytest.mark.parametrize("module, base, words, said", WRONG)
def test_wrong_input(bad, module, base, words, said, monkeypatch):
    if module is distill_image and words.startswith("--teacher=") and "img_size" not in words:
        base = ["--depth=1"]

    def decode(data, reduce=1):
        raise AssertionError("a picture was decoded before the input was refused")
    monkeypatch.setattr(prepare_imagenet, "decode", decode)
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as e:
        module.main(module.get_args([*COMMON, f"--data_dir={bad.data_dir}", *base, *words.split()]))
    # printed to stderr, exit code 1
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert re.search(said, e.value.code, re.S), e.value.code
    for line in commands_in(e.value.code):
        parse_command(line)
    assert {*os.listdir()} - {*before} <= {"new"} # the folder with its lock
    assert not os.path.exists("new") or os.listdir("new") == ["lock"]


@pytest.mark.parametrize("words, said", [
    ("--ckpt=none.pt", "no checkpoint .*none.pt"), ("--ckpt=text.pt", "cannot be read"),
    ("--ckpt=cut.pt", "cannot be read"), ("--ckpt=teacher.pt", "does not embed both"),
    ("--image_encoder=teacher.pt", "go together"),
    ("--image_encoder=teacher.pt --text_encoder=bert", "are each an encoder"),
    ("--split=dev", "no split 'dev', only train, val, test"), ("--data_dir=half", "is half-written"),
    ("--data=coco", "data set coco"), ("--device=gpu", "is no device")])
def test_wrong_input_of_evaluate(bad, words, said):
    before = sorted(os.listdir())
    if "ckpt" not in words: # a student with a tokenizer
        with open(os.path.join(bad.data_dir, "toy", "tokenizer.json")) as f:
            save_checkpoint("student.pt", VisionLanguageModel(
                dict(depth=1, embed_dim=32, num_heads=2, img_size=32, patch_size=8),
                dict(embed_dim=32, num_heads=2, depth=1, vocab_size=200)), tokenizer=f.read())
    with pytest.raises(SystemExit) as e:
        evaluate.main(["retrieval", "--data=toy", f"--data_dir={bad.data_dir}", "--ckpt=student.pt",
                       "--device=cpu", "--json=new.json", *words.split()])
    assert str(e.value.code).startswith("error: ") and re.search(said, e.value.code), e.value.code
    for line in commands_in(e.value.code):
        parse_command(line)
    assert sorted(os.listdir()) == before


def test_compile_is_on_where_it_works(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    assert use_compile("auto", cuda) and use_compile("true", cpu)
    assert not use_compile("auto", cpu) and not use_compile("false", cuda)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not use_compile("auto", cuda)


def test_the_command_users_type_first(tmp_path, monkeypatch):
    """Without data it ends before anything is read or made, with the way out."""
    monkeypatch.chdir(tmp_path)
    process = start(script, "distill_multimodal.py", "--batch_size=256", said=tmp_path / "said")
    assert end(process) == 1
    said = (tmp_path / "said").read_text()
    assert "data set coco is not in data/" in said
    commands = [line for line in commands_in(said) if "--" in line]
    parsed = {line.split()[1]: parse_command(line) for line in commands}
    assert parsed["prepare_pairs.py"].data == "coco" and parsed["distill_multimodal.py"].preset == "tiny"
    assert os.listdir(tmp_path) == ["said"]


def test_tiny_prepares_what_is_missing(tmp_path, monkeypatch):
    """From nothing, --preset=tiny starts prepare_pairs.py and distill_image.py with flags that they take; the
    teacher comes out as the student needs it. Not for a run that needs no teacher."""
    monkeypatch.chdir(tmp_path)
    args = distill_multimodal.get_args(["--preset=tiny", "--seed=3", "--data_dir=elsewhere", "--device=cpu"])
    pairs, teacher = (parse_command(shlex.join(["python", *command]))
                      for command in distill_multimodal.tiny_commands(args).values())
    assert (pairs.data, pairs.data_dir) == (args.data, "elsewhere")
    assert (teacher.seed, teacher.data_dir, teacher.device, teacher.resume) == (3, "elsewhere", "cpu", False)
    assert os.path.join(teacher.out_dir, "ckpt.pt") == args.teacher and teacher.depth >= args.depth
    for k in ("img_size", "patch_size", "embed_dim", "num_heads"):
        assert getattr(teacher, k) == getattr(args, k), k
    without = distill_multimodal.get_args(["--preset=tiny", "--kd_loss=none", "--image_init=random"])
    assert len(distill_multimodal.tiny_commands(without)) == 1
