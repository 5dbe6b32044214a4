"""Text to tokens and back: bytes as they are, or the `tokenizers` file of a bundle.

Text comes in as UTF-8 and leaves as text. What is generated arrives token by token, and a character may be spread over
several of them: a `TextDecoder` gives what is whole and keeps the rest.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from .bundle import Bundle
from .errors import EngineMissing, InvalidUtf8, TokenizerRefused
from .manifest_check import BYTES, REBUILD, expect_text

BYTE_VALUES = 256
MAX_FILE_BYTES = 64 << 20
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that a character may be spread over; a longer run of broken ones is given as it is."""
LONGEST_SILENCE = 64
"""Tokens in a row that add no text and may still matter to what comes; of a longer run the oldest is forgotten."""


class TextDecoder(Protocol):
    """Turns the tokens of one text into text, one after the other."""

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""

    def end(self) -> str:
        """What is left at the end: a character that was never completed becomes U+FFFD."""


class Tokenizer(Protocol):
    """Text to tokens and back; stateless."""

    @property
    def digest(self) -> str:
        """sha256 (hex): two tokenizers with the same one give the same tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. No token is added, and no word of the text becomes a control token."""

    def head_bytes(self, text: str) -> int:
        """How many UTF-8 bytes of a text its first token stands for."""

    def decoder(self) -> TextDecoder:
        """For one text."""


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a text bundle.

    Raises:
        WrongTask: the bundle is not for text.
        EngineMissing: it has a tokenizer file and the package `tokenizers` is not installed.
        TokenizerRefused: that file is none, or its vocabulary is larger than the model's (B19).
        BundleError: the file cannot be read, or is no longer what the manifest lists.
    """
    text = expect_text(bundle.manifest)
    if text.tokenizer == BYTES:
        return ByteTokenizer()
    size = bundle.manifest.files[text.tokenizer].bytes
    if size > MAX_FILE_BYTES:
        raise TokenizerRefused(
            f"`{text.tokenizer}` has {size} bytes, the limit is {MAX_FILE_BYTES}", "Use a smaller vocabulary"
        )
    return FileTokenizer(bundle.content(text.tokenizer), text.tokenizer, bundle.manifest.classes)


def text_of(data: bytes | memoryview, what: str = "the text") -> str:
    """Text from UTF-8.

    Raises:
        InvalidUtf8: it is none; the first bad byte is named.
    """
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUtf8(
            f"{what} is not UTF-8: byte {error.start} is 0x{bytes(data)[error.start]:02x} ({error.reason})",
            "Send UTF-8, for example text.encode()",
        ) from error


def bytes_of(text: str, what: str = "the text") -> bytes:
    """UTF-8 of a text.

    Raises:
        InvalidUtf8: it holds half of a surrogate pair, which UTF-8 cannot say.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidUtf8(
            f"{what} holds U+{ord(text[error.start]):04X} at {error.start}, half of a surrogate pair",
            "Decode what you read with the right encoding",
        ) from error


class ByteTokenizer:
    """A token is the value of a byte; tokens from 256 on have no text."""

    digest: str = hashlib.sha256(BYTES.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of a text; raises InvalidUtf8."""
        return list(bytes_of(text))

    def head_bytes(self, text: str) -> int:
        """1, or 0 of an empty text."""
        return min(1, len(text))

    def decoder(self) -> TextDecoder:
        """For one text."""
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token])) if token < BYTE_VALUES else ""

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class FileTokenizer:
    """A file of the package `tokenizers`.

    Args:
        data: its bytes.
        name: of the file, for messages.
        vocabulary: tokens that the model knows.

    Raises:
        EngineMissing: the package is not installed.
        TokenizerRefused: the file is none, or its vocabulary is larger than the model's.
    """

    def __init__(self, data: bytes, name: str, vocabulary: int) -> None:
        try:
            from tokenizers import Tokenizer as Backend  # here, because bundles of bytes do without it
        except ImportError as error:
            raise EngineMissing(
                f"the bundle's tokenizer `{name}` needs the package `tokenizers`: {error}",
                "Run `pip install tta-runtime[text]`",
            ) from error
        self.digest: str = hashlib.sha256(data).hexdigest()
        try:
            self._backend: Any = Backend.from_str(data.decode())
        except Exception as error:
            raise TokenizerRefused(f"`{name}` is no tokenizer: {error}", REBUILD) from error
        # A text that spells a control token must not become one, and nothing of a text is cut off or filled up.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        largest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocabulary:
            raise TokenizerRefused(
                f"`{name}` has token {largest}, the model's vocabulary is {vocabulary} tokens", REBUILD
            )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`; raises InvalidUtf8."""
        bytes_of(text)  # the package would panic
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def head_bytes(self, text: str) -> int:
        """See `Tokenizer.head_bytes`.

        Of a character that is cut apart by anything but bytes, as by a normaliser, the first token has none.
        """
        encoded = self._backend.encode(text, add_special_tokens=False)
        offsets: Sequence[tuple[int, int]] = encoded.offsets
        if len(offsets) < 2:
            return len(text.encode())
        end, beyond = offsets[1][0], offsets[0][1]  # in characters, a cut one counted to both tokens
        if beyond > end and (cut := _cut_bytes(encoded.tokens[0], text[:beyond])) is not None:
            return cut
        return len(text[:end].encode())

    def decoder(self) -> TextDecoder:
        """For one text."""
        return _FileDecoder(self._backend)


def _cut_bytes(token: str, text: str) -> int | None:
    """How many bytes a token stands for that ends inside the last character of a text; None: its name does not say."""
    from tokenizers import pre_tokenizers

    if token == f"<0x{text.encode()[0]:02X}>":  # a byte that a vocabulary of characters falls back to
        return 1
    # One letter for each byte of the text.
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(part for part, _ in alphabet.pre_tokenize_str(text))
    if letters.startswith(token):
        return len(token)
    space: str = alphabet.pre_tokenize_str(" ")[0][0]  # it may stand before the text and is not of it
    return len(token) - 1 if (space + letters).startswith(token) else None


class _FileDecoder:
    """What a token means may depend on the one before it: those behind the last whole text are decoded each time."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._controls = {
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        }
        self._window: list[int] = []
        self._told = 0
        """Tokens of the window whose text was given; they stand for what comes before the others."""

    def push(self, token: int) -> str:
        if token in self._controls or self._backend.id_to_token(token) is None:
            return ""  # decoding leaves it out
        self._window.append(token)
        before, text = self._texts()
        unfinished = text.endswith(REPLACEMENT) and len(self._window) - self._told < LONGEST_CHARACTER
        if unfinished or len(text) <= len(before):
            if len(self._window) - self._told > LONGEST_SILENCE:
                del self._window[self._told]
            return ""
        self._window, self._told = self._window[self._told :], len(self._window) - self._told
        return text[len(before) :]

    def end(self) -> str:
        before, text = self._texts()
        self._window, self._told = [], 0
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        def decoded(tokens: list[int]) -> str:
            text: str = self._backend.decode(tokens, skip_special_tokens=True)
            return text

        return decoded(self._window[: self._told]), decoded(self._window)
