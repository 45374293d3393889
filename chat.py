"""Conversations to (prompt, response) examples and back.

The chat template of Dream, and one spelled as text for the tokenizers without control tokens; the
data sets of conversations, from files, the hub or the standard library's own source; and their
preparation as the paper's appendix has it ("Preprocessing"): hold out, sample, split off the last
answer, filter, tokenize once. A batch adds the end-of-text tokens that a model learns to stop with.

    chats = open_chats(CHATS["dream"], tokenizer_spec(tokenizer), "corpora", system=DEFAULT_SYSTEM)
"""

import ast
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from data import (
    END_OF_TEXT,
    TURN,
    TURN_ENDS,
    Source,
    decode,
    encode_array,
    held_out,
    load_hub,
    load_tokenizer,
    mask_id,
    open_parquet,
    read_whole,
    stdlib_source,
    vocab_size,
)
from runtime import locked, progress, writable_folder

DEFAULT_SYSTEM = "You are a helpful assistant."
CHATS = {  # what the instruct models were tuned on
    "dream": ["allenai/tulu-3-sft-mixture", "HuggingFaceTB/smoltalk:all"],
    "dream-coder": ["inclusionAI/Ling-Coder-SFT"],
}
ROLES = {"human": "user"}  # other names of ours
HELD_OUT_SHARE = 100  # one row in so many is for validation, and one may be bad
SHORTEST = 5  # tokens of a response
TOOL_CALLS = ("<tool_call>", "</tool_call>")
FILTERS = ("bad", "tool calls", "too long", "short response")
AT_A_TIME = 512  # rows in memory


# The template


def chat_ids(
    tokenizer: tiktoken.Encoding,
    messages: list[dict],
    system: str = DEFAULT_SYSTEM,
    begin: str = "",
) -> list[int]:
    """The ids of a chat, [{"role": "system" | "user" | "assistant", "content": text}].

    In Dream's tokens `system` goes before a chat that does not start with a system message, and
    control tokens are put in as ids, so that no content can spell them. Other tokenizers have
    "### role" lines, and end-of-text after what the assistant said. Where the assistant did not
    speak last, its turn is opened and left open after the text `begin`. ValueError for a chat that
    is none.
    """
    ids = _turns(tokenizer, messages, system)
    if messages[-1]["role"] != "assistant":
        ids.append(_opened(tokenizer, "assistant", begin))
    elif begin:
        raise ValueError(f"an answer that begins with {begin!r}, but the assistant has spoken")
    return np.concatenate(ids).tolist()


def example(
    tokenizer: tiktoken.Encoding, messages: list[dict], system: str = DEFAULT_SYSTEM
) -> tuple[np.ndarray, int]:
    """A chat that ends with the assistant's answer as (ids, uint32; how many are the prompt).

    The prompt is all up to the assistant's opened turn, as `chat_ids` has it when an answer is to
    be generated; the response is the answer's own ids and what ends a turn.
    """
    *before, last = _ending_with_an_answer(messages)
    prompt = [*_turns(tokenizer, before, system), _opened(tokenizer, "assistant")]
    response = [encode_array(tokenizer, last["content"]), _ending(tokenizer, "assistant")]
    return np.concatenate(prompt + response), sum(map(len, prompt))


def _ending_with_an_answer(messages: list[dict]) -> list[dict]:
    for message in messages:
        _turn(message)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if len(messages) == 1:
        raise ValueError("no message before the assistant's")
    return messages


def _turns(tokenizer, messages: list[dict], system: str) -> list[np.ndarray]:
    turns = [_turn(message) for message in messages]
    if not turns:
        raise ValueError("a chat without messages")
    if tokenizer.name == "dream" and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return [
        ids
        for role, content in turns
        for ids in (_opened(tokenizer, role, content), _ending(tokenizer, role))
    ]


def _turn(message: dict) -> tuple[str, str]:
    match message:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return role, content
    raise ValueError(
        f'{message!r:.80}: a message has a "role" (system, user or assistant) and a "content" text'
    )


