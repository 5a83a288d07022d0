"""What the study of split drawings says: a verdict on every share, tables, charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from matplotlib.axes import Axes

from personae.evaluate.charts import COLOURS, chart
from personae.study.stats import Interval, interval, paired
from personae.study.study import Answer, Chart, Entry, Picture, Row, Table, where

LEAK = 0.05
"""How far from chance the style may be told of what the server holds at the hand-off."""

STYLE = 0.02
"""Share of the style score at home that a split may lose."""

REST_BYTES = 1024
"""Of a packet, beside latents and history."""


@dataclass(frozen=True)
class Measure:
    """A figure of every client or every style, and whether more or less of it is better."""

    key: str
    title: str
    of: Literal["clients", "styles"]
    more: bool


MEASURES = (
    Measure("found", "style found", "clients", True),
    Measure("named", "thing found", "clients", True),
    Measure("frechet", "Fréchet distance", "styles", False),
    Measure("kid", "kernel distance", "styles", False),
)


@dataclass(frozen=True)
class Verdict:
    """One share against all at home.

    `passes` and `fewer` are a client's passes through the U-Net and the share of them that it is spared. `leak` is how
    often a probe tells the style at the hand-off, `style` how often that of the finished picture is right, `home` at
    share 0. `differences` are paired, by measure.
    """

    share: float
    passes: float
    fewer: float
    chance: float
    leak: Interval
    style: float
    home: Interval
    differences: Mapping[str, Interval]
    rest_bytes: int

    @property
    def hides(self) -> bool:
        return abs(self.leak.mean - self.chance) <= LEAK

    @property
    def keeps_style(self) -> bool:
        return self.style >= (1 - STYLE) * self.home.mean

    @property
    def has_style(self) -> bool:
        """A style that is hardly there at home cannot be lost, and then no verdict on it is worth anything."""
        return self.home.low > self.chance

    def told(self, better: bool) -> list[str]:
        """Measures in which the split is told to be better, or worse, than all at home."""
        apart = [m for m in MEASURES if m.key in self.differences and self.differences[m.key].excludes(0)]
        return [m.title for m in apart if ((self.differences[m.key].mean > 0) == m.more) == better]

    @property
    def accepted(self) -> bool:
        kept = self.has_style and self.keeps_style and not self.told(better=False)
        return kept and self.hides and self.rest_bytes <= REST_BYTES


def handover_answer(found: Sequence[Row], shares: Sequence[float]) -> Answer:
    """`shares` as the study's."""
    drawn = where(found, stage="share")
    verdicts = [verdict for share in sorted(shares) if (verdict := verdict_of(drawn, share)) is not None]
    pictures = [
        Picture(row["picture"], f"A client a row, from the same noise; server's share {_list(shares)}; last, real.")
        for row in where(found, stage="pictures")
    ]
    if not verdicts:
        return Answer()
    split = [verdict for verdict in verdicts if verdict.share > 0]
    findings = [_sentence(verdict) for verdict in split]
    if split:
        good = [f"{verdict.share:.0%}" for verdict in split if verdict.accepted]
        findings.append(f"Accepted shares of those tried: {', '.join(good) or 'none'}.")
        findings += [*_nothing_to_lose(split[0]), _power_sentence(drawn, split)]
        findings.append(_bytes_sentence(drawn, split))
    tables = [_quality_table(verdicts, drawn), _told_table(verdicts, drawn), _cost_table(verdicts, drawn)]
    charts = [_style_chart(verdicts, drawn), _leak_chart(verdicts, drawn), _alike_chart(verdicts, drawn)]
    return Answer(findings, {"shares": [_numbers(verdict) for verdict in verdicts]}, tables, charts, pictures)


