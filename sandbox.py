"""Run generated Python programs safely and say whether they passed their tests.

    python sandbox.py        # which protections hold on this machine

A supervisor (this file, in a bare interpreter with a scrubbed environment) makes Linux namespaces
where it may, forks the program into them with limits and without rights, and judges. It ends all
that came of the program when that is done, late or too loud, or when the caller goes away.

A pass is a random token, made when the tests have run to their end and echoed by the runner, so
leaving early, printing and closed or scribbled descriptors are none. Program and tests share an
interpreter; not caught is a program written against this file, which speaks the runner's part, or
against the tests: objects equal to anything, a built-in name redefined in its own module. What the
user can read it can read, and memory is limited for each of its processes, not for their sum.
"""

import builtins
import contextlib
import ctypes
import json
import linecache
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import types
from typing import NamedTuple

LINUX = sys.platform == "linux"
CONTROL = 3  # the runner's descriptor, after 0, 1 and 2 of the program
READY, DONE = b"r", b"d"  # what it says there, before the program and after its tests
FAILED, NO_MEMORY = 1, 2  # statuses the runner leaves with
NEWNS, NEWUSER, NEWPID, NEWNET, NEWIPC = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18  # of mount(2)


class Verdict(NamedTuple):
    """`status`: passed, failed, timed out or killed; `error`: why, "" for a pass."""

    passed: bool
    status: str
    error: str
    seconds: float


# The caller's side


def run_program(program: str, tests: str, *, timeout: float = 3.0, **limits: int) -> Verdict:
    """Run `program` and then `tests` in its namespace; passed if both ran to their end.

    timeout: seconds by the clock. limits: memory (bytes of address space a process), disk (bytes of
    files, in all), output (bytes printed), processes (threads count, too). The standard library can
    be imported, installed packages cannot. RuntimeError if the sandbox itself does not work.
    """
    return _verdict(_supervised(program, tests, timeout, limits))


def run_programs(
    pairs: list[tuple[str, str]], workers: int | None = None, **options: float
) -> list[Verdict]:
    """`run_program(program, tests, **options)` of each pair, in their order, `workers` at a time.

    Without `workers` as many as there are cores: with more, programs steal each other's time limit.
    """
    # The supervisor runs this file, too, and must not wait for torch and tqdm.
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from runtime import progress

    timeout = options.pop("timeout", 3.0)
    live, stopped = set(), False

    def one(program: str, tests: str) -> Verdict:
        def started(supervisor):
            live.add(supervisor)
            if stopped:
                supervisor.kill()

        return _verdict(_supervised(program, tests, timeout, options, started, live.discard))

    workers = workers or (len(os.sched_getaffinity(0)) if LINUX else os.cpu_count())
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(one, *pair) for pair in pairs]
        try:
            for job in progress(as_completed(jobs), total=len(jobs), desc="programs"):
                job.result()
        except BaseException:
            stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            for supervisor in list(live):
                supervisor.terminate()
            raise
    return [job.result() for job in jobs]


def protections() -> dict[str, bool]:
    """What guards this machine against the programs, and whether that can be had here."""
    return _supervised("", "", 30.0, {})["held"]


def _verdict(answer: dict) -> Verdict:
    status = answer["status"]
    return Verdict(status == "passed", status, answer["error"], answer["seconds"])


def _supervised(program, tests, timeout, limits, started=lambda s: None, ended=lambda s: None):
    """The answer of a supervisor: the fields of a verdict, and `held`, the protections."""
    import subprocess
    import tempfile

    known = {"memory": 2**30, "disk": 2**26, "output": 2**20, "processes": 64}
    if unknown := limits.keys() - known.keys():
        raise ValueError(f"no limits of the sandbox: {', '.join(sorted(unknown))}")
    if not 0 < timeout < 1e6:
        raise ValueError(f"a timeout of {timeout} s: more than 0, less than a million")
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        job = {"program": program, "tests": tests, "timeout": timeout, "folder": folder}
        job = json.dumps(job | known | limits).encode()
        env = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        # One seed of str's hash, or a verdict could change from run to run; -I would ignore it.
        env["PYTHONHASHSEED"] = "0"
        supervisor = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", os.path.abspath(__file__), "supervise"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd="/",
            start_new_session=True,
        )
        try:
            started(supervisor)
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(len(job).to_bytes(8, "big") + job)
                supervisor.stdin.flush()
            answer, trouble = supervisor.stdout.read(), supervisor.stderr.read()
        finally:
            # Its stdin is the lifeline: when this closes, by Ctrl-C or our death, it ends all.
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
            supervisor.wait()
            supervisor.stdout.close()
            supervisor.stderr.close()
            ended(supervisor)
    if supervisor.returncode < 0:  # possible only where there are neither namespaces nor user ids
        return {"status": "killed", "error": "killed its supervisor", "seconds": 0.0, "held": {}}
    if supervisor.returncode or not answer:
        reason = trouble.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the sandbox does not work here: {' '.join(reason)}")
    return json.loads(answer)


