"""Text bundles: every refusal by name; text to tokens and back, whatever the tokens cut apart."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny_text
from bad_bundles import Bad
from bad_text_bundles import BAD_TEXT_BUNDLES, WORDS, tokenizer
from snapshots import unchanged
from tta_runtime import Bundle, TextModel, errors, tokens
from tta_runtime.tokens import ByteTokenizer, FileTokenizer, bytes_of, text_of

MANY = "Grüße, 世界 👩‍👩‍👧! \n\ttab\u0000 end"
ANY_TEXT = st.text(max_size=60)


@pytest.fixture
def path(text_bundle, tmp_path):
    return Path(shutil.copytree(text_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("bad", BAD_TEXT_BUNDLES, ids=lambda b: f"{b.rule}-{b.name}".replace(" ", "-"))
def test_refusal(bad: Bad, path: Path):
    bad.spoil(path)
    with unchanged(path.parent):
        if bad.at_load:
            Bundle.open(path)
        with pytest.raises(bad.error) as refusal:
            TextModel.open(path)
    assert type(refusal.value) is bad.error
    for part in bad.says:
        assert part in str(refusal.value)
    assert refusal.value.fix


def test_a_tokenizer_that_changed_after_opening_is_refused(path):
    tokenizer(json.dumps(WORDS).encode())(path)
    opened = Bundle.open(path)
    (path / "tokenizer.json").write_text(json.dumps(WORDS).replace("hello", "jello"))
    with pytest.raises(errors.FileTampered):
        tokens.tokenizer_of(opened)


def test_a_tokenizer_file_is_used_and_names_itself(path):
    data = json.dumps(WORDS).encode()
    tokenizer(data)(path)
    model = TextModel.open(path)
    assert model.tokenizer.encode("hello world hello") == [1, 2, 1]
    assert model.tokenizer.digest == FileTokenizer(data, "tokenizer.json", 3).digest != ByteTokenizer.digest
    session = model.session()
    session.absorb(model.tokenizer.encode("hello"))
    with pytest.raises(errors.StateOfOtherTokenizer, match="tokenizer"):
        TextModel.open(_bytes_of_it(path)).session().decode(session.encode(session.checkpoint))


def _bytes_of_it(path):
    other = path.parent / "bytes"
    tiny_text.build(other)
    return other


def test_without_the_package_the_error_says_what_to_install(path, monkeypatch):
    tokenizer(json.dumps(WORDS).encode())(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(errors.EngineMissing, match=r"tta-runtime\[text\]"):
        TextModel.open(path)


# --- bytes --------------------------------------------------------------------------------------------


@given(ANY_TEXT)
@example(MANY)
def test_bytes_come_back_token_by_token(text):
    made = ByteTokenizer()
    ids = made.encode(text)
    assert ids == list(text.encode())
    assert made.head_bytes(text) == min(1, len(ids))
    decoder = made.decoder()
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) == text
    assert decoder.end() == ""
    assert all(part in text for part in parts)  # never half of a character


@given(st.lists(st.integers(0, 300), max_size=40))
def test_any_bytes_become_text(ids):
    decoder = ByteTokenizer().decoder()
    text = "".join(decoder.push(token) for token in ids) + decoder.end()
    assert text == bytes(token for token in ids if token < 256).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"good \xff bad", "byte 5 is 0xff"),
        (b"\xc3", "byte 0 is 0xc3"),
        (b"\xed\xa0\x80", "byte 0"),
        (b"\xc0\xaf", "byte 0 is 0xc0"),
    ],
)
def test_what_is_not_utf_8_is_refused_with_its_place(data, says):
    with pytest.raises(errors.InvalidUtf8, match=says):
        text_of(data)


@given(st.binary(max_size=30))
def test_every_other_text_is_taken(data):
    try:
        expected = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(errors.InvalidUtf8):
            text_of(memoryview(data))
    else:
        assert text_of(memoryview(data)) == expected
        assert bytes_of(expected) == data


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(errors.InvalidUtf8, match="U\\+D800 at 1"):
        bytes_of("a\ud800")


# --- a file of byte pairs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    """A byte-level BPE tokenizer, trained on a few words, with a control token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the cat sat on the mat and the hat"] * 5, trainer)
    return made.to_str().encode()


