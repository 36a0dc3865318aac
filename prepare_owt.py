"""
Prepares text as token ids: OpenWebText, Python's documentation, your own. Owns the format and its reader, and
the files of published tokenizers.

    python prepare_owt.py                                # downloads 27 of OpenWebText's 80 files, 8 GB
    python prepare_owt.py --source=DIR --tokenizer=gpt2  # from files you have, for data2vec 2.0
    python prepare_owt.py --source=DIR --limit=1000      # a trial: the first documents of each split
    python prepare_owt.py --data=pydoc                   # seconds, no download: English out of pydoc_data

DIR, or a folder in it, holds one of (the first that is there is taken, and printed):

    train-00000-of-00080.parquet .. OpenWebText as published today, or any parquet files with a column "text";
                                    of files named for splits those of train
    *.jsonl, *.txt                  a document a line, {"text": ..}; a document a file (a line, if the file is
                                    above 4 MB or is itself the --source)

data/owt_bert/ (owt_gpt2, pydoc_minilm ..) then holds train.bin and val.bin, ids of the model's vocabulary as
uint16, little-endian, after each document its end token ([SEP] or </s>), and, written last, meta.json. Of 21
equal shares of the documents 6 are for training and the 7th for validation, as in the thesis. Null bytes and
empty lines are removed. The same command again goes on after a kill.
"""
import base64
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import re
import threading
import time
from typing import NamedTuple

import numpy as np
import torch

from model import (PRETRAINED, GPT2Tokenizer, Parser, Tokenizer, bert_tokenizer, cache_folder, download,
                   fail, going_on, load_encoder, lock, package_folder, prepared, progress, split_name,
                   write_json)

CHUNKS = 21 # shares of the documents, as OpenWebText was first published
URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/plain_text/" # 80 of 0.3 GB
PIECE = 1 << 22 # bytes of a text file that one process takes at a time
COMMIT_SECONDS = 5 # the most work that a kill costs
TEACHERS = {"bert": "bert", "gpt2": "data2vec2_text", "minilm": "minilm"} # --tokenizer -> its model
LICENCES = {"owt": "OpenWebText: CC0 for the packaging, not for the texts; texts of your own: as they say",
            "pydoc": "Python's documentation: PSF License Agreement"}

# -----------------------------------------------------------------------------
# the files of published tokenizers, and the reader

TOKENIZER_FILES = {"bert": ["vocab.txt"], "minilm": ["vocab.txt"],
                   "data2vec2_text": ["encoder.json", "vocab.bpe", "dict.txt"]}


