"""Draws what several seeds of a study came to, and prints it as a table for the documentation.

    python launch/tools/study_chart.py docs/results/baselines-576.json --out docs/fair_table.png
    python launch/tools/study_chart.py a/outcomes.json b/outcomes.json --out chart.png --join all.json

The files are the outcomes.json that studies leave; seeds of one study that were made apart are counted together. Each
dot is a training, the bar is the mean over seeds, its whisker Student's 95 % interval over seeds. Needs matplotlib
(requirements-dev.txt).
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command

SHOWN = {"sampled": "as it samples in training", "greedy": "its most likely actions"}
"""The decodings that are drawn, a panel each."""
COLOURS = {"base": "#8f99a3", "": "#c98b2b", "imagined": "#7fabd6", "no ": "#7fabd6", "PACE": "#2f6db3"}
"""How the name of a row begins -> its colour: the base, what learns in the truth only, imagination, all of it."""


def main() -> None:
    """Reads, joins, draws, prints."""
    parser = command.Parser(__doc__)
    parser.add_argument("outcomes", nargs="+", type=pathlib.Path, help="outcomes.json of a study")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the picture to write, .png or .svg")
    parser.add_argument("--join", type=pathlib.Path, help="also writes all of them as one outcomes file")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.out):
        from wovr_jax.core.disk import read_json, write_json
        from wovr_jax.run.reader import read_recipe
        from wovr_jax.studies import outcomes, seeds, variants

        first = read_json(args.outcomes[0])
        runs = outcomes.read([str(path) for path in args.outcomes], first["study"], first["settings"])
        if args.join:
            joined = {
                name: [row for path in args.outcomes for row in read_json(path)["runs"].get(name, ())] for name in runs
            }
            write_json(args.join, first | {"runs": joined})
        # All of them, whichever the first file was asked for.
        recipe = read_recipe(first["settings"] | {"variants": []})
        known = {one.name: one for one in variants.variants(first["study"], recipe)}
        # In the order of the study, the base and what is cheap first and the reference last.
        order = sorted(filter(runs.get, runs), key=lambda name: (name == variants.REFERENCE, list(known).index(name)))
        ours = runs.get(variants.REFERENCE)
        rows = [
            seeds.summarize(name, known[name].says, runs[name], None if name == variants.REFERENCE else ours)
            for name in order
        ]
        draw(rows, args.out)
        print(render_markdown(rows), render_against(rows), sep="\n\n")


def base_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the policy that all of them began with, over the seeds of the row that has most."""
    from wovr_jax.studies import seeds

    most = max(rows, key=lambda row: len(row["seeds"]))
    base: dict[str, Any] = {"says": "base", "seeds": most["seeds"], "episodes": [0] * len(most["seeds"])}
    for how in seeds.DECODINGS:
        rates = most[how]["base"]
        base[how] = {"rates": rates, "rate": seeds.student(rates), "gain": None}
    return base


def draw(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Draws a panel for each of ``SHOWN``: a bar a variant, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [base_row(rows), *rows]
    figure, panels = plt.subplots(1, len(SHOWN), figsize=(11, 0.42 * len(shown) + 1.1), sharey=True)
    for panel, (how, words) in zip(panels, SHOWN.items(), strict=True):
        for place, row in enumerate(shown):
            rate, at = row[how]["rate"], len(shown) - place
            colour = next((COLOURS[head] for head in COLOURS if head and row["says"].startswith(head)), COLOURS[""])
            panel.barh(at, rate["mean"], color=colour, height=0.62)
            if rate["low"] is not None:
                panel.plot([rate["low"], rate["high"]], [at, at], color="#222222", linewidth=1.2)
            panel.plot(row[how]["rates"], [at] * rate["n"], "o", color="#222222", markersize=3)
            number = {"color": "white", "fontsize": 8.5, "weight": "bold", "va": "center"}
            panel.text(0.012, at, f"{rate['mean']:.2f}", bbox={"color": colour, "pad": 1.5}, **number)
        panel.set(xlim=(0, 1), title=f"true success, {words}")
        panel.set_yticks(range(len(shown), 0, -1))
        panel.set_yticklabels([f"{row['says']}\n{describe(row)}" for row in shown], fontsize=7.5)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    figure.tight_layout(pad=1.2)
    figure.subplots_adjust(left=0.24)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def describe(row: dict[str, Any]) -> str:
    """Returns what a row took: true episodes and seeds."""
    count, n = round(sum(row["episodes"]) / len(row["episodes"])), len(row["seeds"])
    return f"{count:,} true episodes, {n} seed{'s' * (n > 1)}"


def render_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table, with a line for the base."""
    head = "| | seeds | true episodes | as sampled | greedy | best temperature | gain in points, as sampled | greedy |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in [base_row(rows), *rows]:
        cells = [row["says"], str(len(row["seeds"])), f"{round(sum(row['episodes']) / len(row['episodes'])):,}"]
        cells += [f"{row[how]['rate']['mean']:.3f}" for how in ("sampled", "greedy", "best")]
        cells += [points(row[how]["gain"]) for how in ("sampled", "greedy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_against(rows: list[dict[str, Any]]) -> str:
    """Returns the table of differences, reference minus row, on the seeds that both have; the base comes first."""
    from wovr_jax.studies import seeds

    ours = rows[-1]
    lines = [
        f"| {ours['says']} against | seeds | " + " | ".join(seeds.DECODINGS.values()) + " |",
        "|---|---|---|---|---|",
    ]
    gains = [(f"the base ({ours['says']}'s gain)", [ours[how]["gain"] for how in seeds.DECODINGS])]
    for row in rows[:-1]:
        # The row holds its own difference to the reference; here the reference is what is asked about.
        turned = [row[how]["against"] and turn(row[how]["against"]) for how in seeds.DECODINGS]
        gains += [(row["says"], turned)] if all(turned) else []
    for says, each in gains:
        lines.append("| " + " | ".join([says, str(each[0]["n"]), *map(points, each)]) + " |")
    return "\n".join(lines)


def turn(gain: dict[str, Any]) -> dict[str, Any]:
    """Returns a difference the other way round."""
    low, high = (None, None) if gain["low"] is None else (-gain["high"], -gain["low"])
    return {"mean": -gain["mean"], "low": low, "high": high, "n": gain["n"]}


def points(gain: dict[str, Any] | None) -> str:
    """Returns a gain in points with its interval over seeds."""
    if gain is None:
        return ""
    middle = f"{100 * gain['mean']:+.1f}"
    return middle if gain["low"] is None else f"{middle} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


if __name__ == "__main__":
    main()