def _opened(tokenizer, role: str, content: str = "") -> np.ndarray:
    """A turn up to its content's end. One text: its tokens may reach over the line's end."""
    text = f"{role}\n{content}"
    if tokenizer.name != "dream":
        return encode_array(tokenizer, f"### {text}")
    start = np.array([tokenizer.encode_single_token(TURN)], np.uint32)
    return np.concatenate([start, encode_array(tokenizer, text)])


def _ending(tokenizer, role: str) -> np.ndarray:
    """What follows a turn's content."""
    newline = encode_array(tokenizer, "\n")
    if tokenizer.name == "dream":
        end = np.array([tokenizer.encode_single_token(TURN_ENDS)], np.uint32)
        return np.concatenate([end, newline])
    return np.array([tokenizer.eot_token], np.uint32) if role == "assistant" else newline


def system_line(folder: str | Path) -> str:
    """The default system line of a folder's tokenizer_config.json, else Dream's.

    It is the constant text that the chat template has between system's control tokens; the
    template is a program, which is not run. ValueError where the file is damaged.
    """
    file = Path(folder) / "tokenizer_config.json"
    match read_whole(file) if file.exists() else None:
        case {"chat_template": str(template)}:
            # A quote ends the constant, unless it is escaped or an apostrophe inside a word.
            text = r"((?:[^'\"{}\\]|\\[n'\"\\]|\b'\b)+)"
            found = re.search(rf"<\|im_start\|>system(?:\\n|\n){text}<\|im_end\|>", template)
            if found:
                return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[1])
    return DEFAULT_SYSTEM


def answer(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """The text up to the first end of text or turn; control tokens before it do not show."""
    special, mask = tokenizer._special_tokens, mask_id(tokenizer)
    ends = (special[END_OF_TEXT], special.get(TURN_ENDS))
    said = takewhile(lambda i: i not in ends, map(int, ids))
    return decode(tokenizer, (i for i in said if i == mask or not tokenizer.is_special_token(i)))


# Data sets of conversations


class Rows(NamedTuple):
    """Rows that are read one by one: their number, the i-th and its place, by which it is named."""

    n: int
    row: Callable[[int], dict | bytes]  # bytes: a line of JSON
    place: Callable[[int], str]
    split: str | None = None  # what all of them are for, where their source says it


class Found(NamedTuple):
    """A data set: its name, a mark that changes when its rows do, and what opens them."""

    name: str
    mark: str
    open: Callable[[], list[Rows]]


def find_chats(name: str) -> Found:
    """The data set of a name: a JSONL or parquet file, a folder of these, "stdlib", or of the hub.

    A row is {"messages": [{"role", "content"}, ...]}, a data set of the hub "owner/name" or
    "owner/name:config". FileNotFoundError, ValueError, or Unreachable for the hub.
    """
    root = Path(name)
    if name and root.exists():
        files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
        if root.is_dir():
            files = [f for f in files if f.suffix in (".jsonl", ".parquet")]
        if not files:
            raise ValueError(f"--data {name}: no .jsonl or .parquet file in it")
        where = root if root.is_dir() else root.parent
        mark = f"{root.resolve()} {Source(name, where, files).fingerprint()}"
        kinds = {".parquet": _parquet_rows}
        return Found(name, mark, lambda: [kinds.get(f.suffix, _jsonl_rows)(f) for f in files])
    if name == "stdlib":
        source = stdlib_source()
        return Found(name, f"{source.root} {source.fingerprint()}", lambda: _stdlib_rows(source))
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name)
    if not hub or root.suffix in (".jsonl", ".json", ".parquet"):
        raise FileNotFoundError(f"--data {name}: no such file or folder")
    return _hub_chats(name)


def _jsonl_rows(file: Path) -> Rows:
    starts, numbers, at = array("q"), array("q"), 0
    with open(file, "rb") as lines:
        for number, line in enumerate(progress(lines, desc=file.name, unit=" lines", leave=False)):
            if line.strip():
                starts.append(at)
                numbers.append(number + 1)
            at += len(line)

    def row(i: int) -> bytes:
        with open(file, "rb") as f:
            f.seek(starts[i])
            return f.readline()

    return Rows(len(starts), row, lambda i: f"{file}:{numbers[i]}")


