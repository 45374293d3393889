"""Text to token tensors and back: tokenizers, corpora, batches.

    python data.py --data PATH --tokenizer gpt2    # tokenize ahead of a run

Every tokenizer is a `tiktoken.Encoding`: `gpt2`; `bytes`; and `stdlib`, a byte-level BPE of 2,048
entries learned from the embedded corpus, the Python standard library's own source. A corpus is a
folder of `train.bin`, `val.bin` and `meta.json`, made once and memory-mapped after that.
"""

import argparse
import base64
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
HELD_OUT = 20  # one document in 20 is held out
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "encodings",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
    "__pycache__",
    "_vendor",
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
    # ByteLevel writes a byte as a printable character: itself, or the next one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
    by_rank = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    words = [bytes(byte_of[c] for c in word) for word, _ in by_rank]
    return _learned(words)


def _learned(words: list[bytes]) -> tiktoken.Encoding:
    """The learned tokenizer of these words, in the order of their ranks."""
    return tiktoken.Encoding(
        "stdlib",
        pat_str=GPT2_SPLIT,
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={END_OF_TEXT: len(words)},
    )


def tokenizer_spec(tokenizer: tiktoken.Encoding) -> dict:
    """A plain description that `load_tokenizer` turns back into the tokenizer; JSON-able."""
    if tokenizer.name != "stdlib":
        return {"name": tokenizer.name}
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    words = [base64.b64encode(word).decode() for word, _ in ranks]
    return {"name": "stdlib", "words": words}


def load_tokenizer(spec: dict) -> tiktoken.Encoding:
    """The tokenizer of a spec: {"name": "bytes" | "gpt2"} or a learned one with its words."""
    name = spec["name"]
    if name == "stdlib":
        return _learned([base64.b64decode(word) for word in spec["words"]])
    if name not in ("bytes", "gpt2"):
        raise ValueError(f"--tokenizer {name}: choose stdlib, gpt2 or bytes")
    return bytes_tokenizer() if name == "bytes" else gpt2_tokenizer()


def vocab_size(tokenizer: tiktoken.Encoding) -> int:
    """The network's vocabulary: the tokenizer's, and the mask as its last id."""
    return tokenizer.n_vocab + 1


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Text to ids; text that spells a special token is text. ValueError where tiktoken gives up."""
    try:
        return tokenizer.encode_ordinary(text)
    except BaseException as error:  # its panics are no Exceptions
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("a run of white space too long for the tokenizer; shorten it") from None


def decode(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Ids to text; the mask shows as [MASK], bytes that are no UTF-8 as U+FFFD."""
    mask = tokenizer.n_vocab
    pieces = (
        MASK_TEXT.encode() if i == mask else tokenizer.decode_single_token_bytes(i)
        for i in map(int, ids)
    )
    return b"".join(pieces).decode("utf-8", errors="replace")


def token_bytes(tokenizer: tiktoken.Encoding) -> Tensor:
    """(V,) the UTF-8 bytes that each token stands for; 0 for end-of-text and the mask."""
    sizes = torch.zeros(vocab_size(tokenizer), dtype=torch.long)
    for token in range(tokenizer.n_vocab - 1):
        sizes[token] = len(tokenizer.decode_single_token_bytes(token))
    return sizes


# Documents


@dataclass
class Source:
    """Where a corpus comes from: its files and how to read the documents in them."""

    name: str
    root: Path
    files: list[Path]

    def fingerprint(self) -> str:
        """A hash of every file's path, size and time of change."""
        h = hashlib.sha256()
        for file in self.files:
            stat = file.stat()
            h.update(
                f"{file.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
            )
        return h.hexdigest()

    def documents(self) -> Iterator[tuple[str, str]]:
        """(key, text) of every document: a file, or a line of a JSONL file."""
        for file in self.files:
            name = str(file.relative_to(self.root))
            if file.suffix == ".jsonl":
                yield from ((f"{name}:{i}", text) for i, text in _jsonl_texts(file))
            else:
                yield name, _read_text(file)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None


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
        _read_text(file)
    except ValueError:
        return False
    return True


