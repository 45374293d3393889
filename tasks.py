"""The benchmarks: problems, prompts, what counts as an answer, and scores.

HumanEval(+) and MBPP(+) of the paper's section 4.2, GSM8K and MATH-500 of its appendix B.2, asked
without examples as lm-evaluation-harness asks instruct models. Everything here is text: completions
are generated, and programs run, elsewhere.

    problems = read_problems("humaneval", "HumanEval.jsonl.gz")
    ids = chat_ids(tokenizer, messages(problems[0]), begin=problems[0].begins)
    text, tests = program(problems[0], completion)  # run the one, then the other
"""

import ast
import gzip
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Task(NamedTuple):
    """A benchmark: its title, the most tokens of an answer, and the texts that end one."""

    title: str
    max_tokens: int
    stops: tuple[str, ...]


FENCE = "```"
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|im_end|>")
TASKS = {
    "humaneval": Task("HumanEval", 768, HUMANEVAL_STOPS),
    "humaneval+": Task("HumanEval+", 768, HUMANEVAL_STOPS),
    "mbpp": Task("MBPP", 512, (FENCE,)),
    "mbpp+": Task("MBPP+", 512, (FENCE,)),
    "gsm8k": Task("GSM8K", 256, ("Q:",)),
    "math500": Task("MATH-500", 512, ("Problem:",)),
}
PROGRAMS = ("humaneval", "humaneval+", "mbpp", "mbpp+")  # what their answers are
HUB = {  # data set and configuration, its test split
    "humaneval": ("openai/openai_humaneval", None),
    "humaneval+": ("evalplus/humanevalplus", None),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "mbpp+": ("evalplus/mbppplus", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "math500": ("HuggingFaceH4/MATH-500", None),
}
MBPP_TEST = range(11, 511)  # task_ids of the test split
MATH_REQUEST = r"Please reason step by step, and put your final answer within \boxed{}."
FEEDBACKS = ("binary", "sm")
SCORE = ("task", "budget", "feedback", "seed", "score", "problems")  # what a table needs of a score
KINDS = {str: "text", int: "whole number", list: "list of texts"}
NO_PYTHON = (SyntaxError, ValueError, MemoryError, RecursionError)
ONE_AT_A_TIME = threading.Lock()
SECONDS = 60  # to compare two answers, the import of sympy included


class Problem(NamedTuple):
    """A problem as it is asked, and what its answer is scored with: tests, or a reference."""

    task_id: str | int
    user: str  # what the user says
    begins: str = ""  # what the assistant's open turn begins with
    prompt: str = ""  # HumanEval: what the program begins with
    entry_point: str = ""  # HumanEval: the function asked for
    tests: str = ""
    reference: str = ""


# Problems


def read_problems(
    task: str, file: str | Path | None = None, full_tests: bool = False
) -> list[Problem]:
    """The problems of a JSONL file, plain or gzipped, in its order, or of the hub; of MBPP the test
    split.

    The forms: HumanEval's own, which EvalPlus keeps on the hub; MBPP's own; EvalPlus' MBPP+, scored
    on `test_list`, or with `full_tests` on `test`; GSM8K's own; MATH-500 as {"problem" or "prompt",
    "answer"}. A row without a task_id is known by its line's number, from 0. FileNotFoundError, or
    ValueError that names the line.
    """
    if task not in TASKS:
        raise ValueError(f"{task}: no benchmark; they are {', '.join(TASKS)}")
    problems: dict[str | int, Problem] = {}
    rows = _rows(file) if file is not None else _hub_rows(task)
    file = file if file is not None else HUB[task][0]
    for number, row in rows:
        try:
            problem = _problem(task, number, row, full_tests)
        except ValueError as error:
            raise ValueError(f"{file}:{number + 1}: {error}") from None
        if problem.task_id in problems:
            raise ValueError(f"{file}:{number + 1}: task_id {problem.task_id!r} a second time")
        if task != "mbpp" or problem.task_id in MBPP_TEST:
            problems[problem.task_id] = problem
    if not problems:
        split = f", task_id {MBPP_TEST[0]} to {MBPP_TEST[-1]}," if task == "mbpp" else ""
        raise ValueError(f"{file}: no problem{split} in it")
    return list(problems.values())


def _hub_rows(task: str) -> Iterator[tuple[int, dict]]:
    """The rows of a benchmark's data set on the hub, with their numbers, from 0."""
    from data import load_hub  # slow to import, and files do without

    name, config = HUB[task]
    rows = load_hub(name, config, "name a file of its problems with --data", split="test")
    return enumerate(map(dict, rows))


def _rows(file: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a JSONL file with their lines' numbers, from 0."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    content = Path(file).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise ValueError(f"{file}: not gzip, or cut short; fetch it again") from None
    for number, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number + 1}: no object of JSON; one a line is read")
        yield number, row


def _fields(row: dict, **kinds: type) -> list:
    for name, kind in kinds.items():
        value = row.get(name)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (kind is list and not all(isinstance(v, str) for v in value)):
            raise ValueError(f'no {KINDS[kind]} "{name}" in it; a row has {", ".join(kinds)}')
    return [row[name] for name in kinds]


def _problem(task: str, number: int, row: dict, full_tests: bool) -> Problem:
    """A row as a problem, its prompt to the letter as the released evaluation has it."""
    begins = f"Here is the completed function:\n{FENCE}python\n"
    if task in ("humaneval", "humaneval+"):
        kinds = dict(task_id=str, prompt=str, entry_point=str, test=str)
        task_id, prompt, name, test = _fields(row, **kinds)
        user = "Write a solution to the following problem and make sure that it passes the tests:"
        if not test.strip():
            raise ValueError('its "test" is empty')
        user, tests = f"{user}\n{FENCE}{prompt}", f"{test}\ncheck({name})\n"
        return Problem(task_id, user, f"{begins}{prompt}\n", prompt, name, tests)
    if task in ("mbpp", "mbpp+"):
        if task == "mbpp":
            task_id, text, asserts = _fields(row, task_id=int, text=str, test_list=list)
            tests = [*_fields({"test_setup_code": "", **row}, test_setup_code=str), *asserts]
        else:
            kinds = dict(task_id=int, prompt=str, test_list=list, test_imports=list, test=str)
            task_id, text, asserts, imports, test = _fields(row, **kinds)
            tests = [*imports, test] if full_tests else [*imports, *asserts]
        if not (full_tests and test.strip() if full_tests else any(map(str.strip, asserts))):
            raise ValueError("it has no tests")
        user = (
            f"You are an expert Python programmer, and here is your task: {text} Your code should"
        )
        user = "\n".join([f"{user} pass these tests:\n", *asserts[:3]])
        return Problem(task_id, user, begins, tests=_unix("\n".join(filter(None, tests))) + "\n")
    if task == "gsm8k":
        question, answer = _fields(row, question=str, answer=str)
        _, mark, reference = answer.rpartition("####")
        if not mark or not reference.strip():
            raise ValueError('no "####" before a number in its "answer"')
        return Problem(number, f"Q: {question}\nA:", reference=_plain(reference.strip()))
    name = "problem" if "problem" in row else "prompt"
    problem, reference = _fields(row, **{name: str, "answer": str})
    if not reference.strip():
        raise ValueError('its "answer" is empty')
    problem = problem.strip().removesuffix(MATH_REQUEST).rstrip()
    # The released prompt has its braces doubled.
    user = f"{MATH_REQUEST.replace('{}', '{{}}')} Problem:\n{problem}\n\nSolution:"
    return Problem(number, user, reference=reference)


def messages(problem: Problem) -> list[dict]:
    """The chat that asks a problem; the assistant's turn is then left open after its `begins`."""
    return [{"role": "user", "content": problem.user}]


# Answers


def read_completions(file: str | Path, problems: list[Problem]) -> dict[str | int, list[str]]:
    """The completions of a JSONL file of {"task_id", "completion"}, several a problem if need be.

    In the problems' order; a problem without any is left out. FileNotFoundError, or ValueError that
    names the line.
    """
    found: dict[str | int, list[str]] = {problem.task_id: [] for problem in problems}
    kinds = dict(task_id=type(problems[0].task_id), completion=str)
    for number, row in _rows(file):
        try:
            task_id, completion = _fields(row, **kinds)
            if task_id not in found:
                raise ValueError(f"task_id {task_id!r} is none of the problems'")
        except ValueError as error:
            raise ValueError(f"{file}:{number + 1}: {error}") from None
        found[task_id].append(completion)
    if not any(found.values()):
        raise ValueError(f"{file}: no completion in it")
    return {task_id: completions for task_id, completions in found.items() if completions}


def cut(task: str, completion: str) -> str:
    """A completion up to the first of the task's stops."""
    ends = [completion.find(stop) for stop in TASKS[task].stops if stop in completion]
    return completion[: min(ends, default=None)]


def program(problem: Problem, completion: str) -> tuple[str, str]:
    """(the program a completion makes, the tests to run after it) of HumanEval(+) or MBPP(+).

    The assistant's turn begins inside a fence, so that the next fence ends the answer; a completion
    that opens one of its own has answered nothing, as in lm-evaluation-harness. HumanEval's program
    is then cut to the lines that parse, and to what is needed of their definitions.
    """
    if not problem.entry_point:
        return _unix(cut("mbpp", completion)), problem.tests
    answer = cut("humaneval", completion).partition(FENCE)[0]
    lines, body = _python(_unix(f"{problem.prompt}\n{answer}"))
    # The tests of some problems call helpers of the prompt (HumanEval/32 `poly`).
    roots = {problem.entry_point}.union(*map(_binds, _python(problem.prompt)[1]))
    return _needed(lines, body, roots), problem.tests


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _python(text: str) -> tuple[list[str], list[ast.stmt]]:
    """The most of a text's first lines that parse, and their statements."""
    lines = text.split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(len(lines), 0, -1):
            try:
                return lines[:n], ast.parse("\n".join(lines[:n])).body
            except NO_PYTHON:
                continue
    return [], []


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module defines; none for one that is there to act."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            targets = getattr(statement, "targets", None) or [statement.target]
            return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return set()


def _needed(lines: list[str], body: list[ast.stmt], names: set[str]) -> str:
    """The lines of the imports, and of the definitions that the names need, directly or not."""
    while True:
        kept = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom)) or _binds(s) & names]
        used = {n.id for s in kept for n in ast.walk(s) if isinstance(n, ast.Name)}
        if used <= names:
            break
        names = names | used
    numbers = set()
    for s in kept:
        first = min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))])
        numbers.update(range(first, s.end_lineno + 1))
    return "".join(f"{lines[n - 1]}\n" for n in sorted(numbers))


