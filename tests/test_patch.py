"""Patches, heads and roots: what is refused, named after the attack where it is one, and every decoder."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from tta_runtime import errors, sealed
from tta_runtime import theta as thetas
from tta_runtime.patch import (
    DOMAIN,
    HEAD_DOMAIN,
    HEAD_LIFE_S,
    MAX_JUMP,
    Head,
    Patch,
    Trust,
    body_sha256,
    make_head,
    make_patch,
    verify_head,
    verify_patch,
)
from tta_runtime.root import DOMAIN as ROOT_DOMAIN
from tta_runtime.root import Root, first_root, make_root, named, next_root
from tta_runtime.sealed import Sealed, SignatureEntry, seal
from tta_runtime.signing import SecretKey, Signature, key_id, verify
from tta_runtime.theta import Vector

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "300"))
NOW = 1_800_000_000
BUNDLE = "ab" * 32
LAYOUT, THETA0 = thetas.make_layout(
    [
        ("a.weight", np.linspace(1, 2, 6, dtype=np.float32).reshape(2, 3), "weight", True),
        ("a.mean", np.arange(4, dtype=np.float32), "mean", False),
    ]
)
ROOT_KEYS = [SecretKey(bytes([i]) * 32) for i in range(3)]
PUBLISHER, OTHER = SecretKey(b"p" * 32), SecretKey(b"o" * 32)


def root(version: int = 1, epoch: int = 1, **changes: Any) -> Root:
    fields = {
        "version": version,
        "epoch": epoch,
        "root_keys": named([key.public for key in ROOT_KEYS]),
        "root_threshold": 2,
        "publisher_keys": named([PUBLISHER.public]),
        "publisher_threshold": 1,
        "not_after_s": NOW + 1000,
    }
    return Root(**{**fields, **changes})


TRUST = Trust(root(), BUNDLE, "cameras", epoch=1, seq=7)


def vector(shift: float = 0.1) -> Vector:
    return THETA0 + np.float32(shift)


def made(
    keys: list[SecretKey] | None = None, theta: Vector | None = None, **changes: Any
) -> tuple[Sealed, bytes]:
    fields: dict[str, Any] = {
        "bundle_digest": BUNDLE,
        "channel": "cameras",
        "epoch": 1,
        "seq": 8,
        "parent_digest": "cd" * 32,
        "samples": 32,
        "issued_s": NOW,
    }
    theta = vector() if theta is None else theta
    return make_patch(theta, LAYOUT, keys or [PUBLISHER], **{**fields, **changes})


def resealed(sealed_: Sealed, key: SecretKey = PUBLISHER, **changes: Any) -> Sealed:
    """The body with other fields, signed anew: what the holder of a stolen key can make."""
    body = msgspec.msgpack.decode(sealed_.body)
    return seal_raw(msgpack.packb({**body, **changes}), key)


def seal_raw(body: bytes, key: SecretKey = PUBLISHER, domain: bytes = DOMAIN) -> Sealed:
    signature = key.sign(domain, body)
    return Sealed(body, (SignatureEntry(signature.key_id, signature.value),))


def check(sealed_: Sealed, payload: bytes, trust: Trust = TRUST, max_distance: float = 1.0) -> Any:
    return verify_patch(sealed_, payload, trust, LAYOUT, THETA0, max_distance=max_distance)


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_good_patch_gives_the_theta_that_was_signed(dtype: Any) -> None:
    sealed_, payload = made(dtype=dtype)
    found = check(sealed_, payload)
    wanted = vector().astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found.theta, wanted)
    assert found.theta.dtype == np.float32
    assert not found.theta.flags.writeable
    assert len(payload) == LAYOUT.size * np.dtype(dtype).itemsize
    assert found.patch.theta_digest == thetas.digest(LAYOUT, wanted)
    assert len(sealed_.body) < 1024


@dataclass(frozen=True)
class Attack:
    """How a good patch is changed, and what refuses it."""

    error: type[errors.PatchError]
    change: Callable[[Sealed, bytes], tuple[Sealed, bytes]]
    trust: Trust = TRUST


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def signed_by(sealed_: Sealed, *keys: SecretKey) -> Sealed:
    given = [key.sign(DOMAIN, sealed_.body) for key in keys]
    return Sealed(sealed_.body, tuple(SignatureEntry(each.key_id, each.value) for each in given))


ATTACKS = {
    "forged by a key that nobody trusts": Attack(errors.UnknownSigner, lambda s, p: (signed_by(s, OTHER), p)),
    "forged under the publisher's name": Attack(
        errors.BadSignature,
        lambda s, p: (
            Sealed(s.body, (SignatureEntry(PUBLISHER.key_id, OTHER.sign(DOMAIN, s.body).value),)),
            p,
        ),
    ),
    "not signed at all": Attack(errors.TooFewSignatures, lambda s, p: (Sealed(s.body, ()), p)),
    "a bit of the body flipped": Attack(
        errors.BadSignature, lambda s, p: (Sealed(flipped(s.body, 40), s.signatures), p)
    ),
    "a bit of the signature flipped": Attack(
        errors.BadSignature,
        lambda s, p: (
            Sealed(s.body, (SignatureEntry(PUBLISHER.key_id, flipped(s.signatures[0].value, 5)),)),
            p,
        ),
    ),
    "a bad signature beside a good one": Attack(
        errors.UnknownSigner, lambda s, p: (signed_by(s, PUBLISHER, OTHER), p)
    ),
    "one key that signs twice where two must": Attack(
        errors.TooFewSignatures,
        lambda s, p: (signed_by(s, PUBLISHER, PUBLISHER), p),
        replace(
            TRUST,
            root=root(publisher_keys=named([PUBLISHER.public, OTHER.public]), publisher_threshold=2),
        ),
    ),
    "a signed head shown as a patch": Attack(
        errors.BadSignature,
        lambda s, p: (
            make_head([PUBLISHER], channel="cameras", epoch=1, seq=8, newest="ab" * 32, issued_s=NOW),
            p,
        ),
    ),
    "nine signatures": Attack(errors.MalformedBody, lambda s, p: (signed_by(s, *[PUBLISHER] * 9), p)),
    "a header bomb": Attack(errors.MalformedBody, lambda s, p: (seal_raw(b"\x91" * 8192), p)),
    "endless data": Attack(errors.MalformedBody, lambda s, p: (seal_raw(b"\xa0" * 8193), p)),
    "a claimed length of 4 GiB": Attack(
        errors.MalformedBody, lambda s, p: (seal_raw(b"\xdf\xff\xff\xff\xff"), p)
    ),
    "a field that there is not": Attack(errors.MalformedBody, lambda s, p: (resealed(s, note="x"), p)),
    "a newer format": Attack(errors.MalformedBody, lambda s, p: (resealed(s, format=2), p)),
    "a number as text": Attack(errors.MalformedBody, lambda s, p: (resealed(s, seq="8"), p)),
    "a negative number": Attack(errors.MalformedBody, lambda s, p: (resealed(s, seq=-1), p)),
    "an unknown codec": Attack(errors.UnknownCodec, lambda s, p: (resealed(s, codec="ternary"), p)),
    "mix-and-match: another bundle": Attack(
        errors.BaseMismatch, lambda s, p: (resealed(s, bundle_digest="ee" * 32), p)
    ),
    "mix-and-match: another group": Attack(
        errors.WrongChannel, lambda s, p: (resealed(s, channel="robots"), p)
    ),
    "of an epoch to come": Attack(errors.EpochAhead, lambda s, p: (resealed(s, epoch=2), p)),
    "of an epoch that is over": Attack(
        errors.Replayed, lambda s, p: (s, p), replace(TRUST, root=root(2, epoch=2))
    ),
    "replay of what was accepted": Attack(errors.Replayed, lambda s, p: (s, p), replace(TRUST, seq=8)),
    "rollback to an older one": Attack(errors.Replayed, lambda s, p: (s, p), replace(TRUST, seq=100)),
    "fast-forward": Attack(errors.FastForward, lambda s, p: (resealed(s, seq=2**63 - 1), p)),
    "one element too many": Attack(
        errors.PayloadMismatch, lambda s, p: (resealed(s, size=LAYOUT.size + 1), p)
    ),
    "a payload cut off": Attack(errors.PayloadMismatch, lambda s, p: (s, p[:-1])),
    "a payload with something behind": Attack(errors.PayloadMismatch, lambda s, p: (s, p + b"x")),
    "a payload of no bytes": Attack(errors.PayloadMismatch, lambda s, p: (s, b"")),
    "a bit of the payload flipped": Attack(errors.PayloadMismatch, lambda s, p: (s, flipped(p, 3))),
    "a payload of another dtype than said": Attack(
        errors.PayloadMismatch, lambda s, p: (resealed(s, dtype="float16"), p)
    ),
    "another theta than signed": Attack(
        errors.DigestMismatch, lambda s, p: (resealed(s, theta_digest="00" * 32), p)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bad_patch_is_refused(name: str) -> None:
    attack = ATTACKS[name]
    good = made()
    with pytest.raises(errors.PatchError) as caught:
        check(*attack.change(*good), trust=attack.trust)
    assert type(caught.value) is attack.error
    assert caught.value.fix
    check(*good)  # the good one it was made from still passes


def test_a_jump_is_allowed_up_to_the_limit() -> None:
    check(*made(seq=TRUST.seq + MAX_JUMP))
    with pytest.raises(errors.FastForward):
        check(*made(seq=TRUST.seq + MAX_JUMP + 1))


def poisoned(value: float) -> tuple[Sealed, bytes]:
    """A payload that a stolen key has signed."""
    theta = vector()
    theta[2] = value
    payload = theta.astype("<f4").tobytes()
    import hashlib

    good, _ = made()
    sha = hashlib.sha256(payload).hexdigest()
    return resealed(good, payload_sha256=sha, theta_digest=thetas.digest(LAYOUT, theta)), payload


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_signed_theta_that_is_not_finite_is_refused(value: float) -> None:
    check(*poisoned(1.0))
    with pytest.raises(errors.PayloadNotFinite):
        check(*poisoned(value))


def test_a_signed_theta_far_from_the_source_is_refused() -> None:
    sealed_, payload = made(theta=THETA0 * 3)
    with pytest.raises(errors.TooFar, match="max_distance is 1"):
        check(sealed_, payload)
    check(sealed_, payload, max_distance=2.1)


def test_a_theta_that_its_dtype_cannot_hold_is_not_sent() -> None:
    huge = vector()
    huge[0] = 70000
    made(theta=huge)
    with pytest.raises(errors.PayloadNotFinite, match="Send float32"):
        made(theta=huge, dtype="float16")
    huge[0] = np.nan
    with pytest.raises(errors.PayloadNotFinite, match="Keep the theta before"):
        made(theta=huge)


# --- heads ----------------------------------------------------------------------------------------


def head(seq: int = 8, issued_s: int = NOW, key: SecretKey = PUBLISHER, **changes: Any) -> Sealed:
    fields: dict[str, Any] = {"channel": "cameras", "epoch": 1, "newest": "ab" * 32 if seq else ""}
    return make_head([key], seq=seq, issued_s=issued_s, **{**fields, **changes})


def test_a_head_names_the_newest_patch() -> None:
    patch, _ = made()
    found = verify_head(head(newest=body_sha256(patch)), TRUST, None, now_s=NOW)
    assert (found.seq, found.body_sha256) == (8, body_sha256(patch))
    again = verify_head(head(newest=body_sha256(patch)), TRUST, found, now_s=NOW)
    assert again == found, "the same head twice is no attack"
    assert verify_head(head(0), TRUST, None, now_s=NOW).body_sha256 == ""


LAST = Head(
    channel="cameras", epoch=1, seq=8, body_sha256="ab" * 32, issued_s=NOW, not_after_s=NOW + HEAD_LIFE_S
)


@pytest.mark.parametrize(
    ("error", "sealed_", "now_s", "last"),
    [
        (errors.UnknownSigner, head(key=OTHER), NOW, None),
        (errors.BadSignature, made()[0], NOW, None),
        (errors.WrongChannel, head(channel="robots"), NOW, None),
        (errors.EpochAhead, head(epoch=2), NOW, None),
        (errors.Replayed, head(7), NOW, LAST),
        (errors.Replayed, head(8, NOW - 1), NOW, LAST),
        (errors.Expired, head(), NOW + HEAD_LIFE_S + 1, None),
        (errors.Expired, head(), NOW + 10 * 365 * 86400, None),  # the clock is ten years ahead
        (errors.MalformedBody, head(0, newest="ab" * 32), NOW, None),
        (errors.MalformedBody, head(8, newest=""), NOW, None),
    ],
)
def test_a_bad_head_is_refused(
    error: type[errors.PatchError], sealed_: Sealed, now_s: float, last: Head | None
) -> None:
    with pytest.raises(errors.PatchError) as caught:
        verify_head(sealed_, TRUST, last, now_s=now_s)
    assert type(caught.value) is error


def test_freeze_is_noticed_where_the_clock_was_set_back() -> None:
    """A relay sends one head for ever, and the clock stands ten years back."""
    newer = replace_head(LAST, issued_s=NOW + 2 * HEAD_LIFE_S)
    old = msgspec.structs.replace(
        newer, issued_s=newer.issued_s, not_after_s=NOW + HEAD_LIFE_S + HEAD_LIFE_S - 1
    )
    frozen = seal(old, HEAD_DOMAIN, [PUBLISHER])
    with pytest.raises(errors.PatchError):
        verify_head(frozen, TRUST, newer, now_s=NOW - 10 * 365 * 86400)


def replace_head(base: Head, issued_s: int) -> Head:
    return msgspec.structs.replace(base, issued_s=issued_s, not_after_s=issued_s + HEAD_LIFE_S)


# --- roots ----------------------------------------------------------------------------------------


def test_an_edge_begins_with_a_root_that_its_own_keys_have_signed() -> None:
    assert first_root(make_root(root(), ROOT_KEYS[:2])) == root()
    with pytest.raises(errors.TooFewSignatures):
        first_root(make_root(root(), ROOT_KEYS[:1]))
    with pytest.raises(errors.UnknownSigner):
        first_root(make_root(root(), [ROOT_KEYS[0], OTHER]))


NEW_KEYS = [SecretKey(bytes([10 + i]) * 32) for i in range(2)]
NEXT = root(
    2, epoch=2, root_keys=named([key.public for key in NEW_KEYS]), publisher_keys=named([OTHER.public])
)


def test_a_rotation_shuts_out_the_stolen_key_and_lets_numbers_begin_anew() -> None:
    """Key theft and fast-forward: the thief has signed the highest number; the edge comes back by itself."""
    stolen = replace(TRUST, seq=TRUST.seq + MAX_JUMP)
    following = next_root(stolen.root, make_root(NEXT, [*ROOT_KEYS[:2], *NEW_KEYS]), now_s=NOW)
    trust = replace(stolen, root=following)
    with pytest.raises(errors.UnknownSigner):
        check(*made(epoch=2, seq=1), trust=trust)
    with pytest.raises(errors.UnknownSigner):
        check(*made(seq=stolen.seq + 1), trust=trust)
    found = check(*made([OTHER], epoch=2, seq=1), trust=trust)
    assert (found.patch.epoch, found.patch.seq) == (2, 1)


@pytest.mark.parametrize(
    ("error", "wanted", "keys", "now_s"),
    [
        (errors.TooFewSignatures, NEXT, NEW_KEYS, NOW),  # only the new ones: a takeover
        (errors.TooFewSignatures, NEXT, ROOT_KEYS, NOW),  # only the old ones: everybody locked out
        (errors.TooFewSignatures, NEXT, [ROOT_KEYS[0], *NEW_KEYS], NOW),
        (errors.TooFewSignatures, NEXT, [ROOT_KEYS[0], ROOT_KEYS[0], *NEW_KEYS], NOW),
        (errors.UnknownSigner, NEXT, [*ROOT_KEYS, *NEW_KEYS, OTHER], NOW),  # a publisher is no root key
        (errors.RootRefused, msgspec.structs.replace(NEXT, version=3), [*ROOT_KEYS, *NEW_KEYS], NOW),
        (errors.RootRefused, msgspec.structs.replace(NEXT, version=1), [*ROOT_KEYS, *NEW_KEYS], NOW),
        (errors.Expired, NEXT, [*ROOT_KEYS, *NEW_KEYS], NOW + 1001),
    ],
)
def test_a_root_that_does_not_follow_is_refused(
    error: type[errors.PatchError], wanted: Root, keys: list[SecretKey], now_s: float
) -> None:
    with pytest.raises(errors.PatchError) as caught:
        next_root(root(), make_root(wanted, keys), now_s=now_s)
    assert type(caught.value) is error


def test_an_epoch_never_falls() -> None:
    low = msgspec.structs.replace(NEXT, epoch=4)
    with pytest.raises(errors.RootRefused, match="epoch"):
        next_root(root(epoch=5), make_root(low, [*ROOT_KEYS, *NEW_KEYS]), now_s=NOW)


def test_a_bad_signature_of_the_new_keys_is_seen() -> None:
    good = make_root(NEXT, [*ROOT_KEYS[:2], *NEW_KEYS])
    last = good.signatures[-1]
    bad = Sealed(good.body, (*good.signatures[:-1], SignatureEntry(last.key_id, flipped(last.value, 0))))
    with pytest.raises(errors.BadSignature):
        next_root(root(), bad, now_s=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"publisher_keys": {"00" * 16: PUBLISHER.public}},
        {"root_threshold": 4},
        {"publisher_threshold": 2},
    ],
)
def test_a_root_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(errors.RootRefused):
        make_root(root(**changes), ROOT_KEYS)
    body = msgspec.msgpack.encode(root(**changes))
    given = [key.sign(ROOT_DOMAIN, body) for key in ROOT_KEYS]
    with pytest.raises(errors.RootRefused):
        first_root(Sealed(body, tuple(SignatureEntry(each.key_id, each.value) for each in given)))


# --- key files ------------------------------------------------------------------------------------


def test_a_key_comes_back_from_its_file_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    key, path = SecretKey.generate(), tmp_path / "publisher.key"
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = SecretKey.load(path)
    assert again.public == key.public
    verify({key.key_id: key.public}, 1, b"d", b"m", [again.sign(b"d", b"m")])
    with pytest.raises(errors.KeyFileRefused, match="exists"):
        SecretKey.generate().save(path)
    assert SecretKey.load(path).public == key.public
    assert path.read_text().split("\n")[1] not in repr(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "k"
    SecretKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(errors.KeyExposed, match="chmod 600"):
        SecretKey.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 500, b"tta ed25519 secret key, version 2\n" + b"00" * 32 + b"\n",
     b"tta ed25519 secret key, version 1\n" + b"00" * 31 + b"\n",
     b"tta ed25519 secret key, version 1\n" + b"zz" * 32 + b"\n",
     b"tta ed25519 secret key, version 1\n" + b"00" * 32 + b"\nmore"],
)  # fmt: skip
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "k"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(errors.KeyFileRefused):
        SecretKey.load(path)


def test_a_link_to_a_key_is_refused(tmp_path: Path) -> None:
    SecretKey.generate().save(tmp_path / "k")
    (tmp_path / "link").symlink_to(tmp_path / "k")
    with pytest.raises(errors.KeyFileRefused):
        SecretKey.load(tmp_path / "link")
    with pytest.raises(errors.KeyFileRefused):
        SecretKey.load(tmp_path / "none")


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    signature = PUBLISHER.sign(DOMAIN, b"body")
    keys = {PUBLISHER.key_id: PUBLISHER.public}
    verify(keys, 1, DOMAIN, b"body", [signature])
    with pytest.raises(errors.BadSignature):
        verify(keys, 1, HEAD_DOMAIN, b"body", [signature])
    with pytest.raises(errors.BadSignature):
        verify(keys, 1, DOMAIN, b"body", [Signature(PUBLISHER.key_id, b"short")])
    assert key_id(PUBLISHER.public) == PUBLISHER.key_id


# --- decoders -------------------------------------------------------------------------------------

GOOD: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "patch": (made()[0].body, lambda data: sealed.open_body(data, Patch)),
    "head": (head().body, lambda data: sealed.open_body(data, Head)),
    "root": (msgspec.msgpack.encode(root()), lambda data: sealed.open_body(data, Root)),
    "sealed": (sealed.encode(made()[0]), sealed.decode),
}


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_every_decoder_refuses_by_name_or_gives_back_what_it_was_given(
    name: str, data: st.DataObject
) -> None:
    good, decode = GOOD[name]
    kind = data.draw(st.sampled_from(["bytes", "flip", "cut", "insert", "field"]))
    if kind == "bytes":
        given = data.draw(st.binary(max_size=400))
    elif kind == "field":
        fields = msgpack.unpackb(good)
        key = data.draw(st.sampled_from(sorted(fields)))
        leaf = (
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.text(max_size=70)
            | st.floats()
            | st.binary(max_size=70)
        )
        value = data.draw(
            st.recursive(
                leaf,
                lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
                max_leaves=6,
            )
        )
        given = (
            msgpack.packb({**fields, key: value}, use_bin_type=True)
            if data.draw(st.booleans())
            else msgpack.packb({k: v for k, v in fields.items() if k != key})
        )
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        extra = data.draw(st.binary(min_size=1, max_size=4))
        given = {
            "flip": good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :],
            "cut": good[:place],
            "insert": good[:place] + extra + good[place:],
        }[kind]
    try:
        found = decode(given)
    except errors.PatchError:
        return
    assert decode(msgspec.msgpack.encode(found)) == found


@pytest.mark.parametrize("name", GOOD)
def test_no_decoder_takes_memory_for_what_a_message_only_claims(name: str) -> None:
    decode = GOOD[name][1]
    bombs = [b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
             b"\x81\xa4body\xc6\x7f\xff\xff\xff", b"\x91" * 4000, b"\x81\xa1a" * 2000]  # fmt: skip
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(errors.MalformedBody):
                decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_network_of_twenty_layers_makes_a_patch_of_less_than_20_kb() -> None:
    channels = [16] * 7 + [32] * 6 + [64] * 6
    layout, vector_ = thetas.make_layout(
        [
            (f"layer{i}.{kind}", np.ones(n, np.float32), kind, kind in ("weight", "bias"))
            for i, n in enumerate(channels)
            for kind in ("weight", "bias", "mean", "var")
        ]
    )
    sealed_, payload = make_patch(
        vector_, layout, [PUBLISHER], bundle_digest=BUNDLE, channel="c", epoch=1, seq=1,
        parent_digest="cd" * 32, samples=32, issued_s=NOW,
    )  # fmt: skip
    assert len(sealed.encode(sealed_)) + len(payload) < 20_000


def test_the_tiny_bundle_takes_a_patch(tmp_path: Path) -> None:
    """On a real bundle: its digest, its layout."""
    from tta_runtime.bundle import Bundle

    tiny_bundle.build(tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    layout = bundle.manifest.theta
    sealed_, payload = make_patch(
        bundle.theta0 * np.float32(1.1), layout, [PUBLISHER], bundle_digest=bundle.digest, channel="cameras",
        epoch=1, seq=8, parent_digest=thetas.digest(layout, bundle.theta0), samples=1, issued_s=NOW,
    )  # fmt: skip
    trust = replace(TRUST, bundle_digest=bundle.digest)
    found = verify_patch(sealed_, payload, trust, layout, bundle.theta0, max_distance=1.0)
    np.testing.assert_allclose(found.theta, bundle.theta0 * np.float32(1.1))
