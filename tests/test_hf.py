"""`kd.hf.head`: the hidden states and head of models of `transformers` are their logits, in any wrapper."""

from __future__ import annotations

import copy
import functools
import gc
import os
import re
import socket
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
import torch.multiprocessing as mp
import transformers
from packaging.version import Version
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.models import calls, heads
from kdkernels.train import Adaptor

V = 97
SIZE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SPECIAL = {name: SIZE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
# Class of the config, what it is given, and the (scale, softcap, bias) of its logits.
# Families that transformers 5.0 hasn't, and a release that has them.
LATER = {"HyperCLOVAXConfig": Version("5.23"), "MiniCPM3Config": Version("5.23")}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[float, float | None, bool]]] = {
    "LlamaConfig": (SIZE, (1.0, None, False)),
    "Qwen2Config": ({**SIZE, "tie_word_embeddings": True}, (1.0, None, False)),
    "Qwen3Config": ({**SIZE, "head_dim": 8}, (1.0, None, False)),
    "MistralConfig": (SIZE, (1.0, None, False)),
    "MixtralConfig": ({**SIZE, "num_local_experts": 2}, (1.0, None, False)),
    "GemmaConfig": ({**SIZE, "head_dim": 8}, (1.0, None, False)),
    "Gemma2Config": ({**SIZE, "head_dim": 8, "final_logit_softcapping": 5.0}, (1.0, 5.0, False)),
    "Gemma3TextConfig": ({**SIZE, "head_dim": 8, "final_logit_softcapping": 7.0}, (1.0, 7.0, False)),
    "GraniteConfig": ({**SIZE, "logits_scaling": 4.0}, (0.25, None, False)),  # divided
    "CohereConfig": ({**SIZE, "logit_scale": 0.25}, (0.25, None, False)),  # multiplied
    "Cohere2Config": ({**SIZE, "logit_scale": 0.5}, (0.5, None, False)),
    "HyperCLOVAXConfig": ({**SIZE, "logits_scaling": 3.0}, (3.0, None, False)),  # of this name, multiplied
    "MiniCPM3Config": ({**SIZE, "dim_model_base": 8}, (1.0, None, False)),  # hidden states are
    "PhiConfig": (SIZE, (1.0, None, True)),
    "Phi3Config": (SIZE, (1.0, None, False)),
    "FalconH1Config": (
        {**SIZE, "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_chunk_size": 8}, (0.5, None, False),
    ),
    "GPT2Config": ({**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4}, (1.0, None, False)),
    "GPTNeoXConfig": (SIZE, (1.0, None, False)),
    "OPTConfig": ({**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32}, (1.0, None, False)),
    "BertConfig": (SIZE, (1.0, None, True)),
    "RobertaConfig": (SIZE, (1.0, None, True)),
    "DistilBertConfig": (
        {**SPECIAL, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, (1.0, None, True),
    ),
    "T5Config": (
        {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0}, (1.0, None, False),
    ),
    "BartConfig": (
        {**SPECIAL, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}, (1.0, None, True),
    ),
    "M2M100Config": (  # which only makes its decoder's inputs itself, of labels
        {**SPECIAL, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "decoder_start_token_id": 2}, (1.0, None, False),
    ),
}  # fmt: skip


def made(name: str, **more: Any) -> Any:
    """A model of random weights, five times as large as usual, in eval mode."""
    torch.manual_seed(0)
    if name in LATER and not hasattr(transformers, name) and Version(transformers.__version__) < LATER[name]:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)(**{**FAMILIES[name][0], **more})
    kind = "CausalLM"
    if name in ("BertConfig", "RobertaConfig", "DistilBertConfig"):
        kind = "MaskedLM"
    elif config.is_encoder_decoder:
        kind = "Seq2SeqLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_the_models_logits(name: str) -> None:
    model = made(name)
    theirs = model(**calls.inputs(model, batch())).logits
    for _ in range(2):  # at first use, and afterwards
        head = kd.hf.head(model, **batch())
        assert (head.scale, head.softcap, head.bias is not None) == FAMILIES[name][1]
        torch.testing.assert_close(head.logits(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**calls.inputs(model, batch())).logits, theirs)  # it is as it was
    loss, other = (
        kd.kd_loss(source, torch.zeros_like(theirs), divergence="reverse_kl") for source in (head, theirs)
    )
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, wanted = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, other))
    for a, b in zip(ours, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-9)


