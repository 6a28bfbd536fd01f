"""What the results say, in sentences and in tables of text; the page and the terminal show the same ones.

Every function takes a part of ``results.json`` and is pure. A part that is absent gives no sentence and no table, so
that single jobs and studies use the same functions as the whole loop.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.core.tables import text_table
from wovr_jax.report.results import best_level

Results = Mapping[str, Any]
Rows = list[tuple[str, ...]]
"""A table, its head first."""

LEARNER = "grpo-"
"""How the names of the learner's stages begin."""
FINGERS = {"open_fingers": "never close", "dropped": "let go half way"}
"""The actions that a comparison plays again with other fingers, and what those do."""
STARTS = {"all": "all", "episode_start": "episode starts", "keyframe": "keyframes"}
"""The kinds of start of a closed loop, and what a reader calls them."""
FORCED = "on true frames"
"""What a reader calls failures that are paid where each chunk is imagined from the true frames before it."""
UNMEASURED = "True success was not measured (evaluate.episodes=0), so nothing is claimed about it."
"""What is said of a policy that learned and that nobody tried."""
COUNTS = {"tp": "both", "fp": "imagined only", "fn": "true only", "tn": "neither"}
"""The four counts of two verdicts on the same rollouts: success in which world."""


def render_text(results: Results) -> str:
    """Returns the results as a few lines of plain text, for the end of a run."""
    tables = (
        policy_rows(results.get("phases") or ()),
        temperature_rows(results.get("phases") or ()),
        *(table["rows"] for table in results.get("tables") or ()),
        closed_rows(results.get("closed_loop") or (), brief=True),
        world_rows(results.get("comparison") or ()),
        cost_rows(results.get("ledger") or {}),
    )
    sentences = [textwrap.fill(sentence, 110) for sentence in state_findings(results)]
    return "\n\n".join([text_table(rows) for rows in tables if len(rows) > 1] + sentences)


# ---------------------------------------------------------------- sentences


def state_findings(results: Results) -> list[str]:
    """Says what was reached, whether imagination can be believed and what it cost, one sentence or two each."""
    phases, ledger, remarks = results.get("phases"), results.get("ledger") or {}, results.get("remarks") or []
    learned = any(stage.startswith(LEARNER) for stage in ledger)
    # A robot whose evaluation nobody recorded: what imagination says of its policies is not put in the place of that.
    # A study has tables of its own.
    unknown = [UNMEASURED] if learned and not results.get("tables") else []
    sentences = [_state_success(phases)] if phases else unknown
    # The last of either is that of the final policy, in the newest world that it was held against.
    sentences += [_state_closed_loop(results["closed_loop"][-1])] if results.get("closed_loop") else []
    sentences += [_state_agreement(results["comparison"][-1])] if results.get("comparison") else []
    sentences += [_state_cost(ledger)] if learned else []
    return [*sentences, *remarks]


def explain_flat(curve: Sequence[Mapping[str, Any]]) -> str:
    """Says so where most groups from keyframes of a round ended alike and had nothing to teach; else nothing.

    Args:
      curve: the metrics of each of its iterations.
    """
    ends = [(line["lost_keyframe"], line["won_keyframe"]) for line in curve if "lost_keyframe" in line]
    lost, won = (sum(shares) / len(ends) for shares in zip(*ends)) if ends else (0.0, 0.0)
    if lost + won <= 0.5:
        return ""
    return (
        f"{lost + won:.0%} of the groups from keyframes ended alike and taught nothing, {lost:.0%} in failures and "
        f"{won:.0%} in successes: try others (starts.rule, starts.before, starts.room), or fewer (starts.share)."
    )


