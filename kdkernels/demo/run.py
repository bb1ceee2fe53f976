"""The order of events: corpus, tokenizer, teacher, students, loss head, report; what is on disk stays.

With `--cached`, after the students: the teacher's cache, students that are distilled from it, their speed.
"""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, bench, explain
from ..cache import Manifest, TeacherCache
from ..files import replacing
from . import cached, cached_report, corpus, head, report
from .baselines import Bigram, Unigram
from .config import Config, Head, Recipe
from .model import Transformer
from .objectives import STUDENTS, StepLoss
from .parts import Key, Part, Parts, digest, hash_of_array, hash_of_files
from .train import Data, Run, bits_per_byte, score, train

SCHEMA = 2
_DEMO = Path(__file__).parent

# The files that decide what a trained model is, and those that decide what `kd_loss` computes and how fast.
_TRAINING = [_DEMO / f"{name}.py" for name in ("corpus", "baselines", "model", "objectives", "train")]
_PACKAGE = _DEMO.parent


# What decides which rows a cache holds and what they are read as.
_STORE = [_PACKAGE / "cache" / f"{name}.py" for name in ("bits", "codec", "intake", "reader", "rows")]


def _fused_code() -> str:
    sources = [p for pattern in ("*.py", "*.so", "backends/*.py") for p in _PACKAGE.glob(pattern)]
    return hash_of_files([p for p in sources if p.name not in ("cli.py", "__main__.py")])


@dataclass(frozen=True)
class Place:
    """Where a run happens and what it keeps."""

    parts: Parts
    device: torch.device
    progress: bench.Progress

    @property
    def machine(self) -> dict[str, Any]:
        """What the bits of a trained model depend on, besides its configuration."""
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "code": hash_of_files(_TRAINING),
        }


def run(
    config: Config,
    out: Path,
    device: torch.device,
    root: Path | None = None,
    stored: cached.Stored | None = None,
) -> int:
    """Run the demo and write `report.md`, `curves.png` and `figures.json` under `out`.

    Args:
        config: The numbers.
        out: Folder of the report and of the finished parts.
        device: Where models are trained and losses measured.
        root: The sources to learn from; this Python's standard library where None.
        stored: How much of the teacher is cached for students that are distilled from that, too; none are
            where None. All that doesn't depend on it is the same, and found on disk if it is there.

    Returns:
        The exit status: 0, or 1 where the verdict names a failure.

    Raises:
        corpus.NoSources: no sources to learn from.
        CacheError: a folder in the place of the teacher's cache is a cache of something else, or damaged.
    """
    # The report says it in words.
    warnings.filterwarnings("ignore", message="kdkernels runs unfused")
    started = time.perf_counter()
    place = Place(Parts(out / "cache"), device, bench.Progress())
    progress = place.progress
    progress.say(
        f"kdkernels demo on {device}, {torch.get_num_threads()} threads; finished parts in {out / 'cache'}"
    )
    text = corpus.read_corpus(root)
    data, tokens_key = _data(config, text, place)
    made_from = {"tokens": tokens_key}
    labels_only = STUDENTS["hard"].step_loss(config.mix, None)
    teacher = _model(config, place, data, "teacher", config.teacher, 0, labels_only, made_from)
    figures = _language_figures(config, place, data, teacher, made_from)
    if stored is not None:
        figures["cached"] = _cached_figures(config, place, data, teacher, made_from, stored)
    figures["heads"] = _heads(config, place)
    logits = torch.zeros(1, 2, device=device)
    chosen = explain(logits, logits)
    figures = {
        "schema": SCHEMA,
        "environment": _environment(device),
        "config": json.loads(json.dumps(asdict(config))),
        "corpus": {"root": text.root, "sha256": text.sha256, "files": text.files, "bytes": text.bytes},
        "vocab": data.vocab,
        "backend": {"name": chosen.backend, "reasons": chosen.reasons},
        **figures,
        # Of this run and of those that it goes on from.
        "seconds": _total_seconds(figures),
        "wall_seconds": time.perf_counter() - started,
    }
    return publish(figures, out)


