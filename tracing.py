"""What happened in a decoding: its trace in a file, in the terminal as it happens, and as a page.

In the terminal (`sample.py --chat`, `--watch`) final tokens are plain, soft masks show their
leading candidate, the paler the smaller lambda, plain masks are dots. The page holds its traces and
asks nothing of the network; what it looks like and does is in `assets/decoding.html`.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime import atomic_write, writable_files

MASK_SIGN, RESET = "·", "\x1b[0m"
PALEST, BRIGHTEST = 236, 250  # of the 24 greys of a terminal of 256 colours, for lambda 0 and 1


def trace_entries(step: int, t: float, x, chosen, remasked, rows, feedback, lam) -> list[dict]:
    """The trace of a step that left x (B, L): a dictionary a sequence (see `decoding.generate`).

    chosen, remasked and rows index the B * L positions: those drawn, those masked again, and those
    that `feedback` with weights `lam` speaks of, None for plain masks.
    """
    length, flat = x.shape[1], x.flatten()
    entries = [
        {"row": b, "step": step, "t": round(t, 6), "drawn": [], "remasked": [], "soft": []}
        for b in range(len(x))
    ]
    for place, token in zip(chosen.tolist(), flat[chosen].tolist()):
        entries[place // length]["drawn"].append([place % length, token])
    for place in remasked.tolist():
        entries[place // length]["remasked"].append(place % length)
    if feedback is not None:
        n = len(rows)
        ids = [[]] * n if feedback.ids is None else feedback.ids.tolist()
        weights = [[]] * n if feedback.weights is None else feedback.weights.tolist()
        numbers = zip(rows.tolist(), lam.tolist(), feedback.neg_entropy.tolist(), ids, weights)
        for place, one_lam, neg_entropy, v, pi in numbers:
            shown = [round(one_lam, 4), round(neg_entropy, 4), v, [round(w, 4) for w in pi]]
            entries[place // length]["soft"].append([place % length, *shown])
    return entries


class TraceFile:
    """A trace as JSONL: a first line with what the run was and the ids that it started from, then a
    line a step and sample (see `decoding.generate`). "texts" spells the ids that are new in a line.
    """

    def __init__(self, path: str, head: dict, spell: Callable[[Iterable[int]], str]):
        self.file, self.spell, self.told = open(path, "w", buffering=1), spell, set()
        self._write({"trace": 1, **head}, head["start"])

    def add(self, entries: list[dict], samples: range) -> None:
        for entry in entries:
            ids = [i for _, i in entry["drawn"]] + [i for *_, v, _ in entry["soft"] for i in v]
            self._write({"sample": samples[entry.pop("row")], **entry}, ids)

    def _write(self, line: dict, ids: list[int]) -> None:
        new = sorted(set(ids) - self.told)
        self.told.update(new)
        line["texts"] = {i: self.spell([i]) for i in new}
        try:
            self.file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            raise OSError(
                f"--trace {self.file.name}: cannot be written ({error.strerror})"
            ) from None


class TerminalView:
    """One sequence, drawn again after every step over what was drawn before.

    `spell(ids)` turns ids into text, `start` is the sequence to begin with, of which positions
    from `first` on are shown. Where the stream is no terminal nothing is drawn; where it has no
    colours (NO_COLOR, TERM=dumb) soft masks look like plain ones.
    """

    def __init__(
        self,
        spell: Callable[[Iterable[int]], str],
        start: list[int],
        mask_id: int,
        first: int = 0,
        stream=None,
    ):
        self.spell, self.mask_id, self.first = spell, mask_id, first
        self.stream = stream or sys.stdout
        self.ids, self.soft, self.height = list(start), {}, 0
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.live and "NO_COLOR" not in os.environ

    def __enter__(self):
        self._write("\x1b[?25l")  # no cursor meanwhile
        return self

    def __exit__(self, *exc):
        self._clear()
        self._write(RESET + "\x1b[?25h")

    def update(self, entry: dict) -> None:
        """Take one entry of a trace (`decoding.generate`) and draw."""
        for position, token in entry["drawn"]:
            self.ids[position] = token
        for position in entry["remasked"]:
            self.ids[position] = self.mask_id
        self.soft = {position: (v[0], lam) for position, lam, _, v, _ in entry["soft"] if v}
        if self.live:
            columns, rows = shutil.get_terminal_size()
            lines = list(self._lines(columns))[-(rows - 1) :]
            self._clear()
            self._write("\n".join(lines) + RESET)
            self.height = len(lines)

    def cells(self) -> Iterator[tuple[str, int | None]]:
        """(text, grey) of the runs to show; grey None for final text."""
        run: list[int] = []
        for position in range(self.first, len(self.ids)):
            token = self.ids[position]
            if token != self.mask_id:
                run.append(token)
                continue
            if run:
                yield self.spell(run), None
                run = []
            if position in self.soft and self.colours:
                candidate, lam = self.soft[position]
                text = self.spell([candidate]).replace("\n", "↵") or MASK_SIGN
                yield text, PALEST + round(min(max(lam, 0.0), 1.0) * (BRIGHTEST - PALEST))
            else:
                yield MASK_SIGN, PALEST
        if run:
            yield self.spell(run), None

    def _lines(self, columns: int) -> Iterator[str]:
        line, width = "", 0
        for text, grey in self.cells():
            if self.colours:
                line += RESET if grey is None else f"\x1b[38;5;{grey}m"
            for char in text:
                size = 2 if unicodedata.east_asian_width(char) in "WF" else 1
                if char == "\n" or width + size > columns:
                    yield line
                    line, width = "", 0
                if char == "\t":
                    char = " "
                if char.isprintable():
                    line, width = line + char, width + size
        yield line

    def _clear(self) -> None:
        if self.height:
            up = f"\x1b[{self.height - 1}A" if self.height > 1 else ""
            self._write(f"{up}\r\x1b[J")
            self.height = 0

    def _write(self, text: str) -> None:
        if self.live:
            self.stream.write(text)
            self.stream.flush()


# A decoding as a page


UNIT = 10_000  # the page has lambdas, entropies and weights as whole numbers of 1 / UNIT
DAMAGED = (ValueError, TypeError, KeyError, OverflowError, RecursionError)  # what a bad line raises


def read_trace(file: str, sample: int = 0) -> dict:
    """What the page needs of one sample of a `TraceFile`'s file.

    {"name", "sample", "strategy", "nfe", "k", "omegas", "start" (ids), "mask" (id), "texts",
    "steps", "left_out"}: a step is [step, t, [position, id, ...] drawn, [positions] remasked,
    [[position, lambda, entropy, id, weight, ...]] soft], with the numbers in UNITs; "left_out" are
    the numbers of the lines that are cut off, damaged or of another form. ValueError where nothing
    can be drawn.
    """
    head, steps, texts, samples, left_out = None, [], {}, set(), []
    with open(file, "rb") as f:
        for number, raw in enumerate(f, 1):
            try:
                line = json.loads(raw)
                spelled = _texts(line["texts"])
                if head is None:
                    head = _head(line)
                else:
                    step = _step(line, len(head["start"]))
                    samples.add(_whole(line["sample"]))
                    if line["sample"] == sample:
                        if steps and step[0] <= steps[-1][0]:
                            raise ValueError  # of a second run in the same file
                        steps.append(step)
                texts |= spelled
            except DAMAGED:
                left_out.append(number)
    if head is None:
        raise ValueError(f"{file}: no trace of sample.py --trace (version 1)")
    if not steps:
        there = ", ".join(map(str, sorted(samples))) or "none"
        raise ValueError(f"{file}: no step of sample {sample}; samples that have any: {there}")
    used = {i for step in steps for i in _ids(step)} | {*head["start"]}
    texts = {i: texts[i] for i in sorted(used & texts.keys())}
    return {
        "name": Path(file).stem, "sample": sample, **head, "texts": texts,
        "steps": steps, "left_out": left_out,
    }  # fmt: skip


def page(traces: list[dict]) -> str:
    """One HTML file of traces of `read_trace`, side by side; it may run its own script alone."""
    template = (Path(__file__).parent / "assets" / "decoding.html").read_text(encoding="utf-8")
    policy = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        content = re.search(f"<{kind}>(.*?)</{kind}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{kind}-src 'sha256-{digest}'")
    policy += ["require-trusted-types-for 'script'", "trusted-types 'none'"]
    before, behind = template.replace("POLICY", "; ".join(policy), 1).split("DATA")
    shown = [{**trace, "left_out": len(trace["left_out"])} for trace in traces]
    data = json.dumps(shown, separators=(",", ":"))  # all of ASCII, U+2028 escaped
    for sign in "<>&":  # no token can end the element that holds the data
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return before + data + behind


def _head(line: dict) -> dict:
    """The first line's own part; ValueError, TypeError or KeyError where it is none."""
    if line["trace"] != 1 or not line["start"]:
        raise ValueError
    strategy, nfe, k, omegas = (line.get(name) for name in ("strategy", "nfe", "k", "omegas"))
    omegas = omegas if isinstance(omegas, dict) else {}
    return {
        "strategy": strategy if isinstance(strategy, str) else "?",
        "nfe": nfe if type(nfe) is int else None,
        "k": k if type(k) is int or k == "V" else None,
        "omegas": {name: _scaled(v) / UNIT for name, v in omegas.items()},
        "mask": _whole(line["mask"]),
        "start": [_whole(i) for i in line["start"]],
    }


