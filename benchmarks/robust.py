"""What 3 attackers among 15 clients come to, under every rule: the table of docs/robustness.md.

    python benchmarks/robust.py --out runs/robust [--docs docs]

Every cell is one run of recipes/robust/digits.toml, about 70 CPU-seconds. A cell that stands in OUT/cells.json is not
run again, so that a stopped benchmark goes on where it was. With --docs, the table and the cells are written there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import personae
from personae.errors import PersonaeError
from personae.recipe.environment import versions

RECIPE = "robust/digits"
ATTACKERS = ("c01", "c06", "c11")
CLIP_NORM = 3.5
"""An honest client changes the model by 4.3 in the first round of this recipe, and by 3.5 in the eighth."""

ROBUST = f"aggregation.attackers={len(ATTACKERS)}"
RULES: Mapping[str, tuple[str, ...]] = {
    "mean": (),
    "mean, clipped": (f"aggregation.clip_norm={CLIP_NORM}",),
    "median": ("aggregation.rule=median", ROBUST),
    "trimmed_mean": ("aggregation.rule=trimmed_mean", ROBUST),
    "krum": ("aggregation.rule=krum", ROBUST),
    "multi_krum": ("aggregation.rule=multi_krum", ROBUST),
    "bulyan": ("aggregation.rule=bulyan", ROBUST),
    "geometric_median": ("aggregation.rule=geometric_median", ROBUST),
}
ATTACKS: Mapping[str, float | None] = {
    "none": None,
    "sign_flip": 4.0,
    "scale": 100.0,
    "noise": 100.0,
    "shift": 4.0,
    "nan": None,
}
LIMIT = 1.10
"""Times the plain mean's loss without attackers: what counts as withstood."""


def settings(rule: str, attack: str) -> list[str]:
    """What a cell changes of the recipe."""
    found = [*RULES[rule], f"name={attack}-{rule.replace(', ', '-')}"]
    if attack != "none":
        strength = "" if ATTACKS[attack] is None else f", strength = {ATTACKS[attack]}"
        found.append(f"wrap.poisoned={{attack = '{attack}', clients = {list(ATTACKERS)}{strength}}}")
    if attack == "nan":  # those are refused as they arrive, and a round goes on without them
        found.append(f"federation.minimum={15 - len(ATTACKERS)}")
    return found


def cell(rule: str, attack: str, out: Path) -> dict[str, Any]:
    """One run: its held-out loss (None: not finite), or the error that stopped it."""
    folder, started = out / "run", time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        summary = personae.run(RECIPE, folder, overrides=settings(rule, attack)).summary
        found = {"heldout_loss": summary["heldout_loss"]}
    except PersonaeError as error:
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1].strip(' -')}"}
    shutil.rmtree(folder, ignore_errors=True)
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows are rules, columns attacks; each loss over that of the plain mean without attackers."""
    clean = cells["mean / none"]["heldout_loss"]
    names = [f"{attack} {strength:g}" if strength else attack for attack, strength in ATTACKS.items()]
    lines = [f"| rule | {' | '.join(names)} | withstands |", "|---" * (len(ATTACKS) + 2) + "|"]
    for rule in RULES:
        row, withstood = [], 0
        for attack in ATTACKS:
            found = cells.get(f"{rule} / {attack}")
            if found is None:
                row.append("")
            elif "error" in found:
                row.append("refused" if found["error"].startswith("ConfigError") else "stops")
            elif found["heldout_loss"] is None:
                row.append("not finite")
            else:
                ratio = found["heldout_loss"] / clean
                withstood += attack != "none" and ratio <= LIMIT
                row.append(f"**{ratio:.3f}**" if ratio <= LIMIT else f"{ratio:.3f}")
        tried = sum(f"{rule} / {attack}" in cells for attack in ATTACKS if attack != "none")
        lines.append(f"| {rule} | {' | '.join(row)} | {withstood} of {tried} |")
    minutes = sum(found["cpu_seconds"] for found in cells.values()) / 60
    named = ", ".join(f"{name} {version}" for name, version in versions().items() if version[0].isdigit())
    return "\n".join(
        [
            f"1.000 is a loss of {clean:.4f}; **bold** is at most {LIMIT:.2f}. "
            f"{len(cells)} runs, {minutes:.0f} CPU-minutes.",
            "",
            *lines,
            "",
            f"Versions: {named}.",
        ]
    )


def write(cells: Mapping[str, Any], docs: Path) -> None:
    """The cells as JSON, and the table between the two marks of robustness.md."""
    (docs / "robustness.json").write_text(json.dumps(cells, indent=1) + "\n", "utf-8")
    path = docs / "robustness.md"
    before, begin, rest = path.read_text("utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    path.write_text(f"{before}{begin}{table(cells)}\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for attack in arguments.attacks:
        for rule in arguments.rules:
            if (key := f"{rule} / {attack}") not in cells:
                cells[key] = cell(rule, attack, arguments.out)
                path.write_text(json.dumps(cells, indent=1), "utf-8")
                print(key, cells[key], flush=True)
    if arguments.docs is not None:
        write(cells, arguments.docs)
    print(table(cells))


if __name__ == "__main__":
    main()
