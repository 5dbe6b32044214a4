"""LoRA, ViDA and side adapters: un-adapted output bit for bit, what is trained, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import NETWORKS, SIZE, mobilenet, resnet, vit
from tta_adapters import METHODS, NormAdapter, make_adapter, make_method
from tta_adapters.base import Adapter, Batch, gradient, init_state
from tta_adapters.network import NetworkAdapter, TensorsDoNotFit
from tta_adapters.options import UnknownOptionError
from tta_adapters.select import SelectionError
from tta_adapters.shelf import UnknownAdapterError, adapter_options
from tta_adapters.vida import Scales, VidaAdapter

SMALL = {"lora": {"rank": 2.0}, "vida": {"low": 1.0, "high": 3.0}, "side": {"width": 6.0}, "full": {}}
SHAPE = (3, SIZE, SIZE)


def batch(size: int = 5) -> Tensor:
    return torch.rand([size, *SHAPE], generator=torch.Generator().manual_seed(size))


def made(name: str, network: nn.Module, **options: float) -> NetworkAdapter:
    return make_adapter(name, network, {**SMALL[name], **options}, input_shape=SHAPE)


def moved(adapter: NetworkAdapter, seed: int = 0) -> Tensor:
    """A theta whose trained part is away from its start."""
    theta = adapter.source_theta()
    noise = 0.3 * torch.randn(adapter.trained, generator=torch.Generator().manual_seed(seed))
    return torch.cat([theta[: adapter.trained] + noise, theta[adapter.trained :]])


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SMALL)
def test_unadapted_output_is_bit_identical(name: str, network: str, statistics: str) -> None:
    source = NETWORKS[network]()
    adapter, norm = made(name, source), NormAdapter(source)
    assert isinstance(adapter, Adapter)
    with torch.no_grad():
        found = adapter.forward(adapter.unpack(adapter.source_theta()), batch(), statistics=statistics)  # type: ignore[arg-type]
        plain = norm.forward(norm.unpack(norm.source_theta()), batch(), statistics=statistics)  # type: ignore[arg-type]
    assert torch.equal(found.logits, plain.logits)
    assert torch.equal(found.features, plain.features)
    assert found.statistics.keys() == plain.statistics.keys()


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["lora", "vida"])
def test_branches_beside_the_layers_add_nothing_at_the_start(
    name: str, network: str, statistics: str
) -> None:
    # With gradients, as in a step: branches stand beside their layers instead of being merged into weights.
    source = NETWORKS[network]()
    found, plain = (
        each.forward(each.unpack(each.source_theta()), batch(), statistics=statistics)  # type: ignore[arg-type]
        for each in (made(name, source), NormAdapter(source))
    )
    assert torch.equal(found.logits, plain.logits)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["lora", "vida"])
def test_a_branch_merged_into_a_weight_is_the_branch_beside_it(name: str, network: str) -> None:
    adapter = made(name, NETWORKS[network]())
    tensors = adapter.unpack(moved(adapter))
    beside = adapter.forward(tensors, batch()).logits.detach()
    with torch.no_grad():
        merged = adapter.forward(tensors, batch()).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5 * float(beside.abs().max()))
    assert (beside - NETWORKS[network]()(batch()).detach()).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_theta_ends_with_the_running_statistics_of_every_batchnorm(name: str) -> None:
    adapter, norm = made(name, resnet()), NormAdapter(resnet())
    assert [entry.name for entry in adapter.tensors if not entry.trained] == [
        entry.name for entry in norm.tensors if not entry.trained
    ]
    assert torch.equal(adapter.source_theta()[adapter.trained :], norm.source_theta()[norm.trained :])
    assert adapter.has_running_statistics


@pytest.mark.parametrize("name", SMALL)
def test_equal_builds_start_from_equal_numbers(name: str) -> None:
    one, other = made(name, resnet()), made(name, resnet().double())
    assert torch.equal(one.source_theta(), other.source_theta())


@pytest.mark.parametrize("network", ["resnet", "vit", "convnext"])
@pytest.mark.parametrize("name", SMALL)
def test_every_trained_tensor_has_a_gradient_once_it_has_moved(name: str, network: str) -> None:
    adapter = made(name, NETWORKS[network]())
    tensors = adapter.unpack(moved(adapter))
    loss = F.cross_entropy(adapter.forward(tensors, batch()).logits, torch.arange(5))
    grad = gradient(loss, adapter, tensors)
    for entry in adapter.tensors:
        if entry.trained:
            assert grad[entry.offset : entry.offset + entry.size].abs().max() > 0, entry.name


def test_lora_is_a_low_rank_change_of_the_weights() -> None:
    network = vit()
    adapter = make_adapter("lora", network, {"rank": 2.0, "alpha": 6.0}, input_shape=SHAPE)
    tensors = adapter.unpack(moved(adapter))
    for path in ("patch", "blocks.0.qkv", "blocks.1.fc2"):
        module = network.get_submodule(path)
        update = tensors[f"{path}.lora_up"].flatten(1) @ tensors[f"{path}.lora_down"].flatten(1)
        assert torch.linalg.matrix_rank(update) == 2
    for item in adapter.selection:  # type: ignore[attr-defined]
        module = network.get_submodule(item.name)
        up, down = tensors[f"{item.name}.lora_up"], tensors[f"{item.name}.lora_down"]
        module.weight.data += 3.0 * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape).detach()
    torch.testing.assert_close(
        adapter.forward(tensors, batch()).logits, network(batch()), rtol=1e-4, atol=1e-5
    )


def test_a_strided_padded_convolution_has_a_branch_like_itself() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 2, dilation=2), nn.Flatten(), nn.Linear(6 * 49, 4))
    network[2] = nn.Linear(network[:2](torch.zeros(1, 3, 9, 9)).shape[1], 4)
    adapter = make_adapter("lora", network, {"rank": 2.0, "alpha": 2.0}, input_shape=(3, 9, 9))
    tensors = adapter.unpack(moved(adapter))
    x = torch.rand(4, 3, 9, 9)
    weight = (tensors["0.lora_up"].flatten(1) @ tensors["0.lora_down"].flatten(1)).reshape(6, 3, 3, 3)
    network[0].weight.data += weight.detach()
    torch.testing.assert_close(adapter.forward(tensors, x).logits, network(x))


def test_classifier_groups_and_multihead_attention_are_left_as_they_are() -> None:
    names = [item.name for item in made("lora", mobilenet()).selection]  # type: ignore[attr-defined]
    assert names == ["0", "3", "9"]

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)[:, None]
            return self.head(self.attention(y, y, y)[0][:, 0])

    adapter = make_adapter("lora", Attends())
    assert [item.name for item in adapter.selection] == ["first"]  # type: ignore[attr-defined]
    adapter.forward(adapter.unpack(adapter.source_theta()), torch.rand(2, 6))


def test_a_layer_that_is_not_called_is_refused_by_name() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.odd.weight)

    adapter = make_adapter("lora", Reads())
    with pytest.raises(SelectionError, match="computes odd without calling"):
        adapter.forward(adapter.unpack(adapter.source_theta()), torch.rand(2, 6))


def test_vidas_scales_are_one_pair_for_each_sample() -> None:
    adapter = made("vida", vit())
    assert isinstance(adapter, VidaAdapter)
    tensors = adapter.unpack(moved(adapter))
    x = batch()
    low, high = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0]), torch.tensor([2.0, 1.0, 0.0, 1.5, 0.0])
    together = adapter.forward(tensors, x, scales=Scales(low, high)).logits
    for k in range(5):
        alone = adapter.forward(tensors, x[k : k + 1], scales=Scales(low[k : k + 1], high[k : k + 1])).logits
        torch.testing.assert_close(together[k : k + 1], alone)
    plain = adapter.forward(tensors, x).logits
    torch.testing.assert_close(together[1], plain[1])
    assert all((together[k] - plain[k]).abs().max() > 1e-4 for k in (0, 2, 3, 4))


@pytest.mark.parametrize("branch", ["low", "high"])
def test_a_scale_of_zero_is_that_branch_left_out(branch: str) -> None:
    both = made("vida", resnet())
    assert isinstance(both, VidaAdapter)
    tensors = both.unpack(moved(both))
    off = {"low": Scales(torch.ones(5), torch.zeros(5)), "high": Scales(torch.zeros(5), torch.ones(5))}
    one = made("vida", resnet(), **{"high" if branch == "low" else "low": 0.0})
    left = {entry.name: tensors[entry.name] for entry in one.tensors}
    torch.testing.assert_close(
        both.forward(tensors, batch(), scales=off[branch]).logits, one.forward(left, batch()).logits
    )
    assert not any(f"vida_{'high' if branch == 'low' else 'low'}" in entry.name for entry in one.tensors)


def test_scales_where_no_axis_is_the_sample_are_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x.reshape(-1, 3)).reshape(x.shape).mean(1))

    adapter = made("vida", Windows())
    assert isinstance(adapter, VidaAdapter)
    with pytest.raises(SelectionError, match="inner works on 8 pieces for 2 samples"):
        adapter.forward(
            adapter.unpack(adapter.source_theta()),
            torch.rand(2, 4, 3),
            scales=Scales(torch.ones(2), torch.ones(2)),
        )


@pytest.mark.parametrize("network", NETWORKS)
def test_no_gradient_enters_the_network_beside_the_side_network(network: str) -> None:
    source = NETWORKS[network]()
    adapter = made("side", source)
    tensors = adapter.unpack(moved(adapter))
    touched: list[str] = []
    for name, module in adapter.module.named_modules():
        module.register_forward_hook(
            lambda _, __, y, name=name: (
                touched.append(name)
                if isinstance(y, Tensor) and y.requires_grad and y.grad_fn is not None
                else None
            )
        )
    adapter.forward(tensors, batch())
    head = [name for name, module in source.named_modules() if isinstance(module, nn.Linear)][-1]
    assert set(touched) <= {"", head}
    assert head in touched


def test_the_gate_alone_learns_first_and_opens_the_ladder() -> None:
    adapter = made("side", vit())
    tensors = adapter.unpack(adapter.source_theta())
    loss = F.cross_entropy(adapter.forward(tensors, batch()).logits, torch.arange(5))
    grad = gradient(loss, adapter, tensors)
    alive = {
        e.name for e in adapter.tensors if e.trained and grad[e.offset : e.offset + e.size].abs().max() > 0
    }
    assert alive == {"gate"}


def test_rungs_stand_behind_the_blocks_and_are_spread_evenly() -> None:
    def rungs(network: nn.Module, **options: float) -> list[str]:
        return made("side", network, **options)._rungs  # type: ignore[attr-defined, no-any-return]

    assert rungs(vit()) == ["blocks.0", "blocks.1"]
    assert rungs(vit(), rungs=1.0) == ["blocks.1"]
    assert rungs(mobilenet()) == ["0", "3", "6", "9"]
    chosen = make_adapter("side", vit(), SMALL["side"], input_shape=SHAPE, include=["patch", "*.fc1"])
    assert chosen._rungs == ["patch", "blocks.0.fc1", "blocks.1.fc1"]  # type: ignore[attr-defined]


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class First(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0]


REFUSED_SIDES = {
    "no shape": (lambda: make_adapter("side", vit()), "needs `input_shape`"),
    "no classifier": (
        lambda: make_adapter("side", nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), input_shape=SHAPE),
        "linear classifier",
    ),
    "no tensor": (
        lambda: make_adapter(
            "side",
            nn.Sequential(nn.Flatten(), Tuple(), First(), nn.Linear(48, 4)),
            input_shape=(3, 4, 4),
            include=["1"],
        ),
        "'1' returns no tensor",
    ),
    "nothing": (
        lambda: make_adapter("side", vit(), input_shape=SHAPE, include=["layer9"]),
        "no module selected",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SIDES)
def test_a_side_network_that_cannot_be_is_refused(case: str) -> None:
    make, says = REFUSED_SIDES[case]
    with pytest.raises(SelectionError, match=says):
        make()


BAD_OPTIONS = [
    ("lora", {"rank": "0"}, "lora.rank is 0: a whole number from 1"),
    ("lora", {"rank": "1.5"}, "a whole number from 1"),
    ("lora", {"rnk": "1"}, "adapter lora has no option 'rnk', did you mean 'rank'"),
    ("lora", {"rank": "many"}, "lora.rank='many' is not a number"),
    ("vida", {"low": "0", "high": "0"}, "give one of them a rank"),
    ("vida", {"low": "-1"}, "a whole number from 0"),
    ("side", {"width": "0"}, "side.width is 0"),
    ("side", {"rungs": "0.5"}, "side.rungs"),
    ("norm", {"rank": "1"}, "adapter norm has no option 'rank'"),
    ("full", {"rank": "1"}, "adapter full has no option 'rank'"),
]


@pytest.mark.parametrize(("name", "options", "says"), BAD_OPTIONS)
def test_a_bad_option_of_an_adapter_is_refused_with_its_value(
    name: str, options: dict[str, str], says: str
) -> None:
    with pytest.raises(UnknownOptionError, match=says):
        make_adapter(name, vit(), options, input_shape=SHAPE)


def test_an_unknown_adapter_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownAdapterError, match="did you mean 'lora'"):
        make_adapter("loar", vit())
    assert adapter_options("lora") == {"rank": 4.0, "alpha": 4.0}
    assert adapter_options("norm") == {}


def test_patterns_choose_the_layers_with_branches() -> None:
    adapter = make_adapter("lora", vit(), include=["blocks.*"], exclude=["*.fc?"])
    assert [item.name for item in adapter.selection] == [  # type: ignore[attr-defined]
        "blocks.0.qkv",
        "blocks.0.proj",
        "blocks.1.qkv",
        "blocks.1.proj",
    ]
    with pytest.raises(SelectionError, match="no module selected"):
        make_adapter("lora", vit(), include=["decoder*"])


def test_full_is_every_parameter_of_the_network() -> None:
    network = resnet()
    adapter = made("full", network)
    named = {entry.name: entry.shape for entry in adapter.tensors if entry.trained}
    assert named == {name: tuple(value.shape) for name, value in network.named_parameters()}
    chosen = make_adapter("full", network, include=["4.*"], exclude=["*.bias"])
    assert all(e.name.startswith("4.") and e.kind == "weight" for e in chosen.tensors if e.trained)
    with pytest.raises(SelectionError, match="no parameter selected"):
        make_adapter("full", network, include=["decoder*"])


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_replace_nothing(spoil: str) -> None:
    adapter = made("lora", vit())
    before = adapter.source_theta()
    tensors = {entry.name: torch.ones(entry.shape) for entry in adapter.tensors if entry.trained}
    first = next(iter(tensors))
    if spoil == "missing":
        del tensors[first]
    elif spoil == "unknown":
        tensors["stranger"] = torch.ones(1)
    else:
        tensors[first] = torch.ones(3)
    says = {"missing": "1 tensors of adapter lora missing", "unknown": "1 unknown", "shape": r"is \[3\]"}
    with pytest.raises(TensorsDoNotFit, match=says[spoil]):
        adapter.start_from(tensors)
    assert torch.equal(adapter.source_theta(), before)


def test_an_adapter_starts_from_given_tensors() -> None:
    adapter = made("side", resnet())
    theta = moved(adapter)
    named = adapter.unpack(theta)
    adapter.start_from({entry.name: named[entry.name] for entry in adapter.tensors if entry.trained})
    assert torch.equal(adapter.source_theta(), theta)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vida"])
@pytest.mark.parametrize("name", SMALL)
def test_every_method_steps_on_every_adapter(name: str, method: str) -> None:
    adapter = made(name, resnet())
    ours = make_method(method, adapter)
    if method == "auto" and name in ("side", "full"):  # their theta holds weights that no normalisation uses
        with pytest.raises(SelectionError, match="no normalisation by it was seen"):
            ours.calibrate([batch(8)])
        return
    if hasattr(ours, "calibrate"):
        ours.calibrate([batch(8)])
    theta = moved(adapter)
    state = init_state(ours.spec, theta)
    out = ours.step(
        Batch(batch(8), torch.ones(8), torch.rand(8, 7)),
        theta,
        state,
        ours.anchor(),
        ours.spec.default_hyper(),
        torch.full([ours.spec.rand], 0.5),
    )
    assert torch.isfinite(out.theta).all()
    assert (out.theta.shape, out.logits.shape) == (theta.shape, (8, 7))
