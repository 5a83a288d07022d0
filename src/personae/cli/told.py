"""What commands print: a screenful for people, or one JSON object for another program."""

from __future__ import annotations

from typing import Any


def print_personalized(saved: Any, many: dict[str, dict[str, Any]], as_json: bool) -> None:
    folder = saved.folder / "clients"
    lines = [
        f"{name}: {figures['trained_parameters']:,} numbers trained, {figures['num_images']} images, "
        f"held-out loss {figures['heldout_loss_before']:.4f} -> {figures['heldout_loss']:.4f}"
        for name, figures in many.items()
    ]
    wrote = f"wrote {len(many)} files to {folder}; nothing was sent"
    print_found(as_json, {"clients": many, "folder": str(folder)}, [*lines, wrote])


def print_finished(saved: Any, as_json: bool) -> None:
    summary = saved.summary
    print_found(
        as_json,
        {"run": str(saved.folder), "report": str(saved.folder / "report.html"), "summary": summary},
        [*figures_of(summary), f"report: {saved.folder / 'report.html'}"],
    )


def print_measured(study: Any, as_json: bool) -> None:
    summary = study.summary
    report = study.folder / "report.html"
    found = {"study": str(study.folder), "report": str(report), "summary": summary}
    print_found(as_json, found, [*summary["findings"], f"report: {report}"])


def print_taught(saved: Any, as_json: bool) -> None:
    summary, report = saved.summary, saved.folder / "report.html"
    lines = [
        f"{name}: held-out loss {new:.4f} when new, {now:.4f} now"
        for at, name in enumerate(summary["concepts"])
        if (new := summary["losses"][at][at]) is not None and (now := summary["losses"][-1][at]) is not None
    ]
    found = {"run": str(saved.folder), "report": str(report), "summary": summary}
    print_found(as_json, found, [*lines, f"report: {report}"])


def figures_of(summary: dict[str, Any]) -> list[str]:
    """A screenful of figures: one line per role, and one per new client."""
    lines = []
    for role, title in (("train", "training clients"), ("new", "new clients")):
        chosen = {name: c for name, c in summary["clients"].items() if c["role"] == role}
        if chosen:
            losses = [c["heldout_loss"] for c in chosen.values() if c["heldout_loss"] is not None]
            loss = f"{sum(losses) / len(losses):.4f}" if losses else "unknown"
            lines.append(f"{len(chosen)} {title}: held-out loss {loss}{_distances(list(chosen.values()))}")
    for name, c in list(summary["clients"].items()):
        if c["role"] == "new":
            lines.append(
                f"  {name}: {c['num_images']} images, {c['trained_parameters']:,} numbers trained, "
                f"{c['bytes_up']} bytes sent, file {c['personal_file_bytes']:,} bytes{_distances([c])}"
            )
    return lines


def _distances(chosen: list[dict[str, Any]]) -> str:
    after = [c["histogram_distance"] for c in chosen if c["histogram_distance"] is not None]
    before = [c["histogram_distance_before"] for c in chosen if c["histogram_distance_before"] is not None]
    if not after:
        return ""
    start = f"{sum(before) / len(before):.3f} -> " if before else ""
    return f", class-histogram distance {start}{sum(after) / len(after):.3f}"


def print_found(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    from personae.artefact.save import json_text

    print(json_text(value, indent=2) if as_json else "\n".join(lines))
