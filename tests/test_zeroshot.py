"""
evaluate.py zeroshot: the arithmetic against open_clip's, CLIP_benchmark's and scikit-learn's, whose names and
prompts a set gets, and the whole subcommand on toy pictures.

    pytest tests/test_zeroshot.py
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
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from sklearn.metrics import top_k_accuracy_score

import evaluate
from conftest import COLOURS, SHAPES, flags
from evaluate import class_names, zero_shot_weights
from model import Encoder, VisionLanguageModel, load_checkpoint, save_checkpoint
from prepare_imagenet import Pairs

KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SHAPE = dict(embed_dim=32, num_heads=2, depth=1)
UNUSED_MODEL = SimpleNamespace(encode_image=None, img_size=224) # for tests that replace what would call it


def embedding(texts, D=24):
    """(n, D) float32: of each text its own random vector, of any length."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randn(D, generator=generator) * (1 + len(text)))
    return torch.stack(rows)


def tokenizer(texts):
    return SimpleNamespace(to=lambda device: texts)


# -----------------------------------------------------------------------------
# arithmetic


@pytest.mark.parametrize("templates", [open_clip.OPENAI_IMAGENET_TEMPLATES, evaluate.TEMPLATES])
def test_weights_are_open_clips_and_clip_benchmarks(templates):
    names = list(open_clip.IMAGENET_CLASSNAMES[:20])
    def encode(texts, normalize=False):
        return F.normalize(embedding(texts), dim=1) if normalize else embedding(texts)

    stand_in = SimpleNamespace(encode_text=encode)
    ours = zero_shot_weights(embedding, names, templates)
    theirs = open_clip.build_zero_shot_classifier(stand_in, tokenizer, names, templates)
    half = zero_shot_weights(lambda texts: embedding(texts).half(), names, templates)
    assert half.dtype == torch.float32 and torch.allclose(half, ours, atol=1e-2)
    assert ours.shape == (20, 24) and torch.allclose(ours, theirs.T, atol=1e-6)
    if isinstance(templates[0], str): # CLIP_benchmark's are strings with another name for the gap
        templates = [template.replace("{}", "{c}") for template in templates]
        theirs = zero_shot_classifier(stand_in, tokenizer, names, templates, "cpu", amp=False)
        assert torch.allclose(ours, theirs.T, atol=1e-6)


# -----------------------------------------------------------------------------
# names and prompts


WNIDS = [f"n{i:08d}" for i in range(1000)]


def test_names_without_a_file():
    names, named_by = class_names("imagenet", WNIDS, None)
    assert names[:3] == ("tench", "goldfish", "great white shark") and len(names) == 1000
    assert named_by == "CLIP"
    hub = [f"{name}, by another name" for name in names] # as the hub's parquet has them
    assert class_names("imagenet", hub, None) == (names, "CLIP")
    assert class_names("cifar100", ["maple_tree", "cat"], None) == (["maple tree", "cat"], "meta.json")
    digits = [str(i) for i in range(10)] # are called so
    assert class_names("digits", digits, None) == (digits, "meta.json")


@pytest.mark.parametrize("text, classes, expected", [
    ("a red_one\n\ncafé \n", ["x", "y"], ["a red_one", "café"]), # as they are written
    ("a\nb\n", [], ["a", "b"]), # a set whose meta.json names none
    # folders in the order of their names, 0, 1, 10, 11, 2 ..: line n + 1 names folder n
    ("".join(f"thing {i}\n" for i in range(12)), sorted(map(str, range(12))),
     [f"thing {i}" for i in sorted(range(12), key=str)])])
def test_names_of_a_file(tmp_path, text, classes, expected):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    assert class_names("mine", classes, str(path)) == (expected, str(path))


@pytest.mark.parametrize("classes", [[], WNIDS[:100], WNIDS[::-1], [str(i) for i in range(1000)]])
def test_no_names(classes):
    """Folders of ImageNet, as 0 .. 999 or as n01440764, are no words."""
    with pytest.raises(SystemExit, match="toy are no words, .*--classes=FILE"):
        class_names("toy", classes, None)


# -----------------------------------------------------------------------------
# the subcommand


def name_classes(data, names):
    path = Path("data", data, "meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": names}))


