"""Reading and sealing bundles: every refusal of docs/spec/bundle.md by name, and no trace of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

import tiny_bundle
from bad_bundles import BAD_BUNDLES, Bad, flip_byte, put
from bad_text_bundles import BAD_TEXT_BUNDLES
from snapshots import unchanged
from tta_runtime import Bundle, Engines, Manifest, Model, errors, theta
from tta_runtime import bundle as bundles
from tta_runtime.errors import BundleError
from tta_runtime.manifest import decode

SPEC = Path(__file__).parents[1] / "docs" / "spec" / "bundle.md"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "bundle"
    tiny_bundle.build(path)
    return path


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def read_manifest(path: Path) -> Manifest:
    return decode((path / "manifest.json").read_bytes())


def test_a_good_bundle_opens_and_nothing_is_written(good):
    with unchanged(good):
        opened = Bundle.open(good)
    assert opened.manifest.model_id == "tiny"
    assert opened.theta0.shape == (24,)
    assert opened.theta0.dtype == np.float32
    assert not opened.theta0.flags.writeable
    assert not opened.anchor["center"].flags.writeable
    assert theta.digest(opened.manifest.theta, opened.theta0) == opened.manifest.theta.digest


@pytest.mark.parametrize("bad", BAD_BUNDLES, ids=lambda b: f"{b.rule}-{b.name}".replace(" ", "-"))
def test_refusal(bad: Bad, path: Path):
    bad.spoil(path)
    with unchanged(path.parent):
        if bad.at_load:
            opened = Bundle.open(path)
            with pytest.raises(bad.error) as refusal:
                Engines.load(opened)
        else:
            with pytest.raises(bad.error) as refusal:
                Bundle.open(path)
    assert type(refusal.value) is bad.error
    text = str(refusal.value)
    for part in bad.says:
        assert part in text
    assert refusal.value.cause
    assert refusal.value.fix
    assert len(text) < 1500


def test_every_rule_and_every_bundle_error_has_a_bad_bundle():
    text = SPEC.read_text()
    every = [*BAD_BUNDLES, *BAD_TEXT_BUNDLES]  # the latter are tried in test_text_bundle.py
    # B16 is a rule for the reader, tested in test_a_change_after_opening_does_not_matter.
    assert set(re.findall(r"^- \*\*(B\d+)\*\*", text, re.M)) - {"B16"} == {bad.rule for bad in every}
    # Packages built on the runtime may derive refusals of their own; the specification names the runtime's.
    named = {cls.__name__ for cls in BundleError.__subclasses__() if cls.__module__ == errors.__name__}
    assert named <= {bad.error.__name__ for bad in every}
    assert all(f"`{name}`" in text for name in named)


def test_a_model_that_is_running_does_not_see_a_bad_bundle(path):
    """The whole journey: adapt, damage the files, try to open, go on as if nothing had happened."""
    model = Model.open(path)
    x, _ = tiny_bundle.samples(16, shift=1.0)
    model.adapt(x)
    expected = model.predict(x).logits
    flip_byte(path)
    with unchanged(path, model), pytest.raises(errors.FileTampered):
        Model.open(path)
    np.testing.assert_array_equal(model.predict(x).logits, expected)


def test_a_change_after_opening_does_not_matter(path):
    opened = Bundle.open(path)
    engines = Engines.load(opened)
    before = opened.theta0.copy()
    for file in path.iterdir():
        file.unlink()
    model = Model(engines)
    x, _ = tiny_bundle.samples(8)
    model.adapt(x)
    np.testing.assert_array_equal(opened.theta0, before)


def test_without_verify_only_the_hashes_of_the_graphs_are_skipped(path):
    flip_byte(path)
    Bundle.open(path, verify=False)
    flip_byte(path, "theta.safetensors")
    with unchanged(path), pytest.raises(errors.FileTampered):
        Bundle.open(path, verify=False)


def test_no_directory_and_a_file_instead_of_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    for wrong in (tmp_path / "nothing", file):
        with unchanged(tmp_path), pytest.raises(errors.ManifestMissing) as refusal:
            Bundle.open(wrong)
        assert str(wrong) in str(refusal.value)


def test_links_inside_the_bundle_are_fine(path):
    (path / "weights.bin").rename(path / "w.bin")
    (path / "weights.bin").symlink_to("w.bin")
    bundles.seal(path, read_manifest(path))
    Bundle.open(path)


def test_sealing_again_changes_nothing(path):
    with unchanged(path):
        manifest = read_manifest(path)
        assert bundles.seal(path, msgspec.structs.replace(manifest, files={})) == manifest


def test_sealing_an_inconsistent_manifest_is_refused(path):
    manifest = msgspec.structs.replace(read_manifest(path), default_method="tnet")
    with unchanged(path), pytest.raises(errors.ManifestInconsistent):
        bundles.seal(path, manifest)


def test_sealing_a_file_with_a_bad_name_is_refused(path):
    manifest = read_manifest(path)
    (path / "has space.bin").write_bytes(b"")
    with unchanged(path), pytest.raises(errors.PathEscapes):
        bundles.seal(path, manifest)


def test_the_digest_names_the_whole_bundle(path):
    digest = Bundle.open(path).digest
    assert Bundle.open(path).digest == digest
    put("provenance", "note", value="other")(path)
    assert Bundle.open(path).digest != digest
