"""The norm adapter and selection: what theta is, in which order, and that un-adapted output is the network's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import CLASSES, NETWORKS, SIZE, resnet
from tta_adapters.norm import NormAdapter, statistics_gap
from tta_adapters.normalise import moments
from tta_adapters.select import SelectionError, describe, select_modules


def batch(size: int = 5) -> torch.Tensor:
    return torch.rand([size, 3, SIZE, SIZE], generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("name", NETWORKS)
def test_unadapted_output_is_the_networks_own(name: str) -> None:
    network = NETWORKS[name]()
    adapter = NormAdapter(network)
    with torch.no_grad():
        found = adapter.forward(adapter.unpack(adapter.source_theta()), batch())
        expected = network(batch())
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert found.features.shape[0] == 5
    assert found.features.dim() == 2


def test_trained_tensors_come_first_and_statistics_follow() -> None:
    adapter = NormAdapter(resnet())
    trained = [entry.trained for entry in adapter.tensors]
    assert trained == sorted(trained, reverse=True)
    assert adapter.size == sum(entry.size for entry in adapter.tensors)
    assert [entry.kind for entry in adapter.tensors if not entry.trained] == ["mean"] * 7 + ["var"] * 7
    offsets = [entry.offset for entry in adapter.tensors]
    assert offsets == [sum(entry.size for entry in adapter.tensors[:i]) for i in range(len(offsets))]


def test_pack_is_the_inverse_of_unpack() -> None:
    adapter = NormAdapter(resnet())
    theta = torch.rand(adapter.size)
    assert torch.equal(adapter.pack(adapter.unpack(theta)), theta)


def test_batch_statistics_equal_torch_training_mode() -> None:
    network = resnet()
    adapter = NormAdapter(network)
    found = adapter.forward(adapter.unpack(adapter.source_theta()), batch(), statistics="batch")
    network.train()
    torch.testing.assert_close(found.logits, network(batch()), rtol=1e-5, atol=1e-6)
    assert len(found.statistics) == 7


def test_blend_interpolates_between_running_and_batch_statistics() -> None:
    adapter = NormAdapter(resnet())
    tensors = adapter.unpack(adapter.source_theta())
    running = adapter.forward(tensors, batch()).logits
    only_batch = adapter.forward(tensors, batch(), statistics="batch").logits
    torch.testing.assert_close(
        adapter.forward(tensors, batch(), statistics=torch.tensor(0.0)).logits, running
    )
    torch.testing.assert_close(
        adapter.forward(tensors, batch(), statistics=torch.tensor(1.0)).logits, only_batch
    )
    between = adapter.forward(tensors, batch(), statistics=torch.tensor(0.5)).logits
    assert not torch.allclose(between, running)
    assert not torch.allclose(between, only_batch)


def test_a_batchnorm_left_out_of_training_still_follows_the_statistics() -> None:
    adapter = NormAdapter(resnet(), exclude=["4.*"])
    assert not any(entry.name.startswith("4.") and entry.trained for entry in adapter.tensors)
    assert any(entry.name == "4.bn1.running_mean" for entry in adapter.tensors)


def test_the_users_network_is_left_alone() -> None:
    network = resnet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adapter = NormAdapter(network)
    adapter.forward(adapter.unpack(adapter.source_theta() + 1), batch(), statistics="batch")
    assert network.training
    assert all(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_statistics_gap_is_zero_on_the_running_statistics_and_counts_in_standard_deviations() -> None:
    running = torch.cat([torch.zeros(4), 4 * torch.ones(4)])
    observed = torch.cat([torch.full([4], 6.0), torch.ones(4)])
    assert float(statistics_gap(running, running)) == 0.0
    assert float(statistics_gap(running, observed)) == pytest.approx(3.0, rel=1e-4)


def test_moments_are_biased() -> None:
    x = torch.rand(6, 3, 4, 4)
    mean, var = moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), unbiased=False))


def test_a_network_without_norm_layers_is_refused_by_name() -> None:
    with pytest.raises(SelectionError, match="no module selected"):
        NormAdapter(nn.Sequential(nn.Flatten(), nn.Linear(3, CLASSES)))


def test_patterns_that_match_nothing_list_the_candidates() -> None:
    with pytest.raises(SelectionError, match="among 7 modules"):
        NormAdapter(resnet(), include=["layer9*"])


def test_norm_layers_without_affine_parameters_are_refused() -> None:
    with pytest.raises(SelectionError, match="no affine parameters"):
        NormAdapter(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)))


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(SelectionError, match="'classifier' is no module"):
        NormAdapter(resnet(), head="classifier")


def test_the_selection_is_printable() -> None:
    network = resnet()
    text = describe(select_modules(network, (nn.BatchNorm2d,), include=["4.*"]))
    assert "4.bn1" in text
    assert "BatchNorm2d" in text
    assert "weight[16]" in text
    assert text.endswith("3 modules, 96 parameters")
