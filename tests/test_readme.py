"""
The README against the repository: its commands parse, its worked change runs, what it names exists.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys

import evaluate
import experiments
from conftest import MULTIMODAL, REPO, SHAPE, flags
from model import Encoder, save_checkpoint
from test_cli import MODULES, SCRIPTS, parse_command

with open(os.path.join(REPO, "README.md"), encoding="utf-8") as readme_file:
    README = readme_file.read()


def test_every_command_parses(tmp_path):
    """Those that run python or pytest in code blocks, and those of the experiments, which can also start."""
    blocks = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", README, re.M | re.S)).replace("\\\n", " ")
    lines = [part.strip() for line in blocks.splitlines() for part in line.split("&&")]
    parsed = []
    for words in [shlex.split(line, comments=True) for line in lines if re.match("(python|pytest) ", line)]:
        if words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
            paths = [w for w in words[words.index("pytest") + 1:] if not w.startswith("-") and w != "slow"]
            assert all(os.path.exists(os.path.join(REPO, path)) for path in paths), words
        elif words[1] not in ("-m", "-c", "tests/bench.py", "tests/experiments.py"): # pip, measurements
            parsed.append((words[1], getattr(parse_command(shlex.join(words)), "preset", None)))
    assert {("distill_multimodal.py", "tiny"), ("evaluate.py", None)} <= {*parsed}
    (tmp_path / "teacher").touch()
    for _, command in (experiments.PAIRS | experiments.IMAGES).values():
        command = command.format(teacher=tmp_path / "teacher")
        MODULES[command.split()[0]].check(parse_command(f"python {command}"))
    for words in experiments.PROBES.values():
        evaluate.get_args(words.split())


def test_the_worked_change(tmp_path, tiny_data):
    """The diff of "Change it" is short, applies to the script as it is, and trains."""
    diff, = re.findall(r"^```diff\n(.*?)^```", README, re.M | re.S)
    assert 0 < len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 30
    for name in os.listdir(REPO):
        if name.endswith(".py"):
            shutil.copy(os.path.join(REPO, name), tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, text=True, check=True)
    words = flags(dict(MULTIMODAL, data_dir=tiny_data, teacher=tmp_path / "teacher.pt", max_steps=3,
                       kd_loss="cosine", kd_weight=2))
    save_checkpoint(tmp_path / "teacher.pt", Encoder("image", depth=2, **SHAPE))
    done = subprocess.run([sys.executable, "distill_multimodal.py", *words], cwd=tmp_path, text=True,
                          capture_output=True)
    terms = re.findall(r"step +\d/3  loss ([\d.]+)  kd_image ([\d.]+)  kd_text ([\d.]+)", done.stdout)
    assert len(terms) == 3, done.stderr
    for loss, image, text in (map(float, row) for row in terms):
        assert 0 < image < 2 and 0 < text < 2 and abs(loss - 2 * (image + text)) < 1e-3


def test_files_exist():
    """Scripts, documents, links and pictures: in the repository, or made by a command (out/, data/)."""
    text = re.sub(r"^```diff\n.*?^```", "", README, flags=re.M | re.S) # which has a/ and b/ before names
    links = set(re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text))
    files = links | set(re.findall(r"[\w./]*\w\.(?:py|txt|md|ini)\b", text))
    files -= {"dict.txt", "vocab.txt", "mine.py"} # published with the weights; a user's own
    assert not [f for f in files if not f.startswith(("out/", "data/"))
                and not os.path.exists(os.path.join(REPO, f))]
    assert {"model.py", "evaluate.py", *MODULES} <= files # the map of files is complete
    pictures = [os.path.join(REPO, link) for link in links if link.endswith("png")]
    assert pictures and max(map(os.path.getsize, pictures)) < 150_000


def test_flags_of_the_prose_exist():
    known = {key for get_args in SCRIPTS.values() for key in vars(get_args([]))}
    elsewhere = {"help", "standalone", "nproc_per_node", "track", "arms", "small"}
    assert {*re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)} - known <= elsewhere


def test_the_arms_of_the_table_are_those_that_are_run():
    rows = re.findall(r"^\| [^|`]*: `([^`]*)` \|", README, re.M)
    commands = [command for _, command in [*experiments.PAIRS.values(), *experiments.IMAGES.values()]]
    assert len(rows) > 1
    for row in rows:
        assert any(f"{row} " in f"{command} " for command in commands), row