def _step(line: dict, length: int) -> list:
    """A step's line in the page's form; ValueError, TypeError, KeyError where it is none."""
    drawn = [n for at, token in line["drawn"] for n in (_whole(at, length), _whole(token))]
    remasked = [_whole(at, length) for at in line["remasked"]]
    soft = []
    for at, lam, neg_entropy, ids, weights in line["soft"]:
        candidates = [
            n for i, w in zip(ids, weights, strict=True) for n in (_whole(i), _scaled(w)) if w
        ]
        soft.append([_whole(at, length), _scaled(lam), -_scaled(neg_entropy), *candidates])
    return [_whole(line["step"]), _scaled(line["t"]) / UNIT, drawn, remasked, soft]


def _whole(value, below: int = 2**31) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(value)
    return value


def _scaled(value) -> int:
    if type(value) not in (int, float) or not abs(value) < 2**31:  # infinity and NaN too
        raise ValueError(value)
    return round(value * UNIT)


def _texts(texts: dict) -> dict[int, str]:
    if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise TypeError
    return {int(i): text for i, text in texts.items()}


def _ids(step: list) -> list[int]:
    """The ids that a step speaks of."""
    _, _, drawn, _, soft = step
    return drawn[1::2] + [i for entry in soft for i in entry[3::2]]


