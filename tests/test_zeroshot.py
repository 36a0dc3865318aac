"""
evaluate.py zeroshot: the arithmetic against open_clip's and scikit-learn's, whose names a set gets, and the
whole subcommand on toy pictures.
"""
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import top_k_accuracy_score

import evaluate
from conftest import COLOURS, SHAPES, flags, refused, save_students
from evaluate import class_names, zero_shot_weights
from model import load_checkpoint
from prepare_imagenet import Pairs

KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
PROMPTS = open_clip.OPENAI_IMAGENET_TEMPLATES
WNIDS = [f"n{i:08d}" for i in range(1000)]
DIGITS, FOLDERS = ([str(i) for i in range(n)] for n in (10, 1000))


def embedding(texts, normalize=False):
    """(n, 24) float32: of each text its own random vector, of any length."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randn(24, generator=generator) * (1 + len(text)))
    return F.normalize(torch.stack(rows), dim=1) if normalize else torch.stack(rows)


def test_weights_are_open_clips():
    names = open_clip.IMAGENET_CLASSNAMES[:20]
    stand_in = SimpleNamespace(encode_text=embedding)
    tokenizer = lambda texts: SimpleNamespace(to=lambda device: texts)
    theirs = open_clip.build_zero_shot_classifier(stand_in, tokenizer, names, PROMPTS)
    ours = zero_shot_weights(embedding, names, PROMPTS)
    assert ours.shape == (20, 24) and torch.allclose(ours, theirs.T, atol=1e-6)
    theirs = zero_shot_weights(embedding, names, [lambda name: f"a {name}.", lambda name: name])
    assert torch.equal(zero_shot_weights(embedding, names, ["a {}.", "{}"]), theirs)


@pytest.mark.parametrize("task, classes, text, expected", [
    ("imagenet", WNIDS, None, open_clip.IMAGENET_CLASSNAMES),
    ("imagenet", [f"{name}, or so" for name in WNIDS], None, open_clip.IMAGENET_CLASSNAMES), # as the hub's
    ("cifar100", ["maple_tree", "cat"], None, ["maple tree", "cat"]), ("digits", DIGITS, None, DIGITS),
    ("mine", ["x", "y"], "a red_one\n\ncafé \n", ["a red_one", "café"]), # as they are written
    ("mine", [], "a\nb\n", ["a", "b"]), # a set whose meta.json names none
    # folders in the order of their names, 0, 1, 10, 11, 2 ..: line n + 1 names folder n
    ("mine", sorted(map(str, range(12))), "".join(f"thing {i}\n" for i in range(12)),
     [f"thing {i}" for i in sorted(range(12), key=str)])])
def test_names(tmp_path, task, classes, text, expected):
    path = str(tmp_path / "names.txt") if text else None
    Path(tmp_path, "names.txt").write_text(text or "", encoding="utf-8")
    names, named_by = class_names(task, classes, path)
    assert [*names] == [*expected]
    assert named_by == (path or ("CLIP" if task == "imagenet" else "meta.json"))


@pytest.mark.parametrize("classes", [[], WNIDS[:100], WNIDS[::-1], FOLDERS])
def test_no_names(classes):
    """Folders of ImageNet, as 0 .. 999 or as n01440764, are no words."""
    assert "toy are no words" in refused(class_names, "toy", classes, None)


def name_classes(data, names):
    path = Path("data", data, "meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": names}))


@pytest.fixture
def run(tiny_data, tmp_path, monkeypatch):
    """run(**flags) -> what the subcommand returns, for toy pictures whose 24 classes have names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(os.path.join(tiny_data, "toy"), "data/toy")
    name_classes("toy", [kind.replace(" ", "_") for kind in KINDS])
    save_students(".", Path("data/toy/tokenizer.json").read_text())

    def run(**changes):
        knobs = dict(task="toy", ckpt="both.pt", device="cpu", dtype="float32", batch_size=7) | changes
        return evaluate.main(["zeroshot", *flags(knobs)])
    return run


@pytest.mark.parametrize("changes", [{}, dict(squash=True, classes="names.txt")])
def test_command(run, capsys, changes):
    """scikit-learn's accuracy of the scores of one image and one class after the other."""
    Path("names.txt").write_text("\n".join(KINDS))
    result = run(json="new/result.json", **changes)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert json.loads(Path("new/result.json").read_text()) == result
    model, pairs, classes = load_checkpoint("both.pt"), Pairs("data", "toy", "test"), []
    for kind in KINDS:
        prompts = [template(kind) for template in PROMPTS]
        classes.append(model.encode_text(*model.tokenizer.encode(prompts, model.max_length)).mean(0))
    images = [model.encode_image(evaluate.normalize(evaluate.eval_image(data, 32, "squash" in changes)[None]))
              for data in pairs.images]
    scores = torch.cat(images) @ F.normalize(torch.stack(classes), dim=1).T # (N, C)
    for k in 1, 3, 5:
        accuracy = top_k_accuracy_score(pairs.labels, scores, k=k, labels=range(24))
        assert result["metrics"][f"top{k}"] == pytest.approx(100 * accuracy)
    assert (result["split"], result["images"], result["num_classes"]) == ("test", 12, 24)
    assert ["both.pt", *(f"{x:.2f}" for x in result["metrics"].values())] in lines
    assert ["chance", "4.17", "12.50", "20.83"] in lines and not result["published"]
    assert result["named_by"] == changes.get("classes", "meta.json")
    assert run(ckpt=None, image_encoder="image.pt", text_encoder="text.pt")["ckpt"] == "image.pt + text.pt"


def test_a_package_that_is_not_there(run, monkeypatch):
    """As main() says of every optional one."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused(run)


@pytest.mark.parametrize("changes, said", [
    (dict(task="few"), "has the label 23, but meta.json names 3"),
    (dict(classes="none"), "none cannot be read"), (dict(classes="both.pt"), "both.pt cannot be read"),
    (dict(classes="names.txt"), "names.txt holds 2 names, but toy has 24 classes"),
    (dict(ckpt="image.pt"), "does not embed both")])
def test_wrong_input(run, changes, said):
    shutil.copytree("data/toy", "data/few")
    name_classes("few", KINDS[:3])
    Path("names.txt").write_text("cat\ndog\n")
    before = sorted(os.listdir())
    assert said in refused(run, json="new.json", **changes) and sorted(os.listdir()) == before
