"""Engines: what they run, what they refuse, and that they say why."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import tiny_bundle
from snapshots import unchanged
from tta_runtime import Bundle, Engine, EngineOptions, Engines, OrtEngine, errors
from tta_runtime.engine import Loader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    tiny_bundle.build(path)
    return Bundle.open(path)


def feed(bundle: Bundle, n: int = 4) -> dict[str, np.ndarray]:
    return {"x": tiny_bundle.samples(n)[0], "theta": bundle.theta0}


def test_it_runs_any_batch_and_fulfils_the_protocol(bundle):
    engine: Engine = OrtEngine(bundle, "forward")
    loader: Loader = OrtEngine
    assert loader is OrtEngine
    assert engine.provider == "cpu"
    assert engine.spec == bundle.manifest.graphs["forward"]
    for n in (1, 2, 7):
        outputs = engine.run(feed(bundle, n))
        assert outputs.keys() == {"logits", "features"}
        assert outputs["logits"].shape == (n, 3)


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(threads=1),
        EngineOptions(spin=True),
        EngineOptions(prepack=False),
        EngineOptions(layout=False),
        EngineOptions(arena=False),
    ],
)
def test_options_do_not_change_the_answer(bundle, options):
    expected = OrtEngine(bundle, "forward").run(feed(bundle))["logits"]
    np.testing.assert_allclose(
        OrtEngine(bundle, "forward", options).run(feed(bundle))["logits"], expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.pop("theta"), "theta"),
        (lambda f: f.update(extra=np.zeros(1, np.float32)), "extra"),
        (lambda f: f.update(theta=np.zeros(23, np.float32)), "23"),
        (lambda f: f.update(theta=np.zeros(24)), "float"),
        (lambda f: f.update(x=np.zeros((2, 9), np.float32)), "9"),
        (lambda f: f.update(x="text"), "x"),
        (lambda f: f.update(x=None), "x"),
    ],
)
def test_wrong_inputs_are_an_engine_failure_and_the_next_run_works(bundle, change, says):
    engine = OrtEngine(bundle, "forward")
    good = feed(bundle)
    expected = engine.run(good)["logits"]
    bad = dict(good)
    change(bad)
    with unchanged(bundle.path), pytest.raises(errors.EngineFailed) as refusal:
        engine.run(bad)
    assert says in str(refusal.value)
    assert "forward" in str(refusal.value)
    np.testing.assert_array_equal(engine.run(good)["logits"], expected)


def test_a_provider_that_is_not_there_is_named_and_there_is_no_fallback(bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(errors.EngineMissing, match=r"tta-runtime\[gpu\]"):
            OrtEngine(bundle, "forward", EngineOptions(provider=provider))


def test_unknown_provider_and_bad_threads(bundle):
    with pytest.raises(errors.BadValue, match="did you mean `cuda`"):
        OrtEngine(bundle, "forward", EngineOptions(provider="cdua"))
    with pytest.raises(errors.BadValue, match="threads is 0"):
        OrtEngine(bundle, "forward", EngineOptions(threads=0))


def test_without_onnxruntime_the_package_imports_and_says_what_to_install(bundle):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "runtime")!r})
sys.modules["onnxruntime"] = None      # as if it were not installed: import raises ImportError
from tta_runtime import Bundle, Model, errors
Bundle.open(sys.argv[1])
try:
    Model.open(sys.argv[1])
except errors.EngineMissing as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install tta-runtime[cpu]" in done.stdout


def test_nothing_is_printed_when_a_run_fails(bundle, capfd):
    engine = OrtEngine(bundle, "forward")
    with pytest.raises(errors.EngineFailed):
        engine.run(feed(bundle) | {"x": np.zeros((2, 9), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_engines_load_each_graph_once_and_only_what_is_needed(bundle):
    loaded: list[str] = []

    def counting(of: Bundle, graph: str, options: EngineOptions) -> Engine:
        loaded.append(graph)
        return OrtEngine(of, graph, options)

    engines = Engines.load(bundle, methods=["tent", "source"], loader=counting)
    assert loaded == ["forward", "step.tent"]
    assert engines.providers == {"forward": "cpu", "step.tent": "cpu"}
    loaded.clear()
    Engines.load(bundle, methods=["source"], loader=counting)
    assert loaded == ["forward"]
    loaded.clear()
    Engines.load(bundle, loader=counting)
    assert loaded == ["forward", "step.tent", "step.teacher"]


def test_unknown_method(bundle):
    with pytest.raises(errors.UnknownMethod, match="did you mean `tent`"):
        Engines.load(bundle, methods=["tnet"])


def test_one_engine_in_many_threads_gives_what_it_gives_in_one(bundle):
    engine = OrtEngine(bundle, "forward", EngineOptions(threads=1))
    batches = [feed(bundle, n) for n in (1, 3, 8, 16)]
    expected = [engine.run(b)["logits"] for b in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(engine.run(batches[i])["logits"], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
