"""Text to token tensors and back: tokenizers, corpora, batches.

    python data.py openwebtext                # the paper's corpus, split and blocks
    python data.py FOLDER --tokenizer gpt2    # text, JSONL or parquet, ahead of a run

Every tokenizer is a `tiktoken.Encoding`: `gpt2`; `bytes`; `dream`; and `stdlib`, a
byte-level BPE of 2,048 entries learned from the embedded corpus, the Python standard library's own
source. A corpus is a folder of `train.bin`, `val.bin` and `meta.json`, made once and memory-mapped
after that; making it takes all cores and little memory, and goes on where it was stopped.
"""

import argparse
import base64
import codecs
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import tokenizers
import torch
from torch import Tensor

from runtime import Parser, atomic_write, locked, progress, run, writable_folder

END_OF_TEXT = "<|endoftext|>"
MASK_TEXT = "[MASK]"
BPE_ENTRIES = 2048
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DREAM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURN, TURN_ENDS, DREAM_MASK = "<|im_start|>", "<|im_end|>", "<|mask|>"
DREAM_SPECIAL = (  # their ids follow the vocabulary's, in this order
    f"{END_OF_TEXT} {TURN} {TURN_ENDS} <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    f"<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <|beginoftext|> {DREAM_MASK}"
).split()
HELD_OUT = 20  # one document in 20 is held out
OPENWEBTEXT, HELD_OUT_OPENWEBTEXT = "Skylion007/openwebtext", 100_000
PIECE = 2**22  # characters of text, or tokens, in memory at a time
SAVE_SECONDS = 20  # of tokenizing that a kill may cost
LEFT_OUT = {
    *"test tests idlelib idle_test encodings site-packages dist-packages ensurepip lib2to3".split(),
    *"pydoc_data turtledemo __pycache__ _vendor".split(),
}


# Tokenizers


def bytes_tokenizer() -> tiktoken.Encoding:
    """256 bytes and end-of-text; needs nothing."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
    )


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50,257 tokens, from tiktoken's cache or the network; ValueError where neither is."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets its HTTP client's own errors through
        raise ValueError(
            "--tokenizer gpt2: its vocabulary is not cached and could not be downloaded "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that "
            "holds it, or choose --tokenizer stdlib or bytes"
        ) from None


def learn_bpe(texts: Iterable[str], entries: int = BPE_ENTRIES) -> tiktoken.Encoding:
    """A byte-level BPE of `entries` tokens, the last one end-of-text, learned from the texts."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=entries - 1, initial_alphabet=alphabet, show_progress=False
        ),
    )
    vocab = learner.get_vocab()
    return _learned(_as_bytes(sorted(vocab, key=vocab.get)))


def _as_bytes(words: Iterable[str]) -> list[bytes]:
    """The bytes of words in byte-level BPE's spelling; KeyError where a character is not of it."""
    # It writes a byte as a printable character: itself, or the next one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
    return [bytes(byte_of[c] for c in word) for word in words]


def _learned(words: list[bytes]) -> tiktoken.Encoding:
    """The learned tokenizer of these words, in the order of their ranks."""
    return tiktoken.Encoding(
        "stdlib",
        pat_str=GPT2_SPLIT,
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={END_OF_TEXT: len(words)},
    )


