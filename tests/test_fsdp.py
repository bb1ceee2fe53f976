"""Models sharded by `fully_shard` in two gloo processes: heads, trainers and teachers give what one gives."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import test_hf_trainer as trainers
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from test_hf import SIZE, V, batch, made
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

import kdkernels as kd
from kdkernels.models import gathering
from kdkernels.train import Distiller, HardLabels, Hint, Objective, SoftTargets, Update

FREED = {"reshard_after_forward": True}
# What is gathered together, after the layers, each of which is by itself; and the model.
LAYOUTS: dict[str, tuple[str, Callable[[Any], list[Any]], dict[str, Any]]] = {
    "in the root": ("LlamaConfig", lambda m: [], {}),
    "in a root that is freed": ("LlamaConfig", lambda m: [], FREED),
    "by itself": ("LlamaConfig", lambda m: [m.lm_head], {}),
    "by itself, in a root that is freed": ("GraniteConfig", lambda m: [m.lm_head], FREED),
    "with the norm": ("GraniteConfig", lambda m: [[m.model.norm, m.lm_head]], {}),
    "tied, in the root": ("Qwen2Config", lambda m: [], {}),
    "tied, with the embedding": (
        "Gemma2Config", lambda m: [[m.model.norm, m.model.embed_tokens, m.lm_head]], {},
    ),
    "with a bias": ("PhiConfig", lambda m: [m.lm_head], {}),
}  # fmt: skip
KINDS: dict[str, Callable[[Any], Any]] = {
    "all": lambda m: m,
    "frozen head": lambda m: m.get_output_embeddings().requires_grad_(False),
    "frozen body": lambda m: m.base_model.requires_grad_(False),
}


ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "data-parallel.md").read_text(encoding="utf-8")
# Where head and embedding are one weight, neither is frozen without the other.
CASES = [(layout, kind) for layout in LAYOUTS for kind in KINDS if kind == "all" or "tied" not in layout]


def divided(model: Any, parts: list[Any], **root: Any) -> Any:
    policy = root.get("mp_policy", MixedPrecisionPolicy())
    for part in [*model.base_model.layers, *parts]:
        fully_shard(part, mp_policy=policy)
    return fully_shard(model, **root)


def loss_of(model: Any, rows: slice, passes: int = 1, share: float = 1.0) -> Tensor:
    """Of some rows, as a share of the mean over what all rows count."""
    given = {name: x[rows] for name, x in batch().items()}
    labels = kd.shift_labels(given["labels"])
    count = (kd.shift_labels(batch()["labels"]) != -100).sum() * share
    teacher = torch.linspace(-2, 2, V).expand(*labels.shape, V)
    losses = [
        kd.kd_loss(kd.hf.head(model, **given), teacher * k, labels, hard_weight=0.5, num_items=count)
        for k in range(1, passes + 1)
    ]
    return torch.stack(losses).sum()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Its parameters, and not the frequencies of its positions."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return gathering.whole({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def of_heads(rank: int, folder: str) -> None:
    own = slice(rank, rank + 1)
    found: dict[str, Any] = {}
    for layout, kind in CASES:
        name, parts, root = LAYOUTS[layout]
        model = made(name)
        KINDS[kind](model)
        divided(model, parts(model), **root)
        for n in range(2):  # at first use, and afterwards; with a pass without gradients between
            model.zero_grad()
            loss_of(model, own, share=0.5).backward()
            found[f"{layout}, {kind}, {n}"] = gradients(model)
            with torch.no_grad():
                loss_of(model, own)
    model = made("LlamaConfig")
    loss_of(model, own)  # before it is sharded, too
    divided(model, [])
    loss_of(model, own, passes=2, share=0.5).backward()
    found["two passes"] = gradients(model)
    model.zero_grad()
    for sync in (False, True):
        model.set_requires_gradient_sync(sync)
        loss_of(model, own, share=0.5).backward()
    found["accumulated"] = gradients(model)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layout in ("in the root", "by itself"):
        model = made("LlamaConfig")
        divided(model, LAYOUTS[layout][1](model), mp_policy=half)
        loss_of(model, own, share=0.5).backward()
        found[f"bf16 {layout}"] = gradients(model)
    wrapped = nn.parallel.DistributedDataParallel(made("LlamaConfig"))
    loss_of(wrapped, own, share=0.5).backward()
    found["DDP"] = gradients(wrapped.module)
    torch.save(found, f"{folder}/heads {rank}")
    torch.save(lent(), f"{folder}/lent {rank}")
    torch.save(refused(), f"{folder}/refused {rank}")


def lent() -> dict[str, Any]:
    """Whether a head's weight is whole, at several times; and whether it holds what it should."""
    found: dict[str, Any] = {}
    for layout in ("in a root that is freed", "by itself"):
        name, parts, root = LAYOUTS[layout]
        model = made(name).requires_grad_(False)
        logits = made(name)(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
        divided(model, parts(model), **root)

        def whole(model: Any = model) -> bool:
            return not gathering.is_sharded(model.lm_head.weight)

        def right(head: kd.Head, logits: Tensor = logits) -> bool:
            return torch.allclose(head.logits(), logits, rtol=1e-5, atol=1e-5)

        states: list[bool] = []
        head = kd.hf.head(model, **batch())
        states += [whole(), right(head)]
        del head
        states += [not whole()]
        head = kd.hf.head(model, **batch())
        alias = head.weight.detach()  # as a copy of the head without gradients has
        del head
        states += [whole()]
        other = kd.hf.head(model, **batch())
        states += [right(other), bool(torch.equal(alias, other.weight))]
        first, second = other, kd.hf.head(model, **batch())
        states += [right(first), right(second)]  # two of one model
        del first, other, alias
        states += [whole()]  # the second is there
        del second
        states += [not whole()]
        found[layout] = states
    # A pass without gradients doesn't take away what an earlier one is to be differentiated by.
    model = divided(made("LlamaConfig"), [])
    loss = loss_of(model, slice(None))
    with torch.no_grad():
        loss_of(model, slice(None))
    loss.backward()
    found["between forward and backward"] = gradients(model)
    return found


def refused() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    found = {}
    for name in ("tensor parallel", "tensor parallel and FSDP"):
        model = made("LlamaConfig")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
        parallelize_module(model, mesh["parts"], {"lm_head": ColwiseParallel()})
        if name != "tensor parallel":
            fully_shard(model, mesh=mesh["copies"])
        with pytest.raises(ValueError, match="VocabParallel") as error:
            kd.hf.head(model, **batch())
        found[name] = str(error.value)
    return found


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of unequal numbers of labels."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(3, 90, (count, 6), generator=generator)
        self.labels = self.ids.masked_fill(torch.rand(count, 6, generator=generator) < 0.3, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[n], "labels": self.labels[n]}


def llama(layers: int = 2, seed: int = 0, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZE, "num_hidden_layers": layers, **more}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double()


def by_hand(model: Any) -> Any:
    return divided(model, [])


def emulated(accelerator: Accelerator) -> Accelerator:
    """Accelerate shards on accelerators alone; the same code runs here if it is told that this is one."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )  # fmt: skip
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def fit(
    size: int, accumulate: int = 1, student: Any = None, teacher: Any = None, wrap: Any = None,
    folder: Any = None, steps: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Weights after some steps of Adam with clipping, the steps' losses, and an evaluation's."""
    student = llama() if student is None else student
    teacher = llama(3, seed=5) if teacher is None else teacher
    goals = Objective(
        soft=SoftTargets(temperature=2.0), hard=HardLabels(0.5),
        hint=Hint("model.layers.0", "model.layers.1", weight=3.0, always=True),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator = wrap(accelerator) if wrap else accelerator
    torch.manual_seed(7)
    distiller = Distiller(
        student, teacher, goals, lambda p: torch.optim.AdamW(p, 0.01), accumulate=accumulate, clip=0.3,
        accelerator=accelerator, folder=folder,
    )  # fmt: skip
    if folder is not None:
        distiller.resume()
    history = distiller.fit(DataLoader(Rows(), size), steps=steps, progress=False, log_every=1)
    row = distiller.evaluate(DataLoader(Rows(5), 2))  # 3 batches, of unequal counts
    only = distiller.evaluate(DataLoader(Rows(2), 2))  # which the second process has none of
    row |= {f"only {name}": x for name, x in only.items()}
    if folder is not None:
        distiller.export(Path(folder) / "exported")
    figures = {f"step {n}": r["loss"] for n, r in enumerate(history) if "loss" in r} | row
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        **gathering.whole(distiller.models["student"].state_dict()),
        **goals.terms["hint"].projectors.state_dict(),
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()},
    }  # fmt: skip


