"""The safety suite in one command: train what is missing, build bundles, make malicious streams, play, report.

    python examples/safety/safety.py --data DATA --suite quick -o out/safety

Every step is skipped where its result is there already, so the command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import data

from tta_adapters.methods import METHODS

HERE = Path(__file__).resolve().parent
WANTED = ("source", "norm", "tent", "eata", "sar", "rdumb", "roid", "auto")
SUITE_MODELS = {
    "quick": ("resnet8_bn", "convvit_ln"),
    "safety": ("resnet8_bn", "convvit_ln", "resnet26w32_bn", "resnet8_gn", "mnist_bn"),
}
ATTACKS = (("05-clean", 0.05, False), ("20-clean", 0.2, False), ("20-noise", 0.2, True))
"""Name, share of malicious samples, whether all images are noisy."""
ATTACKED = {"quick": 640, "safety": 2000}
"""Images of a malicious stream."""
SEED = 0


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        data: directory of images, and of weights if there are any.
        out: directory of everything made.
    """

    data: Path
    out: Path

    def weights(self, model: str) -> Path:
        """Of a model: beside this file, in the data, or trained here."""
        names = (HERE / f"{model}.safetensors", self.data / "weights" / f"cifar10_{model}.safetensors")
        return next((path for path in names if path.is_file()), self.out / f"{model}.safetensors")

    def images(self, model: str) -> Path:
        """Labelled images that the model was not trained on."""
        digits = model == "mnist_bn"
        return self.data / "dev" / ("mnist_test0000_4999.npz" if digits else "cifar10_train40000_44999.npz")


def run(*words: str | Path) -> None:
    """One command of the project, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def export(*words: str | Path) -> None:
    """`tta-export WORDS`."""
    run("-m", "tta_exporters.cli", *words)


def form(model: str) -> list[str]:
    """What `tta-export` must know of a model's input."""
    return ["--input", "1x28x28" if model == "mnist_bn" else "3x32x32", "--classes", "10"]


def prepare(place: Place, model: str) -> Path:
    """The model's bundle."""
    weights = place.weights(model)
    if not weights.is_file():
        run(HERE / "train.py", model, "--data", place.data, "-o", weights)
    bundle = place.out / "bundles" / model
    if bundle.is_dir():
        return bundle
    source = place.out / f"source-{'mnist' if model == 'mnist_bn' else 'cifar10'}.npz"
    if not source.is_file():
        train = place.data / "train_pool" / "mnist_train60000.npz"
        x, y = data.labelled(train) if model == "mnist_bn" else data.cifar_train(place.data)
        data.write(source, x[: data.SOURCE_IMAGES], y[: data.SOURCE_IMAGES])
    # Batch statistics are BatchNorm's; without it the method `norm` has nothing to do.
    methods = [name for name in WANTED if name in METHODS and (name != "norm" or model.endswith("_bn"))]
    export(
        "build", f"{HERE / 'models.py'}:{model}", "--weights", weights, *form(model), "--id", model,
        "--methods", ",".join(methods), "--source-images", source, "-o", bundle,
    )  # fmt: skip
    return bundle


def attack(place: Place, model: str, suite: str) -> list[Path]:
    """The malicious streams against a model."""
    folder = place.out / f"malicious-{suite}" / model
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, share, noise in ATTACKS:
        file = folder / f"{name}.npz"
        if not file.is_file():
            x, y = (each[: ATTACKED[suite]] for each in data.labelled(place.images(model)))
            images = data.write(folder / f"images-{name}.npz", data.noisy(x, SEED) if noise else x, y)
            # A step is several times as dear as a forward pass, and few steps of ascent do.
            steps = "20" if model.endswith("_bn") else "5"
            export(
                "attack", f"{HERE / 'models.py'}:{model}", "--weights", place.weights(model), *form(model),
                "--images", images, "--share", str(share), "--steps", steps, "--seed", str(SEED), "-o", file,
            )  # fmt: skip
            images.unlink()
        made.append(file)
    return made


def usps(place: Place) -> Path:
    """Digits of other writers and another scanner, in the size of MNIST's."""
    path = place.out / "usps28.npz"
    if not path.is_file():
        x, y = data.labelled(place.data / "dev" / "usps_train7291.npz")
        data.write(path, data.resized(x, 28), y)
    return path


def photographs(place: Place) -> None:
    """Let the shift `frost` use the photographs of the data, if there are any and no others are named."""
    folder = place.data / "assets" / "frost"
    if folder.is_dir():
        os.environ.setdefault("TTA_FROST_DIR", str(folder))


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory as README.md describes it")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/safety"))
    parser.add_argument("--suite", choices=SUITE_MODELS, default="quick")
    parser.add_argument("--models", help="only these, separated by commas")
    parser.add_argument("--jobs", type=int, help="worker processes; default: the cores")
    parser.add_argument("rest", nargs="*", help="further words for tta-edge evaluate, after --")
    arguments = parser.parse_args()
    suite: str = arguments.suite
    place = Place(arguments.data, arguments.out)
    place.out.mkdir(parents=True, exist_ok=True)
    photographs(place)
    models = arguments.models.split(",") if arguments.models else SUITE_MODELS[suite]
    bundles: list[Path] = []
    words: list[str | Path] = []
    for model in models:
        bundles.append(prepare(place, model))
        words += ["--stream", f"{model}=npz:{place.images(model)}"]
        for file in attack(place, model, suite):
            words += ["--malicious", f"{model}={file}"]
        if model == "mnist_bn":
            words += ["--natural", f"{model}=npz:{usps(place)}"]
    jobs = [] if arguments.jobs is None else ["--jobs", str(arguments.jobs)]
    run(
        "-m", "tta_edge", "evaluate", *bundles, "--suite", suite, *words, *jobs, "--seed", str(SEED),
        "--store", place.out / "store", "--json", place.out / f"{suite}.json",
        "--report", place.out / f"{suite}.html", *arguments.rest,
    )  # fmt: skip


if __name__ == "__main__":
    main()
