"""
evaluate.py export: a folder that gives the same embeddings bit for bit, wherever it lies, and both towers as
ONNX files.
"""
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from conftest import refused
from model import Encoder, VisionLanguageModel, load_checkpoint, save_checkpoint
from test_glue import tokenizer_text

SHAPE = dict(embed_dim=32, num_heads=2, depth=2)
IMAGE, TEXT = dict(SHAPE, img_size=32, patch_size=8), dict(SHAPE, vocab_size=40, max_length=16)
MODELS = { # name -> a model of random weights
    "student": lambda: VisionLanguageModel(IMAGE, dict(TEXT, token_types=2), token_types=True, token_scale=1,
                                           head_dim=8, align_levels=2, max_length=9),
    "mlp": lambda: VisionLanguageModel(IMAGE, TEXT, shared_kind="mlp"),
    "projection": lambda: VisionLanguageModel(IMAGE, dict(TEXT, attn_bias="alibi"), shared_kind="projection"),
    "image": lambda: Encoder("image", pool="mean", positions="none", attn_bias="relative", layer_scale=0.1,
                             key_bias=False, final_norm=True, **IMAGE),
    "text": lambda: Encoder("text", pool="mean", norm_first=False, embed_norm=True, positions="learned",
                            token_types=2, pooler=True, **TEXT)}
TEXTS = ["a long film", "two", "good people and their story of the way"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """ckpt(name) -> the path of a checkpoint as a loop leaves it."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/toy")
    Path("data/toy/meta.json").write_text('{"license": "CC BY 9", "credit": "drawn by the test"}')

    def ckpt(name):
        torch.manual_seed(0)
        model = MODELS[name]()
        has_text = isinstance(model, VisionLanguageModel) or model.config["modality"] == "text"
        settings = dict(data="toy", teacher="beitv2", image_init="random", text_init="bert")
        save_checkpoint(f"run/{name}.pt", model, tokenizer=tokenizer_text() if has_text else None,
                        settings=settings, step=7, best={"mean": 12.5, "step": 5})
        return f"run/{name}.pt"
    return ckpt


def embeddings(model):
    """What a model gives for three random pictures and for TEXTS."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"image": lambda: (images,), "text": lambda: model.tokenizer.encode(TEXTS, model.max_length)}
    return [getattr(model, f"encode_{m}")(*given[m]()) for m in evaluate.towers(model)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_embeddings_elsewhere(ckpt, tmp_path, name):
    """Bit for bit, from a copy, checkpoint and export gone."""
    path = ckpt(name)
    before = embeddings(load_checkpoint(path))
    evaluate.main(["export", f"--ckpt={path}", "--to=new/export"])
    shutil.copytree("new/export", "copy")
    shutil.rmtree("new")
    os.remove(path)
    after = embeddings(load_checkpoint("copy"))
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.allclose(x.norm(dim=1), torch.ones(3)) for x in after)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx(ckpt, name, capsys):
    """One file a tower, read by another runtime with other sizes, with padding, up to the longest; the
    difference is measured and said."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx, onnxscript and onnxruntime are optional")
    path = ckpt(name)
    result = evaluate.main(["export", f"--ckpt={path}", "--to=export", "--onnx"])
    model, said = load_checkpoint("export"), capsys.readouterr().out
    assert [*result["onnx"]] == evaluate.towers(model)
    for modality, difference in result["onnx"].items():
        assert difference < 1e-5 and re.search(rf"{modality}.onnx .*{difference:.1e}", said)
        session = onnxruntime.InferenceSession(f"export/{modality}.onnx")
        longest = 15 if name == "projection" else model.max_length # ALiBi: not its whole table
        given = [(torch.randint(40, (n, T)), torch.arange(T).repeat(n, 1) >= T - 1)
                 for n, T in ((1, 5), (4, 2), (2, longest))]
        if modality == "image":
            given = [(torch.randn(n, 3, 32, 32),) for n in (1, 4)]
        for x in given:
            found, = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), x)})
            ours = getattr(model, f"encode_{modality}")(*x)
            assert torch.allclose(torch.from_numpy(found), ours, atol=1e-5)


def test_card(ckpt, capsys):
    """Its lines of code run as they stand; it says what the student was made from, and its numbers."""
    path = ckpt("student")
    evaluate.main(["export", f"--ckpt={path}", "--to=mine"])
    text = Path("mine/README.md").read_text()
    for part in ("# mine", "licence of bert, which binds this too: Apache-2.0", "licence of toy, which binds "
                 "this too: CC BY 9", "licence of beitv2", "teacher: beitv2", "step: 7", "'mean': 12.5"):
        assert part in text, part
    Image.new("RGB", (50, 40), "red").save("picture.jpg")
    exec(re.search(r"```python\n(.*)```", text, re.S)[1], {})
    assert re.search(r"tensor\(\[\[.*\d", capsys.readouterr().out)


def test_again_and_beside_other_files(ckpt):
    """An export of an export is the same; a folder that holds something else is left alone."""
    def export(source, to):
        evaluate.main(["export", f"--ckpt={source}", f"--to={to}"])
        return {name: Path(to, name).read_bytes() for name in os.listdir(to)}
    path = ckpt("text")
    first = export(path, "a/student")
    assert export(path, "a/student") == first
    shutil.rmtree("data")
    assert export("a/student", "b/student") == first # with the same licences
    assert "--to=./b/student is what --ckpt reads" in refused(export, "b/student", "./b/student")
    Path("b/student/thesis.tex").write_text("years of work")
    assert "b/student holds thesis.tex" in refused(export, path, "b/student")
    assert {*os.listdir("b/student")} == {*first, "thesis.tex"}
