"""Opens a page on which a person watches recorded episodes and says what came of them.

    python launch/label.py recordings                     a folder of recordings (launch/serve.py --record)
    python launch/label.py recordings --open              and shows the page in a browser
    python launch/label.py recordings --by ada --port 0
    python launch/label.py recordings --run runs/robot    with the run's classifier: what it contradicts comes first

Keys mark success, failure and the first frame of success; each mark is saved at once to labels.json in the folder, with
who and when. An episode folder, or a folder of them, will do as well. Only this machine can open the page unless --host
says otherwise. See docs/recording.md.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import pathlib
import sys
import webbrowser

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from launch import command

LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Opens the folder, serves the page until Ctrl-C."""
    args = parse()

    # Ctrl-C and SIGTERM while the page is served end it well, with status 0; while it still loads they end here.
    with command.explain_errors("stopped", place=f"{args.host}:{args.port}"), contextlib.ExitStack() as held:
        # Only now: importing jax takes seconds, a misspelt flag none.
        from wovr_jax.core import config
        from wovr_jax.export.listen import reserve
        from wovr_jax.label.server import LabelConfig, LabelServer
        from wovr_jax.label.store import Store

        if args.host not in LOCAL:
            print(f"warning: whoever reaches {args.host} can see these recordings and label them", file=sys.stderr)
        cfg = config.from_dict(LabelConfig, {"host": args.host, "port": args.port}, "label")
        # Before the recordings, of which there may be many: a port that is taken is said at once.
        sockets = [held.enter_context(one) for one in reserve(cfg.host, cfg.port)]
        store = Store(args.folder, args.by or name_user())
        scores = None
        if args.run:
            from wovr_jax.label.scores import score

            scores = score(store, args.run)
        # An IPv6 address stands in brackets in a URL; one that listens everywhere is no address to go to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
        host = f"[{host}]" if ":" in host else host

        def tell(port: int) -> None:
            left = sum(store.label_of(number) is None for number in range(len(store.items)))
            print(f"{len(store.items)} recordings, {left} without a label, at http://{host}:{port}", flush=True)
            if args.open and not webbrowser.open(f"http://{host}:{port}"):
                print("found no browser to open; go to the address above", file=sys.stderr)

        LabelServer(store, cfg, scores, sockets).run(tell)
    print("stopped", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = command.Parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="the recordings; labels.json lies, or is made, in it")
    parser.add_argument("--by", metavar="NAME", help="who labels; default: who is logged in")
    parser.add_argument("--run", type=pathlib.Path, help="a run folder, whose newest classifier scores the frames")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8200, help="0 takes a free one (default 8200)")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:
        parser.error("--port is from 0 to 65535")
    return args


def name_user() -> str:
    """Returns the name of who is logged in."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        command.refuse("nobody knows who labels here; say it with --by NAME")


if __name__ == "__main__":
    main()
