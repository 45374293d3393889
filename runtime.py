"""The machine, not the method: what every script needs of the computer it runs on.

Device and number format, the processes of a torchrun job, seeded generators, files written whole or
not at all, signals that let the current step finish, errors of one line, progress bars.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

OUT_OF_MEMORY = "out of memory: use a smaller --batch-size or --block-size"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is cuda, else mps, else cpu; under torchrun each process takes a GPU of its own.

    ValueError for a device that is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or (index and not (index.isdecimal() and int(index) < count)):
        there = [n for n, ok in available.items() if ok]
        raise ValueError(f"--device {name}: not available here; there is {', '.join(there)}")
    if kind == "cpu":
        keep_freed_memory()
    if kind == "cuda":
        torch.cuda.set_device(name)
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where it is native (cuda, a CPU with AVX512-BF16), else float32."""
    if name == "auto":
        native = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`, parameters and reductions in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory rather than give it back to the kernel and fault it in again.

    On a CPU the page faults are about a fifth of a training step of the 169M network.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim
        libc.mallopt(-8, 1)  # M_ARENA_MAX: the backward thread reuses what the forward freed


def give_back_memory(unused: int = 2**31) -> None:
    """Give freed memory back to the kernel once more than `unused` bytes of it are kept.

    Blocks of ever other sizes, as in decoding, leave gaps between them that nothing fits in.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Mallinfo
        with open("/proc/self/statm") as f:
            _, resident, shared, *_ = map(int, f.read().split())
        if (resident - shared) * os.sysconf("SC_PAGE_SIZE") - libc.mallinfo2().uordblks > unused:
            libc.malloc_trim(0)


class _Mallinfo(ctypes.Structure):  # glibc's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def generator(seed: int) -> torch.Generator:
    """A CPU generator: the same numbers whatever the device of the model."""
    return torch.Generator().manual_seed(seed)


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of PyTorch's own generators, which dropout draws from."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def set_rng(rng: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `get_rng` returned, as far as this device has such generators."""
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


def progress(iterable=None, **kwargs) -> tqdm:
    """A tqdm bar on stderr, silent where stderr is not a terminal, and on all ranks but 0."""
    silent = True if os.environ.get("RANK", "0") != "0" else None
    return tqdm(iterable, file=sys.stderr, **({"disable": silent, "dynamic_ncols": True} | kwargs))


def finite(value):
    """A value as JSON has it: None in place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layout(lines: list[list[str]], markdown: bool = False, left: int = 0) -> str:
    """A table whose first line is its head: as text, or in Markdown; all columns but the first
    `left` end at the right."""
    if markdown:
        rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
        return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    rows = [[side(c, w) for side, c, w in zip(sides, line, widths)] for line in lines]
    return "".join("  ".join(row).rstrip() + "\n" for row in rows)


def memory(device: torch.device, reset: bool = False) -> int:
    """Bytes: the memory held now, starting a new peak (`reset`), or the peak since then; 0
    where the system does not tell."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/status").exists():  # a system that knows no more than the whole peak
        try:
            import resource  # not on every system
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if reset:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    key = "VmRSS" if reset else "VmHWM"
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


# The processes of a job


@dataclass(frozen=True)
class World:
    """This process among those of a torchrun job; alone without torchrun."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def reduce(self, value: float, op: str = "SUM") -> float:
        """The SUM or MAX of a number over all processes."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number, getattr(dist.ReduceOp, op))
        return number.item()

    def gather(self, thing) -> list:
        """`thing` of every process, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def leave(self) -> None:
        """End the job together: a process that goes first may take its threads down badly."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 does what is within first, the others after it: they find its files."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.size > 1:
            dist.barrier()


ALONE = World()


def join_world(device: torch.device) -> World:
    """Join the job that torchrun's environment variables speak of: nccl on cuda, gloo elsewhere."""
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        patience = timedelta(hours=2)
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        # After a restart torchrun's store still holds the addresses of the dead: use another part.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"torchrun: no job at {place} ({reason}); give another --master-port or --standalone"
        ) from None
    return World(dist.get_rank(), dist.get_world_size(), device)


# Files


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator:
    """Open a file that takes the place of `path` when it is complete, and never before.

    Anything that goes wrong, a full disk or a kill included, leaves the old file as it was.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save hides a full disk behind an error of its own
        ours = cause is not None and str(cause.filename or aside) == str(aside)
        if ours and cause.errno is not None:  # and not that of another file, being read meanwhile
            reason = os.strerror(cause.errno)
            raise OSError(f"{path}: cannot be written ({reason}); what was there is untouched")
        raise


def writable_folder(path: str, flag: str) -> Path:
    """Create the folder if need be and prove that a file can be written; OSError names the flag."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{flag} {path}: cannot be written ({error.strerror}); choose another folder")
    return folder


def writable_files(files: dict[str, str | None], inputs: list | None = None) -> None:
    """Prove that files {flag: path or None} can be written and take the place of nothing that is
    needed: ValueError for a folder, for one of the `inputs`, or for one file twice."""
    taken = {Path(path).resolve() for path in inputs or [] if path is not None}
    for flag, path in files.items():
        if path is None:
            continue
        if Path(path).is_dir():
            raise ValueError(f"{flag} {path}: a folder; name a file")
        if Path(path).resolve() in taken:
            raise ValueError(
                f"{flag} {path}: the same file as another of this command; name another"
            )
        taken.add(Path(path).resolve())
        writable_folder(str(Path(path).parent), flag)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time is within; where the system has no file locks, every one is."""
    with open(folder / ".lock", "w") as f:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield


class Metrics:
    """metrics.jsonl, written by rank 0; a resumed run drops what its checkpoint has not seen.

    `validated`, known to rank 0: whether the validation of the step it starts at is there already.
    """

    def __init__(self, path: Path, step: int, world: World):
        self.path, self.file, self.validated = path, None, False
        if world.rank == 0:
            lines = path.read_text().splitlines() if step and path.exists() else []
            lines = [line for line in lines if _step_of(line) <= step]
            self.validated = any('"val_' in line and _step_of(line) == step for line in lines)
            with atomic_write(path, "w") as f:
                f.writelines(line + "\n" for line in lines)
            self.file = open(path, "a", buffering=1)  # a line at a time

    def log(self, **entry) -> None:
        if self.file is not None:
            try:
                self.file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: cannot be written ({error.strerror})") from None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line of a run that was killed


class Samples:
    """The samples of a run: kept, or appended to a JSONL file that a later run goes on with.

    A line is {"index", "run", ...}; `run` is a hash of all that decides the samples.
    """

    def __init__(self, path: str | Path | None, settings: list, world: World = ALONE):
        self.path, self.world = path and Path(path).resolve(), world
        self.run = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        self.kept, self.done, self.size = [], 0, 0
        if not self.path or not self.path.exists():
            return
        if not self.path.is_file():
            raise ValueError(f"--out {path}: not a file")
        lines = self.path.read_bytes().splitlines(keepends=True)
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        first = b'{"index": ' + str(len(lines)).encode()  # of a line that a killed run left half
        foreign = [i for i, line in enumerate(lines) if self._of(line) != (i, self.run)]
        if not (torn.startswith(first) or first.startswith(torn)):
            foreign.append(len(lines))
        if foreign:
            raise ValueError(
                f"--out {path}: line {foreign[0] + 1} is not sample {foreign[0]} of this run; name "
                "another file, or delete it"
            )
        self.done, self.size = len(lines), sum(map(len, lines))
        if world.rank == 0 and torn:
            os.truncate(self.path, self.size)

    @staticmethod
    def _of(line: bytes):
        try:
            entry = json.loads(line)
            return entry["index"], entry["run"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def fill(self, total: int, batch_size: int, make: Callable[[range], list[dict]]) -> None:
        """Up to `total` samples: make(numbers) gives a batch's entries; the processes of a job take
        batches in turns."""
        try:
            with self._alone() if self.done < total else contextlib.nullcontext():
                while self.done < total:
                    first = min(self.done + self.world.rank * batch_size, total)
                    here = range(first, min(first + batch_size, total))
                    self._add(make(here) if here else [])
        except KeyboardInterrupt:
            if self.path is not None:
                note = f"{self.path} has {self.done} of {total}; the same command goes on"
                print(note, file=sys.stderr)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within, no other run writes the file; ValueError where one does, or has since."""
        if self.path is None or self.world.rank > 0:
            yield
            return
        try:
            f = open(self.path, "a")
        except OSError as error:
            raise OSError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        with f:
            try:
                import fcntl

                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {self.path}: another run is writing it") from None
            except (ImportError, OSError):
                pass  # a system without file locks
            if os.fstat(f.fileno()).st_size != self.size:
                raise ValueError(f"--out {self.path}: another run wrote it just now; start again")
            yield
            self.size = os.fstat(f.fileno()).st_size

    def _add(self, entries: list[dict]) -> None:
        """The entries of all processes, in the order of their ranks."""
        for part in self.world.gather(entries):
            lines = []
            for entry in part:
                lines.append(json.dumps({"index": self.done, "run": self.run, **entry}) + "\n")
                self.done += 1
            if self.path is None:
                self.kept += part
            elif self.world.rank == 0 and lines:
                try:
                    with open(self.path, "a") as f:
                        f.writelines(lines)
                except OSError as error:
                    raise OSError(
                        f"--out {self.path}: cannot be written ({error.strerror}); make room, and "
                        "the same command goes on"
                    ) from None


# Signals and errors


class StopSignal:
    """Within `with StopSignal() as stop:` Ctrl-C and SIGTERM only set `stop.signum`.

    The loop asks it after each step, saves and leaves with status 128 + signum; a second Ctrl-C
    does not wait.
    """

    def __enter__(self):
        self.signum = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame):
        if self.signum is not None:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
        self.signum = signum

    def __exit__(self, *exc):
        for s, handler in self._before.items():
            signal.signal(s, handler)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, "")
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line that end with status 2."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def run(main: Callable, args) -> None:
    """Call main(args) and turn what a person can cause into one line on stderr and an exit status.

    2 for bad input (ValueError, OSError, out of memory), 130 for Ctrl-C; main may return a status.
    """
    program = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character
    message = None
    try:
        status = main(args) or 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, status = "the reader of the output went away", 2
    except (MemoryError, torch.OutOfMemoryError):
        message, status = OUT_OF_MEMORY, 2
    except dist.DistError as error:
        message, status = f"another process of the job is gone ({error})", 2
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "allocate memory" in text:
            message, status = OUT_OF_MEMORY, 2
        elif dist.is_initialized() and ("gloo" in text or "NCCL" in text):
            message, status = "another process of the job is gone; resume from the last save", 2
        else:
            raise
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        message = f"{error.filename}: {error.strerror}" if named else str(error)
        status = 2
    if message is not None:
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort a Python that ends in good order
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
