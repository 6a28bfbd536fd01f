"""One self-contained page from a run folder.

``results.json``, ``metrics.jsonl``, ``config.json`` and the videos go in; ``report.html`` comes out: no script, no
network, everything inside, light or dark as the reader has it. The words of the page are in ``page.html`` and its
looks in ``page.css`` beside this file; a section for which the results have nothing is left out, so that single jobs
and studies use the same page. Every function here is pure but :func:`write`. Several runs on one page: ``compare``.
"""

from __future__ import annotations

import base64
import html
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wovr_jax.core.disk import read_json, replace_file
from wovr_jax.core.log import RESERVED, read_metrics
from wovr_jax.report import figures, tables, trust
from wovr_jax.report.meanings import explain
from wovr_jax.report.pieces import fill, render_table, side_by_side
from wovr_jax.report.tables import Results, Rows

FIRST_CURVES = (
    *("success_start", "success_keyframe", "false_success", "true_success"),
    *("success", "return_mean", "loss", "kl_step", "entropy", "accuracy"),
)
"""Shown at once when a stage has them, and other curves to fill up; the rest is behind a fold."""
CURVES_AT_ONCE = 3
RATES = "true success across, imagined success up"


def write(run: str | os.PathLike) -> pathlib.Path:
    """Writes ``report.html`` into the run folder ``run`` and returns its path.

    Raises:
      FileNotFoundError: when ``results.json`` is not there.
    """
    run = pathlib.Path(run)
    source, config = run / "results.json", run / "config.json"
    if not source.exists():
        raise FileNotFoundError(f"{source}: a report needs the results of a run; run the job first.")
    settings = read_json(config) if config.exists() else None
    text, path = render(read_json(source), read_metrics(run), settings, run), run / "report.html"
    # Whoever has the page open and loads it again never gets half of it.
    with replace_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


def render(
    results: Results,
    curves: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    folder: str | os.PathLike = ".",
) -> str:
    """Returns the whole page as HTML.

    Args:
      results: what ``results.json`` holds.
      curves: lines of ``metrics.jsonl``: stage, step, and numbers or None by name.
      config: the settings of the run.
      folder: what the paths of the videos are relative to.
    """
    settings = {"versions": results.get("versions"), "config": config}
    parts = {
        "title": html.escape(str(results.get("name", "run"))),
        "facts": _render_facts(results),
        "lead": "".join(f'<p class="lead">{html.escape(said)}</p>\n' for said in tables.state_findings(results)),
        "play": _render_play(results.get("ledger") or {}, pathlib.Path(folder)),
        "success": _render_success(results.get("phases") or ()),
        "trust": _render_trust(results.get("trust") or {}),
        # Tables that a study brings along have no section of their own in the template.
        "tables": "".join(map(_render_titled_table, results.get("tables") or ())),
        "closed": _render_closed_loop(results.get("closed_loop") or ()),
        "comparison": _render_comparison(results.get("comparison") or ()),
        "films": _render_films(results.get("comparison") or (), pathlib.Path(folder)),
        "curves": _render_curves(curves),
        "reward": _render_reward(results.get("reward") or {}),
        "keyframes": _render_keyframes(results.get("keyframes") or {}) + _render_flat(curves),
        "ledger": _render_ledger(results.get("ledger") or {}),
        "settings": html.escape(json.dumps(settings, indent=2)) if any(settings.values()) else "",
    }
    return fill("page.html", parts)


# ---------------------------------------------------------------- sections, each empty when there is nothing to show


def _render_facts(results: Results) -> str:
    facts = [results.get("job"), results.get("device"), f"seed {results['seed']}" if "seed" in results else None]
    facts += [tables.format_duration(results["seconds"])] if results.get("seconds") else []
    facts += [f"{results['peak_rss_gb']:.1f} GB of memory at most"] if results.get("peak_rss_gb") else []
    return " · ".join(html.escape(str(fact)) for fact in facts if fact)


def _render_play(ledger: Mapping[str, Results], folder: pathlib.Path) -> str:
    """The line that opens this run to play in, where it has trained a world model and the page knows its folder."""
    if not folder.name or not any(stage.startswith("world-") for stage in ledger):
        return ""
    # The one command is there where the package is installed; a clone has its script.
    command = "wovr play" if shutil.which("wovr") else "python launch/play.py"
    line = html.escape(f"{command} {shlex.quote(str(folder))} --open")
    return f'<p class="play">Drive its world model yourself, beside the truth: <code>{line}</code></p>\n'