def gpt2_tokenizer(encoder_json, vocab_bpe, dict_txt):
    """Paths of the three files that fairseq publishes -> the text that GPT2Tokenizer reads."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    os.environ["TIKTOKEN_CACHE_DIR"] = "" # or it reads copies that it keeps by path, also of a mended file
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json)
    with open(dict_txt, encoding="utf-8") as f:
        dictionary = [line.rpartition(" ")[0] for line in f if line.strip()]
    tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
    return json.dumps({"kind": "gpt2", "tokens": tokens, "dictionary": dictionary})


def load_tokenizer(name, path=None, weights_dir=None):
    """The tokeniser of a text teacher, "bert", "data2vec2_text" or "minilm", with .encode(texts, max_length)
    -> ids, padding_mask. path: a folder that holds its files, or a file beside which they lie; None takes
    those in weights_dir/NAME (default: the cache folder), where what is missing is downloaded once."""
    names, folder = TOKENIZER_FILES[name], os.path.join(weights_dir or cache_folder(), name)
    if path is None and not any(os.path.exists(os.path.join(folder, n)) for n in [*names, "tokenizer.json"]):
        path = package_folder(name)
    if path is not None:
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    present = os.listdir(folder) if os.path.isdir(folder) else []
    if name == "bert" and "tokenizer.json" in present and "vocab.txt" not in present:
        names = ["tokenizer.json"] # does as well
    source = PRETRAINED[name]["url"].rpartition("/")[0]
    for n in names:
        if path is None and n not in present:
            print(f"fetching {source}/{n}; licence: as of the weights, {PRETRAINED[name]['licence']}")
            download(f"{source}/{n}", os.path.join(folder, n))
    files = [os.path.join(folder, n) for n in names]
    try:
        if name == "data2vec2_text":
            return GPT2Tokenizer(gpt2_tokenizer(*files))
        with open(files[0], encoding="utf-8") as f:
            if names == ["tokenizer.json"]:
                return Tokenizer(f.read())
            vocab = {line.rstrip("\n"): i for i, line in enumerate(f)}
        text, settings = bert_tokenizer(vocab), os.path.join(folder, "tokenizer_config.json")
        cased = any(re.match("(##)?[A-Z]", token) for token in vocab)
        if os.path.exists(settings):
            with open(settings, encoding="utf-8") as f:
                cased = json.load(f).get("do_lower_case", not cased) is False
        if cased:
            text = json.loads(text)
            text["normalizer"]["lowercase"] = False
            text = json.dumps(text)
        return Tokenizer(text)
    except Exception as e: # tokenizers and tiktoken raise nothing more specific
        fail(f"no tokenizer of {name} ({type(e).__name__}: {e}): {' and '.join(TOKENIZER_FILES[name])} must "
             f"lie in {folder}, beside the weights, and be whole")


def load_text_encoder(which, weights_dir=None):
    """A text Encoder as model.load_encoder gives it, frozen, with its .tokenizer."""
    encoder = load_encoder(which, "text", weights_dir)
    name, path = split_name(which)
    if name:
        encoder.tokenizer = load_tokenizer(name, path, weights_dir)
        rows, size = encoder.config["vocab_size"], encoder.tokenizer.vocab_size
        if size > rows: # fewer are padding
            fail(f"{which}: a vocabulary of {size:,} tokens beside embeddings of {rows:,}: of other models")
    elif not hasattr(encoder, "tokenizer"):
        fail(f"{which} has no tokenizer: give a published text model or a checkpoint of distill_text.py")
    return encoder


def vocabulary(tokenizer):
    """(description, sha256, end token). The hash is of the tokens in the order of their ids, not of
    tokenizer.json, which the versions of the tokenizers package write differently."""
    if isinstance(tokenizer, GPT2Tokenizer):
        stored = json.loads(tokenizer.text)
        kind, tokens, end_id = "GPT-2 BPE", stored["tokens"] + stored["dictionary"], 2
    else:
        ids = tokenizer.tokenizer.get_vocab()
        kind, tokens, end_id = "WordPiece", sorted(ids, key=ids.get), ids["[SEP]"]
    sha256 = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
    return f"{kind} of {tokenizer.vocab_size:,} tokens (sha256 {sha256[:8]})", sha256, end_id


class Tokens:
    """One split of a prepared text: len(tokens) ids, tokens[a:b] -> (b - a,) int64; .meta, .end_id. Ends the
    program, naming the command to run, if the set is missing, not whole or of another vocabulary."""

    def __init__(self, data_dir, name, split, tokenizer):
        folder = os.path.join(os.path.expanduser(data_dir), name)
        data, _, kind = name.partition("_")
        advice = "Made here are owt_bert, owt_gpt2, pydoc_minilm and so on: python prepare_owt.py --help"
        if data in LICENCES and kind in TEACHERS:
            advice = f"Run: python prepare_owt.py --data={data} --tokenizer={kind} --data_dir={data_dir}"
        meta = pathlib.Path(folder, "meta.json")
        if not meta.exists():
            what = "is half-written" if os.path.isdir(folder) else "is not there"
            fail(f"data set {name}: {folder} {what} (no meta.json). {advice}")
        try:
            self.meta = json.loads(meta.read_bytes())
            made_with, sha256, splits = (self.meta[key] for key in ("vocabulary", "vocab_sha256", "splits"))
            if split not in splits:
                fail(f"data set {name} has no split {split!r}, only {', '.join(splits)}")
            self.path, self.length = os.path.join(folder, split + ".bin"), splits[split]["tokens"]
            if (size := os.path.getsize(self.path)) != 2 * self.length:
                raise ValueError(f"{self.path} has {size:,} bytes, not {2 * self.length:,}")
        except Exception as e: # json raises nearly anything on broken files
            fail(f"data set {name} is damaged: {type(e).__name__}: {e}. Remove {folder} first. {advice}")
        reads, reads_sha256, self.end_id = vocabulary(tokenizer)
        if reads_sha256 != sha256:
            fail(f"data set {name} was made with {made_with}, but the model reads {reads}. Take one made for "
                 f"it, as from: python prepare_owt.py --tokenizer={'gpt2' if reads[0] == 'G' else 'bert'}")

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        start, stop, step = where.indices(self.length)
        assert step == 1, where
        # no memory map: resident memory stays flat; opened each time: nothing for workers to share
        return np.fromfile(self.path, "<u2", max(stop - start, 0), offset=2 * start).astype(np.int64)


# -----------------------------------------------------------------------------
# where text comes from: a split is a list of pieces, each of them work for one process


class Piece(NamedTuple):
    kind: str # parquet, lines, file or pydoc
    path: str
    start: int # its bytes in the file; parquet: its row group
    end: int
    count: int = 1 # documents in it; those from first to last are wanted
    first: int = 0
    last: int = None


def documents(piece):
    """Yields all documents of a piece, as bytes."""
    if piece.kind == "pydoc":
        yield from pydoc_documents(piece.path)
    elif piece.kind == "parquet":
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            for batch in file.iter_batches(256, row_groups=[piece.start], columns=["text"]):
                # as bytes, since pyarrow refuses what is not UTF-8
                yield from (raw or b"" for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
    else:
        with open(piece.path, "rb") as f:
            f.seek(piece.start)
            data = f.read(piece.end - piece.start)
        for line in io.BytesIO(data) if piece.kind == "lines" else [data]:
            if piece.path.lower().endswith(".jsonl") and line.strip():
                try:
                    line = json.loads(line)["text"].encode("utf-8", "surrogatepass")
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f'a line is no {{"text": ".."}}: {line[:60]!r}') from None
            yield line


def share(pieces, low, high, part=0, parts=1):
    """Returns the pieces, cut to their documents that lie between the 21sts low and high of a corpus. pieces
    are the part-th of its `parts` equal parts (files, say): of 10 documents the first 6 of 21 are 0, 1, 2."""
    count = sum(p.count for p in pieces)

    def document(edge): # the first one behind this edge
        place = -(-count * (edge * parts - CHUNKS * part) // CHUNKS) # rounded up
        return min(max(place, 0), count)
    first, last = document(low), document(high)
    before, wanted = 0, []
    for p in pieces:
        start = max(first - before, 0)
        stop = min(last - before, p.count)
        if start < stop:
            wanted.append(p._replace(first=start, last=stop))
        before += p.count
    return wanted


def find_parquet(files, args, splits):
    """Takes all files, or, of files named train-00000-of-00080 and so on, those that hold the shares asked
    for: the others need not be there. Without any file these are downloaded."""
    try:
        from pyarrow import parquet
    except ImportError as e:
        fail(f"{e}, which reads parquet. Run: pip install pyarrow")
    numbers, total = dict(enumerate(files)), len(files) or 80
    matches = [re.search(r"([a-z]+)-(\d+)-of-(\d+)(-\w+)?\.parquet$", path) for path in files]
    if files and all(matches): # of other splits none must come into train
        train = [m for m in matches if m[1] == "train"]
        if len(train) < len(files):
            print(f"note: {len(files) - len(train)} files that are not of train are left out")
        numbers = {int(m[2]): m.string for m in train}
        totals = {int(m[3]) for m in train}
        if len(totals) != 1 or len(numbers) < len(train):
            fail(f"{args.source} holds no train-*.parquet, or more than one set of them: leave one")
        total, = totals
    found = {}
    for split, (low, high) in splits.items():
        found[split] = []
        for i in range(low * total // CHUNKS, -(-high * total // CHUNKS)):
            name = f"train-{i:05}-of-{total:05}.parquet"
            if files and i not in numbers:
                fail(f"{args.source} lacks {name}. Fetch it, or lower --train_chunks, --val_chunks")
            path = numbers.get(i, os.path.join(cache_folder(), "openwebtext", name))
            if not os.path.exists(path):
                print(f"fetching {URL}{name}, 0.3 GB", flush=True)
                download(URL + name, path)
            try:
                with parquet.ParquetFile(path) as file:
                    rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                    file.schema_arrow.field("text")
            except (ValueError, KeyError, OSError) as e: # pyarrow's own are among them
                fail(f"{path} cannot be read, or has no column \"text\": {e}. Half a download?")
            pieces = [Piece("parquet", path, g, g + 1, n) for g, n in enumerate(rows)]
            found[split] += share(pieces, low, high, i, total)
            if 0 < args.limit <= sum(p.last - p.first for p in found[split]):
                break # the rest is not needed, nor downloaded
    return f"{total} parquet files, {len(numbers) or 'none'} of them before", found


def find_texts(files, args, splits):
    """A document a line, in pieces of about PIECE bytes; a small .txt file in a folder is one document."""
    pieces = []
    for path in files:
        size = os.path.getsize(path)
        start, end, count = 0, 0, 0 # of the piece: its bytes, its lines
        if path.lower().endswith(".txt") and path != args.source and size <= PIECE:
            pieces.append(Piece("file", path, 0, size))
            continue
        with open(path, "rb") as f:
            for line in f:
                end, count = end + len(line), count + 1
                if end - start >= PIECE or end == size:
                    pieces.append(Piece("lines", path, start, end, count))
                    start, count = end, 0
    return f"{len(files):,} .jsonl or .txt files", {s: share(pieces, *edges) for s, edges in splits.items()}


def find(args):
    """What was found, in words, and {split: its pieces}."""
    splits = {"train": (0, args.train_chunks),
              "val": (args.train_chunks, args.train_chunks + args.val_chunks)}
    if args.data == "pydoc":
        found = {split: [Piece("pydoc", split, 0, 0)] for split in splits}
        return f"pydoc_data of Python {platform.python_version()}", found
    if not args.source:
        return find_parquet([], args, splits)
    files = [args.source]
    if os.path.isdir(args.source):
        files = sorted(os.path.join(here, name) for here, _, names in os.walk(args.source, followlinks=True)
                       for name in names if name[0] != ".")
    for pattern, layout in ((r".*\.parquet", find_parquet), (r"(?i:.*\.(jsonl|txt))", find_texts)):
        if found := [f for f in files if re.fullmatch(pattern, os.path.basename(f), re.S)]:
            return layout(found, args, splits)
    fail(f"--source={args.source} holds no text in a layout that --help lists; archives have to be unpacked")


def pydoc_documents(split):
    """Python's documentation, a document a topic, without markup and code. A seventh of the topics, by their
    hash, is val. Topics repeat one another: each paragraph is taken once, and none of val's is in train."""
    from pydoc_data.topics import topics
    held_out = {t for t in topics if hashlib.sha256(t.encode()).digest()[0] % 7 == 0}
    seen = {""}
    for topic in sorted(topics, key=lambda t: (t not in held_out, t)):
        lines = []
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            paragraph = re.sub(r"(?m)^\s*[*=~^-]{3,}$|^\s*\* ", " ", paragraph) # rulers under titles, bullets
            line = " ".join(re.sub(r"\*\*?(\w[^*\n]*)\*\*?", r"\1", paragraph).split())
            if line not in seen and not re.search(r">>>|::=|^\+-", line): # sessions, grammar, tables
                lines.append(line)
            seen.add(line)
        if (topic in held_out) == (split == "val"):
            yield "\n".join(lines).encode()


