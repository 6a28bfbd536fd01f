"""Whether a world model can be trusted, in sentences, tables and the points of two figures.

Every function takes the part ``trust`` of ``results.json``, of a run (``audit.trust``) or of rollouts from elsewhere
(``audit.foreign``), and is pure. What was not asked gives no row; the sentences say so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from wovr_jax.core.tables import text_table
from wovr_jax.report.figures import Point
from wovr_jax.report.tables import Rows, format_rate

Answers = Mapping[str, Any]

RANKS = 0.5
"""It ranks where the interval of Spearman's rho lies above this; roughly so where it lies above zero."""
PAYS, PAYS_NOT = 0.2, 0.5
"""It pays where at most this share of the failures is paid, and does not where more than the other share is."""
MEASURES = {
    "pearson": "Pearson r",
    "spearman": "Spearman rho",
    "mmrv": "MMRV",
    "gap": "mean gap",
    "inverted": "pairs inverted",
}
"""A number of a ranking -> its head in the table."""
SIGNS = {
    "round_trip": "round trip through the VAE",
    "by_motion": "the same over how far the latents moved",
    "seeds": "variance over four noises",
    "one_step": "one Euler step against all of them",
    "distance": "distance from true latents",
    "inverse": "inverse dynamics against the command",
    "margin": "how sure the judge is",
    "second_noise": "how sure it is under a second noise",
    "twin_frames": "frames of a twin of the world",
    "twin_verdict": "how sure the judge is in the twin",
    "refreshed_frames": "frames of the next world, in hindsight",
    "refreshed_verdict": "how sure the judge is there, in hindsight",
    "mix": "all but hindsight, mixed",
    "mix_before": "the mix of the world before",
}
"""A sign of a lie -> its row in the table."""
TELLS = 0.85
"""A sign tells lies where its AUROC is at least this; in part where the interval lies above a half."""
IN_POINTS = ("mmrv", "gap", "inverted")
"""Those of them that are shares, and written in hundredths."""
KINDS = {1: "policies of the run", 2: "imitation of a part of its demonstrations"}
"""A colour of the scatter -> whose dots have it."""


def render_text(trust: Answers) -> str:
    """Returns the tables and the answers as plain text, for the end of a program."""
    tables = (policy_rows(trust), ranking_rows(trust), horizon_rows(trust), sign_rows(trust))
    sentences = [textwrap.fill(sentence, 110) for sentence in state_answers(trust)]
    return "\n\n".join([text_table(rows) for rows in tables if rows] + sentences)


def state_answers(trust: Answers) -> list[str]:
    """Answers the questions for the newest world, a sentence or two each, and says what was not asked."""
    world = trust["worlds"][-1]
    sentences = [_state_ranking(trust, world), _state_paid(world), _state_horizon(world["horizon"])]
    newest = f" Of {len(trust['worlds'])} world models this is the newest." if len(trust["worlds"]) > 1 else ""
    sentences[0] += newest
    if lies := world.get("lies"):
        sentences.append(_state_lies(lies))
    return [*sentences, *(f"Not asked: {what}." for what in trust.get("not_asked", ()))]


def _state_ranking(trust: Answers, world: Answers) -> str:
    how, words = next(iter(trust["levels"].items()))
    ranking = world["ranking"].get(how)
    if ranking is None:
        return "Can it rank policies? Not asked: it takes the true and the imagined success of at least three."
    rho, mmrv, gap, close = (ranking[name] for name in ("spearman", "mmrv", "gap", "close"))
    low = rho["low"]
    verdict = "Not shown" if low is None or low <= 0 else "Yes" if low >= RANKS else "Roughly"
    inverted = round(ranking["inverted"]["value"] * ranking["pairs"])
    near = f", {close['inverted']} of the {close['pairs']} that differ by less than {100 * close['within']:.0f} points"
    return (
        f"Can it rank policies? {verdict}. Of {ranking['policies']} policies ({words}) Spearman's rho is {_say(rho)} "
        f"and MMRV {_say(mmrv, points=True)}; {inverted} of {ranking['pairs']} pairs stand the wrong way round"
        f"{near if close['pairs'] else ''}. Its success rates are off by {_say(gap, points=True)} on average."
    )


