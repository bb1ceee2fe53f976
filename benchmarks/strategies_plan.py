"""What `python -m benchmarks strategies` will compare, committed before it is run.

An experiment has arms, and every arm the same number of configurations to tune over, on tuning seeds and the
validation split. A claim says of two arms of an experiment, the strategy and its control, that the first has
the larger metric, on test seeds and the test split: the claimed sign is always +. Here is the first plan, of
strategies that are one fit; the second one's parts are in the files of their fits.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from benchmarks import (
    strategies_adversarial,
    strategies_derivatives,
    strategies_several,
    strategies_specialists,
)
from benchmarks.strategies_claims import (
    HARD,
    QUICK_SEEDS,
    QUICK_SHARE,
    RATES,
    TEST_SEEDS,
    TEXT_RATES,
    TUNING_SEEDS,
    VERSION,
    Arm,
    Claim,
    Experiment,
    Options,
    over,
)

FEW = "50 labelled digits; student 64-30-30-10; teacher 64-256-256-10 of 1,000 digits"


def _hinton() -> dict[str, Experiment]:
    def soft(temperature: float, teacher: str = "wide") -> Arm:
        control = ", its wrong classes shuffled" if teacher == "shuffled" else ""
        options = {"recipe": "hinton", "temperature": temperature, "teacher": teacher}
        return Arm(f"soft, T = {temperature:g}{control}", options, over(lr=RATES, hard_weight=(0.5, 0.1)))

    return {
        "hinton": Experiment(
            "hinton",
            "classify",
            FEW,
            400,
            {
                "hard": Arm("labels", {"recipe": "labels"}, HARD),
                **{f"t{t}": soft(float(t)) for t in (1, 2, 4, 8, 20)},
                "shuffled": soft(4.0, "shuffled"),
            },
        ),
        "hinton-few": Experiment(
            "hinton",
            "classify",
            "30 labelled digits, 3 % of the teacher's 1,000; nets as with 50; hard weight 0.5",
            400,
            {
                "hard": Arm("labels", {"recipe": "labels", "amount": 30}, HARD),
                "soft": Arm(
                    "soft, T tuned",
                    {"recipe": "hinton", "amount": 30, "hard_weight": 0.5},
                    over(temperature=(5.0, 2.0, 10.0), lr=RATES[::2]),
                ),
            },
        ),
        "mythical": Experiment(
            "hinton",
            "mythical",
            "the 1,000 digits without their threes, which the teacher knows; the bias of class 3 is chosen "
            "on the validation split",
            300,
            {
                "hard": Arm("labels", {"recipe": "labels"}, HARD),
                "soft": Arm(
                    "soft",
                    {"recipe": "hinton", "hard_weight": 0.1},
                    over(lr=RATES, temperature=(4.0, 20.0)),
                ),
            },
            tuned_on="biased_accuracy",
            shown="biased_recall_3",
        ),
    }


def _agreement() -> dict[str, Experiment]:
    weights = {"logit_mse": (0.1, 1.0), "tvd": (1.0, 10.0)}
    arms = {
        name: Arm(
            name.replace("_", " "),
            {"recipe": "hinton", "divergence": name, "temperature": 4.0, "hard_weight": 0.5},
            over(lr=RATES, soft_weight=weights.get(name, (1.0, 4.0))),
        )
        for name in ("logit_mse", "forward_kl", "reverse_kl", "jsd", "tvd")
    }
    hard = Arm("labels", {"recipe": "labels"}, HARD)
    return {
        "agreement": Experiment(
            "agreement", "classify", f"{FEW}; T = 4, hard weight 0.5", 400, {"hard": hard, **arms}
        )
    }


def _dkd() -> dict[str, Experiment]:
    def arm(says: str, options: Options, **values: tuple[Any, ...]) -> Arm:
        return Arm(says, {"temperature": 4.0, "hard_weight": 1.0, **options}, over(lr=RATES, **values))

    return {
        "dkd": Experiment(
            "dkd",
            "classify",
            f"{FEW}; labels beside every arm, T = 4, the soft term warmed up over a tenth of the steps",
            400,
            {
                "kl": arm("KL", {"recipe": "warmed"}, soft_weight=(1.0, 4.0)),
                "dkd": arm("TCKD and β · NCKD", {"recipe": "dkd"}, beta=(8.0, 2.0)),
                "tckd": arm("TCKD only", {"recipe": "dkd", "beta": 0.0}, alpha=(1.0, 4.0)),
                "nckd": arm("NCKD only", {"recipe": "dkd", "alpha": 0.0}, beta=(8.0, 2.0)),
            },
        )
    }


def _noise() -> dict[str, Experiment]:
    noise = over(lr=RATES, sigma=(0.1, 0.4))
    # Large enough that its effect on a mean of 400 gradients is seen.
    loud = {"sigma": 0.5, "probability": 1.0}
    return {
        "noise": Experiment(
            "noisy_teacher",
            "classify",
            "50 digits without labels, squared error of logits, multiplicative noise on half of the rows",
            400,
            {
                "clean": Arm("clean", {"recipe": "clean"}, HARD),
                "teacher": Arm("noisy teacher", {"recipe": "noisy_teacher"}, noise),
                "student": Arm("noisy student", {"recipe": "noisy_student"}, noise),
            },
        ),
        "noise-gradients": Experiment(
            "noisy_teacher",
            "gradients",
            "gradients of 400 batches of 10 digits at a student half way, σ = 0.5 on all rows",
            400,
            {
                "clean": Arm("clean", {"recipe": "clean"}, ({},)),
                "teacher": Arm("noisy teacher", {"recipe": "noisy_teacher", **loud}, ({},)),
                "student": Arm("noisy student", {"recipe": "noisy_student", **loud}, ({},)),
            },
            tuned_on="variance",
            shown="variance",
        ),
    }


def _features() -> dict[str, Experiment]:
    kd = over(lr=RATES, hard_weight=(0.5, 0.1))

    def hint(says: str, **options: Any) -> Arm:
        return Arm(says, {"recipe": "fitnets", "guided": "3", "hint": "3", **options}, kd)

    def maps(says: str, teacher: str) -> Arm:
        return Arm(
            says, {"recipe": "attention_transfer", "teacher": teacher}, over(lr=RATES, weight=(1e3, 1e2))
        )

    return {
        "fitnets": Experiment(
            "fitnets",
            "classify",
            "50 labelled digits; student 64-30-30-30-10, guided at its second layer by the teacher's; T = 4; "
            "as many steps in every arm, half of them for the hint",
            400,
            {
                name: Arm(arm.says, {"net": (30, 30, 30), "temperature": 4.0, **arm.options}, arm.grid)
                for name, arm in {
                    "kd": Arm("no hint", {"recipe": "hinton"}, kd),
                    "hint": hint("hint, then KD"),
                    "untrained": hint("hint of an untrained teacher, then KD", hints_from="untrained"),
                    "joint": hint("hint beside KD", two_stages=False, hint_weight=1.0),
                }.items()
            },
        ),
        "attention": Experiment(
            "attention_transfer",
            "convolve",
            "50 labelled digits; three convolutions of 8 channels, the teacher's of 32; maps of 8×8 and 4×4",
            300,
            {
                "hard": Arm("labels", {"recipe": "labels"}, HARD),
                "maps": maps("attention maps", "trained"),
                "untrained": maps("maps of an untrained teacher", "untrained"),
            },
        ),
    }


TEXT = (
    "masked bytes of Python's standard library, 3 of 16; BERT 64 wide, 4 heads, 2 layers; a teacher of 4 "
    "layers, one for all seeds"
)


def _text() -> dict[str, Experiment]:
    rates = over(lr=TEXT_RATES)

    def triple(says: str, **options: Any) -> Arm:
        return Arm(says, {"recipe": "distilbert", **options}, rates)

    def tiny(says: str, **options: Any) -> Arm:
        return Arm(says, {"recipe": "tinybert", **options}, rates)

    return {
        "distilbert": Experiment(
            "distilbert",
            "language",
            TEXT,
            300,
            {
                "triple": triple("triple loss"),
                "no_soft": triple("without soft targets", soft_weight=0.0),
                "no_cosine": triple("without cosine", cosine_weight=0.0),
                "no_hard": triple("without masked labels", hard_weight=0.0),
                "random": triple("random initialisation", initialise=False),
            },
        ),
        "tinybert": Experiment(
            "tinybert",
            "language",
            f"{TEXT}; half of the steps for the intermediate stage where there is one",
            300,
            {
                "uniform": tiny("two stages, layers 2, 4", layer_map=(2, 4)),
                "prediction": tiny("prediction only", intermediate=False),
                "top": tiny("layers 3, 4", layer_map=(3, 4)),
                "bottom": tiny("layers 1, 2", layer_map=(1, 2)),
            },
        ),
    }


def _many() -> dict[str, Experiment]:
    weights = over(lr=RATES, soft_weight=(1.0, 4.0))
    temperatures = over(lr=RATES, temperature=(4.0, 1.0))

    def ensemble(says: str, teachers: int, data: str) -> Arm:
        hard = 0.5 if data == "labelled" else 0.0
        options = {"recipe": "ensemble", "teachers": teachers, "data": data, "hard_weight": hard}
        return Arm(says, {**options, "amount": 100 if data == "labelled" else 1000}, temperatures)

    def transfer(says: str, data: str, rows: int, hard: float) -> Arm:
        options = {"recipe": "hinton", "teacher": "half", "data": data, "amount": rows, "hard_weight": hard}
        return Arm(says, options, temperatures)

    def labels(says: str, data: str, rows: int, **options: Any) -> Arm:
        return Arm(says, {"recipe": "labels", "data": data, "amount": rows, **options}, HARD)

    return {
        "multilabel": Experiment(
            "multilabel",
            "multilabel",
            "one to three digits laid over each other, which ones are there; 200 labelled for the student "
            "64-30-30-10, 4,000 for the teacher 64-256-256-10; T = 2",
            400,
            {
                "hard": Arm("labels", {"recipe": "labels"}, HARD),
                "binary": Arm("binary KL of each label", {"recipe": "binary"}, weights),
                "softmax": Arm("softmax KL", {"recipe": "softmax"}, weights),
            },
            tuned_on="micro_f1",
            shown="micro_f1",
        ),
        "ensemble": Experiment(
            "ensemble",
            "classify",
            "100 labelled digits for teachers 64-64-64-10, and those or 1,000 without labels for the student "
            "64-30-30-10",
            400,
            {
                "hard": labels("labels", "labelled", 100),
                "single_labelled": ensemble("one teacher, labelled", 1, "labelled"),
                "five_labelled": ensemble("five teachers, labelled", 5, "labelled"),
                "single_unlabelled": ensemble("one teacher, unlabelled", 1, "unlabelled"),
                "five_unlabelled": ensemble("five teachers, unlabelled", 5, "unlabelled"),
            },
        ),
        "transfer": Experiment(
            "transfer sets",
            "classify",
            "teacher 64-256-256-10 of 500 digits; the student gets 50 of those, or 50 or 500 that the "
            "teacher never saw",
            400,
            {
                "hard": labels("50 labels", "held-out", 50),
                "original": transfer("50 of the teacher's, labelled", "labelled", 50, 0.5),
                "held_out": transfer("50 new, labelled", "held-out", 50, 0.5),
                "unlabelled_50": transfer("50 new, unlabelled", "held-out unlabelled", 50, 0.0),
                "unlabelled": transfer("500 new, unlabelled", "held-out unlabelled", 500, 0.0),
                "argmax": labels("500 new, the teacher's argmax", "argmax", 500, teacher="half"),
            },
        ),
    }


EXPERIMENTS: dict[str, Experiment] = {
    **_hinton(), **_agreement(), **_dkd(), **_noise(), **_features(), **_text(), **_many(),
}  # fmt: skip

CLAIMS: dict[str, Claim] = {
    "hinton.soft": Claim(
        "Soft targets at T = 20 beat labels.", "hinton", "t20", "hard",
        paper="MNIST, 2×800: 146 → 74 errors of 10,000",
    ),
    "hinton.hot": Claim("T = 4 beats T = 1.", "hinton", "t4", "t1"),
    "hinton.small_net": Claim(
        "A net of 30 units wants a moderate temperature: T = 4 beats T = 20.", "hinton", "t4", "t20",
        paper="MNIST, 2×30: T of 2.5 to 4 is best",
    ),
    "hinton.dark": Claim(
        "What the teacher says of wrong classes helps, more than the same numbers on shuffled wrong classes.",
        "hinton", "t4", "shuffled",
    ),
    "hinton.few": Claim(
        "Soft targets make up for few data.", "hinton-few", "soft", "hard",
        paper="speech, 3 % of the data: 44.5 → 57.0 %",
    ),
    "hinton.mythical": Claim(
        "A student that never saw a three knows threes, once its bias is set; labels and a bias don't do it.",
        "mythical", "soft", "hard", "biased_recall_3",
        paper="MNIST: 996 of 1,010 threes right",
    ),
    "hinton.bias": Claim(
        "The missing class's bias is what is wrong with that student.", "mythical", "soft", "soft",
        "biased_accuracy", "accuracy", paper="MNIST: 206 → 109 errors (bias picked on the test set)",
    ),
    "agreement.logit_mse": Claim("Squared error of logits beats labels.", "agreement", "logit_mse", "hard"),
    "agreement.forward_kl": Claim("KL(p‖q) beats labels.", "agreement", "forward_kl", "hard"),
    "agreement.reverse_kl": Claim("KL(q‖p) beats labels.", "agreement", "reverse_kl", "hard"),
    "agreement.jsd": Claim("The Jensen-Shannon divergence beats labels.", "agreement", "jsd", "hard"),
    "agreement.tvd": Claim("The total variation distance beats labels.", "agreement", "tvd", "hard"),
    "agreement.kl_or_mse": Claim(
        "A moderate temperature beats its limit: KL(p‖q) at T = 4 beats squared error of logits.",
        "agreement", "forward_kl", "logit_mse",
    ),
    "dkd.decoupled": Claim(
        "TCKD and β · NCKD beat KL.", "dkd", "dkd", "kl", paper="CIFAR-100, ResNet-56 → 20: 70.66 → 71.97 %"
    ),
    "dkd.nckd": Claim("The knowledge is in NCKD: alone it beats TCKD alone.", "dkd", "nckd", "tckd"),
    "dkd.tckd": Claim("TCKD alone is not enough: KL beats it.", "dkd", "kl", "tckd"),
    "noise.teacher": Claim(
        "A noisy teacher beats a clean one.", "noise", "teacher", "clean",
        paper="CIFAR-10, a public repetition: 71.97 → 70.63 %",
    ),
    "noise.student": Claim("A noisy teacher beats a noisy student.", "noise", "teacher", "student"),
    "noise.variance": Claim(
        "Noise of the teacher raises the gradient's variance.",
        "noise-gradients", "teacher", "clean", "variance",
        paper="exact: E[gradient] = z − v, its variance grows",
    ),
    "noise.mean": Claim(
        "It leaves the gradient's mean, which noise of the student moves.",
        "noise-gradients", "student", "teacher", "bias", paper="exact: noise of the student adds σ²z",
    ),
    "fitnets.hint": Claim("A hint first beats KD for as many steps.", "fitnets", "hint", "kd"),
    "fitnets.trained": Claim(
        "It is what the teacher learnt that helps: its hint beats an untrained teacher's.",
        "fitnets", "hint", "untrained",
    ),
    "fitnets.joint": Claim("A hint beside KD beats KD.", "fitnets", "joint", "kd"),
    "attention.maps": Claim("The teacher's attention maps beat labels alone.", "attention", "maps", "hard"),
    "attention.trained": Claim(
        "It is what the teacher learnt that helps: its maps beat an untrained teacher's.",
        "attention", "maps", "untrained",
    ),
    "distilbert.soft": Claim(
        "The triple loss needs soft targets.", "distilbert", "triple", "no_soft", paper="GLUE: 2.96 points"
    ),
    "distilbert.cosine": Claim(
        "The triple loss needs the cosine.", "distilbert", "triple", "no_cosine", paper="GLUE: 1.46 points"
    ),
    "distilbert.hard": Claim(
        "The triple loss needs masked labels.", "distilbert", "triple", "no_hard", paper="GLUE: 0.31 points"
    ),
    "distilbert.initialise": Claim(
        "A student begins better as layers of the teacher.", "distilbert", "triple", "random",
        paper="GLUE: 3.69 points",
    ),
    "tinybert.intermediate": Claim(
        "An intermediate stage beats prediction alone, for as many steps.",
        "tinybert", "uniform", "prediction",
        paper="GLUE: 56.3 without the Transformer losses, 75.6 with",
    ),
    "tinybert.top": Claim(
        "Evenly spaced layers beat the top ones.", "tinybert", "uniform", "top", paper="GLUE: 75.6, 70.9"
    ),
    "tinybert.bottom": Claim(
        "Evenly spaced layers beat the bottom ones.", "tinybert", "uniform", "bottom",
        paper="GLUE: 75.6, 71.3",
    ),
    "multilabel.soft": Claim(
        "Soft targets of each label beat labels (micro-F1).", "multilabel", "binary", "hard", "micro_f1"
    ),
    "multilabel.binary_f1": Claim(
        "A sigmoid for each label beats a softmax over labels (micro-F1).",
        "multilabel", "binary", "softmax", "micro_f1",
    ),
    "multilabel.binary_map": Claim(
        "A sigmoid for each label beats a softmax over labels (mAP).",
        "multilabel", "binary", "softmax", "map",
    ),
    "ensemble.labelled": Claim(
        "An ensemble teaches better than one of it, on the data it learnt.",
        "ensemble", "five_labelled", "single_labelled",
    ),
    "ensemble.unlabelled": Claim(
        "An ensemble teaches better than one of it, on new data without labels.",
        "ensemble", "five_unlabelled", "single_unlabelled",
    ),
    "ensemble.labels": Claim(
        "An ensemble of 100 labels and 1,000 digits without beat the 100 labels.",
        "ensemble", "five_unlabelled", "hard",
    ),
    "transfer.held_out": Claim(
        "Data that the teacher never saw teach better than as many of its own.",
        "transfer", "held_out", "original",
    ),
    "transfer.unlabelled": Claim(
        "500 digits without labels and a teacher beat 50 labels.", "transfer", "unlabelled", "hard"
    ),
    "transfer.soft": Claim(
        "On unlabelled data, soft targets beat the teacher's argmax.", "transfer", "unlabelled", "argmax"
    ),
    "transfer.labels": Claim(
        "Beside soft targets, labels help.", "transfer", "held_out", "unlabelled_50"
    ),
}  # fmt: skip

# The second plan.
for _more in (
    strategies_derivatives, strategies_several, strategies_specialists, strategies_adversarial
):  # fmt: skip
    EXPERIMENTS |= _more.EXPERIMENTS
    CLAIMS |= _more.CLAIMS


def document() -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "version": VERSION,
        "test_seeds": TEST_SEEDS,
        "tuning_seeds": TUNING_SEEDS,
        "quick": {"seeds": QUICK_SEEDS, "share": QUICK_SHARE},
        "experiments": {name: asdict(e) for name, e in EXPERIMENTS.items()},
        "claims": {name: asdict(c) for name, c in CLAIMS.items()},
    }


def fingerprint(experiment: str, options: Options, steps: int) -> str:
    """What a fit depends on, so that one of another plan is not taken for it."""
    what = [VERSION, experiment, EXPERIMENTS[experiment].fit, dict(options), steps]
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def budget(experiment: Experiment) -> int:
    """Configurations of every arm.

    Raises:
        ValueError: One arm has more than another.
    """
    sizes = {name: len(arm.grid) for name, arm in experiment.arms.items()}
    if len({*sizes.values()}) != 1:
        raise ValueError(f"every arm must have as many configurations, got {sizes}")
    return next(iter(sizes.values()))