def verdict_of(drawn: Sequence[Row], share: float) -> Verdict | None:
    """None without rows of this share and of 0."""
    rows, home = where(drawn, share=share), where(drawn, share=0.0)
    if not rows or not _shared(rows, home):
        return None
    clients = MEASURES[0]
    rows, home = _shared(rows, home), _shared(home, rows)
    passes, before = _mean(rows, "client_passes"), _mean(home, "client_passes")
    return Verdict(
        share,
        passes,
        1 - passes / before,
        rows[0]["chance"],
        interval(list(values(rows, "clients", "leak").values())),
        _mean(rows, clients.key),
        interval(list(values(home, "clients", clients.key).values())),
        {m.key: difference(rows, home, m) for m in MEASURES},
        max(int(value) for value in values(rows, "clients", "rest_bytes").values()),
    )


def difference(rows: Sequence[Row], home: Sequence[Row], measure: Measure) -> Interval:
    """Of the same clients, or styles, of the same seeds."""
    ours, theirs = (values(part, measure.of, measure.key) for part in (rows, home))
    return paired(list(ours.values()), [theirs[at] for at in ours])


def values(rows: Sequence[Row], of: str, key: str) -> dict[tuple[int, str], float]:
    """A figure by seed and client, or seed and style."""
    return {(row["seed"], name): figures[key] for row in rows for name, figures in row[of].items()}


