"""The sentences, tables and charts of `leakage.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes

from personae.data.emoji import HELD_OUT_STYLES, SEEN_STYLES
from personae.evaluate.charts import COLOURS, chart
from personae.study.study import Answer, Chart, Entry, Row, Table, where

THINGS = ("other", "same")
ATTACKERS = ("word", *THINGS)
OF = {
    "word": "by the style's word",
    "other": "by public pictures of other things",
    "same": "by public pictures of the same things",
}


def answer_of(found: Sequence[Row]) -> Answer:
    """As far as it was measured; figures are means over seeds."""
    prompts, styles, noises = _prompt_rows(found), where(found, stage="styles"), _noise_rows(found)
    findings = [*_told_of_prompts(prompts), *_told_of_styles(styles), *_told_of_noise(noises)]
    tables = [_table_of_prompts(prompts)] if prompts else []
    charts = [_chart_of_prompts(prompts)] if prompts else []
    if styles:
        tables += [_table_of_naming(styles), _table_of_ranks(styles)]
    if noises:
        tables.append(_table_of_noise(noises))
        charts.append(_chart_of_noise(noises, len(where(found, stage="run")[0]["styles"])))
    numbers = {"prompts": prompts, "styles": [dict(row) for row in styles], "noise": noises}
    return Answer(findings, numbers, tables, charts)


PROMPT_COLUMNS = {
    "right": "tokens read",
    "by chance": "from another prompt's states",
    "whole": "prompts read whole",
    "whole by chance": "whole, from another's",
    "style named": "style's word read",
    "noticed": "own word noticed",
    "false alarms": "own word suspected where none is",
    "residual": "residual there",
    "residual elsewhere": "largest elsewhere",
    "vector": "cosine to its vector",
}


def _mean_of(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, Any]:
    """Over seeds, of what was measured."""
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: fmean(own) for key, own in values.items() if own}


def _prompt_rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    rows = where(found, stage="prompts")
    pairs = dict.fromkeys((row["sent"], row["noise"]) for row in rows)
    return [
        {"sent": sent, "noise": noise, **_mean_of(where(rows, sent=sent, noise=noise), list(PROMPT_COLUMNS))}
        for sent, noise in pairs
    ]


def _noise_rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    rows = where(found, stage="noise")
    levels = dict.fromkeys(row["noise"] for row in rows)
    keys = ("length", *ATTACKERS, "agreement")
    return [{"noise": noise, **_mean_of(where(rows, noise=noise), keys)} for noise in levels]


SAYS = {
    "told": "An encoded prompt that names the style",
    "own": "An encoded prompt with the client's own word",
    "neutral": "An encoded prompt without own words, as an inference server gets them,",
}


def _told_of_prompts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = []
    for sent, says in SAYS.items():
        for row in [row for row in rows if row["sent"] == sent][:1]:
            at = "" if not row["noise"] else f" with noise of {row['noise']:g} standard deviations"
            words = "tokens" if sent != "own" else "tokens beside that word"
            told.append(
                f"{says} is read back{at}: {row['right']:.1%} of {words}, {row['whole']:.0%} of prompts without an "
                f"error; from another prompt's states {row['by chance']:.0%} and {row['whole by chance']:.0%}."
            )
            if sent == "own":
                vector = f", and a vector found for it (cosine {row['vector']:.2f})" if "vector" in row else ""
                told.append(f"The own word's place is noticed in {row['noticed']:.0%} of prompts{vector}.")
            else:
                told.append(f"The style's word is among what is read in {row['style named']:.0%} of these prompts.")
    for row in [row for row in rows if row["sent"] == "told" and row["noise"] > 0]:
        told.append(f"With noise of {row['noise']:g} standard deviations on the states: {row['right']:.0%} of tokens.")
    return told


def _clients_of(styles: Sequence[Row]) -> list[Mapping[str, Any]]:
    return [client for row in styles for client in row["clients"]]


def _share_named(clients: Sequence[Mapping[str, Any]], attacker: str) -> float | None:
    return fmean(each[attacker] == each["style"] for each in clients) if clients else None


PARTS = {"seen": SEEN_STYLES, "held out": HELD_OUT_STYLES}


def _part(clients: Sequence[Mapping[str, Any]], part: str) -> list[Mapping[str, Any]]:
    return [each for each in clients if each["style"] in PARTS[part]]


def _told_of_styles(styles: Sequence[Row]) -> list[str]:
    if not styles:
        return []
    clients, told = _clients_of(styles), []
    for name in ATTACKERS:
        right, chance, most = (
            fmean(row[name]["top_1"] for row in styles),
            fmean(row[name]["chance"]["top_1"] for row in styles),
            fmean(row[name]["chance 95 %"] for row in styles),
        )
        parts = [
            f"{_share_named(_part(clients, part), name):.0%} for styles that were {part} in pre-training"
            for part in PARTS
            if _part(clients, part)
        ]
        told.append(
            f"The style is named from a description {OF[name]} for {right:.0%} of clients ({', '.join(parts)}); with "
            f"styles shuffled {chance:.0%}, at most {most:.0%} in 95 % of shuffles."
        )
    agreed = fmean(row["agreement"] for row in styles)
    told.append(f"The server's own groups agree with the styles to an adjusted Rand index of {agreed:.2f}.")
    ranks, others = (_median([each[key] for each in clients]) for key in ("rank moved", "rank moved of others"))
    known = styles[0]["known tokens"]
    told.append(
        f"Were a client's own word sent, the style's known word would be number {ranks:,.0f} of {known:,} nearest to "
        f"it, other styles' words number {others:,.0f} (medians, by the way from where words start)."
    )
    return told


def _told_of_noise(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"With noise of {row['noise']:g} on each number of a description, pictures of the same things name "
        f"{row['same']:.0%} of styles, of other things {row['other']:.0%}, words {row['word']:.0%}, and the groups "
        f"agree with the styles to {row['agreement']:.2f}."
        for row in rows
    ]


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _table_of_prompts(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in PROMPT_COLUMNS if any(key in row for row in rows)]
    entries: list[list[Entry]] = [[row["sent"], row["noise"], *(row.get(key) for key in keys)] for row in rows]
    note = (
        "Told: the style's known word stands in the prompt. Own: the client's learned one, whose place is not counted "
        "among the tokens. Neutral: neither. Noise is in standard deviations of the states. Cosine: of the ways that "
        "the client's word and the vector found for it went from where words start."
    )
    return Table("Prompts read back", ("sent", "noise", *(PROMPT_COLUMNS[key] for key in keys)), entries, note)


def _table_of_naming(styles: Sequence[Row]) -> Table:
    clients, rows = _clients_of(styles), list[list[Entry]]()
    for name in ATTACKERS:
        both = [[_share_named(_part(clients, part), name) for part in PARTS]]
        keys = ("top_1", "reciprocal_rank", "bits")
        rows.append([OF[name], *_values(styles, name, keys), *both[0]])
        chance = [fmean(row[name]["chance"][key] for row in styles) for key in keys]
        rows.append([f"{OF[name]}, styles shuffled", *chance, None, None])
    note = (
        "By the style's word: compared with what that word brings into captions. By public pictures: with what "
        "somebody sends who has pictures of that style, of the things that clients have, or of none of them. Bits are "
        "estimated from few clients: compare with the shuffled ones. Words of styles that were held out mean nothing "
        "to this model."
    )
    columns = ("style named", "right", "mean of 1 / rank", "bits", *(f"right, {part}" for part in PARTS))
    return Table("Naming a client's style from its description", columns, rows, note)


def _values(styles: Sequence[Row], name: str, keys: Sequence[str]) -> list[float]:
    return [fmean(row[name][key] for row in styles) for key in keys]


def _table_of_ranks(styles: Sequence[Row]) -> Table:
    clients, rows = _clients_of(styles), list[list[Entry]]()
    keys = ("rank", "rank of others", "rank moved", "rank moved of others", "rank by chance")
    for style in dict.fromkeys(each["style"] for each in clients):
        own = [each for each in clients if each["style"] == style]
        named_by = [_share_named(own, name) for name in ATTACKERS]
        rows.append([style, len(own), *named_by, *(_median([each[key] for each in own]) for key in keys)])
    columns = (
        *("style", "clients", *(f"named {OF[name]}" for name in ATTACKERS)),
        *("rank of its word", "of other styles' words", "rank, from the start", "of others, from the start"),
        "rank for a random vector",
    )
    note = (
        f"Ranks are medians among {styles[0]['known tokens']:,} known tokens, by cosine to the client's own word, "
        "which it does not send; from the start: of the ways from the word that all begin with."
    )
    return Table("Style by style", columns, rows, note)


def _table_of_noise(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("noise", "length", *ATTACKERS, "agreement")
    columns = ("noise", "its length", *(f"named {OF[name]}" for name in ATTACKERS), "adjusted Rand index")
    note = (
        "Noise is the standard deviation on each number of a description of length 1; its length grows with the square "
        "root of how many numbers there are. The index says how far groups made once, of the last descriptions alone, "
        "agree with the styles; the server goes on from those of earlier rounds."
    )
    return Table("Noise on descriptions", columns, [[row.get(key) for key in keys] for row in rows], note)


def _levels(axes: Axes, levels: Sequence[float], says: str) -> None:
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.set(xlabel=says, ylim=(-0.05, 1.05))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _chart_of_noise(rows: Sequence[Mapping[str, Any]], num_styles: int) -> Chart:
    lines = (("same", "after", "o-"), ("other", "down", "v-"), ("word", "up", "s-"), ("agreement", "before", "^-"))

    def draw(axes: Axes) -> None:
        for key, colour, form in lines:
            label = "groups agree with styles" if key == "agreement" else f"named {OF[key]}"
            axes.plot(range(len(rows)), [row[key] for row in rows], form, color=COLOURS[colour], label=label)
        axes.axhline(1 / num_styles, color=COLOURS["muted"], linewidth=1, linestyle=":", label="chance")
        axes.set_title("Styles named, and groups found")
        _levels(axes, [row["noise"] for row in rows], "noise on each number of a description")

    drawing = chart("leakage-noise", 6.6, 3.2, draw, "styles named and groups found, by noise on descriptions")
    return Chart("noise", drawing, "Where noise hides styles, it hides from the server which clients belong together.")


def _chart_of_prompts(rows: Sequence[Mapping[str, Any]]) -> Chart:
    levels = list(dict.fromkeys(row["noise"] for row in rows))
    lines = (("told", "after", "o-", "style named"), ("own", "up", "s-", "own word"))

    def draw(axes: Axes) -> None:
        for sent, colour, form, label in lines:
            own = [row for row in rows if row["sent"] == sent]
            at = [levels.index(row["noise"]) for row in own]
            axes.plot(at, [row["right"] for row in own], form, color=COLOURS[colour], label=f"prompt with {label}")
            told = f"{label}, another's states"
            axes.plot(at, [row["by chance"] for row in own], "|:", color=COLOURS[colour], label=told, alpha=0.7)
        axes.set_title("Share of tokens that are read back")
        _levels(axes, levels, "noise on states, in standard deviations")

    drawing = chart("leakage-prompts", 6.6, 3.2, draw, "tokens read back from encoded prompts, by noise")
    return Chart("prompts", drawing, "An encoded prompt is as readable as the prompt.")
