"""`DistillMixin`: trainers of `transformers` and TRL that minimise an objective of the thin trainer."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import storage
from ..cache import TeacherCache
from ..cache.checks import check_cached, check_loader, collator_of
from ..cache.manifest import NAME as MANIFEST
from ..models.calls import rows, unwrap
from ..models.gathering import place
from ..models.tokenizers import vocabulary_hash
from ..processes import pause_at_exit
from ..train.objective import Function, Objective, Progress, Step, Term
from ..train.outputs import Adaptor
from ..train.passes import Passes, counts
from ..train.records import Means
from ..train.teachers import Stored, as_teacher, modules_of
from ..train.terms import HardLabels, SoftTargets

# A trainer, which comes after it in the order of classes.
_Trainer: Any = object

# Of batches, what an objective takes that no model does.
_ENTRIES = ("mask", "token_weights", "teacher")
_FOLDER = "objective"


class DistillMixin(_Trainer):
    """Makes a trainer distil: `class KD(hf.DistillMixin, Trainer)`, or `SFTTrainer`.

    Its loss is an objective instead of the model's own; everything else is the trainer's: data, accumulation,
    mixed precision, processes, FSDP2, saving and resuming. Every term is a mean over all that the accumulated
    batches of all processes count (of each process alone without `average_tokens_across_devices`). Language
    models are asked for their heads, so that logits are not made. Every term is logged beside `loss`;
    `eval_loss` is a mean over items, and so are the terms' `eval_` figures. The teacher is frozen, in eval
    mode, and as it was afterwards; one that `kd.hf.shard` has shared out is taken as it is.

    Args:
        *args: Of the trainer.
        teacher: A model; the folder of one, or of a cache; a function of the batch, an `Ensemble`, a list or
            a `kd.cache.TeacherCache`, as `Distiller` takes them; None where batches bring it, as they do with
            `cache.collate` for a data_collator.
        objective: An `Objective`, such as one with further options of `kd_loss` (`pad_vocab=True` of a pair
            whose vocabularies are padded to different sizes); None for soft targets and labels with the next
            four, and, of a mixture of experts whose config asks for it, the loss that balances these.
        divergence: As `kd_loss` takes it.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        teacher_tokenizer: To be compared with the trainer's; None for the one in the folder that the teacher
            is from.
        adaptor: As `Distiller` takes it.
        **kwargs: Of the trainer.

    Raises:
        TypeError: An objective that is none.
        ValueError: Other options beside an objective; tokenizers that differ; a trainer with another loss;
            in training, data with entries for the objective that batches don't have, or no label at all.

    Example:
        >>> class KD(hf.DistillMixin, Trainer): ...
        >>> KD(student, args, train_dataset=data, teacher=teacher, temperature=2.0, hard_weight=0.1).train()
    """

    # The loss is a mean over the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        objective: Objective | None = None,
        divergence: Any = "forward_kl",
        temperature: float = 1.0,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        teacher_tokenizer: Any = None,
        adaptor: Adaptor | None = None,
        **kwargs: Any,
    ) -> None:
        terms: dict[str, Term] = {
            "soft": SoftTargets(divergence, temperature, soft_weight),
            "hard": HardLabels(hard_weight),
        }
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective, got {type(objective).__name__}")
        if objective and (divergence, temperature, soft_weight, hard_weight) != ("forward_kl", 1.0, 1.0, 0.0):
            raise ValueError("give an objective, or divergence, temperature and weights, and not both")
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            pause_at_exit()
        if objective is None:
            terms |= _router(self.model)
            objective = Objective(**{name: term for name, term in terms.items() if term.weight != 0})
        # TRL's; with an older transformers, what isn't a function is its sign that the loss is scaled.
        another = getattr(self.args, "loss_type", None) == "dft" or callable(self.compute_loss_func)
        if self.label_smoother is not None or another:
            raise ValueError(
                "the objective is the loss: leave out compute_loss_func, label_smoothing_factor and "
                "loss_type='dft'"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process are not supported: start one for each, by torchrun "
                "or accelerate launch"
            )
        self._kd_agrees = teacher_tokenizer is not None
        if isinstance(teacher, (str, Path)) and (Path(teacher) / MANIFEST).is_file():
            teacher = TeacherCache.open(teacher)
        if isinstance(teacher, (str, Path)):
            teacher_tokenizer = teacher_tokenizer or _tokenizer_in(Path(teacher))
            teacher = _model_in(Path(teacher), self.model)
        self.model_accepts_loss_kwargs = True  # in versions that ask for this to know how a loss is scaled
        self.objective, self.adaptor = objective.to(self.args.device), adaptor or Adaptor()
        self.teacher = as_teacher(teacher)
        self._check_cached()
        modules = modules_of(self.teacher)
        tokenizers = [teacher_tokenizer] if teacher_tokenizer is not None else map(_tokenizer_of, modules)
        for tokenizer in tokenizers:
            _check_tokenizers(self.processing_class or _tokenizer_of(self.model), tokenizer)
        for module in modules:
            place(module, self.args.device)
        self._kd_passes: Passes | None = None
        self._kd_totals: dict[Any, Any] | None = None
        self._kd_sums: dict[str, Any] = {}
        self._kd_steps = 0
        self._kd_means: Means | None = None

    def _check_cached(self) -> None:
        """Refuses caches, of the teacher and of the collator, that the terms or the student can't do with."""
        own = self.teacher.collator if isinstance(self.teacher, Stored) else None
        for collator in (own, collator_of(self.data_collator)):
            if collator is not None:
                check_cached(collator, "teacher", self.objective.terms.items(), [self.model])
                if not self._kd_agrees:
                    _check_hash(self.processing_class or _tokenizer_of(self.model), collator.cache)

    def get_train_dataloader(self) -> Any:
        """As the trainer's; refused where it cuts stored teachers up."""
        self._check_cached()  # of a collator that was set after all else
        return check_loader(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return check_loader(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of an optimizer step, of which all is counted here."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if samples:
            self._check_entries(samples[0])
            given = self._passes().given([dict(batch) for batch in samples])
            totals, world = counts(given, self.objective.counted), self.accelerator.num_processes
            if world > 1 and self.args.average_tokens_across_devices:
                device = self.args.device
                whole = torch.stack([torch.as_tensor(s, device=device) for s in totals.values()]).float()
                reduced: Any = self.accelerator.reduce(whole, "sum")
                totals = dict(zip(totals, (reduced / world).unbind(), strict=True))
            self._kd_totals, self._kd_steps = totals, self._kd_steps + 1
            for p in self.objective.parameters():  # the trainer does this of its model alone
                p.grad = None
            if items is None:  # without labels; an older trainer would take the loss for a batch's own mean
                items = totals["items"]
        return samples, items

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; an error in the end if a term had nothing to learn from."""
        result = super().train(*args, **kwargs)
        for term in self.objective.terms.values():
            term.check()  # type: ignore[operator]
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective of a batch, its part of the means over the accumulated batches."""
        passes, learns = self._passes(), torch.is_grad_enabled() and model.training
        passes.ready["student"] = model
        given = passes.given([dict(inputs)])
        if not learns:
            self._count_once(given[0].batch)
        totals = self._kd_totals if learns and self._kd_totals else counts(given, self.objective.counted)
        done = Progress(self.state.global_step, int(self.state.epoch or 0))
        done.fraction = self.state.global_step / max(self.state.max_steps, 1)
        with passes.open(("student",) if learns else ()), self.accelerator.autocast():
            (step,) = passes.steps(given, ("student",) if learns else (), done, totals)
            loss, values = self.objective(step)
            outputs = {"loss": loss, "logits": step.student["logits"]} if return_outputs else None
        if learns and not loss.requires_grad:
            raise ValueError(
                "the objective gives no gradient: no term has weight now, or uses what is trained"
            )
        self._note(values, loss, counts(given, self.objective.counted), learns)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits are made where something else than the loss is asked for, and answers where those are."""
        inputs = self._prepare_inputs(inputs)
        answers = not prediction_loss_only and getattr(self.args, "predict_with_generate", False)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only or answers:
                loss = self.compute_loss(model, inputs).detach()
                if answers:
                    return loss, *super().prediction_step(model, inputs, False, ignore_keys, **kwargs)[1:]
                return loss, None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"].detach(), inputs.get("labels")

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; what terms have made is trained, too."""
        loss = super().training_step(*args, **kwargs)
        extra = self._adopt()
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for p in extra:
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise, where a checkpoint has brought it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._adopt()
        return optimizer

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """As the trainer's, with means of every term."""
        self._kd_means = Means()
        kwargs["metric_key_prefix"] = metric_key_prefix
        result = super().evaluation_loop(dataloader, description, *args, **kwargs)
        for name, figure in self._kd_means.over(self.accelerator.num_processes).items():
            result.metrics[f"{metric_key_prefix}_{name}"] = figure
        self._kd_means = None
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the terms' means over the steps since they were logged last."""
        if "loss" in logs and self._kd_steps:
            names = list(self._kd_sums)
            stacked = torch.stack([torch.as_tensor(self._kd_sums[n]).float() for n in names]) / self._kd_steps
            means: Any = self.accelerator.reduce(stacked.to(self.args.device), "mean")
            logs |= dict(zip(names, means.tolist(), strict=True))
            self._kd_sums, self._kd_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _note(
        self, values: Mapping[str, Tensor], loss: Tensor, sizes: Mapping[Any, Any], learns: bool
    ) -> None:
        if learns:
            for name, value in values.items():
                self._kd_sums[name] = self._kd_sums.get(name, 0.0) + value
        elif self._kd_means is not None:
            for name, value in values.items():
                term: Any = self.objective.terms[name]
                self._kd_means.add(name, float(value), float(sizes[term.over]))
            self._kd_means.add("loss", float(loss), float(sizes["items"]))

    def _count_once(self, batch: dict[str, Any]) -> None:
        """Takes out of the mask what Accelerate repeats for all processes to have as many samples."""
        end, world = self.accelerator.gradient_state, self.accelerator.num_processes
        if self._kd_means is None or world == 1 or not end.end_of_dataloader or end.remainder < 1:
            return
        size = len(next(x for x in batch.values() if isinstance(x, Tensor) and x.dim()))
        own, mask = end.remainder - self.accelerator.process_index * size, batch["mask"]
        if own < size:
            mask = (
                torch.ones(size, dtype=torch.bool, device=self.args.device) if mask is None else mask.clone()
            )
            mask[max(own, 0) :] = False
            batch["mask"] = mask

    def _check_entries(self, batch: Any) -> None:
        """Refuses data whose entries for the objective don't come to it."""
        data: Any = self.train_dataset
        columns = getattr(data, "column_names", None)
        if columns is None and isinstance(data, (list, tuple)) and isinstance(data[0], Mapping):
            columns = data[0]
        for name in _ENTRIES:
            if name in (columns or ()) and name not in batch:
                raise ValueError(
                    f"the data have {name!r} and batches don't, which {type(self.data_collator).__name__} "
                    "leaves out: pass a data_collator that keeps it, or data without it"
                )

    def _passes(self) -> Passes:
        student = unwrap(self.model)
        if self._kd_passes is None or self._kd_passes.models["student"] is not student:  # model_init's next
            models, terms = {"student": student}, list(self.objective.terms.values())
            self._kd_passes = Passes(models, models, {"teacher": self.teacher}, terms, self.adaptor)
        return self._kd_passes

    def _adopt(self) -> list[nn.Parameter]:
        """What terms have made, given to the optimizer."""
        extra = [p for p in self.objective.parameters() if p.requires_grad]
        if extra and self.optimizer is not None:
            groups = self.optimizer.param_groups
            known = {id(p) for group in groups for p in group["params"]}
            groups[0]["params"] += [p for p in extra if id(p) not in known]
        return extra

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = list(dict.fromkeys([*self._signature_columns, *_ENTRIES]))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.objective.state_dict():
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            storage.save(folder / _FOLDER, self.objective.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if storage.is_saved(folder := Path(resume_from_checkpoint) / _FOLDER):
            self.objective.load_state_dict(storage.load(folder))
            self.objective.to(self.args.device)


def _model_in(folder: Path, student: Any) -> nn.Module:
    """The model of a folder, of the student's kind."""
    import transformers

    name = "AutoModelForCausalLM"
    if rows(unwrap(student)) == "tokens":
        seq2seq = unwrap(student).config.is_encoder_decoder  # type: ignore[union-attr]
        name = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForMaskedLM"
    elif rows(unwrap(student)) == "samples":
        name = "AutoModelForSequenceClassification"
    return getattr(transformers, name).from_pretrained(folder)


def _router(model: Any) -> dict[str, Term]:
    """The term by which a mixture of experts balances these, where its config adds it to the model's loss."""
    config: Any = getattr(unwrap(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "output_router_logits", False):
        return {}
    return {"router": Function(_balance, float(getattr(config, "router_aux_loss_coef", 0.0)))}


def _balance(step: Step) -> Tensor:
    loss: Tensor = step.student["aux_loss"]
    return loss


def _tokenizer_in(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer in the folder that a model was loaded from, if it was, and there is one."""
    name = getattr(unwrap(model), "name_or_path", None)
    try:
        return _tokenizer_in(Path(name)) if isinstance(name, str) and name else None
    except Exception as error:  # which a loaded model does without, of whatever kind
        warnings.warn(f"the tokenizer in {name!r} was not compared: {error}", stacklevel=2)
        return None


def _check_hash(ours: Any, cache: TeacherCache) -> None:
    """Refuses a cache whose manifest has the hash of another tokenizer."""
    ours, theirs = vocabulary_hash(ours), cache.manifest.tokenizer
    # Whoever fills a cache may write something else there.
    if ours is None or theirs is None or theirs.partition(":")[0] != ours.partition(":")[0] or ours == theirs:
        return
    raise ValueError(
        f"the cache {cache.path} is of token ids of another tokenizer: its manifest has {theirs}, and the "
        f"student's is {ours}. Build one with the student's, which must be the teacher's, too; if "
        "they agree on all that is used, say so by teacher_tokenizer=, the student's"
    )


def _check_tokenizers(ours: Any, theirs: Any) -> None:
    """Refuses a teacher that counts tokens otherwise."""
    ours, theirs = (getattr(t, "tokenizer", t) for t in (ours, theirs))  # of processors
    if not (hasattr(ours, "get_vocab") and hasattr(theirs, "get_vocab")):
        return
    names = [getattr(t, "name_or_path", "") or type(t).__name__ for t in (ours, theirs)]
    vocabularies = [t.get_vocab() for t in (ours, theirs)]
    if vocabularies[0] == vocabularies[1]:
        return
    sizes = [len(v) for v in vocabularies]
    hashes = [hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:12] for v in vocabularies]
    what = "sizes" if sizes[0] != sizes[1] else "hashes of the same size"
    raise ValueError(
        f"student and teacher must have one tokenizer, and the student's {names[0]!r} has {sizes[0]} tokens "
        f"({hashes[0]}), the teacher's {names[1]!r} {sizes[1]} ({hashes[1]}): they differ in their {what}. "
        "If they agree on all that is used, say so by teacher_tokenizer=, the student's"
    )
