"""The file that a warm-up leaves: an adapter's trained tensors as safetensors, with what they were trained for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tta_exporters.errors import OutputUnwritable, SourceError, WeightsDoNotFit, in_one_line
from tta_runtime.atomic import write_atomic

FORMAT = "tta-adapter"


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        tensors: the trained tensors by name.
        provenance: facts for a bundle's manifest.
    """

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, str]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"\0{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        sha.update(value.flatten().numpy().tobytes())
    return sha.hexdigest()


def network_digest(network: nn.Module) -> str:
    """Digest of a network's state dict."""
    return digest(network.state_dict())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically.

    Raises:
        OutputUnwritable: it cannot be written there.
    """
    data = save({name: value.detach().contiguous() for name, value in tensors.items()}, dict(facts))
    try:
        write_atomic(file, data)
    except OSError as error:
        raise OutputUnwritable(f"{file} cannot be written: {error.strerror}", "Choose another -o") from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a safetensors file.

    Raises:
        SourceError: there is no such file, or it is none.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise SourceError(
            f"{file} cannot be read as safetensors: {in_one_line(error)}", "Check the path, or make it again"
        ) from error


def write_adapter(
    file: Path, tensors: Mapping[str, Tensor], adapter: str, network: nn.Module, facts: Mapping[str, object]
) -> None:
    """Writes the result of a warm-up.

    Args:
        file: where to.
        tensors: the trained tensors by name.
        adapter: name of the adapter.
        network: that it was trained on; before any change.
        facts: how it was trained.

    Raises:
        OutputUnwritable: it cannot be written there.
    """
    write_tensors(
        file,
        tensors,
        {
            "format": FORMAT,
            "adapter": adapter,
            "network": network_digest(network),
            "facts": json.dumps(facts, sort_keys=True),
        },
    )


def read_adapter(file: Path, adapter: str, network: nn.Module) -> AdapterFile:
    """Reads the result of a warm-up for a build.

    Args:
        file: what :func:`write_adapter` wrote.
        adapter: name of the adapter that is built.
        network: that is built.

    Raises:
        SourceError: the file cannot be read.
        WeightsDoNotFit: it is no such file, or belongs to another adapter or another network.
    """
    tensors, facts = read_tensors(file)
    if facts.get("format") != FORMAT:
        raise WeightsDoNotFit(
            f"{file.name} is not the result of a warm-up", "Give the file that `tta-export warm-up` wrote"
        )
    if facts.get("adapter") != adapter:
        raise WeightsDoNotFit(
            f"{file.name} is of adapter {facts.get('adapter')}, this bundle has {adapter}",
            f"Build with --adapter {facts.get('adapter')}",
        )
    found = network_digest(network)
    if facts.get("network") != found:
        raise WeightsDoNotFit(
            f"{file.name} was warmed up on network {str(facts.get('network'))[:12]}, this one is {found[:12]}",
            "Give the same model and weights, or warm up again",
        )
    return AdapterFile(
        tensors,
        {
            "adapter.weights": file.name,
            "adapter.weights.digest": digest(tensors),
            "adapter.warm-up": facts.get("facts", ""),
        },
    )
