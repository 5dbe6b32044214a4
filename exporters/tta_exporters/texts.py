"""Documents to train on: the text files of a directory as tokens, some of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from tta_exporters.errors import OptionError, SourceError
from tta_runtime.tokens import FileTokenizer

Encode = Callable[[bytes], Tensor]
"""The tokens [n] int64 of a text."""


@dataclass(frozen=True)
class Documents:
    """Documents by name, as tokens.

    Attributes:
        tokens: [n] int64 by name, in the order of names.
        groups: the directory of each, which is drawn from evenly; "" for what lies at the top.
    """

    tokens: dict[str, Tensor]
    groups: dict[str, str]

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """SHA-256 over names and tokens."""
        sha = hashlib.sha256()
        for name, tokens in self.tokens.items():
            sha.update(f"\0{name}\0{len(tokens)}\0".encode())
            sha.update(tokens.numpy().tobytes())
        return sha.hexdigest()

    def split(self, share: float, patterns: tuple[str, ...] = ()) -> tuple[Documents, Documents]:
        """Those to train on and those held out: by pattern, and of the rest a share that their names choose.

        Args:
            share: of the documents that no pattern names.
            patterns: shell patterns of names.
        """
        held = {
            name
            for name in self.tokens
            if any(fnmatch(name, pattern) for pattern in patterns) or _chance(name) < share
        }
        return self._only([name for name in self.tokens if name not in held]), self._only(sorted(held))

    def _only(self, names: list[str]) -> Documents:
        return Documents(
            {name: self.tokens[name] for name in names}, {name: self.groups[name] for name in names}
        )

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """[count, length] pieces: a group evenly, of it a document by its length, of it a place.

        Raises:
            OptionError: no document is so long.
        """
        generator = torch.Generator().manual_seed(seed)
        places: dict[str, list[tuple[str, int]]] = {}
        for name, tokens in self.tokens.items():
            if len(tokens) >= length:
                places.setdefault(self.groups[name], []).append((name, len(tokens) - length + 1))
        if not places:
            raise OptionError(
                f"no document of {len(self)} has {length} tokens", "Give longer documents or fewer chunks"
            )
        groups = sorted(places)
        pieces = []
        for group in torch.randint(0, len(groups), (count,), generator=generator).tolist():
            found = places[groups[group]]
            weights = torch.tensor([float(rooms) for _, rooms in found])
            name, rooms = found[int(torch.multinomial(weights, 1, generator=generator))]
            first = int(torch.randint(0, rooms, (1,), generator=generator))
            pieces.append(self.tokens[name][first : first + length])
        return torch.stack(pieces)


def _chance(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def load_documents(paths: list[Path], encode: Encode, shortest: int) -> Documents:
    """The files below some directories, or files named themselves.

    Args:
        paths: directories, whose files are taken in the order of their names, or files.
        encode: from bytes to tokens.
        shortest: documents of fewer tokens are left out.

    Raises:
        SourceError: a path that is not there or cannot be read.
        OptionError: no document is left.
    """
    tokens: dict[str, Tensor] = {}
    groups: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise SourceError(f"there is no {path}", "Name a text file or a directory of some")
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            try:
                found = encode(file.read_bytes())
            except OSError as error:
                raise SourceError(
                    f"{file} cannot be read: {error.strerror}", "Check its permissions"
                ) from error
            if len(found) >= shortest:
                tokens[name], groups[name] = found, name.rpartition("/")[0]
    if not tokens:
        raise OptionError(
            f"no document of at least {shortest} tokens in {', '.join(map(str, paths))}",
            "Give longer documents",
        )
    return Documents(dict(sorted(tokens.items())), groups)


def encoder(tokenizer: Path | None, vocabulary: int) -> Encode:
    """From bytes to tokens: the bytes themselves, or what a file of the package `tokenizers` makes of their text.

    Args:
        tokenizer: the file, or None for bytes.
        vocabulary: tokens that the decoder knows.

    Raises:
        SourceError: the file cannot be read.
        EngineMissing: the package is not installed.
        TokenizerRefused: the file is no tokenizer, or has more tokens than the decoder.
    """
    if tokenizer is None:
        return lambda data: torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)].long()
    try:
        content = tokenizer.read_bytes()
    except OSError as error:
        raise SourceError(f"{tokenizer} cannot be read: {error.strerror}", "Check --tokenizer") from error
    made = FileTokenizer(content, tokenizer.name, vocabulary)

    def encode(data: bytes) -> Tensor:
        return torch.tensor(made.encode(data.decode("utf-8", errors="replace")), dtype=torch.int64)

    return encode