FITS: dict[str, Callable[[str], dict[str, Any]]] = {
    "DDP": lambda folder: fit(4),
    "DDP, accumulating": lambda folder: fit(2, 2),
    "FSDP": lambda folder: fit(4, student=by_hand(llama())),
    "FSDP, accumulating": lambda folder: fit(2, 2, student=by_hand(llama())),
    "FSDP by Accelerate": lambda folder: fit(4, wrap=emulated),
    "FSDP by Accelerate, accumulating": lambda folder: fit(2, 2, wrap=emulated),
    "a teacher in parts": lambda folder: fit(4, teacher=kd.hf.shard(llama(3, seed=5))),
    "a teacher from a folder, and FSDP": lambda folder: fit(
        4, student=by_hand(llama()), teacher=kd.hf.shard(f"{folder}/teacher")
    ),
}


class Sharded(trainers.KD):
    """A trainer of transformers that shards."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        emulated(self.accelerator)
        self.is_fsdp_enabled = True


def trainer_of(kind: Any, student: Any, teacher: Any, folder: str, batch: int, accumulate: int) -> Any:
    options = trainers.arguments(folder, batch, accumulate, per_device_eval_batch_size=4)
    return kind(
        student, options, train_dataset=trainers.data(), eval_dataset=trainers.data(5), teacher=teacher,
        temperature=trainers.T, soft_weight=trainers.SOFT, hard_weight=trainers.HARD,
    )  # fmt: skip


def trained(folder: str, accumulate: int) -> dict[str, Any]:
    """Weights after two steps, figures of those and of an evaluation of rows that don't come out even."""
    teacher = kd.hf.shard(trainers.llama(12, seed=5))
    trainer = trainer_of(Sharded, trainers.llama(8), teacher, folder, 4 // accumulate, accumulate)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    found = {"rows": rows, "evaluation": trainer.evaluate()}
    AcceleratorState._reset_state(reset_partial_state=True)
    return {**found, "state": gathering.whole(trainer.model.state_dict())}


def of_trainers(rank: int, folder: str) -> None:
    for name, run in FITS.items():
        torch.save(run(folder), f"{folder}/{name} {rank}")
    for name, wrap in {"by hand": None, "by Accelerate": emulated}.items():
        make = by_hand if wrap is None else (lambda model: model)
        for steps in (2, 3):  # the rest of a fit that was interrupted
            two = fit(4, student=make(llama()), wrap=wrap, folder=f"{folder}/fit {name}", steps=steps)
        torch.save(two, f"{folder}/interrupted {name} {rank}")
    for accumulate in (1, 4):
        torch.save(trained(f"{folder}/trainer", accumulate), f"{folder}/trained {accumulate} {rank}")
    torch.save(several(by_hand, 4), f"{folder}/several {rank}")
    torch.save(refusals(), f"{folder}/refusals {rank}")


def several(make: Any, size: int) -> dict[str, Tensor]:
    """Two students that learn from each other."""
    models = {"a": make(llama()), "b": make(llama(1, seed=3))}
    updates = []
    for me, other in (("a", "b"), ("b", "a")):
        goals = Objective(soft=SoftTargets(student=me, teacher=other))
        updates.append(Update(goals, lambda p: torch.optim.SGD(p, 0.1), trains=(me,), name=me))
    distiller = Distiller(models, updates=updates, accelerator=Accelerator(cpu=True))
    distiller.fit(DataLoader(Rows(), size), steps=2, progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    return {f"{n}.{k}": x for n, m in models.items() for k, x in gathering.whole(m.state_dict()).items()}


def refusals() -> dict[str, str]:
    found = {}
    sharded = kd.hf.shard(llama(1, seed=5))
    stored = kd.TopK(torch.zeros(2, 6, 1), torch.zeros(2, 6, 1, dtype=torch.int64))
    rows = [{**next(iter(DataLoader(Rows(), 2))), "teacher": stored}]
    for name, arguments, options, loader in (
        ("stored, too", (llama(1), sharded), {}, rows),
        ("norms", (by_hand(llama(1)), llama(1)), {"grad_norms": True}, DataLoader(Rows(), 4)),
    ):
        distiller = Distiller(*arguments, Objective(soft=SoftTargets()), accelerator=Accelerator(cpu=True))
        with pytest.raises(ValueError, match="sharded over processes") as error:
            distiller.fit(loader, steps=1, progress=False, **options)
        found[name] = str(error.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    emulated(Accelerator(cpu=True))
    goals = Objective(soft=SoftTargets(student="a", teacher="b"))
    distiller = Distiller({"a": llama(1), "b": llama(1)}, objective=goals)
    with pytest.raises(ValueError, match="trains one model") as error:
        distiller.fit(DataLoader(Rows(), 4), steps=1, progress=False)
    found["several"] = str(error.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def of_teachers(rank: int, folder: str) -> None:
    found: dict[str, Any] = {}
    for name in ("LlamaConfig", "Qwen2Config", "GPT2Config", "T5Config", "PhiConfig"):
        place = f"{folder}/{name}"
        model = kd.hf.shard(place, dtype=torch.float64)
        total = sum(p.numel() for p in made(name).parameters())
        held = sum(p.to_local().numel() for p in model.parameters())
        learns = any(p.requires_grad for p in model.parameters())
        groups = sum(isinstance(m, FSDPModule) for m in model.modules())
        logits = kd.hf.head(model, **batch()).logits()
        found[name] = {
            "share": held / total, "logits": logits, "learns": learns or model.training, "groups": groups,
        }  # fmt: skip
        left = sum(p.to_local().numel() for p in model.parameters() if gathering.is_sharded(p))
        found[name]["left"] = left / total
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        model = kd.hf.shard(f"{folder}/LlamaConfig", dtype=dtype)
        found[name] = {p.dtype for p in model.parameters()} == {dtype}
    for name in ("quantised", "other names", "no weights", "no class", "another shape"):
        with pytest.raises(ValueError, match="can't be read by parts") as error:
            kd.hf.shard(f"{folder}/{name}")
        found[name] = str(error.value)
    torch.save(found, f"{folder}/teachers {rank}")


def of_snippet(rank: int, folder: str) -> None:
    """The document's, on a student and half of each batch."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    os.chdir(folder)
    own = slice(4 * rank, 4 * rank + 4)
    loader = [{name: x[own] for name, x in each.items()} for each in DataLoader(Rows(), 8)]
    names: dict[str, Any] = {"student": llama(), "loader": loader}
    exec(compile(code, "data-parallel.md", "exec"), names)
    torch.save(gathering.whole(names["student"].state_dict()), f"{folder}/snippet {rank}")


def process(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    # A process that waits for one that doesn't come says so.
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=patience)
    warnings.filterwarnings("error", message=".*returned a view tensor.*")
    for part in (of_heads, of_trainers, of_teachers, of_snippet):
        part(rank, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded")
    llama(3, seed=5).save_pretrained(place / "teacher", max_shard_size="20KB")  # of several files
    for name in ("LlamaConfig", "Qwen2Config", "GPT2Config", "T5Config", "PhiConfig"):
        made(name).save_pretrained(place / name)
    for name in ("quantised", "other names", "no weights", "no class", "another shape"):
        made("LlamaConfig").save_pretrained(place / name)
        path = place / name / "config.json"
        config = json.loads(path.read_text())
        config |= {"quantization_config": {"quant_method": "fp8"}} if name == "quantised" else {}
        config |= {"architectures": ["Another"]} if name == "no class" else {}
        path.write_text(json.dumps(config))
        weights = load_file(place / name / "model.safetensors")
        if name == "other names":
            weights = {f"transformer.{k}": x for k, x in weights.items()}
        if name == "another shape":
            weights["lm_head.weight"] = torch.zeros(V + 1, 32)
        save_file(weights, place / name / "model.safetensors")
        if name == "no weights":
            (place / name / "model.safetensors").unlink()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(process, (port, str(place)), nprocs=2)
    return place


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float, share: float) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        atol = share * float(x.abs().max())
        torch.testing.assert_close(found[name], x, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_gradients_are_those_of_one_process(layout: str, kind: str, folder: Path) -> None:
    model = made(LAYOUTS[layout][0])
    KINDS[kind](model)
    loss_of(model, slice(None)).backward()
    for rank in (0, 1):
        found = torch.load(folder / f"heads {rank}")
        for n in range(2):
            close(found[f"{layout}, {kind}, {n}"], gradients(model), 1e-5, 1e-6)


@pytest.mark.parametrize("case", ["DDP", "two passes", "accumulated", "between forward and backward"])
def test_passes_add_up(case: str, folder: Path) -> None:
    """Two before one backward pass; one that isn't reduced, and another; one without gradients between."""
    model = made("LlamaConfig")
    for _ in range(2 if case == "accumulated" else 1):
        loss_of(model, slice(None), passes=2 if case == "two passes" else 1).backward()
    for rank in (0, 1):
        where = "lent" if case.startswith("between") else "heads"
        close(torch.load(folder / f"{where} {rank}")[case], gradients(model), 1e-5, 1e-6)


@pytest.mark.parametrize("layout", ["in the root", "by itself"])
def test_in_bfloat16_gradients_are_the_mean_of_what_each_process_computes(layout: str, folder: Path) -> None:
    """Each of its own rows in bfloat16; reduced in float32."""
    parts = []
    for rank in (0, 1):
        model = cast(made("LlamaConfig"), torch.bfloat16)
        loss_of(model, slice(rank, rank + 1), share=0.5).backward()
        parts.append({n: g.float() for n, g in gradients(model).items()})
    wanted = {n: (g + parts[1][n]) / 2 for n, g in parts[0].items()}
    for rank in (0, 1):
        found = torch.load(folder / f"heads {rank}")[f"bf16 {layout}"]
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            assert torch.equal(found[name], x), name


@pytest.mark.parametrize("layout", ["in a root that is freed", "by itself"])
def test_without_gradients_a_weight_is_there_while_its_head_is(layout: str, folder: Path) -> None:
    for rank in (0, 1):
        assert torch.load(folder / f"lent {rank}")[layout] == [True] * 10


def test_what_is_not_fsdps_is_refused(folder: Path) -> None:
    said = torch.load(folder / "refused 0")
    assert {*said} == {"tensor parallel", "tensor parallel and FSDP"}
    assert all("LlamaForCausalLM can't be used by its head" in text for text in said.values())
    with pytest.raises(ValueError, match="torchrun"):
        kd.hf.shard(llama())


@pytest.mark.parametrize("case", FITS)
def test_fits_are_those_of_one_process(case: str, folder: Path, alone: dict[str, Tensor]) -> None:
    for rank in (0, 1):
        found = torch.load(folder / f"{case} {rank}")
        assert found.keys() == alone.keys()
        # The hint is compared in float32, and Adam divides by what is small.
        close(found, alone, 1e-4, 1e-5)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return fit(8)


@pytest.mark.parametrize(("name", "whole"), [("by hand", "FSDP"), ("by Accelerate", "FSDP by Accelerate")])
def test_a_sharded_fit_is_resumed_and_exported(name: str, whole: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for rank in (0, 1):
        found, wanted = (torch.load(folder / f"{x} {rank}") for x in (f"interrupted {name}", whole))
        for key, x in wanted.items():
            assert key.startswith("step") or torch.equal(found[key], x), key
    exported = AutoModelForCausalLM.from_pretrained(folder / f"fit {name}" / "exported")
    for key, x in exported.state_dict().items():
        assert torch.equal(x, found[key]), key
    alone = fit(8, folder=folder / f"fit {name}")  # which goes on where two were, and they were done
    for key in exported.state_dict():
        assert torch.equal(alone[key], found[key]), key


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_trainer_of_transformers_shards(accumulate: int, folder: Path, tmp_path: Path) -> None:
    rows = trainers.data()
    wanted = trainers.eager([rows[:8], rows[8:]])
    for rank in (0, 1):
        found = torch.load(folder / f"trained {accumulate} {rank}", weights_only=False)
        student = trainers.llama(8)
        student.load_state_dict(found["state"])
        trainers.close((trainers.weights(student), found["rows"]), wanted)
        teacher = trainers.llama(12, seed=5)
        evaluated = trainer_of(trainers.KD, student, teacher, str(tmp_path), 4, 1).evaluate()
        for name in ("eval_loss", "eval_soft", "eval_hard"):
            assert found["evaluation"][name] == pytest.approx(evaluated[name], rel=1e-4), name


def test_several_sharded_students(folder: Path) -> None:
    wanted = several(lambda model: model, 8)
    for rank in (0, 1):
        close(torch.load(folder / f"several {rank}"), wanted, 1e-6, 1e-7)


def test_what_processes_would_wait_for_is_refused(folder: Path) -> None:
    said = torch.load(folder / "refusals 1")
    assert "batches bring what it said to some of them" in said["stored, too"]
    assert "leave grad_norms out" in said["norms"]
    assert "trains one model, not a, b" in said["several"]


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "GPT2Config", "T5Config", "PhiConfig"])
def test_a_teacher_is_read_by_parts(name: str, folder: Path) -> None:
    model = cast(made(name), torch.float64)
    wanted = kd.hf.head(model, **batch()).logits()
    for rank in (0, 1):
        found = torch.load(folder / f"teachers {rank}")[name]
        close({"logits": found["logits"]}, {"logits": wanted.detach()}, 1e-9, 1e-10)
        assert found["share"] < 0.51 and found["left"] == found["share"] and not found["learns"]
        assert found["groups"] >= 3


def test_folders_that_cannot_be_read_by_parts_are_named(folder: Path) -> None:
    found = torch.load(folder / "teachers 0")
    assert found["bf16"] is True and found["float32"] is True
    for name, why in {
        "quantised": "quantised", "other names": "has no", "no weights": "no model.safetensors",
        "no class": "Another", "another shape": "lm_head.weight is",
    }.items():  # fmt: skip
        assert why in found[name] and "from_pretrained" in found[name]


def run(command: list[str], folder: Path) -> str:
    """What a command prints; the launchers of this Python are found first."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {
        **os.environ, "PATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


COMMANDS = [line.split() for line in re.findall(r"^.* examples/fsdp.py \d+$", DOCUMENT, re.M)]


@pytest.mark.thorough(but=lambda command: command[0] == "torchrun")
@pytest.mark.parametrize("command", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_the_documents_commands_run(command: list[str], tmp_path: Path) -> None:
    """In two processes, which print once."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    option = ["--master-port"] if command[0] == "torchrun" else ["launch", "--main_process_port"]
    found = run([command[0], *option, port, *command[len(option) :]], tmp_path)
    losses = [float(x) for x in re.findall(r"2 processes, step \d+, loss ([\d.]+)", found)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert {words[0] for words in COMMANDS} == {"torchrun", "accelerate"}


def test_the_documents_snippet_learns(folder: Path) -> None:
    """What a plain loop learns of the same batches, of which each process had half."""
    from transformers import AutoModelForCausalLM

    student, teacher = llama(), AutoModelForCausalLM.from_pretrained(folder / "teacher")
    optimizer = torch.optim.AdamW(student.parameters())
    for given in DataLoader(Rows(), 8):
        labels = kd.shift_labels(given["labels"])
        with torch.no_grad():
            targets = kd.hf.head(teacher, **given)
        loss = kd.kd_loss(
            kd.hf.head(student, **given), targets, labels, mask=labels != -100, temperature=2.0,
            hard_weight=0.1,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in (0, 1):
        close(torch.load(folder / f"snippet {rank}"), student.state_dict(), 1e-6, 1e-7)
