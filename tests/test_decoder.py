"""The decoder: its cache, its updates, and its equality with the models of transformers whose weights it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tta_adapters.decoder import TARGETS, Decoder, DecoderConfig, Update
from tta_exporters.errors import NetworkRefused, SourceError, WeightsDoNotFit
from tta_exporters.language_sources import from_transformers, load_language, read_decoder, write_decoder
from tta_exporters.sources import load_transformers

GATED = DecoderConfig(
    vocabulary=257, layers=2, width=32, heads=4, kv_heads=2, head_width=8, hidden=48, context=64
)
PLAIN = DecoderConfig(
    vocabulary=257, layers=2, width=32, heads=4, kv_heads=4, head_width=8, hidden=64, context=64,
    norm="layer", positions="learned", gated=False, activation="gelu_tanh",
    qkv_bias=True, out_bias=True, mlp_bias=True, tied=False,
)  # fmt: skip


def random_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).double().eval().requires_grad_(False)
    for value in decoder.parameters():
        nn.init.normal_(value, 0.3 if value.dim() == 1 else 0.0, 0.2)
    return decoder


def some_tokens(count: int, batch: int = 2, vocabulary: int = 257) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("cuts", [(1,), (5, 6), tuple(range(1, 20))])
def test_a_text_in_pieces_is_the_text_at_once(config: DecoderConfig, cuts: tuple[int, ...]) -> None:
    decoder, tokens = random_decoder(config), some_tokens(20)
    whole = decoder(tokens)
    cache, logits = None, []
    for piece in torch.tensor_split(tokens, cuts, dim=1):
        out = decoder(piece, cache)
        cache, logits = out.cache, [*logits, out.logits]
    assert cache is not None
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache, whole.cache, rtol=1e-6, atol=1e-6)


def test_an_empty_past_is_no_past() -> None:
    decoder, tokens = random_decoder(GATED), some_tokens(9)
    empty = torch.zeros(2, 2, 2, 2, 0, 8, dtype=torch.float64)
    torch.testing.assert_close(decoder(tokens, empty).logits, decoder(tokens).logits, rtol=1e-6, atol=1e-6)


def test_no_token_sees_a_later_one() -> None:
    decoder, tokens = random_decoder(GATED), some_tokens(12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 257
    before, after = decoder(tokens).logits, decoder(changed).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("target", TARGETS)
def test_an_update_is_what_it_would_be_inside_the_matrix_and_the_bias(target: str) -> None:
    decoder, tokens = random_decoder(GATED), some_tokens(10)
    inputs, generator = GATED.fan_in(target), torch.Generator().manual_seed(2)  # type: ignore[arg-type]
    down = torch.randn(1, 3, inputs + 1, generator=generator, dtype=torch.float64)
    up = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    updated = decoder(tokens, updates={(1, target): Update(down, up)}).logits  # type: ignore[dict-item]
    merged = random_decoder(replace(GATED, out_bias=True, mlp_bias=True))
    merged.load_state_dict(decoder.state_dict(), strict=False)
    for name, value in merged.named_parameters():
        if name.endswith("bias"):
            value.zero_()
    block = merged.blocks[1]
    layer = block.attention.o if target == "o" else block.mlp.down
    layer.weight.add_(up @ down[0, :, :-1])
    layer.bias.add_(up @ down[0, :, -1])
    torch.testing.assert_close(updated, merged(tokens).logits, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(updated, decoder(tokens).logits)


def test_each_text_of_a_batch_has_its_own_update() -> None:
    decoder, tokens = random_decoder(GATED), some_tokens(10)
    down = torch.randn(2, 3, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    up = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    both = decoder(tokens, updates={(0, "down"): Update(down, up)}).logits
    for index in range(2):
        one = decoder(tokens[index : index + 1], updates={(0, "down"): Update(down[index : index + 1], up)})
        torch.testing.assert_close(one.logits[0], both[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"kv_heads": 3}, {"head_width": 7}, {"layers": 0}, {"context": 0}], ids=lambda w: next(iter(w))
)
def test_a_combination_that_is_no_decoder_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "kv_heads" not in wrong else "4 heads"):
        replace(GATED, **wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- transformers


def transformers_model(family: str, **changes: object) -> nn.Module:
    pytest.importorskip("transformers")
    transformers = load_transformers()
    torch.manual_seed(0)
    common = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, **{**common, **changes}
        )
    else:
        kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "mistral": "MistralConfig"}[family]
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        config = getattr(transformers, kind)(**{**sizes, **common, **changes})
    network: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for value in network.parameters():
        nn.init.normal_(value, 0.3 if value.dim() == 1 else 0.0, 0.2)
    return network


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 32}),
        ("gpt2", {}),
        ("gpt2", {"activation_function": "gelu", "n_inner": 40}),
    ],
    ids=["llama", "biases", "heads", "qwen2", "mistral", "gpt2", "gpt2-gelu"],
)
def test_weights_of_transformers_give_their_logits(family: str, changes: dict[str, object]) -> None:
    network = transformers_model(family, **changes).double()
    decoder = from_transformers(network).double()
    tokens = some_tokens(24, vocabulary=300)
    with torch.no_grad():
        expected = network(input_ids=tokens).logits
    torch.testing.assert_close(decoder(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_comparison_finds_one_flipped_sign() -> None:
    network = transformers_model("llama").double()
    decoder = from_transformers(network).double()
    decoder.blocks[0].attention.k.weight[0] *= -1
    tokens = some_tokens(24, vocabulary=300)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(
            decoder(tokens).logits, network(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "type linear",
        ),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "layer's number"),
    ],
)
def test_a_variant_that_is_not_known_is_refused_by_name(
    family: str, changes: dict[str, object], what: str
) -> None:
    with pytest.raises(NetworkRefused, match=what):
        from_transformers(transformers_model(family, **changes))


def test_a_saved_directory_loads_with_its_tokens(tmp_path: Path) -> None:
    network = transformers_model("llama")
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "tokenizer.json").write_text("{}")
    found = load_language(f"hf:{tmp_path}")
    assert (found.begin, found.end, found.tokenizer) == (1, 2, tmp_path / "tokenizer.json")
    tokens = some_tokens(8, vocabulary=300)
    with torch.no_grad():
        torch.testing.assert_close(
            found.decoder(tokens).logits, network(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )


# ------------------------------------------------------------------------------------------ files of our own


def test_a_decoder_comes_back_from_its_file(tmp_path: Path) -> None:
    decoder = random_decoder(PLAIN).float()
    write_decoder(tmp_path / "d.safetensors", decoder, begin=256)
    found = load_language(str(tmp_path / "d.safetensors"))
    assert (found.decoder.config, found.begin, found.end, found.tokenizer) == (PLAIN, 256, None, None)
    for name, value in decoder.state_dict().items():
        assert torch.equal(found.decoder.state_dict()[name], value.half().float())


def test_a_file_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from tta_exporters.adapter_file import read_tensors, write_tensors

    file = tmp_path / "d.safetensors"
    with pytest.raises(SourceError, match="cannot be read"):
        read_decoder(file)
    write_decoder(file, random_decoder(GATED).float(), begin=256)
    tensors, facts = read_tensors(file)
    write_tensors(file, tensors, {**facts, "format": "other"})
    with pytest.raises(SourceError, match="no decoder"):
        read_decoder(file)
    write_tensors(file, tensors, {**facts, "config": "{}"})
    with pytest.raises(SourceError, match="damaged"):
        read_decoder(file)
    write_tensors(file, {k: v for k, v in tensors.items() if k != "norm.weight"}, facts)
    with pytest.raises(WeightsDoNotFit, match=r"norm\.weight"):
        read_decoder(file)
