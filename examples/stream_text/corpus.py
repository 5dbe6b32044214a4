"""Documents that every Debian system has: what its programs say, in the languages they are translated to.

    python examples/stream_text/corpus.py OUT

Writes ``OUT/learned/LANGUAGE/PROGRAM.txt``, to train on and to judge by, and ``OUT/unknown/...`` in languages that the
decoder is not to know. A document is the translated messages of one program, one a line, in an order that
their hashes decide: in a catalogue as it is, neighbours are near copies of each other.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

LOCALE = Path("/usr/share/locale")
LEARNED = (
    *("ca", "cs", "da", "de", "eo", "es", "fi", "fr", "gl", "hr", "id", "it", "lt", "nb", "nl", "pl"),
    *("pt", "pt_BR", "ro", "sk", "sl", "sv", "tr", "vi"),
)
"""Languages that the decoder is trained on."""
UNKNOWN = ("cy", "et", "eu", "ga", "hu", "is", "lv", "sq")
"""Welsh, Estonian, Basque, Irish, Hungarian, Icelandic, Latvian, Albanian: what meets the decoder untrained."""
HELD_OUT = ("apt", "bash", "man-db", "procps-ng", "psql-15", "systemd", "tar", "wget")
"""Programs of which nothing is trained on, in any language."""
SHORTEST, LONGEST = 8, 160
"""Bytes of a message that is taken."""
DOCUMENT = 5400
"""Least bytes of a document."""
LISTS = ("iso_", "iso-")
"""Lists of the names of languages and countries, not what programs say."""
MAGIC = 0x950412DE


def main() -> None:
    """Writes the documents and says how many they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--locale", type=Path, default=LOCALE, help="directory of message catalogues")
    arguments = parser.parse_args()
    count = size = 0
    for language, program, text in documents(arguments.locale):
        kind = "learned" if language in LEARNED else "unknown"
        file = arguments.out / kind / language / f"{program}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
        count, size = count + 1, size + len(text)
    if not count:
        sys.exit(f"no message catalogues below {arguments.locale}; on Debian packages bring them along")
    sys.stdout.write(f"{count} documents, {size / 1e6:.1f} MB\n")


def documents(locale: Path) -> Iterator[tuple[str, str, bytes]]:
    """Language, program and text of each document."""
    for file in sorted(locale.glob("*/LC_MESSAGES/*.mo")):
        language = file.parts[-3]
        if language not in (*LEARNED, *UNKNOWN) or file.stem.startswith(LISTS):
            continue
        try:
            lines = sorted(set(messages(file.read_bytes())), key=_hash)
        except (ValueError, OSError):  # also bytes that are not of the charset that the file names
            continue
        text = "".join(f"{line}\n" for line in lines)
        if len(text.encode()) >= DOCUMENT:
            yield language, file.stem, text.encode()


def messages(data: bytes) -> Iterator[str]:
    """The translations in a catalogue that differ from their originals, on one line each.

    Args:
        data: of a .mo file, https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html.

    Raises:
        ValueError: it is no such file, or not in the charset that it names.
    """
    pairs = list(_pairs(data))
    charset = "ascii"
    for original, translation in pairs:
        if not original:
            header = translation.decode("ascii", errors="replace")
            charset = header.partition("charset=")[2].split("\n")[0].strip() or charset
    try:
        decoded = [(original.decode(charset), translation.decode(charset)) for original, translation in pairs]
    except LookupError as error:
        raise ValueError(f"charset {charset} is unknown") from error
    for said, translated in decoded:
        for form in translated.split("\0"):  # one for each plural
            line = " ".join(form.split())
            if said and form != said.split("\0")[0] and SHORTEST <= len(line.encode()) <= LONGEST:
                yield line


def _pairs(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < 20:
        raise ValueError("shorter than a catalogue's head")
    order = next((o for o in "<>" if struct.unpack_from(f"{o}I", data)[0] == MAGIC), None)
    if order is None:
        raise ValueError("no catalogue")
    _, count, originals, translations = struct.unpack_from(f"{order}4I", data, 4)
    for index in range(count):
        try:
            places = [
                struct.unpack_from(f"{order}2I", data, table + 8 * index)
                for table in (originals, translations)
            ]
        except struct.error as error:
            raise ValueError("a table lies outside the file") from error
        (length, at), (translated_length, translated_at) = places
        yield data[at : at + length], data[translated_at : translated_at + translated_length]


def _hash(line: str) -> bytes:
    return hashlib.sha256(line.encode()).digest()


if __name__ == "__main__":
    main()