def extracted(task: str, completion: str) -> str | None:
    r"""The answer in a completion of GSM8K or MATH-500; None where there is none.

    GSM8K: the last number (lm-evaluation-harness's "flexible-extract"), without $ and commas.
    MATH-500: what the last whole \boxed{} or \fbox{} holds.
    """
    completion = cut(task, completion)
    if task == "gsm8k":
        found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", completion)
        return _plain(found[-1][0] or found[-1][1]) if found else None
    if task != "math500":
        raise ValueError(f"{task}: its answers are programs")
    for begin in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", completion)]):
        depth = 1
        for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(completion, begin):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return completion[begin : brace.start()]
    return None


def is_right(task: str, problem: Problem, completion: str) -> bool:
    """Whether a completion of GSM8K or MATH-500 ends in the reference's answer.

    GSM8K's are compared as numbers. MATH-500's are equal as texts, or as expressions to
    math-verify, where that is installed.
    """
    answer = extracted(task, completion)
    if answer is None:
        return False
    if task == "gsm8k":
        try:
            return Decimal(answer) == Decimal(problem.reference)
        except InvalidOperation:
            return answer == problem.reference
    answer, reference = _trimmed(answer), _trimmed(problem.reference)
    return answer == reference or _verified(reference, answer)


def _plain(number: str) -> str:
    return number.replace("$", "").replace(",", "").rstrip(".")