def path_source(path: str) -> Source:
    """A text file, a JSONL file with a "text" field, or a folder of these (and of source code)."""
    root = Path(path)
    if not path or not root.exists():
        raise FileNotFoundError(f"--data {path}: no such file or folder")
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    if root.is_dir():
        files = [f for f in files if f.suffix in (".txt", ".jsonl", ".md", ".py")]
    if not files:
        raise ValueError(f"--data {path}: no .txt, .jsonl, .md or .py file in it")
    name = f"{root.resolve().name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}"
    return Source(name, root if root.is_dir() else root.parent, files)


def held_out(key: str) -> bool:
    """Whether a document is for validation: one in HELD_OUT, by a hash of its path or number."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT == 0


def split_documents(source: Source, cut: bool = False) -> Iterator[tuple[str, str]]:
    """("train" | "val", text): whole documents; or, for a source of few (`cut`), the last
    HELD_OUT-th of each document is held out."""
    for key, text in source.documents():
        if cut:
            end = len(text) - len(text) // HELD_OUT
            yield "train", text[:end]
            yield "val", text[end:]
        else:
            yield "val" if held_out(key) else "train", text


# Corpora


class Corpus:
    """A tokenized corpus: two streams of ids, memory-mapped, each document ended by end-of-text."""

    def __init__(self, folder: Path, tokenizer: tiktoken.Encoding, meta: dict):
        self.folder, self.tokenizer, self.meta = folder, tokenizer, meta
        # Mapped once: a corpus that is built again meanwhile does not change under a run.
        self.streams = {split: self._map(split) for split in ("train", "val")}

    def _map(self, split: str) -> np.ndarray:
        if not self.meta["tokens"][split]:  # an empty file cannot be mapped
            return np.zeros(0, self.meta["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def need(self, split: str, length: int) -> None:
        """ValueError where the split does not hold one block of `length` tokens."""
        have = len(self.streams[split])
        if have < length:
            raise ValueError(
                f"{self.meta['source']}: its {split} part has {have} tokens, a block takes {length}"
                "; use more text or a smaller --block-size"
            )

    def batch(self, n: int, length: int, g: torch.Generator) -> Tensor:
        """n training windows (n, length) at places drawn from g, int64."""
        stream = self.streams["train"]
        starts = torch.randint(len(stream) - length + 1, (n,), generator=g)
        return self._tokens(np.stack([stream[i : i + length] for i in starts]))

    def blocks(self, split: str, length: int, limit: int | None = None) -> Tensor:
        """The split cut into whole blocks (n, length) in order; `limit` of them, evenly spread."""
        stream = self.streams[split]
        n = len(stream) // length
        picks = np.arange(n) if not limit or limit >= n else np.arange(limit) * n // limit
        return self._tokens(stream[: n * length].reshape(n, length)[picks])

    def _tokens(self, ids: np.ndarray) -> Tensor:
        if ids.size and ids.max() >= self.tokenizer.n_vocab:
            raise ValueError(f"{self.folder}: damaged; delete it, and it is built again")
        return torch.from_numpy(ids.astype(np.int64))


def open_corpus(data: str | None, tokenizer: dict | str | None, cache: str = "corpora") -> Corpus:
    """The corpus of --data (None: the standard library) in a tokenizer, built if not cached.

    `tokenizer` is a name, or the spec in a checkpoint. A corpus whose sources or tokenizer have
    changed since is built again. ValueError or OSError that names what is wrong.
    """
    source = stdlib_source() if data is None else path_source(data)
    spec = tokenizer if isinstance(tokenizer, dict) else {"name": tokenizer or "stdlib"}
    if spec["name"] not in ("stdlib", "gpt2", "bytes"):
        raise ValueError(f"--tokenizer {spec['name']}: choose stdlib, gpt2 or bytes")
    fingerprint = source.fingerprint()
    folder = Path(cache) / f"{source.name}-{spec['name']}"
    corpus = _open(folder, fingerprint, spec)
    if corpus is None and "words" in spec:  # learned elsewhere: beside the one learned here
        learned = hashlib.sha256(json.dumps(spec["words"]).encode()).hexdigest()[:8]
        folder = folder.with_name(f"{folder.name}-{learned}")
        corpus = _open(folder, fingerprint, spec)
    if corpus is None:
        writable_folder(str(folder), "--cache")
        with locked(folder):  # another process may have built it while this one waited
            corpus = _open(folder, fingerprint, spec) or _build(source, spec, folder, fingerprint)
    return corpus


def _open(folder: Path, fingerprint: str, spec: dict) -> Corpus | None:
    """The corpus in a folder where it is whole, of this source and in this tokenizer, else None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        for split in ("train", "val"):
            whole = (folder / f"{split}.bin").stat().st_size == meta["tokens"][split] * size
            if not whole or not isinstance(meta["bytes"][split], int):
                return None
        same = meta["fingerprint"] == fingerprint and isinstance(meta["source"], str)
        if not same or meta["tokenizer"] != spec | meta["tokenizer"]:
            return None
        return Corpus(folder, load_tokenizer(meta["tokenizer"]), meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(source: Source, spec: dict, folder: Path, fingerprint: str) -> Corpus:
    if spec["name"] == "stdlib" and "words" not in spec:
        texts = split_documents(stdlib_source())
        tokenizer = learn_bpe(text for split, text in texts if split == "train")
    else:
        tokenizer = load_tokenizer(spec)
    dtype = "uint16" if vocab_size(tokenizer) <= 2**16 else "uint32"
    (folder / "meta.json").unlink(missing_ok=True)  # it is written last: without it, build again
    few = len(source.files) < HELD_OUT and all(f.suffix != ".jsonl" for f in source.files)
    for cut in (True,) if few else (False, True):  # by chance no document may be held out
        tokens, sizes = _write_streams(source, tokenizer, folder, dtype, cut)
        if tokens["val"] and tokens["train"]:
            break
    place = source.files[0] if len(source.files) == 1 else source.root
    if not tokens["train"]:
        raise ValueError(f"{place}: no text in it")
    meta = {
        "source": str(place),
        "fingerprint": fingerprint,
        "tokenizer": tokenizer_spec(tokenizer),
        "blocks": "windows",
        "dtype": dtype,
        "tokens": tokens,
        "bytes": sizes,
    }
    with atomic_write(folder / "meta.json", "w") as f:
        json.dump(meta, f)
    return Corpus(folder, tokenizer, meta)


def _write_streams(source, tokenizer, folder: Path, dtype: str, cut: bool) -> tuple[dict, dict]:
    """Write train.bin and val.bin; returns the tokens and the UTF-8 bytes of each."""
    tokens, sizes = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    with atomic_write(folder / "train.bin") as train, atomic_write(folder / "val.bin") as val:
        out = {"train": train, "val": val}
        documents = split_documents(source, cut)
        for split, text in progress(documents, desc=f"tokenizing {source.name}", unit=" documents"):
            if not text:
                continue
            try:
                ids = [*encode(tokenizer, text), tokenizer.eot_token]
            except ValueError as error:
                raise ValueError(f"{source.root}: {error}") from None
            out[split].write(np.array(ids, dtype=dtype).tobytes())
            tokens[split] += len(ids)
            sizes[split] += len(text.encode())
    return tokens, sizes


def main(args: argparse.Namespace) -> None:
    corpus = open_corpus(args.data, args.tokenizer, args.cache)
    tokens, sizes = corpus.meta["tokens"], corpus.meta["bytes"]
    print(f"{corpus.folder}: tokenizer {corpus.tokenizer.name}, {vocab_size(corpus.tokenizer)} ids")
    for split in ("train", "val"):
        rate = sizes[split] / max(1, tokens[split])
        print(
            f"{split:5} {tokens[split]:>12,} tokens {sizes[split]:>14,} bytes, {rate:.2f} a token"
        )


if __name__ == "__main__":
    parser = Parser(description="Tokenize a corpus.")
    parser.add_argument("--data", help="text, JSONL, folder; default: standard library")
    parser.add_argument("--tokenizer", default="stdlib", help="stdlib, gpt2 or bytes")
    parser.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    run(main, parser.parse_args())
