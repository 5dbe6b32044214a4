"""Adapters beside each other on convvit_ln: tent on norm, lora and side; the parts of ViDA on a stream without resets.

    python examples/adapters/run.py --data DATA -o out/adapters

Settings are chosen on three shifts that are not among the fifteen reported (speckle noise, Gaussian blur, saturation),
under the evaluation setting that is reported. What is in the output directory already is not made again, so the command
goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import curve
import numpy as np
from numpy.typing import NDArray

from tta_edge.evaluate import Plan, check_setting, evaluate, parse_shifts
from tta_edge.streams.npz import open_npz
from tta_edge.streams.shifts import COMMON
from tta_runtime import EngineOptions
from tta_runtime.atomic import write_atomic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "safety"))  # its images, networks and commands

import data
from safety import Place, export, form, photographs

HERE = Path(__file__).resolve().parent
MODEL = "convvit_ln"
TUNING = "speckle_noise:5,gaussian_blur:5,saturate:5"
REPORTED = "all:5"
CLEAN = "none"
EPOCHS = 2
BATCH = 64
COST = ("theta", "forward_ms", "step_ms", "peak_mb")

Wrong = NDArray[np.bool_]
"""[shifts, samples]: whether each prediction was wrong."""
Table = list[dict[str, str]]
"""Rows by column."""


@dataclass(frozen=True)
class Sizes:
    """How many images.

    Attributes:
        online: of each shift where tent is reset before each.
        continual: of each shift of the stream that is never reset.
        warm_up: labelled images of the source that an adapter is warmed up on.
    """

    online: int
    continual: int
    warm_up: int

    def of(self, setting: str) -> int:
        """Images of each shift in an evaluation setting."""
        return self.online if setting == "online" else self.continual


@dataclass(frozen=True)
class Variant:
    """One row: an adapter, a method, and the settings to choose from.

    Attributes:
        title: for the table.
        adapter: its name.
        adapter_set: options of the adapter.
        include: patterns of the layers it works on; none: all that it can.
        warm: whether it is warmed up on labelled images of the source.
        method: what steps.
        structure: options of the method that the bundle is built with.
        grid: hyper-parameter -> values to choose from.
    """

    title: str
    adapter: str
    adapter_set: Sequence[str] = ()
    include: Sequence[str] = ()
    warm: bool = True
    method: str = "tent"
    structure: Sequence[str] = ()
    grid: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"lr": (1e-4, 1e-3, 1e-2)})

    @property
    def weights(self) -> str:
        """Name of the warmed-up adapter."""
        return "-".join([self.adapter, *self.adapter_set]).replace("=", "")

    @property
    def bundle(self) -> str:
        """Name of the bundle."""
        words = [self.weights, self.method, *self.structure, *([] if self.warm else ["cold"])]
        return "-".join(words).replace("=", "")


def vida(title: str, low: int, high: int, views: int, **hyper: float) -> Variant:
    """ViDA beside the projections of attention, as in the paper; its high rank scaled down to the network's width."""
    return Variant(
        title, "vida", (f"low={low}", f"high={high}"), ("*.qkv", "*.proj"),
        method="vida", structure=(f"views={views}",),
        grid={"lr": (1e-4, 1e-3), "decay": (0.9, 0.99, 0.999), **{name: (value,) for name, value in hyper.items()}},
    )  # fmt: skip


ONLINE = (
    Variant("norm", "norm", warm=False),
    Variant("lora, not warmed up", "lora", ("rank=4",), warm=False),
    Variant("lora", "lora", ("rank=4",)),
    Variant("side", "side", ("width=24",)),
)
CONTINUAL = (
    Variant("tent on norm", "norm", warm=False),
    vida("low only", 1, 0, 0),
    vida("high only", 0, 16, 0),
    vida("both", 1, 16, 0),
    vida("both + HKA", 1, 16, 10),
    # This network's logits vary little over the views, and no sample reaches the published threshold; here most do.
    vida("both + HKA, rescaled", 1, 16, 10, spread=1.0, threshold=0.4),
)
SOURCE = ONLINE[0]
"""Its bundle holds the frozen network without any branch."""


