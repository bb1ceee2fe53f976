"""The command line of cached teachers: `kdkernels cache build | info | verify | import`."""

# No `from __future__ import annotations`: typer reads the commands' annotations, which live inside `build`.
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

if TYPE_CHECKING:
    import typer

_IMPORT = """Fill a cache with what an inference server has returned, an object for each line of FILE.

Read are, and told apart by their fields:

{"token_ids": [...], "top_logprobs": [[\\[id, logprob], ...], ...]}, where entry s is the distribution after
token s, and the last may be missing or null;

responses of vLLM and servers like it, with choices or outputs, or one of those: prompt_logprobs and
prompt_token_ids (return_token_ids=true), and logprobs with return_tokens_as_token_ids=true;

responses of SGLang's /generate: meta_info with input_top_logprobs and output_top_logprobs
(return_logprob=true, logprob_start_len=0).

A server says of each token what predicted it, which is kept as the row of the token before it; of the last
token there is none. Of each entry the K most probable classes are kept: servers add the token itself where it
is not among them. Token strings without ids are refused.
"""


def build() -> "typer.Typer":
    """The commands; needs typer."""
    import typer

    app = typer.Typer(
        name="cache",
        help="Cached teachers: run once, read in every training.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    Out = Annotated[Path, typer.Option(help="The cache's folder; one of the same teacher is gone on with.")]
    Part = Annotated[
        str, typer.Option(help="Of several processes that fill one cache, each has its own name, as rank0.")
    ]
    ShardMb = Annotated[float, typer.Option("--shard-mb", help="About how large a file becomes, in MB.")]

    @app.command("build")
    def build_(
        teacher: Annotated[Path, typer.Option(help="Folder of a causal language model and its tokenizer.")],
        data: Annotated[
            list[Path],
            typer.Option(help="A .txt, a text for each line, or .jsonl; may be given several times."),
        ],
        out: Out,
        k: Annotated[
            int | None,
            typer.Option(
                "--k", help="Classes kept of each position.", show_default="64, or all that are drawn"
            ),
        ] = None,
        temperature: Annotated[
            list[float], typer.Option(help="At which losses will ask; may be given several times.")
        ] = [1.0],  # noqa: B006
        kind: Annotated[str, typer.Option(help="topk, or sampled: draws, for forward KL alone.")] = "topk",
        draws: Annotated[int | None, typer.Option(help="Of sampled, for each position.")] = None,
        max_length: Annotated[
            int | None,
            typer.Option(
                help="Longer texts are cut into windows of so many tokens, each a sequence of its own.",
                show_default="512, or the teacher's positions",
            ),
        ] = None,
        batch_tokens: Annotated[int, typer.Option(help="Of a batch, padding included.")] = 8192,
        device: Annotated[
            str | None,
            typer.Option(help="cpu, cuda, or auto for all GPUs; by default cuda where there is one."),
        ] = None,
        dtype: Annotated[
            str, typer.Option(help="auto, as it was saved; bfloat16, float16 or float32.")
        ] = "auto",
        text_field: Annotated[
            str | None, typer.Option(help="Of .jsonl, where the text is.", show_default="text")
        ] = None,
        messages_field: Annotated[
            str | None,
            typer.Option(help="Of .jsonl, where messages are: the chat template makes texts of them."),
        ] = None,
        ids_field: Annotated[
            str | None, typer.Option(help="Of .jsonl, where token ids are, as a trainer's own tokenization.")
        ] = None,
        special_tokens: Annotated[
            bool, typer.Option(help="Whether texts get the tokens that the tokenizer adds.")
        ] = True,
        eos: Annotated[bool, typer.Option("--eos", help="End every text with the end token.")] = False,
        shard_mb: ShardMb = 32.0,
        part: Part = "main",
        seed: Annotated[int, typer.Option(help="Of draws.")] = 0,
    ) -> None:
        """Run a teacher over texts and keep the K most probable classes of each position.

        Started again, it goes on with what is missing; Ctrl-C keeps what was done.
        """
        with _told("build"):
            _build(
                typer.echo, teacher=teacher, data=data, out=out, k=k, temperatures=temperature, kind=kind,
                draws=draws, max_length=max_length, batch_tokens=batch_tokens, device=device, dtype=dtype,
                fields=(text_field, messages_field, ids_field), special_tokens=special_tokens, eos=eos,
                shard_mb=shard_mb, part=part, seed=seed,
            )  # fmt: skip

    @app.command()
    def info(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="A cache.")],
        sample: Annotated[int, typer.Option(help="Sequences that the stored mass is measured on.")] = 64,
    ) -> None:
        """Print what a cache is of, how large it is, and how much of the teacher it holds."""
        with _told("info"):
            for line in info_lines(folder, sample):
                typer.echo(line)

    @app.command()
    def verify(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="A cache.")],
        teacher: Annotated[
            Path | None, typer.Option(help="Run it again on a sample, and compare.", show_default=False)
        ] = None,
        sample: Annotated[int, typer.Option(help="Sequences of the sample.")] = 64,
        device: Annotated[
            str | None, typer.Option(help="cpu, cuda or auto; by default cuda where there is one.")
        ] = None,
        dtype: Annotated[
            str | None, typer.Option(help="By default the one that the cache was built in.")
        ] = None,
        bound: Annotated[
            float | None,
            typer.Option(
                help="What mean total variation, over the stored mass, passes.",
                show_default="by dtype, 0.002 to 0.04",
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    ) -> None:
        """Check every byte against its checksum, and with a teacher, a sample of rows against it.

        Exits with 1 where something is wrong.
        """
        with _told("verify"):
            if not _verify(typer.echo, folder, teacher, sample, device, dtype, bound, seed):
                raise SystemExit(1)

    @app.command("import", help=_IMPORT)
    def import_(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="Responses, a line of JSON for each.")],
        out: Out,
        vocab_size: Annotated[int, typer.Option(help="Classes of the teacher's logits.")],
        k: Annotated[int, typer.Option("--k", help="Classes kept of each position.")],
        temperature: Annotated[
            float,
            typer.Option(help="At which the log-probabilities are. Those of another than 1 are refused."),
        ] = 1.0,
        teacher: Annotated[str, typer.Option(help="Its name, for the manifest.")] = "imported",
        tokenizer: Annotated[
            Path | None,
            typer.Option(help="Folder of its tokenizer, so that trainers compare it.", show_default=False),
        ] = None,
        allow_gaps: Annotated[
            bool,
            typer.Option("--allow-gaps", help="Keep sequences with rows that the server said nothing of."),
        ] = False,
        shard_mb: ShardMb = 32.0,
        part: Part = "main",
    ) -> None:
        with _told("import"):
            _import(
                typer.echo, file=file, out=out, vocab_size=vocab_size, k=k, temperature=temperature,
                teacher=teacher, tokenizer=tokenizer, gaps=allow_gaps, shard_mb=shard_mb, part=part,
            )  # fmt: skip

    return app