# -----------------------------------------------------------------------------
# from bytes to ids, and into the file

CLEANED = ("empty", "null_bytes", "invalid_utf8") # documents that were so
EMPTY_LINES = re.compile(r"\n\s*\n")
# a long text in parts, cut before a single blank, where both tokenisers give the ids of the whole: memory
# stays flat, and tiktoken does not meet the million blanks in a row on which it gives up
PARTS = re.compile(r"(?s).{262144}.{0,262144}?(?=(?<=\S)[ \n]\S)|.{1,262144}")


class Encode(torch.utils.data.Dataset):
    """Piece -> ids of its documents as bytes; tokens and characters of each; counts of what was cleaned; what
    is wrong or "". A Dataset, since a DataLoader whose "indices" are pieces does the rest, in order."""

    def __init__(self, tokenizer):
        self.end_id, self.table = vocabulary(tokenizer)[2], None
        if isinstance(tokenizer, GPT2Tokenizer):
            self.engine, self.table = tokenizer.bpe, np.full(tokenizer.bpe.n_vocab, 3, "<u2") # 3: <unk>
            self.table[list(tokenizer.from_gpt2)] = list(tokenizer.from_gpt2.values())
        else:
            self.engine = tokenizer.tokenizer
            self.engine.no_truncation()

    def ids(self, text):
        if self.table is not None:
            return self.table[self.engine.encode_to_numpy(text, disallowed_special=())]
        # a document that says [SEP] does not end there; set here, since a pickle for a worker drops it
        self.engine.encode_special_tokens = True
        # one by one: what the package keeps of a whole batch besides its ids outgrows the processor's cache
        return np.array(self.engine.encode_batch_fast([text], add_special_tokens=False)[0].ids, "<u2")

    def __getitem__(self, piece):
        parts, sizes, cleaned = [], [], dict.fromkeys(CLEANED, 0)
        end = np.array([self.end_id], "<u2")
        try:
            for raw in itertools.islice(documents(piece), piece.first, piece.last):
                text = raw.replace(b"\0", b"").decode("utf-8", "replace")
                cleaned["null_bytes"] += b"\0" in raw
                if "\ufffd" in text: # by this decoding, or before it
                    cleaned["invalid_utf8"] += text.count("\ufffd") > raw.count(b"\xef\xbf\xbd")
                text = EMPTY_LINES.sub("\n", text).strip()
                cleaned["empty"] += not text
                if text:
                    ids = [self.ids(part) for part in PARTS.findall(text)]
                    parts += [*ids, end]
                    sizes.append((sum(map(len, ids)) + 1, len(text)))
        except Exception as e: # pyarrow raises a dozen types for files that are cut short
            return b"", [], cleaned, f"{type(e).__name__}: {e}"
        return b"".join(part.tobytes() for part in parts), sizes, cleaned, ""