def _shared(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The rows of seeds that have both: a study may not be finished."""
    return [row for row in rows if where(others, seed=row["seed"])]


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(values(rows, "clients", key).values())


def _numbers(verdict: Verdict) -> dict[str, Any]:
    return {
        **{key: value for key, value in vars(verdict).items() if key not in ("leak", "home", "differences")},
        "leak": vars(verdict.leak),
        "home": vars(verdict.home),
        "differences": {key: vars(found) for key, found in verdict.differences.items()},
        "accepted": verdict.accepted,
    }


# --- sentences -------------------------------------------------------------------------------------------------------


def _sentence(verdict: Verdict) -> str:
    def judged(passed: bool) -> str:
        return "passes" if passed else "fails"

    worse, better = verdict.told(better=False), verdict.told(better=True)
    quality = f"worse in {', '.join(worse)} (fails)" if worse else "nothing is worse that can be told (passes)"
    gained = f"; better in {', '.join(better)}" if better else ""
    return (
        f"Server's share {verdict.share:.0%}: {'accepted' if verdict.accepted else 'not accepted'}. The client makes "
        f"{verdict.fewer:.1%} fewer calls. The style is told from {verdict.leak.told('.1%')} of hand-offs, chance is "
        f"{verdict.chance:.1%} ({judged(verdict.hides)}: nothing that the server draws with should depend on the "
        "client). "
        f"It is found in {verdict.style:.1%} of finished pictures, in "
        f"{verdict.home.mean:.1%} all at home ({judged(verdict.keeps_style)}). Against all at home, {quality}{gained}. "
        f"Packets hold {verdict.rest_bytes} bytes beside latents and history "
        f"({judged(verdict.rest_bytes <= REST_BYTES)})."
    )


def _nothing_to_lose(verdict: Verdict) -> list[str]:
    if verdict.has_style:
        return []
    return [
        f"All at home the style is found in {verdict.home.told('.1%')} of pictures, which is not told from chance "
        f"({verdict.chance:.0%}): these clients have no style that a split could lose, and so no share is accepted. "
        "Train longer."
    ]


def _power_sentence(drawn: Sequence[Row], split: Sequence[Verdict]) -> str:
    """What a probe of this kind can tell, without which a leak at chance says little."""
    rows = [where(drawn, share=verdict.share) for verdict in split]
    told = ", ".join(f"{_mean(r, 'leak_cluster'):.0%} at {v.share:.0%}" for r, v in zip(rows, split, strict=True))
    return (
        f"Had the server drawn with the group's adapter and the client's own words, the style would be told from "
        f"{told} of hand-offs; of pictures finished all at home such a probe tells "
        f"{_mean(where(drawn, share=0.0), 'leak_finished'):.0%}."
    )


def _bytes_sentence(drawn: Sequence[Row], split: Sequence[Verdict]) -> str:
    rows = [row for verdict in split for row in where(drawn, share=verdict.share)]
    history = sorted({round(value) for value in values(rows, "clients", "history_bytes").values()})
    latent = _mean(rows, "latent_bytes")
    return (
        f"A packet carries one latent of {latent:,.0f} bytes for each picture and a history of {_and(history)} bytes, "
        f"and at most {max(verdict.rest_bytes for verdict in split)} bytes besides."
    )


def _and(words: Sequence[Any]) -> str:
    told = [str(word) for word in words]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} or {told[-1]}"


def _list(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


# --- tables ----------------------------------------------------------------------------------------------------------


def _quality_table(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Table:
    titles = [title for measure in MEASURES for title in (measure.title, "minus all at home")]
    entries: list[list[Entry]] = []
    for verdict in verdicts:
        rows = where(drawn, share=verdict.share)
        cells: list[Entry] = []
        for measure in MEASURES:
            cells += [
                fmean(values(rows, measure.of, measure.key).values()),
                verdict.differences[measure.key].starred("+.3g") if verdict.share else "",
            ]
        entries.append([f"{verdict.share:.0%}", *cells, "yes" if verdict.accepted and verdict.share else ""])
    pairs = verdicts[-1].differences
    note = (
        f"Mean paired difference and its 95 % interval by Student's t, over clients and seeds ({pairs['found'].num} "
        f"pairs) or styles and seeds ({pairs['frechet'].num}), as if they were independent, though clients of a seed "
        "share its trained model; * excludes 0. Style found: by a probe of real pictures of other things. Thing found: "
        "nearest of all real ones in the style. Distances of features `statistics` to real pictures of the same "
        f"things. Accepted: style told at the hand-off within {100 * LEAK:.0f} points of chance, style found at least "
        f"{1 - STYLE:.0%} of that at home, where its interval lies above chance, nothing worse with an interval that "
        f"excludes 0, and at most {REST_BYTES} bytes beside latents and history."
    )
    return Table("Finished pictures", ("server's share", *titles, "accepted"), entries, note)


def _told_table(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Table:
    columns = (
        *("server's share", "style told", "above chance", "with the group's adapter and own words"),
        *("of finished pictures", "chance", "like the finished picture", "like another of the client's"),
    )
    entries: list[list[Entry]] = []
    for verdict in verdicts:
        rows = where(drawn, share=verdict.share)
        leak = [row["clients"][name]["leak"] - row["chance"] for row in rows for name in row["clients"]]
        told = [_mean(rows, key) for key in ("leak_cluster", "leak_finished")]
        alike = [_mean(rows, key) for key in ("alike", "alike_other")]
        entries.append(
            [f"{verdict.share:.0%}", verdict.leak.mean, interval(leak).starred("+.3g"), *told, verdict.chance, *alike]
        )
    note = (
        "Of what the model takes the picture to be at the hand-off, decoded. Style told: by a linear probe of these, "
        "fitted on the other half of the things. The server knows neither the client's adapter nor its words, and all "
        "styles draw the same things, so that what is above chance would be a fault. What such a probe can tell at all "
        "is shown by those of hand-offs with the group's adapter and the client's own caption, and of what the client "
        "finished. Alike: cosine of pooled pixels. At share 0 nothing is handed over; the row is of the first call."
    )
    return Table("What the server's half says", columns, entries, note)


def _cost_table(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Table:
    keys = {
        "server_passes": "server's passes",
        "client_passes": "client's passes",
        "server_seconds": "server's seconds",
        "client_seconds": "client's seconds",
        "latent_bytes": "latent, bytes",
        "history_bytes": "history, bytes",
        "rest_bytes": "the rest, bytes",
    }
    entries: list[list[Entry]] = []
    for verdict in verdicts:
        rows = where(drawn, share=verdict.share)
        entries.append([f"{verdict.share:.0%}", *(_mean(rows, key) for key in keys), f"{verdict.fewer:.1%}"])
    note = (
        "Passes through the U-Net, counted by a hook: two for each call of the model with guidance. Seconds of one "
        "processor for one picture, captions, decoding and the packet included; bytes of one picture, the rest of one "
        "packet, whose signature is as long as the server's."
    )
    return Table("What it costs", ("server's share", *keys.values(), "passes spared"), entries, note)


# --- charts ----------------------------------------------------------------------------------------------------------


def _line(axes: Axes, verdicts: Sequence[Verdict], found: Sequence[Interval], colour: str, label: str) -> None:
    at = [100 * verdict.share for verdict in verdicts]
    low = [each.mean if math.isnan(each.low) else each.low for each in found]
    high = [each.mean if math.isnan(each.high) else each.high for each in found]
    axes.fill_between(at, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)
    axes.plot(at, [each.mean for each in found], color=COLOURS[colour], marker="o", markersize=4, label=label)


def _intervals(verdicts: Sequence[Verdict], drawn: Sequence[Row], key: str) -> list[Interval]:
    rows = [where(drawn, share=verdict.share) for verdict in verdicts]
    return [interval(list(values(part, "clients", key).values())) for part in rows]


def _finished(axes: Axes, title: str) -> None:
    axes.set(xlabel="server's share of the calls, %", ylim=(-0.03, 1.03), title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _style_chart(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Chart:
    def draw(axes: Axes) -> None:
        _line(axes, verdicts, _intervals(verdicts, drawn, "found"), "after", "style found")
        _line(axes, verdicts, _intervals(verdicts, drawn, "named"), "up", "thing found")
        axes.axhline((1 - STYLE) * verdicts[0].home.mean, color=COLOURS["before"], linestyle="--", linewidth=1,
                     label=f"{1 - STYLE:.0%} of the style at home")  # fmt: skip
        axes.axhline(drawn[0]["real"], color=COLOURS["real"], linestyle=":", linewidth=1, label="style, real pictures")
        axes.axhline(drawn[0]["chance"], color=COLOURS["muted"], linestyle=":", linewidth=1, label="style, chance")
        _finished(axes, "Finished pictures: share in which it is right")

    drawing = chart("handover-style", 6.6, 3.2, draw, "style and thing of finished pictures by the server's share")
    return Chart("style", drawing, "Bands are 95 % intervals over clients and seeds.")


def _leak_chart(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Chart:
    def draw(axes: Axes) -> None:
        chance = drawn[0]["chance"]
        axes.axhspan(chance - LEAK, chance + LEAK, color=COLOURS["real"], alpha=0.2, linewidth=0)
        axes.axhline(chance, color=COLOURS["muted"], linestyle=":", linewidth=1, label="chance")
        _line(axes, verdicts, _intervals(verdicts, drawn, "leak"), "after", "adapter for all, neutral caption")
        _line(axes, verdicts, _intervals(verdicts, drawn, "leak_cluster"), "before", "group's adapter, own words")
        _finished(axes, "Style told at the hand-off")

    drawing = chart("handover-leak", 6.6, 3.2, draw, "style told at the hand-off by the server's share")
    return Chart("leak", drawing, f"Grey: within {100 * LEAK:.0f} points of chance, which is asked for.")


def _alike_chart(verdicts: Sequence[Verdict], drawn: Sequence[Row]) -> Chart:
    def draw(axes: Axes) -> None:
        _line(axes, verdicts, _intervals(verdicts, drawn, "alike"), "after", "with the finished picture")
        _line(axes, verdicts, _intervals(verdicts, drawn, "alike_other"), "real", "with another one")
        _finished(axes, "Cosine of what is expected at the hand-off")

    drawing = chart("handover-alike", 6.6, 3.2, draw, "how like the finished picture the hand-off is")
    return Chart("alike", drawing, "How much of the finished picture the server can see.")
