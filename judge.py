"""MAUVE and generative perplexity: another network, GPT-2 large, judges texts (appendix A.1).

The network by `transformers`, MAUVE by `mauve-text`, both optional; features may come from files,
without a network.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from runtime import progress

MAX_TOKENS = 1024  # of a text that the judge reads
FIRST_SEED = 25  # of k-means; mauve-text's own default
SCORED_ROWS = 4  # texts whose logits are held at once: 0.8 GB for GPT-2 in float32
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")


class Judge(NamedTuple):
    """A causal language model of transformers, its tokenizer, and the tokens that it reads."""

    model: torch.nn.Module
    tokenizer: object
    limit: int


def optional(module: str, package: str):
    """A module that only some figures need; ValueError that says how to get it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{package} is needed ({error}): pip install {package}") from None


def load_judge(name: str) -> Judge:
    """The model of a folder or of the hub, on the CPU in float32; no code of its own is run.

    FileNotFoundError or ValueError, in one line, where it is not to be had or not whole.
    """
    transformers = optional("transformers", "transformers")
    hub = optional("huggingface_hub", "huggingface_hub")
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        found = Path(name).is_dir()
        folder = name if found else hub.snapshot_download(name, allow_patterns=FETCHED)
    except Exception as error:  # the client's own errors, and those of the network under it
        raise FileNotFoundError(
            f"--features-model {name}: no such folder, not in the hub's cache and not downloaded "
            f"({type(error).__name__}); fetch its config.json, tokenizer files and "
            "model.safetensors into a folder and name that, or give --features and "
            "--reference-features"
        ) from None
    how = dict(trust_remote_code=False, local_files_only=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **how
        )
        if info["missing_keys"]:  # they would be left at random
            raise ValueError(f"no weights for {sorted(info['missing_keys'])[0]}")
    except Exception as error:  # whatever a damaged file makes of a loader
        why = (str(error).splitlines() or [""])[0][:200]
        what = "a causal language model and its tokenizer, with safetensors weights"
        raise ValueError(
            f"--features-model {name}: not {what} ({type(error).__name__}: {why})"
        ) from None
    limit = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    return Judge(model.float().eval(), tokenizer, min(limit, MAX_TOKENS))


@torch.no_grad()
def judge_texts(
    judge: Judge, texts: list[str], batch_size: int, scored: bool, desc: str = "texts"
) -> tuple[np.ndarray, float | None]:
    """Features (N, D) in float32 of texts, and, where `scored`, their perplexity.

    A text is cut to the judge's first `limit` tokens. Features are the last layer's state at the
    last token, as mauve-text takes them. Perplexity is exp of the mean nats over the tokens of all
    texts, but for a text's first, which nothing predicts, and for end-of-text tokens after its
    first one, as MDLM's code counts.
    """
    model, tokenizer, limit = judge
    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    ids = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    if not all(ids):
        raise ValueError(
            f"--features-model: its tokenizer makes no token of {texts[ids.index([])]!r}"
        )
    if max(map(max, ids)) >= model.get_input_embeddings().num_embeddings:
        raise ValueError("--features-model: its tokenizer has ids that its network has not")
    features, nats, count = [], 0.0, 0
    rows = min(batch_size, SCORED_ROWS) if scored else batch_size
    with progress(total=len(ids), desc=desc, unit=" texts") as bar:
        for i in range(0, len(ids), rows):
            batch = [torch.tensor(row, device=device) for row in ids[i : i + rows]]
            x = pad_sequence(batch, batch_first=True)  # (B, L), padded on the right
            mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
            if scored:
                out = model(x, attention_mask=mask, output_hidden_states=True)
                h = out.hidden_states[-1]  # (B, L, D)
                for row, logits in zip(batch, out.logits):  # (L, V)
                    is_eos = row == eos if eos is not None else torch.zeros_like(row).bool()
                    counted = (~is_eos | (is_eos.cumsum(0) == 1))[1:]
                    losses = F.cross_entropy(
                        logits[: len(row) - 1].float(), row[1:], reduction="none"
                    )
                    nats += losses[counted].sum().item()
                    count += int(counted.sum())
            else:
                h = model.base_model(x, attention_mask=mask).last_hidden_state  # (B, L, D)
            features += [states[len(row) - 1].float().cpu() for row, states in zip(batch, h)]
            bar.update(len(batch))
    if scored and not count:
        raise ValueError("--gen-ppl: texts of one token, of which none is predicted")
    features = torch.stack(features).numpy()
    if not np.isfinite(features).all():
        raise ValueError("--features-model: its states are not finite; another model or --dtype")
    return features, float(np.exp(nats / count)) if scored else None


def read_features(path: str) -> np.ndarray:
    """The features (N, D) of an .npy file in float32; ValueError or OSError that names the file."""
    try:  # mapped: a damaged header cannot ask for more memory than there is file
        features = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception:  # numpy has many for a file that is none of its own
        raise ValueError(f"{path}: not an .npy file of numbers, or cut short") from None
    if features.ndim != 2 or features.dtype.kind != "f" or not features.size:
        what = f"{features.dtype} of shape {features.shape}"
        raise ValueError(f"{path}: {what}; features are floats, a row for each text")
    with np.errstate(over="ignore"):
        features = np.array(features, np.float32)
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"{path}: row {row} is not finite")
    return features


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches stdout and stderr meanwhile: faiss writes there from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(fd) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in (1, 2):
            os.dup2(nowhere, fd)
        yield
    finally:
        for fd, old in zip((1, 2), before):
            os.dup2(old, fd)
            os.close(old)
        os.close(nowhere)


def mauve(p: np.ndarray, q: np.ndarray, seeds: int, scaling: float, bar) -> tuple[list, int]:
    """MAUVE of features (N, D) and (M, D) for each k-means seed, and the number of clusters."""
    package, scores = optional("mauve", "mauve-text"), []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        with quiet():
            found = package.compute_mauve(p, q, mauve_scaling_factor=scaling, seed=seed)
        if not np.isfinite(found.mauve):
            raise ValueError(f"--mauve-scaling {scaling:g}: MAUVE is no number with it")
        scores.append(float(found.mauve))
        bar.update()
    return scores, found.num_buckets