def _trimmed(latex: str) -> str:
    latex = re.sub(r"(?<!\\right)\.$", "", latex.strip()).strip()
    return latex[1:-1].strip() if re.fullmatch(r"\$[^$]*[^$\\]\$", latex) else latex


def _verified(reference: str, answer: str) -> bool:
    """math-verify's judgement, made in another process.

    It sets alarms, which only a main thread can, and what sympy calls in C no alarm may end.
    """
    with ONE_AT_A_TIME:
        checker = _checker()
        if checker is None:
            return False
        limit = threading.Timer(SECONDS, checker.kill)
        limit.start()
        try:
            checker.stdin.write(json.dumps([reference, answer]) + "\n")
            checker.stdin.flush()
            said = checker.stdout.readline()
        except BrokenPipeError:
            said = ""
        finally:
            limit.cancel()
        if not said:  # it is dead: the next answer has another
            checker.communicate()
            _checker.cache_clear()
        return said == "True\n"


@lru_cache(maxsize=1)
def _checker() -> subprocess.Popen | None:
    if find_spec("math_verify") is None:
        note = "only equal texts count as right without math-verify (pip install math-verify)"
        print(f"MATH-500: {note}", file=sys.stderr)
        return None
    command = [sys.executable, "-c", "import tasks; tasks._check()"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=Path(__file__).parent, text=True, **pipes)


