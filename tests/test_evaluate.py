"""
The metrics against their libraries, numbers worked out by hand and a second, slow implementation; the table,
the picture and the command line.
"""
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import SHAPE, randn, refused, save_students
from evaluate import chance_row, knn_accuracy, median_rank, median_rank_chunks, retrieval_metrics
from model import Encoder, load_checkpoint, save_checkpoint
from prepare_imagenet import Pairs

KEYS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "i2t_mean", "t2i_mean", "mean"]


@pytest.fixture(scope="module")
def ckpt(tiny_data, tmp_path_factory):
    """The path of a random model that reads the toy captions."""
    folder = tmp_path_factory.mktemp("model")
    save_students(folder, Path(tiny_data, "toy", "tokenizer.json").read_text())
    return f"{folder}/both.pt"


def test_recall_is_clip_benchmarks():
    """Its recall is a share of a query's right answers; its retrieval score counts where that is not zero."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
    N, M = 60, 301
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.concatenate([np.arange(N), rng.integers(0, N, M - N)])) # each once or more
    images = torch.nn.functional.normalize(randn(N, 16), dim=1)
    texts = torch.nn.functional.normalize(images[owner] + 0.3 * randn(M, 16, seed=1), dim=1)
    scores, positive = texts @ images.T, torch.from_numpy(owner)[:, None] == torch.arange(N) # (M, N) each
    theirs = [100 * (recall_at_k(s, p, k) > 0).double().mean().item()
              for s, p in ((scores.T, positive.T), (scores, positive)) for k in (1, 5, 10)]
    # lengths do not matter, though squares overflow float32
    ours = retrieval_metrics(1e25 * images, 1e-25 * texts, owner)
    means = [np.mean(theirs[:3]), np.mean(theirs[3:]), np.mean(theirs)]
    assert list(ours) == KEYS and all(type(v) is float for v in ours.values())
    assert 10 < theirs[0] < 100 and list(ours.values()) == pytest.approx([*theirs, *means], abs=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_give_chance(scale):
    """All embeddings are equal, as of a collapsed model, or zero: a right answer that is stored first is not
    found for that. The first ten captions would be of two images only."""
    N, each = 500, 5
    images, texts, labels = scale * torch.ones(N, 24), scale * torch.ones(N * each, 24), torch.arange(N)
    metrics = retrieval_metrics(images, texts, np.arange(N * each) // each)
    assert metrics["t2i_r1"] == pytest.approx(100 / N) and metrics["t2i_r10"] == pytest.approx(1000 / N)
    assert 0 < metrics["i2t_r1"] <= 100 / N and 100 / N < metrics["i2t_r10"] <= 1000 / N
    assert knn_accuracy(images, labels, images, labels, 3) == pytest.approx(300 / N)
    for wrong in (images[:, :3], images[1:], images * math.nan):
        with pytest.raises(ValueError):
            retrieval_metrics(wrong, texts, np.arange(N * each) // each)


def test_chance_row_by_hand():
    # 4 images with 2, 1, 1, 1 of 5 captions. K=1: (2/5 + 3 * 1/5) / 4 = 25%; K=5 and 10 hold everything.
    chance = chance_row(np.array([0, 0, 1, 2, 3]), 4)
    assert [chance[k] for k in KEYS[:6]] == pytest.approx([25, 100, 100, 25, 100, 100])
    coco = chance_row(np.arange(25000) // 5, 5000) # 1 - (1 - 5/25000)^10, nearly
    assert coco["i2t_r10"] == pytest.approx(0.1998, abs=1e-3) and coco["t2i_r10"] == pytest.approx(0.2)


def test_median_rank_by_hand():
    # Text 0 is nearest to image 0, and so is text 1, whose own image comes second: ranks 1 and 2. Both images
    # find their text first. The median of an even number is the mean of the middle two.
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert median_rank(images, texts) == (1.0, 1.5)
    # odd: scores [[9, 1, 0], [5, 4, 6], [8, 7, 3]] of image by text; ranks 1, 3, 3 and 1, 2, 2
    scores = torch.tensor([[9.0, 1, 0], [5, 4, 6], [8, 7, 3]])
    assert median_rank(scores / scores.norm(dim=1, keepdim=True), torch.eye(3)) == (3.0, 2.0)


def test_median_rank_chunks_protocol():
    # 25 images with 2 or 3 captions, chunks of 10: two chunks, the rest left out, 3 passes; written out again
    N = 25
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(N), [2 + i % 2 for i in range(N)]))
    images = randn(N, 8)
    texts = images[owner] + 2 * randn(len(owner), 8, seed=1)
    medians = []
    for c in range(3):
        for chunk in range(0, 10), range(10, 20):
            own = [[j for j in range(len(owner)) if owner[j] == i] for i in chunk]
            medians.append(median_rank(images[list(chunk)], texts[[j[c % len(j)] for j in own]]))
    assert median_rank_chunks(images, texts, owner, chunk=10) == pytest.approx(np.mean(medians, axis=0))
    # fewer images than a chunk are one chunk; one caption each is one pass
    assert median_rank_chunks(images, images.flip(0), np.arange(N)) == median_rank(images, images.flip(0))


def test_knn_by_hand():
    # directions in degrees. Bank: 0 (label 7), 20 (label 8), 50 (label 7), 100 (label 9).
    # Queries and who is nearest:
    #   at 5, label 7: 0 20 50 100   hit at once
    #   at 30, label 7: 20 50 0 100  second
    #   at 40, label 9: 50 20 0 100  fourth
    #   at 90, label 3: nobody has it
    at = lambda *degrees: torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))]
                                        for d in degrees])
    bank, labels, queries = at(0, 20, 50, 100), np.array([7, 8, 7, 9]), at(5, 30, 40, 90)
    lengths = torch.tensor([[1.0], [30], [0.01], [5]]) # must not matter
    for k, share in {1: 25, 2: 50, 3: 50, 4: 75, 5: 75, 100: 75}.items():
        assert knn_accuracy(lengths * bank, labels, queries / lengths, torch.tensor([7, 7, 9, 3]), k) == share


def test_knn_command(tiny_data, tmp_path, capsys):
    """The numbers of features computed one by one."""
    torch.manual_seed(0)
    encoder = Encoder("image", depth=2, **SHAPE)
    save_checkpoint(tmp_path / "encoder.pt", encoder)
    metrics = evaluate.main(["knn", "--task=toy", f"--data_dir={tiny_data}", f"--ckpt={tmp_path}/encoder.pt",
                             "--device=cpu", "--dtype=float32", "--batch_size=7"])["metrics"]
    train, test = (Pairs(tiny_data, "toy", split) for split in ("train", "test"))
    a, b = (torch.cat([encoder(evaluate.normalize(evaluate.eval_image(data, 32)[None]))[:, 1:].mean(1)
                       for data in pairs.images]).detach() for pairs in (train, test))
    la, lb = train.labels, test.labels
    assert metrics == {"top1": knn_accuracy(a, la, b, lb, 1), "top3": knn_accuracy(a, la, b, lb, 3),
                       "reverse_top1": knn_accuracy(b, lb, a, la, 1),
                       "reverse_top3": knn_accuracy(b, lb, a, la, 3)}
    row = ["test", "->", "train", *(f"{metrics[k]:.2f}" for k in ("reverse_top1", "reverse_top3"))]
    assert row in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_embedding_keeps_order_mode_and_random_numbers(tiny_data, ckpt, num_workers):
    pairs, model = Pairs(tiny_data, "toy", "test", needs_captions=True), load_checkpoint(ckpt)
    images = [model.encode_image(evaluate.normalize(evaluate.eval_image(data, 32)[None]))
              for data in pairs.images]
    texts = [model.encode_text(*model.tokenizer.encode([caption], model.max_length))
             for caption in pairs.captions]
    model.train().text_encoder.eval()
    state = torch.get_rng_state()
    metrics, image_emb, text_emb = evaluate.evaluate_retrieval(model, pairs, batch_size=5,
                                                               num_workers=num_workers)
    assert torch.allclose(image_emb, torch.cat(images), atol=1e-5)
    assert torch.allclose(text_emb, torch.cat(texts), atol=1e-5)
    assert metrics == retrieval_metrics(image_emb, text_emb, pairs.text_to_image)
    assert model.training and not model.text_encoder.training # a loop's frozen parts stay as they were
    assert torch.equal(torch.get_rng_state(), state)


def test_picture(tiny_data, tmp_path):
    """A small file, and the right answers are framed in green: all, or none where they come last."""
    toy, path, green, N = Pairs(tiny_data, "toy", "train"), tmp_path / "new" / "grid.png", [], 30
    pairs = SimpleNamespace(images=[toy.images[i] for i in range(N)], captions=["a caption"] * N,
                            text_to_image=np.arange(N), meta={"credit": "by the test", "license": "CC0"})
    pairs.captions[0] = "a caption " * 40 + "x" * 200 # neither fits
    images = randn(N, 8)
    for sign in 1, -1:
        evaluate.draw_retrieval(pairs, images, sign * images, str(path), rows=2)
        assert path.stat().st_size < 150_000 and os.listdir(path.parent) == ["grid.png"]
        with Image.open(path) as image:
            assert image.format == "PNG" and 600 < image.width < 1000
            pixels = np.asarray(image.convert("RGB")).astype(int)
        target = np.array([int(evaluate.GREEN[i:i + 2], 16) for i in (1, 3, 5)])
        green.append((np.abs(pixels - target).max(-1) < 8).sum())
    assert green[0] > 4 * 1000 and green[0] > 10 * green[1] # four frames of more than a thousand pixels


@pytest.mark.parametrize("words, file, cause", [
    ("retrieval --json", "folder", "it is a folder"), ("search --html", "file/new.html", "File exists"),
    ("curves --picture", "file/deep/new.png", "Not a directory")])
def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, words, file, cause):
    """Is named before anything is read: there is neither a checkpoint nor a run."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("folder")
    (tmp_path / "file").touch()
    error = refused(evaluate.main, f"{words}={file}".split())
    assert f"cannot write {file}" in error and cause in error


@pytest.mark.parametrize("data, whole", [("flickr30k", True), ("coco", False)])
def test_retrieval_command(tiny_data, ckpt, tmp_path, monkeypatch, capsys, data, whole):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(f"{tiny_data}/toy", f"data/{data}")
    if whole:
        monkeypatch.setattr(evaluate, "TEST_SETS", {data: [(12, 12)]})
    result = evaluate.main(["retrieval", f"--ckpt={ckpt}", f"--data={data}", "--device=cpu",
                            "--dtype=float32", "--json=r.json", "--picture=r.png"])
    said = capsys.readouterr().out
    assert "median rank among 12:" in said and "\nchance " in said and os.path.exists("r.png")
    assert ("CLIP L/14-336, published" in said) == bool(result["published"]) == whole
    if whole:
        assert result["published"]["CLIP L/14-336"]["i2t_mean"] == pytest.approx((88 + 98.7 + 99.4) / 3)
    assert json.loads((tmp_path / "r.json").read_text()) == result