def _state_paid(world: Answers) -> str:
    paid = world["paid"]
    if not paid or not paid["false_success"]:
        return "Can it pay them? Not asked: it takes rollouts that fail in truth, with actions chosen in imagination."
    false, precision = paid["false_success"], paid["precision"]
    verdict = "Yes" if false["rate"] <= PAYS else "No" if false["rate"] > PAYS_NOT else "Partly"
    true = f"{format_rate(precision['rate'])} of what it pays is true" if precision else "it pays nothing"
    return (
        f"Can it pay them? {verdict}. With actions chosen in imagination ({paid['policy']}) it pays "
        f"{format_rate(false['rate'])} of {false['n']} failures (95% between {format_rate(false['low'])} and "
        f"{format_rate(false['high'])}; yes is up to {PAYS:.0%}, no above {PAYS_NOT:.0%}), and {true}."
    )


def _state_horizon(horizon: Answers | None) -> str:
    if not horizon:
        return "Up to which horizon? Not asked."
    usable, chunks = horizon["horizon"], len(horizon["n"])
    least = f"at least {horizon['thresholds']['surviving']:.0%} of the rollouts of recorded actions stay with the truth"
    reach = f"All {chunks} chunks" if usable == chunks else f"{usable} of {chunks} chunks"
    said = f"{reach} ({usable * horizon['chunk']} steps), up to which {least}"
    if not usable:
        said = f"Not one chunk of {horizon['chunk']} steps, if {least.replace('stay', 'are to stay')}"
    # The chunk that ends the horizon says how sharp its end is.
    last = min(usable, chunks - 1)
    alive = horizon["with_truth"][last]
    said = f"Up to which horizon? {said}; after chunk {last + 1} {format_rate(alive['rate'])} of {alive['n']} are."
    if chunks == 1:
        return said
    ssim, psnr = (f"{horizon[name][0]:.{d}f} to {horizon[name][-1]:.{d}f}" for name, d in (("ssim", 3), ("psnr", 1)))
    return f"{said} From the first to the last chunk PSNR goes from {psnr} dB and SSIM from {ssim}."


def _state_lies(lies: Answers) -> str:
    asked = "Does anything tell a lie before the truth is known?"
    found = {name: sign["paid"] for name, sign in lies["signs"].items() if sign["paid"] and sign["paid"]["value"]}
    if "mix" not in found:
        return f"{asked} Not known: of {lies['paid']} paid rollouts {lies['lies']} fail, too few of one kind."
    alone = [name for name in found if not name.startswith(("mix", "refreshed"))]
    mix, best = found["mix"], max(alone, key=lambda name: found[name]["value"])
    verdict = "Yes" if mix["value"] >= TELLS else "Partly" if mix["low"] > 0.5 else "No"
    half = lies["signs"]["mix"]["gates"][lies["coverages"].index(0.5)]
    return (
        f"{asked} {verdict}. Of {lies['paid']} paid rollouts {lies['lies']} fail in truth. In {_say(mix)} of the pairs "
        f"of a lie and a truth the mix of all signs suspects the lie more (yes is from {TELLS}, chance is 0.5), and "
        f"the best single one ({SIGNS[best]}) in {found[best]['value']:.2f}. If only the less suspicious half were "
        f"paid, {format_rate(half)} of it would be true, and not {format_rate(lies['precision'])}."
    )


# ---------------------------------------------------------------- tables


def policy_rows(trust: Answers) -> Rows:
    """Returns a row for each policy: true success, and success in each world, at each temperature; none without any."""
    if not trust["policies"]:
        return []
    heads = [f"{what}, {words}" for words in trust["levels"].values() for what in ("true", *_world_names(trust))]
    rows: Rows = [("policy", *heads)]
    for policy in trust["policies"]:
        rates = [rate for how in trust["levels"] for rate in (policy[how]["true"], *policy[how]["imagined"])]
        rows.append((policy["name"], *(format_rate(rate and rate["rate"]) for rate in rates)))
    return rows


def ranking_rows(trust: Answers) -> Rows:
    """Returns a row for each world and temperature: every number of the ranking with its interval."""
    rows: Rows = [("world", "policies", *MEASURES.values(), "ties", "failures paid", "paid ones true")]
    for world, name in zip(trust["worlds"], _world_names(trust), strict=True):
        for how, words in trust["levels"].items():
            if ranking := world["ranking"].get(how):
                cells = (_say(ranking[part], points=part in IN_POINTS, short=True) for part in MEASURES)
                paid = world["paid"] or {}
                rates = (format_rate((paid.get(part) or {}).get("rate")) for part in ("false_success", "precision"))
                ties = f"{ranking['tied']} of {ranking['pairs']}"
                rows.append((f"{name}, {words}", str(ranking["policies"]), *cells, ties, *rates))
    return rows if len(rows) > 1 else []