@dataclass(frozen=True)
class Workshop:
    """Makes what is missing.

    Attributes:
        place: of the data and of everything made.
        sizes: how many images.
    """

    place: Place
    sizes: Sizes

    def bundle(self, variant: Variant) -> Path:
        """The variant's bundle, its adapter warmed up first."""
        bundle = self.place.out / "bundles" / variant.bundle
        if bundle.is_dir():
            return bundle
        bundle.parent.mkdir(exist_ok=True)
        network: list[str | Path] = [
            f"{HERE.parent / 'safety' / 'models.py'}:{MODEL}", "--weights", self.place.weights(MODEL), *form(MODEL),
            "--adapter", variant.adapter, *_each("--adapter-set", variant.adapter_set),
            *_each("--include", variant.include),
        ]  # fmt: skip
        start: list[str | Path] = []
        if variant.warm:
            weights = self.place.out / f"{variant.weights}.safetensors"
            if not weights.is_file():
                how = ("--data", self._source(), "--epochs", str(EPOCHS), "-o", weights)
                export("warm-up", *network, *how)
            start = ["--adapter-weights", weights]
        structure = _each("--set", [f"{variant.method}.{option}" for option in variant.structure])
        methods = f"source,{variant.method}"
        export("build", *network, *start, "--methods", methods, *structure, "--id", MODEL, "-o", bundle)
        return bundle

    def _source(self) -> Path:
        path = self.place.out / "source.npz"
        if not path.is_file():
            x, y = data.cifar_train(self.place.data)
            data.write(path, x[: self.sizes.warm_up], y[: self.sizes.warm_up])
        return path

    def wrong(
        self, variant: Variant, setting: str, shifts: str, hyper: Mapping[str, float] | None = None
    ) -> Wrong:
        """The method under these shifts, or with `hyper` None the frozen source."""
        method = "source" if hyper is None else variant.method
        words = [
            setting,
            shifts.split(":", 1)[0],
            method,
            *(f"{key}{value:g}" for key, value in (hyper or {}).items()),
        ]
        file = self.place.out / "results" / variant.bundle / f"{'-'.join(words)}.json"
        if not file.is_file():
            stream = open_npz(MODEL, self.place.images(MODEL))
            plan = Plan(
                stream, parse_shifts(stream, shifts), [method], BATCH, check_setting(setting),
                limit=self.sizes.of(setting), hyper={method: hyper} if hyper else None,
            )  # fmt: skip
            found = evaluate(self.bundle(variant), plan, options=EngineOptions(threads=1))
            _write(file, {**found.to_json(), "wrong": [row.wrong.astype(int).tolist() for row in found.rows]})
        return np.array(json.loads(file.read_text())["wrong"], dtype=bool)

    def chosen(self, variant: Variant, setting: str) -> dict[str, float]:
        """The settings of the grid with the smallest mean error on the shifts for tuning; the first of equals."""
        grid = [
            dict(zip(variant.grid, values, strict=True))
            for values in itertools.product(*variant.grid.values())
        ]
        return min(grid, key=lambda hyper: float(self.wrong(variant, setting, TUNING, hyper).mean()))

    def cost(self, variant: Variant) -> dict[str, float]:
        """See cost.py."""
        file = self.place.out / "results" / variant.bundle / "cost.json"
        if not file.is_file():
            command = [sys.executable, str(HERE / "cost.py"), str(self.bundle(variant)), variant.method]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            _write(file, json.loads(done.stdout))
        found: dict[str, float] = json.loads(file.read_text())
        return found


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content).encode())


def _percent(wrong: Wrong) -> str:
    return f"{100 * wrong.mean():.1f}"


def difference(wrong: Wrong, source: Wrong) -> str:
    """Percentage points more than the source, and their standard error; the same images return under each shift."""
    each = 100 * (wrong.astype(float) - source).mean(axis=0)
    return f"{each.mean():+.2f} ± {each.std(ddof=1) / np.sqrt(len(each)):.2f}"


def _setting_words(hyper: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in hyper.items())


def _cost_cells(cost: Mapping[str, float]) -> dict[str, str]:
    return {key.replace("_", " ").replace("mb", "MB"): f"{cost[key]:,.0f}" for key in COST}