def publish(figures: report.Figures, out: Path) -> int:
    """Write the three files, print the tables, and return the exit status."""
    failures = report.verdict(figures)
    figures = {**figures, "failures": failures, "notes": report.notes(figures)}
    bench.write_json(out / "figures.json", _without_nan(figures))
    with replacing(out / "report.md") as part:
        part.write_text(report.markdown(figures), encoding="utf-8")
    with replacing(out / "curves.png") as part:
        report.plot(figures, part)
    bench.print_table("Language models", *report.language_table(figures))
    if "cached" in figures:
        bench.print_table("Distilled from a cached teacher", *cached_report.table(figures))
    bench.print_table("Loss head", *report.head_table(figures), left=2)
    for line in figures["notes"]:
        print(f"- {line}")
    print(f"\nWritten: {out / 'report.md'}, {out / 'curves.png'}, {out / 'figures.json'}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what diverged is null there, and a failure in the verdict."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data(config: Config, text: corpus.Corpus, place: Place) -> tuple[Data, Key]:
    """The windows, from the tokenizer and the token streams that are on disk or made now."""
    import tokenizers

    key = {
        "corpus": text.sha256,
        "vocab": config.vocab,
        "tokenizers": tokenizers.__version__,
        "code": hash_of_files([_DEMO / "corpus.py"]),
    }
    with place.progress.phase("tokenizer", 1 + len(corpus.SPLITS)) as progress:
        part = place.parts.load("tokenizer", key)
        if part is None:
            progress.step("learning merges", 0)
            part = Part({"seconds": 0.0, "json": corpus.train_tokenizer(text.texts["train"], config.vocab)})
            place.parts.save("tokenizer", key, part)
        progress.step("learnt")
        tokenizer = part.facts["json"]
        streams = place.parts.load("tokens", key)
        if streams is None:
            arrays = {}
            for split in corpus.SPLITS:
                arrays[split] = corpus.encode(tokenizer, text.texts[split])
                progress.step(f"{split} encoded")
            streams = Part({}, arrays)
            place.parts.save("tokens", key, streams)
        else:
            progress.step("from disk", len(corpus.SPLITS))
    return (
        Data(
            windows=corpus.windows(streams.arrays["train"], config.context),
            validation=corpus.spread_windows(
                streams.arrays["validation"], config.context, config.validation_windows
            ),
            heldout=corpus.spread_windows(streams.arrays["heldout"], config.context, config.heldout_windows),
            token_bytes=corpus.token_bytes(tokenizer),
            size=config.windows,
        ),
        {**key, "context": config.context, "windows": config.windows},
    )


def _model(
    config: Config,
    place: Place,
    data: Data,
    name: str,
    recipe: Recipe,
    seed: int,
    loss: StepLoss,
    made_from: Key,
) -> tuple[Run, Part]:
    """A trained model and its part: from disk, or trained now, scored on the held-out windows and saved."""
    key = {
        **made_from,
        "name": name,
        "recipe": asdict(recipe),
        "seed": seed,
        "validation": [config.validation_windows, config.validate_every],
        "heldout": config.heldout_windows,
        "machine": place.machine,
    }
    seen = data.seen(seed, recipe.steps)
    prior = Unigram(seen[:, 1:], data.vocab).probability
    run = Run(recipe, seed, data, prior, place.device)
    with place.progress.phase(name.ljust(16), recipe.steps) as progress:
        part = place.parts.load(name, key)
        if part is not None:
            run.restore(part)
            progress.step("from disk", recipe.steps)
            return run, part
        train(
            run,
            loss,
            config.validate_every,
            place.parts,
            name,
            key,
            lambda value: progress.step(f"loss {value:.3f}"),
        )
        progress.step("scoring", 0)
        part = run.part(moments=False)
        nats = score(run.model, data.heldout, place.device)
        part.facts["bits_per_byte"] = bits_per_byte(nats, data.heldout, data.token_bytes)
        part.facts["tokens"] = int(seen[:, 1:].size)
        place.parts.save(name, key, part)
        place.parts.drop(f"{name}-unfinished", key)
    return run, part


def _language_figures(
    config: Config, place: Place, data: Data, teacher: tuple[Run, Part], made_from: Key
) -> dict[str, Any]:
    """Baselines, teacher and students: bits per byte, and the curves."""
    run, teacher_part = teacher
    teacher_model: Transformer = run.model.eval().requires_grad_(False)
    from_teacher = _from_teacher(config, place)
    parts: dict[str, list[Part]] = {}
    for name, objective in STUDENTS.items():
        loss = objective.step_loss(config.mix, teacher_model)
        depends = {
            **made_from,
            **(from_teacher if objective.distils else {}),
            **({"fused": _fused_code()} if objective.fused else {}),
        }
        parts[name] = [
            _model(config, place, data, f"{name}-{seed}", config.student, seed, loss, depends)[1]
            for seed in config.seeds
        ]
    losses = {name: [p.arrays["losses"] for p in parts[name]] for name in parts}
    fused = [name for name, objective in STUDENTS.items() if objective.fused]
    seen = data.seen(0, config.teacher.steps)
    bigram = Bigram(seen[:, :-1], seen[:, 1:], data.vocab)
    return {
        "baselines": _baselines(bigram, data.heldout, data),
        "validation_baselines": _baselines(bigram, data.validation, data),
        "teacher": _facts(teacher_part),
        "students": {
            name: [{"seed": seed, **_facts(p)} for seed, p in zip(config.seeds, parts[name], strict=True)]
            for name in parts
        },
        "scored_bytes": int(data.token_bytes[data.heldout[:, 1:]].sum()),
        "scored_tokens": int(data.heldout[:, 1:].size),
        "curve_difference": {name: report.curve_differences(losses["eager"], losses[name]) for name in fused},
        "curves": {
            "teacher": teacher_part.arrays["curve"].tolist(),
            **{name: [p.arrays["curve"].tolist() for p in parts[name]] for name in parts},
            "losses": {name: [curve.tolist() for curve in losses[name]] for name in losses},
            "gap": {
                name: [np.abs(a - b).tolist() for a, b in zip(losses["eager"], losses[name], strict=True)]
                for name in fused
            },
        },
    }


def _from_teacher(config: Config, place: Place) -> Key:
    """What a distilled student depends on, besides what every student does."""
    return {"mix": asdict(config.mix), "teacher": [asdict(config.teacher), place.machine]}


def _cached_figures(
    config: Config,
    place: Place,
    data: Data,
    teacher: tuple[Run, Part],
    made_from: Key,
    stored: cached.Stored,
) -> dict[str, Any]:
    """The cache of the teacher, the students that are distilled from it, and the speed of a step."""
    model: Transformer = teacher[0].model.eval().requires_grad_(False)
    manifests = cached.manifests(stored, config.mix, model, data.vocab, digest(made_from["tokens"]))
    caches, built = _teacher_caches(config, place, data, model, manifests)
    depends = {
        **made_from,
        **_from_teacher(config, place),
        "fused": _fused_code(),
        "cached": {
            "manifests": {kind: manifest.digest for kind, manifest in manifests.items()},
            "code": hash_of_files([_DEMO / "cached.py", *_STORE]),
        },
    }
    arms: dict[str, Any] = {}
    losses: dict[str, StepLoss] = {
        name: STUDENTS[name].step_loss(config.mix, model) for name in cached_report.BESIDE
    }
    for name, arm in cached.ARMS.items():
        cache = TeacherCache.open(caches[arm.kind], manifests[arm.kind], tail=arm.tail)
        losses[name] = cached.step_loss(cache, config.mix)
        parts = [
            _model(config, place, data, f"{name}-{seed}", config.student, seed, losses[name], depends)[1]
            for seed in config.seeds
        ]
        arms[name] = {
            "label": arm.label(stored),
            "bytes_per_token": cache.bytes_per_token,
            "students": [{"seed": seed, **_facts(p)} for seed, p in zip(config.seeds, parts, strict=True)],
            "curves": [p.arrays["curve"].tolist() for p in parts],
            "losses": [p.arrays["losses"].tolist() for p in parts],
        }
    return {
        "stored": asdict(stored),
        "build": built,
        "arms": arms,
        "speed_rounds": cached.speed_rounds(config.student.steps),
        "steps_per_second": _speeds(config, place, data, losses, depends),
    }


def _teacher_caches(
    config: Config, place: Place, data: Data, teacher: Transformer, manifests: dict[str, Manifest]
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The folder of the cache of each kind, filled, and what there is to say of that."""
    folders = {kind: cached.folder_of(place.parts.folder, m) for kind, m in manifests.items()}
    rows = cached.sequences(data, config.seeds, config.student.steps)
    key = {"manifests": [m.digest for m in manifests.values()], "sequences": hash_of_array(rows)}
    part = place.parts.load("teacher-cache", key) or Part({"seconds": 0.0})
    with place.progress.phase("teacher cache".ljust(16), len(rows)) as progress:
        started = time.perf_counter()
        try:
            cached.build(
                {folders[kind]: manifests[kind] for kind in folders},
                teacher,
                rows,
                place.device,
                lambda count, asked: progress.step("asking the teacher" if asked else "from disk", count),
            )
        finally:
            # An interrupted build is one of the builds that the cache is from.
            if "mass" not in part.facts:
                part.facts["seconds"] += time.perf_counter() - started
                place.parts.save("teacher-cache", key, part)
    if "mass" not in part.facts:
        part.facts["mass"] = cached.mass(TeacherCache.open(folders["topk"]), rows)
        place.parts.save("teacher-cache", key, part)
    return folders, {"sequences": len(rows), "tokens": int(rows.size), **part.facts}


def _speeds(
    config: Config, place: Place, data: Data, losses: dict[str, StepLoss], depends: Key
) -> dict[str, float]:
    """Steps per second of each objective: from disk, or measured now."""
    key = {**depends, "recipe": asdict(config.student), "machine": place.machine, "names": list(losses)}
    seed = config.seeds[0]
    prior = Unigram(data.seen(seed, 1)[:, 1:], data.vocab).probability
    rounds = cached.speed_rounds(config.student.steps)
    with place.progress.phase("steps per second", rounds) as progress:
        part = place.parts.load("speeds", key)
        if part is None:
            part = Part(
                cached.steps_per_second(
                    losses,
                    lambda: Run(config.student, seed, data, prior, place.device),
                    lambda _: progress.step("a step of each"),
                )
            )
            place.parts.save("speeds", key, part)
        else:
            progress.step("from disk", rounds)
    return part.facts


def _facts(part: Part) -> dict[str, Any]:
    facts = part.facts
    return {
        "bits_per_byte": facts["bits_per_byte"],
        "tokens": facts["tokens"],
        "steps": facts["step"],
        "seconds": facts["seconds"],
        "step_seconds": facts["seconds"] / facts["step"],
    }


def _baselines(bigram: Bigram, scored: np.ndarray, data: Data) -> dict[str, float]:
    contexts, targets = scored[:, :-1], scored[:, 1:]
    nats = {"unigram": bigram.unigram.nats(targets), "bigram": bigram.nats(contexts, targets)}
    return {name: bits_per_byte(value, scored, data.token_bytes) for name, value in nats.items()}


def _heads(config: Config, place: Place) -> list[dict[str, Any]]:
    """The loss head of each implementation at each size, or why it couldn't be measured."""
    measured = []
    code = {"code": hash_of_files([_DEMO / "objectives.py", _DEMO / "head.py"]), "fused": _fused_code()}
    with place.progress.phase("loss head", len(config.heads) * len(head.IMPLEMENTATIONS)) as progress:
        for size in config.heads:
            for implementation in head.IMPLEMENTATIONS:
                key = {
                    "implementation": implementation,
                    "head": asdict(size),
                    "mix": asdict(config.mix),
                    "machine": {**place.machine, **code},
                }
                progress.step(f"{implementation}, {size.words}", 0)
                part = place.parts.load(f"head-{implementation}-{size.vocab}", key)
                if part is None:
                    part = Part(_measure(config, place, size, implementation))
                    # What couldn't be measured is tried again next time: a compiler may have been installed.
                    if "error" not in part.facts:
                        place.parts.save(f"head-{implementation}-{size.vocab}", key, part)
                measured.append({"implementation": implementation, **asdict(size), **part.facts})
                progress.step(f"{implementation}, {size.words}")
    return measured


def _measure(config: Config, place: Place, size: Head, implementation: str) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        facts = bench.run_isolated(
            head.measure,
            implementation,
            size,
            config.mix,
            str(place.device),
            torch.get_num_threads(),
            preload=["torch", "kdkernels.demo.head"],
        )
    except bench.ProcessDied as error:
        facts = {"error": head.reason(error)}
    return {**facts, "total_seconds": time.perf_counter() - started}


def _total_seconds(figures: dict[str, Any]) -> float:
    trained = [figures["teacher"], *(s for group in figures["students"].values() for s in group)]
    built = 0.0
    if "cached" in figures:
        trained += [s for arm in figures["cached"]["arms"].values() for s in arm["students"]]
        built = figures["cached"]["build"]["seconds"]
    measured = sum(h["total_seconds"] for h in figures["heads"])
    return sum(model["seconds"] for model in trained) + built + measured


def _environment(device: torch.device) -> dict[str, Any]:
    system = bench.environment(device, torch.get_num_threads())
    cpu = system.get("cpu") or platform.machine()
    system["processor"] = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    system["device"] = device.type
    system["kdkernels"] = __version__
    import matplotlib
    import tokenizers

    system["numpy"] = np.__version__
    system["tokenizers"] = tokenizers.__version__
    system["matplotlib"] = matplotlib.__version__
    return system


def device_here(name: str | None = None) -> torch.device:
    """The device of that name; where None, the accelerator if there is one, else the CPU.

    Raises:
        ValueError: not a device that models can be trained on here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()) or (kind == "cpu" and colon):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if kind == "cuda" and int(index or 0) >= (there := torch.cuda.device_count()):
        raise ValueError(f"--device {name} isn't here: torch sees {there} CUDA devices")
    return torch.device(name)
