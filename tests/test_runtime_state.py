"""State files: saved and loaded whole, refused by name, and no trace of a refusal."""

from __future__ import annotations

import os
import resource
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, load_file

import tiny_bundle
from bad_bundles import put, reseal
from snapshots import learnt, unchanged
from tiny_bundle import D, P
from tta_runtime import Engines, Model, bundle, errors, state_file, tensors, theta
from tta_runtime.errors import StateError
from tta_runtime.tensors import TensorsMalformed

F32 = np.float32


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    tiny_bundle.build(path)
    return Engines.load(path)


def batch(n: int = 16, seed: int = 0) -> np.ndarray:
    return tiny_bundle.samples(n, seed=seed, shift=1.0)[0]


def adapted(engines: Engines, method: str = "tent", steps: int = 3, seed: int = 5) -> Model:
    model = Model(engines, method, seed=seed)
    for i in range(steps):
        model.adapt(batch(seed=i))
    return model


@pytest.fixture
def saved(engines: Engines, tmp_path: Path) -> Path:
    adapted(engines).save(tmp_path / "state")
    return tmp_path / "state"


# ---------------------------------------------------------------------------------- the good path


@pytest.mark.parametrize("method", ["tent", "teacher", "source"])
def test_a_saved_stream_goes_on_bit_for_bit(engines, tmp_path, method):
    model = adapted(engines, method)
    model.save(tmp_path / "state")
    other = Model(engines, method)
    with unchanged(tmp_path):
        other.load(tmp_path / "state")
    assert learnt(other) == learnt(model)
    for i in range(3):
        model.adapt(batch(seed=10 + i))
        other.adapt(batch(seed=10 + i))
    assert learnt(other) == learnt(model)


def test_after_loading_there_is_nothing_to_roll_back_to(engines, saved):
    model = adapted(engines)
    model.load(saved)
    assert model.roll_back() is False


def test_equal_state_gives_equal_bytes_and_saving_replaces(engines, tmp_path):
    adapted(engines).save(tmp_path / "a")
    adapted(engines).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    adapted(engines, steps=4).save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_hyper_parameters_stay_those_of_the_model(engines, saved):
    model = Model(engines, hyper={"lr": 0.5})
    model.load(saved)
    assert model.hyper["lr"] == 0.5
    assert model.steps == 3


