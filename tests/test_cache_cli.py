"""`kdkernels cache`: a tiny teacher in a folder, built, looked at, verified; and what servers return."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("safetensors")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdkernels import Head, Sampled, TopK, cache_cli, cli
from kdkernels.cache import CacheError, Manifest, TeacherCache, build, folder, servers, texts
from kdkernels.cache.rows import stride
from kdkernels.models.tokenizers import vocabulary_hash

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(60))]
V = len(WORDS)


def run(*arguments: Any) -> Any:
    """What a call ends with: None, a status, or the line that Python prints before status 1."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", *map(str, arguments)])
    return stopped.value.code or None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "tiny"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def texts_of(count: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(count):
        words = torch.randint(60, (3 + 5 * n % 17,), generator=generator)
        found.append(" ".join(f"w{w}" for w in words.tolist()))
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*texts_of(), "", "   ", texts_of()[0]]) + "\n", encoding="utf-8")
    return path


def loaded(teacher: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(teacher).eval()


@torch.no_grad()
def test_a_cache_is_built_gone_on_with_and_verified(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    command = ("build", "--teacher", teacher, "--data", data, "--out", out, "--temperature", 1,
               "--temperature", 2, "--k", 16, "--batch-tokens", 40)  # fmt: skip
    assert run(*command) is None
    said = capsys.readouterr().out
    assert re.search(r"tiny on cpu in float32: 16 of 64 classes, \d+ bytes a token", said)
    assert re.search(r"added 12 sequences of \d+ tokens; 1 were there already", said)
    assert "2 of 15 lines had no text" in said
    assert re.search(r"building \(kB\): 1/1 in", said)
    cache = TeacherCache.open(out)
    manifest = cache.manifest
    assert (manifest.teacher, manifest.vocab_size, manifest.k, manifest.temperatures, manifest.dtype) == (
        "tiny", V, 16, (1.0, 2.0), "float32"
    )  # fmt: skip
    assert manifest.tokenizer == vocabulary_hash(folder.tokenizer_of(teacher))
    model = loaded(teacher)
    for text in texts_of():
        ids = torch.tensor([WORDS.index(word) for word in text.split()])
        stored = cache.lookup(ids)
        assert isinstance(stored, TopK) and stored.lse is not None
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        assert torch.equal(stored.ids, log_p.topk(16).indices.sort(-1).values)
        torch.testing.assert_close(stored.log_probs, log_p.gather(-1, stored.ids), atol=2e-2, rtol=1e-2)

    shards = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    with data.open("a", encoding="utf-8") as file:
        file.write("w1 w2 w3\n")
    assert run(*command) is None
    assert "added 1 sequences of 3 tokens; 13 were there already" in capsys.readouterr().out
    assert all((out / name).read_bytes() == octets for name, octets in shards.items())
    assert "k is 16, and 8 is expected" in run(*command[:-4], "--k", 8)

    assert run("info", out) is None
    said = capsys.readouterr().out
    for line in (r"temperatures +1, 2", r"sequences +13", r"kept +topk, 16 of 64", r"median +0\.\d+"):
        assert re.search(line, said), line
    assert run("verify", out, "--teacher", teacher) is None
    said = capsys.readouterr().out
    assert "every checksum agrees: 13 sequences" in said and re.search(
        r"of the stored mass, within 0.002: what storing", said
    )
    assert "the same classes in 100.0 %" in said and "at T = 2: mean" in said
    assert run("verify", out, "--teacher", teacher, "--bound", 1e-9) == 1
    assert "of the stored mass, beyond 1e-09: given by --bound" in capsys.readouterr().out

    (shard,) = (path for path in out.glob("*.safetensors") if path.name in shards)
    octets = bytearray(shards[shard.name])
    octets[-40] ^= 1
    shard.write_bytes(octets)
    assert re.search(r"kdkernels cache verify: .*damaged", run("verify", out))


def test_another_checkpoint_is_told(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "cache", tmp_path / "tiny"
    assert run("build", "--teacher", teacher, "--data", data, "--out", out) is None
    shutil.copytree(teacher, other)
    model = loaded(teacher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(other)
    assert run("verify", out, "--teacher", other) == 1
    said = capsys.readouterr().out
    assert "another checkpoint" in said and "of the stored mass, beyond 0.002" in said
    assert "revision is" in run("build", "--teacher", other, "--data", data, "--out", out)


def test_draws(teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    command = ("build", "--teacher", teacher, "--data", data, "--out", out, "--kind", "sampled")
    assert "--kind sampled needs --draws" in run(*command)
    assert run(*command, "--draws", 50, "--temperature", 2) is None
    cache = TeacherCache.open(out)
    assert cache.manifest.temperatures == (2.0,) and cache.manifest.k == 50
    assert all(isinstance(stored, Sampled) for _, stored in cache.sequences())
    capsys.readouterr()
    assert run("verify", out, "--teacher", teacher) is None
    assert re.search(r"is [+-][0-5]\.\d standard deviations", capsys.readouterr().out)
    assert "--temperature: temperatures of a cache" in run(
        *command, "--draws", 50, "--temperature", 2, "--temperature", 1
    )


def test_what_texts_are_made_of(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields, windows, the end token, templates and ids."""
    lines = [
        {"text": " ".join(["w5"] * 9), "chat": [{"role": "w7", "content": "w8 w9"}], "ids": [9, 9, 9]},
        {"text": "w6", "chat": [], "ids": []},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def built(name: str, *more: Any) -> list[list[int]]:
        assert (
            run("build", "--teacher", teacher, "--data", data, "--out", tmp_path / name, "--k", 4, *more)
            is None
        )
        return sorted(ids.tolist() for ids, _ in TeacherCache.open(tmp_path / name).sequences())

    five, six, end = 4 + 5, 4 + 6, 2
    assert built("text", "--max-length", 4) == [[five], [five] * 4, [six]]
    assert "1 texts were longer than 4 tokens, and were cut into windows" in capsys.readouterr().out
    assert built("eos", "--eos") == [[five] * 9 + [end], [six, end]]
    assert built("ids", "--ids-field", "ids") == [[9, 9, 9]]
    assert built("chat", "--messages-field", "chat") == [[11, 12, 13, end]]
    assert (TeacherCache.open(tmp_path / "chat").manifest.chat_template or "").startswith("sha256:")
    assert "give one of --text-field, --ids-field" in run(
        "build", "--teacher", teacher, "--data", data, "--out", tmp_path / "x", "--text-field", "text",
        "--ids-field", "ids",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "more", "said"),
    [
        ("{", (), r"--data .*data.jsonl, line 2 is no JSON"),
        ("[1]", (), "line 2 must be an object"),
        ('{"body": "w1"}', (), "line 2 has no field 'text', it has 'body': name it with --text-field"),
        ('{"text": 5}', (), "line 2: its text must be a string, got int"),
        ('{"text": "w1", "chat": "w1"}', ("--messages-field", "text"), "must be a list of messages"),
        ('{"text": [1, "a"]}', ("--ids-field", "text"), "must be a list of whole numbers"),
        ('{"text": "w1"}', ("--max-length", 65), "--max-length must be at most the teacher's 64 positions"),
        ('{"text": "w1"}', ("--max-length", 0), "--max-length must be > 0, got 0"),
        ('{"text": "w1"}', ("--shard-mb", -1), "--shard-mb must be > 0"),
        ('{"text": "w1"}', ("--k", 99), "--k: k of a cache's manifest must be"),
        ('{"text": "w1"}', ("--temperature", 0), "--temperature: temperatures of a cache"),
        ('{"text": "w1"}', ("--kind", "all"), "--kind: kind of a cache"),
        ('{"text": "w1"}', ("--part", "a/b"), "--part: part must be letters"),
        ('{"text": "w1"}', ("--dtype", "int8"), "--dtype must be one of auto, bfloat16"),
        ('{"text": "w1"}', ("--device", "nowhere"), "--device nowhere can't be used"),
    ],
)
def test_what_cannot_be_built_is_said(
    line: str, more: tuple[Any, ...], said: str, teacher: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    first = '{"text": [1]}' if "--ids-field" in more else '{"text": []}'
    data.write_text((first if "field" in str(more) else '{"text": "w1"}') + "\n" + line + "\n")
    got = run("build", "--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *more)
    assert re.search(rf"^kdkernels cache build: .*{said}", got), got
    assert "\n" not in got


def test_folders_that_would_run_code_are_refused(teacher: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    command = ("build", "--teacher", bad, "--data", data, "--out", tmp_path / "cache")
    assert "has no config.json; models are not downloaded" in run(*command)
    shutil.copytree(teacher, bad)
    (bad / "model.safetensors").rename(bad / "pytorch_model.bin")
    assert re.search(r"no \*\.safetensors: .* are pickles, which run code", run(*command))
    (bad / "pytorch_model.bin").rename(bad / "model.safetensors")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    assert "asks in its config.json for the code of 'someone/kernel'" in run(*command)
    (bad / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {
        **config,
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (bad / "config.json").write_text(json.dumps(own))
    assert "can't be loaded" in run(*command) and not (tmp_path / "ran").exists()
    for name in ("nothing.txt", "data.csv"):
        assert "--data" in run(
            "build", "--teacher", teacher, "--data", tmp_path / name, "--out", tmp_path / "c"
        )
    assert "is not a teacher cache" in run("info", tmp_path)


def test_an_interrupted_build_keeps_what_was_done(
    teacher: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C after some batches: their rows are there, whole, and the same command adds the rest."""
    out, real, calls = tmp_path / "cache", build.answers, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    command = ("build", "--teacher", teacher, "--data", data, "--out", out, "--batch-tokens", 20)
    with monkeypatch.context() as patch:
        patch.setattr(build, "answers", interrupted)
        assert run(*command) == 130
    assert "interrupted; what was done is kept" in capsys.readouterr().err
    some = TeacherCache.open(out)
    assert 0 < len(some) < 12 and some.verify().sequences == len(some)
    assert run(*command) is None
    assert len(TeacherCache.open(out)) == 12


def test_logits_are_made_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head; what is kept, and drawn, is what it is of the logits that it stands for."""
    generator = torch.Generator().manual_seed(0)
    head = Head(
        torch.randn(50, 8, generator=generator), torch.randn(300, 8, generator=generator), softcap=5.0
    )
    made: list[int] = []
    whole, logits = Head.logits, head.logits()

    def counted(self: Head) -> Any:
        made.append(len(self.hidden))
        return whole(self)

    monkeypatch.setattr(Head, "logits", counted)
    monkeypatch.setattr("kdkernels.cache.intake._CHUNK", 300 * 4)
    monkeypatch.setattr("kdkernels.cache.intake._CHUNK_OF_HEAD", 300 * 10)
    for more in ({"temperatures": (1, 2)}, {"kind": "sampled", "draws": 20}):
        found = []
        for name, source in (("head", head), ("logits", logits)):
            path = tmp_path / f"{name} of {len(more)}"
            manifest = Manifest("t", vocab_size=300, k=20, **more)  # type: ignore[arg-type]
            with TeacherCache.create(path, manifest) as writer:
                writer.append_logits(list(range(50)), source)
                with pytest.raises(CacheError, match=r"must make logits \[S, V\] = \(3, 300\), and makes"):
                    writer.append_logits([7, 7, 7], head)
            found.append(TeacherCache.open(path).lookup(list(range(50))))
        assert torch.equal(found[0].ids, found[1].ids)
    assert made and max(made) == 8


def test_batches_have_similar_lengths() -> None:
    group = [[0] * n for n in (3, 9, 1, 8, 2, 30)]
    found = list(build.batches(group, 20))
    assert [[len(x) for x in batch] for batch in found] == [[30], [9, 8], [3, 2, 1]]
    count = texts.Count()
    assert list(texts.windows([], "text", texts.by_ids, 4, count)) == []


# What servers return.


def log_probs(tokens: list[int], model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def entry(row: torch.Tensor, k: int, token: int) -> dict[int, float]:
    """As servers list them: the token that is there, and the k most probable."""
    values, ids = row.topk(k)
    return {token: float(row[token]), **dict(zip(ids.tolist(), values.tolist(), strict=True))}


K = 5
PROMPT, ANSWER = [1, 20, 31, 42], [13, 60, 7]


def responses(model: Any) -> dict[str, dict[str, Any]]:
    """Of one prompt and one answer, in every form."""
    tokens = PROMPT + ANSWER
    row = log_probs(tokens, model)
    each = [entry(row[n - 1], K, tokens[n]) for n in range(1, len(tokens))]
    named = [{str(i): {"logprob": x, "rank": 1, "decoded_token": "?"} for i, x in e.items()} for e in each]
    prompt, answer = [None, *named[: len(PROMPT) - 1]], each[len(PROMPT) - 1 :]
    content = [
        {
            "token": f"token_id:{token}", "logprob": e[token], "bytes": None,
            "top_logprobs": [{"token": f"token_id:{i}", "logprob": x, "bytes": None} for i, x in e.items()],
        }
        for token, e in zip(ANSWER, answer, strict=True)
    ]  # fmt: skip
    strings = [{f"token_id:{i}": x for i, x in e.items()} for e in each]
    triples = [[[x, i, None] for i, x in e.items()] for e in each]
    first = len(PROMPT) - 1
    return {
        "plain": {"token_ids": tokens, "top_logprobs": [[[i, x] for i, x in e.items()] for e in each]},
        "chat": {
            "prompt_logprobs": prompt, "prompt_token_ids": [*PROMPT],
            "choices": [{"token_ids": ANSWER, "prompt_logprobs": None, "logprobs": {"content": content}}],
        },
        "completion": {
            "choices": [
                {
                    "prompt_token_ids": [*PROMPT], "prompt_logprobs": prompt, "token_ids": ANSWER,
                    "logprobs": {"tokens": ["?"] * 3, "top_logprobs": strings[first:]},
                }
            ]
        },
        "echo": {
            "choices": [
                {"logprobs": {
                    "tokens": [f"token_id:{t}" for t in tokens], "top_logprobs": [None, *strings],
                }}
            ]
        },
        "script": {
            "prompt_token_ids": [*PROMPT], "prompt_logprobs": prompt,
            "outputs": [{"token_ids": ANSWER, "logprobs": named[first:]}],
        },
        "sglang": {
            "meta_info": {
                "prompt_tokens": len(PROMPT),
                "input_token_logprobs": [[None, PROMPT[0], None], *([-1.0, t, None] for t in PROMPT[1:])],
                "input_top_logprobs": [None, *triples[:first]],
                "output_token_logprobs": [[-1.0, t, None] for t in ANSWER],
                "output_top_logprobs": triples[first:],
            }
        },
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "chat", "completion", "echo", "script", "sglang"])
def test_rows_are_those_after_their_tokens(
    form: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the model itself: entry i of a server is row i − 1, and the last token has none."""
    model = loaded(teacher)
    file, out = tmp_path / "responses.jsonl", tmp_path / "cache"
    file.write_text(json.dumps(responses(model)[form]) + "\n\n")
    command = ("import", file, "--out", out, "--vocab-size", V, "--k", K, "--tokenizer", teacher)
    assert run(*command) is None
    said = capsys.readouterr().out
    assert "added 1 sequences of 7 tokens" in said and re.search(
        r"of 7 rows [1-6] had more than 5 classes", said
    )
    cache = TeacherCache.open(out)
    tokens = PROMPT + ANSWER
    stored, row = cache.lookup(tokens), log_probs(tokens, model)
    assert isinstance(stored, TopK)
    assert torch.equal(stored.ids[:-1], row[:-1].topk(K).indices.sort(-1).values)
    torch.testing.assert_close(
        stored.log_probs[:-1].double(), row[:-1].gather(-1, stored.ids[:-1]), atol=0.02, rtol=0
    )
    assert (stored.ids[-1] == -1).all()
    assert cache.manifest.tokenizer == vocabulary_hash(folder.tokenizer_of(teacher))
    assert run("verify", out, "--teacher", teacher) is None
    assert run(*command) is None
    assert "added 0 sequences of 0 tokens; 1 were there already" in capsys.readouterr().out


def test_rows_that_are_not_known(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of prompts that a server said nothing of: refused, or rows that teach nothing."""
    from kdkernels import kd_loss

    record = responses(loaded(teacher))["chat"]
    del record["prompt_logprobs"]
    file, out = tmp_path / "responses.jsonl", tmp_path / "cache"
    file.write_text(json.dumps(record))
    command = ("import", file, "--out", out, "--vocab-size", V, "--k", K)
    assert re.search(r"line 1: nothing is said of what comes after token 0.*--allow-gaps", run(*command))
    assert run(*command, "--allow-gaps") is None
    assert "3 rows before the last of their sequence are not known" in capsys.readouterr().out
    stored = TeacherCache.open(out).lookup(PROMPT + ANSWER)
    z = torch.randn(7, V, requires_grad=True)
    losses = kd_loss(z, stored, reduction="none")
    assert ((losses > 1e-4) == torch.tensor([0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)).all()
    (gradient,) = torch.autograd.grad(losses[:3].sum() + losses[-1], z)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_logprobs": [[[3, -1.0]]]}, "must have an entry for each of 3 token_ids"),
        (
            {"top_logprobs": [[[3, 0.7]], None, None]},
            "must hold log-probabilities, numbers <= 0, got 0.7 for 3",
        ),
        ({"top_logprobs": [[["w3", -1.0]], None]}, "must name classes by whole numbers"),
        ({"top_logprobs": [{"w3": -1.0}, None]}, "whose id can't be known: ask the server for ids"),
        ({"top_logprobs": [[[3, -0.1], [4, -0.1]]] * 2}, "summed over the classes"),
        ({"top_logprobs": [[[99, -1.0]]] * 2}, r"which must be from 0 to 63, .*--vocab-size 64"),
        ({"token_ids": [5, 99, 7]}, r"token_ids must be from 0 to 63, .*--vocab-size 64"),
        ({"token_ids": "w5 w6"}, "token_ids must be a list of whole numbers"),
        ({"top_logprobs": [[3, -1.0]] * 2}, r"must hold pairs \[id, logprob\]"),
    ],
)
def test_responses_that_are_none_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"token_ids": [5, 6, 7], "top_logprobs": [[[3, -1.0]], [[4, -2.0], [9, -1.0]]]}
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "token_ids": [1, 2, 3], **change}))
    got = run("import", file, "--out", tmp_path / "cache", "--vocab-size", V, "--k", 4)
    assert re.search(f"responses.jsonl, line 2: .*{said}", got), got
    # What came before is there.
    assert len(TeacherCache.open(tmp_path / "cache")) == 1


def test_servers_forms_that_lack_something(teacher: Path) -> None:
    model = loaded(teacher)

    def refused(form: str, change: Any, said: str) -> None:
        record = responses(model)[form]
        change(record)
        with pytest.raises(CacheError, match=said):
            list(servers.sequences_of(record, "here"))

    refused("chat", lambda r: r.pop("prompt_token_ids"), "no prompt_token_ids.*return_token_ids=true")
    refused(
        "chat", lambda r: r["prompt_token_ids"].append(3), "an entry for each of 5 prompt_token_ids, got 4"
    )
    refused("chat", lambda r: r.update(prompt_token_ids=[1, 31, 42, 20]), "does not list the token that is")
    words = [{"token": "a", "top_logprobs": [{"token": "12", "logprob": -1.0}]}] * 3
    refused("chat", lambda r: r["choices"][0].update(logprobs={"content": words}), "names a token '12'")
    refused("completion", lambda r: r["choices"][0].pop("token_ids"), "3 tokens without their ids")
    refused("sglang", lambda r: r["meta_info"].update(prompt_tokens=9), "logprob_start_len=0")
    refused(
        "script", lambda r: [r.pop("prompt_logprobs"), r["outputs"][0].pop("logprobs")], "pass the server"
    )
    with pytest.raises(CacheError, match=r"none of 'top_logprobs'.*but 'text'"):
        list(servers.sequences_of({"text": "w1"}, "here"))
    lowest = servers.sequences_of({"token_ids": [1], "top_logprobs": [[[3, -9999.0]]]}, "here")
    assert next(lowest)[1] == [[(3, -math.inf)]]


def test_damaged_responses_are_read_or_refused(teacher: Path) -> None:
    """A value anywhere in them replaced by another: never an error of another kind."""
    import copy
    import random

    made, draw, refused = responses(loaded(teacher)), random.Random(0), 0
    junk: list[Any] = [
        None,
        5,
        "x",
        "token_id:9",
        [],
        {},
        [[]],
        {"a": 1},
        -1.0,
        True,
        math.nan,
        1e400,
        1 << 70,
    ]
    for form in made:
        for _ in range(300):
            record: Any = copy.deepcopy(made[form])
            place, depth = record, draw.randrange(6)
            while place:
                key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
                if depth == 0 or not isinstance(place[key], (dict, list)) or not place[key]:
                    place[key] = draw.choice(junk)
                    break
                place, depth = place[key], depth - 1
            try:
                for ids, rows in servers.sequences_of(record, "here"):
                    stored = servers.stored(rows, K, True, servers.Tally(), "here")
                    assert len(ids) == len(rows) == len(stored.ids)
            except CacheError:
                refused += 1
    assert 600 < refused < 1800


def test_log_probs_at_another_temperature_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text("{}")
    got = run("import", file, "--out", tmp_path / "c", "--vocab-size", 9, "--k", 2, "--temperature", 0.7)
    assert re.search("--temperature must be 1, got 0.7: .*raw_logprobs", got)


def test_help_names_the_forms_and_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, teacher: Path, data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kdkernels", "cache", "import", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "[[[id, logprob], ...], ...]" in re.sub(r"\s+", " ", ran.stdout)
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    got = run("build", "--teacher", teacher, "--data", data, "--out", tmp_path / "cache")
    assert got.endswith("a teacher is run by transformers, safetensors: pip install 'kdkernels[hf]'")
    assert cache_cli.info_lines.__doc__


def test_the_documents_commands_and_snippets_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, on a folder of the names that they use."""
    pytest.importorskip("accelerate")
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    document = (Path(__file__).parent.parent / "docs" / "cached-teachers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts_of()))
    Path("responses.jsonl").write_text(json.dumps(responses(loaded(teacher))["chat"]))
    tokenizer, model = folder.tokenizer_of(teacher), loaded(teacher)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts_of()]
    names: dict[str, Any] = {
        "student": loaded(teacher), "teacher": model, "data": data, "collator": collator,
        "more_data": [*data, {"input_ids": [5, 6, 7]}], "loader": [collator(data)],
        "args": TrainingArguments(
            "runs", max_steps=4, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
        ),
    }  # fmt: skip
    blocks = re.findall(r"```(bash|python)\n(.*?)```", document, re.S)
    assert [kind for kind, _ in blocks].count("python") == 4
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "cached-teachers.md", "exec"), names)
            continue
        for line in code.splitlines():
            assert run(*line.split()[2:]) is None, line
    assert "1 batches had no stored teacher" in capsys.readouterr().out
    table = [re.findall(r"[\d,]+", line) for line in document.splitlines() if re.match(r"\| \d", line)]
    assert len(table) == 4
    for vocab, *sizes in table:
        for k, size in zip((8, 16, 32, 64, 128, 256), sizes, strict=True):
            manifest = Manifest("t", vocab_size=int(vocab.replace(",", "")), k=k, temperatures=(1, 2))
            assert stride(manifest) == int(size)