@given(text=ANY_TEXT)
@example(text=MANY)
@example(text="the cat<|end|>the mat")
def test_pairs_come_back_token_by_token(pairs, text):
    made = FileTokenizer(pairs, "tokenizer.json", 300)
    ids = made.encode(text)
    assert 0 not in ids  # whoever writes the control token's name does not get the token
    decoder = made.decoder()
    assert "".join(decoder.push(token) for token in ids) + decoder.end() == text


@given(ids=st.lists(st.integers(1, 299), max_size=40))
def test_any_pairs_become_text_in_parts_of_the_whole(pairs, ids):
    made = FileTokenizer(pairs, "tokenizer.json", 300)
    known = made._backend.get_vocab_size()
    decoder = made.decoder()
    text = "".join(decoder.push(token % known) for token in ids) + decoder.end()
    whole = made._backend.decode([token % known for token in ids], skip_special_tokens=True)
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_the_first_token_of_pairs_stands_for_its_bytes(pairs):
    made = FileTokenizer(pairs, "tokenizer.json", 300)
    text = "the cat"
    first = made.encode(text)[0]
    decoder = made.decoder()
    assert made.head_bytes(text) == len((decoder.push(first) + decoder.end()).encode())
    assert made.head_bytes("") == 0
    assert made.head_bytes("t") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("é", 1), ("éa", 1), ("€x", 1), ("😀", 1), ("😀😀", 1), ("👩‍👩", 1), ("aé", 1), (" é", 1)],
)
def test_the_first_token_inside_a_character_stands_for_its_part_of_it(pairs, text, expected):
    assert FileTokenizer(pairs, "tokenizer.json", 300).head_bytes(text) == expected
    assert FileTokenizer(fallback(), "tokenizer.json", 300).head_bytes(text) == expected


def test_a_token_that_ends_inside_a_character_counts_its_whole_characters_too():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {letter: place for place, letter in enumerate(letters)} | {"aÃ": 256, "Ġa": 257, "ĠaÃ": 258}
    made = Tokenizer(models.BPE(known, [("a", "Ã"), ("Ġ", "aÃ")]))
    made.decoder = decoders.ByteLevel()
    for prefix, expected in ((False, {"aé": 2, " aé": 3, "é": 1}), (True, {"aé": 2, " aé": 3, "é": 0})):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        of = FileTokenizer(made.to_str().encode(), "tokenizer.json", 300)
        assert {text: of.head_bytes(text) for text in expected} == expected


def fallback():
    """A tokenizer whose tokens are a letter, or else a byte."""
    from tokenizers import Tokenizer, decoders, models

    known = {"<unk>": 0, "a": 1, " ": 2, "<0x>": 3} | {f"<0x{byte:02X}>": byte + 10 for byte in range(256)}
    made = Tokenizer(models.BPE(known, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made.to_str().encode()


@pytest.mark.parametrize("silent", [0, 299], ids=["control token", "no token"])
def test_tokens_without_text_leave_nothing_behind(pairs, silent):
    made = FileTokenizer(pairs, "tokenizer.json", 300)
    assert made._backend.id_to_token(299) is None
    decoder = made.decoder()
    ids = [token for each in made.encode("the é") for token in (*[silent] * 200, each)]
    assert "".join(decoder.push(token) for token in ids) + decoder.end() == "the é"
    for _ in range(200):
        assert decoder.push(silent) == ""
    assert len(decoder._window) < 8


def test_a_token_that_is_empty_leaves_little_behind():
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.WordLevel({"": 0, "a": 1}, unk_token="a"))
    made.decoder = decoders.Fuse()
    decoder = FileTokenizer(made.to_str().encode(), "tokenizer.json", 2).decoder()
    assert [decoder.push(token) for token in (1, *[0] * 300, 1)] == ["a", *[""] * 300, "a"]
    assert len(decoder._window) <= tokens.LONGEST_SILENCE + 2
