"""Training a stream mapper: documents, resumable runs, files, and the two commands as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_exporters.adapter_file import read_tensors, write_tensors
from tta_exporters.errors import (
    CheckpointMismatch,
    Diverged,
    OptionError,
    SourceError,
    WeightsDoNotFit,
)
from tta_exporters.language_sources import read_decoder, write_decoder
from tta_exporters.texts import Documents, encoder, load_documents
from tta_exporters.train_stream import (
    StreamOptions,
    draw,
    make_mapper,
    read_mapper,
    train_stream,
    write_mapper,
)
from tta_exporters.training import Schedule, train
from tta_runtime import Bundle
from tta_runtime.errors import TokenizerRefused

CONFIG = DecoderConfig(
    vocabulary=257, layers=2, width=16, heads=2, kv_heads=2, head_width=8, hidden=24, context=64
)
OPTIONS = StreamOptions(chunk=8, chunks=3, texts=6, judged=4)
SETTINGS = {"rank": 2.0}


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    for value in decoder.parameters():
        if value.dim() == 2:
            nn.init.normal_(value, 0.0, 0.2)
    file = tmp_path_factory.mktemp("decoder") / "tiny.safetensors"
    write_decoder(file, decoder, begin=256)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that repeat one of six letters, in two directories."""
    root = tmp_path_factory.mktemp("text")
    for index in range(24):
        directory = root / ("even" if index % 2 == 0 else "odd")
        directory.mkdir(exist_ok=True)
        (directory / f"{index:02d}.txt").write_bytes(bytes([65 + index % 6]) * (40 + index))
    return root


def read(folder: Path) -> Documents:
    return load_documents([folder], encoder(None, 257), 24)


# ------------------------------------------------------------------------------------------------- documents


def test_documents_are_drawn_by_their_groups_and_only_whole_pieces(folder: Path) -> None:
    documents = read(folder)
    assert len(documents) == 24
    pieces = documents.draw(400, 24, seed=1)
    assert pieces.shape == (400, 24)
    assert bool((pieces == pieces[:, :1]).all())
    even = ((pieces[:, 0] - 65) % 2 == 0).float().mean()
    assert 0.4 < float(even) < 0.6
    assert torch.equal(pieces, documents.draw(400, 24, seed=1))
    assert not torch.equal(pieces, documents.draw(400, 24, seed=2))
    with pytest.raises(OptionError, match="has 100 tokens"):
        documents.draw(1, 100, seed=0)


def test_what_is_held_out_follows_from_names_and_patterns(folder: Path) -> None:
    kept, held = read(folder).split(0.25)
    assert 0 < len(held) < 12
    assert not kept.tokens.keys() & held.tokens.keys()
    assert len(kept) + len(held) == 24
    assert read(folder).split(0.25)[1].tokens.keys() == held.tokens.keys()
    kept, held = read(folder).split(0.0, ("odd/*",))
    assert {name.partition("/")[0] for name in held.tokens} == {"odd"}
    assert {name.partition("/")[0] for name in kept.tokens} == {"even"}
    assert kept.digest() != held.digest()


def test_documents_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no"):
        load_documents([tmp_path / "nothing"], encoder(None, 257), 1)
    (tmp_path / "short.txt").write_bytes(b"abc")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(OptionError, match="at least 4 tokens"):
        load_documents([tmp_path], encoder(None, 257), 4)
    assert load_documents([tmp_path], encoder(None, 257), 3).tokens["short.txt"].tolist() == [97, 98, 99]


def test_a_tokenizer_makes_the_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    assert encoder(tmp_path / "tokenizer.json", 3)(b"b a c").tolist() == [1, 0, 2]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TokenizerRefused):
        encoder(tmp_path / "broken.json", 3)
    with pytest.raises(TokenizerRefused):
        encoder(tmp_path / "tokenizer.json", 2)
    with pytest.raises(SourceError, match="cannot be read"):
        encoder(tmp_path / "absent.json", 3)


# ---------------------------------------------------------------------------------------------------- running


def quadratic(module: nn.Linear) -> Callable[[int], Tensor]:
    return lambda step: ((module.weight - step) ** 2).mean()


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = nn.Linear(3, 2)
    broken = nn.Linear(3, 2)
    broken.load_state_dict(whole.state_dict())
    schedule = Schedule(steps=12, lr=0.1, warm=3, checkpoint_every=100)
    assert train(whole, quadratic(whole), schedule, "m", tmp_path / "a") == 0

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, quadratic(broken), schedule, "m", tmp_path / "b", stop)
    fresh = nn.Linear(3, 2)
    assert train(fresh, quadratic(fresh), schedule, "m", tmp_path / "b") == 5
    assert torch.equal(fresh.weight, whole.weight)
    assert torch.equal(fresh.bias, broken.bias)


def test_the_update_is_adam_as_torch_has_it(tmp_path: Path) -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    schedule = Schedule(steps=8, lr=0.05, warm=2)
    optimiser = torch.optim.Adam(theirs.parameters(), lr=1.0, betas=(0.9, 0.95))
    for step in range(8):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        optimiser.zero_grad()
        loss = ((theirs(torch.ones(3)) - step) ** 2).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
    train(ours, lambda step: ((ours(torch.ones(3)) - step) ** 2).sum(), schedule, "m", tmp_path / "c")
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    module, schedule = nn.Linear(3, 2), Schedule(steps=4, checkpoint_every=2)
    train(module, quadratic(module), schedule, "one", tmp_path / "c")
    before = module.weight.detach().clone()
    for mark, change in (("other", {}), ("one", {"step": "x"}), ("one", {"format": "y"})):
        tensors, facts = read_tensors(tmp_path / "c")
        write_tensors(tmp_path / "d", tensors, {**facts, **change})
        with pytest.raises(CheckpointMismatch):
            train(module, quadratic(module), schedule, mark, tmp_path / "d")
    (tmp_path / "e").write_bytes(b"nonsense")
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        train(module, quadratic(module), schedule, "one", tmp_path / "e")
    assert torch.equal(module.weight, before)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(Diverged, match="step 3 of 9"):
        train(
            module,
            lambda step: module.weight.sum() * (float("nan") if step == 2 else 1.0),
            Schedule(steps=9, checkpoint_every=2),
            "m",
            tmp_path / "c",
        )
    assert read_tensors(tmp_path / "c")[1]["step"] == "2"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"warm": 0}])
