"""Pictures: quality against speed; of a decoding its trace in a file, and as it happens.

In the terminal (`sample.py --chat`, `--watch`) final tokens are plain, soft masks show their
leading candidate, the paler the smaller lambda, plain masks are dots.
"""

import itertools
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator

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


# Pictures


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind


def plot_tradeoff(points: list[dict], quality: str, file: str) -> None:
    """Quality against speed (figure 4): a dot each of `points`, {"network", "decoding", "label",
    "speed" in tokens a second, "quality", "error"}; a colour a network, a sign a way of decoding,
    whose dots are joined. SVG or PNG by the name."""
    import matplotlib  # slow to import, and most runs draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["svg.hashsalt"] = "same points, same file"
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    networks, decodings = (
        list(dict.fromkeys(point[key] for point in points)) for key in ("network", "decoding")
    )
    for network, colour in zip(networks, itertools.cycle(COLOURS)):
        for decoding, marker in zip(decodings, itertools.cycle("os^Dvx")):
            own = [p for p in points if (p["network"], p["decoding"]) == (network, decoding)]
            own.sort(key=lambda p: p["speed"])
            x, y, error = ([p[key] for p in own] for key in ("speed", "quality", "error"))
            line = "-" if network == networks[0] else "--"
            axes.errorbar(
                x, y, error, color=colour, marker=marker, ms=5, ls=line, lw=1, capsize=2,
                label=f"{network}, {decoding}",
            )  # fmt: skip
            for point in own:
                axes.annotate(
                    point["label"], (point["speed"], point["quality"]), color=colour, fontsize=7,
                    textcoords="offset points", xytext=(4, 4),
                )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("tokens a second")
    axes.set_ylabel(quality)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None} if file.endswith(".svg") else None)
    pyplot.close(figure)