def horizon_rows(trust: Answers) -> Rows:
    """Returns a row for each world and chunk: PSNR with its two references, SSIM, latents, and who is still there."""
    head = ("world, chunk", "rollouts", "with the truth", "95%", "first diverge here", "PSNR", "first frame held still")
    rows: Rows = [(*head, "VAE alone", "SSIM", "latent error")]
    for world, name in zip(trust["worlds"], _world_names(trust), strict=True):
        horizon = world["horizon"]
        for n, alive in enumerate(horizon["with_truth"] if horizon else ()):
            vae, latent = (horizon[part][n] if part in horizon else None for part in ("psnr_vae", "latent"))
            row = (f"{name}, chunk {n + 1}", str(alive["n"]), format_rate(alive["rate"]))
            row += (f"{alive['low']:.1%} - {alive['high']:.1%}", str(horizon["first"][n]), f"{horizon['psnr'][n]:.1f}")
            row += (f"{horizon['psnr_still'][n]:.1f}", "-" if vae is None else f"{vae:.1f}")
            rows.append((*row, f"{horizon['ssim'][n]:.3f}", "-" if latent is None else f"{latent:.3f}"))
    return rows if len(rows) > 1 else []


def sign_rows(trust: Answers) -> Rows:
    """Returns a row for each world and sign: AUROC for chunks and for payments, and what a gate by it would pay."""
    rows: Rows = []
    for world, name in zip(trust["worlds"], _world_names(trust), strict=True):
        if not (lies := world.get("lies")):
            continue
        kept = [f"true, {coverage:.0%} paid" for coverage in lies["coverages"]]
        rows = rows or [("world, sign", "AUROC, chunk gone astray", "AUROC, paid in vain", *kept)]
        counts = [f"{lies['astray']} of {lies['chunks']}", f"{lies['lies']} of {lies['paid']}"]
        rows.append((f"{name}, all", *counts, *[format_rate(lies["precision"])] * len(kept)))
        for sign in filter(lies["signs"].get, SIGNS):  # in this order
            row = lies["signs"][sign]
            areas = [_say(row[of], short=True) if row[of] else "-" for of in ("astray", "paid")]
            gates = map(format_rate, row["gates"] or [None] * len(kept))
            rows.append((f"{name}, {SIGNS[sign]}", *areas, *gates))
    return rows


# ---------------------------------------------------------------- points of figures


def place_policies(trust: Answers) -> list[tuple[str, list[tuple[str, int, Point, Point]]]]:
    """Returns a title and a point for each policy, for each temperature in each world that ranks: see ``figures``."""
    shown = []
    for how, words in trust["levels"].items():
        for w, name in enumerate(_world_names(trust)):
            if trust["worlds"][w]["ranking"].get(how):
                points = [_place_policy(policy, how, w) for policy in trust["policies"]]
                shown.append((f"{name}, {words}", points))
    return shown


def place_chunks(trust: Answers) -> list[tuple[str, list[Point]]]:
    """Returns for each world the share of rollouts that are still with the truth, by chunk."""
    lines = []
    for world, name in zip(trust["worlds"], _world_names(trust), strict=True):
        alive = world["horizon"]["with_truth"] if world["horizon"] else ()
        lines.append((name, [(n + 1.0, rate["rate"], rate["low"], rate["high"]) for n, rate in enumerate(alive)]))
    return lines


def _world_names(trust: Answers) -> list[str]:
    return [world["name"].replace("world model of round", "world") for world in trust["worlds"]]


def _place_policy(policy: Answers, how: str, world: int) -> tuple[str, int, Point, Point]:
    rates = (policy[how]["true"], policy[how]["imagined"][world])
    across, up = ((0.0, rate["rate"], rate["low"], rate["high"]) for rate in rates)
    return policy["name"], 2 if policy["ladder"] else 1, across, up


def _say(number: Answers, *, points: bool = False, short: bool = False) -> str:
    """Returns a number with its interval: ``0.94 (95% between 0.71 and 0.99)``, or ``0.94 [0.71, 0.99]``."""

    def write(value: float) -> str:
        return f"{100 * value:.1f}" if points else f"{value:.2f}"

    if number["value"] is None:
        return "-"
    value, unit = write(number["value"]), " points" if points and not short else ""
    if number["low"] is None:
        return f"{value}{unit}"
    low, high = write(number["low"]), write(number["high"])
    return f"{value} [{low}, {high}]" if short else f"{value}{unit} (95% between {low} and {high})"
