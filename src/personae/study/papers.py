"""What papers claim, beside what was measured here: `personae bench papers`.

A claim is judged by a function of numbers that a study's recipe wrote; these stand in results/, one file per study, put
there by benchmarks/record.py from a finished run. Nothing is typed in by hand, and a claim whose study was not run says
so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from personae.recipe.config import read_table
from personae.study.report import markdown_rows
from personae.study.stats import Difference, Interval, paired

RESULTS = Path(__file__).parent / "results"

SPIRE = "Ozkara, Zhou, Diggavi 2025, SPIRE, arXiv:2506.12303"
DC_SCORES = "Jha et al. 2025, diffusion-classifier scores, arXiv:2410.00700"
NEURONS = "Liao et al. 2025, concept neuron selection, arXiv:2510.02296"

PLAIN = "spire"
"""The paper's method as it is printed."""

REFERENCE = "centralized"
"""What is measured beside the rivals, and is none of them: its pre-training has everybody's images in one place."""

Verdict = Literal["agrees", "disagrees", "partly", "not measured"]
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    measured: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Claim:
    """What a paper says, in our words, or we say ourselves; the shipped recipe that tests it; how its numbers are read.

    `recipe` is the name of a shipped recipe, whose study's summary `judge` is given.
    """

    paper: str
    claim: str
    recipe: str
    judge: Callable[[Numbers], Judged]


@dataclass(frozen=True)
class Line:
    """One row of the table. `cells` says how much of the study was measured when its numbers were taken, and whether
    its recipe's settings have changed since."""

    paper: str
    claim: str
    recipe: str
    measured: str
    verdict: Verdict
    why: str
    cells: str = ""


def table(results: Path = RESULTS) -> list[Line]:
    return [_line(claim, results) for claim in CLAIMS]


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def markdown(lines: Sequence[Line]) -> str:
    heads = ("paper", "claim", "recipe", "measured here", "verdict", "why")
    rows = [(x.paper, x.claim, f"`{x.recipe}`{x.cells}", x.measured, x.verdict, x.why) for x in lines]
    return "\n".join(markdown_rows(heads, rows))


def index(results: Path = RESULTS) -> str:
    """Every study with a result, as a page: what it asks, what it cost, and what it found first."""
    rows = []
    for path in sorted(results.glob("*.json")):
        summary, (room, _, name) = json.loads(path.read_text("utf-8")), path.stem.partition("-")
        measured = f"{summary['measured']} of {summary['cells']}{_since(summary, f'{room}/{name}')}"
        first, minutes = next(iter(summary["findings"]), ""), summary["cpu_seconds"] / 60
        rows.append((f"[{room}/{name}]({path.stem}.md)", summary["title"], measured, f"{minutes:.0f}", first))
    heads = ("recipe", "question", "cells", "CPU-minutes", "the first of its findings")
    return "\n".join(["# All studies", "", *markdown_rows(heads, rows), ""])