def _state_success(phases: Sequence[Results]) -> str:
    last, gain = phases[-1], phases[-1].get("gain")
    now = f"{last['true_success']['rate']:.1%} ({last['name']})"
    where = f"over {last['true_success']['n']} start states that no stage trained on"
    # A run of the base policy alone.
    if not gain:
        return f"True success is {now}, {where}."
    verdict = _judge(gain, "The policy truly got better.", "The policy truly got worse.", "That may be chance.")
    before = f"{phases[0]['true_success']['rate']:.1%} ({phases[0]['name']})"
    if last.get("paired") is False:
        where = f"over {last['true_success']['n']} start states each, which were not the same ones"
    if len(last.get("temperatures") or ()) == 1:  # a robot, which is measured as it is used
        how = name_temperature(last["temperatures"][0]["temperature"])
        return f"True success ({how}) went from {before} to {now}: {_state_difference(gain)}, {where}. {verdict}"
    # Sampling is how it acts in training; the most likely actions are what a robot would run.
    likely = f"With its most likely actions: {phases[0]['greedy']['rate']:.1%}, then {last['greedy']['rate']:.1%}"
    said = f"True success went from {before} to {now}: {_state_difference(gain)}, {where}. {verdict} {likely}"
    # Runs of earlier versions did not measure between the two.
    if not last.get("best_gain"):
        return f"{said}."
    # A base that a lower temperature repairs needed no training: each policy is given the one that suits it best.
    tops = [best_level(phase["temperatures"]) for phase in (phases[0], last)]
    first, then = (f"{top['rate']:.1%} ({name_temperature(top['temperature'])})" for top in tops)
    best = f"At the temperature that suits each best (chosen on these layouts): {first}, then {then}, "
    best += f"{_state_difference(last['best_gain'])}."
    return f"{said}, {_state_difference(last['greedy_gain'])}. {best}"


def _state_closed_loop(row: Results) -> str:
    def state(rate: Results) -> str:
        return f"{rate['rate']:.1%} (95% between {rate['low']:.1%} and {rate['high']:.1%})"

    # By kind of start: a policy may find in the middle of an episode what it does not find from the start.
    false, paid = row["all"]["false_success"], row["all"]["precision"]
    kinds = {words: row[kind]["false_success"] for kind, words in STARTS.items() if kind != "all" and row[kind]}
    split = ", ".join(f"{rate['rate']:.1%} from {words}" for words, rate in kinds.items() if rate)
    failures = f"of {false['n']} rollouts that fail in truth, {state(false)} are paid as successes" if false else ""
    also = f" ({split})" if false and len(kinds) > 1 else ""
    # Runs of earlier versions did not ask.
    forced = row["all"].get("forced_false_success")
    also += f", {forced['rate']:.1%} where each chunk is imagined from the true frames before it" if forced else ""
    true = f"of {paid['n']} paid ones, {state(paid)} are true" if paid else "none was paid"
    return (
        f"Actions chosen in imagination and followed in truth ({row['policy']}, {row['world']}): "
        f"{failures or 'no rollout fails in truth'}{also}; {true}."
    )


def _state_agreement(row: Results) -> str:
    imagined, true, episodes = success_rates(row)
    rates = [f"{row[how]:.1%} with fingers that {words}" for how, words in FINGERS.items() if row.get(how) is not None]
    loose = f" It also calls {' and '.join(rates)} a success." if rates else ""
    return (
        f"Recorded actions replayed ({row['policy']}, {row['world']}): imagination calls {imagined:.1%} of {episodes} "
        f"episodes a success, the truth {true:.1%}, a difference of {_state_difference(row['bias'])}; "
        f"{row['fp'] + row['fn']} episodes were misjudged.{loose}"
    )