def write_page(args: argparse.Namespace) -> None:
    out = Path(args.out)
    writable_files({"--out": args.out}, args.traces)
    traces = [read_trace(file, args.sample) for file in args.traces]
    for file, trace in zip(args.traces, traces):
        if trace["left_out"]:
            first, n = ", ".join(map(str, trace["left_out"][:5])), len(trace["left_out"])
            print(
                f"{file}: left out, damaged or of another form: line {first}"
                + (f" and {n - 5} more" if n > 5 else ""),
                file=sys.stderr,
            )
        if [t["name"] for t in traces].count(trace["name"]) > 1:
            trace["name"] = file
    text = page(traces).encode()
    with atomic_write(out) as f:
        f.write(text)
    steps = " and ".join(str(len(trace["steps"])) for trace in traces)
    print(f"{out}: {steps} steps, {len(text) / 1e6:.2f} MB")


def tell_position(args: argparse.Namespace) -> None:
    """How one position's mask softens, step by step."""
    trace = read_trace(args.trace, args.sample)
    if not 0 <= args.position < len(trace["start"]):
        raise ValueError(f"{args.position}: positions are 0 to {len(trace['start']) - 1}")
    print(
        f"{'step':>4}{'t':>8}{'-H(p)':>9}{'lambda':>8}   (1 - lambda) E[m] + lambda * sum pi E[v]"
    )
    for step, t, drawn, remasked, soft in trace["steps"]:
        row = f"{step:4}{t:8.3f}"
        if args.position in drawn[::2]:
            token = drawn[1::2][drawn[::2].index(args.position)]
            print(f"{row}{'':17}   {_spelled(trace, token)} is drawn")
        if args.position in remasked:
            print(f"{row}{'':17}   it is masked again")
        for at, lam, entropy, *pairs in soft:
            if at == args.position:
                lam, entropy = lam / UNIT, entropy / UNIT
                blend = [
                    f"{lam * w / UNIT:.3f} {_spelled(trace, i)}"
                    for i, w in zip(pairs[::2], pairs[1::2])
                ]
                print(
                    f"{row}{-entropy:9.3f}{lam:8.3f}   {1 - lam:.3f} [MASK] + {' + '.join(blend)}"
                )


def _spelled(trace: dict, token: int) -> str:
    return repr(trace["texts"].get(token, f"id {token}"))