def dream_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """Dream's tokenizer, which is Qwen2.5's and a mask, from the two files in a folder.

    FileNotFoundError or ValueError where vocab.json or merges.txt is missing or damaged.
    """
    folder = Path(folder).absolute()
    vocab, lines = read_whole(folder / "vocab.json"), read_whole(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    try:
        word_of = {token: word for word, token in vocab.items()}
        words = _as_bytes(word_of[token] for token in range(len(vocab)))
        merged = _as_bytes(line.replace(" ", "", 1) for line in merges)
    except (AttributeError, KeyError, TypeError):
        words = merged = []
    # tiktoken merges by rank: the same BPE only where ids are in the order of the merges.
    if set(words[:256]) != {bytes([b]) for b in range(256)} or words[256:] != merged:
        raise ValueError(
            f"{folder / 'vocab.json'} and merges.txt do not belong together: ids are to be 256 "
            "bytes and then the merges in order; fetch both again"
        )
    tokenizer = tiktoken.Encoding(
        "dream",
        pat_str=DREAM_SPLIT,
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={text: len(words) + i for i, text in enumerate(DREAM_SPECIAL)},
    )
    tokenizer.folder = str(folder)
    return tokenizer


def read_whole(file: Path):
    """The text of a file, or the value in it where it is JSON; ValueError where it is damaged."""
    try:
        text = file.read_text("utf-8")
        return json.loads(text) if file.suffix == ".json" else text
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not text or not JSON, or cut short; fetch it again") from None


def tokenizer_spec(tokenizer: tiktoken.Encoding) -> dict:
    """A plain description that `load_tokenizer` turns back into the tokenizer; JSON-able."""
    if tokenizer.name == "dream":
        return {"name": "dream", "folder": tokenizer.folder}
    if tokenizer.name != "stdlib":
        return {"name": tokenizer.name}
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    words = [base64.b64encode(word).decode() for word, _ in ranks]
    return {"name": "stdlib", "words": words}


def load_tokenizer(spec: dict) -> tiktoken.Encoding:
    """The tokenizer of a spec: its name, and Dream's folder or a learned one's words."""
    name = spec["name"]
    if name == "dream":
        return dream_tokenizer(spec["folder"])
    if name == "stdlib":
        return _learned([base64.b64decode(word) for word in spec["words"]])
    if name not in ("bytes", "gpt2"):
        raise ValueError(f"--tokenizer {name}: choose stdlib, gpt2 or bytes")
    return bytes_tokenizer() if name == "bytes" else gpt2_tokenizer()


def mask_id(tokenizer: tiktoken.Encoding) -> int:
    """The mask: a special token of Dream's, for the others the id after the vocabulary."""
    return tokenizer._special_tokens.get(DREAM_MASK, tokenizer.n_vocab)


def vocab_size(tokenizer: tiktoken.Encoding) -> int:
    """The ids there are, the mask as the last; Dream's network has some more that stand unused."""
    return mask_id(tokenizer) + 1


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Text to ids, for Dream in Unicode's form NFC; text that spells a special token is text.

    ValueError where tiktoken gives up.
    """
    return encode_array(tokenizer, text).tolist()


def encode_array(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """`encode` as an array of uint32, made without Python's lock: threads run side by side."""
    if tokenizer.name == "dream":
        text = unicodedata.normalize("NFC", text)
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        raise ValueError("a text that is not UTF-8") from None
    except BaseException as error:  # its panics are no Exceptions
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("a run of white space too long for the tokenizer; shorten it") from None


def decode(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Ids to text; the mask shows as [MASK], bytes that are no UTF-8 and unused ids as U+FFFD."""
    mask = mask_id(tokenizer)

    def piece(token: int) -> bytes:
        if token == mask:
            return MASK_TEXT.encode()
        try:
            return tokenizer.decode_single_token_bytes(token)
        except KeyError:
            return "\ufffd".encode()

    return b"".join(map(piece, map(int, ids))).decode("utf-8", errors="replace")


def token_bytes(tokenizer: tiktoken.Encoding) -> Tensor:
    """(V,) the UTF-8 bytes that each token stands for; 0 for special tokens and the mask."""
    sizes = [0] * vocab_size(tokenizer)
    for word, token in tokenizer._mergeable_ranks.items():
        sizes[token] = len(word)
    return torch.tensor(sizes)


# Texts: documents, in pieces that fit in memory


@dataclass
class Source:
    """Where a corpus comes from: files under a root, or (`hub`) a data set of the hub."""

    name: str
    root: Path
    files: list[Path]
    hub: str | None = None

    def fingerprint(self) -> str:
        """A hash of every file's path, size and time of change, or of the data set's name."""
        h = hashlib.sha256((self.hub or "").encode())
        for file in self.files:
            stat = file.stat()
            h.update(
                f"{file.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
            )
        return h.hexdigest()


class Piece(NamedTuple):
    """A document or a part of one; `ends` where it is the document's last."""

    split: str
    text: str
    ends: bool = True


class Reader:
    """The pieces of a source in order. `state()` is the place after the last one, for a new Reader.

    `split` says what is for validation: "documents", one in HELD_OUT by a hash of its path or
    number; "ends", the last HELD_OUT-th of each document, for a source of few; or a number, that
    of the last documents, which whoever reads to the end takes off: here all is for training.
    """

    def __init__(self, source: Source, split: str | int, state=None):
        self.source, self.split = source, split
        self.file, self.done = state if state and not source.hub else (0, 0)
        self.stream = _hub_stream(source.hub, state) if source.hub else None

    def state(self):
        return self.stream.state_dict() if self.stream else (self.file, self.done)

    def __iter__(self) -> Iterator[Piece]:
        if self.stream:
            yield from self._from_hub()
        while self.file < len(self.source.files):
            for piece in islice(self._from_file(self.source.files[self.file]), self.done, None):
                self.done += 1
                yield piece
            self.file, self.done = self.file + 1, 0

    def _from_hub(self) -> Iterator[Piece]:
        try:
            for row in self.stream:
                yield Piece("train", row["text"])
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"{self.source.hub}: reading stopped ({type(error).__name__}: {error}); "
                "the same command goes on from there"
            ) from None

    def _from_file(self, file: Path) -> Iterator[Piece]:
        name = str(file.relative_to(self.source.root))
        if file.suffix not in (".jsonl", ".parquet"):
            size = file.stat().st_size
            cut = _character_start(file, size - size // HELD_OUT) if self.split == "ends" else size
            split = "val" if self.split == "documents" and held_out(name) else "train"
            for text, last in _read_text(file, 0, cut):
                yield Piece(split, text, last)
            for text, last in _read_text(file, cut, size):
                yield Piece("val", text, last)
            return
        rows = _jsonl_texts(file) if file.suffix == ".jsonl" else _parquet_texts(file)
        for i, text in rows:
            if self.split == "ends":
                end = len(text) - len(text) // HELD_OUT
                yield from (Piece("train", text[:end]), Piece("val", text[end:]))
            else:
                val = self.split == "documents" and held_out(f"{name}:{i}")
                yield Piece("val" if val else "train", text)


def held_out(key: str) -> bool:
    """Whether a document is for validation: one in HELD_OUT, by a hash of its path or number."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT == 0


def _read_text(file: Path, start: int, end: int) -> Iterator[tuple[str, bool]]:
    """The bytes from start to end as text in pieces, with True at the last one.

    A piece ends with a line, between two characters that are not white space: no tokenizer's
    pattern looks across such a place, so that the pieces' tokens are those of the whole.
    """
    decoder, text, at = codecs.getincrementaldecoder("utf-8")(), "", start
    with open(file, "rb") as f:
        f.seek(start)
        while at < end:
            block = f.read(min(PIECE, end - at))
            at = at + len(block) if block else end  # it may have been cut short meanwhile
            try:
                text += decoder.decode(block, final=at == end)
            except UnicodeDecodeError as error:
                where = at - len(block) + error.start
                raise ValueError(f"{file}: not UTF-8 text (near byte {where})") from None
            if at == end:
                break
            tail = max(0, len(text) - 2**16)
            cuts = [m.end() for m in re.finditer(r"\S\n(?=\S)", text[tail:])]
            if cuts or len(text) > 8 * PIECE:  # a line without an end is cut anywhere
                cut = tail + cuts[-1] if cuts else len(text) - 1
                yield text[:cut], False
                text = text[cut:]
    if text:
        yield text, True


def _character_start(file: Path, at: int) -> int:
    """The first byte from `at` on that starts a UTF-8 character."""
    with open(file, "rb") as f:
        f.seek(at)
        return at + next((i for i, b in enumerate(f.read(4)) if b & 0xC0 != 0x80), 0)


def _jsonl_texts(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as lines:
        for i, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8-sig"))["text"]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f'{file}:{i}: not a JSON object with a "text" string') from None
            yield i, text


def _parquet_texts(file: Path) -> Iterator[tuple[int, str]]:
    i = 0
    with open_parquet(file, "text") as table:
        for batch in table.iter_batches(64, columns=["text"]):
            for text in batch.column(0).to_pylist():
                i += 1
                if text is not None and not isinstance(text, str):
                    raise ValueError(f'{file}: its column "text" holds no text')
                yield i, text or ""


@contextlib.contextmanager
def open_parquet(file: Path, column: str) -> Iterator:
    """pyarrow's ParquetFile with this column; ValueError where it is none or cannot be read."""
    try:
        from pyarrow import ArrowException, parquet  # optional, and it comes with `datasets`
    except ImportError:
        raise ValueError(f"{file}: parquet is read by pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise ValueError(f'{file}: no column "{column}" in {table.schema_arrow.names}')
            yield table
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not parquet that can be read: {reason}") from None


class Unreachable(ValueError):
    """The hub cannot be reached, or refuses."""


def load_hub(name: str, config: str | None, instead: str, **options):
    """A data set of the hub, by the package datasets; `instead` tells what else can be done.

    ValueError where there is none of that name, or no such package; Unreachable.
    """
    try:
        from datasets import exceptions, load_dataset  # optional
    except ImportError:
        raise ValueError(
            f"{name} is fetched by the package datasets: pip install datasets; {instead}"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of each retry
    try:
        return load_dataset(name, config, **options)
    except (ValueError, exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"{name}: no file, folder or data set of the hub ({_reason(error)})"
        ) from None
    except Exception as error:  # the client's own errors, and those of the network under it
        raise Unreachable(
            f"{name}: cannot be fetched from the hub ({_reason(error)}); {instead}"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _hub_stream(repository: str, state: dict | None):
    """The rows of a data set of the hub, as `datasets` streams them, from a state of it on."""
    instead = "or fetch its parquet files and name their folder"
    stream = load_hub(repository, None, instead, split="train", streaming=True)
    if state:
        stream.load_state_dict(state)
    return stream


def stdlib_source() -> Source:
    """The embedded corpus: the source of the Python standard library on this machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not LEFT_OUT & set(f.relative_to(root).parts)]
    files = [f for f in files if _is_utf8(f)]
    if not files:
        raise ValueError(f"{root}: no source of the standard library here; name a text with --data")
    return Source("stdlib", root, files)


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def find_source(data: str | None) -> Source:
    """What --data names: None the standard library, "openwebtext" the paper's corpus, else a file
    or a folder of text, JSONL or parquet ("text" fields) or source code."""
    if data is None:
        return stdlib_source()
    root = Path(data)
    if data == "openwebtext" and not root.exists():
        return Source("openwebtext", root, [], hub=OPENWEBTEXT)
    if not data or not root.exists():
        raise FileNotFoundError(f"--data {data}: no such file or folder")
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    if root.is_dir():
        files = [f for f in files if f.suffix in (".txt", ".jsonl", ".parquet", ".md", ".py")]
    if not files:
        raise ValueError(f"--data {data}: no .txt, .jsonl, .parquet, .md or .py file in it")
    name = f"{root.resolve().name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}"
    return Source(name, root if root.is_dir() else root.parent, files)


def default_tokenizer(data: str | None) -> str:
    return "gpt2" if data == "openwebtext" else "stdlib"


# Corpora


class Corpus:
    """A tokenized corpus: two streams of ids, memory-mapped, each document ended by end-of-text.

    A block of L tokens is a window of the stream; or, where meta["blocks"] is "wrapped", as in
    MDLM's training, end-of-text, L - 2 tokens of the stream cut in order, and end-of-text.
    """

    def __init__(self, folder: Path, tokenizer: tiktoken.Encoding, meta: dict):
        self.folder, self.tokenizer, self.meta = folder, tokenizer, meta
        self.wrapping = 1 if meta["blocks"] == "wrapped" else 0  # tokens around a block
        # Mapped once: a corpus that is built again meanwhile does not change under a run.
        self.streams = {split: self._map(split) for split in ("train", "val")}

    def _map(self, split: str) -> np.ndarray:
        if not self.meta["tokens"][split]:  # an empty file cannot be mapped
            return np.zeros(0, self.meta["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def holds(self, split: str, length: int) -> bool:
        """Whether a block of `length` tokens is possible, and the split has one."""
        return 1 <= length - 2 * self.wrapping <= len(self.streams[split])

    def need(self, split: str, length: int) -> None:
        """ValueError where the split does not hold one block of `length` tokens."""
        if not self.holds(split, length):
            have = len(self.streams[split])
            raise ValueError(
                f"{self.meta['source']}: its {split} part has {have} tokens, a block takes {length}"
                "; use more text or another --block-size"
            )

    def batch(self, n: int, length: int, g: torch.Generator) -> Tensor:
        """n training blocks (n, length) at places drawn from g, int64."""
        inner = length - 2 * self.wrapping
        have = len(self.streams["train"])
        places = have // inner if self.wrapping else have - inner + 1
        starts = torch.randint(places, (n,), generator=g).numpy()
        return self._cut("train", starts * inner if self.wrapping else starts, inner)

    def blocks(self, split: str, length: int, limit: int | None = None) -> Tensor:
        """The split cut into whole blocks (n, length) in order; `limit` of them, evenly spread."""
        inner = length - 2 * self.wrapping
        n = len(self.streams[split]) // inner
        picks = np.arange(n) if not limit or limit >= n else np.arange(limit) * n // limit
        return self._cut(split, picks * inner, inner)

    def _cut(self, split: str, starts: np.ndarray, inner: int) -> Tensor:
        stream = self.streams[split]
        ids = np.empty((len(starts), inner + 2 * self.wrapping), np.int64)
        ids.fill(self.tokenizer.eot_token)
        for row, i in zip(ids, starts, strict=True):
            row[self.wrapping : self.wrapping + inner] = stream[i : i + inner]
        return self._checked(ids)

    def _checked(self, ids: np.ndarray) -> Tensor:
        if ids.size and ids.max() >= mask_id(self.tokenizer):
            raise ValueError(f"{self.folder}: damaged; delete it, and it is built again")
        return torch.from_numpy(ids)

    def documents(self, split: str) -> np.ndarray:
        """(n + 1,) where the n documents of a split start, and where the last one ends; the
        end-of-text after a document is its last token."""
        stream, eot = self.streams[split], self.tokenizer.eot_token
        pieces = range(0, len(stream), PIECE)
        ends = [np.flatnonzero(stream[i : i + PIECE] == eot) + i + 1 for i in pieces]
        edges = np.concatenate([np.zeros(1, np.int64), *ends])
        return edges if edges[-1] == len(stream) else np.append(edges, len(stream))

    def spans(self, split: str, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        """The tokens from starts (n,) to stops (n,), int64 (n, longest); on the right of the
        shorter ones there is end-of-text."""
        at = starts[:, None] + np.arange((stops - starts).max())  # (n, longest)
        inside = at < stops[:, None]
        ids = self.streams[split][np.where(inside, at, 0)].astype(np.int64)
        return self._checked(np.where(inside, ids, self.tokenizer.eot_token))


def open_corpus(
    data: str | None,
    tokenizer: dict | str | None,
    cache: str = "corpora",
    blocks: str | None = None,
    split: str | int | None = None,
) -> Corpus:
    """The corpus of --data (see `find_source`) in a tokenizer, built if not cached.

    `tokenizer` is a name, or the spec in a checkpoint; `blocks` is "windows" or "wrapped" and
    `split` as in `Reader`; None takes a corpus as it is there, and else the paper's form for
    OpenWebText and windows for others. A corpus whose sources or tokenizer have changed since is
    built again. ValueError or OSError that names what is wrong.
    """
    source = find_source(data)
    spec = tokenizer if isinstance(tokenizer, dict) else {"name": tokenizer}
    spec = spec if spec["name"] else {"name": default_tokenizer(data)}
    if spec["name"] == "dream":
        raise ValueError("a Dream model is not trained or scored on a corpus here; name another")
    if spec["name"] not in ("stdlib", "gpt2", "bytes"):
        raise ValueError(f"--tokenizer {spec['name']}: choose stdlib, gpt2 or bytes")
    if source.hub:
        blocks, split = blocks or "wrapped", HELD_OUT_OPENWEBTEXT if split is None else split
    fingerprint, form = source.fingerprint(), (blocks, split)
    folder = Path(cache) / f"{source.name}-{spec['name']}"
    corpus = _open(folder, fingerprint, spec, *form)
    if corpus is None and "words" in spec:  # learned elsewhere: beside the one learned here
        learned = hashlib.sha256(json.dumps(spec["words"]).encode()).hexdigest()[:8]
        folder = folder.with_name(f"{folder.name}-{learned}")
        corpus = _open(folder, fingerprint, spec, *form)
    if corpus is None:
        writable_folder(str(folder), "--cache")
        with locked(folder):  # another process may have built it while this one waited
            corpus = _open(folder, fingerprint, spec, *form)
            corpus = corpus or _build(source, spec, folder, *form)
    return corpus


def _open(folder: Path, fingerprint: str, spec: dict, blocks, split) -> Corpus | None:
    """The corpus in a folder where it is whole, of this source, tokenizer and form, else None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        for part in ("train", "val"):
            whole = (folder / f"{part}.bin").stat().st_size == meta["tokens"][part] * size
            if not whole or not isinstance(meta["bytes"][part], int):
                return None
        same = meta["fingerprint"] == fingerprint and isinstance(meta["source"], str)
        same = same and blocks in (None, meta["blocks"]) and split in (None, meta["split"])
        if not same or meta["tokenizer"] != spec | meta["tokenizer"]:
            return None
        return Corpus(folder, load_tokenizer(meta["tokenizer"]), meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(source: Source, spec: dict, folder: Path, blocks, split) -> Corpus:
    if spec["name"] == "stdlib" and "words" not in spec:
        pieces = Reader(stdlib_source(), "documents")
        tokenizer = learn_bpe(piece.text for piece in pieces if piece.split == "train")
    else:
        tokenizer = load_tokenizer(spec)
    (folder / "meta.json").unlink(missing_ok=True)  # it is written last: without it, build again
    few = len(source.files) < HELD_OUT
    few = few and all(f.suffix not in (".jsonl", ".parquet") for f in source.files)
    splits = [split] if split is not None else ["ends"] if few else ["documents", "ends"]
    place = source.hub or (source.files[0] if len(source.files) == 1 else source.root)
    meta = {
        "source": str(place),
        "fingerprint": source.fingerprint(),
        "tokenizer": tokenizer_spec(tokenizer),
        "blocks": blocks or "windows",
        "dtype": "uint16" if vocab_size(tokenizer) <= 2**16 else "uint32",
    }
    for rule in splits:
        meta["split"] = rule
        meta["tokens"] = _write_streams(source, tokenizer, folder, meta)
        if all(meta["tokens"].values()):  # by chance no document may be held out
            break
    if not meta["tokens"]["train"]:
        raise ValueError(f"{place}: no text in it" + (" to train on" if split else ""))
    corpus = Corpus(folder, tokenizer, meta)
    sizes = token_bytes(tokenizer).numpy()
    meta["bytes"] = {
        part: sum(int(sizes[stream[i : i + PIECE]].sum()) for i in range(0, len(stream), PIECE))
        for part, stream in corpus.streams.items()
    }
    with atomic_write(folder / "meta.json", "w") as f:
        json.dump(meta, f)
    (folder / "progress.json").unlink(missing_ok=True)
    return corpus


def _write_streams(source: Source, tokenizer, folder: Path, meta: dict) -> dict[str, int]:
    """Write train.bin and val.bin, or go on with them; returns the tokens of each.

    `progress.json` says how many tokens are in them for good and where the reading stands.
    """
    state = {"of": meta, "tokens": {"train": 0, "val": 0}, "place": None, "finished": False}
    state = json.loads(json.dumps(state))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found, check = json.loads((folder / "progress.json").read_text())
        if found["of"] == state["of"] and check == _checksum(found):
            state = found
    tokens, size = state["tokens"], np.dtype(meta["dtype"]).itemsize
    if not any(tokens.values()):
        for split in tokens:  # a new file: a run may still have the old one mapped
            (folder / f"{split}.bin").unlink(missing_ok=True)
    with ExitStack() as stack:
        out = {s: stack.enter_context(open(folder / f"{s}.bin", "a+b")) for s in tokens}
        for split, file in out.items():
            if file.seek(0, os.SEEK_END) < tokens[split] * size:
                (folder / "progress.json").unlink()
                return _write_streams(source, tokenizer, folder, meta)  # damaged: from the start
            file.truncate(tokens[split] * size)

        def save() -> None:
            for file in out.values():
                file.flush()
                os.fsync(file.fileno())
            with atomic_write(folder / "progress.json", "w") as f:
                json.dump([state, _checksum(state)], f)

        try:
            if not state["finished"]:
                _tokenize(source, tokenizer, meta, state, out, save)
            if isinstance(meta["split"], int) and not tokens["val"]:
                cut = _documents_start(folder / "train.bin", meta, tokenizer.eot_token)
                out["train"].seek(cut * size)
                shutil.copyfileobj(out["train"], out["val"], PIECE)
                tokens.update(train=cut, val=tokens["train"] - cut)
                save()
                out["train"].truncate(cut * size)
        except OSError as error:
            if error.errno is None or error.filename:
                raise
            raise OSError(
                f"{folder}: cannot be written ({error.strerror}); make room, and the same command "
                "goes on from there"
            ) from None
    return tokens


def _checksum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _tokenize(source, tokenizer, meta: dict, state: dict, out: dict, save: Callable) -> None:
    """Append the pieces' tokens to the files `out`, all cores at work; save now and then."""
    reader = Reader(source, meta["split"], state["place"])
    tokens, begin = state["tokens"], time.perf_counter()
    at, saved = sum(tokens.values()), begin
    ending = np.array([tokenizer.eot_token], meta["dtype"]).tobytes()

    def encoded(piece: Piece) -> np.ndarray:
        return encode_array(tokenizer, piece.text)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(desc=f"tokenizing {source.name}", unit=" documents") as bar,
    ):
        for pieces in _batches(reader):
            try:
                arrays = list(pool.map(encoded, pieces))
            except ValueError as error:
                raise ValueError(f"{source.root}: {error}") from None
            for piece, ids in zip(pieces, arrays, strict=True):
                out[piece.split].write(ids.astype(meta["dtype"]).tobytes())
                tokens[piece.split] += len(ids)
                if piece.ends:
                    out[piece.split].write(ending)
                    tokens[piece.split] += 1
            bar.update(sum(piece.ends for piece in pieces))
            now = time.perf_counter()
            rate = (sum(tokens.values()) - at) / (now - begin)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s")
            if now - saved > SAVE_SECONDS:
                state["place"], saved = reader.state(), now
                save()
    state.update(place=None, finished=True)
    save()
    done, seconds = sum(tokens.values()) - at, time.perf_counter() - begin
    if seconds > 2:
        print(
            f"tokenized {done:,} tokens in {seconds:.0f} s on {os.cpu_count()} cores: "
            f"{done / seconds:,.0f} tokens per second",
            file=sys.stderr,
        )


def _batches(reader: Reader) -> Iterator[list[Piece]]:
    """The pieces that are not empty, some PIECE characters at a time."""
    batch, size = [], 0
    for piece in reader:
        if piece.text:
            batch.append(piece)
            size += len(piece.text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents_start(file: Path, meta: dict, eot: int) -> int:
    """Where the last meta["split"] documents of a stream start: after the end-of-text before."""
    stream = np.memmap(file, meta["dtype"], "r") if file.stat().st_size else np.zeros(0)
    left, end = meta["split"] + 1, len(stream)
    while end > 0 and left > 0:
        start = max(0, end - PIECE)
        ends = np.flatnonzero(stream[start:end] == eot)
        if len(ends) >= left:
            return start + int(ends[-left]) + 1
        left, end = left - len(ends), start
    raise ValueError(
        f"{meta['source']}: no more than the {meta['split']} documents to hold out; "
        "hold out fewer (--held-out)"
    )


def main(args: argparse.Namespace) -> None:
    if args.held_out is not None and args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out}: at least one document")
    corpus = open_corpus(args.data, args.tokenizer, args.cache, args.blocks, args.held_out)
    tokens, sizes = corpus.meta["tokens"], corpus.meta["bytes"]
    print(
        f"{corpus.folder}: tokenizer {corpus.tokenizer.name}, {vocab_size(corpus.tokenizer)} ids, "
        f"{corpus.meta['blocks']}, held out: {corpus.meta['split']}"
    )
    for split in ("train", "val"):
        rate = sizes[split] / max(1, tokens[split])
        print(
            f"{split:5} {tokens[split]:>14,} tokens {sizes[split]:>16,} bytes, {rate:.2f} a token"
        )


if __name__ == "__main__":
    p = Parser(description="Tokenize a corpus.")
    p.add_argument("data", nargs="?", help="openwebtext, a file, a folder; else: standard library")
    p.add_argument("--tokenizer", help="stdlib, gpt2 or bytes; default: stdlib; openwebtext: gpt2")
    p.add_argument("--blocks", choices=("windows", "wrapped"), help="default: openwebtext: wrapped")
    p.add_argument("--held-out", type=int, help="the last so many documents are for validation")
    p.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    run(main, p.parse_args())
