"""Put a study's numbers where `personae bench papers` and the documentation find them.

    python benchmarks/record.py runs/theory-two-components theory/two_components

Writes its summary to src/personae/study/results/, its tables and findings to docs/studies/<name>.md, its charts and
pictures beside that page, a line of docs/studies/README.md, and the table of claims into docs/papers.md. The folder's
settings must be those of the shipped recipe.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from personae.artefact.save import read_json, write_bytes, write_json
from personae.recipe.config import read_table
from personae.study import papers
from personae.study.config import parse_study
from personae.study.report import markdown
from personae.study.study import Answer
from personae.study.workflow import SavedStudy, open_study

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "studies"


def page(saved: SavedStudy, answer: Answer, recipe: str, name: str) -> str:
    summary = saved.summary
    lines = [f"# {saved.recipe.title or name}", ""]
    lines += [
        f"`personae run {recipe}`, {summary['measured']} of {summary['cells']} cells, "
        f"{summary['cpu_seconds'] / 60:.0f} minutes of one processor.",
        "",
    ]
    lines += [f"- {finding}" for finding in answer.findings]
    for chart in answer.charts:
        lines += ["", f"![{chart.caption}]({name}/{chart.name}.svg)", "", chart.caption]
    for picture in answer.pictures:
        lines += ["", f"![{picture.caption}]({name}/{Path(picture.path).name})", "", picture.caption]
    for table in answer.tables:
        lines += ["", f"## {table.title}", "", markdown(table)]
    versions = ", ".join(f"{k} {v}" for k, v in read_json(saved.folder / "environment.json")["versions"].items())
    return "\n".join([*lines, "", f"Seed {saved.recipe.seed}. Versions: {versions}.", ""])


def record(folder: Path, recipe: str) -> None:
    saved = open_study(folder)
    plan, study = parse_study(*read_table(recipe))
    if (saved.study, saved.recipe.seed) != (study, plan.seed):
        raise SystemExit(f"{folder} was not made with the settings and seed of recipe {recipe}; nothing was written")
    saved.report()
    answer = saved.answer
    name = recipe.replace("/", "-")
    own = {"title": plan.title or name, "settings": papers.settings_digest(recipe)}
    write_json(papers.result_path(recipe), {**saved.summary, **own})
    shutil.rmtree(PAGES / name, ignore_errors=True)  # of a former recording, other charts may have been there
    (PAGES / name).mkdir(parents=True)
    for chart in answer.charts:
        shutil.copy(folder / "charts" / f"{chart.name}.svg", PAGES / name)
    for picture in answer.pictures:
        shutil.copy(folder / picture.path, PAGES / name)
    write_bytes(PAGES / f"{name}.md", page(saved, answer, recipe, name).encode())
    write_bytes(PAGES / "README.md", papers.index().encode())
    claims = ROOT / "docs" / "papers.md"
    text = claims.read_text("utf-8")
    told = f"<!-- claims -->\n{papers.markdown(papers.table())}\n<!-- end of claims -->"
    write_bytes(claims, re.sub(r"<!-- claims -->.*<!-- end of claims -->", lambda _: told, text, flags=re.S).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe")
    arguments = parser.parse_args()
    record(arguments.folder, arguments.recipe)
    print(f"wrote docs/studies/{arguments.recipe.replace('/', '-')}.md, its charts, and the claims in docs/papers.md")


if __name__ == "__main__":
    main()
