"""One self-contained page from a run folder, and one table for the terminal.

``results.json``, ``metrics.jsonl``, ``config.json`` and the videos go in; ``report.html`` comes out: no script, no
network, everything inside, light or dark as the reader has it. A part of the results that is absent leaves its
section out, so that the single stages use the same page. Every function here is pure but :func:`write`.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wovr_jax import figures
from wovr_jax.metrics import difference, read_metrics

Results = Mapping[str, Any]

FIRST_CURVES = ("success", "return_mean", "loss", "kl", "entropy", "accuracy")
"""Shown at once when a stage has them, and other curves to fill up; the rest is behind a fold."""
CURVES_AT_ONCE = 3

MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg"}


def write(run: str | os.PathLike) -> pathlib.Path:
    """Writes ``report.html`` into the run folder ``run`` and returns its path.

    Raises:
      FileNotFoundError: when ``results.json`` is not there.
    """
    run = pathlib.Path(run)
    source = run / "results.json"
    if not source.exists():
        raise FileNotFoundError(f"{source}: a report needs the results of a run; run the job first.")
    config = run / "config.json"
    text = page(
        json.loads(source.read_text()),
        curves=read_metrics(run),
        config=json.loads(config.read_text()) if config.exists() else None,
        folder=run,
    )
    beside = run / "report.html.tmp"
    beside.write_text(text, encoding="utf-8")
    return beside.replace(run / "report.html")


def page(
    results: Results,
    curves: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    folder: str | os.PathLike = ".",
) -> str:
    """The whole page as HTML.

    Args:
      results: what ``results.json`` holds.
      curves: lines of ``metrics.jsonl``: stage, step, and numbers or None by name.
      config: the settings of the run.
      folder: what the paths of the videos are relative to.
    """
    style = importlib.resources.files("wovr_jax").joinpath("assets", "report.css").read_text()
    sections = (
        _success(results.get("phases", ())),
        _comparison(results.get("comparison", ())),
        _videos(results.get("videos", ()), pathlib.Path(folder)),
        _curves(curves),
        _reward(results.get("reward")),
        _keyframes(results.get("keyframes")),
        _ledger(results.get("ledger")),
        _settings(config, results.get("versions")),
    )
    title = html.escape(str(results.get("name", "run")))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{_head(title, results)}\n{''.join(sections)}</body>\n</html>\n"
    )


def table(results: Results) -> str:
    """The same results in few lines of plain text, for the end of a run."""
    blocks = []
    if phases := results.get("phases"):
        rows = [("policy", "true success", "95%", "greedy", "imagined")]
        for phase in phases:
            true, greedy = phase.get("true_success"), phase.get("greedy")
            spread = f"{true['low']:.1%} - {true['high']:.1%}" if true else "-"
            rate, most = (_percent(one and one["rate"]) for one in (true, greedy))
            rows.append((phase["name"], rate, spread, most, _percent(phase.get("imagined_success"))))
        blocks.append(_aligned(rows))
        if gain := _gain(results):
            blocks.append(f"gain {_signed(gain[0])} points, 95% between {_signed(gain[1])} and {_signed(gain[2])}")
    if ledger := results.get("ledger"):
        rows = [("stage", "true steps", "imagined frames", "time")]
        rows += [
            (s, f"{a['true_steps']:,}", f"{a['imagined_frames']:,}", _time(a["seconds"])) for s, a in ledger.items()
        ]
        rows.append(("all", *_total(ledger)))
        blocks.append(_aligned(rows))
    return "\n\n".join(blocks)


# ---------------------------------------------------------------- sections


def _head(title: str, results: Results) -> str:
    facts = [results.get("job"), results.get("device")]
    facts += [f"seed {results['seed']}"] if "seed" in results else []
    facts += [_time(results["seconds"])] if results.get("seconds") else []
    facts += [f"{results['peak_rss_gb']:.1f} GB of memory at most"] if results.get("peak_rss_gb") else []
    line = " · ".join(html.escape(str(fact)) for fact in facts if fact)
    return f'<h1>{title}</h1>\n<p class="facts">{line}</p>\n{_lead(results)}'


def _lead(results: Results) -> str:
    """The answer in one sentence."""
    gain = _gain(results)
    if not gain:
        return ""
    first, last = results["phases"][0], results["phases"][-1]
    n = last["true_success"]["n"]
    verdict = "The policy truly got better." if gain[1] > 0 else "The policy truly got worse." if gain[2] < 0 else ""
    verdict = verdict or "That is no certain change: the interval contains 0."
    return (
        f'<p class="lead">True success went from {first["true_success"]["rate"]:.1%} '
        f"({html.escape(first['name'])}) to <strong>{last['true_success']['rate']:.1%}</strong> "
        f"({html.escape(last['name'])}): {_signed(gain[0])} points, with 95% confidence between {_signed(gain[1])} "
        f"and {_signed(gain[2])}, over {n} episodes. {verdict}</p>\n"
    )


def _success(phases: Sequence[Mapping[str, Any]]) -> str:
    if not phases:
        return ""
    rows = [(one["name"], one.get("true_success"), one.get("greedy"), one.get("imagined_success")) for one in phases]
    shown = {
        "in the true simulator, sampling as in training": _mark('<circle class="dot" cx="6" cy="6" r="5.5"/>', "true"),
        "the same, most likely action": _mark('<circle cx="6" cy="6" r="4"/>', "true hollow"),
        "in imagination": _mark('<path class="imagined" d="M6 0l6 6l-6 6l-6 -6z"/>'),
    }
    there = [any(row[1] for row in rows), any(row[2] for row in rows), any(row[3] is not None for row in rows)]
    key = "".join(
        f"<li>{mark}{words}</li>" for (words, mark), is_there in zip(shown.items(), there, strict=True) if is_there
    )
    why = "Start states that no stage trained on, the same for every policy; bars are 95% Wilson intervals."
    return _section("Success", why, f'<ul class="key">{key}</ul>', figures.success(rows), _subgoals(phases))


def _subgoals(phases: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for phase in phases for name in phase.get("subgoals") or {}))
    if not names:
        return ""
    rows = [[phase["name"], *(_percent((phase.get("subgoals") or {}).get(name)) for name in names)] for phase in phases]
    return f"<h3>How far the episodes came</h3>{_table(['policy', *names], rows)}"


def _comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    why = (
        "The same actions from the same start states, played in both worlds. Mind the upper right: episodes that "
        "imagination calls a success and the truth does not, which is what a policy can learn to exploit."
    )
    return _section("Imagined against true", why, f'<div class="row">{"".join(map(_counts, rows))}</div>')


def _counts(row: Mapping[str, Any]) -> str:
    tp, fp, fn, tn = (row[name] for name in ("tp", "fp", "fn", "tn"))
    everything = max(tp + fp + fn + tn, 1)

    def cell(count: int, hue: str) -> str:
        return f'<div class="cell" style="--mark:var(--{hue});--share:{55 * count / everything:.0f}%">{count}</div>'

    grid = (
        '<div></div><div class="top">true: yes</div><div class="top">no</div>'
        f'<div class="side">imagined: yes</div>{cell(tp, "imagined")}{cell(fp, "true")}'
        f'<div class="side">no</div>{cell(fn, "true")}{cell(tn, "imagined")}'
    )
    said = f"agree {_percent((tp + tn) / everything)}"
    said += f", hits {_percent(tp / (tp + fn) if tp + fn else None)}"
    said += f", false alarms {_percent(fp / (fp + tn) if fp + tn else None)}"
    name = html.escape(str(row.get("phase", "")))
    return f'<figure><h3>{name}</h3><div class="counts">{grid}</div><figcaption>{said}</figcaption></figure>'


def _videos(videos: Sequence[Mapping[str, str]], folder: pathlib.Path) -> str:
    if not videos:
        return ""
    shown = "".join(_medium(folder / one["path"], one["title"]) for one in videos)
    return _section("Imagined and true, side by side", "", f'<div class="row">{shown}</div>')


def _medium(path: pathlib.Path, title: str) -> str:
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    if not path.exists() or path.suffix not in MEDIA:
        problem = "is not there" if not path.exists() else "is of no kind that a page can show"
        return f"<figure><p class='why'>{html.escape(path.name)} {problem}.</p>{caption}</figure>"
    kind = MEDIA[path.suffix]
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if kind.startswith("image/"):
        return f'<figure><img src="{source}" alt="{html.escape(title, quote=True)}">{caption}</figure>'
    return f'<figure><video src="{source}" autoplay loop muted playsinline controls></video>{caption}</figure>'


def _curves(lines: Iterable[Mapping[str, Any]]) -> str:
    stages: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for line in lines:
        stage = stages.setdefault(line["stage"], {})
        for name, value in line.items():
            if name not in ("stage", "step", "time"):
                stage.setdefault(name, []).append((line["step"], value))
    blocks = [_stage_curves(stage, found) for stage, found in stages.items()]
    return _section("Learning", "", *blocks) if any(blocks) else ""


def _stage_curves(stage: str, found: Mapping[str, list[tuple[float, float | None]]]) -> str:
    first = [name for name in FIRST_CURVES if name in found]
    names = first + [name for name in found if name not in first]
    drawn = [
        f"<figure>{svg}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name in names
        if len(found[name]) > 1 and (svg := figures.curve(found[name], f"{stage}: {name}"))
    ]
    if not drawn:
        return ""
    shown, folded = drawn[:CURVES_AT_ONCE], drawn[CURVES_AT_ONCE:]
    more = f'<details><summary>{len(folded)} more</summary><div class="row">{"".join(folded)}</div></details>'
    return f'<h3>{html.escape(stage)}</h3><div class="row">{"".join(shown)}</div>{more if folded else ""}'


def _reward(reward: Mapping[str, Any] | None) -> str:
    if not reward:
        return ""
    why = (
        "On true frames that the classifier did not train on. On the dotted line a probability means what it says; "
        "a frame counts as success right of the dashed line."
    )
    rows = [
        [words, shown(reward[name])]
        for name, words, shown in (
            ("threshold", "threshold", lambda value: f"{value:.2f}"),
            ("frame_tpr", "frames of success found", _percent),
            ("frame_fpr", "other frames taken for success", _percent),
        )
        if reward.get(name) is not None
    ]
    facts = _table(["classifier", ""], rows) if rows else ""
    drawn = figures.reliability(reward.get("bins", ()), reward.get("threshold"))
    return _section("The success classifier", why, f'<div class="row">{drawn}{facts}</div>')


def _keyframes(keyframes: Mapping[str, Any] | None) -> str:
    if not keyframes or not keyframes.get("steps"):
        return ""
    why = "Imagined rollouts that begin in the middle of an episode have less time to drift."
    drawn = figures.histogram(keyframes["steps"], "step of the episode")
    rules = [[name, f"{count:,}"] for name, count in (keyframes.get("rules") or {}).items()]
    facts = _table(["rule", "keyframes"], rules) if rules else ""
    return _section("Keyframes", why, f'<div class="row">{drawn}{facts}</div>')


def _ledger(ledger: Mapping[str, Mapping[str, float]] | None) -> str:
    if not ledger:
        return ""
    longest = max(account["seconds"] for account in ledger.values()) or 1.0
    head = ("stage", "true steps", "imagined frames", "time", "")
    body = ""
    for stage, account in ledger.items():
        bar = f'<div style="width:{100 * account["seconds"] / longest:.1f}%"></div>'
        cells = (f"{account['true_steps']:,}", f"{account['imagined_frames']:,}", _time(account["seconds"]))
        body += f"<tr>{_cells((stage, *cells))}<td class='spent'>{bar}</td></tr>"
    body += f"<tr>{_cells(('all', *_total(ledger)))}<td></td></tr>"
    rows = f"<tr>{_cells(head, 'th')}</tr>{body}"
    why = "True steps are steps of the true simulator, the scarce good; imagined frames cost only computing."
    return _section("What it cost", why, f'<div class="wide"><table>{rows}</table></div>')


def _settings(config: Mapping[str, Any] | None, versions: Mapping[str, str] | None) -> str:
    parts = []
    if versions:
        parts.append(f"<p>{html.escape(' · '.join(f'{name} {version}' for name, version in versions.items()))}</p>")
    if config:
        shown = html.escape(json.dumps(config, indent=2))
        parts.append(f"<details><summary>config.json</summary><pre>{shown}</pre></details>")
    return _section("Settings and versions", "", *parts) if parts else ""


# ---------------------------------------------------------------- small pieces


def _section(title: str, why: str, *parts: str) -> str:
    said = f'<p class="why">{html.escape(why)}</p>' if why else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{said}{''.join(parts)}\n</section>\n"


def _mark(shape: str, kind: str = "") -> str:
    return f'<svg width="12" height="12" viewBox="0 0 12 12" aria-hidden="true"><g class="{kind}">{shape}</g></svg>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{_cells(head, "th")}</tr>{body}</table></div>'


def _cells(row: Iterable[str], kind: str = "td") -> str:
    return "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in row)


def _gain(results: Results) -> tuple[float, float, float] | None:
    """Last true success minus the first, with its interval.

    ``gain`` of the results if they have it (paired by start state, so narrower); else as if the two were independent.
    """
    if gain := results.get("gain"):
        return gain["gain"], gain["low"], gain["high"]
    phases = results.get("phases", ())
    measured = [phase["true_success"] for phase in phases if phase.get("true_success")]
    if len(measured) < 2 or len(measured) < len(phases):
        return None
    first, last = measured[0], measured[-1]
    return difference(last["successes"], last["n"], first["successes"], first["n"])


def _total(ledger: Mapping[str, Mapping[str, float]]) -> tuple[str, str, str]:
    steps, frames, seconds = (
        sum(a[name] for a in ledger.values()) for name in ("true_steps", "imagined_frames", "seconds")
    )
    return f"{steps:,}", f"{frames:,}", _time(seconds)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, numbers to the right, a line under the head."""
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