def _check() -> None:
    """Pairs of texts come in, a line of JSON each; whether they agree goes out."""
    from math_verify import parse, verify  # optional, and slow to import

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for line in sys.stdin:
        reference, answer = json.loads(line)
        try:
            said = bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))
        except Exception:  # sympy's own errors are of every kind
            said = False
        print(said, flush=True)


# Scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k of n completions is right, where c are (Chen et al., 2021, Eq. 1).

    ValueError for numbers that cannot be.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} completions, {c} of them right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summary(scores: list[dict]) -> list[dict]:
    """The rows of the paper's table 2: for each budget Binary, SM and their gain.

    A score is {"task", "budget", "feedback": "binary" or "sm", "seed", "score": from 0 to 1}; a
    budget is steps / tokens (Eq. 3), or a text that is no number, whose rows come last. A row is
    {"budget", "feedback": "Binary", "SM" or "Gain", "scores": {task: {"mean", "std", "seeds"}}} in
    per cent, std the sample standard deviation over seeds, None of one. ValueError for a score that
    has no cell, a seed's second, or scores of unlike numbers of "problems".
    """
    cells: dict[tuple, dict] = {}
    sizes: dict[str, int] = {}
    for score in scores:
        task, feedback = str(score["task"]), str(score["feedback"]).lower()
        if task not in TASKS or feedback not in FEEDBACKS:
            raise ValueError(f"{score}: a task is one of {', '.join(TASKS)}, feedback binary or sm")
        if type(score["score"]) not in (int, float) or not 0 <= score["score"] <= 1:
            raise ValueError(f"{score}: a score is a number from 0 to 1")
        if not all(isinstance(score[name], (str, int, float)) for name in ("budget", "seed")):
            raise ValueError(f"{score}: a budget and a seed are numbers or texts")
        if sizes.setdefault(task, score.get("problems")) != score.get("problems"):
            raise ValueError(f"{score}: of another number of problems than the first of {task}")
        seeds = cells.setdefault((_budget(score["budget"]), feedback, task), {})
        if score["seed"] in seeds:
            raise ValueError(f"{score}: the second of its seed")
        seeds[score["seed"]] = 100 * score["score"]
    rows = []
    for budget in sorted({key[0] for key in cells}):
        of = [
            {task: _mean(cells[budget, f, task]) for task in TASKS if (budget, f, task) in cells}
            for f in FEEDBACKS
        ]
        gain = {t: {"mean": of[1][t]["mean"] - of[0][t]["mean"]} for t in of[0] if t in of[1]}
        for feedback, found in zip(("Binary", "SM", "Gain"), [*of, gain]):
            rows.append({"budget": budget[1], "feedback": feedback, "scores": found})
    return rows


def _budget(value: float | str) -> tuple[Fraction, str]:
    """What to sort a budget by, and its name."""
    try:
        share = Fraction(value)
    except (ValueError, ArithmeticError):
        return Fraction(10**6), str(value)
    if isinstance(value, float):
        share = share.limit_denominator(1000)
    return share, f"{share.numerator}/{share.denominator}"


def _mean(seeds: dict) -> dict:
    values = list(seeds.values())
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "seeds": len(values)}


def table(rows: list[dict]) -> list[list[str]]:
    """The cells of the paper's table 2, its head first, of the rows of a `summary`."""
    asked = [task for task in TASKS if any(task in row["scores"] for row in rows)]
    lines = [["NFE budget", "Feedback", *(TASKS[task].title for task in asked)]]
    for row in rows:
        name = row["budget"] if row["feedback"] == "Binary" else ""
        lines.append([name, row["feedback"], *(_cell(row, task) for task in asked)])
    return lines


def _cell(row: dict, task: str) -> str:
    found = row["scores"].get(task)
    if found is None:
        return "-"
    if row["feedback"] == "Gain":
        return f"{round(found['mean'], 1) + 0:+.1f}"  # + 0: no -0.0
    spread = "" if found["std"] is None else f" (+- {found['std']:.1f})"
    return f"{found['mean']:.1f}{spread}"
