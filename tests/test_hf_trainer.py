"""`hf.DistillMixin`: a trainer's updates are those of the loss by hand, however batches are cut."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kdkernels as kd
from kdkernels.train import HardLabels, Hint, Objective, SoftTargets

V, T, SOFT, HARD, RATE = 50, 2.0, 0.7, 0.3, 0.5
IN_ORDER = {"train_sampling_strategy": "sequential"}
if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
    # transformers 5.0 shuffles whatever the arguments say.
    IN_ORDER = {}
    Trainer._get_train_sampler = lambda self, rows=None: SequentialSampler(
        self.train_dataset if rows is None else rows
    )


class KD(kd.hf.DistillMixin, Trainer):  # type: ignore[misc, name-defined]
    pass


def llama(width: int, layers: int = 1, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model


def data(rows: int = 16) -> list[dict[str, Tensor]]:
    """Rows of 9 tokens, of which 2 to 8 are answers: a ragged share counts."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(rows):
        ids = torch.randint(1, V, (9,), generator=generator)
        prompt = 1 + n % 7
        found.append({"input_ids": ids, "labels": torch.where(torch.arange(9) < prompt, -100, ids)})
    return found


def settings(batch: int, accumulate: int, **more: Any) -> dict[str, Any]:
    """Two steps of plain gradient descent, in order."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 2,
        "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, **IN_ORDER,
    }  # fmt: skip
    return {**options, **more}


def arguments(folder: Any, batch: int, accumulate: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **settings(batch, accumulate, **more))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def eager(batches: list[list[dict[str, Tensor]]], parts: int = 1) -> tuple[Tensor, list[dict[str, float]]]:
    """Plain PyTorch, each list one step: the mean over all tokens that count, or the mean of parts' means."""
    student, teacher = llama(8), llama(12, seed=5).eval()
    figures = []

    def terms(rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            v = teacher(input_ids=ids).logits[:, :-1]
        z, y = student(input_ids=ids).logits[:, :-1], labels[:, 1:]
        keep = y != -100
        lq, lp = (z[keep] / T).log_softmax(-1), (v[keep] / T).log_softmax(-1)
        return T**2 * (lp.exp() * (lp - lq)).sum(-1).mean(), F.cross_entropy(z[keep], y[keep])

    for rows in batches:
        size = len(rows) // parts
        each = [terms(rows[n : n + size]) for n in range(0, len(rows), size)]
        soft, hard = (torch.stack(values).mean() for values in zip(*each, strict=True))
        loss = SOFT * soft + HARD * hard
        figures.append({"loss": float(loss), "soft": float(soft), "hard": float(hard)})
        gradients = torch.autograd.grad(loss, [*student.parameters()])
        with torch.no_grad():
            for p, g in zip(student.parameters(), gradients, strict=True):
                p -= RATE * g
    return weights(student), figures


def trained(folder: Any, batch: int, accumulate: int, **more: Any) -> tuple[Tensor, list[dict[str, float]]]:
    student, teacher = llama(8), llama(12, seed=5)
    trainer = KD(
        student, arguments(folder, batch, accumulate, **more), train_dataset=data(), teacher=teacher,
        temperature=T, soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    trainer.train()
    assert teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    return weights(student), [row for row in trainer.state.log_history if "loss" in row]


def close(found: tuple[Tensor, Any], wanted: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    for row, other in zip(found[1], wanted[1], strict=True):
        for name, figure in other.items():
            assert row[name] == pytest.approx(figure, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4)])
def test_updates_are_those_of_the_loss_by_hand(batch: int, accumulate: int, tmp_path: Path) -> None:
    rows = data()
    close(trained(tmp_path, batch, accumulate), eager([rows[:8], rows[8:]]))


def test_without_labels_all_tokens_count(tmp_path: Path) -> None:
    """However batches are cut; a trainer that counts nothing must not divide once more."""
    unlabelled, found = [{"input_ids": row["input_ids"]} for row in data()], []
    for batch, accumulate in ((8, 1), (2, 4)):
        student = llama(8)
        given = arguments(tmp_path, batch, accumulate)
        KD(student, given, train_dataset=unlabelled, teacher=llama(12, seed=5), temperature=T).train()
        found.append(weights(student))
    assert not torch.allclose(found[0], weights(llama(8)), atol=1e-3)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for accumulate in (1, 4):
        found = trained(f"{folder}/{accumulate}", 4 // accumulate, accumulate)
        torch.save(found, f"{folder}/{accumulate}-{rank}.pt")
    alone = trained(f"{folder}/alone", 4, 1, average_tokens_across_devices=False)
    torch.save(alone, f"{folder}/alone-{rank}.pt")
    given = arguments(folder, 4, 1, per_device_eval_batch_size=4)
    trainer = KD(
        llama(8), given, train_dataset=data(), eval_dataset=data(5), teacher=llama(12, seed=5), temperature=T,
        soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    torch.save(trainer.evaluate(), f"{folder}/evaluated-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Rows go to processes in turn, batch by batch; all tokens of a step count alike."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_process, (port, str(tmp_path)), nprocs=2)
    rows = data()
    wanted = eager([rows[:8], rows[8:]])
    for accumulate in (1, 4):
        for rank in (0, 1):
            close(torch.load(tmp_path / f"{accumulate}-{rank}.pt"), wanted)
    (figures,) = eager([data(5)])[1]  # of 5 rows in batches of 4, of which 3 are repeated
    for rank in (0, 1):
        found = torch.load(tmp_path / f"evaluated-{rank}.pt")
        for name, figure in figures.items():
            assert found[f"eval_{name}"] == pytest.approx(figure, rel=1e-4), name
    apart = eager([rows[:8], rows[8:]], parts=2)  # where each process takes the mean of its own
    close(torch.load(tmp_path / "alone-0.pt"), apart)
    assert not torch.allclose(apart[0], wanted[0], rtol=1e-3, atol=1e-3)


def test_evaluation_is_a_mean_over_tokens(tmp_path: Path) -> None:
    """Over batches of unequal counts, of the loss and every term; logits are made when they are asked for."""
    student, teacher = llama(8), llama(12, seed=5)
    rows = data(6)
    trainer = KD(
        student, arguments(tmp_path, 2, 1, per_device_eval_batch_size=4), train_dataset=rows,
        eval_dataset=rows, teacher=teacher, temperature=T, soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    found = trainer.evaluate()
    (wanted,) = eager([rows])[1]
    for name, figure in wanted.items():
        assert found[f"eval_{name}"] == pytest.approx(figure, rel=1e-4)
    assert trainer.predict(rows).predictions.shape == (6, 9, V)


def test_an_objective_of_any_terms_is_resumed(tmp_path: Path) -> None:
    """With a projector, which the trainer's optimizer gets, and checkpoints keep."""
    rows = data()

    def run(folder: Path, steps: int, resume: bool = False) -> tuple[Tensor, Tensor, set[str]]:
        student, teacher = llama(8), llama(12, seed=5)
        goals = Objective(
            soft=SoftTargets(temperature=T), hard=HardLabels(0.5),
            hint=Hint("model.layers.0", "model.layers.0", 0.1),
        )  # fmt: skip
        torch.manual_seed(3)
        given = arguments(
            folder, 4, 1, max_steps=steps, save_strategy="steps", save_steps=2, optim="adamw_torch",
            learning_rate=1e-2,
        )  # fmt: skip
        trainer = KD(student, given, train_dataset=rows, teacher=teacher, objective=goals)
        trainer.train(resume_from_checkpoint=resume or None)
        projector = torch.cat([p.detach().flatten() for p in goals.parameters()])
        return weights(student), projector, {name for row in trainer.state.log_history for name in row}

    whole = run(tmp_path / "whole", 4)
    assert {"soft", "hard", "hint", "loss"} <= whole[2]
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume=True)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_a_trainer_that_makes_its_student_anew_each_time(tmp_path: Path) -> None:
    """What is captured is captured in the next one."""
    goals = Objective(soft=SoftTargets(temperature=T), hint=Hint("model.layers.0", "model.layers.0", 0.1))
    trainer = KD(
        args=arguments(tmp_path, 4, 1), train_dataset=data(), teacher=llama(8, seed=5), objective=goals,
        model_init=lambda: llama(8),
    )  # fmt: skip
    losses = [trainer.train().training_loss for _ in range(2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_teacher_from_a_folder_and_a_teacher_in_the_batch(tmp_path: Path) -> None:
    teacher, rows = llama(12, seed=5), data(4)
    teacher.save_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        brought = [
            {**row, "teacher": teacher.eval()(input_ids=row["input_ids"][None]).logits[0]} for row in rows
        ]
    found = []
    for given, where in ((rows, teacher), (rows, str(tmp_path / "teacher")), (brought, None)):
        student = llama(8)
        KD(student, arguments(tmp_path, 4, 1, max_steps=1), train_dataset=given, teacher=where).train()
        found.append(weights(student))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def in_trls(folder: Path, rows: list[dict[str, Tensor]], batch: int, accumulate: int, **more: Any) -> Any:
    """A trainer of TRL, on rows with masks of completions, and the weights that it has trained."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class SFT(kd.hf.DistillMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(V)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    columns = [
        {"input_ids": row["input_ids"].tolist(), "completion_mask": (row["labels"] != -100).int().tolist()}
        for row in rows
    ]
    student, teacher = llama(8), llama(12, seed=5)
    options = {"bf16": False, "completion_only_loss": True, **settings(batch, accumulate), **more}
    trainer = SFT(
        student, trl.SFTConfig(output_dir=str(folder), **options),
        train_dataset=datasets.Dataset.from_list(columns), processing_class=tokenizer, teacher=teacher,
        temperature=T, soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    trainer.train()
    return trainer, weights(student)


def test_in_trls_trainer_it_is_the_same(tmp_path: Path) -> None:
    """Its collator makes the same labels of masks, and the updates are the same."""
    trainer, found = in_trls(tmp_path, data(), 2, 4)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    wanted = data()
    close((found, logged), eager([wanted[:8], wanted[8:]]))


@pytest.mark.parametrize("how", ["packing", "padding_free"])
def test_packed_sequences_do_not_see_each_other(how: str, tmp_path: Path) -> None:
    """The update is that of a batch with a row for each, whose lengths differ."""
    rows = [{name: x[: 3 + n % 7] for name, x in row.items()} for n, row in enumerate(data(8))]
    one = {"max_steps": 1}
    _, wanted = in_trls(tmp_path, rows, 8, 1, **one)
    more = {"packing": True, "max_length": 27} if how == "packing" else {"padding_free": True}
    trainer, found = in_trls(
        tmp_path, rows, 2 if how == "packing" else 8, 1, **{"max_length": None, **more, **one}
    )
    (packed,) = trainer.get_train_dataloader()
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Student(LlamaForCausalLM):
    """Somebody's own, by another name."""


@pytest.mark.parametrize("kind", ["its own class", "LoRA", "LoRA of the head"])
def test_students_of_other_classes_have_the_same_loss(kind: str, tmp_path: Path) -> None:
    """Labels are shifted for a class by another name, and in adapters that don't name a task."""
    student: Any = llama(8)
    if kind == "its own class":
        student.__class__ = Student
    else:
        peft = pytest.importorskip("peft")
        target = "q_proj" if kind == "LoRA" else "lm_head"
        student = peft.get_peft_model(
            student, peft.LoraConfig(target_modules=[target])
        )  # makes no change yet
    trainer = KD(
        student, arguments(tmp_path, 8, 1, max_steps=1), train_dataset=data(), teacher=llama(12, seed=5),
        temperature=T, soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    trainer.train()
    (wanted,) = eager([data()[:8]])[1]
    (found,) = (row for row in trainer.state.log_history if "loss" in row)
    for name, figure in wanted.items():
        assert found[name] == pytest.approx(figure, rel=1e-4), name


NO_DROPOUT: dict[str, dict[str, float]] = {
    "T5Config": {"dropout_rate": 0.0},
    "BertConfig": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_models_whose_labels_are_not_shifted(name: str, tmp_path: Path) -> None:
    from test_hf import made

    ids = torch.randint(3, 50, (8, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) > 1 + torch.arange(8)[:, None] % 5, -100)
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    student, teacher = made(name, **NO_DROPOUT[name]), made(name, num_layers=3, num_hidden_layers=3)
    trainer = KD(
        student, arguments(tmp_path, 2, 4, max_steps=1), train_dataset=rows, teacher=teacher, temperature=T,
        soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    trainer.train()
    keep = labels != -100
    with torch.no_grad():
        z, v = (model(input_ids=ids, labels=labels).logits[keep] for model in (made(name), teacher))
    lq, lp = (z / T).log_softmax(-1), (v / T).log_softmax(-1)
    wanted = SOFT * T**2 * (lp.exp() * (lp - lq)).sum(-1).mean() + HARD * F.cross_entropy(z, labels[keep])
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_answers_are_generated_where_a_trainer_is_asked_for_them(tmp_path: Path) -> None:
    """With the objective's loss."""
    from test_hf import made
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Answers(kd.hf.DistillMixin, Seq2SeqTrainer):  # type: ignore[misc, name-defined]
        pass

    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": i, "labels": i.flip(0)} for i in ids]
    losses = []
    for generate in (True, False):
        given = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=generate, **settings(4, 1))
        trainer = Answers(made("T5Config"), given, teacher=made("T5Config", d_model=16), hard_weight=0.5)
        found = trainer.predict(rows)
        assert found.predictions.ndim == (2 if generate else 3) and len(found.predictions) == 4
        losses.append(found.metrics["test_loss"])
    assert losses[0] == pytest.approx(losses[1])


def test_experts_are_balanced_as_by_the_models_own_loss(tmp_path: Path) -> None:
    """With labels alone, updates are those of the plain trainer, whose model adds that loss to its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    found = []
    for kind in (KD, Trainer):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, pad_token_id=0, output_router_logits=True,
            router_aux_loss_coef=0.3,
        )  # fmt: skip
        student, more = (
            MixtralForCausalLM(config),
            {"soft_weight": 0.0, "hard_weight": 1.0} if kind is KD else {},
        )
        trainer = kind(student, arguments(tmp_path, 8, 1), train_dataset=data(), **more)
        trainer.train()
        found.append((weights(student), trainer.state.log_history[0]))
    assert found[0][1]["router"] > 1 and found[0][1]["loss"] == pytest.approx(found[1][1]["loss"], rel=1e-4)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


class Words:
    """A tokenizer, as far as it is compared."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.name_or_path, self.words = name, words

    def get_vocab(self) -> dict[str, int]:
        return {word: n for n, word in enumerate(self.words)}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    student, teacher, rows = llama(8), llama(12), data(2)
    given = arguments(tmp_path, 2, 1)
    ours = Words("ours", ["a", "b"])
    for other, said in (
        (["a", "b", "c"], r"'other' 3 .*differ in their sizes"),
        (["b", "a"], "hashes of the same"),
    ):
        with pytest.raises(ValueError, match=f"the student's 'ours' has 2 tokens.*{said}"):
            KD(
                student, given, train_dataset=rows, teacher=teacher, processing_class=ours,
                teacher_tokenizer=Words("other", other),
            )  # fmt: skip
    KD(
        student, given, train_dataset=rows, teacher=teacher, processing_class=ours, teacher_tokenizer=ours,
    )  # fmt: skip
    with pytest.raises(TypeError, match="objective must be an Objective, got float"):
        KD(student, given, train_dataset=rows, teacher=teacher, objective=0.5)
    with pytest.raises(ValueError, match="give an objective, or divergence, temperature and weights"):
        KD(student, given, teacher=teacher, objective=Objective(a=SoftTargets()), temperature=2.0)
    with pytest.raises(ValueError, match="leave out compute_loss_func"):
        KD(student, given, teacher=teacher, compute_loss_func=lambda *a, **k: 0)
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    with pytest.raises(ValueError, match="a term needs labels, and the batch has none"):
        KD(student, given, train_dataset=unlabelled, teacher=teacher, hard_weight=0.5).train()
    never = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows]
    with pytest.raises(ValueError, match="a term of labels saw none: every row was labelled -100"):
        KD(student, given, train_dataset=never, teacher=teacher, hard_weight=0.5).train()
    other = copy.deepcopy(teacher)
    other.resize_token_embeddings(V + 2)
    with pytest.raises(
        ValueError, match=r"student and teacher must have the same vocabulary.*pad_vocab=True"
    ):
        KD(student, given, train_dataset=rows, teacher=other).train()
    padded = Objective(soft=SoftTargets(pad_vocab=True), hard=HardLabels(0.5))
    KD(student, given, train_dataset=rows, teacher=other, objective=padded).train()
    with pytest.raises(
        ValueError, match="leave out compute_loss_func, label_smoothing_factor and loss_type="
    ):
        in_trls(tmp_path, data(), 2, 4, loss_type="dft")


def test_entries_that_batches_have_lost_are_missed(tmp_path: Path) -> None:
    """Weights of tokens count; a collator that drops them, as TRL's does, would leave another loss."""
    weighted = [{**row, "token_weights": torch.full((9,), 0.5)} for row in data(8)]
    trainer = KD(
        llama(8), arguments(tmp_path, 8, 1, max_steps=1), train_dataset=weighted, teacher=llama(12, seed=5),
        temperature=T, soft_weight=SOFT, hard_weight=HARD,
    )  # fmt: skip
    trainer.train()
    (wanted,) = eager([data(8)])[1]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5 * wanted["loss"], rel=1e-4)

    def drops(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}

    trainer.data_collator = drops
    with pytest.raises(ValueError, match="the data have 'token_weights' and batches don't"):
        trainer.train()


def test_a_loaded_teachers_tokenizer_is_compared(tmp_path: Path) -> None:
    """With the trainer's, or the one that the student was loaded with: of the same size, and another."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for name, order in (("ours", 1), ("theirs", -1)):
        words = models.WordLevel({f"w{w}": n for n, w in enumerate(range(V)[::order])}, unk_token="w0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path / name)
        llama(8).save_pretrained(tmp_path / name)
    ours, theirs = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    for teacher in (theirs, str(tmp_path / "theirs"), [ours, theirs]):
        with pytest.raises(
            ValueError, match=r"the student's '.*ours' has 50.*the teacher's '.*theirs' 50 .*hash"
        ):
            KD(ours, arguments(tmp_path, 2, 1), train_dataset=data(2), teacher=teacher)
    KD(ours, arguments(tmp_path, 2, 1), train_dataset=data(2), teacher=copy.deepcopy(ours))
