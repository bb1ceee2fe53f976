"""Files that are there whole or not at all, and trees of values in them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kdkernels.files import replacing, restore, write_csv


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "it.txt"
    with replacing(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half of tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    with replacing(path) as part:
        part.write_text("two")
    assert path.read_text() == "two" and names(path.parent) == ["it.txt"]


@pytest.mark.parametrize("fails", [None, 1, 2])
def test_a_folder_is_there_whatever_fails(
    fails: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames, too, what was there is found again, by `restore` or by the next writing."""
    path, rename, calls = tmp_path / "it", os.replace, []

    def replace(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == fails:
            raise KeyboardInterrupt
        rename(a, b)

    def write(text: str) -> None:
        with replacing(path) as part:
            part.mkdir()
            (part / "text").write_text(text)

    write("one")
    monkeypatch.setattr(os, "replace", replace)
    if fails is None:
        write("two")
        assert (path / "text").read_text() == "two" and names(tmp_path) == ["it"]
        return
    with pytest.raises(KeyboardInterrupt):
        write("two")
    assert path.exists() == (fails == 1)
    restore(path)
    assert (path / "text").read_text() == "one"
    write("three")
    assert (path / "text").read_text() == "three" and names(tmp_path) == ["it"]


def test_a_table_has_a_column_for_every_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "it.csv", [{"a": 1, "b": "x,y"}, {"c": 0.5}])
    with (tmp_path / "it.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert rows == [{"a": "1", "b": "x,y", "c": ""}, {"a": "", "b": "", "c": "0.5"}]


def test_a_tree_comes_back(tmp_path: Path) -> None:
    np, storage = pytest.importorskip("numpy"), storage_module()
    x = torch.arange(12.0).view(3, 4)
    tree = {
        "plain": [None, True, 2, 0.1, "é", -float("inf")], 3: (x, [x]), "view": x[:, 1:3], "turned": x.T,
        "empty": torch.zeros(0, 2), "bf16": torch.ones(2, dtype=torch.bfloat16), "number": np.float32(0.5),
        "array": np.arange(4, dtype=np.uint32).reshape(2, 2), ("dict", 1): {},
    }  # fmt: skip
    storage.save(tmp_path / "it", tree)
    got = storage.load(tmp_path / "it")
    assert [*got] == [*tree]
    assert got["plain"] == tree["plain"] and got["number"] == 0.5 and got["dict", 1] == {}
    assert got[3][0] is got[3][1][0]  # stored once
    for name in ("view", "turned", "empty", "bf16"):
        assert got[name].dtype == tree[name].dtype and torch.equal(got[name], tree[name])
    assert got["array"].dtype == np.uint32 and (got["array"] == tree["array"]).all()


def storage_module() -> Any:
    pytest.importorskip("safetensors")
    from kdkernels import storage

    return storage


def test_what_a_tree_cannot_hold(tmp_path: Path) -> None:
    storage = storage_module()
    with pytest.raises(TypeError, match=r"a\.1 is a set, which can't be saved: dicts, lists"):
        storage.save(tmp_path / "it", {"a": [1, {2}]})
    assert not (tmp_path / "it").exists()
    with pytest.raises(FileNotFoundError, match=r"state\.json is missing"):
        storage.load(tmp_path / "it")


def test_what_was_not_saved_by_this_is_an_error(tmp_path: Path) -> None:
    storage = storage_module()
    storage.save(tmp_path / "it", {"a": torch.ones(2)})
    state = tmp_path / "it" / "state.json"
    good = json.loads(state.read_text())
    for document in (
        {**good, "version": 99}, {**good, "tree": {"dict": [["a", {"tensor": "b"}]]}}, {"tree": 1}, [],
        {**good, "tree": {"array": ["O", [1], "a"]}}, {**good, "tree": {"object": "os.system"}},
    ):  # fmt: skip
        state.write_text(json.dumps(document))
        with pytest.raises(ValueError, match="can't be read"):
            storage.load(tmp_path / "it")
    state.write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="can't be read"):
        storage.load(tmp_path / "it")


def test_numbered_folders_are_in_order(tmp_path: Path) -> None:
    storage = storage_module()
    for number in (2, 10, 9):
        storage.save(tmp_path / f"at-{number}", {})
    (tmp_path / "at-9").rename(tmp_path / "at-9.old")
    (tmp_path / "at-99").mkdir()
    (tmp_path / "at-x").mkdir()
    assert [path.name for path in storage.numbered(tmp_path, "at-")] == ["at-2", "at-9", "at-10"]