def _render_success(phases: Sequence[Results]) -> str:
    rows = []
    for phase in phases:
        true, greedy, imagined = (phase[name] for name in ("true_success", "greedy", "imagined_success"))
        # The greedy mark first: where two marks meet, the later one lies on top.
        marks = [(kind, rate["rate"], rate["low"], rate["high"]) for kind, rate in (("hollow", greedy), ("true", true))]
        marks += [("imagined", imagined, imagined, imagined)] if imagined is not None else []
        rows.append((phase["name"], marks, tables.format_rate(true["rate"])))
    if not rows:
        return ""
    further = [rows for rows in (tables.temperature_rows(phases), tables.subgoal_rows(phases)) if rows]
    return (
        figures.draw_intervals(rows)
        + render_table(tables.policy_rows(phases))
        + _draw_temperatures(phases)
        + "".join(map(render_table, further))
    )


def _draw_temperatures(phases: Sequence[Results]) -> str:
    # From the lowest to the highest, as an axis goes.
    lines = [(phase["name"], list(map(_place_level, reversed(phase.get("temperatures") or ())))) for phase in phases]
    return figures.draw_rates(lines, "temperature") if lines[0][1] else ""


def _place_level(level: Results) -> figures.Point:
    return level["temperature"], level["rate"], level["low"], level["high"]


def _render_titled_table(table: Results) -> str:
    """Returns a table that a job brings along, with its own title and explanation, and the picture that it asks for."""
    title, why = (html.escape(table[part]) for part in ("title", "why"))
    drawn = figures.draw_rates(table["lines"], table["label"], log=True) if table.get("lines") else ""
    if rows := table.get("intervals"):
        ends = [end for _, marks, _ in rows for _, _, *both in marks for end in both]
        # At least ten points to each side, or a study without any effect would look like one with large effects.
        drawn += figures.draw_intervals(rows, min(*ends, -0.1), max(*ends, 0.1))
    return f'<h2>{title}</h2>\n<p class="why">{why}</p>\n{drawn}{render_table(table["rows"])}'


def _render_trust(answers: Results) -> str:
    if not answers:
        return ""
    said = "".join(f'<p class="lead">{html.escape(words)}</p>\n' for words in trust.state_answers(answers))
    scattered = trust.place_policies(answers)
    drawn = [
        f"<figure>{figures.draw_scatter(points, RATES)}<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, points in scattered
    ]
    key = "".join(f'<span><i class="series s{colour}"></i>{words}</span>' for colour, words in trust.KINDS.items())
    # Of rollouts from elsewhere there is one kind, which needs no key.
    mixed = len({colour for _, points in scattered for _, colour, *_ in points}) > 1
    lines = [line for line in trust.place_chunks(answers) if len(line[1]) > 1]
    parts = [said, f'<p class="key">{key}</p>' * mixed, side_by_side(drawn)]
    parts += map(render_table, filter(None, (trust.policy_rows(answers), trust.ranking_rows(answers))))
    parts += [figures.draw_rates(lines, "chunk", what="with the truth")] if lines else []
    tables = filter(None, [trust.horizon_rows(answers), trust.sign_rows(answers)])
    return "\n".join([*parts, *map(render_table, tables)])


def _render_closed_loop(closed_loop: Sequence[Results]) -> str:
    rows = []
    for row in closed_loop:
        for kind, words in tables.STARTS.items():
            # All of them together are in the table.
            if kind != "all" and row[kind]:
                false = row[kind]["false_success"]
                paid = f"{false['rate']:.0%} of failures paid" if false else "no failure"
                rows.append((f"{tables.name_pair(row)}, {words}", row[kind], paid))
    return figures.draw_agreement(rows) + render_table(tables.closed_rows(closed_loop)) if rows else ""


def _render_comparison(comparison: Sequence[Results]) -> str:
    rows = []
    for row in comparison:
        imagined, true, _ = tables.success_rates(row)
        rows.append((f"{row['policy']}, {row['world']}", row, f"{imagined:.0%} imagined, {true:.0%} true"))
    return figures.draw_agreement(rows) + render_table(tables.world_rows(comparison)) if rows else ""


def _render_films(comparison: Sequence[Results], folder: pathlib.Path) -> str:
    blocks = ""
    for row in comparison:
        if row.get("videos"):
            title = html.escape(f"policy: {row['policy']}; true left, imagined right ({row['world']})")
            blocks += f"<h3>{title}</h3>{side_by_side([_render_film(film, folder) for film in row['videos']])}"
    return blocks