def _parquet_rows(file: Path) -> Rows:
    with open_parquet(file, "messages") as table:
        metadata = table.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    _row_group.cache_clear()  # the file may be another by now

    def row(i: int) -> dict:
        g = int(np.searchsorted(starts, i, "right")) - 1
        return {"messages": _row_group(file, g)[i - int(starts[g])].as_py()}

    return Rows(int(starts[-1]), row, lambda i: f"{file} row {i}")


@lru_cache(maxsize=1)
def _row_group(file: Path, g: int):
    with open_parquet(file, "messages") as table:
        return table.read_row_group(g, columns=["messages"]).column(0)


def _hub_chats(name: str) -> Found:
    repository, _, config = name.partition(":")
    instead = "or name the folder of its parquet files with --data"
    splits = load_hub(repository, config or None, instead)
    # Without a test split of its own, rows of the training split are held out.
    uses = {"train": "train", "test": "val"} if "test" in splits else {"train": None}
    for split in uses:
        columns = splits[split].column_names if split in splits else []
        if "messages" not in columns:
            raise ValueError(f'{name}: no column "messages" in its {split} split')
    mark = " ".join([name, *(splits[split]._fingerprint for split in uses)])

    def rows(split: str, use: str | None) -> Rows:
        table = splits[split].select_columns(["messages"])
        where = name if split == "train" else f"{name} {split}"
        return Rows(len(table), lambda i: table[i], lambda i: f"{where} row {i}", use)

    return Found(name, mark, lambda: [rows(split, use) for split, use in uses.items()])


def _stdlib_rows(source: Source) -> list[Rows]:
    """Requests for the functions of the standard library; files held out as for the corpus."""
    found = {"train": [], "val": []}
    for file in progress(source.files, desc="standard library", unit=" files", leave=False):
        split = "val" if held_out(str(file.relative_to(source.root))) else "train"
        for line, *texts in functions(file.read_text("utf-8-sig")):
            roles = zip(("user", "assistant"), texts, strict=True)
            chat = {"messages": [{"role": role, "content": text} for role, text in roles]}
            found[split].append((chat, f"{file}:{line}"))
    return [
        Rows(len(those), lambda i, t=those: t[i][0], lambda i, t=those: t[i][1], split)
        for split, those in found.items()
    ]


