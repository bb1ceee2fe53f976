"""Real text that every machine has: Python's own standard library, split by file, as BPE tokens."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "heldout")
END_OF_FILE = "<|file|>"

# Left out: code that isn't the standard library's own (*-packages); tests, which distributions package apart,
# so that one Python version has one corpus; tables rather than code (codec maps, pydoc's dump of the manual,
# build settings): `encodings` and `pydoc_data` alone are 2 MB, mostly near-copies.
LEFT_OUT = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ encodings pydoc_data lib-dynload".split()
)


class NoSources(RuntimeError):
    """There are too few files to learn from."""


@dataclass(frozen=True)
class Corpus:
    """The text of each split, in a fixed order, and the hash that stands for all of it."""

    texts: dict[str, list[str]]
    sha256: str
    root: str

    @property
    def files(self) -> dict[str, int]:
        """Number of files in each split."""
        return {split: len(texts) for split, texts in self.texts.items()}

    @property
    def bytes(self) -> dict[str, int]:
        """UTF-8 bytes in each split."""
        return {split: sum(len(t.encode()) for t in texts) for split, texts in self.texts.items()}


def split_of(relative_path: str) -> str:
    """Which split a file belongs to: by its path alone, 80 % train, 10 % validation, 10 % held out."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 10
    return "heldout" if bucket == 0 else "validation" if bucket == 1 else "train"


def read_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library's sources.

    A file equal to an earlier one is dropped, so that no held-out file is also a training file.

    Args:
        root: the folder to read; this Python's standard library where None.

    Raises:
        NoSources: fewer than three splits have a file (an embedded Python without sources, say).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        generated = relative.name.startswith("_sysconfigdata") or any(
            f.startswith("config-") for f in folders
        )
        if generated or LEFT_OUT.intersection(folders):
            continue
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # A link to nowhere, a file that isn't ours to read, or another encoding.
        digest = hashlib.sha256(raw).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        whole.update(relative.as_posix().encode() + b"\0" + digest)
        texts[split_of(relative.as_posix())].append(text)
    if not all(texts.values()):
        raise NoSources(
            f"too few Python sources under {root}: the demo learns from the standard library's .py files"
        )
    return Corpus(texts, whole.hexdigest(), str(root))


def train_tokenizer(texts: Iterable[str], vocab: int) -> str:
    """Train a byte-level BPE of at most `vocab` entries and return it as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_FILE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def token_bytes(tokenizer_json: str) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [V]: 0 for the end-of-file mark."""
    # A byte-level vocabulary spells each byte as one character, so a token's length is its number of bytes.
    vocab = json.loads(tokenizer_json)["model"]["vocab"]
    lengths = np.zeros(len(vocab), dtype=np.int64)
    for token, index in vocab.items():
        lengths[index] = 0 if token == END_OF_FILE else len(token)
    return lengths


def encode(tokenizer_json: str, texts: list[str]) -> np.ndarray:
    """The texts as one stream of token ids, int32 [n], an end-of-file mark after each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    end = tokenizer.token_to_id(END_OF_FILE)
    # A text that spells the mark has those bytes and doesn't end there.
    tokenizer.encode_special_tokens = True
    ids = [[*encoded.ids, end] for encoded in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(i, dtype=np.int32) for i in ids])


def windows(stream: np.ndarray, context: int) -> np.ndarray:
    """Windows of `context` predictions, [n, context + 1]; each shares one token with the next."""
    count = (len(stream) - 1) // context
    if count < 1:
        raise ValueError(f"the stream has {len(stream)} tokens, fewer than one window of {context + 1}")
    starts = np.arange(count)[:, None] * context
    return stream[starts + np.arange(context + 1)]


def spread_windows(stream: np.ndarray, context: int, count: int) -> np.ndarray:
    """At most `count` windows, evenly spaced over the whole stream, so that every part of it is scored."""
    all_windows = windows(stream, context)
    chosen = np.unique(
        np.linspace(0, len(all_windows) - 1, num=min(count, len(all_windows))).astype(np.int64)
    )
    return all_windows[chosen]


def batch(all_windows: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
    """The windows of training step `step`: [size, context + 1].

    Each epoch is a permutation drawn from (seed, epoch), so a step's batch needs no step before it.
    """
    total = len(all_windows)
    positions = np.arange(step * size, (step + 1) * size)
    rows = []
    for epoch in np.unique(positions // total):
        order = np.random.default_rng([seed, int(epoch)]).permutation(total)
        rows.append(order[positions[positions // total == epoch] % total])
    return all_windows[np.concatenate(rows)]