def settings_digest(recipe: str) -> str:
    """16 hex digits that change with any of the settings, or the seed, that a shipped recipe of a study gives."""
    table, _ = read_table(recipe)
    text = json.dumps([table["settings"], table.get("seed", 0)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _since(summary: Numbers, recipe: str) -> str:
    return "" if summary["settings"] == settings_digest(recipe) else ", with former settings"


def result_path(recipe: str, results: Path = RESULTS) -> Path:
    return results / f"{recipe.replace('/', '-')}.json"


def _line(claim: Claim, results: Path) -> Line:
    path = result_path(claim.recipe, results)
    if not path.is_file():
        missing = f"run it with: personae run {claim.recipe}"
        return Line(claim.paper, claim.claim, claim.recipe, "", "not measured", missing)
    summary = json.loads(path.read_text("utf-8"))
    done, all_ = summary["measured"], summary["cells"]
    cells = "" if done == all_ else f" ({done} of {all_} cells)"
    judged = claim.judge(summary["numbers"])
    verdict: Verdict = "partly" if cells and judged.verdict == "agrees" else judged.verdict
    cells += _since(summary, claim.recipe)
    return Line(claim.paper, claim.claim, claim.recipe, judged.measured, verdict, judged.why, cells)


# --- judges ------------------------------------------------------------------------------------------------------


def recovers(numbers: Numbers) -> Judged:
    over = numbers["over_cramer_rao"]
    close = abs(over["mean"] - 1) <= 3 * over["error"] + 0.05
    return Judged(
        f"mean squared error {over['mean']:.3f} ± {over['error']:.3f} times the Cramér-Rao bound",
        "agrees" if close else "disagrees",
        "gradient descent on the logit of the weight, means known",
    )


def in_any_dimension(numbers: Numbers) -> Judged:
    slopes = numbers["slope_of_dims"]
    flat = bool(slopes) and all(abs(s["slope"]) + 2 * s["error"] < 0.05 for s in slopes.values())
    told = "; ".join(f"|mu| = {norm}: {s['slope']:+.3f} ± {s['error']:.3f}" for norm, s in slopes.items())
    why = "within 0.05 of 0; the error has no d in it at all, where the bound as a summary gives it has d / |mu_t|^2"
    return Judged(f"slope of the error against d, in logarithms: {told}", "agrees" if flat else "disagrees", why)


def like_one_over_n(numbers: Numbers) -> Judged:
    slopes = [s["slope"] for s in numbers["slope_of_images"].values()]
    right = all(abs(slope + 1) <= 0.15 for slope in slopes)
    told = f"slope of the error against n between {min(slopes):.2f} and {max(slopes):.2f}"
    return Judged(told, "agrees" if right else "disagrees", "-1 within 0.15 is asked for")


def is_maximum_likelihood(numbers: Numbers) -> Judged:
    apart = numbers["apart"]
    return Judged(
        f"on the same images {100 * apart['mean']:.1f} % as far apart as maximum likelihood is from the truth",
        "agrees" if apart["highest"] < 0.2 else "partly" if apart["mean"] < 0.2 else "disagrees",
        "the loss over all noise levels; docs/theory.md shows the identity",
    )


def more_components(numbers: Numbers) -> Judged:
    agreement = numbers["agreement"]
    below, cases = agreement["below"], agreement["cases"]
    verdict: Verdict = "agrees" if 0 < below == cases else "partly" if below else "disagrees"
    told = f"closer than 20 % to maximum likelihood in {below} of {cases} cases"
    return Judged(told, verdict, "an open question of the paper: logits as additive biases")


def imperfect_backbone(numbers: Numbers) -> Judged:
    tolerated = numbers.get("tolerated_backbone_error")
    if tolerated is None:
        return Judged("", "not measured", "the federated means were not learned yet")
    told = "; ".join(f"{value:.2f} with {images} images" for images, value in tolerated.items())
    best = min(numbers["backbone_errors"])
    return Judged(
        f"error of the means up to which new clients' weights stay within a quarter of those on true means: {told}",
        "agrees" if all(value >= best for value in tolerated.values()) else "partly",
        f"an open question of the paper; the best federation of the study leaves an error of {best:.2f}",
    )


def mixture_new_clients(numbers: Numbers) -> Judged:
    if "new_clients_points" not in numbers:
        return Judged("", "not measured", "new clients were not measured yet")
    won, points = numbers["new_clients_half_of_fine_tuning"], numbers["new_clients_points"]
    low, high = numbers["population_after_fine_tuning"]
    return Judged(
        f"divergence below half of fine-tuning's at {won} of {points} settings with 100 images or fewer",
        "agrees" if 0 < won == points else "partly" if won else "disagrees",
        f"fine-tuning takes the population's divergence to {low:.2f} to {high:.2f} nats, the embedding leaves it",
    )


def beats_rivals(figure: str, kind: str = "all", ours: str = PLAIN) -> Callable[[Numbers], Judged]:
    """Ours minus every rival that pools no data, all new clients together, or those of one kind."""

    def judge(numbers: Numbers) -> Judged:
        pairs = [p for p in _rivals_of(ours, numbers.get("paired", ())) if p["kind"] == kind and p["figure"] == figure]
        if not pairs:
            return Judged("", "not measured", "the final stage was not measured yet")
        told = "; ".join(f"{p['rival']}, {p['images'] or 'all'} images: {_interval(p).told('+.3g')}" for p in pairs)
        apart = [Difference(_interval(p), _interval(p["over_seeds"])) for p in pairs]
        won = [each for each in apart if each.pooled.high < 0]
        lost = [each for each in apart if each.pooled.low > 0]
        solid = [each for each in won if each.holds_over_seeds]
        verdict: Verdict = "agrees" if len(solid) == len(pairs) else "partly" if len(won) > len(lost) else "disagrees"
        if verdict == "agrees" and numbers.get("diverged"):
            verdict = "partly"
        held = sum(each.holds_over_seeds for each in (*won, *lost))
        why = (
            f"lower than the rival in {len(won)}, higher in {len(lost)} of {len(pairs)} cases; "
            f"in {held} of these also over the seeds' means alone"
        )
        return Judged(told, verdict, why)

    return judge


def _rivals_of(ours: str, pairs: Sequence[Numbers]) -> list[Numbers]:
    """The differences of one of ours to those that are not ours and pool no data."""
    return [p for p in pairs if p["ours"] == ours and p["rival"] not in (PLAIN, REFERENCE)]


def is_no_worse_trained(numbers: Numbers) -> Judged:
    """Personal models of training clients: ours minus every rival that pools no data."""
    pairs = [p for p in _rivals_of(PLAIN, numbers.get("trained", ())) if p["figure"] in WORSE]
    if not pairs:
        return Judged("", "not measured", "the study's last run did not compare its training clients")
    told = "; ".join(f"{p['rival']}, {WORSE[p['figure']]}: {_interval(p).told('+.3g')}" for p in pairs)
    worse = [p for p in pairs if _interval(p).low > 0]
    unclear = [p for p in pairs if p not in worse and not _interval(p).excludes(0) and p["mean"] > 0]
    why = f"higher, that is worse, than the rival in {len(worse)} of {len(pairs)} cases, "
    why += f"by no more than chance in {len(unclear)}"
    return Judged(told, _no_worse(pairs, worse, unclear), why)


def _no_worse(pairs: Sequence[Numbers], worse: Sequence[Numbers], unclear: Sequence[Numbers]) -> Verdict:
    """A mean on the wrong side that chance may have put there speaks for nobody."""
    if len(worse) == len(pairs):
        return "disagrees"
    return "partly" if worse or unclear else "agrees"


WORSE = {"loss": "held-out loss", "distance": "histogram distance", "kid": "kernel distance"}


def copies_no_more(numbers: Numbers) -> Judged:
    """Ours minus fine-tuning; a smaller copy ratio is more copying."""
    pairs = [p for p in _rivals_of(PLAIN, numbers.get("paired", ())) if p["figure"] == "copy" and p["kind"] == "all"]
    pairs = [p for p in pairs if p["rival"] == FINE_TUNING]
    if not pairs:
        return Judged("", "not measured", "the study's last run did not compare copying")
    told = "; ".join(f"{p['images'] or 'all'} images: {_interval(p).told('+.3g')}" for p in pairs)
    more = [p for p in pairs if _interval(p).high < 0]
    unclear = [p for p in pairs if p not in more and not _interval(p).excludes(0) and p["mean"] < 0]
    return Judged(
        f"copy ratio above that of fine-tuning by {told}",
        _no_worse(pairs, more, unclear),
        f"lower, that is more copying, in {len(more)} of {len(pairs)} cases, by no more than chance in {len(unclear)}",
    )


FINE_TUNING = "fedavg_ft"


def _interval(numbers: Numbers) -> Interval:
    """As a summary holds it, where ends that are not there are null."""
    low, high = (math.nan if numbers[end] is None else numbers[end] for end in ("low", "high"))
    return Interval(numbers["mean"], low, high, numbers["num"])


def forgets_nothing(numbers: Numbers) -> Judged:
    moved = numbers.get("largest_change_of_others")
    if moved is None:
        return Judged("", "not measured", "the final stage was not measured yet")
    told = f"largest change of other clients' loss: {moved:g}"
    return Judged(told, "agrees" if moved == 0 else "disagrees", "by construction: what is shared keeps its bits")


def mix_is_read(numbers: Numbers) -> Judged:
    """The mix of classes by a linear map of embeddings, fitted on other clients, against guessing their mean mix."""
    reading = numbers.get("reading")
    if reading is None:
        return Judged("", "not measured", "the study has not come far enough")
    gain = Difference(_interval(reading["gain"]), _interval(reading["gain"]["over_seeds"]))
    won = gain.pooled.high < 0
    return Judged(
        f"total variation to a client's mix of classes {reading['read']:.3f}, where guessing the mean mix has "
        f"{reading['guessed']:.3f}: {gain.pooled.told('+.3f')}; {100 * reading['explained']:.0f} % of the variance",
        "agrees" if won and gain.holds_over_seeds else "partly" if won else "disagrees",
        f"a linear map of embeddings, fitted on other clients; what the client's own model draws is "
        f"{reading['drawn']:.3f} away",
    )


def few_numbers(numbers: Numbers) -> Judged:
    default = numbers["sizes"][0]
    if default["trained"] is None:
        return Judged("", "not measured", "the study has no new clients")
    share = default["trained"] / default["parameters"]
    return Judged(
        f"{default['trained']} of {default['parameters']:,} numbers, {100 * share:.2g} %",
        "agrees" if share <= 1e-4 else "partly",
        "hundreds of numbers, yes; the share is the size of the model's: with 512 of the 35.7 million of the preset "
        '"cifar" it is 0.0014 % (tests/backbone/test_unet.py)',
    )


def has_to_be_trained_with(numbers: Numbers) -> Judged:
    """Variants without embeddings in pre-training, against the one with them, on new clients."""
    found = [d for d in numbers["differences"] if d["clients"] == "new" and d["figure"] == "heldout_loss"]
    found = [d for d in found if d["variant"] == "without"]  # others also differ in the place of the embedding
    if not found:
        return Judged("", "not measured", "the study has not come far enough")
    told = "; ".join(f"{d['variant']}: {_interval(d).told('+.3f')}" for d in found)
    worse = sum(_interval(d).low > 0 for d in found)
    return Judged(
        f"held-out loss of new clients above that of a backbone trained with embeddings: {told}",
        "agrees" if worse == len(found) else "partly" if worse else "disagrees",
        "entries that were never trained, at the same adapting; trained entries on a frozen backbone: not measured yet",
    )


def ends_above(ours: tuple[str, ...], rivals: tuple[str, ...]) -> Callable[[Numbers], Judged]:
    """By the average gain after the last concept, the best of ours against each of the rivals, run by run.

    Agrees where the 95 % interval of every difference is above 0, for which it takes several runs.
    """

    def judge(numbers: Numbers) -> Judged:
        figures = numbers.get("figures", {})
        if not all(figures.get(name) for name in (*ours, *rivals)):
            return Judged("", "not measured", "the study has not come far enough")
        gains = {name: fmean(run["average"] for run in figures[name]) for name in (*ours, *rivals)}
        best = max(ours, key=lambda name: gains[name])
        by_run = {
            name: {(run["order"], run["seed"]): run["average"] for run in figures[name]} for name in (best, *rivals)
        }
        shared = {name: [at for at in by_run[best] if at in by_run[name]] for name in rivals}
        apart = {
            name: paired([by_run[best][at] for at in both], [by_run[name][at] for at in both])
            for name, both in shared.items()
            if both
        }
        runs = len(figures[best])
        below = [name for name in rivals if gains[name] < gains[best]]
        clear = [name for name, found in apart.items() if found.low > 0]
        told = ", ".join(f"{name} {gains[name]:.3f}" for name in (best, *rivals))
        return Judged(
            f"average gain in the end: {told}",
            "agrees" if len(clear) == len(rivals) else "partly" if below else "disagrees",
            f"above {len(below)} of {len(rivals)}, by more than chance {len(clear)}; runs of each: {runs}, at the best "
            f"of its rates{'; one run says nothing of chance' if runs == 1 else ''}",
        )

    return judge


CLAIMS: tuple[Claim, ...] = (
    Claim(
        SPIRE, "the mixing weight is recovered by gradient descent on the DDPM loss", "theory/two_components", recovers
    ),
    Claim(SPIRE, "with an error that does not grow with the dimension", "theory/two_components", in_any_dimension),
    Claim(SPIRE, "and falls with the number of images as 1/n", "theory/two_components", like_one_over_n),
    Claim(
        SPIRE, "diffusion training of a mixture is maximum likelihood", "theory/two_components", is_maximum_likelihood
    ),
    Claim(SPIRE, "the same for more than two components", "theory/k_components", more_components),
    Claim(SPIRE, "and with a backbone that was learned", "theory/imperfect_backbone", imperfect_backbone),
    Claim(SPIRE, "new clients beat fine-tuning (mixtures)", "theory/mixture_federation", mixture_new_clients),
    Claim(
        SPIRE, "a new client trains hundreds of numbers, at most 0.01 % of the weights", "ablations/width", few_numbers
    ),
    *(
        Claim(SPIRE, f"new clients beat every rival ({dealt}, {what})", recipe, beats_rivals(figure))
        for recipe, dealt in (
            ("unseen/one_class", "digits, one class each"),
            ("unseen/dirichlet", "digits, mixes of their own"),
            ("unseen/mnist5k", "MNIST, one class each"),
            ("unseen/faces", "drawn faces, one class each"),
        )
        for figure, what in (("loss", "held-out loss"), ("kid", "kernel distance"))
    ),
    *(
        claim
        for recipe, dealt in (("unseen/one_class", "digits"), ("unseen/mnist5k", "MNIST"), ("unseen/faces", "faces"))
        for claim in (
            Claim(
                SPIRE,
                f"new clients like a training one beat every rival ({dealt}, held-out loss)",
                recipe,
                beats_rivals("loss", "seen"),
            ),
            Claim(SPIRE, f"training clients are no worse off than with a rival ({dealt})", recipe, is_no_worse_trained),
            Claim(SPIRE, f"adapting copies no more than fine-tuning ({dealt})", recipe, copies_no_more),
        )
    ),
    Claim(
        "none: SPIRE drawn with guidance is ours",
        "new clients beat every rival (digits, mixes of their own, kernel distance)",
        "unseen/dirichlet",
        beats_rivals("kid", ours="spire_guided"),
    ),
    Claim(SPIRE, "adapting forgets nothing of others", "unseen/one_class", forgets_nothing),
    Claim(SPIRE, "embeddings act as mixing weights (real images)", "unseen/embeddings", mix_is_read),
    Claim(SPIRE, "the backbone has to be trained with embeddings", "ablations/prepared", has_to_be_trained_with),
    Claim(
        DC_SCORES,
        "regularising by diffusion-classifier scores outperforms C-LoRA and other baselines",
        "continual/compare",
        ends_above(
            ("EWC DC", "EWC DC, loose", "DSC", "DSC EWC DC"),
            ("C-LoRA", "EWC, loose", "sequential LoRA", "textual inversion"),
        ),
    ),
    Claim(
        NEURONS,
        "tuning concept neurons outperforms earlier methods",
        "continual/compare",
        ends_above(("CNS",), ("Orthogonal", "Mix-of-Show", "Custom Diffusion", "sequential LoRA")),
    ),
)