def _state_cost(ledger: Mapping[str, Results]) -> str:
    def total(kind: str, what: str) -> int:
        return sum(account.get(what, 0) for stage, account in ledger.items() if stage.startswith(kind))

    watched, expert = total(LEARNER, "watched_steps"), total("demonstrations", "true_steps")
    seen, minutes = total("pretrained", "pretrained_frames"), total("", "robot_minutes")
    if minutes:
        parts = {kind: total(kind, "robot_minutes") for kind in ("demonstrations", "collect-", "evaluate-")}
        shares = ", ".join(f"{part:.1f} in {kind.rstrip('-')}" for kind, part in parts.items())
        return (
            f"The robot moved for {minutes:.1f} minutes ({shares}). The learner moved it not at all; it learned from "
            f"{total(LEARNER, 'imagined_frames'):,} imagined frames."
        )
    before = f" Before that the expert took {expert:,} true steps, and pretrained parts had seen {seen:,} frames."
    return (
        f"The collections took {total('collect-', 'true_steps'):,} steps of the true simulator. The learner took "
        f"{total(LEARNER, 'true_steps'):,}; it learned from {total(LEARNER, 'imagined_frames'):,} imagined frames."
        + (f" Another {watched:,} true steps only drew its curves and decided nothing." if watched else "")
        + (before if expert or seen else "")
    )


def _judge(difference: Results, above: str, below: str, neither: str) -> str:
    """Returns the words for a difference; one whose interval holds zero is not called one."""
    return above if difference["low"] > 0 else below if difference["high"] < 0 else neither


# ---------------------------------------------------------------- tables


def policy_rows(phases: Sequence[Results]) -> Rows:
    """Returns a row for the policy of each round: true, greedy and imagined success, and the gain over the base."""
    rows: Rows = [("policy", "true success", "95%", "gain", "95%", "greedy", "imagined")]
    for phase in phases:
        rates = (format_rate(phase["greedy"]["rate"]), format_rate(phase["imagined_success"]))
        rows.append((phase["name"], *_rate_cells(phase["true_success"]), *_gain_cells(phase.get("gain")), *rates))
    return rows


def temperature_rows(phases: Sequence[Results]) -> Rows:
    """Returns a row for each policy: true success at each temperature; nothing where runs did not measure it."""
    # Where a robot is measured at one, the table of policies has it.
    shown = [phase for phase in phases if len(phase.get("temperatures") or ()) > 1]
    heads = [name_temperature(level["temperature"]) for phase in shown[:1] for level in phase["temperatures"]]
    rows = [(phase["name"], *(format_rate(level["rate"]) for level in phase["temperatures"])) for phase in shown]
    return [("true success at", *heads), *rows] if shown else []


def subgoal_rows(phases: Sequence[Results]) -> Rows:
    """Returns how far the episodes of each policy came; nothing where the environment knows no sub-goals."""
    first = phases[0]["subgoals"]
    if not first:
        return []
    # The base policy reaches the early sub-goals most often, which puts the columns into the order of the task.
    names = sorted(first, key=lambda name: -first[name])
    rows = [(phase["name"], *(format_rate(phase["subgoals"][name]) for name in names)) for phase in phases]
    return [("episodes with", *(name.replace("_", " ") for name in names)), *rows]


def closed_rows(closed_loop: Sequence[Results], *, brief: bool = False) -> Rows:
    """Returns a row for each policy in each world and kind of start: four counts, and what was paid, with intervals.

    ``brief`` leaves out the kinds, the counts and the true frames, for a terminal.
    """
    shares = {"false_success": "failures paid", "forced_false_success": FORCED, "precision": "paid ones true"}
    if brief:
        rows: Rows = [
            ("closed loop: policy; world", "imagined", "true", "failures paid", "95%", "paid ones true", "95%")
        ]
        for row in filter(lambda row: row["all"], closed_loop):
            part = row["all"]
            rates = (format_rate(part[name]["rate"]) for name in ("imagined", "true"))
            cells = (_rate_cells(part[name]) if part[name] else ("-", "-") for name in ("false_success", "precision"))
            rows.append((name_pair(row), *rates, *itertools.chain(*cells)))
        return rows
    title = ("policy; world", "starts", *COUNTS.values(), "imagined", "true")
    rows: Rows = [(*title, *(cell for words in shares.values() for cell in (words, "95%")))]
    for row in closed_loop:
        for kind, words in STARTS.items():
            if part := row[kind]:
                rates = (format_rate(part[name]["rate"]) for name in ("imagined", "true"))
                # Runs of earlier versions imagined nothing from true frames.
                rates_of = (part.get(name) for name in shares)
                cells = (cell for rate in rates_of for cell in (_rate_cells(rate) if rate else ("-", "-")))
                rows.append((name_pair(row), words, *(str(part[count]) for count in COUNTS), *rates, *cells))
    return rows


