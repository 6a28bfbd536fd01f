"""Draws imagined against true success of the policies of a run, for the documentation.

    python launch/tools/ranking_chart.py runs/pace/results.json --out docs/ranking.png

The file is the results.json of a run that launch/audit.py asked with --rank or --ladder. A panel for each temperature,
the newest world in full colour and the older ones pale; whiskers are Wilson's 95 % intervals. Needs matplotlib
(requirements-dev.txt).
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

# Python puts this file's folder first on the path; the packages lie two above it.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from launch import command

COLOURS = {False: "#2f6db3", True: "#c98b2b"}
"""By whether a policy is of the ladder."""
KINDS = {False: "policies of the run", True: "imitation of a part of its demonstrations"}


def main() -> None:
    """Reads and draws."""
    parser = command.Parser(__doc__)
    parser.add_argument("results", type=pathlib.Path, help="results.json of a run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the picture to write, .png or .svg")
    args = parser.parse_args()
    with command.explain_errors("Stopped.", place=args.results):
        from wovr_jax.core.disk import read_json

        results = read_json(args.results)
        if "trust" not in results:
            command.refuse(f"{args.results} holds no ranking; launch/audit.py {args.results.parent} --rank makes one.")
        draw(results["trust"], args.out)
        print(args.out)


def draw(trust: dict[str, Any], out: pathlib.Path) -> None:
    """Draws a panel for each temperature: a dot a policy and world, the line on which the two rates agree."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels = trust["levels"]
    figure, panels = plt.subplots(1, len(levels), figsize=(4.4 * len(levels), 4.5), sharey=True, squeeze=False)
    newest = len(trust["worlds"]) - 1
    for panel, (how, words) in zip(panels[0], levels.items(), strict=True):
        panel.plot([0, 1], [0, 1], color="#8f99a3", linewidth=1, linestyle=":")
        labels = set()
        for policy in trust["policies"]:
            true, ladder = policy[how]["true"], policy["ladder"]
            for world, imagined in enumerate(policy[how]["imagined"]):
                x, y = true["rate"], imagined["rate"]
                bars = {"xerr": [[x - true["low"]], [true["high"] - x]]}
                bars |= {"yerr": [[y - imagined["low"]], [imagined["high"] - y]]}
                label = KINDS[ladder] if world == newest and ladder not in labels else None
                labels |= {ladder} if label else set()
                style = {"color": COLOURS[ladder], "alpha": 1.0 if world == newest else 0.22, "label": label}
                panel.errorbar(x, y, **(bars if world == newest else {}), fmt="o", markersize=5, elinewidth=1, **style)
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="true success", title=words, aspect="equal")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    panels[0][0].set_ylabel(f"success in {trust['worlds'][newest]['name']}")
    panels[0][0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.tight_layout(pad=1.2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
