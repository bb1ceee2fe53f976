"""What a run has in its folder beside checkpoints: its options, and what its data and models were."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import storage
from ..bench import write_json
from ..files import replacing
from .config import Config, ConfigError, config_of, read

FIT, STUDENT = "fit", "student"
_OPTIONS, _STATE = "config.yaml", "run.json"


@dataclass
class State:
    """Of a run that was begun.

    Attributes:
        origins: By option, hashes of what it named: files may change, and their names stay.
        processes: How many it has.
        before: Held-out figures of the student as it began.
        seconds: Of training, in all calls together.
    """

    origins: dict[str, str]
    processes: int
    before: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def check_options(config: Config) -> bool:
    """Whether a run is in the folder.

    Raises:
        ConfigError: It is of other options, or the folder has something else.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError("out", f"must be a folder, and {out} is a file")
    if not (out / _OPTIONS).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError("out", f"must be a folder of a run, or a new one, and {out} has other files")
        return False
    try:
        before = config_of(read(out / _OPTIONS))
    except ConfigError as error:
        raise ConfigError("out", f"{out / _OPTIONS} is of another release, or changed: {error}") from error
    for name in config.differences(before):
        if name != "out":
            raise ConfigError(
                name, f"is {getattr(before, name)!r} of the run in {out}, got {getattr(config, name)!r}: go "
                "on with the same, or give another out",
            )  # fmt: skip
    return (out / _STATE).is_file()


def found(config: Config, now: State) -> State:
    """The state of the run in the folder, which goes on with the same data, models and processes.

    Raises:
        ConfigError: They are others.
    """
    out = Path(config.out)
    try:
        state = State(**json.loads((out / _STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError("out", f"{out / _STATE} can't be read: {error}") from error
    for key in {**state.origins, **now.origins}:
        if state.origins.get(key) != now.origins.get(key):
            raise ConfigError(
                key, f"is named as in the run in {out}, and what is there has changed since; give another out"
            )
    if state.processes != now.processes:
        raise ConfigError(
            "out", f"{out} is of a run of {state.processes} processes, and these are {now.processes}: go on "
            "with as many, or give another out",
        )  # fmt: skip
    return state


def write(config: Config, state: State) -> None:
    """Both files, each whole or not at all."""
    out = Path(config.out)
    with replacing(out / _OPTIONS) as part:
        part.write_text(config.to_yaml(), encoding="utf-8")
    write_json(out / _STATE, asdict(state))


def kept(out: Path) -> str | None:
    """The newest checkpoint of the last stage that has one, in words."""
    stages: list[Any] = sorted((out / FIT).iterdir()) if (out / FIT).is_dir() else []
    there = [path for stage in stages for path in storage.numbered(stage, "step-")[-1:]]
    return f"step {int(there[-1].name[5:])} of {there[-1].parent.name}" if there else None
