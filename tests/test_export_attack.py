"""`tta-export attack`: it hurts whom it says, stays within its bound, repeats, and refuses what it cannot attack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from snapshots import unchanged
from tta_edge.suite.given import read_given
from tta_exporters.arguments import users_input
from tta_exporters.attack import AttackOptions, Victim, attack
from tta_exporters.cli import main
from tta_exporters.errors import NetworkRefused, OptionError
from tta_exporters.labelled import Labelled

CLASSES, N, BATCH = 3, 96, 32
USERS = users_input("1x6x6", "float32", None, "", "", False)

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(1, 6, 3), {norm}, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
"""


def small(norm):
    layers = (
        nn.Conv2d(1, 6, 3),
        norm,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def data():
    """Three kinds of stripes in noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, N)
    stripes = np.zeros((CLASSES, 6, 6))
    stripes[0, ::2], stripes[1, :, ::2], stripes[2] = 1, 1, np.eye(6)
    x = 255 * (0.3 * stripes[y] + 0.7 * rng.random((N, 6, 6)))
    return Labelled(x[:, None].astype(np.uint8), y.astype(np.int64), USERS)


def trained(network, data):
    torch.manual_seed(0)
    for layer in network:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    x, y = torch.from_numpy(data.x).float() / 255, torch.from_numpy(data.y)
    network.train()
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def network(data):
    return trained(small(nn.BatchNorm2d(6)), data)


def test_honest_samples_suffer_and_are_not_touched(network, data):
    made = attack(network, data, AttackOptions(share=0.4, batch=BATCH, seed=3))
    assert made.route == "statistics"
    assert made.before < 0.2
    assert made.after > made.before + 0.2
    assert made.x.shape == (N, 6, 6, 1)
    assert made.malicious.reshape(-1, BATCH).sum(axis=1).tolist() == [13, 13, 13]
    sent = {(image.tobytes(), int(label)) for image, label in zip(data.x, data.y, strict=True)}
    honest = ~made.malicious
    for image, label in zip(made.x[honest], made.y[honest], strict=True):
        assert (np.moveaxis(image, -1, 0).tobytes(), int(label)) in sent


def test_what_it_says_is_what_batch_statistics_make_of_the_stream(network, data):
    made = attack(network, data, AttackOptions(share=0.2, batch=BATCH, steps=5))
    x = torch.from_numpy(np.moveaxis(made.x, -1, 1).copy()).float() / 255
    wrong = []
    victim = Victim(network, USERS, None)
    with torch.no_grad():
        for k in range(0, N, BATCH):
            own = made.malicious[k : k + BATCH]
            predicted = victim.logits(x[k : k + BATCH]).argmax(1).numpy()
            wrong.append((predicted != made.y[k : k + BATCH])[~own])
    assert np.concatenate(wrong).mean() == pytest.approx(made.after)


@pytest.mark.parametrize("epsilon", [8 / 255, 0.1])
def test_no_pixel_leaves_the_bound(network, data, epsilon):
    free = attack(network, data, AttackOptions(batch=BATCH, epsilon=1.0))
    bound = attack(network, data, AttackOptions(batch=BATCH, epsilon=epsilon))
    order = np.random.Generator(np.random.Philox(key=0)).permutation(N)
    change = np.abs(np.moveaxis(bound.x, -1, 1).astype(int) - data.x[order].astype(int))
    assert 0 < change.max() <= epsilon * 255
    assert (change[~bound.malicious] == 0).all()
    assert bound.after <= free.after


def test_it_repeats_from_its_seed(network, data):
    options = AttackOptions(batch=BATCH, steps=3, seed=5)
    first, again = attack(network, data, options), attack(network, data, options)
    np.testing.assert_array_equal(first.x, again.x)
    other = attack(network, data, AttackOptions(batch=BATCH, steps=3, seed=6))
    assert (other.y != first.y).any()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6)])
def test_the_network_is_not_changed(data, norm):
    network = trained(small(norm), data)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    attack(network, data, AttackOptions(batch=BATCH, steps=2))
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_batch_norm_it_works_through_a_step(data):
    network = trained(small(nn.GroupNorm(2, 6)), data)
    made = attack(network, data, AttackOptions(batch=BATCH, steps=3))
    assert made.route == "step"
    order = np.random.Generator(np.random.Philox(key=0)).permutation(N)
    changed = (np.moveaxis(made.x, -1, 1) != data.x[order]).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, made.malicious)


def test_what_cannot_be_attacked(data):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    with pytest.raises(NetworkRefused, match="no normalisation layer"):
        attack(bare, data, AttackOptions())
    with pytest.raises(NetworkRefused, match="no BatchNorm"):
        attack(small(nn.GroupNorm(2, 6)), data, AttackOptions(route="statistics"))
    with pytest.raises(OptionError, match="two or more uint8 images"):
        attack(bare, Labelled(data.x.astype(np.float32), data.y, USERS), AttackOptions())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"share": 0.0}, "share is 0"),
        ({"share": 1.0}, "share is 1"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"batch": 1}, "batch is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"route": "gradient"}, "Give statistics or step"),
    ],
)
def test_options_out_of_range(values, words):
    with pytest.raises(OptionError, match=words):
        AttackOptions(**values)


# --------------------------------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path, network, data):
    (tmp_path / "models.py").write_text(MODEL.format(norm="nn.BatchNorm2d(6)"))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "images.npz", x=data.x[:, 0], y=data.y)
    return tmp_path


def words(place, *more):
    return [
        "attack", f"{place / 'models.py'}:small", "--weights", str(place / "w.safetensors"),
        "--images", str(place / "images.npz"), "--input", "1x6x6", "--classes", "3", "--batch", "32",
        "-o", str(place / "evil.npz"), *more,
    ]  # fmt: skip


def run(capsys, arguments):
    """Exit status and output."""
    try:
        main(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr()


def test_the_command_writes_what_the_suite_reads(place, capsys):
    status, output = run(capsys, words(place, "--limit", "64", "--share", "0.4", "--json"))
    assert status == 0, output.err
    form = json.loads(output.out)
    given = read_given(place / "evil.npz", CLASSES)
    assert given.name == "malicious/evil"
    assert form["samples"] == len(given.malicious) == 64
    assert form["malicious"] == int(given.malicious.sum()) == 26
    assert form["honest_error_after"] > form["honest_error_before"]
    assert given.order.sizes.tolist() == [32, 32]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--share", "2"], 2, "share is 2"),
        (["--route", "setp"], 2, "route is 'setp'"),
        (["--images", "nowhere.npz"], 2, "no labelled data in nowhere.npz"),
        (["-o", "no/such/evil.npz"], 2, "there is no directory"),
    ],
)
def test_what_the_command_refuses(place, capsys, more, status, message):
    with unchanged(place):
        found, output = run(capsys, words(place, *more))
    assert found == status
    assert message in output.err


def test_a_file_is_not_replaced(place, capsys):
    (place / "evil.npz").write_text("mine")
    with unchanged(place):
        status, output = run(capsys, words(place))
    assert (status, "exists" in output.err) == (2, True)
