"""The demo: its text and baselines by hand, parts that survive anything, training that resumes bit for bit,
the verdict's conditions one by one, and a tiny run from end to end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the demo needs kdkernels[cli]")
pytest.importorskip("matplotlib", reason="the demo needs kdkernels[cli]")

import kdkernels as kd
from kdkernels import bench
from kdkernels.demo import corpus, head, objectives, parts, report
from kdkernels.demo import run as demo_run
from kdkernels.demo import train as training
from kdkernels.demo.baselines import Bigram, Unigram, discount
from kdkernels.demo.config import Config, Head, Mix, Recipe, config_for
from kdkernels.demo.model import Shape, Transformer
from kdkernels.demo.parts import Part, Parts
from kdkernels.demo.train import Data, Run, bits_per_byte, score, train

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Corpus


def names_in(split: str, count: int, folder: str = "") -> list[str]:
    """The first `count` paths of the form m0.py, m1.py, ... that belong to a split."""
    found = (f"{folder}m{i}.py" for i in range(10_000))
    chosen = [name for name in found if corpus.split_of(name) == split]
    return chosen[:count]


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def one_each() -> dict[str, str]:
    return {names_in(split, 1)[0]: f"# {split}\n" for split in corpus.SPLITS}


def test_the_split_is_the_paths_hash() -> None:
    tenths = {0: "heldout", 1: "validation"}
    paths = [f"package{i % 7}/module{i}.py" for i in range(5000)]
    for path in paths:
        # The first 8 bytes are the first 16 hexadecimal digits.
        tenth = int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) % 10
        assert corpus.split_of(path) == tenths.get(tenth, "train")
    shares = Counter(map(corpus.split_of, paths))
    # Four standard deviations of a binomial of 5000 and 1/10.
    for split in ("validation", "heldout"):
        assert abs(shares[split] - 500) < 4 * math.sqrt(5000 * 0.1 * 0.9)


def test_a_files_split_depends_on_nothing_but_its_path(tmp_path: Path) -> None:
    names = [name for split in corpus.SPLITS for name in names_in(split, 4, "p/")]
    first = corpus.read_corpus(write_tree(tmp_path / "a", {n: f"text of {n}" for n in names}))
    for split in corpus.SPLITS:
        assert sorted(first.texts[split]) == sorted(f"text of {n}" for n in names_in(split, 4, "p/"))
    again = corpus.read_corpus(write_tree(tmp_path / "b", {n: f"text of {n}" for n in reversed(names)}))
    assert (again.texts, again.sha256) == (first.texts, first.sha256)
    # Other texts under the same paths, and fewer files beside them.
    fewer = [n for split in corpus.SPLITS for n in names_in(split, 2, "p/")]
    other = corpus.read_corpus(write_tree(tmp_path / "c", {n: f"else {n}" for n in fewer}))
    for split in corpus.SPLITS:
        assert sorted(other.texts[split]) == sorted(f"else {n}" for n in names_in(split, 2, "p/"))
    assert other.sha256 != first.sha256


def test_an_equal_file_is_read_once(tmp_path: Path) -> None:
    files = one_each()
    twin = "# read once\n"
    train_name, heldout_name = names_in("train", 2)[1], names_in("heldout", 2)[1]
    root = write_tree(tmp_path, {**files, train_name: twin, heldout_name: twin})
    read = corpus.read_corpus(root)
    everything = [text for texts in read.texts.values() for text in texts]
    assert everything.count(twin) == 1
    assert twin in read.texts[corpus.split_of(min(train_name, heldout_name))]
    assert sum(read.files.values()) == 4
    assert sum(read.bytes.values()) == len("".join([*files.values(), twin]).encode())


def test_what_is_not_the_librarys_own_code_is_left_out(tmp_path: Path) -> None:
    files = one_each()
    root = write_tree(
        tmp_path,
        {
            **files,
            "site-packages/a.py": "a = 1",
            "b/test/c.py": "b = 1",
            "encodings/d.py": "d = 1",
            "_sysconfigdata__linux.py": "e = 1",
            "config-3.11-x86_64/f.py": "f = 1",
            "blank.py": " \n\n",
            "notes.txt": "not Python",
        },
    )
    (root / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (root / "nowhere.py").symlink_to(root / "missing.py")
    (root / "folder.py").mkdir()
    assert corpus.read_corpus(root).texts == {split: [f"# {split}\n"] for split in corpus.SPLITS}


@pytest.mark.parametrize("missing", corpus.SPLITS)
def test_a_split_without_a_file_is_refused(tmp_path: Path, missing: str) -> None:
    files = {name: text for name, text in one_each().items() if corpus.split_of(name) != missing}
    with pytest.raises(RuntimeError, match="too few Python sources under"):
        corpus.read_corpus(write_tree(tmp_path, files))


TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve = 'Größe', '漢字', '🙂', '\u0301', '\ufeff'\r\n\tdone\0\x7f",
    "",
    "a text that spells <|file|> twice: <|file|><|file|",
    " \n" * 20,
]


def test_token_bytes_count_the_bytes_of_any_text() -> None:
    tokenizer = corpus.train_tokenizer([TEXTS[0] * 3, "return Größe"], 280)
    sizes = corpus.token_bytes(tokenizer)
    assert sizes.shape == (280,)
    for text in TEXTS:
        ids = corpus.encode(tokenizer, [text])
        assert sizes[ids].sum() == len(text.encode())
        assert (sizes[ids] == 0).tolist() == [False] * (len(ids) - 1) + [True]
    together = corpus.encode(tokenizer, TEXTS)
    assert together.tolist() == [i for text in TEXTS for i in corpus.encode(tokenizer, [text]).tolist()]
    assert together.dtype == np.int32
    # What was learnt is used: fewer tokens than bytes.
    assert len(corpus.encode(tokenizer, [TEXTS[0]])) - 1 < len(TEXTS[0])


def test_tokens_are_the_texts_spelling() -> None:
    from tokenizers import Tokenizer

    tokenizer = corpus.train_tokenizer(TEXTS, 300)
    decoder = Tokenizer.from_str(tokenizer)
    for text in TEXTS:
        ids = corpus.encode(tokenizer, [text]).tolist()
        assert decoder.decode(ids[:-1], skip_special_tokens=False) == text
    assert corpus.train_tokenizer(TEXTS, 300) == tokenizer


def test_windows_share_one_token() -> None:
    assert corpus.windows(np.arange(10), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert corpus.windows(np.arange(12), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    # Each token but the first is predicted once.
    assert corpus.windows(np.arange(101), 5)[:, 1:].reshape(-1).tolist() == list(range(1, 101))
    assert corpus.windows(np.arange(5), 4).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="has 4 tokens, fewer than one window of 5"):
        corpus.windows(np.arange(4), 4)


def test_spread_windows_reach_from_end_to_end() -> None:
    stream = np.arange(2 * 9 + 1)
    everything = corpus.windows(stream, 2)
    assert corpus.spread_windows(stream, 2, 3).tolist() == everything[[0, 4, 8]].tolist()
    assert corpus.spread_windows(stream, 2, 5).tolist() == everything[[0, 2, 4, 6, 8]].tolist()
    for count in (9, 10, 1000):
        assert corpus.spread_windows(stream, 2, count).tolist() == everything.tolist()
    for count in range(1, 10):
        assert len(corpus.spread_windows(stream, 2, count)) == count


@pytest.mark.parametrize(("total", "size"), [(10, 3), (3, 7), (6, 6), (5, 1)])
def test_each_epoch_is_a_permutation(total: int, size: int) -> None:
    rows = np.stack([np.arange(total), np.arange(total) + 100], axis=1)
    steps = 4 * math.ceil(total / size) + 4
    batches = [corpus.batch(rows, size, seed=3, step=step) for step in range(steps)]
    assert all(b.shape == (size, 2) for b in batches)
    order = np.concatenate(batches)
    assert (order[:, 1] == order[:, 0] + 100).all()
    epochs = [order[i : i + total, 0].tolist() for i in range(0, 4 * total, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_batch_needs_no_earlier_one() -> None:
    rows = np.arange(40).reshape(20, 2)
    forward = [corpus.batch(rows, 3, 7, step).tolist() for step in range(15)]
    np.random.seed(0)
    backward = [corpus.batch(rows, 3, 7, step).tolist() for step in reversed(range(15))]
    assert backward[::-1] == forward
    assert [corpus.batch(rows, 3, 8, step).tolist() for step in range(15)] != forward
    data = Data(rows, rows[:1], rows[:1], np.ones(40, dtype=np.int64), size=3)
    assert data.seen(7, 15).tolist() == [row for rows_of_step in forward for row in rows_of_step]


# Baselines


def test_unigram_by_hand() -> None:
    # Seen 3, 2, 1, 0 and 0 times: one type once, one twice.
    targets = np.array([[0, 1, 0], [2, 1, 0]])
    d = Fraction(1, 1 + 2 * 1)
    left = d * 3 / 6 / 5
    expected = [(3 - d) / 6 + left, (2 - d) / 6 + left, (1 - d) / 6 + left, left, left]
    model = Unigram(targets, 5)
    assert model.probability.tolist() == pytest.approx([float(p) for p in expected], rel=1e-14)
    asked = np.array([[0, 3], [2, 2]])
    nats = -sum(math.log(expected[i]) for i in (0, 3, 2, 2))
    assert model.nats(asked) == pytest.approx(nats, rel=1e-14)


def test_bigram_by_hand() -> None:
    # (0, 1) twice, (0, 2) and (1, 0) once; 2 and 3 are never a context.
    contexts, targets = np.array([[0, 0], [0, 1]]), np.array([[1, 2], [1, 0]])
    d = Fraction(2, 2 + 2 * 1)
    # Targets 1, 2, 1, 0: 1 twice, 2 and 0 once.
    e = Fraction(2, 2 + 2 * 1)
    unigram = [(Fraction(c) - e) / 4 + e * 3 / 4 / 4 for c in (1, 2, 1)] + [e * 3 / 4 / 4]
    left = {0: d * 2 / 3, 1: d * 1 / 1}
    expected = {
        (0, 1): (2 - d) / 3 + left[0] * unigram[1],
        (0, 2): (1 - d) / 3 + left[0] * unigram[2],
        (0, 0): left[0] * unigram[0],
        (0, 3): left[0] * unigram[3],
        (1, 0): (1 - d) / 1 + left[1] * unigram[0],
        (1, 3): left[1] * unigram[3],
        (2, 1): unigram[1],
        (3, 3): unigram[3],
    }
    model = Bigram(contexts, targets, 4)
    asked, wanted = np.array(list(expected)).T
    got = model.probability(asked, wanted)
    assert got.tolist() == pytest.approx([float(p) for p in expected.values()], rel=1e-14)
    nats = -sum(math.log(p) for p in expected.values())
    assert model.nats(asked.reshape(2, 4), wanted.reshape(2, 4)) == pytest.approx(nats, rel=1e-14)


def test_baselines_sum_to_one_after_any_context() -> None:
    numbers = np.random.default_rng(5)
    vocab = 50
    # Skewed, so that some entries are frequent, some are seen once, and the last ten never.
    stream = np.minimum(numbers.geometric(0.1, size=400), 40) - 1
    model = Bigram(stream[:-1].astype(np.int32), stream[1:].astype(np.int32), vocab)
    unseen = set(range(vocab)) - set(stream[:-1].tolist())
    assert 10 <= len(unseen) < vocab
    assert model.unigram.probability.min() > 0
    assert model.unigram.probability.sum() == pytest.approx(1, abs=1e-12)
    for context in range(vocab):
        given = model.probability(np.full(vocab, context), np.arange(vocab))
        assert given.min() > 0
        assert given.sum() == pytest.approx(1, abs=1e-12), context
        assert (given.tolist() == model.unigram.probability.tolist()) == (context in unseen)


def test_discount_needs_both_counts() -> None:
    assert discount(np.array([1, 1, 1, 2, 5])) == 3 / 5
    assert discount(np.array([2, 2, 9])) == 0.5
    assert discount(np.array([1, 1, 9])) == 0.5


# Model and objectives


def test_the_model_is_causal_and_starts_at_its_prior() -> None:
    torch.manual_seed(0)
    prior = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05])
    model = Transformer(5, 8, Shape(2, 16, 2), prior)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0]])
    logits = model(ids)
    assert logits.shape == (1, 6, 5)
    torch.testing.assert_close(logits.softmax(-1), prior.expand(1, 6, 5), atol=0.1, rtol=0)
    changed = ids.clone()
    changed[0, 4] = 1
    later = model(changed)
    torch.testing.assert_close(later[:, :4], logits[:, :4], atol=1e-6, rtol=0)
    assert (later[:, 4] - logits[:, 4]).abs().max() > 1e-4
    # The last position sees the first.
    changed = ids.clone()
    changed[0, 0] = 3
    assert (model(changed)[:, 5] - logits[:, 5]).abs().max() > 1e-6


def test_the_models_logits_are_the_head_of_its_hidden_states() -> None:
    torch.manual_seed(0)
    model = Transformer(5, 8, Shape(2, 16, 2), torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05]))
    ids = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 4, 1, 0, 2, 2]])
    hidden = model.hidden(ids)
    assert hidden.shape == (2, 6, 16)
    # The final norm is in them.
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 6), atol=1e-3, rtol=0)
    assert torch.equal(model(ids), torch.nn.functional.linear(hidden, model.embed.weight, model.bias))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_eager_and_fused_are_the_formula(temperature: float) -> None:
    mix = Mix(temperature, soft_weight=0.7, hard_weight=0.3)
    hidden, weight, bias = torch.randn(6, 9), torch.randn(40, 9), torch.randn(40)
    z, v = torch.nn.functional.linear(hidden, weight, bias), 3 * torch.randn(6, 40)
    labels = torch.randint(40, (6,))

    def value_and_gradient(loss: objectives.Loss) -> tuple[float, torch.Tensor]:
        student = z.clone().requires_grad_()
        value = loss(student, v, labels)
        value.backward()
        assert student.grad is not None
        return value.item(), student.grad.double()

    p, q = (v.double() / temperature).softmax(-1), (z.double() / temperature).softmax(-1)
    plain = z.double().softmax(-1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    hard = -plain[torch.arange(6), labels].log().mean()
    one_hot = torch.zeros(6, 40, dtype=torch.float64)
    one_hot[torch.arange(6), labels] = 1
    expected = (0.7 * temperature**2 * soft + 0.3 * hard).item()
    gradient = (0.7 * temperature * (q - p) + 0.3 * (plain - one_hot)) / 6
    assert gradient.abs().max() > 1e-2
    eager, fused = value_and_gradient(objectives.eager(mix)), value_and_gradient(objectives.fused(mix))
    assert eager[0] == pytest.approx(fused[0], abs=1e-6)
    torch.testing.assert_close(eager[1], fused[1], atol=1e-6, rtol=0)
    for value, grad in (eager, fused):
        assert value == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(grad, gradient, atol=1e-6, rtol=0)
    value, grad = value_and_gradient(objectives.hard(mix))
    assert value == pytest.approx(hard.item(), rel=1e-6)
    torch.testing.assert_close(grad, (plain - one_hot) / 6, atol=1e-6, rtol=0)
    # Of heads: of the logits that they would make, and on to their parts.
    parts = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    whole = objectives.fused(mix)(kd.Head(*parts), kd.Head(v, torch.eye(40)), labels)
    whole.backward()
    assert whole.item() == pytest.approx(expected, rel=1e-6)
    products = (gradient @ weight.double(), gradient.T @ hidden.double(), gradient.sum(0))
    for part, product in zip(parts, products, strict=True):
        assert part.grad is not None
        torch.testing.assert_close(part.grad.double(), product, atol=5e-6, rtol=0)


class Watched:
    """A student, a teacher that requires grad, a batch, and whose logits were made of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.student = Transformer(30, 6, Shape(1, 16, 2))
        self.teacher = Transformer(30, 6, Shape(2, 24, 2))
        with torch.no_grad():
            # Far enough from uniform for the objectives to differ.
            for model in (self.student, self.teacher):
                model.embed.weight.mul_(20)
        self.ids, self.labels = torch.randint(30, (3, 6)), torch.randint(30, (18,))
        self.ran: list[tuple[str, str]] = []
        for method in ("hidden", "forward"):
            monkeypatch.setattr(Transformer, method, self.spy(method, getattr(Transformer, method)))

    def spy(self, method: str, actual: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spied(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
            self.ran.append(("student" if model is self.student else "teacher", method))
            return actual(model, ids)

        return spied

    def step(self, name: str, mix: Mix) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of a step."""
        self.ran.clear()
        for model in (self.student, self.teacher):
            model.zero_grad(set_to_none=True)
        value = objectives.STUDENTS[name].step_loss(mix, self.teacher)(self.student, self.ids, self.labels)
        value.backward()
        assert all(p.grad is None for p in self.teacher.parameters())
        gradients = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(self.student.parameters()))
        return value.item(), gradients


@pytest.mark.parametrize("name", ["kd_loss", "heads"])
def test_the_fused_steps_are_eagers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, mix = Watched(monkeypatch), Mix(1.5, soft_weight=0.7, hard_weight=0.3)
    value, gradients = watched.step("eager", mix)
    got, others = watched.step(name, mix)
    assert got == pytest.approx(value, rel=1e-5)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(others[parameter], gradient, atol=1e-5, rtol=1e-4)
    # The teacher does matter.
    alone, _ = watched.step("hard", mix)
    assert abs(alone - value) > 1e-2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hard", {("student", "hidden"), ("student", "forward")}),
        ("eager", {(m, what) for m in ("student", "teacher") for what in ("hidden", "forward")}),
        ("kd_loss", {(m, what) for m in ("student", "teacher") for what in ("hidden", "forward")}),
        ("heads", {("student", "hidden"), ("teacher", "hidden")}),
    ],
)
def test_a_step_makes_no_logits_it_does_not_need(
    name: str, expected: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    watched.step(name, Mix())
    assert set(watched.ran) == expected
    assert len(watched.ran) == len(expected)


# Parts

KEY = {"recipe": {"steps": 3, "rate": 0.1}, "corpus": "abc"}
PART = Part(
    {"step": 3, "seconds": 0.1 + 0.2, "text": "Größe", "nested": [1, None, {"a": True}]},
    {
        "weight/a.b": np.array([[1.5, -0.0], [np.nan, np.inf]], dtype=np.float32),
        "losses": np.array([0.1, 0.2]),
        "step": np.float32(7).reshape(()),
        "ids": np.arange(5, dtype=np.int32),
    },
)


def assert_same(got: Part | None, expected: Part) -> None:
    assert got is not None
    assert got.facts == expected.facts
    assert set(got.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        assert (got.arrays[name].dtype, got.arrays[name].shape) == (array.dtype, array.shape)
        assert got.arrays[name].tobytes() == array.tobytes()


def test_a_part_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Parts(tmp_path / "new" / "folder")
    assert store.load("teacher", KEY) is None
    store.save("teacher", KEY, PART)
    assert_same(store.load("teacher", KEY), PART)
    assert_same(Parts(store.folder).load("teacher", dict(reversed(KEY.items()))), PART)
    store.save("teacher", KEY, Part({"step": 4}))
    assert_same(store.load("teacher", KEY), Part({"step": 4}))
    store.drop("teacher", KEY)
    assert store.load("teacher", KEY) is None
    store.drop("teacher", KEY)


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    store = Parts(tmp_path)
    store.save("teacher", KEY, PART)
    others = [{**KEY, "corpus": "abd"}, {**KEY, "recipe": {"steps": 4, "rate": 0.1}}, {"corpus": "abc"}]
    for other in others:
        assert store.load("teacher", other) is None
        # Not even a file that has its name.
        store.path("teacher", other).write_bytes(store.path("teacher", KEY).read_bytes())
        assert store.load("teacher", other) is None
    assert store.load("student", KEY) is None
    assert_same(store.load("teacher", KEY), PART)


def test_a_truncated_part_is_absent(tmp_path: Path) -> None:
    store = Parts(tmp_path)
    store.save("teacher", KEY, PART)
    path = store.path("teacher", KEY)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert store.load("teacher", KEY) is None, length
    path.write_bytes(whole)
    assert_same(store.load("teacher", KEY), PART)


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


def _zip(entries: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return file.getvalue()


GARBAGE = {
    "noise": bytes(random.Random(1).randrange(256) for _ in range(5000)),
    "text": b"not a part\n" * 10,
    "zip without entries": _zip({}),
    "zip of texts": _zip({"facts": "{}", "key": json.dumps(KEY, sort_keys=True)}),
    "one array": _npy(),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_absent(tmp_path: Path, content: bytes) -> None:
    store = Parts(tmp_path)
    store.path("teacher", KEY).write_bytes(content)
    assert store.load("teacher", KEY) is None
    store.save("teacher", KEY, PART)
    assert_same(store.load("teacher", KEY), PART)


def test_a_damaged_byte_is_no_error(tmp_path: Path) -> None:
    store = Parts(tmp_path)
    store.save("teacher", KEY, Part({"step": 1}, {"w": np.arange(4)}))
    path = store.path("teacher", KEY)
    whole = path.read_bytes()
    absent = 0
    for place in range(len(whole)):
        for flipped in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            absent += store.load("teacher", KEY) is None
    # Some bytes mean nothing to a reader: dates, for one.
    assert absent > len(whole)


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("entry", ["facts", "key", "weight"])
def test_a_pickle_is_not_executed(tmp_path: Path, entry: str) -> None:
    store, marker = Parts(tmp_path / "cache"), tmp_path / "executed"
    entries: dict[str, Any] = {
        "facts": np.array("{}"),
        "key": np.array(json.dumps(KEY, sort_keys=True)),
        "weight": np.zeros(2),
    }
    path = store.path("teacher", KEY)
    np.savez(path, **entries)
    assert store.load("teacher", KEY) is not None
    np.savez(path, **{**entries, entry: np.array([Planted(marker)], dtype=object)})
    assert store.load("teacher", KEY) is None
    assert not marker.exists()
    # The plant does work.
    with np.load(path, allow_pickle=True) as stored:
        assert stored[entry].shape == (1,)
    assert marker.exists()


def test_nothing_half_written_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Parts(tmp_path)

    def full_disk(file: Any, **entries: Any) -> None:
        file.write(b"PK half of it")
        raise OSError("no space left on device")

    def interrupted(*names: Any) -> None:
        raise KeyboardInterrupt

    for earlier in (None, PART):
        if earlier is not None:
            store.save("teacher", KEY, earlier)
        for module, function, stand_in in ((np, "savez", full_disk), (os, "replace", interrupted)):
            with monkeypatch.context() as patch:
                patch.setattr(module, function, stand_in)
                with pytest.raises((OSError, KeyboardInterrupt)):
                    store.save("teacher", KEY, Part({"step": 9}))
            if earlier is None:
                assert store.load("teacher", KEY) is None
                assert list(tmp_path.glob("*.npz")) == []
            else:
                assert_same(store.load("teacher", KEY), earlier)
                assert list(tmp_path.glob("*.npz")) == [store.path("teacher", KEY)]


def test_a_changed_source_changes_the_hash(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("one")
    b.write_text("two")
    first = parts.hash_of_files([a, b])
    assert parts.hash_of_files([b, a]) == first
    b.write_text("two ")
    assert parts.hash_of_files([a, b]) != first
    b.write_text("two")
    assert parts.hash_of_files([a, b]) == first
    assert parts.hash_of_files([a]) != first
    assert parts.hash_of_files([a, b.rename(tmp_path / "c.py")]) != first


# Training


def small_data(vocab: int = 30, context: int = 6) -> Data:
    stream = np.random.default_rng(2).integers(vocab, size=200).astype(np.int32)
    rows = corpus.windows(stream, context)
    token_bytes = np.arange(vocab, dtype=np.int64) % 5 + 1
    return Data(rows[:20], rows[20:24], rows[24:], token_bytes, size=3)


RECIPE = Recipe(Shape(1, 16, 2), steps=24, learning_rate=1e-2, warmup=4)


def fresh(data: Data, seed: int = 1) -> Run:
    return Run(RECIPE, seed, data, np.full(data.vocab, 1 / data.vocab), CPU)


def cross_entropy(model: Transformer, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stops", [(7,), (1, 2, 20), (24,)], ids=str)
def test_an_interrupted_training_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    data = small_data()
    whole = fresh(data)
    train(whole, cross_entropy, 5, Parts(tmp_path / "whole"), "m", {"k": 1}, lambda value: None)
    assert list((tmp_path / "whole").iterdir()) == []
    assert len(whole.losses) == RECIPE.steps

    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    advanced = 0
    advance = Run.advance

    def counted(self: Run, *args: Any) -> None:
        nonlocal advanced
        advanced += 1
        advance(self, *args)

    monkeypatch.setattr(Run, "advance", counted)
    store = Parts(tmp_path / "parts")
    for stop in stops:
        said: list[float] = []

        def stop_there(value: float, said: list[float] = said, stop: int = stop) -> None:
            said.append(value)
            if len(said) == stop:
                raise Stop

        with pytest.raises(Stop):
            train(fresh(data), cross_entropy, 5, store, "m", {"k": 1}, stop_there)
    said = []
    resumed = fresh(data)
    # What the weights were before is forgotten.
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.fill_(torch.nan)
    train(resumed, cross_entropy, 5, store, "m", {"k": 1}, said.append)
    # The step at which each interruption came wasn't saved yet, so it is done twice; no other is.
    assert advanced == RECIPE.steps + len(stops)
    assert said == [value.item() for value in whole.losses] == [value.item() for value in resumed.losses]
    assert resumed.curve == whole.curve
    assert [step for step, _ in whole.curve] == [0, 5, 10, 15, 20, 24]
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimizer.state[a][moment], resumed.optimizer.state[b][moment])


def test_training_is_the_seeds_and_learns() -> None:
    data = small_data()

    def losses(seed: int) -> list[float]:
        run = fresh(data, seed)
        for _ in range(RECIPE.steps):
            run.advance(cross_entropy, 100)
        assert run.curve[-1][0] == RECIPE.steps
        return [value.item() for value in run.losses]

    first = losses(1)
    assert losses(1) == first
    assert losses(2) != first
    assert np.mean(first[-4:]) < np.mean(first[:4])


def test_a_checkpoint_of_another_key_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    data, store = small_data(), Parts(tmp_path)
    train(fresh(data), cross_entropy, 5, store, "m", {"k": 1}, lambda value: None)
    assert store.load("m-unfinished", {"k": 1}) is not None

    def stop(value: float) -> None:
        raise Stop

    other = fresh(data)
    with pytest.raises(Stop):
        train(other, cross_entropy, 5, store, "m", {"k": 2}, stop)
    assert other.step == 1


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(Shape(1, 8, 1), steps=100, learning_rate=0.5, warmup=10, decay=0.4)
    rates = [training.rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.5 * (i + 1) / 10 for i in range(10)])
    assert rates[10:60] == [0.5] * 50
    assert rates[60:] == pytest.approx([0.5 * (100 - i) / 40 for i in range(60, 100)])


def test_score_is_every_prediction_but_a_windows_first_token() -> None:
    data = small_data()
    model = fresh(data).model
    rows = data.windows[:11]
    assert len(rows) > training.WINDOWS_AT_ONCE
    expected = 0.0
    with torch.no_grad():
        for row in rows.tolist():
            chances = model(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)
            expected -= sum(chances[i, target].item() for i, target in enumerate(row[1:]))
    assert score(model, rows, CPU) == pytest.approx(expected, rel=1e-6)
    # Eight nats of ln 2 over tokens of 2 and 3 bytes; the first token of a window isn't counted.
    sizes = np.array([100, 2, 3])
    assert bits_per_byte(8 * math.log(2), np.array([[0, 1, 2], [0, 2, 2]]), sizes) == pytest.approx(8 / 11)


# Configuration


def test_more_minutes_are_more_steps_and_nothing_else() -> None:
    assert config_for() == Config()
    longer = config_for(11.5, 4)
    # The default's 7 minutes have 4.5 that grow; 11.5 have 9.
    assert longer.teacher.steps == 2 * Config().teacher.steps
    assert longer.student.steps == 2 * Config().student.steps
    assert longer.seeds == (0, 1, 2, 3)
    same = {"seeds": Config().seeds, "teacher": Config().teacher, "student": Config().student}
    assert replace(longer, **same) == Config()


@pytest.mark.parametrize("minutes", [6.9, 0.0, -7.0, math.nan, math.inf])
def test_impossible_minutes_are_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match=f"--minutes must be at least 7, got {minutes:g}"):
        config_for(minutes)


@pytest.mark.parametrize("seeds", [1, 0, -1])
def test_too_few_seeds_are_refused(seeds: int) -> None:
    with pytest.raises(ValueError, match=f"--seeds must be at least 2, .*, got {seeds}"):
        config_for(7.0, seeds)


def test_a_head_says_what_it_starts_from() -> None:
    assert Head(4, 128_256).words == "V = 128,256 from logits"
    assert Head(4, 300, 8, 12).words == "V = 300 from hidden states, 8 and 12 wide"
    for one_sided in ((8, 0), (0, 12)):
        with pytest.raises(ValueError, match=rf"both widths must be 0 or neither, got \({one_sided[0]}, "):
            Head(4, 300, *one_sided)
    # What the report calls the same size is the same size.
    sizes = [Head(4, 300), Head(4, 300, 8, 12), Head(4, 300, 12, 8), Head(4, 301), Head(5, 300)]
    assert [report.size_of(asdict(size)) for size in sizes] == sizes
    assert report.size_of(asdict(Head(4, 300, repeats=2))) == Head(4, 300)


def test_devices() -> None:
    there = torch.cuda.device_count()
    assert demo_run.device_here().type == ("cuda" if there else "cpu")
    assert demo_run.device_here("cpu") == CPU
    for name in ("tpu", "", "cuda:x", "cpu:3", "cuda:-1", "cuda:", "meta", "CPU"):
        with pytest.raises(ValueError, match=f"--device must be cpu or cuda, got '{name}'"):
            demo_run.device_here(name)
    with pytest.raises(
        ValueError, match=rf"--device cuda:{there} isn't here: torch sees {there} CUDA devices"
    ):
        demo_run.device_here(f"cuda:{there}")


# Report


def measured(implementation: str, size: Head, seconds: float) -> dict[str, Any]:
    return {
        "implementation": implementation,
        **asdict(size),
        "seconds": seconds,
        "best_seconds": seconds,
        "first_seconds": seconds,
        "peak_bytes": 3_000_000,
        "method": "VmHWM",
        "loss": 2.5,
        "gradient_norm": 0.125,
        "backend": "cpu" if implementation == "kd_loss" else None,
        "busy_neighbours": 0.0,
        "total_seconds": 1.0,
    }


# Two differ in nothing but what they start from.
SIZES = (Head(4, 300), Head(2, 128_256), Head(2, 128_256, 8, 12, repeats=3))


def good() -> dict[str, Any]:
    """Figures of a run that holds every condition: teacher 1.5 < hard 1.9 < bigram 2.0 < unigram 2.5."""

    def model(bits: float, tokens: int, seed: int | None = None) -> dict[str, Any]:
        facts = {"bits_per_byte": bits, "tokens": tokens, "steps": 60, "seconds": 6.0, "step_seconds": 0.1}
        return facts if seed is None else {"seed": seed, **facts}

    bits = {
        "hard": (1.88, 1.92),
        "eager": (1.70, 1.71),
        "kd_loss": (1.70, 1.72),
        "heads": (1.71, 1.73),
    }
    losses = {name: [[4.0 + 0.01 * step for step in range(60)]] * 2 for name in bits}
    curve = [[0.0, 5.0], [30.0, 2.5], [60.0, 1.8]]
    return {
        "config": json.loads(json.dumps(asdict(Config(seeds=(0, 1), heads=SIZES)))),
        "environment": {
            "processor": "a processor",
            "threads": 2,
            "device": "cpu",
            "torch": "2.10",
            "kdkernels": "0.1.0",
            "python": "3.12.0",
        },
        "corpus": {
            "root": "lib",
            "sha256": "0123456789abcdef" * 4,
            "files": {"train": 80, "validation": 10, "heldout": 11},
            "bytes": {"train": 800, "validation": 100, "heldout": 1100},
        },
        "vocab": 8192,
        "backend": {"name": "cpu", "reasons": {"cuda": "no CUDA", "cpu": None, "reference": None}},
        "baselines": {"unigram": 2.5, "bigram": 2.0},
        "validation_baselines": {"unigram": 2.6, "bigram": 2.1},
        "teacher": model(1.5, 300_000),
        "students": {
            name: [model(value, 100_000, seed) for seed, value in enumerate(values)]
            for name, values in bits.items()
        },
        "scored_bytes": 1000,
        "scored_tokens": 300,
        "curve_difference": {
            "kd_loss": {"early_steps": 50, "early": 2e-7, "overall": 3e-6},
            "heads": {"early_steps": 50, "early": 4e-7, "overall": 5e-6},
        },
        "curves": {
            "teacher": curve,
            **{name: [curve, curve] for name in bits},
            "losses": losses,
            "gap": {name: [[1e-7] * 60, [0.0] * 60] for name in ("kd_loss", "heads")},
        },
        "heads": [
            measured(name, size, seconds)
            for size in SIZES
            for name, seconds in (("eager", 0.04), ("torch.compile", 0.02), ("kd_loss", 0.01))
        ],
        "seconds": 150.0,
        "wall_seconds": 100.0,
    }


def test_good_figures_have_no_failure() -> None:
    assert report.verdict(good()) == []


Spoil = Callable[[dict[str, Any]], Any]


def _set(*path: Any, value: Any) -> Spoil:
    def spoil(figures: dict[str, Any]) -> None:
        place: Any = figures
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return spoil


def _unfused(figures: dict[str, Any]) -> None:
    figures["backend"] = {"name": "reference", "reasons": {"cpu": "no library was built", "reference": None}}


SPOILT: dict[str, tuple[Spoil, list[str]]] = {
    "unigram": (
        _set("baselines", "unigram", value=1.49),
        ["the teacher (1.500 bits per byte) doesn't beat the unigram (1.490)"],
    ),
    "bigram": (
        _set("baselines", "bigram", value=1.4),
        ["the teacher (1.500 bits per byte) doesn't beat the bigram (1.400)"],
    ),
    "a tie": (
        _set("baselines", "bigram", value=1.5),
        ["the teacher (1.500 bits per byte) doesn't beat the bigram (1.500)"],
    ),
    "hard student": (
        # (1.0 + 1.92) / 2
        _set("students", "hard", 0, "bits_per_byte", value=1.0),
        ["the teacher (1.500 bits per byte) doesn't beat the hard-label student (1.460)"],
    ),
    "teacher diverged": (
        _set("teacher", "bits_per_byte", value=math.nan),
        [
            "the teacher (nan bits per byte) doesn't beat the unigram (2.500)",
            "the teacher (nan bits per byte) doesn't beat the bigram (2.000)",
            "the teacher (nan bits per byte) doesn't beat the hard-label student (1.900)",
        ],
    ),
    "hard student diverged": (
        _set("students", "hard", 1, "bits_per_byte", value=math.nan),
        [
            "the teacher (1.500 bits per byte) doesn't beat the hard-label student (nan)",
            "not measured: student, hard labels only: a model diverged",
        ],
    ),
    "eager student diverged": (
        _set("students", "eager", 1, "bits_per_byte", value=math.nan),
        ["not measured: student, distilled, eager PyTorch: a model diverged"],
    ),
    "kd_loss student diverged": (
        _set("students", "kd_loss", 0, "bits_per_byte", value=math.inf),
        ["not measured: student, distilled, kd_loss: a model diverged"],
    ),
    "heads student diverged": (
        _set("students", "heads", 1, "bits_per_byte", value=math.nan),
        ["not measured: student, distilled, kd_loss of heads: a model diverged"],
    ),
    "curves": (
        _set("curve_difference", "kd_loss", "early", value=1.1e-3),
        ["the loss curves of kd_loss and eager differ by 0.0011 nats in the first 50 steps, more than 0.001"],
    ),
    "curves of NaN": (
        _set("curve_difference", "kd_loss", "early", value=math.nan),
        ["the loss curves of kd_loss and eager differ by nan nats in the first 50 steps"],
    ),
    "short curves": (
        _set("curve_difference", "kd_loss", "early_steps", value=49),
        ["the loss curves of kd_loss and eager have 49 steps, fewer than 50"],
    ),
    "curves of heads": (
        _set("curve_difference", "heads", "early", value=1.1e-3),
        ["the loss curves of kd_loss of heads and eager differ by 0.0011 nats in the first 50 steps"],
    ),
    "curves of heads of NaN": (
        _set("curve_difference", "heads", "early", value=math.nan),
        ["the loss curves of kd_loss of heads and eager differ by nan nats in the first 50 steps"],
    ),
    "short curves of heads": (
        _set("curve_difference", "heads", "early_steps", value=49),
        ["the loss curves of kd_loss of heads and eager have 49 steps, fewer than 50"],
    ),
    "a head with an error": (
        _set("heads", 1, value={**measured("torch.compile", SIZES[0], 1.0), "error": "no compiler"}),
        ["not measured: torch.compile at V = 300 from logits: no compiler"],
    ),
    "a head that isn't there": (
        lambda figures: figures["heads"].pop(4),
        ["not measured: torch.compile at V = 128,256 from logits"],
    ),
    "a head from hidden states that isn't there": (
        lambda figures: figures["heads"].pop(8),
        ["not measured: kd_loss at V = 128,256 from hidden states, 8 and 12 wide"],
    ),
    "no peak": (
        _set("heads", 5, "peak_bytes", value=None),
        ["not measured: peak memory of kd_loss at V = 128,256 from logits"],
    ),
    "unfused": (
        _unfused,
        ["not measured: the fused kernel: kd_loss ran on 'reference' (no library was built)"],
    ),
    "another loss": (
        _set("heads", 2, "loss", value=2.5 * (1 + 2e-4)),
        ["kd_loss and eager compute different losses at V = 300 from logits: loss 2.5005 and 2.5"],
    ),
    "another gradient": (
        _set("heads", 4, "gradient_norm", value=math.nan),
        [
            "torch.compile and eager compute different losses at V = 128,256 from logits: gradient_norm nan "
            "and 0.125"
        ],
    ),
    "another gradient from hidden states": (
        _set("heads", 8, "gradient_norm", value=0.125 * (1 + 2e-4)),
        [
            "kd_loss and eager compute different losses at V = 128,256 from hidden states, 8 and 12 wide: "
            "gradient_norm 0.125025 and 0.125"
        ],
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILT.values(), ids=SPOILT.keys())
def test_the_verdict_names_each_failure(spoil: Spoil, expected: list[str]) -> None:
    figures = good()
    spoil(figures)
    failures = report.verdict(figures)
    assert len(failures) == len(expected), failures
    for failure, start in zip(failures, expected, strict=True):
        assert failure.startswith(start)
    written = report.markdown(figures)
    assert "**Failed.**" in written
    assert all(f"- {failure}" in written for failure in failures)


def test_what_is_within_the_tolerance_holds() -> None:
    figures = good()
    for difference in figures["curve_difference"].values():
        difference["early"] = 1e-3
        # After the first steps roundings have grown: said, not judged.
        difference["overall"] = 0.5
    figures["heads"][2]["loss"] = 2.5 * (1 - 9e-5)
    # From hidden states the loss may be another one.
    for entry in figures["heads"][6:]:
        entry["loss"] = 3.5
    # An accelerator that this version has no kernel for: a note, not a failure.
    figures["backend"] = {"name": "reference", "reasons": {"cuda": "not in this version", "cpu": "on a GPU"}}
    figures["environment"]["device"] = "cuda"
    assert report.verdict(figures) == []
    said = "\n".join(report.notes(figures))
    assert "kd_loss ran unfused, on its reference" in said
    assert "cuda: not in this version" in said


def test_curve_differences_by_hand() -> None:
    level = np.zeros(60)
    a, b = level.copy(), level.copy()
    a[49], a[50] = 0.25, -0.75
    b[3] = -0.5
    assert report.curve_differences([a, b], [level, level]) == {
        "early_steps": 50,
        "early": 0.5,
        "overall": 0.75,
    }
    assert report.curve_differences([a[:40], b], [level[:40], level]) == {
        "early_steps": 40,
        "early": 0.5,
        "overall": 0.5,
    }


@pytest.mark.parametrize("diverged", [0, 1])
def test_a_diverged_curve_is_never_lost(diverged: int) -> None:
    curves = [np.zeros(60), np.ones(60)]
    curves[diverged][10] = math.nan
    difference = report.curve_differences([np.zeros(60), np.zeros(60)], curves)
    assert math.isnan(difference["early"])
    assert math.isnan(difference["overall"])


def test_distillation_in_words() -> None:
    def words(hard: tuple[float, ...], distilled: tuple[float, ...]) -> str:
        figures = good()
        for name, values in (("hard", hard), ("kd_loss", distilled)):
            figures["students"][name] = [{"bits_per_byte": value} for value in values]
        return report.distillation_in_words(figures)

    beats = "Distillation beats hard labels at equal steps, beyond the seeds' spread"
    within = "Distillation does not beat hard labels beyond the seeds' spread"
    worse = "Distillation does not beat hard labels at equal steps: it is worse"
    # Means 2.05 and 1.80, spreads 0.10 and 0.04.
    assert words((2.0, 2.1), (1.78, 1.82)) == (
        f"{beats} (+0.2500 bits per byte on average, spread over seeds 0.1000)."
    )
    # Apart, but by less than one of them is spread: 2.25 - 1.95 against 0.5.
    assert words((2.0, 2.5), (1.95, 1.95)).startswith(f"{within} (+0.3000")
    # Overlapping, whatever the means say: 6.2 / 3 - 5.8 / 3 against 0.1.
    assert words((2.0, 2.1), (1.5, 2.05)).startswith(f"{within} (+0.2750")
    assert words((2.0, 2.1, 2.1), (2.0, 1.9, 1.9)).startswith(f"{within} (+0.1333")
    assert words((2.0, 2.1), (2.2, 2.1)).startswith(f"{worse} (-0.1000")


def test_notes_name_both_fused_curves() -> None:
    said = report.notes(good())
    largest = "Largest difference between the eager and the"
    assert [note for note in said if note.startswith(largest)] == [
        f"{largest} kd_loss curves: 2e-07 nats over the first 50 steps, 3e-06 overall.",
        f"{largest} kd_loss of heads curves: 4e-07 nats over the first 50 steps, 5e-06 overall.",
    ]
    assert any("hidden states, weights and biases in the place of logits" in note for note in said)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_both_tables() -> None:
    figures = good()
    figures["heads"][1] = {**figures["heads"][1], "error": "no compiler"}
    figures["heads"][5]["peak_bytes"] = None
    for entry in (figures["heads"][6], figures["heads"][8]):
        entry["seconds"] *= 5
    lines = [cells(line) for line in report.markdown(figures).splitlines() if line.startswith("|")]
    rows = {row[0]: row for row in lines}
    assert rows["unigram"] == ["unigram", "2.500", "", "300,000", ""]
    assert rows["bigram"] == ["bigram", "2.000", "", "300,000", ""]
    assert rows["teacher"] == ["teacher", "1.500", "", "300,000", "100"]
    # Means of two seeds.
    students = [row[:4] for row in lines if row[0].startswith("student")]
    assert students == [
        ["student, hard labels only", "1.900", "1.880 to 1.920", "100,000"],
        ["student, distilled, eager PyTorch", "1.705", "1.700 to 1.710", "100,000"],
        ["student, distilled, kd_loss", "1.710", "1.700 to 1.720", "100,000"],
        ["student, distilled, kd_loss of heads", "1.720", "1.710 to 1.730", "100,000"],
    ]
    # 40 ms / 10 ms; where both are 5 times as slow from hidden states, 200 ms / 50 ms.
    wide = "hidden states, 8 and 12 wide"
    assert lines[-9:] == [
        ["eager", "logits", "4", "300", "40.0", "4.0", "3"],
        ["torch.compile", "logits", "4", "300", "not measured: no compiler", "", ""],
        ["kd_loss (cpu)", "logits", "4", "300", "10.0", "1.0", "3"],
        ["eager", "logits", "2", "128,256", "40.0", "4.0", "3"],
        ["torch.compile", "logits", "2", "128,256", "20.0", "2.0", "3"],
        ["kd_loss (cpu)", "logits", "2", "128,256", "10.0", "1.0", "not measured"],
        ["eager", wide, "2", "128,256", "200.0", "4.0", "3"],
        ["torch.compile", wide, "2", "128,256", "20.0", "0.4", "3"],
        ["kd_loss (cpu)", wide, "2", "128,256", "50.0", "1.0", "3"],
    ]
    assert "**All conditions hold.**" in report.markdown(good())
    assert "Trained and measured in 2.5 minutes." in report.markdown(good())


def test_busy_neighbours_are_said() -> None:
    figures = good()
    assert not any("Other processes" in note for note in report.notes(figures))
    figures["heads"][0]["busy_neighbours"] = 0.7
    assert any("kept up to 0.7 CPUs busy" in note for note in report.notes(figures))


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with gaps"])
def test_plot_writes_a_png(tmp_path: Path, complete: bool) -> None:
    figures = good()
    if not complete:
        figures["heads"][1] = {**asdict(Head(4, 300)), "implementation": "torch.compile", "error": "none"}
        figures["heads"][3]["peak_bytes"] = None
        figures["curves"]["gap"]["heads"][1][5] = math.nan
        figures["curves"]["hard"] = np.array(figures["curves"]["hard"])
        figures["curves"]["hard"][0, 1:, 1] = math.nan
    path = tmp_path / "curves.part"
    report.plot(figures, path)
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert content.rstrip(b"\0")[-8:-4] == b"IEND"


def test_plot_draws_every_student_gap_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    figures = good()
    figures["curves"]["gap"]["heads"][1] = [0.5] * 60
    report.plot(figures, tmp_path / "curves.part")
    learning, gap, time, memory = drawn[0].axes
    assert learning.get_legend_handles_labels()[1] == ["teacher", *report.NAMES.values()]
    lines = [line for line in learning.get_lines() if line.get_label() in report.NAMES.values()]
    assert len({line.get_color() for line in lines}) == len(objectives.STUDENTS) == 4
    # Two seeds each, and what is allowed.
    assert gap.get_legend_handles_labels()[1] == [
        "kd_loss, each seed",
        "kd_loss of heads, each seed",
        "allowed, first steps",
    ]
    assert [np.max(line.get_ydata()) for line in gap.get_lines()[:4]] == [1e-7, 1e-9, 1e-7, 0.5]
    for axes in (time, memory):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [
            "4 × 300\nlogits",
            "2 × 128,256\nlogits",
            "2 × 128,256\nhidden states,\n8 and 12 wide",
        ]
        assert len(axes.patches) == len(figures["heads"]) == 9


def test_diverged_figures_are_published(tmp_path: Path, capsys: Any) -> None:
    figures = good()
    figures["teacher"]["bits_per_byte"] = math.nan
    assert demo_run.publish(figures, tmp_path) == 1
    assert capsys.readouterr().out.count("FAILED: the teacher (nan") == 3
    document = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert document["teacher"]["bits_per_byte"] is None
    assert len(document["failures"]) == 3
    assert demo_run.publish(good(), tmp_path) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["failures"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "figures.json", "report.md"]


# Loss head


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (Head(3, 50), ([(3, 50)], [(3, 50)])),
        (Head(3, 50, 8, 12), ([(3, 8), (50, 8)], [(3, 12), (50, 12)])),
    ],
    ids=["logits", "hidden states"],
)
def test_head_inputs_are_the_same_in_every_process(
    size: Head, shapes: tuple[list[tuple[int, int]], list[tuple[int, int]]]
) -> None:
    torch.manual_seed(1)
    student, teacher, labels = head.inputs(size, CPU)
    torch.manual_seed(2)
    again = head.inputs(size, CPU)
    for a, b in zip((*student, *teacher, labels), (*again[0], *again[1], again[2]), strict=True):
        assert torch.equal(a, b)
    assert ([x.shape for x in student], [x.shape for x in teacher]) == shapes
    assert labels.shape == (3,)
    assert all(x.requires_grad for x in student)
    assert not any(x.requires_grad for x in teacher)


def test_hidden_states_make_logits_of_the_same_spread() -> None:
    student, teacher, _ = head.inputs(Head(64, 500, 256, 384), CPU)
    for side in (student, teacher):
        assert head.logits_of(side).std().item() == pytest.approx(2, rel=0.1)
        hidden, weight = side
        assert hidden.std().item() == pytest.approx(weight.std().item(), rel=0.05)


@pytest.mark.parametrize("size", [Head(5, 50), Head(5, 50, 8, 12)], ids=["logits", "hidden states"])
@pytest.mark.parametrize("implementation", ["eager", "kd_loss"])
def test_a_measured_loss_is_the_formula(implementation: str, size: Head) -> None:
    mix = Mix(2.0, soft_weight=0.7, hard_weight=0.3)
    repeats: list[int] = []
    race = bench.race

    def counted(contestants: Any, **options: Any) -> Any:
        repeats.append(options["max_rounds"])
        return race(contestants, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "race", counted)
        facts = head.measure(lambda message: None, implementation, replace(size, repeats=2), mix, "cpu", 1)
    student, teacher, labels = head.inputs(size, CPU)
    wide = [x.detach().double().requires_grad_() for x in student]
    # The logits: what was given, or the product.
    z = wide[0] if len(wide) == 1 else wide[0] @ wide[1].T
    v = teacher[0].double() if len(teacher) == 1 else teacher[0].double() @ teacher[1].double().T
    p, q = (v / 2).softmax(-1), (z / 2).softmax(-1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    hard = -z.log_softmax(-1)[torch.arange(5), labels].mean()
    value = 0.7 * 4 * soft + 0.3 * hard
    gradients = torch.autograd.grad(value, wide)
    assert facts["loss"] == pytest.approx(value.item(), rel=1e-5)
    squares = [g.square().sum().item() for g in gradients]
    assert facts["gradient_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    # None of them is lost beside the other.
    assert min(squares) > 0.05 * sum(squares)
    assert repeats == [2]
    assert (facts["backend"] is None) == (implementation == "eager")


def test_kd_loss_from_hidden_states_is_given_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = head.inputs(Head(3, 50, 8, 12), CPU)
    monkeypatch.setattr(head, "logits_of", lambda side: pytest.fail("logits were made"))
    value = head.spelled("kd_loss", Mix())(student, teacher, labels)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(value, student), student, strict=True))
    assert isinstance(head.source_of(teacher), kd.Head)
    (z,), (v,), _ = head.inputs(Head(3, 50), CPU)
    assert head.source_of((z,)) is z
    assert head.source_of((v,)) is v


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "measure failed:\nTraceback (most recent call last):\n  File x\ntorch.X.InductorError: "
            "RuntimeError: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1\n",
            "torch.X.InductorError: RuntimeError: no compiler",
        ),
        ("measure ended with exit code -9", "measure ended with exit code -9"),
        ("", "no reason given"),
    ],
)
def test_a_reason_is_one_line(said: str, expected: str) -> None:
    assert head.reason(bench.ProcessDied(said)) == expected


def test_a_failed_measurement_is_tried_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls: list[str] = []
    compiler = False

    def isolated(function: Any, implementation: str, size: Head, *args: Any, **options: Any) -> Any:
        calls.append(implementation)
        if implementation == "torch.compile" and not compiler:
            raise bench.ProcessDied("RuntimeError: no compiler")
        return measured(implementation, size, 0.25 if size.student_width else 0.5)

    monkeypatch.setattr(bench, "run_isolated", isolated)
    # Two sizes that differ in nothing but what they start from are two.
    config = Config(heads=(Head(4, 300), Head(4, 300, 8, 12)))
    place = demo_run.Place(Parts(tmp_path), CPU, bench.Progress())
    errors = [h.get("error") for h in demo_run._heads(config, place)]
    assert errors == [None, "RuntimeError: no compiler", None] * 2
    compiler = True
    for _ in range(2):
        assert [h["seconds"] for h in demo_run._heads(config, place)] == [0.5] * 3 + [0.25] * 3
    assert calls == [*head.IMPLEMENTATIONS * 2, "torch.compile", "torch.compile"]


# End to end

TINY = Config(
    vocab=300,
    context=16,
    windows=4,
    teacher=Recipe(Shape(1, 16, 2), steps=60, learning_rate=5e-3, warmup=5),
    student=Recipe(Shape(1, 8, 1), steps=52, learning_rate=5e-3, warmup=5),
    seeds=(0, 1),
    heldout_windows=16,
    validation_windows=4,
    heads=(Head(4, 300, repeats=2), Head(4, 300, 8, 12, repeats=2)),
)
STUDENTS = ("hard", "eager", "kd_loss", "heads")
MODELS = ["teacher", *(f"{name}-{seed}" for name in STUDENTS for seed in TINY.seeds)]


def write_sources(root: Path) -> Path:
    numbers = random.Random(0)

    def line() -> str:
        f, a = numbers.randrange(99), numbers.randrange(99)
        return f"def f{f}(x, y):\n    return x + {a} * y  # naïve\n"

    names = [
        name
        for split, count in zip(corpus.SPLITS, (20, 4, 6), strict=True)
        for name in names_in(split, count)
    ]
    return write_tree(root, {name: "\n".join(line() for _ in range(15)) for name in names})


class Finished:
    """A tiny run that was interrupted while its fourth model was trained, and then went on to its end."""

    def __init__(self, folder: Path) -> None:
        self.out, self.root = folder / "out", write_sources(folder / "src")
        self.interrupted: list[str] = []
        with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_run, "train", self.spy(self.interrupted, stop_at=4))
            with pytest.raises(KeyboardInterrupt):
                self.run()
        self.left = sorted(path.name for path in self.out.iterdir())
        self.resumed: list[str] = []
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_run, "train", self.spy(self.resumed))
            self.status = self.run()
        self.said = said.getvalue()
        self.figures = self.read()

    def run(self, out: Path | None = None, config: Config = TINY) -> int:
        return demo_run.run(config, out or self.out, CPU, self.root)

    def read(self) -> dict[str, Any]:
        document = json.loads((self.out / "figures.json").read_text(), parse_constant=pytest.fail)
        assert isinstance(document, dict)
        return document

    @staticmethod
    def spy(names: list[str], stop_at: int | None = None) -> Callable[..., None]:
        def spied(run: Run, loss: Any, validate_every: int, store: Parts, name: str, *rest: Any) -> None:
            names.append(name)
            if len(names) == stop_at:
                raise KeyboardInterrupt
            train(run, loss, validate_every, store, name, *rest)

        return spied


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("demo"))


def learnt(figures: dict[str, Any]) -> dict[str, Any]:
    """All that training decides, and no time."""

    def bits(model: dict[str, Any]) -> tuple[Any, ...]:
        return model.get("seed"), model["bits_per_byte"], model["tokens"], model["steps"]

    chosen = ("baselines", "validation_baselines", "curve_difference", "curves", "corpus", "scored_bytes")
    return {
        "teacher": bits(figures["teacher"]),
        "students": {name: [bits(m) for m in models] for name, models in figures["students"].items()},
        **{name: figures[name] for name in chosen},
    }


def test_a_run_writes_its_report(finished: Finished) -> None:
    figures = finished.figures
    assert finished.status == (1 if figures["failures"] else 0)
    assert figures["failures"] == report.verdict(figures)
    # All that such models may fail in is to beat the baselines; a machine without a compiler can't compile.
    excused = ("the teacher (", "not measured: torch.compile", "not measured: the fused kernel")
    assert [f for f in figures["failures"] if not f.startswith(excused)] == []
    differences = figures["curve_difference"]
    assert {name: d["early_steps"] for name, d in differences.items()} == {"kd_loss": 50, "heads": 50}
    assert {name: len(models) for name, models in figures["students"].items()} == dict.fromkeys(STUDENTS, 2)
    tokens = TINY.student.steps * TINY.windows * TINY.context
    assert {m["tokens"] for models in figures["students"].values() for m in models} == {tokens}
    assert figures["teacher"]["tokens"] == TINY.teacher.steps * TINY.windows * TINY.context
    # Students of one seed start from the same weights, see the same text, and differ by their objective.
    curves = figures["curves"]
    for seed in range(2):
        starts = {tuple(curves[name][seed][0]) for name in STUDENTS}
        assert len(starts) == 1
    assert curves["losses"]["hard"] != curves["losses"]["eager"]
    for name in ("kd_loss", "heads"):
        apart = np.abs(np.array(curves["losses"][name]) - np.array(curves["losses"]["eager"]))
        assert np.array(curves["gap"][name]).tolist() == apart.tolist()
        assert differences[name]["overall"] == apart.max()
    assert [(h["implementation"], report.size_of(h)) for h in figures["heads"]] == [
        (name, size) for size in (Head(4, 300), Head(4, 300, 8, 12)) for name in head.IMPLEMENTATIONS
    ]
    written = (finished.out / "report.md").read_text(encoding="utf-8")
    assert written == report.markdown(figures)
    assert (finished.out / "curves.png").read_bytes().startswith(PNG)
    names = sorted(path.name for path in finished.out.iterdir())
    assert names == ["cache", "curves.png", "figures.json", "report.md"]


def test_all_is_fitted_on_training_files_and_scored_on_held_out_ones(finished: Finished) -> None:
    text = corpus.read_corpus(finished.root)
    tokenizer = corpus.train_tokenizer(text.texts["train"], TINY.vocab)
    sizes = corpus.token_bytes(tokenizer)
    streams = {split: corpus.encode(tokenizer, text.texts[split]) for split in corpus.SPLITS}
    heldout = corpus.spread_windows(streams["heldout"], TINY.context, TINY.heldout_windows)
    validation = corpus.spread_windows(streams["validation"], TINY.context, TINY.validation_windows)
    rows = corpus.windows(streams["train"], TINY.context)
    seen = np.concatenate([corpus.batch(rows, TINY.windows, 0, step) for step in range(TINY.teacher.steps)])
    model = Bigram(seen[:, :-1], seen[:, 1:], TINY.vocab)
    figures = finished.figures
    assert figures["scored_tokens"] == heldout[:, 1:].size
    assert figures["scored_bytes"] == sizes[heldout[:, 1:]].sum()
    for name, scored in (("baselines", heldout), ("validation_baselines", validation)):
        contexts, targets = scored[:, :-1], scored[:, 1:]
        nats = {"unigram": model.unigram.nats(targets), "bigram": model.nats(contexts, targets)}
        text_bytes = sizes[targets].sum()
        assert figures[name] == {
            k: pytest.approx(v / math.log(2) / text_bytes, rel=1e-9) for k, v in nats.items()
        }
    teacher = Transformer(TINY.vocab, TINY.context, TINY.teacher.shape)
    (path,) = (finished.out / "cache").glob("teacher-*.npz")
    with np.load(path) as stored, torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(torch.from_numpy(stored[f"weight/{name}"]))
    for scored, bits in (
        (heldout, figures["teacher"]["bits_per_byte"]),
        (validation, figures["curves"]["teacher"][-1][1]),
    ):
        expected = score(teacher, scored, CPU) / math.log(2) / sizes[scored[:, 1:]].sum()
        assert bits == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_run_goes_on(finished: Finished) -> None:
    assert finished.left == ["cache"]
    assert finished.interrupted == MODELS[:4]
    assert finished.resumed == MODELS[3:]
    whole: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "publish", lambda figures, out: whole.append(figures) or 0)
        assert finished.run(finished.out.parent / "whole", replace(TINY, heads=())) == 0
    assert learnt(json.loads(json.dumps(whole[0]))) == learnt(finished.figures)


def test_output_that_is_redirected_is_plain_lines(finished: Finished) -> None:
    assert "\x1b" not in finished.said
    assert "\r" not in finished.said
    lines = finished.said.splitlines()
    for name, model in zip(
        ("teacher", "hard-0", "kd_loss-1"), (TINY.teacher, TINY.student, TINY.student), strict=True
    ):
        assert f"{name.ljust(16)}: {model.steps} steps" in lines
        assert any(line.startswith(f"{name.ljust(16)}: {model.steps}/{model.steps} in ") for line in lines)
    assert f"Written: {finished.out / 'report.md'}" in finished.said
    assert finished.said.count("FAILED: ") == len(finished.figures["failures"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_finished_run_does_nothing_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    before = finished.read()
    kept = {path.name: path.read_bytes() for path in (finished.out / "cache").iterdir()}
    isolated: list[str] = []

    def again(*args: Any, **options: Any) -> Any:
        raise AssertionError("what is on disk was made again")

    def not_isolated(function: Any, implementation: str, *args: Any, **options: Any) -> Any:
        isolated.append(implementation)
        raise bench.ProcessDied("RuntimeError: not measured again")

    monkeypatch.setattr(demo_run, "train", again)
    monkeypatch.setattr(demo_run, "score", again)
    monkeypatch.setattr(corpus, "train_tokenizer", again)
    monkeypatch.setattr(corpus, "encode", again)
    monkeypatch.setattr(bench, "run_isolated", not_isolated)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        status = finished.run()
    after = finished.read()
    assert status == (1 if after["failures"] else 0)
    assert learnt(after) == learnt(before)
    # Only what had failed is tried again.
    assert isolated == [h["implementation"] for h in before["heads"] if h.get("error")]
    if not isolated:
        assert status == finished.status
        assert after["heads"] == before["heads"]
    assert {path.name: path.read_bytes() for path in (finished.out / "cache").iterdir()} == kept
    # In a terminal the phases are bars.
    said = terminal.getvalue()
    assert "━" in said
    assert f"{TINY.teacher.steps}/{TINY.teacher.steps}" in said
    assert f"{TINY.teacher.steps} steps" not in said


def test_another_setting_trains_only_what_depends_on_it(finished: Finished) -> None:
    def trained(config: Config, fused_code: str | None = None) -> list[str]:
        names: list[str] = []

        def pretend(run: Run, loss: Any, validate_every: int, store: Parts, name: str, *rest: Any) -> None:
            names.append(name)
            # One step is enough to be asked for the next model.
            run.advance(loss, validate_every)
            run.losses *= run.recipe.steps

        with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_run, "train", pretend)
            patch.setattr(Parts, "save", lambda *args: None)
            patch.setattr(demo_run, "publish", lambda *args: 0)
            if fused_code is not None:
                patch.setattr(demo_run, "_fused_code", lambda: fused_code)
            finished.run(finished.out, replace(config, heads=()))
        return names

    distilled = [name for name in MODELS if name.startswith(("eager", "kd_loss", "heads"))]
    assert trained(TINY) == []
    assert trained(replace(TINY, mix=Mix(temperature=2.0))) == distilled
    assert trained(replace(TINY, student=replace(TINY.student, learning_rate=1e-3))) == MODELS[1:]
    assert trained(replace(TINY, teacher=replace(TINY.teacher, learning_rate=1e-3))) == [
        "teacher",
        *distilled,
    ]
    assert trained(replace(TINY, seeds=(0, 1, 2))) == [f"{name}-2" for name in STUDENTS]
    # What kd_loss computes decides what it trains, and nothing else.
    assert trained(TINY, "another") == [name for name in MODELS if name.startswith(("kd_loss", "heads"))]
