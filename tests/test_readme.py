"""
The README against the repository: its commands parse, the files it names exist, its pictures are small.

    pytest tests/test_readme.py
"""
import os
import re
import shlex
import shutil
import subprocess
import sys

import distill_image
import distill_multimodal
import distill_text
import evaluate
import experiments
import prepare_imagenet
import prepare_owt
import prepare_pairs
from conftest import HERE, REPO
from model import Encoder, save_checkpoint

MODULES = {f"{m.__name__}.py": m for m in (distill_image, distill_multimodal, distill_text, evaluate,
                                           prepare_imagenet, prepare_owt, prepare_pairs)}


def readme():
    with open(os.path.join(REPO, "README.md"), encoding="utf-8") as f:
        return f.read()


def commands():
    """The lines of code blocks that run python or pytest, continued lines joined, comments off."""
    blocks = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", readme(), re.M | re.S)).replace("\\\n", " ")
    lines = (part.strip() for line in blocks.splitlines() for part in line.split("&&"))
    return [shlex.split(line, comments=True)
            for line in lines if re.match(r"(python3?|pytest|OMP_NUM_THREADS=\d+ python) ", line)]


def test_commands():
    """Every command that starts a script of ours parses with that script's flags."""
    parsed = []
    for words in commands():
        words = words[1:] if "=" in words[0] else words
        if words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
            paths = [w for w in words[words.index("pytest") + 1:] if not w.startswith("-") and w != "slow"]
            assert all(os.path.exists(os.path.join(REPO, path)) for path in paths), words
            parsed.append("pytest")
        elif words[1] in ("-m", "-c", "tests/bench.py", "tests/experiments.py"):
            continue # venv, pip; what is only measured
        else:
            assert words[1] in MODULES, words
            args = MODULES[words[1]].get_args(words[2:])
            parsed.append((words[1], getattr(args, "preset", None)))
    assert {"pytest", ("distill_multimodal.py", "tiny"), ("evaluate.py", None)} <= {*parsed}


def test_commands_of_the_experiments():
    for words in [command for _, command in (experiments.PAIRS | experiments.IMAGES).values()]:
        script, *flags = words.split()
        MODULES[script].get_args(flags)
    for words in experiments.PROBES.values():
        evaluate.get_args(words.split())


def test_the_worked_change(tmp_path, tiny_data):
    """The diff of "Change it" is short, applies to the script as it is, and trains."""
    diff, = re.findall(r"^```diff\n(.*?)^```", readme(), re.M | re.S)
    assert 0 < len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 30
    for name in os.listdir(REPO):
        if name.endswith(".py"):
            shutil.copy(os.path.join(REPO, name), tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, text=True, check=True)
    words = ["--data=toy", f"--data_dir={tiny_data}", "--kd_loss=cosine", "--kd_weight=2", "--max_steps=3",
             "--batch_size=16", "--img_size=32", "--patch_size=8", "--embed_dim=32", "--num_heads=2",
             "--depth=1", "--text_depth=1", "--text_init=random", "--freeze_embeddings=False", "--device=cpu",
             "--log_interval=1", "--image_init=teacher", f"--teacher={tmp_path}/teacher.pt"]
    save_checkpoint(tmp_path / "teacher.pt", Encoder("image", 32, 2, 2, img_size=32, patch_size=8))
    done = subprocess.run([sys.executable, "distill_multimodal.py", *words], cwd=tmp_path, text=True,
                          capture_output=True)
    terms = re.findall(r"step +\d/3  loss ([\d.]+)  kd_image ([\d.]+)  kd_text ([\d.]+)", done.stdout)
    assert len(terms) == 3, done.stderr
    for loss, image, text in (map(float, row) for row in terms):
        assert 0 < image < 2 and 0 < text < 2 and abs(loss - 2 * (image + text)) < 1e-3


def test_files_named_in_the_text_exist():
    named = re.findall(r"[`(](tests/\w+\.\w+)", readme())
    assert named and all(os.path.exists(os.path.join(HERE, "..", name)) for name in named)


def test_knobs_named_in_the_text_exist():
    """A flag in the prose, `--key` or `--key=value`, is a flag of some script."""
    lines = [[]] + [[command] for command in evaluate.COMMANDS]
    known = {k for m in MODULES.values() for line in (lines[1:] if m is evaluate else lines[:1])
             for k in vars(m.get_args(line))}
    foreign = {"help", "key", "nproc_per_node", "standalone", "durations", "upgrade", "quiet", "index-url",
               "recursive", "track", "arms", "figure", "small"} # of other programs, and of scripts in tests/
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", readme()))
    assert named and not named - known - foreign


def test_files_exist():
    """Scripts, documents and links in the README: in the repository, or made by a command (out/, data/)."""
    text = re.sub(r"^```diff\n.*?^```", "", readme(), flags=re.M | re.S) # which has a/ and b/ before names
    files = (set(re.findall(r"[\w./]*\w\.(?:py|txt|md|ini)\b", text)) |
             set(re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)))
    files -= {"dict.txt", "vocab.txt", "mine.py"} # published with the weights; a user's own
    missing = [f for f in files if not f.startswith(("out/", "data/"))
               and not os.path.exists(os.path.join(REPO, f))]
    assert len(files) >= 6 and not missing
    assert {"model.py", *MODULES} <= files # the map of files is complete


def test_no_number_is_missing():
    assert not re.findall(r"@\w+@|TODO|TBD", readme())


def test_pictures():
    """Every picture is in the repository, is one, and is small; OpenMoji's are shown with their licence."""
    text = readme()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]*src=\"([^\"]+)\"", text)
    assert pictures
    for path in pictures:
        with open(os.path.join(REPO, path), "rb") as f:
            data = f.read()
        assert len(data) < 150_000 and data[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0"), path
    assert "CC BY-SA 4.0" in text
