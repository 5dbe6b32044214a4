"""Stream mappers: what a context becomes, chunk by chunk, and the bundle they are compiled into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_adapters.stream import MAPPERS, AttentionMapper, DeltaMapper, StreamMapper, key, weight_of
from tta_adapters.stream_objective import Weights, absorbed_downs, led, objective
from tta_exporters.build_text import TextOptions, absorb_once, build_text
from tta_exporters.errors import NetworkRefused, OptionError, OutputExists, SourceError
from tta_runtime import Bundle
from tta_runtime.engine_ort import OrtEngine

CONFIG = DecoderConfig(
    vocabulary=257, layers=2, width=32, heads=4, kv_heads=2, head_width=8, hidden=48, context=128
)
CHUNK, BEGIN = 24, 256
KINDS = list(MAPPERS)


def random_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval().requires_grad_(False)
    for value in decoder.parameters():
        if value.dim() == 2:
            nn.init.normal_(value, 0.0, 0.2)
    return decoder


def mapper_of(decoder: Decoder, kind: str, *, trained: bool = True, **options: float) -> StreamMapper:
    """A mapper; "trained" is one whose up halves are not zero."""
    torch.manual_seed(1)
    mapper = MAPPERS[kind](decoder, rank=4, **options)  # type: ignore[arg-type]
    if trained:
        for value in mapper.ups.values():
            nn.init.normal_(value, 0.0, 0.2)
    return mapper


def texts(count: int, chunks: int) -> Tensor:
    return torch.randint(0, 256, (count, chunks, CHUNK), generator=torch.Generator().manual_seed(2))


def test_zero_theta_is_the_network_bit_for_bit() -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, "attention")
    tokens = texts(2, 1)[:, 0]
    nothing = mapper.updates(mapper.downs(mapper.initial(2)))
    assert torch.equal(decoder(tokens, updates=nothing).logits, decoder(tokens).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_mapper_changes_nothing(kind: str) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind, trained=False)
    tokens = texts(1, 2)
    heard = decoder(led(tokens[:, 0], BEGIN)).heard
    downs = mapper.downs(mapper.absorb(heard, mapper.initial(1)))
    assert bool((mapper.pack(downs) != 0).any())
    continued = led(tokens[:, 1], BEGIN)
    assert torch.equal(decoder(continued, updates=mapper.updates(downs)).logits, decoder(continued).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_by_chunk_is_the_whole(kind: str) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind)
    tokens = texts(2, 3)
    heard = decoder(led(tokens.flatten(0, 1), BEGIN)).heard
    at_once = absorbed_downs(mapper, heard, 2, 3)
    for text in range(2):
        state = mapper.initial(1)
        for chunk in range(3):
            state = mapper.absorb(decoder(led(tokens[text : text + 1, chunk], BEGIN)).heard, state)
            for layer, down in mapper.downs(state).items():
                torch.testing.assert_close(down[0], at_once[layer][3 * text + chunk], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_as_large_after_one_chunk_as_after_twenty(kind: str) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind)
    state = mapper.initial(1)
    shapes = {name: value.shape for name, value in state.items()}
    heard = decoder(led(texts(1, 1)[:, 0], BEGIN)).heard
    for _ in range(20):
        state = mapper.absorb(heard, state)
    assert {name: value.shape for name, value in state.items()} == shapes
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_chunks_matters(kind: str) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind)
    tokens = texts(1, 2)

    def theta(order: list[int]) -> Tensor:
        heard = decoder(led(tokens[0, order], BEGIN)).heard
        return torch.cat([d[-1].flatten() for d in absorbed_downs(mapper, heard, 1, 2).values()])

    assert not torch.allclose(theta([0, 1]), theta([1, 0]), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_update_is_larger_than_the_cap(kind: str) -> None:
    decoder = random_decoder()
    heard = decoder(led(texts(2, 1)[:, 0], BEGIN)).heard
    free, capped = mapper_of(decoder, kind, cap=1e9), mapper_of(decoder, kind, cap=0.01)
    state = free.absorb(heard, free.initial(2))
    for layer, down in free.downs(state).items():
        up, weight = free.ups[key(*layer)], weight_of(decoder, *layer)
        size = torch.stack([(up @ one).norm() / weight.norm() for one in down])
        torch.testing.assert_close(free.ratio(down, *layer), size, rtol=1e-4, atol=1e-6)
        assert float(size.min()) > 0.01
        small = capped.downs(state)[layer]
        torch.testing.assert_close(capped.ratio(small, *layer), torch.full((2,), 0.01), rtol=1e-4, atol=0)
        scale = small.norm(dim=(1, 2)) / down.norm(dim=(1, 2))
        torch.testing.assert_close(small, down * scale[:, None, None], rtol=1e-4, atol=1e-6)


def test_packing_and_unpacking_are_inverse() -> None:
    mapper = mapper_of(random_decoder(), "attention")
    theta = torch.randn(3, mapper.size)
    assert torch.equal(mapper.pack(mapper.unpack(theta)), theta)


def test_the_delta_rule_by_hand() -> None:
    """One token at a time, S <- keep S + beta (v - S k) k^T, against loops in numpy."""
    decoder = random_decoder()
    torch.manual_seed(3)
    mapper = DeltaMapper(decoder, rank=4, group=1)
    nn.init.normal_(mapper.writes["1_down"].weight, 0.0, 0.3)  # type: ignore[arg-type]
    heard = decoder(led(texts(1, 1)[:, 0], BEGIN)).heard
    found = mapper.absorb(heard, mapper.initial(1))["1_down"][0].detach().numpy()

    def weights(module: nn.Module) -> list[np.ndarray]:
        return [value.detach().double().numpy() for value in module.parameters()]

    inputs = heard[1].inputs["down"][0].double().numpy()
    outputs = heard[1].output[0].double().numpy()
    rms = lambda x: x / np.sqrt((x * x).mean() + 1e-6)  # noqa: E731
    (keys,), (values,) = weights(mapper.keys["1_down"]), weights(mapper.values["1_down"])
    write, bias = weights(mapper.writes["1_down"])
    s = np.zeros((4, 4))
    for now in range(len(inputs) - 1):
        pair = np.concatenate([rms(outputs[now]), rms(outputs[now + 1])])
        k = keys @ rms(inputs[now])
        k = k / np.sqrt((k * k).sum() + 1e-6)
        beta, keep = 1 / (1 + np.exp(-(write @ pair + bias)))
        s = keep * s + beta * np.outer(values @ pair - s @ k, k)
    np.testing.assert_allclose(found, s, rtol=1e-4, atol=1e-5)


def test_attention_by_hand() -> None:
    """The first chunk: (1 - keep) of the summary, whose rows are means of values weighted by what comes next."""
    decoder = random_decoder()
    torch.manual_seed(4)
    mapper = AttentionMapper(decoder, rank=3, heads=2, key_width=4, width=6)
    heard = decoder(led(texts(1, 1)[:, 0], BEGIN)).heard
    found = mapper.absorb(heard, mapper.initial(1))["0_o"][0]
    outputs, inputs = heard[0].output[0], heard[0].inputs["o"][0]
    rms = lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)  # noqa: E731
    pairs = torch.cat([rms(outputs)[:-1], rms(outputs)[1:]], 1)
    keys = mapper.keys[0](pairs).reshape(-1, 2, 4)
    values = mapper.values["0_o"](rms(inputs[:-1])).reshape(-1, 2, 3)
    rows = []
    for row in range(3):
        parts = []
        for head in range(2):
            weight = torch.softmax(keys[:, head] @ mapper.queries["0_o"][head, row] / 2.0, 0)
            parts.append(weight @ values[:, head])
        rows.append(rms(torch.cat(parts)))
    keep = torch.sigmoid(torch.tensor(1.5))
    torch.testing.assert_close(found, (1 - keep) * torch.stack(rows), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("begin", [BEGIN, None], ids=["begin", "no-begin"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_teaches_to_continue_what_was_heard(kind: str, begin: int | None) -> None:
    """Each text repeats a chunk of its own: what was absorbed says what comes, the network alone cannot know."""
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind, trained=False)
    optimiser = torch.optim.Adam(mapper.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(60):
        letters = torch.randint(0, 4, (8, 1, 1), generator=generator) * 50
        loss = objective(
            decoder, mapper, letters.expand(8, 2, CHUNK).contiguous(), begin, Weights(distil=0.0)
        )
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.absorbed))
    assert losses[-1] < losses[0] - 1.0


def test_the_parts_of_the_loss_are_zero_where_both_networks_agree() -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, "attention", trained=False)
    tokens = texts(2, 2)
    plain = objective(decoder, mapper, tokens, BEGIN, Weights(0.0, 0.0))
    both = objective(decoder, mapper, tokens, BEGIN, Weights(1.0, 1.0))
    assert float(plain.total) == pytest.approx(float(plain.absorbed))
    assert float(both.total) > float(plain.total)
    whole = decoder(led(tokens.flatten(1), BEGIN)[:, :-1]).logits[:, CHUNK:]
    full = nn.functional.cross_entropy(whole.flatten(0, 1), tokens[:, 1].flatten())
    assert float(plain.full) == pytest.approx(float(full), rel=1e-5)


def test_gradients_reach_every_tensor_of_a_mapper() -> None:
    decoder = random_decoder()
    for kind in KINDS:
        mapper = mapper_of(decoder, kind)
        for name, value in mapper.named_parameters():
            if "gates" in name or "writes" in name:
                nn.init.normal_(value, 0.0, 0.1)
        objective(decoder, mapper, texts(2, 3), BEGIN, Weights(1.0, 1.0)).total.backward()
        silent = [
            n for n, v in mapper.named_parameters() if v.grad is None or not bool(v.grad.abs().sum() > 0)
        ]
        assert silent == []


# --------------------------------------------------------------------------------------------------- bundles


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_graphs_agree_with_torch(kind: str, tmp_path: Path) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, kind).requires_grad_(False)
    sealed = build_text(decoder, mapper, TextOptions("tiny", CHUNK, begin=BEGIN), tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest == sealed
    assert (sealed.task, sealed.default_method, sealed.theta.size) == ("text", "stream", mapper.size)
    forward, absorb = OrtEngine(bundle, "forward"), OrtEngine(bundle, "absorb")
    tokens = texts(1, 3)[0]
    theirs = {name: value[0] for name, value in mapper.initial(1).items()}
    ours = {f"state.{name}": value.numpy() for name, value in theirs.items()}
    for chunk in tokens:
        got = absorb.run({"x": chunk[None].numpy(), **ours})
        theta, *after, report = absorb_once(decoder, mapper, BEGIN, chunk[None], theirs)
        theirs = dict(zip(theirs, after, strict=True))
        np.testing.assert_allclose(got["theta_out"], theta.numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got["report"], report.numpy(), rtol=1e-3, atol=1e-5)
        ours = {name: got[name.replace("state.", "state_out.")] for name in ours}
    vector = mapper.pack(mapper.downs({name: value[None] for name, value in theirs.items()}))
    cache = np.zeros((2, 2, 1, 2, 0, 8), np.float32)
    past: Tensor | None = None
    for piece in (tokens[0, :7], tokens[0, 7:8], tokens[0, 8:]):
        got = forward.run({"x": piece[None].numpy(), "theta": vector[0].numpy(), "cache": cache})
        expected = decoder(piece[None], past, mapper.updates(mapper.unpack(vector)))
        np.testing.assert_allclose(got["logits"], expected.logits.numpy(), rtol=1e-3, atol=1e-4)
        cache, past = got["cache_out"], expected.cache


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (TextOptions("t", chunk=1), "chunk is 1"),
        (TextOptions("t", chunk=128), "chunk is 128"),
        (TextOptions("t", chunk=24, context=129), "context 129"),
        (TextOptions("t", chunk=24, begin=257), "begin is token 257"),
        (TextOptions("t", chunk=24, end=-1), "end is token -1"),
    ],
)
def test_options_that_do_not_fit_the_decoder_are_refused(
    options: TextOptions, what: str, tmp_path: Path
) -> None:
    decoder = random_decoder()
    with pytest.raises(OptionError, match=what):
        build_text(decoder, mapper_of(decoder, "delta"), options, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    decoder = random_decoder()
    mapper = mapper_of(decoder, "delta").requires_grad_(False)
    with pytest.raises(SourceError, match="no-such-file"):
        build_text(
            decoder, mapper, TextOptions("t", CHUNK, tokenizer=tmp_path / "no-such-file"), tmp_path / "b"
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(OutputExists):
        build_text(decoder, mapper, TextOptions("t", CHUNK), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]
    mapper.ups["0_o"].data[0, 0] = float("nan")
    with pytest.raises(NetworkRefused, match=r"ups\.0_o"):
        build_text(decoder, mapper, TextOptions("t", CHUNK), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_mapper_of_no_rank_is_refused() -> None:
    decoder = random_decoder()
    for wrong in ({"rank": 0}, {"cap": 0.0}, {"cap": float("nan")}):
        with pytest.raises(ValueError, match="rank is"):
            AttentionMapper(decoder, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide"):
        AttentionMapper(decoder, width=130, heads=4)
    with pytest.raises(ValueError, match="group is 0"):
        DeltaMapper(decoder, group=0)
