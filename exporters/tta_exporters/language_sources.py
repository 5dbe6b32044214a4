"""Where decoders come from: a file of our own, or hf:DIR, a Llama- or GPT-2-class model of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_exporters.adapter_file import read_tensors, write_tensors
from tta_exporters.errors import NetworkRefused, SourceError, WeightsDoNotFit
from tta_exporters.sources import pretrained

FORMAT = "tta-decoder"


@dataclass(frozen=True)
class Language:
    """A decoder with what stands around its texts.

    Attributes:
        decoder: frozen.
        begin: the token before a text, or None.
        end: the token behind one, or None.
        tokenizer: a file of the package `tokenizers`, or None: tokens are bytes.
    """

    decoder: Decoder
    begin: int | None
    end: int | None
    tokenizer: Path | None


def load_language(source: str) -> Language:
    """A decoder by the name of its source.

    Args:
        source: "hf:DIR", a directory that `transformers` saved, or a file that :func:`write_decoder` wrote.

    Raises:
        SourceError: there is none, or it cannot be read.
        NetworkRefused: a kind of decoder that cannot be described.
        WeightsDoNotFit: its weights do not fit its description.
    """
    kind, separator, rest = source.partition(":")
    if separator and kind == "hf":
        return _from_hf(Path(rest))
    return read_decoder(Path(source))


def write_decoder(file: Path, decoder: Decoder, begin: int | None, end: int | None = None) -> None:
    """Writes a decoder of our own, in float16: half the size, and small decoders lose nothing by it.

    Raises:
        OutputUnwritable: it cannot be written there.
    """
    facts = {
        "format": FORMAT,
        "config": json.dumps(asdict(decoder.config), sort_keys=True),
        "begin": json.dumps(begin),
        "end": json.dumps(end),
    }
    tensors = {name: value.to(torch.float16) for name, value in decoder.state_dict().items()}
    write_tensors(file, tensors, facts)


def read_decoder(file: Path) -> Language:
    """Reads what :func:`write_decoder` wrote.

    Raises:
        SourceError: it cannot be read, or is no such file.
        WeightsDoNotFit: its weights do not fit its description.
    """
    tensors, facts = read_tensors(file)
    if facts.get("format") != FORMAT:
        raise SourceError(f"{file.name} is no decoder", "Give a file of a decoder, or hf:DIR")
    try:
        config = DecoderConfig(**json.loads(facts["config"]))
        begin, end = json.loads(facts["begin"]), json.loads(facts["end"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"the description of {file.name} is damaged: {error}", "Make it again") from error
    return Language(_filled(config, tensors, file.name), begin, end, None)


def _filled(config: DecoderConfig, tensors: Mapping[str, Tensor], name: str) -> Decoder:
    decoder = Decoder(config)
    own = decoder.state_dict()
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    differing = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    if missing or unknown or differing:
        raise WeightsDoNotFit(
            f"the weights of {name} do not fit its description: {len(missing)} missing {sorted(missing)[:2]}, "
            f"{len(unknown)} unknown {sorted(unknown)[:2]}, {len(differing)} of another shape {differing[:2]}",
            "Make the file again",
        )
    decoder.load_state_dict({key: value.float() for key, value in tensors.items()})
    return decoder.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------- transformers


def _from_hf(directory: Path) -> Language:
    network = pretrained(str(directory), "AutoModelForCausalLM", "causal language model")
    tokenizer = directory / "tokenizer.json"
    facts = cast("Any", network).config
    return Language(
        from_transformers(network), _token(facts, "bos_token_id"), _token(facts, "eos_token_id"),
        tokenizer if tokenizer.is_file() else None,
    )  # fmt: skip


def from_transformers(network: nn.Module) -> Decoder:
    """A decoder with the weights of a Llama-class (llama, mistral, qwen2) or GPT-2-class model.

    Raises:
        NetworkRefused: another class, or a variant that a decoder here cannot be.
    """
    facts = cast("Any", network).config
    make = _FAMILIES.get(str(facts.model_type))
    if make is None:
        raise NetworkRefused(
            f"models of the type {facts.model_type!r} are not known here",
            f"Known are {', '.join(_FAMILIES)}",
        )
    config, tensors = make(facts, dict(network.state_dict()))
    return _filled(config, tensors, f"the {facts.model_type} model")


def _llama(facts: Any, state: dict[str, Tensor]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    rope = dict(getattr(facts, "rope_parameters", None) or {})
    _refuse_unless(
        rope.get("rope_type", "default") == "default", f"rotary positions of type {rope.get('rope_type')}"
    )
    _refuse_unless(facts.hidden_act == "silu", f"activation {facts.hidden_act}")
    window = getattr(facts, "sliding_window", None) if getattr(facts, "use_sliding_window", True) else None
    context = int(facts.max_position_embeddings)
    config = DecoderConfig(
        vocabulary=facts.vocab_size,
        layers=facts.num_hidden_layers,
        width=facts.hidden_size,
        heads=facts.num_attention_heads,
        kv_heads=facts.num_key_value_heads,
        head_width=getattr(facts, "head_dim", None) or facts.hidden_size // facts.num_attention_heads,
        hidden=facts.intermediate_size,
        # Within its window a model with sliding attention is one without.
        context=min(context, window) if window else context,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in state,
        out_bias="model.layers.0.self_attn.o_proj.bias" in state,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in state,
        eps=facts.rms_norm_eps,
        rope_base=float(rope.get("rope_theta", getattr(facts, "rope_theta", 10_000.0))),
        tied=bool(facts.tie_word_embeddings),
    )
    names = {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
        **{f"self_attn.{name}_proj": f"attention.{name}" for name in "qkvo"},
        **{f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")},
    }
    tensors = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
    }
    if not config.tied:
        tensors["head.weight"] = state["lm_head.weight"]
    for name, value in state.items():
        if name.startswith("model.layers."):
            block, _, rest = name.removeprefix("model.layers.").partition(".")
            path, _, leaf = rest.rpartition(".")
            tensors[f"blocks.{block}.{names.get(path, path)}.{leaf}"] = value
    return config, tensors


def _gpt2(facts: Any, state: dict[str, Tensor]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    _refuse_unless(
        facts.activation_function in ("gelu_new", "gelu"), f"activation {facts.activation_function}"
    )
    _refuse_unless(facts.scale_attn_weights, "attention that is not scaled")
    _refuse_unless(not facts.scale_attn_by_inverse_layer_idx, "attention scaled by the layer's number")
    config = DecoderConfig(
        vocabulary=facts.vocab_size,
        layers=facts.n_layer,
        width=facts.n_embd,
        heads=facts.n_head,
        kv_heads=facts.n_head,
        head_width=facts.n_embd // facts.n_head,
        hidden=facts.n_inner or 4 * facts.n_embd,
        context=facts.n_positions,
        norm="layer",
        positions="learned",
        gated=False,
        activation="gelu_tanh" if facts.activation_function == "gelu_new" else "gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        eps=facts.layer_norm_epsilon,
        tied=bool(facts.tie_word_embeddings),
    )
    names = {
        "ln_1": "norm1", "ln_2": "norm2", "attn.c_proj": "attention.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }  # fmt: skip
    tensors = {
        "embedding.weight": state["transformer.wte.weight"],
        "position.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
    }
    if not config.tied:
        tensors["head.weight"] = state["lm_head.weight"]
    for name, value in state.items():
        if not name.startswith("transformer.h."):
            continue
        block, _, rest = name.removeprefix("transformer.h.").partition(".")
        path, _, leaf = rest.rpartition(".")
        # Its linear layers keep their weights the other way round.
        turned = value.T.contiguous() if leaf == "weight" and value.dim() == 2 else value
        if path == "attn.c_attn":
            for part, piece in zip("qkv", turned.chunk(3), strict=True):
                tensors[f"blocks.{block}.attention.{part}.{leaf}"] = piece.contiguous()
        elif path in names:
            tensors[f"blocks.{block}.{names[path]}.{leaf}"] = turned
    return config, tensors


_FAMILIES: Mapping[str, Callable[[Any, dict[str, Tensor]], tuple[DecoderConfig, dict[str, Tensor]]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt2": _gpt2,
}


def _refuse_unless(condition: bool, what: str) -> None:
    if not condition:
        raise NetworkRefused(f"the model has {what}", "Use a model without it")


def _token(facts: Any, name: str) -> int | None:
    value = getattr(facts, name, None)
    # Some models have several tokens that end a text; the first stands for them.
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < facts.vocab_size else None