def functions(text: str) -> Iterator[tuple[int, str, str]]:
    """Of every function with a docstring and more in a Python source: (line, request, response).

    The request is its head, from the decorators to the docstring, and the response the whole
    without the docstring; as written, less the indentation of the whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in others' strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not is_function or ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
            continue
        doc, after = node.body[:2]
        margin, own_line = lines[node.lineno - 1][: node.col_offset], lines[doc.lineno - 1]
        if own_line.encode()[: doc.col_offset].strip() or after.lineno <= doc.end_lineno:
            continue  # code beside the docstring: it cannot be cut out by lines
        start = min(part.lineno for part in (node, *node.decorator_list))
        whole = [line.removeprefix(margin) for line in lines[start - 1 : node.end_lineno]]
        head, end = doc.lineno - start, doc.end_lineno - start + 1
        yield start, "\n".join(whole[:end]), "\n".join(whole[:head] + whole[end:])


def messages_of(row: dict | bytes) -> list[dict]:
    """The messages of a row, in our names of the roles; ValueError with what is wrong with it."""
    try:
        row = json.loads(row.decode("utf-8-sig")) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    match row:
        case {"messages": [*messages]}:
            return _ending_with_an_answer([_in_our_names(message) for message in messages])
    raise ValueError('no list of "messages" in it')


def _in_our_names(message: dict) -> dict:
    match message:
        case {"role": str(role), "content": content}:
            role = role.lower()
            return {"role": ROLES.get(role, role), "content": content}
    return message


# Preparation


class Chats:
    """Prepared examples of two splits, "train" and "val", memory-mapped.

    `{split}.bin` has the ids of all examples end to end; `{split}.npy`, int64 (n, 3), has for each
    where its prompt starts, where its response starts and where that ends, in a shuffled order.
    """

    def __init__(self, folder: Path, tokenizer: tiktoken.Encoding, meta: dict):
        self.folder, self.tokenizer, self.meta = folder, tokenizer, meta
        self.spans, self.ids = {}, {}
        for split, counts in meta["counts"].items():
            self.spans[split] = spans = np.load(folder / f"{split}.npy")
            self.ids[split] = np.memmap(folder / f"{split}.bin", meta["dtype"], "r")
            whole = spans.shape == (counts["kept"], 3) and len(self.ids[split]) == spans.max()
            if not whole or (np.diff(spans) < 1).any() or spans.min() < 0:
                raise ValueError(f"{folder}: damaged")

    def count(self, split: str) -> int:
        return len(self.spans[split])

    def lengths(self, split: str) -> np.ndarray:
        """(n,) the tokens of each example, prompt and response."""
        return self.spans[split][:, 2] - self.spans[split][:, 0]

    def example(self, split: str, i: int) -> tuple[np.ndarray, int]:
        """The i-th example: (ids, int64; how many are the prompt)."""
        start, response, end = self.spans[split][i].tolist()
        ids = self.ids[split][start:end].astype(np.int64)
        if ids.max() >= vocab_size(self.tokenizer):
            raise ValueError(f"{self.folder}: damaged; delete it, and it is built again")
        return ids, response - start

    def report(self) -> str:
        """What became of the rows, a line a split, and the tokens to train on."""
        names = ("rows", *FILTERS, "kept")
        lines = ["     " + "".join(f"{name:>16}" for name in names)]
        for split, counts in self.meta["counts"].items():
            lines.append(f"{split:5}" + "".join(f"{counts[name]:>16,}" for name in names))
        start, response, end = self.spans["train"].sum(axis=0).tolist()
        tokens = f"{response - start:,} of prompts, {end - response:,} of responses"
        return "\n".join([*lines, f"train tokens: {tokens}"])


def open_chats(
    data: list[str] | None,
    tokenizer: dict,
    cache: str,
    *,
    system: str,
    max_tokens: int = 2048,
    train_examples: int = 300_000,
    val_examples: int = 500,
    max_bad: int | None = None,
    seed: int = 1,
) -> Chats:
    """The examples of a mix of data sets (see `find_chats`; None: "stdlib"), built if not cached.

    `tokenizer` is a spec as `data.tokenizer_spec` gives it, `system` the default system line.
    `max_bad` rows may be no conversations, None: one in 100. ValueError or OSError that names what
    is wrong.
    """
    found = [find_chats(name) for name in data or ["stdlib"]]
    encoding = load_tokenizer(tokenizer)
    words = sorted(encoding._mergeable_ranks.items()), sorted(encoding._special_tokens.items())
    words = repr((encoding.name, encoding._pat_str, *words))  # of Dream a spec names the folder
    settings = {
        "sources": [source.name for source in found],
        "marks": [source.mark for source in found],
        "words": hashlib.sha256(words.encode()).hexdigest(),
        "system": system,
        "max_tokens": max_tokens,
        "train_examples": train_examples,
        "val_examples": val_examples,
        "seed": seed,
    }
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    meta = {"fingerprint": fingerprint, "tokenizer": tokenizer, "settings": settings}
    folder = Path(cache) / f"chat-{fingerprint[:12]}"
    chats = _open(folder, encoding, fingerprint)
    if chats is None:
        writable_folder(cache, "--cache")
        with locked(Path(cache)):  # another process may have built it while this one waited
            chats = _open(folder, encoding, fingerprint)
            chats = chats or _build(found, encoding, folder, meta, max_bad)
    _admit(chats.meta, max_bad)
    return chats


def _open(folder: Path, tokenizer, fingerprint: str) -> Chats | None:
    """The examples in a folder where they are whole, else None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return Chats(folder, tokenizer, meta) if meta["fingerprint"] == fingerprint else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _admit(meta: dict, max_bad: int | None) -> None:
    """ValueError where more rows are bad than may be."""
    counts = meta["counts"].values()
    rows, bad = (sum(count[name] for count in counts) for name in ("rows", "bad"))
    if bad > (rows // HELD_OUT_SHARE if max_bad is None else max_bad):
        raise ValueError(
            f"{meta['first bad']}; {bad} of {rows} rows are no conversation to learn from: "
            f"--max-bad {bad} leaves them out"
        )


def _build(found: list[Found], tokenizer, folder: Path, meta: dict, max_bad: int | None) -> Chats:
    """Build beside the folder, so that it is whole or not there."""
    settings = meta["settings"]
    sets = [source.open() for source in found]
    for source, parts in zip(found, sets, strict=True):
        if not any(part.n for part in parts):
            raise ValueError(f"{source.name}: no rows in it")
    meta["dtype"] = "uint16" if vocab_size(tokenizer) <= 2**16 else "uint32"
    meta["counts"], meta["first bad"] = {}, None
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir()
    g = np.random.default_rng(settings["seed"])
    try:
        for split, picks in _draw(sets, settings, g).items():
            rows = _read(sets, picks)
            spans = _write(rows, len(picks), tokenizer, aside / f"{split}.bin", split, meta)
            np.save(aside / f"{split}.npy", g.permutation(spans))
        _admit(meta, max_bad)
        _need_some(meta)
        with open(aside / "meta.json", "w") as f:
            json.dump(meta, f)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(
            f"{folder}: cannot be written ({error.strerror}); make room, or name another --cache"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _row_group.cache_clear()
    bad = sum(counts["bad"] for counts in meta["counts"].values())
    if bad:
        print(f"{bad} bad rows are left out, the first: {meta['first bad']}", file=sys.stderr)
    return Chats(folder, tokenizer, meta)


def _draw(sets: list[list[Rows]], settings: dict, g: np.random.Generator) -> dict[str, np.ndarray]:
    """The numbers of the rows to look at, of each split, in the order in which they are read.

    Of each data set one row in 100 is held out, or what its source says; then all are drawn from.
    """
    pools, start = {"train": [], "val": []}, 0
    for parts in sets:
        own = {"train": [], "val": [], None: [np.arange(0)]}
        for part in parts:
            own[part.split].append(np.arange(start, start + part.n))
            start += part.n
        mixed = g.permutation(np.concatenate(own[None]))
        held = max(len(mixed) // HELD_OUT_SHARE, min(1, len(mixed) // 2))
        pools["val"] += [*own["val"], mixed[:held]]
        pools["train"] += [*own["train"], mixed[held:]]
    return {
        split: np.sort(g.permutation(np.concatenate(pool))[: settings[f"{split}_examples"]])
        for split, pool in pools.items()
    }


def _read(sets: list[list[Rows]], picks: np.ndarray) -> Iterator[tuple[str, dict | bytes]]:
    """(place, row) of the rows of these numbers, counted over all data sets."""
    parts = [part for those in sets for part in those]
    starts = np.cumsum([0, *(part.n for part in parts)])
    for k, i in zip(np.searchsorted(starts, picks, "right") - 1, picks, strict=True):
        at = int(i - starts[k])
        yield parts[k].place(at), parts[k].row(at)


def _write(rows: Iterator, n: int, tokenizer, file: Path, split: str, meta: dict) -> np.ndarray:
    """Write the ids of the n rows that pass the filters, all cores at work; returns their spans."""
    counts = meta["counts"][split] = dict.fromkeys(("rows", *FILTERS, "kept"), 0)
    settings, spans, at = meta["settings"], [], 0
    prepared = partial(_prepared, tokenizer, settings["system"], settings["max_tokens"])
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=n, desc=f"tokenizing {split}", unit=" rows") as bar,
        open(file, "wb") as out,
    ):
        while batch := list(islice(rows, AT_A_TIME)):
            places = [place for place, _ in batch]
            results = pool.map(prepared, [row for _, row in batch])
            for place, (verdict, thing) in zip(places, results, strict=True):
                counts["rows"] += 1
                counts[verdict] += 1
                if verdict == "bad":
                    meta["first bad"] = meta["first bad"] or f"{place}: {thing}"
                if verdict == "kept":
                    ids, prompt = thing
                    out.write(ids.astype(meta["dtype"]).tobytes())
                    spans.append((at, at + prompt, at + len(ids)))
                    at += len(ids)
            bar.update(len(batch))
    return np.array(spans, np.int64).reshape(-1, 3)


def _prepared(tokenizer, system: str, max_tokens: int, row: dict | bytes) -> tuple:
    """("kept", example), or the first of FILTERS that drops the row and why."""
    try:
        messages = messages_of(row)
        if any(tag in message["content"] for message in messages for tag in TOOL_CALLS):
            return "tool calls", None
        ids, prompt = example(tokenizer, messages, system)
    except (ValueError, RecursionError) as error:
        return "bad", str(error)
    if len(ids) > max_tokens:
        return "too long", None
    return ("short response", None) if len(ids) - prompt < SHORTEST else ("kept", (ids, prompt))


def _need_some(meta: dict) -> None:
    for split, purpose in (("train", "train on"), ("val", "validate with")):
        counts, most = meta["counts"][split], meta["settings"]["max_tokens"]
        if not counts["kept"]:
            raise ValueError(
                f"{', '.join(meta['settings']['sources'])}: no example left to {purpose}; of "
                f"{counts['rows']} rows {counts['bad']} bad, {counts['tool calls']} with tool "
                f"calls, {counts['too long']} of more than {most} tokens (--max-length), "
                f"{counts['short response']} with a response of less than {SHORTEST}"
            )


# Batches


class Batch(NamedTuple):
    """n examples, right-padded with end-of-text to the longest."""

    x0: Tensor  # (n, L) int64
    response: Tensor  # (n, L) bool: what may be masked; eos tokens that were added are of it
    attend: Tensor  # (n, L) bool: all but the padding


def draw_eos(n: int, g: torch.Generator, most: int = 50) -> list[int]:
    """For n examples how many end-of-text tokens follow: uniform on 0..most."""
    return torch.randint(most + 1, (n,), generator=g).tolist()


def collate(
    examples: list[tuple[np.ndarray, int]], eos_counts: list[int], eos: int, limit: int
) -> Batch:
    """A batch of (ids, prompt length) examples, each with its eos tokens, cut at `limit` tokens.

    ValueError for a prompt that leaves no room for a response.
    """
    lengths = [min(limit, len(ids) + n) for (ids, _), n in zip(examples, eos_counts, strict=True)]
    x0 = torch.full((len(examples), max(lengths)), eos)
    response, attend = (torch.zeros(x0.shape, dtype=torch.bool) for _ in range(2))
    for row, ((ids, prompt), length) in enumerate(zip(examples, lengths, strict=True)):
        if prompt >= length:
            raise ValueError(f"a prompt of {prompt} tokens leaves none of {limit} for a response")
        own = ids[:length].astype(np.int64)
        x0[row, : len(own)] = torch.from_numpy(own)
        response[row, prompt:length] = True
        attend[row, :length] = True
    return Batch(x0, response, attend)


def batches_by_length(
    lengths: np.ndarray, n: int, seed: int, epoch: int, pool: int = 50
) -> np.ndarray:
    """(steps, n) the examples of each batch of an epoch, in an order drawn anew for each.

    A random order is cut in pools of `pool` batches, and each pool in batches of similar length,
    the longest first; so parts of a batch too have similar lengths. What does not fill a batch is
    left out; fewer than n examples repeat in one batch. Step s of a run is batch s % steps of epoch
    s // steps.
    """
    g = np.random.default_rng([seed, epoch])
    order = g.permutation(len(lengths))
    order = order[: len(order) // n * n] if len(order) >= n else np.resize(order, n)
    pools = (order[i : i + pool * n] for i in range(0, len(order), pool * n))
    by_length = [those[np.argsort(-lengths[those], kind="stable")] for those in pools]
    return g.permutation(np.concatenate(by_length).reshape(-1, n))
