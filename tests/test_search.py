"""
evaluate.py search: what is embedded when, what is said where nothing can be found, and a page that fetches
nothing.
"""
import glob
import html
import os
import re

import pytest
from PIL import Image

import evaluate
from conftest import COLOURS, flags, refused, save_students
from model import VisionLanguageModel, bert_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(query, .., **flags) -> what the subcommand returns, in a folder with pictures of one colour each;
    run.embedded grows by each picture that is embedded."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("pics/more")
    for name in COLOURS:
        Image.new("RGB", (40, 30), name).save(f"pics/more/{name}.png")
    os.mkdir("run")
    save_students("run", bert_tokenizer({word: i for i, word in enumerate(WORDS)}))
    embedded, encode = [], VisionLanguageModel.encode_image
    monkeypatch.setattr(VisionLanguageModel, "encode_image",
                        lambda self, images: (embedded.extend(images), encode(self, images))[1])

    def run(*queries, **changes):
        knobs = dict(ckpt="run/both.pt", images="pics", device="cpu", dtype="float32", batch_size=4) | changes
        embedded.clear()
        return evaluate.main(["search", *(queries or ["red"]), *flags(knobs)])
    run.embedded = embedded
    return run


def test_scores_are_cosines(run, capsys):
    """The best first, for each query, as the model itself gives them."""
    result = run("red", "a blue thing", top=4)
    model, said = evaluate.load_checkpoint("run/both.pt"), capsys.readouterr().out
    assert result["images"] == 6 and [*result["results"]] == ["red", "a blue thing"]
    for query, found in result["results"].items():
        text = model.encode_text(*model.tokenizer.encode([query], model.max_length))
        scores = {}
        for name in COLOURS:
            with open(f"pics/more/{name}.png", "rb") as f:
                image = evaluate.normalize(evaluate.eval_image(f.read(), 32)[None])
            scores[f"pics/more/{name}.png"] = (model.encode_image(image) @ text.T).item()
        best = sorted(scores, key=scores.get, reverse=True)[:4]
        assert [x["file"] for x in found] == best
        assert [x["score"] for x in found] == pytest.approx([scores[name] for name in best], abs=1e-6)
        assert all(f"{x['score']:.3f}  {x['file']}" in said for x in found)
    assert len(run("red яблоко", top=50)["results"]["red яблоко"]) == 6 # a part of it is known


def test_what_is_embedded_again(run, capsys):
    """What is new or changed; all with other weights or transforms, or where the cache is damaged."""
    steps = [ # what happens before the search, how many pictures there are, how many it embeds
        (lambda: None, 6, 6), (lambda: None, 6, 0),
        (lambda: Image.new("RGB", (9, 9), "pink").save("pics/pink.jpg"), 7, 1),
        (lambda: Image.new("RGB", (8, 9), "white").save("pics/more/red.png"), 7, 1),
        (lambda: os.utime("pics/pink.jpg", ns=(0, 5)), 7, 1),
        (lambda: os.remove("pics/pink.jpg"), 6, 0), (lambda: None, 6, 0),
        (lambda: os.utime("run/both.pt", ns=(0, 5)), 6, 6)]
    for change, pictures, count in steps:
        change()
        result = run()
        assert f"{pictures} pictures, {count} of them new or changed" in capsys.readouterr().out
        assert result["images"] == pictures and len(run.embedded) == count
    run(squash=True)
    assert len(run.embedded) == 6
    cache, = [f"run/{name}" for name in os.listdir("run") if name.endswith(".search")]
    os.truncate(cache, 500)
    assert run()["results"] == result["results"] and len(run.embedded) == 6
    evaluate.main(["export", "--ckpt=run/both.pt", "--to=student"])
    assert run(ckpt="student/")["results"] == result["results"] and len(run.embedded) == 6


def test_a_killed_search_goes_on(run, monkeypatch):
    """Killed in the third chunk it has four of six pictures; the same command embeds the other two."""
    whole = run(top=6)["results"]
    os.remove(glob.glob("run/*.search")[0])
    monkeypatch.setattr(evaluate, "SEARCH_CHUNK", 2)
    encode = VisionLanguageModel.encode_image

    def killed(self, images):
        if len(run.embedded) == 4:
            raise KeyboardInterrupt
        return encode(self, images)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(VisionLanguageModel, "encode_image", killed)
        run()
    found = run(top=6)["results"]["red"]
    assert len(run.embedded) == 2
    assert {x["file"]: pytest.approx(x["score"], abs=1e-6) for x in found} == {
        x["file"]: x["score"] for x in whole["red"]}


def test_page(run, tmp_path):
    """Names and queries are text, whatever they spell; all pictures are in the file."""
    name, query = '<script>alert("x")<b> & more.png', '<b onclick="x">red</b> & blue'
    os.rename("pics/more/red.png", f"pics/{name}")
    run(query, "red", html="new/page.html", top=6)
    text = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)=\W*([^\"]*)", text)
    assert html.escape(name) in text and html.escape(query) in text
    assert {*re.findall(r"<(\w+)", text)} == {"html", "meta", "title", "style", "h1", "h2", "div", "figure",
                                              "img", "figcaption"}
    assert len(sources) == 12 and all(x.startswith("data:image/jpeg;base64,") for x in sources)
    assert "default-src 'none'" in text and "http:" not in text and "https:" not in text


def test_unreadable_pictures_and_odd_names(run, capsys):
    """They are named, left out, and not tried again until they change. Hidden ones are not searched."""
    os.makedirs("pics/.thumbnails")
    for name, size in ((".thumbnails/hidden.png", (9, 9)), ("long.png", (3000, 4)), (b"caf\xe9.png", (9, 9))):
        Image.new("RGB", size, "red").save(f"pics/{os.fsdecode(name)}")
    for name, data in (("torn.jpg", b"\xff\xd8\xff torn"), ("notes.txt", b"no picture")):
        with open(f"pics/{name}", "wb") as f:
            f.write(data)
    os.symlink("nowhere", "pics/link.png")
    for count in 9, 0:
        result = run(html="page.html", top=9)
        assert result["unreadable"] == ["pics/torn.jpg"]
        assert "1 cannot be read as a picture: pics/torn.jpg" in capsys.readouterr().out
        assert len(result["results"]["red"]) == result["images"] == 8 and len(run.embedded) == count
    assert "pics/caf\\xe9.png" in [x["file"] for x in result["results"]["red"]]


@pytest.mark.parametrize("queries, changes, said", [
    ([], {}, "no query"), (["красное яблоко"], {}, "knows no part of it"),
    ([" "], {}, "knows no part of it"),
    (["red"], dict(images="none"), "--images=none: give a folder"),
    (["red"], dict(images="run"), "no pictures in run: no file there ends in .jpg"),
    (["red"], dict(ckpt="run/image.pt"), "does not embed both images and text")])
def test_nothing_to_find(run, queries, changes, said):
    knobs = dict(ckpt="run/both.pt", images="pics", html="page.html") | changes
    assert said in refused(evaluate.main, ["search", *queries, *flags(knobs)])
    assert not os.path.exists("page.html")