@contextmanager
def _told(command: str) -> Iterator[None]:
    """Within it, what is refused ends the process in one line."""
    from .cache import CacheError

    try:
        yield
    except (CacheError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"kdkernels cache {command}: {error}") from None
    except KeyboardInterrupt:
        print("interrupted; what was done is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def _device(given: str | None) -> str:
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def _positive(**options: float | None) -> None:
    from .cache import CacheError

    for name, value in options.items():
        if value is not None and not value > 0:
            raise CacheError(f"--{name.replace('_', '-')} must be > 0, got {value:g}")


@contextmanager
def _named(**options: str) -> Iterator[None]:
    """Within it, errors about a manifest or a writer also name the options that say what they are about."""
    from .cache import CacheError

    try:
        yield
    except CacheError as error:
        name = next((option for word, option in options.items() if str(error).startswith(word)), "--out")
        raise CacheError(f"{name}: {error}") from error


def _manifest(**fields: Any) -> Any:
    from .cache import Manifest

    names = {
        "k ": "--k", "temperatures": "--temperature", "kind": "--kind", "draws": "--draws",
        "teacher": "--teacher", "vocab_size": "--vocab-size",
    }  # fmt: skip
    with _named(**names):
        return Manifest(**fields)


def _writer(out: Path, manifest: Any, part: str, shard_mb: float, seed: int = 0) -> Any:
    from .cache import TeacherCache

    _positive(shard_mb=shard_mb)
    with _named(part="--part"):
        return TeacherCache.create(out, manifest, part=part, shard_bytes=int(shard_mb * 1e6) or 1, seed=seed)


def _build(say: Any, *, teacher: Path, data: list[Path], out: Path, fields: Any, **o: Any) -> None:
    from .bench import Progress
    from .cache import CacheError, texts
    from .cache import build as builder
    from .cache.folder import check_packages, classes_of, fingerprint, model_of, tokenizer_of
    from .models.tokenizers import vocabulary_hash

    given = [
        name for name, x in zip(("--text-field", "--messages-field", "--ids-field"), fields, strict=True) if x
    ]
    if len(given) > 1:
        raise CacheError(f"give one of {', '.join(given)}")
    _positive(max_length=o["max_length"], batch_tokens=o["batch_tokens"], shard_mb=o["shard_mb"])
    if o["kind"] == "sampled" and o["draws"] is None:
        raise CacheError("--kind sampled needs --draws, how many classes are drawn for each position")
    check_packages()
    size = texts.check_paths(data)
    model, tokenizer = model_of(teacher, _device(o["device"]), o["dtype"]), tokenizer_of(teacher)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) else math.inf
    longest = o["max_length"] or int(min(512, positions))
    if longest > positions:
        raise CacheError(f"--max-length must be at most the teacher's {positions} positions, got {longest}")
    text_field, messages_field, ids_field = fields
    template = None
    if messages_field:
        tokenize: Any = texts.by_messages(tokenizer)
        template = _hash(str(tokenizer.chat_template))
    else:
        tokenize = texts.by_ids if ids_field else texts.by_text(tokenizer, o["special_tokens"], o["eos"])
    classes = classes_of(model)
    k = o["k"] if o["k"] is not None else min(o["draws"] or 64, classes)
    manifest = _manifest(
        teacher=teacher.resolve().name, vocab_size=classes, k=k, kind=o["kind"], draws=o["draws"],
        temperatures=tuple(o["temperatures"]), dtype=str(model.dtype).removeprefix("torch."),
        revision=fingerprint(teacher), tokenizer=vocabulary_hash(tokenizer), chat_template=template,
    )  # fmt: skip
    count, progress, tty = texts.Count(), Progress(), sys.stdout.isatty()  # where the bar says what is left
    field = messages_field or ids_field or text_field or "text"
    with _writer(out, manifest, o["part"], o["shard_mb"], o["seed"]) as writer:
        each = builder.bytes_per_token(writer)
        progress.say(
            f"{teacher.resolve().name} on {_device(o['device'])} in {manifest.dtype}: {manifest.k} of "
            f"{manifest.vocab_size} classes, {each:.0f} bytes a token"
        )
        unit = max(size // 1000, 1)  # the bar is in kB of text
        with progress.phase("building (kB)", unit):
            shown = 0

            def tell(done: Any, read: int) -> None:
                nonlocal shown
                part = min(read / max(size, 1), 1.0)
                left = f", {(1 - part) / part * done.seconds:.0f} s left" if part and not tty else ""
                now = round(part * unit)
                progress.step(f"{done.rate:,.0f} tokens/s, {each:.0f} bytes each{left}", now - shown)
                shown = now

            sequences = texts.windows(data, field, tokenize, longest, count)
            done = builder.build(writer, model, sequences, count, o["batch_tokens"], tell)
        errors = writer.errors
    say(f"added {done.sequences} sequences of {done.tokens} tokens; {done.known} were there already")
    if count.cut:
        say(f"{count.cut} texts were longer than {longest} tokens, and were cut into windows")
    if count.empty:
        say(f"{count.empty} of {count.lines} lines had no text")
    if done.tokens and errors:
        worst = ", ".join(f"{x:.1e} at T = {t:g}" for t, x in errors.items())
        say(f"the largest total variation that storing made: {worst}")
    say(f"{out}: kdkernels cache info {out}")


def _hash(text: str) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def info_lines(folder: Path, sample: int) -> list[str]:
    """What there is to know of a cache."""
    from .cache import TeacherCache
    from .cache.compare import masses

    _positive(sample=sample)
    cache = TeacherCache.open(folder)
    manifest = cache.manifest
    files = [path for path in folder.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    draws = f", {manifest.draws} draws" if manifest.draws else ""
    lines = [
        f"teacher       {manifest.teacher} ({manifest.dtype or 'dtype unknown'})",
        f"revision      {manifest.revision or 'unknown'}",
        f"tokenizer     {manifest.tokenizer or 'unknown'}",
        f"chat template {manifest.chat_template or 'none'}",
        f"kept          {manifest.kind}, {manifest.k} of {manifest.vocab_size} classes{draws}",
        f"temperatures  {', '.join(f'{t:g}' for t in manifest.temperatures)}",
        f"causal        {'yes' if manifest.causal else 'no'}",
        f"sequences     {len(cache):,}",
        f"tokens        {cache.tokens:,}",
        f"bytes         {size:,} in {sum(path.suffix == '.safetensors' for path in files)} shards",
        f"per token     {cache.bytes_per_token:.1f} bytes"
        if cache.tokens
        else "per token     nothing is there",
    ]
    if manifest.kind == "topk" and len(cache):
        mass = masses(cache, sample, 0)
        shown = torch.tensor([0.0, 0.01, 0.05, 0.25, 0.5, 1.0])
        # Of many rows some, since quantile takes no more than 16 million.
        found = mass[:: len(mass) // 1_000_000 + 1].quantile(shown).tolist()
        lines.append(
            f"mass          of what is kept, at T = 1, over {len(mass):,} rows: mean {mass.mean():.4f}"
        )
        names = ("least", "1 %", "5 %", "25 %", "median", "most")
        lines += [f"  {name:<12}{x:.4f}" for name, x in zip(names, found, strict=True)]
    return lines


def _verify(
    say: Any, folder: Path, teacher: Path | None, sample: int, device: str | None, dtype: str | None,
    bound: float | None, seed: int,
) -> bool:  # fmt: skip
    from .cache import TeacherCache
    from .cache.compare import LIKELY, bound_of, differences
    from .cache.folder import fingerprint, model_of

    _positive(sample=sample, bound=bound)
    cache = TeacherCache.open(folder)
    report = cache.verify()
    say(
        f"every checksum agrees: {report.sequences:,} sequences, {report.tokens:,} tokens, {report.bytes:,} "
        f"bytes in {report.shards} shards"
    )
    if teacher is None:
        return True
    built = cache.manifest.dtype
    model = model_of(
        teacher, _device(device), dtype or (built if built in ("float16", "float32", "bfloat16") else "auto")
    )
    revision = fingerprint(teacher)
    if cache.manifest.revision not in (None, revision):
        say(f"{teacher} is another checkpoint: {revision}, and the cache is of {cache.manifest.revision}")
    found = differences(cache, model, sample, seed)
    if cache.manifest.kind == "sampled":
        say(
            f"over {found.rows:,} rows, the draws' mean log-probability is {found.deviation:+.1f} standard "
            "deviations from what the teacher says"
        )
        passed = abs(found.deviation) <= 6
        say(f"{'within' if passed else 'beyond'} 6, which chance passes once in 500 million")
        return passed
    for t in found.mean:
        say(f"total variation at T = {t:g}: mean {found.mean[t]:.2e}, largest {found.largest[t]:.2e}")
    say(f"log-probabilities above {LIKELY:g}: the largest difference is {found.log_prob:.2e}")
    say(
        f"top {cache.manifest.k}: the same classes in {100 * found.same:.1f} % of {found.rows:,} rows, "
        f"{100 * found.shared:.2f} % of classes"
    )
    limit = bound_of(model.dtype) if bound is None else bound
    worst = max(found.mean[t] / max(found.mass[t], 1e-12) for t in found.mean)
    passed = worst <= limit
    name = str(model.dtype).removeprefix("torch.")
    why = f"what storing, and running {name} in other batches, make of the same teacher"
    say(
        f"the mean is {worst:.2e} of the stored mass, {'within' if passed else 'beyond'} {limit:g}: "
        f"{why if bound is None else 'given by --bound'}"
    )
    return passed


def _import(say: Any, *, file: Path, out: Path, tokenizer: Path | None, gaps: bool, **o: Any) -> None:
    from .cache import CacheError, servers
    from .cache.folder import tokenizer_of
    from .cache.texts import parsed
    from .models.tokenizers import vocabulary_hash

    if o["temperature"] != 1:
        raise CacheError(
            f"--temperature must be 1, got {o['temperature']:g}: a cache has what the tail weighs at 1, "
            "which can't be known from log-probabilities at another. Ask the server for those before "
            "temperature (vLLM: --logprobs-mode raw_logprobs, its default), or for temperature=1 (SGLang)"
        )
    if not file.is_file():
        raise CacheError(f"FILE {file} is not there")
    manifest = _manifest(
        teacher=o["teacher"], vocab_size=o["vocab_size"], k=o["k"],
        tokenizer=None if tokenizer is None else vocabulary_hash(tokenizer_of(tokenizer, "--tokenizer")),
    )  # fmt: skip
    tally, known = servers.Tally(), 0
    with _writer(out, manifest, o["part"], o["shard_mb"]) as writer, file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            for ids, rows in servers.sequences_of(parsed(line, where), where) if line.strip() else ():
                teacher = servers.stored(rows, o["k"], gaps, tally, where)
                try:
                    known += not writer.append(ids, teacher)
                except CacheError as error:
                    raise CacheError(f"{where}: {error} (--vocab-size {o['vocab_size']})") from error
        added = writer.sequences, writer.tokens
    say(f"added {added[0]} sequences of {added[1]} tokens; {known} were there already")
    say(
        f"of {tally.rows} rows {tally.more} had more than {o['k']} classes, of which the most probable are "
        f"kept, and {tally.fewer} fewer"
    )
    if tally.unknown:
        say(f"{tally.unknown} rows before the last of their sequence are not known, and teach nothing")
    say(f"{out}: kdkernels cache info {out}")
