"""The documents of the repository: their code blocks, their links, the commands they name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from running import PATIENCE_S, REPOSITORY, process_environment

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)
COMMANDS = ("tta-edge", "tta-export", "tta-cloud")


@dataclass(frozen=True)
class Block:
    """A fenced code block: ```LANGUAGE MARK."""

    document: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of ours in a document: `tta-edge serve --method tent` and so on."""

    where: str
    words: tuple[str, ...]


def documents() -> list[Path]:
    """README and its siblings, docs/ and the READMEs of the examples."""
    return [
        *sorted(REPOSITORY.glob("*.md")),
        *sorted((REPOSITORY / "docs").rglob("*.md")),
        *sorted((REPOSITORY / "examples").rglob("*.md")),
    ]


def blocks(document: Path) -> list[Block]:
    """The code blocks of a document, in order."""
    source = document.read_text()
    found = []
    for match in FENCE.finditer(source):
        language, _, mark = match["info"].strip().partition(" ")
        line = source.count("\n", 0, match.start()) + 1
        found.append(Block(document, line, language, mark.strip(), match["text"]))
    return found


def prose(document: Path) -> str:
    """A document without code blocks and comments."""
    return COMMENT.sub("", FENCE.sub("", document.read_text()))


def links(document: Path) -> list[str]:
    """The targets of a document's links and pictures, those on the web left out."""
    text = INLINE.sub("", prose(document))
    return [m["target"] for m in LINK.finditer(text) if not re.match(r"[a-z]+:", m["target"])]


def anchors(document: Path) -> set[str]:
    """The fragments that a document's headings can be linked by."""
    titles = HEADING.findall(prose(document))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines(text: str) -> list[str]:
    """The commands of a shell block, continued lines joined, comments dropped."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for raw in joined.splitlines() if (line := raw.strip()) and not line.startswith("#")]


def commands(document: Path) -> list[Command]:
    """Every command line of ours, in shell blocks and in `inline code`."""
    found = []
    for block in blocks(document):
        if block.language in ("bash", "sh", "console"):
            for line in shell_lines(block.text):
                words = shlex.split(line, comments=True)
                found += [Command(str(block), tuple(words[i:])) for i in _starts(words)]
    for span in INLINE.findall(prose(document)):
        if span.split(" ")[0] in COMMANDS:
            found.append(Command(str(document.relative_to(REPOSITORY)), tuple(shlex.split(span))))
    return found


def _starts(words: list[str]) -> list[int]:
    return [
        i for i, word in enumerate(words) if word in COMMANDS and (i == 0 or words[i - 1] in ("&&", ";", "|"))
    ]


def workplace(folder: Path) -> Path:
    """A directory where the documents' paths to the examples work and what they write is thrown away."""
    (folder / "examples").symlink_to(REPOSITORY / "examples", target_is_directory=True)
    return folder


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell or Python block in a workplace; a shell block stops at its first failing command."""
    binaries = str(Path(sys.executable).parent)
    environment = process_environment(
        PATH=os.pathsep.join([binaries, os.environ["PATH"]]), OMP_NUM_THREADS="2", MPLBACKEND="Agg"
    )
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    return subprocess.run(
        [sys.executable, "-c", block.text] if block.language == "python" else shell,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        check=False,
    )