def online(shop: Workshop) -> Table:
    """Tent on each adapter, back to the source before each shift."""
    # What there is to recover is the plain network's loss: a warm-up that helped or harmed counts.
    clean, shifted = (shop.wrong(SOURCE, "online", shifts) for shifts in (CLEAN, REPORTED))
    rows = []
    for variant in ONLINE:
        hyper = shop.chosen(variant, "online")
        still = [shop.wrong(variant, "online", shifts) for shifts in (CLEAN, REPORTED)]
        tent = shop.wrong(variant, "online", REPORTED, hyper)
        gap = (shifted.mean() - tent.mean()) / (shifted.mean() - clean.mean())
        rows.append(
            {
                "tent on": variant.title,
                "chosen": _setting_words(hyper),
                "clean, frozen": _percent(still[0]),
                "shifted, frozen": _percent(still[1]),
                "tent": _percent(tent),
                "to the plain source": difference(tent, shifted),
                "gap recovered": f"{gap:+.3f}",
                **_cost_cells(shop.cost(variant)),
            }
        )
    return rows


def continual(shop: Workshop) -> Table:
    """Each part of ViDA on the fifteen shifts one after the other, never reset; also draws the curves of ViDA."""
    source = shop.wrong(SOURCE, "continual", REPORTED)
    rows: Table = []
    lines = {}
    for variant in (None, *CONTINUAL):
        row = dict.fromkeys(("chosen", "warmed up, frozen", "mean", "to the source", "to its warm-up"), "")
        wrong, costs = source, dict.fromkeys(_cost_cells(dict.fromkeys(COST, 0.0)), "")
        if variant is not None:
            hyper = shop.chosen(variant, "continual")
            wrong, costs = shop.wrong(variant, "continual", REPORTED, hyper), _cost_cells(shop.cost(variant))
            row |= {"chosen": _setting_words(hyper), "to the source": difference(wrong, source)}
            if variant.warm:
                frozen = shop.wrong(variant, "continual", REPORTED)
                row |= {"warmed up, frozen": _percent(frozen), "to its warm-up": difference(wrong, frozen)}
            if variant.method == "vida":
                lines[variant.title] = (100 * (wrong.mean(axis=1) - source.mean(axis=1))).tolist()
        row["mean"] = _percent(wrong)
        each = {shift: _percent(part) for shift, part in zip(COMMON, wrong, strict=True)}
        rows.append({"": variant.title if variant else "source", **row, **costs, **each})
    title = "ViDA on a stream that is never reset: points of error more than the frozen source"
    write_atomic(shop.place.out / "continual.svg", curve.drawn(lines, COMMON, title).encode())
    return rows


def transposed(rows: Table) -> Table:
    """A column for each row, headed by what stands in its first column."""
    first, *others = rows[0]
    return [{first: column, **{row[first]: row[column] for row in rows}} for column in others]


def markdown(rows: Table) -> str:
    """A table; figures to the right."""
    columns = list(rows[0])
    words = {columns[0], "chosen"}
    lines = [columns, ["---" if column in words else "---:" for column in columns]]
    lines += [[row[column] for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Make what is missing and write the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="directory as ../safety/README.md describes it"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("out/adapters"))
    parser.add_argument("--online", type=int, default=1000, help="images of each shift for tent (1000)")
    parser.add_argument("--continual", type=int, default=500, help="images of each shift for ViDA (500)")
    parser.add_argument("--warm-up", type=int, default=20_000, help="source images of a warm-up (20000)")
    arguments = parser.parse_args()
    place = Place(arguments.data, arguments.out)
    sizes = Sizes(arguments.online, arguments.continual, arguments.warm_up)
    place.out.mkdir(parents=True, exist_ok=True)
    mark = place.out / "sizes.json"
    if mark.is_file() and json.loads(mark.read_text()) != asdict(sizes):
        parser.error(f"{place.out} holds results of other sizes: {mark.read_text()}; choose another -o")
    if not place.weights(MODEL).is_file():
        parser.error(f"there are no weights of {MODEL}: train them with examples/safety/train.py")
    _write(mark, asdict(sizes))
    photographs(place)
    tables = {"online": online(Workshop(place, sizes)), "continual": continual(Workshop(place, sizes))}
    text = (
        f"{MODEL}, batch {BATCH}, severity 5, error in %, differences in points with their standard errors. Warm-up: "
        f"{EPOCHS} epochs of {sizes.warm_up:,} images.\n\nOnline, {sizes.online:,} images of each shift:\n\n"
        f"{markdown(tables['online'])}\nContinual, {sizes.continual:,} images of each shift, never reset:\n\n"
        f"{markdown(transposed(tables['continual']))}"
    )
    _write(place.out / "adapters.json", {"model": MODEL, "sizes": asdict(sizes), **tables})
    write_atomic(place.out / "adapters.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