def world_rows(comparison: Sequence[Results]) -> Rows:
    """Returns a row for each comparison: the four counts of two verdicts, their bias and the frames' PSNR."""
    title = ("replay: policy; world", *COUNTS.values(), "bias", "95%", *FINGERS.values())
    rows: Rows = [(*title, "PSNR by chunk")]
    for row in comparison:
        values = [f"{value:.1f}" for value in row.get("psnr") or ()]
        # It falls from chunk to chunk, so the first and the last say enough.
        psnr = " ".join(values if len(values) < 5 else (values[0], "to", values[-1]))
        counts = (str(row[count]) for count in COUNTS)
        loose = (format_rate(row.get(how)) for how in FINGERS)
        rows.append((name_pair(row), *counts, *_gain_cells(row["bias"]), *loose, psnr))
    return rows


def cost_rows(ledger: Mapping[str, Results]) -> Rows:
    """Returns what each stage took, and what all of them took together."""
    # Earlier versions counted less; and most stages do without some of it.
    often = ("true_steps", "imagined_frames")
    names = ("episodes", "true_steps", "robot_minutes", "watched_steps", "pretrained_frames", "imagined_frames")
    names = [name for name in names if name in often or any(account.get(name) for account in ledger.values())]
    total = {name: sum(account.get(name, 0) for account in ledger.values()) for name in (*names, "seconds")}
    rows = [
        (stage, *(f"{round(account.get(name, 0), 2):,}" for name in names), format_duration(account["seconds"]))
        for stage, account in ({**ledger, "all": total} if ledger else {}).items()
    ]
    return [("stage", *(name.replace("_", " ") for name in names), "time"), *rows]


# ---------------------------------------------------------------- numbers in words


def success_rates(row: Results) -> tuple[float, float, int]:
    """Returns imagined success, true success, and over how many episodes, from the four counts of a comparison."""
    # At least one, or a comparison of nothing would divide by zero.
    episodes = max(sum(row[count] for count in ("fp", "tp", "fn", "tn")), 1)
    return (row["tp"] + row["fp"]) / episodes, (row["tp"] + row["fn"]) / episodes, episodes


def format_rate(rate: float | None) -> str:
    """Returns 0.5 as ``50.0%``, and a dash for a rate that nobody measured or that has no cases."""
    return "-" if rate is None or math.isnan(rate) else f"{rate:.1%}"


def name_temperature(temperature: float) -> str:
    """Returns what a reader calls a temperature: ``T = 0.5``, and ``greedy`` for 0."""
    return f"T = {temperature:g}" if temperature else "greedy"


def format_points(share: float) -> str:
    """Returns a difference of two rates in points: 0.215 as ``+21.5``."""
    return f"{100 * share:+.1f}"


def format_duration(seconds: float) -> str:
    """Returns a time as people say it: ``12.3 s``, ``5 min 11 s``, ``2 h 34 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    # Rounded first: 59.7 s after a minute is 2 min 00 s and not 1 min 60 s.
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def name_pair(row: Results) -> str:
    """Returns which policy met which world, in few words."""
    return f"{row['policy']}; {row['world'].replace('world model of round', 'world')}"


def _rate_cells(rate: Results) -> tuple[str, str]:
    """Returns a rate and its interval, a cell each."""
    return format_rate(rate["rate"]), f"{rate['low']:.1%} - {rate['high']:.1%}"


def _gain_cells(gain: Results | None) -> tuple[str, str]:
    """Returns a difference and its interval, a cell each, in points."""
    if not gain:
        return "-", "-"
    return format_points(gain["gain"]), f"{format_points(gain['low'])} to {format_points(gain['high'])}"


def _state_difference(gain: Results) -> str:
    return "{} points (95% between {} and {})".format(*(format_points(gain[end]) for end in ("gain", "low", "high")))