def test_what_was_loaded_cannot_be_written_to(engines, saved):
    model = Model(engines)
    model.load(saved)
    for array in (model.theta, model.state["momentum"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_any_reader_of_safetensors_can_open_it(saved):
    arrays = load_file(saved)
    assert {k: (v.dtype, v.shape) for k, v in arrays.items()} == {
        "theta": (np.dtype(F32), (P,)),
        "state.momentum": (np.dtype(F32), (2 * D,)),
    }


# ---------------------------------------------------------------------------------- refusals


def rewritten(change: Any, *, seal: bool = True) -> Any:
    """Change arrays and metadata of a state file; with a right checksum, so that only the change is wrong."""

    def spoil(file: Path) -> None:
        arrays, metadata = tensors.decode(file.read_bytes())
        arrays = {k: v.copy() for k, v in arrays.items()}
        change(arrays, metadata)
        if seal:
            metadata.pop("sha256", None)
            metadata["sha256"] = state_file.checksum(metadata, arrays)
        file.write_bytes(tensors.encode(arrays, metadata))

    return spoil


def meta(**values: str) -> Any:
    return rewritten(lambda _, m: m.update(values))


def flip(position: float) -> Any:
    def spoil(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return spoil


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


NAN = np.full(P, np.nan, F32)
BAD_STATES = {
    "missing": (Path.unlink, errors.StateMissing, "no state file"),
    "a pipe": (as_pipe, errors.StateUnreadable, "not a regular file"),
    "a directory": (as_directory, errors.StateUnreadable, "directory|regular"),
    "empty": (lambda f: f.write_bytes(b""), errors.StateMalformed, "0 bytes"),
    "text": (lambda f: f.write_text("hello world, this is no state"), errors.StateMalformed, "header"),
    "truncated": (lambda f: os.truncate(f, f.stat().st_size - 1), errors.StateMalformed, "not a whole"),
    "half": (lambda f: os.truncate(f, f.stat().st_size // 2), errors.StateMalformed, "not a whole"),
    "longer": (lambda f: os.truncate(f, f.stat().st_size + 1), errors.StateMalformed, "not a whole"),
    "far too large": (lambda f: os.truncate(f, 2 << 20), errors.StateMalformed, "more than"),
    "huge header": (lambda f: f.write_bytes(b"\xff" * 100), errors.StateMalformed, "claims"),
    "one bit of the values": (flip(0.99), errors.StateTampered, "sha256"),
    "values without a new checksum": (
        rewritten(lambda a, _: a["theta"].__setitem__(0, 9), seal=False),
        errors.StateTampered,
        "sha256",
    ),
    "steps without a new checksum": (
        rewritten(lambda _, m: m.update(steps="4"), seal=False),
        errors.StateTampered,
        "sha256",
    ),
    "no metadata": (rewritten(lambda _, m: m.clear()), errors.StateMalformed, "format is ``"),
    "another format": (meta(format="pt"), errors.StateMalformed, "`pt`, expected `tta-state`"),
    "newer": (meta(format_version="3"), errors.NewerState, "3, .* up to 2"),
    "older": (meta(format_version="1"), errors.OlderState, "1, .* reads 2"),
    "generation in words": (meta(generation="one"), errors.StateMalformed, "generation"),
    "notes without end": (meta(notes="x" * (600 << 10)), errors.StateMalformed, "notes have 614400"),
    "version in words": (meta(format_version="two"), errors.StateMalformed, "format_version"),
    "a key missing": (rewritten(lambda _, m: m.pop("seed")), errors.StateMalformed, "seed"),
    "a key more": (meta(extra="1"), errors.StateMalformed, "extra"),
    "negative steps": (meta(steps="-1"), errors.StateMalformed, "steps is `-1`"),
    "steps with a leading zero": (meta(steps="03"), errors.StateMalformed, "steps"),
    "steps in other digits": (meta(steps="٣"), errors.StateMalformed, "steps"),
    "steps beyond 2^63": (meta(steps=str(1 << 63)), errors.StateMalformed, "steps"),
    "seed beyond 2^128": (meta(seed=str(1 << 128)), errors.StateMalformed, "seed"),
    "hyper is no JSON": (meta(hyper="{"), errors.StateMalformed, "hyper"),
    "hyper in words": (meta(hyper='{"lr": "fast"}'), errors.StateMalformed, "hyper"),
    "hyper nested deep": (meta(hyper='{"lr":' + "[" * 50_000), errors.StateMalformed, "hyper"),
    "another source": (meta(source="0" * 64), errors.StateOfOtherBundle, "source 0000"),
    "another layout": (meta(layout="0" * 64), errors.StateOfOtherBundle, "layout 0000"),
    "another method": (meta(method="eata"), errors.StateMismatch, "`eata`, this is `tent`"),
    "theta missing": (rewritten(lambda a, _: a.pop("theta")), errors.StateMismatch, "theta"),
    "theta too short": (
        rewritten(lambda a, _: a.update(theta=np.zeros(P - 1, F32))),
        errors.StateMismatch,
        r"\[23\]",
    ),
    "theta as bytes": (
        rewritten(lambda a, _: a.update(theta=np.zeros(P, np.uint8))),
        errors.StateMismatch,
        "uint8",
    ),
    "state missing": (rewritten(lambda a, _: a.pop("state.momentum")), errors.StateMismatch, "momentum"),
    "one array more": (
        rewritten(lambda a, _: a.update({"state.more": np.zeros(1, F32)})),
        errors.StateMismatch,
        "more",
    ),
    "theta with NaN": (rewritten(lambda a, _: a.update(theta=NAN)), errors.StateMalformed, "not finite"),
    "state with Inf": (
        rewritten(lambda a, _: a["state.momentum"].fill(np.inf)),
        errors.StateMalformed,
        "momentum.*not finite",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_refusal(engines, saved, name):
    spoil, error, says = BAD_STATES[name]
    model = adapted(engines, steps=2)
    spoil(saved)
    with unchanged(saved.parent, model), pytest.raises(error, match=says) as refusal:
        model.load(saved)
    assert type(refusal.value) is error
    assert refusal.value.cause
    assert refusal.value.fix
    assert len(str(refusal.value)) < 2000
    model.roll_back()  # the last good is still there too
    assert model.steps == 1


def test_every_state_error_is_tested():
    # The last is of texts, see test_text_model.py.
    others = {errors.StateUnwritable, errors.NonFiniteState, errors.StateOfOtherTokenizer}
    tested = {error for _, error, _ in BAD_STATES.values()} | others
    own = {kind for kind in StateError.__subclasses__() if kind.__module__ == errors.__name__}
    assert tested == own


def test_a_state_of_another_bundle_is_refused(engines, saved, tmp_path):
    """Really another one: the same model with another source theta."""
    path = tmp_path / "other" / "bundle"
    path.parent.mkdir()
    manifest = tiny_bundle.build(path)
    arrays, _ = tensors.decode((path / "theta.safetensors").read_bytes())
    arrays["norm.bias"] = np.full(D, 0.5, F32)
    bundle.write_tensors(path / "theta.safetensors", arrays)
    digest = theta.digest(manifest.theta, theta.pack(manifest.theta, arrays))
    put("theta", "digest", value=digest)(path)
    reseal(path)
    other = Model.open(path)
    with unchanged(tmp_path, other), pytest.raises(errors.StateOfOtherBundle) as refusal:
        other.load(saved)
    assert digest in str(refusal.value)
    assert engines.bundle.manifest.theta.digest in str(refusal.value)


@pytest.mark.parametrize("where", ["missing/state", "file/state", "taken"])
def test_saving_where_it_cannot_be(engines, saved, where):
    (saved.parent / "file").write_bytes(b"")
    (saved.parent / "taken").mkdir()
    model = adapted(engines, steps=2)
    with unchanged(saved.parent, model), pytest.raises(errors.StateUnwritable, match="cannot be written: "):
        model.save(saved.parent / where)


def test_saving_without_space_keeps_the_old_file(engines, saved):
    model = adapted(engines, steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with (
            unchanged(saved.parent, model),
            pytest.raises(errors.StateUnwritable, match="cannot be written: File too large"),
        ):
            model.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    model.load(saved)
    assert model.steps == 3


# ---------------------------------------------------------------------------------- anything


def loaded_or_refused(engines: Engines, data: bytes) -> bool:
    """The property: a named refusal, or a state that encodes to the same bytes."""
    manifest = engines.bundle.manifest
    try:
        saved = state_file.decode(data, manifest, "tent")
    except StateError:  # and nothing else: any other exception fails the test
        return False
    again = state_file.decode(state_file.encode(manifest, saved), manifest, "tent")
    assert again.theta.tobytes() == saved.theta.tobytes()
    assert again.state["momentum"].tobytes() == saved.state["momentum"].tobytes()
    assert (again.steps, again.seed, again.hyper) == (saved.steps, saved.seed, saved.hyper)
    assert (again.generation, again.notes) == (saved.generation, saved.notes)
    return True


ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(st.binary(max_size=300))
def test_any_bytes(engines, data):
    assert not loaded_or_refused(engines, data)


@given(header=st.binary(max_size=200), payload=st.binary(max_size=50))
def test_any_header(engines, header, payload):
    assert not loaded_or_refused(engines, len(header).to_bytes(8, "little") + header + payload)


@ANY
@given(data=st.data())
def test_one_changed_byte_is_always_refused_or_harmless(engines, saved, data):
    raw = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255))
    same = raw[at] == value
    raw[at] = value
    good = loaded_or_refused(engines, bytes(raw))
    assert good or not same
    if good and not same:  # only white space in the header is not covered by the checksum
        assert tensors.decode(bytes(raw))[1] == tensors.decode(saved.read_bytes())[1]


@ANY
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated(engines, saved, cut):
    raw = saved.read_bytes()
    assert not loaded_or_refused(engines, raw[: int(cut * len(raw))])


@given(
    metadata=st.dictionaries(
        st.sampled_from(
            ["format", "format_version", "method", "hyper", "steps", "seed", "source", "sha256", "x"]
        ),
        st.one_of(
            st.text(max_size=20),
            st.integers().map(str),
            st.sampled_from(["tta-state", "1", "tent", "{}", "0"]),
        ),
    ),
    arrays=st.dictionaries(
        st.sampled_from(["theta", "state.momentum", "state.x", ""]),
        st.sampled_from(
            [np.zeros(P, F32), np.zeros(2 * D, F32), np.zeros((0, 3), np.uint8), np.zeros((), np.int64)]
        ),
    ),
)
def test_any_metadata(engines, metadata, arrays):
    assert not loaded_or_refused(engines, tensors.encode(arrays, metadata))


def _u8(name: str, *offsets: int) -> bytes:
    size = offsets[1] - offsets[0]
    return f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":{list(offsets)}}}'.encode()


@given(
    arrays=st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from([np.float32, np.uint8, np.int64]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3),
)
def test_arrays_round_trip_and_the_library_reads_them(arrays, metadata):
    data = tensors.encode(arrays, metadata)
    found, again = tensors.decode(data)
    assert again == metadata
    library = load(data)
    assert found.keys() == arrays.keys() == library.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == library[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable
    assert tensors.encode(found, again) == data


def test_an_array_of_another_dtype_is_not_written():
    with pytest.raises(TensorsMalformed, match="`a` has dtype float64"):
        tensors.encode({"a": np.zeros(2)})


HEADERS = {
    "claims 4 EiB": (1 << 62).to_bytes(8, "little") + b"{}",
    "claims the limit": (1 << 20).to_bytes(8, "little") + b"{}",
    "claims more than the limit": ((1 << 20) + 1).to_bytes(8, "little") + b" " * ((1 << 20) + 1),
}
for _name, _json in {
    "tensor of 1 TiB": b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}',
    "product overflows": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "overlap": b"{" + _u8("a", 0, 4) + b"," + _u8("b", 2, 6) + b"}",
    "hole": b"{" + _u8("a", 0, 2) + b"," + _u8("b", 4, 6) + b"}",
    "backwards": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}',
    "same name twice": b"{" + _u8("a", 0, 4) + b"," + _u8("a", 4, 8) + b"}",
    "bytes after the tensors": b"{" + _u8("a", 0, 4) + b"}",
    "unknown dtype": b'{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}',
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
    "nested deep": b'{"a":' + b"[" * 100_000,
}.items():
    HEADERS[_name] = len(_json).to_bytes(8, "little") + _json + bytes(8)


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused_without_taking_memory(name):
    data = HEADERS[name]
    tracemalloc.start()
    try:
        with pytest.raises(TensorsMalformed):
            tensors.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(data) + (1 << 20)