def start_worker(worker):
    """In a worker: one thread, and an end when the parent was killed, for which DataLoader's own watch waits
    until someone reads the results."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false" # there is a process for each core already


def write_split(path, pieces, encode, args, counts, save):
    """Appends to path what is missing by counts, an entry of meta.json; save() keeps counts for later."""
    whole = path.removesuffix(".tmp")
    if os.path.exists(whole): # it has its name, but then the run was killed
        os.replace(whole, path)
    if counts["documents"] == args.limit > 0: # before a kill
        return
    todo = pieces[counts["pieces"]:]
    saved = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = torch.utils.data.DataLoader(encode, sampler=todo, batch_size=None, worker_init_fn=start_worker,
                                         num_workers=min(args.num_workers or cores, len(todo)))
    with open(path, "ab") as file, progress(desc=os.path.basename(path), total=len(pieces), unit=" pieces",
                                            initial=counts["pieces"]) as bar:
        if file.tell() < 2 * counts["tokens"]:
            fail(f"{path} has lost its end. Remove {os.path.dirname(path)} to start again.")
        file.truncate(2 * counts["tokens"])
        for piece, (ids, sizes, cleaned, problem) in zip(todo, loader):
            if problem:
                fail(f"{piece.path} cannot be read, or not to its end: {problem}. Half a download? Put the "
                     "whole one there and give the same command again.")
            if args.limit:
                sizes = sizes[:args.limit - counts["documents"]]
            new = {"tokens": sum(n for n, _ in sizes), "characters": sum(n for _, n in sizes)}
            file.write(ids[:2 * new["tokens"]])
            for k, n in {**cleaned, **new, "pieces": 1, "documents": len(sizes)}.items():
                counts[k] += n
            bar.update()
            full = counts["documents"] == args.limit > 0
            if time.monotonic() - saved > COMMIT_SECONDS or full or counts["pieces"] == len(pieces):
                file.flush()
                os.fsync(file.fileno())
                save()
                saved = time.monotonic()
            if full:
                break


def prepare(folder, args, meta, tokenizer):
    """Makes the set, meta being what begun.json or the flags say of it."""
    layout, found = find(args)
    print(f"found {layout}")
    begun = os.path.join(folder, "begun.json")
    for split, pieces in found.items():
        counts = dict.fromkeys(("pieces", "documents", "tokens", "characters", *CLEANED), 0)
        # not of sizes: a file that was cut short may have been mended
        listed = [(os.path.basename(p.path), p.count, p.first, p.last) for p in pieces]
        source_hash = hashlib.sha256(repr(listed).encode()).hexdigest()
        entry = meta["splits"].setdefault(split, {"source_sha256": source_hash, **counts})
        if entry["source_sha256"] != source_hash:
            fail(f"the source has changed since {folder} was begun. Bring it back, or remove {folder}.")
    meta["layout"] = layout
    encode = Encode(tokenizer)
    for split in ("val", "train"): # the small one first: what is wrong shows early
        counts, path = meta["splits"][split], os.path.join(folder, split + ".bin.tmp")
        write_split(path, found[split], encode, args, counts, lambda: write_json(begun, meta))
        if not counts["documents"]:
            fail(f"no text for {split} ({layout}; {counts['empty']:,} empty documents). Give more")
    for split in found:
        os.replace(os.path.join(folder, split + ".bin.tmp"), os.path.join(folder, split + ".bin"))
    write_json(os.path.join(folder, "meta.json"), meta)
    for path in glob.glob(glob.escape(begun) + "*"): # also what a kill left of writing it
        os.remove(path)
    print(f"wrote {folder}; licence: {meta['license']}")


# -----------------------------------------------------------------------------


def get_args(argv=None):
    p = Parser(__doc__)
    p.knob("data", "owt", "owt: OpenWebText or the texts in --source; pydoc: English that Python carries",
           choices=list(LICENCES))
    p.knob("data_dir", "data", "folder of all prepared data sets; this one goes to DATA_DIR/DATA_TOKENIZER")
    p.knob("tokenizer", None, "whose ids: bert (if owt), gpt2 (BPE as data2vec 2.0 reads it) or minilm (if "
           "pydoc: BERT's vocabulary out of a package); NAME:PATH takes its files from there")
    p.knob("weights_dir", cache_folder(), "published weights are looked for as WEIGHTS_DIR/NAME/<file>, and "
           "downloaded to there")
    p.knob("source", None, "folder or file with the texts, in a layout above; it is only read. Without it, "
           f"what is needed comes from {URL}")
    p.knob("train_chunks", 6, "21sts of the documents for training, from the start", least=1, most=CHUNKS - 1)
    p.knob("val_chunks", 1, "21sts of the documents for validation, right after", least=1, most=CHUNKS - 1)
    p.knob("limit", 0, "documents of each split at most, for a trial; 0: all")
    p.knob("num_workers", 0, "processes that read, clean and encode; 0: one a core. The result is the same")
    return p.parse(argv)


def main(args):
    kind, _, path = (args.tokenizer or {"owt": "bert", "pydoc": "minilm"}[args.data]).partition(":")
    if kind not in TEACHERS:
        fail(f"--tokenizer={args.tokenizer} is none of {', '.join(TEACHERS)}")
    if args.data == "pydoc" and (unread := {"source", "train_chunks", "val_chunks"} & set(args.given)):
        fail(f"--{', --'.join(sorted(unread))}: for --data=owt, not for pydoc")
    if args.train_chunks + args.val_chunks > CHUNKS:
        fail(f"--train_chunks={args.train_chunks} and --val_chunks={args.val_chunks}: {CHUNKS} is all")
    if args.source and not os.path.exists(args.source):
        fail(f"--source={args.source} is not there; --help says what it is")
    tokenizer = load_tokenizer(TEACHERS[kind], os.path.expanduser(path) or None, args.weights_dir)
    if tokenizer.vocab_size > 1 << 16:
        fail(f"the tokenizer has {tokenizer.vocab_size:,} tokens, and ids of two bytes are enough for 65,536")
    name = f"{args.data}_{kind}"
    folder = os.path.join(args.data_dir, name)
    done = os.path.join(folder, "meta.json")
    words, sha256, end_id = vocabulary(tokenizer)
    options = {"vocabulary": words, "source": os.path.realpath(args.source) if args.source else None,
               **{k: getattr(args, k) for k in ("train_chunks", "val_chunks", "limit")}}
    new = {"data": args.data, "made_by": "prepare_owt.py", "license": LICENCES[args.data], "tokenizer": kind,
           "vocab_size": tokenizer.vocab_size, "vocab_sha256": sha256, "end_id": end_id, **options,
           "splits": {}}
    if os.path.exists(done):
        print(f"{folder} is already prepared; remove it to do it again")
    else:
        with lock(os.path.join(folder, "lock"), folder), going_on(folder):
            begun = prepared(folder, args, options)
            if not os.path.exists(done): # by now, another process may have made it
                prepare(folder, args, begun or new, tokenizer)
    meta = prepared(folder, args, options)
    columns = ("documents", "tokens", "characters", *CLEANED)
    print(f"{'split':6}" + "".join(f"{k:>15}" for k in columns) + f"{'GB':>8}")
    for split, c in meta["splits"].items():
        print(f"{split:6}" + "".join(f"{c[k]:>15,}" for k in columns) + f"{2 * c['tokens'] / 1e9:>8.3f}")
    preset = {"bert": "bert", "gpt2": "data2vec2", "minilm": "tiny"}[kind]
    print(f"next: python distill_text.py --preset={preset} --data={name} --data_dir={args.data_dir}")


if __name__ == "__main__":
    main(get_args())
