"""Opens a page on which you drive the gripper in the true simulator and in the world model side by side.

    python launch/play.py                            networks that come with the package; the first time takes a minute
    python launch/play.py runs/pace                  a run folder, finished or still going
    python launch/play.py runs/pace --open           and shows the page in a browser
    python launch/play.py runs/pace --round 0 --world 0 --port 0
    python launch/play.py runs/pace --rows 16        programs may drive both worlds as well, 16 rollouts each
    python launch/play.py runs/pace --measure 100    plays so many chunks without a page, and tells how long they took

Arrow keys or the round pad move, the space bar closes the fingers; or the policy drives. Only this machine can open the
page unless --host says otherwise. The run is only read. See docs/play.md.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import webbrowser

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command, flags

LOCAL = ("127.0.0.1", "localhost", "::1")
EPISODES = 64
"""True episodes out of which start states are chosen where nobody names a run."""


def main() -> None:
    """Opens the run, serves the page until Ctrl-C."""
    args = parse()

    # Ctrl-C and SIGTERM while the page is served end it well, with status 0; while a run still loads they end here.
    with command.explain_errors("stopped", place=f"{args.host}:{args.port}"), contextlib.ExitStack() as held:
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import config, machine
        from wovr_jax.export.listen import reserve
        from wovr_jax.play import latency
        from wovr_jax.play.programs import Programs
        from wovr_jax.play.server import PlayConfig, PlayServer
        from wovr_jax.play.source import open_run

        if args.host not in LOCAL:
            print(f"warning: whoever reaches {args.host} can play here, and see the run's frames", file=sys.stderr)
        settings = {"host": args.host, "port": args.port, "sessions": args.players, "rows": args.rows}
        cfg = config.from_dict(PlayConfig, settings, "play")
        # Before the run, whose opening takes a while: a port that is taken is said at once.
        sockets = [] if args.measure else [held.enter_context(one) for one in reserve(cfg.host, cfg.port)]
        folder = args.run or command.default_run("play", "", {})
        machine.enable_compile_cache(folder.absolute().parent / ".jax_cache")
        if not args.run:
            if not (folder / "stages" / "starts-0" / "done.json").exists():
                print("The first time some episodes are played to begin from: a minute or two.", file=sys.stderr)
            make_run(folder)
        source = open_run(folder, args.round, args.world)
        print(f"{source.name}: policy {source.policy_stage}, world model {source.world_name}", file=sys.stderr)
        if source.sim is None:
            what = "the true simulator of LIBERO cannot be played in this version; the world model can"
            print(f"{source.name}: {what}", file=sys.stderr)
        if args.measure:
            print(latency.describe(latency.measure(Programs(source), args.measure), source.world_cfg.chunk))
            return
        # An IPv6 address stands in brackets in a URL; one that listens everywhere is no address to go to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
        host = f"[{host}]" if ":" in host else host

        def tell(port: int) -> None:
            print(f"playing at http://{host}:{port} until Ctrl-C", flush=True)
            if args.open and not webbrowser.open(f"http://{host}:{port}"):
                print("found no browser to open; go to the address above", file=sys.stderr)

        PlayServer(Programs(source), cfg, sockets).run(tell)
    print("stopped", file=sys.stderr)


def make_run(folder: pathlib.Path) -> None:
    """Begins a run with the networks that come with the package, as far as somebody can play in it.

    It is that of ``configs/pace.py:pretrained``, but with the policy that has learned already.
    """
    from wovr_jax import pace
    from wovr_jax.core import config
    from wovr_jax.run.folder import Run
    from wovr_jax.run.recipe import Recipe

    settings = command.load_config("pace", "pretrained")
    settings["policy_weights"], settings["collect"]["first"] = "tabletop_policy", EPISODES
    recipe = config.from_dict(Recipe, settings)
    with contextlib.closing(Run(folder, config.to_dict(recipe))) as run:
        # The policy plays true episodes, whose failures are where it is interesting to begin.
        pace.pace(recipe, run, pace.Job("starts-0", measured=()))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    text = "the run folder; default: one of what comes with the package, made in runs/play"
    parser.add_argument("run", type=pathlib.Path, nargs="?", help=text)
    parser.add_argument("--round", type=int, metavar="K", help="of the policy: 0 is the base policy; default the last")
    parser.add_argument("--world", type=int, metavar="K", help="round of the world model, from 0; default the newest")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one (default 8100)")
    parser.add_argument("--players", type=flags.positive, default=8, help="most pages at once (default 8)")
    text = "let programs in as well, each with so many rollouts in either world (wovr_jax/export/world_env.py)"
    parser.add_argument("--rows", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--measure", type=flags.positive, metavar="N", help="play N chunks without a page, and end")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    args = parser.parse_args()
    if not 0 <= args.port <= 65535 or min(args.round or 0, args.world or 0) < 0:
        parser.error("--port is from 0 to 65535, --round and --world at least 0")
    return args


if __name__ == "__main__":
    main()
