"""Trainers on a stored teacher: their steps are those on the distributions that it was filled with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator, DataLoaderConfiguration
from test_hf_trainer import KD, T, V, Words, arguments, data, llama, settings, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

import kdkernels as kd
from kdkernels.cache import CacheError, CacheMiss, Manifest, TeacherCache
from kdkernels.models.tokenizers import vocabulary_hash
from kdkernels.train import (
    AttentionScores,
    CosineHidden,
    Distiller,
    Ensemble,
    HardLabels,
    Hint,
    LogitMatch,
    Objective,
    Sobolev,
    SoftTargets,
)

LENGTHS = (9, 4, 7, 9, 3, 8, 5, 6)


def rows(count: int = len(LENGTHS)) -> list[dict[str, Tensor]]:
    """Of unequal lengths, with answers of which the first token is not labelled."""
    return [
        {name: x[:length] for name, x in row.items()}
        for row, length in zip(data(count), LENGTHS, strict=False)
    ]


def teacher() -> Any:
    return llama(12, seed=5).eval()


def fill(folder: Path, given: list[dict[str, Tensor]], model: Any = None, **manifest: Any) -> TeacherCache:
    """All classes are kept, so that nothing is lost but what the format rounds."""
    options: dict[str, Any] = {"vocab_size": V, "k": V, "temperatures": (1.0, T), **manifest}
    model = teacher() if model is None else model
    with TeacherCache.create(folder, Manifest("teacher", **options)) as writer, torch.no_grad():
        for row in given:
            writer.append_logits(row["input_ids"], model(input_ids=row["input_ids"][None]).logits[0])
    return TeacherCache.open(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return fill(tmp_path_factory.mktemp("cache") / "of all", rows())


class Padded:
    """A collator that pads on a side, or packs all into one row."""

    def __init__(self, how: str = "right") -> None:
        self.how = how

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        each = [{k: torch.as_tensor(x) for k, x in f.items()} for f in features]
        if self.how == "packed":
            # As collators that pack do: the first of each is not predicted by what is before it.
            labels = [f["labels"].index_fill(0, torch.tensor([0]), -100) for f in each]
            return {
                "input_ids": torch.cat([f["input_ids"] for f in each])[None],
                "labels": torch.cat(labels)[None],
                "position_ids": torch.cat([torch.arange(len(y)) for y in labels])[None],
            }
        longest = max(len(f["input_ids"]) for f in each)
        made: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for f in each:
            more = longest - len(f["input_ids"])
            pad = (0, more) if self.how == "right" else (more, 0)
            for name, x, fill in (
                ("input_ids", f["input_ids"], 0),
                ("labels", f["labels"], -100),
                ("attention_mask", torch.ones_like(f["labels"]), 0),
            ):
                made[name].append(nn.functional.pad(x, pad, value=fill))
        return {name: torch.stack(x) for name, x in made.items()}


class Dense:
    """Logits of the whole batch, put together by hand from what the cache holds of each sequence."""

    def __init__(self, cache: TeacherCache, given: list[dict[str, Tensor]]) -> None:
        self.known: dict[tuple[int, ...], Tensor] = {}
        for row in given:
            stored = cache.lookup(row["input_ids"])
            assert isinstance(stored, kd.TopK)
            assert torch.equal(stored.ids, torch.arange(V).expand_as(stored.ids))
            self.known[tuple(row["input_ids"].tolist())] = stored.log_probs

    def __call__(self, batch: Any) -> Tensor:
        ids = batch["input_ids"]
        logits = torch.zeros(*ids.shape, V)
        for n, row in enumerate(ids.tolist()):
            for begin in range(len(row)):
                for end in range(begin + 1, len(row) + 1):
                    if (found := self.known.get(tuple(row[begin:end]))) is not None:
                        logits[n, begin:end] = found
        return logits


def objective() -> Objective:
    return Objective(soft=SoftTargets(temperature=T), hard=HardLabels(0.3))


def fitted(batches: Any, given: Any, **more: Any) -> tuple[Tensor, list[float]]:
    """Two steps of plain gradient descent."""
    student = llama(8)
    distiller = Distiller(student, given, objective(), lambda p: torch.optim.SGD(p, 0.5), **more)
    history = distiller.fit(batches, steps=2, progress=False, log_every=1)
    return weights(student), [row["loss"] for row in history]


@pytest.mark.parametrize("how", ["right", "left", "packed"])
def test_distiller_has_the_losses_and_gradients_of_the_whole_teacher(how: str, cache: TeacherCache) -> None:
    """Those of what is stored, to rounding; those of the live one, but for what the format rounds."""
    base, given = Padded(how), rows()
    batches = [base(given[:4]), base(given[4:])]
    wanted = fitted(batches, Dense(cache, given))
    collated = [cache.collate(base)(given[:4]), cache.collate(base)(given[4:])]
    for found in (fitted(batches, cache), fitted(collated, None), fitted(collated, lambda batch: 1 / 0)):
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
        assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    live = fitted(batches, teacher())
    torch.testing.assert_close(live[0], wanted[0], rtol=5e-3, atol=5e-3)
    assert live[1] == pytest.approx(wanted[1], rel=5e-3)
    # One position aside is another loss.
    shifted = fitted(batches, lambda batch: Dense(cache, given)(batch).roll(1, 1))
    assert shifted[1][0] != pytest.approx(wanted[1][0], rel=0.01)


def test_a_model_of_ones_own(cache: TeacherCache) -> None:
    """Whose batches are its inputs and labels."""
    ids = torch.stack([row["input_ids"] for row in rows() if len(row["input_ids"]) == 9])
    own = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    whole, found = (
        Distiller(own, given, Objective(soft=SoftTargets(temperature=T))).evaluate([(ids, ids)])
        for given in (lambda batch: Dense(cache, rows())({"input_ids": batch["inputs"]}), cache)
    )
    assert found == pytest.approx(whole, rel=1e-5)


def test_evaluation_and_workers_of_a_loader(cache: TeacherCache) -> None:
    given = rows()
    student = llama(8)
    whole = Distiller(student, Dense(cache, given), objective()).evaluate([Padded()(given)])
    loader = DataLoader(given, 4, collate_fn=cache.collate(Padded()), num_workers=2)  # type: ignore[arg-type]
    for found in (
        Distiller(student, None, objective()).evaluate(loader),
        Distiller(student, cache, objective()).evaluate([Padded()(given)]),
    ):
        assert found == pytest.approx(whole, rel=1e-5)


def trained(folder: Any, given: Any, collator: Any, **more: Any) -> tuple[Tensor, dict[str, float]]:
    student = llama(8)
    options = {**settings(2, 2), **more}
    trainer = KD(
        student, TrainingArguments(output_dir=str(folder), **options), train_dataset=rows(),
        eval_dataset=rows(), data_collator=collator, teacher=given, objective=objective(),
    )  # fmt: skip
    trainer.train()
    return weights(student), trainer.evaluate()


TRAINERS: list[dict[str, Any]] = [
    {"dataloader_pin_memory": True, "dataloader_num_workers": 2},
    {"remove_unused_columns": False},
]


def test_trainers_have_the_steps_of_the_whole_teacher(cache: TeacherCache, tmp_path: Path) -> None:
    """With accumulation and evaluation; a folder is opened; columns taken from a dataset are no matter."""
    for how in ("right", "left", "packed"):
        base = Padded(how)
        wanted = trained(tmp_path, Dense(cache, rows()), base)
        cases: list[tuple[Any, Any, dict[str, Any]]] = [(str(cache.path), base, {})]
        cases += [(None, cache.collate(base), more) for more in (TRAINERS if how == "right" else [{}])]
        for given, collator, more in cases:
            found = trained(tmp_path, given, collator, **more)
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
            for name in ("eval_loss", "eval_soft", "eval_hard"):
                assert found[1][name] == pytest.approx(wanted[1][name], rel=1e-5)


def test_a_dataset_with_columns(cache: TeacherCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = [{**{k: v.tolist() for k, v in row.items()}, "text": "no input"} for row in rows()]
    wanted = trained(tmp_path, cache, Padded())
    student = llama(8)
    KD(
        student, arguments(tmp_path, 2, 2), train_dataset=datasets.Dataset.from_list(columns),
        data_collator=cache.collate(Padded()), objective=objective(),
    ).train()  # fmt: skip
    torch.testing.assert_close(weights(student), wanted[0])


def test_the_live_teacher_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    """And for nothing else."""
    given = rows()
    part = fill(tmp_path / "part", given[:4])
    live, asked = teacher(), []
    live.register_forward_hook(lambda *_: asked.append(1))
    collator = part.collate(Padded(), missing="live")
    loader = DataLoader(given, 4, collate_fn=collator)  # type: ignore[arg-type]
    found = fitted(loader, live)
    assert len(asked) == 1 and collator.missed == 1
    wanted = fitted([Padded()(given[:4]), Padded()(given[4:])], teacher())
    torch.testing.assert_close(found[0], wanted[0], rtol=5e-3, atol=5e-3)

    asked.clear()
    student = llama(8)
    options = arguments(tmp_path, 4, 1, dataloader_num_workers=1)
    KD(
        student, options, train_dataset=given, data_collator=collator, teacher=live, objective=objective()
    ).train()
    torch.testing.assert_close(weights(student), found[0], rtol=1e-4, atol=1e-5)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="asks for a teacher, and there is none"):
        fitted(loader, None)
    with pytest.raises(CacheMiss, match="append it to the cache, or use missing='live'"):
        fitted([Padded()(given)], part)


def test_in_trls_trainer_packed(tmp_path: Path) -> None:
    """Its own collator around which the cache's is, or the cache beside it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class SFT(kd.hf.DistillMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(V)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    cache = fill(tmp_path / "cache", rows(), tokenizer=vocabulary_hash(tokenizer))
    columns = [{"input_ids": row["input_ids"].tolist()} for row in rows()]
    found = []
    for way in ("live", "cache", "collator"):
        student = llama(8)
        options = {"bf16": False, "packing": True, "max_length": 27, **settings(2, 1, max_steps=1)}
        trainer = SFT(
            student, trl.SFTConfig(output_dir=str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list(columns),
            processing_class=tokenizer, objective=objective(),
            teacher={"live": Dense(cache, rows()), "cache": cache, "collator": None}[way],
        )  # fmt: skip
        if way == "collator":
            trainer.data_collator = cache.collate(trainer.data_collator)
        (batch,) = trainer.get_train_dataloader()
        assert batch["input_ids"].shape == (1, sum(LENGTHS)) and ("teacher" in batch) == (way == "collator")
        trainer.train()
        found.append(weights(student))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


def test_accelerate_moves_what_is_stored(cache: TeacherCache) -> None:
    from accelerate.utils import send_to_device

    batch = cache.collate(Padded())(rows())
    moved = send_to_device(batch, torch.device("meta"))["teacher"]
    assert {x.device.type for x in (moved.ids, moved.log_probs, *moved.lse.values())} == {"meta"}
    prepared = Accelerator().prepare(DataLoader(rows(), 4, collate_fn=cache.collate(Padded())))  # type: ignore[arg-type]
    wanted = fitted([Padded()(rows()[:4]), Padded()(rows()[4:])], cache)
    torch.testing.assert_close(fitted(prepared, None)[0], wanted[0])
    batch["teacher"] = batch["teacher"][:4]
    with pytest.raises(ValueError, match=r"rows \(4, 9\), and input_ids are \(8, 9\).*as teacher="):
        fitted([batch], None)


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    cache = TeacherCache.open(folder)
    collator = cache.collate(Padded())
    one = settings(2, 1, per_device_eval_batch_size=4)
    loader: Any = DataLoader(rows(), 2, collate_fn=collator)
    split = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    whole, streamed, bare = (
        DataLoader(given, size, collate_fn=how)  # type: ignore[arg-type, var-annotated]
        for given, size, how in ((rows(), 4, collator), (Stream(), 2, collator), (Stream(), 4, Padded()))
    )
    found = {
        "collator": trained(folder, None, collator, **one),
        "cache": trained(folder, cache, Padded(), **one),
        "distiller": fitted(loader, None),
        "split": fitted(split.prepare(whole), None),
        "stream": fitted(streamed, None),
        # Batches that one process reads and cuts up for all.
        "cut": fitted(split.prepare(bare), cache),
    }
    with pytest.raises(ValueError, match="can't cut a stored teacher: pass the cache as teacher="):
        fitted(split.prepare(streamed), None)
    trainer = KD(
        llama(8), TrainingArguments(folder, **one), train_dataset=Stream(), data_collator=collator,
        objective=objective(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="can't cut a stored teacher: pass the cache as teacher="):
        trainer.train()
    torch.save(found, f"{folder}/../{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(cache: TeacherCache, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = fill(tmp_path / "cache", rows()).path
    mp.spawn(_process, (port, str(folder)), nprocs=2)
    figures = trained(tmp_path, Dense(cache, rows()), Padded(), per_device_train_batch_size=4,
                      gradient_accumulation_steps=1)  # fmt: skip
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (got, more) in found.items():
            torch.testing.assert_close(got, figures[0], rtol=1e-4, atol=1e-5, msg=name)
            if isinstance(more, dict):
                assert more["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-4)


TERMS: dict[str, tuple[Callable[[], Any], str]] = {
    "hint": (lambda: Hint("model.layers.0", "model.layers.0"), "it needs 'model.layers.0'"),
    "cosine": (lambda: CosineHidden(), "it needs 'hidden_states'"),
    "attention": (lambda: AttentionScores([(0, 0)]), "it needs what its layers compute"),
    "derivatives": (lambda: Sobolev(), "it needs its logits"),
    "match": (lambda: LogitMatch(), "compares logits, and kd.TopK is a part of a distribution"),
    "dkd": (lambda: SoftTargets(kd.DKD()), "is about the label against all other classes"),
    "noise": (
        lambda: SoftTargets(teacher_noise=kd.LogitNoise(1.0)),
        "teacher_noise must be None",
    ),
    "hot": (lambda: SoftTargets(temperature=4.0), "temperature=4.0 was not declared by kd.TopK"),
    "padded": (lambda: SoftTargets(pad_vocab=True), "pad_vocab must be False with kd.TopK"),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_that_a_cache_has_nothing_for_are_refused(
    name: str, cache: TeacherCache, tmp_path: Path
) -> None:
    """By their names, and before training, however the cache is given."""
    make, said = TERMS[name]
    wanted = rf"term '{name}' can't have 'teacher' from the cache .*at the temperatures 1, 2: .*{said}"
    goals = Objective(**{name: make(), "hard": HardLabels()})
    collator = cache.collate(Padded())
    loader: Any = DataLoader(rows(), 4, collate_fn=collator)
    with pytest.raises(ValueError, match=wanted):
        Distiller(llama(8), cache, goals)
    for given in (None, teacher()):
        with pytest.raises(ValueError, match=wanted):
            Distiller(llama(8), given, goals).fit(loader, steps=1, progress=False)
        with pytest.raises(ValueError, match=wanted):
            KD(
                llama(8), arguments(tmp_path, 4, 1), train_dataset=rows(), data_collator=collator,
                teacher=given, objective=goals,
            )  # fmt: skip


def test_a_draw_at_one_temperature_is_refused_at_another(tmp_path: Path) -> None:
    drawn = fill(tmp_path / "drawn", rows(2), k=16, kind="sampled", draws=16, temperatures=(T,))
    Distiller(llama(8), drawn, Objective(soft=SoftTargets(temperature=T))).evaluate([Padded()(rows(2))])
    for term, said in (
        (SoftTargets(), "drawn at, 2.0"),
        (SoftTargets("jsd", T), "not linear in the teacher"),
    ):
        with pytest.raises(ValueError, match=f"term 'soft'.*kind 'sampled' at the temperatures 2: .*{said}"):
            Distiller(llama(8), drawn, Objective(soft=term))


def test_what_else_a_cache_is_asked_for_is_said(cache: TeacherCache) -> None:
    batch = [Padded()(rows())]
    asks: dict[str, Callable[[Any], Any]] = {
        "is stored and has no 'hidden_states'": lambda step: step.teacher["hidden_states"],
        "is stored and has no 'logits'": lambda step: step.teacher.logits.sum(),
        r"asks the teacher about other inputs than the batch's \(input_ids\)": lambda step: step.run(
            "teacher", input_ids=step.batch["input_ids"]
        ),
    }
    for said, ask in asks.items():
        with pytest.raises((ValueError, KeyError), match=said):
            Distiller(llama(8), cache, Objective(asks=ask)).evaluate(batch)
    with pytest.raises(ValueError, match="by its 'input_ids', or 'inputs', and has 'input'"):
        Distiller(nn.Linear(2, V), cache, Objective(soft=SoftTargets())).evaluate(
            [{"input": torch.ones(2, 2)}]
        )
    with pytest.raises(TypeError, match="an ensemble averages whole distributions"):
        Ensemble([teacher(), cache])
    from test_hf import made

    with pytest.raises(ValueError, match="predicts one sequence from another"):
        Distiller(made("T5Config"), cache, objective())


def test_vocabularies_and_tokenizers_are_compared(cache: TeacherCache, tmp_path: Path) -> None:
    larger, smaller = (llama(8) for _ in range(2))
    larger.resize_token_embeddings(V + 6)
    smaller.resize_token_embeddings(V - 2)
    batch = [Padded()([{name: x.clamp(max=V - 3) for name, x in row.items()} for row in rows()])]
    known = fill(tmp_path / "known", [{"input_ids": row["input_ids"].clamp(max=V - 3)} for row in rows()])
    row = Distiller(larger, known, objective()).evaluate(batch)
    assert row["soft"] > 0
    with pytest.raises(CacheError, match="keeps the id 49, of 50 classes, and the student has 48"):
        Distiller(smaller, known, objective()).evaluate(batch)

    ours, theirs = Words("ours", ["a", "b"]), Words("theirs", ["b", "a"])
    for hashed, tokenizer, agrees in (
        (vocabulary_hash(ours), ours, True),
        (vocabulary_hash(theirs), ours, False),
        ("a hash of another kind", ours, True),
        (vocabulary_hash(theirs), None, True),
    ):
        own = fill(tmp_path / str(hashed), rows(2), tokenizer=hashed)
        for given in ({"teacher": own}, {"data_collator": own.collate(Padded())}):
            call: dict[str, Any] = {"train_dataset": rows(2), "processing_class": tokenizer, **given}
            if agrees:
                KD(llama(8), arguments(tmp_path, 2, 1), **call)
            else:
                with pytest.raises(ValueError, match="another tokenizer: its manifest has vocabulary"):
                    KD(llama(8), arguments(tmp_path, 2, 1), **call)
                KD(llama(8), arguments(tmp_path, 2, 1), teacher_tokenizer=ours, **call)


def test_it_is_there_when_it_is_asked_for() -> None:
    code = "import sys, kdkernels as kd; assert 'kdkernels.cache' not in sys.modules; kd.cache.TeacherCache"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert "cache" in kd.__all__
    with pytest.raises(AttributeError, match="has no attribute 'caches'"):
        _ = kd.caches