def test_a_decoders_inputs_are_those_that_the_model_makes_of_labels() -> None:
    for name in ("T5Config", "BartConfig", "M2M100Config"):
        model = made(name)
        theirs = model(**{**batch(), "use_cache": False}).logits
        torch.testing.assert_close(model(**calls.inputs(model, batch())).logits, theirs)


def test_logits_are_not_made() -> None:
    """Nothing as large as them is returned, or saved for the backward pass."""
    model, sizes = made("GraniteConfig", vocab_size=5000), []
    kd.hf.head(model, **batch())
    given = batch()

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = heads.outputs(model, given)
    assert result["head"].hidden.shape == (2, 7, 32) and "logits" not in result
    assert max(size for size in sizes if size != 5000 * 32) < 14 * 5000


def test_the_first_pass_in_training_is_a_pass_like_any() -> None:
    """With dropout, and with hooks: the same hidden states as without, one pass, the same random numbers."""
    results = []
    for first in (True, False):
        model = made("GPT2Config", resid_pdrop=0.3)
        if not first:
            kd.hf.head(model, **batch())
        passes: list[Any] = []
        model.transformer.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        model.train()
        torch.manual_seed(5)
        results.append((kd.hf.head(model, **batch()).hidden, torch.rand(())))
        assert len(passes) == 1 and model.training
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_what_the_model_does_not_know_is_left_out() -> None:
    model = made("LlamaConfig")
    wanted = kd.hf.head(model, **batch()).hidden
    got = kd.hf.head(model, **batch(), domain=torch.zeros(2), token_weights=torch.ones(2, 7)).hidden
    assert torch.equal(got, wanted)


def test_through_compilation_it_compiles_once_more_and_no_more() -> None:
    model = made("Gemma2Config")
    wanted = kd.hf.head(model, **batch())
    for fresh in (False, True):
        torch._dynamo.reset()
        compiled: Any = torch.compile(made("Gemma2Config") if fresh else model, backend="aot_eager")
        graphs = []
        for _ in range(3):
            head = kd.hf.head(compiled, **batch())
            torch.testing.assert_close(head.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)
            assert (head.scale, head.softcap) == (1.0, 5.0)
            kd.kd_loss(head, torch.zeros(2, 7, V)).backward()
            assert compiled(input_ids=batch()["input_ids"]).logits.shape[-1] == V
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[2]