def test_a_schedule_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Schedule(**{"steps": 5, **wrong})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- mappers


def test_training_a_mapper_repeats_and_judges(decoder_file: Path, folder: Path, tmp_path: Path) -> None:
    language = read_decoder(decoder_file)
    documents, schedule = read(folder).split(0.3), Schedule(steps=60, lr=2e-2, warm=5)
    found = []
    for run in range(2):
        mapper = make_mapper("attention", language.decoder, SETTINGS, seed=3)
        options = replace(OPTIONS, distil=0.0)
        found.append(
            train_stream(language.decoder, mapper, documents, 256, options, schedule, tmp_path / str(run))
        )
    one, two = (dict(each.mapper.named_parameters()) for each in found)
    assert all(torch.equal(one[name], two[name]) for name in one)
    judged = found[0].judged
    assert judged is not None
    assert judged.absorbed < judged.nothing
    assert not any(value.requires_grad for value in one.values())


def test_each_step_draws_its_own_number_of_chunks(folder: Path) -> None:
    documents = read(folder)
    shapes = {draw(documents, OPTIONS, step).shape for step in range(20)}
    assert shapes == {torch.Size([3, 2, 8]), torch.Size([2, 3, 8])}
    assert torch.equal(draw(documents, OPTIONS, 4), draw(documents, OPTIONS, 4))


def test_a_mapper_comes_back_from_its_file_for_its_decoder_only(decoder_file: Path, tmp_path: Path) -> None:
    decoder = read_decoder(decoder_file).decoder
    from tta_exporters.adapter_file import network_digest

    mapper = make_mapper("delta", decoder, SETTINGS, seed=1)
    file = tmp_path / "m.safetensors"
    write_mapper(file, mapper, SETTINGS, {"decoder": network_digest(decoder), "chunk": 8})
    again, facts = read_mapper(file, decoder)
    assert (again.name, again.rank, facts["chunk"]) == ("delta", 2, 8)
    for name, value in mapper.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
    other = Decoder(CONFIG)
    with pytest.raises(WeightsDoNotFit, match="trained on decoder"):
        read_mapper(file, other)
    tensors, told = read_tensors(file)
    for change, error in (
        ({"format": "x"}, "no mapper"),
        ({"mapper": "x"}, "the mapper is 'x'"),
        ({"settings": '{"rank": 0}'}, "rank is 0"),
        ({"settings": "["}, "damaged"),
    ):
        write_tensors(tmp_path / "w", tensors, {**told, **change})
        with pytest.raises(SourceError, match=error):
            read_mapper(tmp_path / "w", decoder)
    write_tensors(tmp_path / "w", {k: v for k, v in tensors.items() if k != "ups.0_o"}, told)
    with pytest.raises(WeightsDoNotFit, match="other tensors"):
        read_mapper(tmp_path / "w", decoder)


@pytest.mark.parametrize(
    "wrong", [{"chunk": 1}, {"chunks": 1}, {"texts": 2}, {"distil": -1.0}, {"held_out": 1.0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        replace(OPTIONS, **wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- commands


def command(*words: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tta_exporters.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_from_documents_to_a_bundle_by_commands(decoder_file: Path, folder: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [
        "train-stream", decoder_file, "--text", folder, "--mapper", "delta", "--set", "rank=2", "--steps", "8",
        "--chunk", "8", "--chunks", "3", "--texts", "6", "--held-out", "0.3", "--checkpoint-every", "1", "--json",
        "-o", tmp_path / "m.safetensors",
    ]  # fmt: skip
    done = command(*words)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    told = json.loads(out)
    assert told["resumed_from"] == 0
    assert told["documents"] + told["held_out"] == 24
    assert not (tmp_path / "m.safetensors.checkpoint").exists()
    built = command("build-text", decoder_file, "--mapper", tmp_path / "m.safetensors", "-o", tmp_path / "b")
    out, err = built.communicate(timeout=300)
    assert built.returncode == 0, err
    bundle = Bundle.open(tmp_path / "b")
    text = bundle.manifest.text
    assert text is not None
    assert (text.chunk, text.begin, text.context, bundle.manifest.theta.size) == (8, 256, 64, told["theta"])
    again = command(*words)
    out, err = again.communicate(timeout=120)
    assert (again.returncode, "exists" in err) == (2, True)


def test_an_interrupted_command_goes_on(decoder_file: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "m.checkpoint"
    reached = [0]
    for _ in range(2):
        running = command(
            "train-stream", decoder_file, "--text", folder, "--set", "rank=2", "--steps", "100000", "--chunk", "8",
            "--chunks", "3", "--texts", "6", "--checkpoint-every", "1", "-o", tmp_path / "m",
        )  # fmt: skip
        while not checkpoint.exists() or int(read_tensors(checkpoint)[1]["step"]) <= reached[-1]:
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        assert (running.returncode, "Run the same command" in err) == (130, True)
        reached.append(int(read_tensors(checkpoint)[1]["step"]))
    assert 0 < reached[1] < reached[2]
    assert not (tmp_path / "m").exists()