@pytest.fixture
def run(tiny_data, tmp_path, monkeypatch):
    """run(**flags) -> what the subcommand returns, for toy pictures whose 24 classes have names; both.pt is a
    random model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(os.path.join(tiny_data, "toy"), "data/toy")
    name_classes("toy", [kind.replace(" ", "_") for kind in KINDS])
    tokenizer = Path("data/toy/tokenizer.json").read_text()
    torch.manual_seed(0)
    model = VisionLanguageModel(dict(img_size=32, patch_size=8, **SHAPE), dict(vocab_size=200, **SHAPE))
    save_checkpoint("both.pt", model, tokenizer=tokenizer)
    save_checkpoint("image.pt", Encoder("image", img_size=32, patch_size=8, **SHAPE))
    save_checkpoint("text.pt", Encoder("text", vocab_size=200, **SHAPE), tokenizer=tokenizer)

    def run(**changes):
        knobs = dict(task="toy", ckpt="both.pt", device="cpu", dtype="float32", batch_size=7) | changes
        return evaluate.main(["zeroshot", *flags({k: v for k, v in knobs.items() if v is not None})])
    return run


def accuracies(labels, scores):
    """In percent, by scikit-learn: open_clip's own function does not run with today's NumPy."""
    C = scores.shape[1]
    return pytest.approx({f"top{k}": 100 * top_k_accuracy_score(labels, scores, k=k, labels=range(C))
                          for k in (1, 3, 5)})


@pytest.mark.parametrize("changes", [{}, dict(squash=True, classes="names.txt")])
def test_command(run, capsys, tmp_path, changes):
    """Table and JSON: scikit-learn's accuracy of the scores of one image and one class after the other."""
    Path("names.txt").write_text("\n".join(KINDS))
    result = run(json="new/result.json", **changes)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "new/result.json").read_text()) == result
    model, pairs = load_checkpoint("both.pt"), Pairs("data", "toy", "test")
    classes = []
    for kind in KINDS:
        prompts = [template(kind) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        classes.append(model.encode_text(*model.tokenizer.encode(prompts, model.max_length)).mean(0))
    images = [model.encode_image(evaluate.normalize(evaluate.eval_image(data, 32, "squash" in changes)[None]))
              for data in pairs.images]
    scores = torch.cat(images) @ F.normalize(torch.stack(classes), dim=1).T # (N, C)
    assert result["metrics"] == accuracies(pairs.labels, scores)
    assert (result["split"], result["images"], result["num_classes"]) == ("test", 12, 24)
    lines = [line.split() for line in said.splitlines()]
    assert ["both.pt", *(f"{result['metrics'][k]:.2f}" for k in ("top1", "top3", "top5"))] in lines
    assert ["chance", "4.17", "12.50", "20.83"] in lines and "published" not in said
    assert result["named_by"] == changes.get("classes", "meta.json") and "80 prompts for each" in said
    assert run(ckpt=None, image_encoder="image.pt", text_encoder="text.pt")["ckpt"] == "image.pt + text.pt"


def test_without_clips_prompts(run, capsys, monkeypatch):
    """Our own prompts take their place; ImageNet's names ask for the package."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert run()["images"] == 12 and f"{len(evaluate.TEMPLATES)} prompts for each" in capsys.readouterr().out
    name_classes("toy", WNIDS)
    with pytest.raises(SystemExit, match="pip install open_clip_torch"):
        run()


@pytest.mark.parametrize("changes, said", [
    (dict(task="none"), "data set none"), (dict(task="few"), "has the label 23, but meta.json names 3"),
    (dict(classes="none"), "none cannot be read"), (dict(classes="both.pt"), "both.pt cannot be read"),
    (dict(classes="names.txt"), "names.txt holds 2 names, but toy has 24 classes"),
    (dict(task="bare"), "has no labels in its split"), (dict(ckpt="image.pt"), "does not embed both"),
    (dict(image_encoder="image.pt", text_encoder="text.pt"), "are each an encoder")])
def test_wrong_input(run, changes, said):
    for name in "few", "bare":
        shutil.copytree("data/toy", f"data/{name}")
    name_classes("few", KINDS[:3])
    os.remove("data/bare/test_labels.npy")
    Path("names.txt").write_text("cat\ndog\n")
    before = sorted(os.listdir())
    with pytest.raises(SystemExit, match=said) as e:
        run(json="new.json", **changes)
    assert str(e.value.code).startswith("error: ") and sorted(os.listdir()) == before