def _process(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for unused in (False, True):
        model = made("GPT2Config")
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        for _ in range(2):
            wrapped.zero_grad()
            rows = {name: x[rank : rank + 1] for name, x in batch().items()}
            kd.kd_loss(kd.hf.head(wrapped, **rows), torch.zeros(1, 7, V)).backward()
        results[rank, unused] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    wanted = made("LlamaConfig")(**calls.inputs(made("LlamaConfig"), batch())).logits
    for name, shard in SHARDED.items():
        model = shard(made("LlamaConfig"))
        try:
            said = str(kd.hf.head(model, **batch()))
        except ValueError as error:
            said = str(error)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = Adaptor()(model, batch()).logits
        warned_of = " ".join(str(w.message) for w in warned)
        results[rank, name] = (
            calls.rows(calls.unwrap(model)),
            said,
            warned_of,
            float((found - wanted).abs().max()),
        )
    torch.distributed.destroy_process_group()


def _flat(model: Any, **options: Any) -> Any:
    return torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


SHARDED: dict[str, Callable[[Any], Any]] = {
    "FSDP": lambda model: _flat(model, use_orig_params=True),
    "flat FSDP": lambda model: _flat(model, use_orig_params=False),
}


@pytest.fixture(scope="module")
def of_two_processes() -> dict[Any, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(_process, (port, shared), nprocs=2)
        return dict(shared)


def test_through_data_parallel_wrappers(of_two_processes: dict[Any, Any]) -> None:
    """Gradients are averaged over processes, of the head's weight, too, however the wrapper looks."""
    model = made("GPT2Config")
    kd.kd_loss(kd.hf.head(model, **batch()), torch.zeros(2, 7, V)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank, unused in ((0, False), (0, True), (1, False), (1, True)):
        found = of_two_processes[rank, unused]
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", SHARDED)
def test_sharded_heads_are_named_and_trainers_take_the_logits(
    how: str, of_two_processes: dict[Any, Any]
) -> None:
    for rank in (0, 1):
        rows, said, warned, error = of_two_processes[rank, how]
        assert rows == "causal" and error < 1e-5
        assert re.search(r"LlamaForCausalLM can't be used by its head, since .*by fully_shard \(FSDP2", said)
        assert "give kd_loss its logits, as is done here" in warned


def test_through_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = made("LlamaConfig")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    theirs = adapted(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
    head = kd.hf.head(adapted, **batch())
    torch.testing.assert_close(head.logits(), theirs, rtol=1e-4, atol=1e-4)
    kd.kd_loss(head, torch.zeros_like(theirs)).backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == {
        n for n, p in adapted.named_parameters() if "lora" in n
    }
    saved = peft.get_peft_model(
        made("LlamaConfig"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    weight = kd.hf.head(saved, **batch()).weight
    assert weight.requires_grad and weight is saved.get_output_embeddings().modules_to_save["default"].weight
    other = peft.get_peft_model(made("LlamaConfig"), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM can't be used by its head.*peft\.tuners.*Linear"):
        kd.hf.head(other, **batch())


def test_an_adapter_that_puts_tokens_first() -> None:
    """Hidden states are those of the batch's tokens."""
    peft = pytest.importorskip("peft")
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(
            made("LlamaConfig"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ).eval()
        theirs = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
        torch.testing.assert_close(kd.hf.head(model, **batch()).logits(), theirs[:, -7:])


class Student(transformers.LlamaForCausalLM):
    """Somebody's own, by another name."""


def test_what_rows_are_is_found_in_adapters_and_in_what_a_class_is_made_of() -> None:
    llama = transformers.LlamaConfig(**SIZE)
    assert calls.rows(Student(llama)) == calls.rows(transformers.LlamaForCausalLM(llama)) == "causal"
    assert calls.rows(transformers.LlamaForSequenceClassification(llama)) == "samples"
    encoders = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4}
    marian = transformers.MarianMTModel(
        transformers.MarianConfig(**SPECIAL, **encoders, decoder_attention_heads=4, decoder_start_token_id=0)
    )
    assert calls.rows(marian) == "tokens" and heads.has_head(marian)
    peft = pytest.importorskip("peft")
    for name, kind in (("LlamaConfig", "causal"), ("T5Config", "tokens"), ("BertConfig", "tokens")):
        target = {"T5Config": "q", "BertConfig": "query"}.get(name, "q_proj")
        adapted = peft.get_peft_model(made(name), peft.LoraConfig(target_modules=[target]))  # no task's class
        assert type(adapted) is peft.PeftModel
        assert calls.rows(adapted) == kind and heads.has_head(adapted)


def test_an_adapted_model_gets_all_that_it_knows() -> None:
    """Its wrapper names few entries, or none; what packs sequences are positions, which a cache hides."""
    peft = pytest.importorskip("peft")
    for task in (None, "CAUSAL_LM"):
        adapted = peft.get_peft_model(
            made("LlamaConfig"), peft.LoraConfig(target_modules=["lm_head"], task_type=task)
        ).eval()
        given = {"input_ids": batch()["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}
        with pytest.warns(UserWarning, match="can't be used by its head"):
            found = Adaptor()(adapted, {**given, "labels": given["input_ids"]})
        torch.testing.assert_close(found.logits, adapted(**given, use_cache=False).logits)
        assert not torch.allclose(found.logits, adapted(input_ids=given["input_ids"]).logits, atol=1e-2)


def test_keys_and_values_of_the_past_are_not_kept() -> None:
    model = made("LlamaConfig")
    assert model.config.use_cache and {*heads.outputs(model, batch())} == {"head"}
    kept = heads.outputs(model, {**batch(), "use_cache": True})
    (past,) = {"cache", "past_key_values"} & {*kept}  # transformers 5.24 renamed it
    assert kept[past] is not None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_past_that_is_given_is_used_by_either_of_its_names(name: str) -> None:
    model, ids = made("LlamaConfig"), batch()["input_ids"]
    before = model(input_ids=ids[:, :3], use_cache=True)
    past = before["cache" if "cache" in before else "past_key_values"]
    given = calls.inputs(model, {"input_ids": ids[:, 3:], name: past})
    torch.testing.assert_close(model(**given).logits, model(input_ids=ids).logits[:, 3:])


def test_of_several_heads_the_language_models() -> None:
    size = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertForPreTraining(transformers.BertConfig(**size)).eval()
    found = heads.outputs(bert, batch())
    theirs = bert(**calls.inputs(bert, batch())).prediction_logits
    torch.testing.assert_close(found["head"].logits(), theirs)
    assert {*found} == {"head", "seq_relationship_logits"}
    gpt = transformers.GPT2DoubleHeadsModel(
        transformers.GPT2Config(**SPECIAL, n_embd=32, n_layer=1, n_head=4)
    ).eval()
    torch.testing.assert_close(kd.hf.head(gpt, **batch()).logits(), gpt(**calls.inputs(gpt, batch())).logits)
    many = made("LlamaConfig")
    many.lm_head = nn.ModuleList([many.lm_head, many.lm_head])
    with pytest.raises(ValueError, match=r"since its head is a torch\.nn\.modules\.container\.ModuleList"):
        kd.hf.head(many, **batch())


class Packed(Tensor):
    """As quantised weights are, in a layer that looks plain."""


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(V, 32, dtype=torch.int8), r"torch\.int8"),
        (torch.zeros(V, 32).to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
        (torch.zeros(V, 32).as_subclass(Packed), r"a test_hf\.Packed"),
        (torch.zeros(0), "sharded over processes"),  # as ZeRO-3 leaves it between passes
        (torch.zeros(V, 32, device="meta"), r"not in memory \(offloaded"),
    ],
)
def test_weights_that_are_not_plain_are_named(weight: Tensor, said: str) -> None:
    """By `head`; `Distiller` and the mixin take the logits, and say why."""
    model = made("LlamaConfig")
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM can't be used by its head, since .* {said}"):
        kd.hf.head(model, **batch())
    with pytest.warns(UserWarning, match=f"{said}.*: give kd_loss its logits, as is done here"):
        assert not heads.has_head(model)


def test_models_that_have_no_head_to_give() -> None:
    with pytest.raises(TypeError, match=r"must be a model of transformers, got Linear: build kd\.Head"):
        kd.hf.head(nn.Linear(3, 3), inputs=torch.zeros(1, 3))
    sequence = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZE))
    with pytest.raises(ValueError, match="BertForSequenceClassification has no language-model head"):
        kd.hf.head(sequence, **batch())
    size = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    mobile = (
        transformers.MobileBertForMaskedLM(  # whose logits are made of its layer's weight, and of another
            transformers.MobileBertConfig(
                **size, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, intermediate_size=64
            )
        )
    )
    with pytest.raises(ValueError, match=r"MobileBertForMaskedLM did not come to its head.*heads=False"):
        kd.hf.head(mobile, **batch())


def test_a_model_that_does_something_else_is_refused_with_both() -> None:
    """Both logits are printed, and nothing is left behind."""
    model = made("LlamaConfig")
    plain = type(model).forward

    class Squared(type(model)):  # type: ignore[misc]
        @functools.wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = plain(self, *args, **kwargs)
            result.logits = result.logits + 0.1 * result.logits**2
            return result

    model.__class__ = Squared
    for _ in range(2):
        with pytest.raises(ValueError, match=r"makes other logits than its head.*gives \[.*and the model \["):
            kd.hf.head(model, **batch())
        assert "forward" not in model.lm_head.__dict__


def test_a_copy_is_another_model() -> None:
    model = made("GraniteConfig")
    kd.hf.head(model, **batch())
    other = copy.deepcopy(model)
    other.config.logits_scaling = 2.0
    assert kd.hf.head(other, **batch()).scale == 0.5 and kd.hf.head(model, **batch()).scale == 0.25


def test_a_model_that_was_asked_for_its_head_can_die() -> None:
    model = made("LlamaConfig")
    alive = [weakref.ref(model), weakref.ref(model.lm_head)]
    kd.hf.head(model, **batch()).hidden.sum().backward()
    del model
    gc.collect()
    assert [x() for x in alive] == [None, None]