# The supervisor's side


def supervise() -> None:
    """Read a job from stdin, run it, and print the verdict as JSON."""
    job = json.loads(_read(int.from_bytes(_read(8), "big")))
    libc = ctypes.CDLL(None, use_errno=True)
    user, held = isolate(libc, job["folder"], job["disk"])
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the byte in the pipe is what ends the wait
    signal.signal(signal.SIGTERM, lambda *_: None)
    ours, theirs = socket.socketpair()
    pipes = os.pipe(), os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            enter(job, libc, user, held, [pipes[0][1], pipes[1][1], theirs.fileno()])
            attempt(job["program"], job["tests"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(FAILED)
    theirs.close()
    for _, end in pipes:
        os.close(end)
    try:
        status, error = watch(pid, job, wake, ours.fileno(), pipes[0][0], pipes[1][0], start)
    finally:
        end_all(pid)
    seconds = time.monotonic() - start
    print(json.dumps({"status": status, "error": error, "seconds": seconds, "held": held}))


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            sys.exit(1)
        data += more
    return data


def isolate(libc: ctypes.CDLL, folder: str, disk: int) -> tuple[int | None, dict[str, bool]]:
    """Namespaces for the next child. Returns the user id it is to take, and what is protected."""
    root, user, counted = os.geteuid() == 0, None, False
    if LINUX:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become our children
    if root:
        # A limit on processes is by user, so each program is a user of its own, or parallel ones
        # would count for each other. The number is as unique as our process id.
        user, counted = 2**30 + os.getpid(), True
        try:
            os.chown(folder, user, user)
        except OSError:  # a container that has but a few user ids
            user, counted = 65534, False
            os.chown(folder, user, user)
    uid, gid = os.getuid(), os.getgid()
    kinds = NEWNS | NEWPID | NEWNET | NEWIPC | (0 if root else NEWUSER)
    spaces = LINUX and libc.unshare(kinds) == 0
    if spaces and not root:
        ids = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in ids.items():
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
        # Since Linux 5.14 a user namespace counts its own processes.
        counted = tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 14)
    if root and not spaces and closed_folders():
        user, counted = None, False  # another user could not import a thing
    owner = f"uid={uid},gid={gid}" if user is None else f"uid={user},gid={user}"
    files = spaces and mounts(libc, folder, f"size={disk},nr_inodes=10000,mode=700,{owner}")
    os.chdir(folder)
    return user, {
        "no network": spaces,
        "no sight of other processes, let alone killing them": files,
        "no process left behind": LINUX,
        "no file can be written but its own": files,
        "a user of its own, without rights": user is not None,
        "limited processes": counted,
        "limited memory": LINUX,
    }


def closed_folders() -> list[str]:
    """Those on the way to Python's library that other users cannot enter, the outermost first."""
    parts = os.path.realpath(sys.base_prefix).split("/")
    way = ["/".join(parts[: i + 1]) for i in range(1, len(parts))]
    return [folder for folder in way if not os.stat(folder).st_mode & 1]


def mounts(libc: ctypes.CDLL, folder: str, options: str) -> bool:
    """Make all files read-only, hide some, and lay an empty file system of memory over `folder`."""

    def mount(source: str, where: str, flags: int, options: str = "") -> bool:
        source, where, options = source.encode(), where.encode(), options.encode()
        return libc.mount(source, where, b"tmpfs", flags, options) == 0

    done = mount("none", "/", REC | PRIVATE)
    readonly = (ctypes.c_uint64 * 4)(RDONLY | NOSUID)
    done = done and libc.syscall(442, -100, b"/", 0x8000, readonly, 32) == 0  # mount_setattr
    closed = closed_folders()
    if closed and os.geteuid() == 0:  # Python lies in /root, say: show that part of it alone
        python = os.open(sys.base_prefix, os.O_PATH)
        done = mount("none", closed[0], NOSUID, "size=64k,mode=755") and done
        os.makedirs(sys.base_prefix)
        os.makedirs(folder, exist_ok=True)
        done = mount(f"/proc/self/fd/{python}", sys.base_prefix, BIND) and done
        os.close(python)
        os.stat(os.__file__)  # or no program could import anything, and each would fail
    for hidden in "/proc", "/run":  # other processes; the sockets of services
        if os.path.isdir(hidden) and not folder.startswith(hidden):
            done = mount("none", hidden, RDONLY, "size=4k") and done
    return mount("none", folder, NOSUID | NODEV, options) and done


def watch(pid, job, wake, control, out, err, start) -> tuple[str, str]:
    """Wait for the program's end, its token, its excess or its time; status and error."""
    poller = select.poll()
    for fd in (0, control, out, err, wake):  # in this order: last words come before the end
        poller.register(fd, select.POLLIN)
    tail, printed, ready, token = b"", 0, False, b""
    while (left := start + job["timeout"] - time.monotonic()) > 0:
        for fd, _ in poller.poll(1000 * left):
            if fd == 0:
                return "killed", "the caller is gone"
            data = b""
            with contextlib.suppress(OSError):
                data = os.read(fd, 65536 if fd != control else len(token) or 1)
            if not data:
                poller.unregister(fd)
            elif fd in (out, err):
                printed += len(data)
                tail = (tail + data)[-4000:] if fd == err else tail
                if printed > job["output"]:
                    return "killed", f"printed more than {job['output']:,} bytes"
            elif fd == wake:
                if bytes([signal.SIGTERM]) in data:
                    return "killed", "the caller is gone"
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    os.set_blocking(err, False)
                    with contextlib.suppress(BlockingIOError):
                        tail += os.read(err, 65536)
                    lines = tail.decode(errors="replace").strip().splitlines()[-8:]
                    if not ready:
                        raise RuntimeError(" ".join(lines[-1:]))
                    return how_it_ended(os.waitstatus_to_exitcode(status), "\n".join(lines))
            elif not ready:
                ready = True
            elif not token and data == DONE:
                token = os.urandom(16)
                with contextlib.suppress(OSError):
                    os.write(control, token)
            elif token and data == token:
                return "passed", ""
            else:
                return "failed", "wrote to a descriptor that is not its own"
    return "timed out", f"ran longer than {job['timeout']:g} s"


def how_it_ended(code: int, lines: str) -> tuple[str, str]:
    """Words for an exit status and the last lines of stderr; never passed."""
    if code < 0:
        return "killed", signal.strsignal(-code) or f"signal {-code}"
    if code in (FAILED, NO_MEMORY) and lines:
        return "killed" if code == NO_MEMORY else "failed", lines
    return "failed", f"left with status {code} before the end of its tests"


def end_all(pid: int) -> None:
    """Kill the program and, where no namespace takes them along, all that came of it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while True:
        with contextlib.suppress(OSError), open("/proc/thread-self/children") as f:
            for child in f.read().split():
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


# The program's side


def enter(job: dict, libc: ctypes.CDLL, user: int | None, held: dict, fds: list[int]) -> None:
    """Take this process's descriptors, time, memory and rights away as far as the job says."""
    signal.set_wakeup_fd(-1)
    for number in signal.SIGCHLD, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    fds = [os.dup(fd) for fd in (null, *fds)]  # all above 3, so that none is overwritten
    for i, fd in enumerate(fds):
        os.dup2(fd, i)
    os.closerange(CONTROL + 1, 256)
    seconds = int(job["timeout"]) + 1
    limits = [("CPU", seconds), ("FSIZE", job["disk"]), ("NOFILE", 64), ("CORE", 0)]
    limits += [("AS", job["memory"])] if held["limited memory"] else []
    limits += [("NPROC", job["processes"])] if held["limited processes"] else []
    for name, value in limits:
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if LINUX:
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none of them
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no sudo
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    os.write(CONTROL, READY)


def attempt(program: str, tests: str) -> None:
    """Run the texts in a module of their own, then ask for the token and echo it."""
    me, getpid, leave, read, write = os.getpid(), os.getpid, os._exit, os.read, os.write
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if p != own]
    sys.argv[:] = ["program"]
    module = sys.modules["program"] = types.ModuleType("program")
    normal = vars(builtins).copy()
    try:
        for name, text in ("<program>", program), ("<tests>", tests):
            linecache.cache[name] = len(text), None, text.splitlines(True), name
            exec(compile(text, name, "exec", dont_inherit=True), vars(module))
            vars(builtins).update(normal)  # tests count on all(), abs() and the like
        if getpid() != me:
            leave(FAILED)  # a fork of the program, come this far
        write(CONTROL, DONE)
        write(CONTROL, read(CONTROL, 16))
        read(CONTROL, 1)  # until the supervisor ends this
    except BaseException as error:
        memory = isinstance(error, MemoryError)
        # Where a line of the texts is to blame, the runner's own is no news.
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        text = "MemoryError" if memory else "".join(traceback.format_exception(error, limit=-4))
        write(2, text.encode(errors="replace")[-4000:])
        leave(NO_MEMORY if memory else FAILED)


if __name__ == "__main__":
    if sys.argv[1:] == ["supervise"]:
        supervise()
    else:
        for name, there in protections().items():
            print("yes" if there else "NO ", name)