def _render_film(film: Results, folder: pathlib.Path) -> str:
    """Returns a video with the verdicts under its halves; a wrong verdict of imagination is marked."""
    path, (true, imagined) = folder / film["path"], (film.get("true"), film.get("imagined"))
    if not path.exists():
        return f'<figure class="why">{html.escape(path.name)} is not there.</figure>'
    # Inside the page, so that it can be sent to somebody and opened years later.
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    verdicts = {None: "", True: ": success", False: ": failure"}
    # Older runs did not keep the outcome of each film; without both there is nothing to mark.
    lies = " lies" * (None not in (true, imagined) and true != imagined)
    under = f'<b class="true">true{verdicts[true]}</b><b class="imagined{lies}">imagined{verdicts[imagined]}</b>'
    video = f'<video src="{source}" controls autoplay loop muted playsinline></video>'
    return f'<figure class="film">{video}<figcaption>{under}</figcaption></figure>'


def _render_curves(lines: Iterable[Mapping[str, Any]]) -> str:
    # Lines of several stages may be mixed: a run that was resumed appends to what is there.
    stages: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for line in lines:
        stage = stages.setdefault(line["stage"], {})
        for name, value in line.items():
            if name not in RESERVED:
                stage.setdefault(name, []).append((line["step"], value))
    return "".join(_render_stage_curves(stage, curves) for stage, curves in stages.items())


def _render_stage_curves(stage: str, curves: Mapping[str, list[tuple[float, float | None]]]) -> str:
    # By name and not by order of writing, which differs from stage to stage.
    first = [name for name in FIRST_CURVES if name in curves]
    drawn = [
        f"<figure>{svg}<figcaption>{html.escape(name)}<small>{html.escape(explain(name))}</small></figcaption></figure>"
        for name in (*first, *(name for name in curves if name not in first))
        if len(curves[name]) > 1 and (svg := figures.draw_curve(curves[name], f"{stage}: {name}"))
    ]
    # A stage may have thirty curves; three fill the width of the page.
    shown, folded = drawn[:CURVES_AT_ONCE], drawn[CURVES_AT_ONCE:]
    more = f"<details><summary>{len(folded)} more</summary>{side_by_side(folded)}</details>" if folded else ""
    return f"<h3>{html.escape(stage)}</h3>{side_by_side(shown)}{more}" if drawn else ""


def _render_reward(rewards: Mapping[str, Results]) -> str:
    shown = []
    for name, reward in rewards.items():
        kinds = {kind: reward[key] for kind, key in (("true", "real"), ("imagined", "imagined")) if key in reward}
        bins = {kind: scores["reliability"] for kind, scores in kinds.items()}
        drawn = figures.draw_reliability(bins, reward["threshold"])
        rows: Rows = [("", *kinds)]
        # By episode, for that is how success is counted; calibration is by frame, where probabilities are given.
        for words, level, part in (
            ("successful episodes found", "episode", "tpr"),
            ("failures taken for success", "episode", "fpr"),
            ("calibration error", "reliability", "error"),
        ):
            rows.append((words, *(tables.format_rate(scores[level][part]) for scores in kinds.values())))
        title = f"{html.escape(name)}: threshold {reward['threshold']:.4g}"
        shown.append(f"<figure><h3>{title}</h3>{drawn}{render_table(rows)}</figure>")
    return side_by_side(shown)


def _render_flat(curves: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for each round whose groups from keyframes mostly ended alike."""
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for line in curves:
        rounds.setdefault(line["stage"], []).append(line)
    said = {stage: tables.explain_flat(curve) for stage, curve in rounds.items()}
    return "".join(f"<p>{html.escape(stage)}: {html.escape(words)}</p>" for stage, words in said.items() if words)


def _render_keyframes(keyframes: Mapping[str, Results]) -> str:
    shown = []
    for name, starts in keyframes.items():
        rules = ", ".join(f"{count:,} {rule.replace('_', ' ')}" for rule, count in starts["rules"].items())
        drawn = figures.draw_histogram(starts["steps"], "step of the episode")
        shown.append(f"<figure><h3>{html.escape(f'{name}: {rules}')}</h3>{drawn}</figure>")
    return side_by_side(shown)


def _render_ledger(ledger: Mapping[str, Results]) -> str:
    # The style sheet draws each stage's time as a bar in its row, as a share of the longest.
    longest = max((account["seconds"] for account in ledger.values()), default=0) or 1.0
    styles = [f'style="--share:{account["seconds"] / longest:.3f}"' for account in ledger.values()]
    kinds = ['class="learner"' if stage.startswith(tables.LEARNER) else "" for stage in ledger]
    return render_table(tables.cost_rows(ledger), map(" ".join, zip(kinds, styles, strict=True))) if ledger else ""
