"""A run folder: what was asked, what each stage made, and what it cost.

::

    runs/<name>/
      owner                  which process writes here, while one does
      config.json            the whole configuration, written first (config-before-<n>.json: what it was)
      metrics.jsonl, tb/     curves of every stage
      stages/<stage>/        the stage's products and done.json, its facts
      videos/  results.json  report.html

A stage whose ``done.json`` is there is not run again. Every stage is a function of the
configuration and of earlier products alone, so the same command after an interruption ends
in the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from wovr_jax.core import config, processes
from wovr_jax.core.disk import not_written, own, read_json, write_json
from wovr_jax.core.log import Log
from wovr_jax.run.recipe import differences

T = TypeVar("T")

MARK, OWNER = "done.json", "owner"
# What a claim about sample efficiency is made of: true steps are what the method saves, imagined ones what it pays.
# Watched steps are true ones that are drawn as a curve and decide nothing.
COUNTED = ("episodes", "true_steps", "watched_steps", "pretrained_frames", "imagined_frames")
# Numbers depend a little on the mesh, by the order of sums; but a run that lost its machine must be able to go on.
FREE = re.compile(r"(mesh|checkpoints|seeds|variants)\b|(.*\.)?(workers|threads|ahead)$")
"""Settings (dotted paths) that say where and by how many a run computes, what it keeps, or how much of a study, not
what comes out: it may go on with others."""


class RunError(ValueError):
    """A run folder that cannot be used for what was asked; the message says why."""


class Product(Generic[T]):
    """What a stage made: its name, its facts, and a value that is loaded when it is first used.

    A run that is resumed passes every finished stage on its way; of those whose value nobody reads, nothing is loaded.

    Attributes:
      load: reads it as it was made, and keeps nothing: for a training that goes on from it.
      name: the stage; empty for a value that no stage made.
      facts: what the stage wrote down, ready for JSON.
    """

    def __init__(self, load: Callable[[], T], name: str = "", facts: Mapping[str, Any] | None = None):
        self.load, self.name, self.facts = load, name, dict(facts or {})
        self._use: Callable[[T], T] = lambda made: made

    def used_as(self, use: Callable[[T], T]) -> Product[T]:
        """Returns the product, whose ``value`` is from now on ``use(load())``: weights of fewer bytes, for example."""
        self._use = use
        return self

    def release(self) -> None:
        """Gives up ``value``; whoever asks for it again reads it again."""
        self.__dict__.pop("value", None)

    @functools.cached_property
    def value(self) -> T:
        """The product, for whoever only uses it."""
        return self._use(self.load())


class _Reached(Exception):  # noqa: N818  it is no error
    """The last stage that was asked for is done."""


class Run:
    """The open folder of one run.

    Args:
      folder: where; made when missing.
      settings: the whole configuration as a plain dictionary.
      allow_change: whether another configuration may go on in a run that is there. Stages that are finished
        stay as they are; the configuration before is kept as ``config-before-<n>.json``.

    Raises:
      InUseError: when another process makes this run.
      RunError: when the folder holds something else, or a run with another configuration
        (every difference is listed), or cannot be written to.
    """

    _lease: Any = None
    before_stage: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], *, allow_change: bool = False):
        self.folder = pathlib.Path(folder).absolute()
        self.settings = config.to_dict(settings)
        with _explained(self.folder, "the run cannot begin"):
            processes.once(lambda: self._claim(allow_change), "open the run folder")
            # Only now: the log makes the folder, and one that is there must have been judged first.
            self.log = Log(self.folder)
        # Of every finished stage, whether or not it is asked for again: the ledger of a resumed run is the whole run's.
        self.facts: dict[str, dict[str, Any]] = processes.once(self._marked, "look for finished stages")
        self._last, self._reached = "", False
        # Seconds of the stages that were made inside the one that is being made, which are theirs and not its own.
        self._inside_s = 0.0

    def _marked(self) -> dict[str, Any]:
        # In the order in which they were finished, which no name tells.
        marks = sorted(self.folder.glob(f"stages/*/{MARK}"), key=lambda mark: mark.stat().st_mtime)
        return {mark.parent.name: read_json(mark) for mark in marks}

    def _claim(self, allow_change: bool) -> None:
        mark = self.folder / "config.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        # A mistyped --run must not fill somebody's folder.
        if not mark.exists() and any(path.name != OWNER for path in self.folder.iterdir()):
            raise RunError(
                f"{self.folder} is not empty and is not a run folder (no config.json in it). "
                "Choose another folder with --run=..., or empty this one."
            )
        self._lease = own(self.folder / OWNER, self.folder)
        if mark.exists():
            self._compare(mark, allow_change)
        else:
            write_json(mark, self.settings)

    def close(self) -> None:
        """Ends the log and gives the folder free for another process."""
        self.log.close()
        if self._lease:
            self._lease.release()

    def _compare(self, mark: pathlib.Path, allow_change: bool) -> None:
        try:
            there = json.loads(mark.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(
                f"{mark} is not readable JSON ({error}); this is not a run folder of this project."
            ) from error
        # What was computed on other devices may go on here, so such settings are not compared.
        different = {name: pair for name, pair in differences(there, self.settings).items() if not FREE.match(name)}
        if not different:
            return
        lines = "\n  ".join(
            f"{name}: {old!r} there, {new!r} asked" for name, (old, new) in list(different.items())[:20]
        )
        if not allow_change:
            raise RunError(
                f"{self.folder} holds a run with another configuration ({len(different)} settings differ). Choose "
                "another folder with --run=..., ask for what is there, or go on with --allow_config_change: finished "
                f"stages then stay as they are.\n  {lines}"
            )
        # Each change is kept, so that the numbers of a finished stage can be traced to the settings that made it.
        earlier = len(list(self.folder.glob("config-before-*.json")))
        print(f"{self.folder} goes on with another configuration:\n  {lines}", file=sys.stderr, flush=True)
        write_json(self.folder / f"config-before-{earlier + 1}.json", there)
        write_json(mark, self.settings)

    def _keep(self) -> None:
        """Asks for the folder anew where it was lost, by a long sleep for example; nobody else may have come.

        Raises:
          InUseError: somebody else has.
        """
        if self._lease and self._lease.compromise:
            self._lease.release(force=True)
            self._lease = own(self.folder / OWNER, self.folder)

    def stage(
        self, name: str, make: Callable[[pathlib.Path], Mapping[str, Any]], load: Callable[[pathlib.Path], T]
    ) -> Product[T]:
        """Runs ``make(folder) -> facts`` unless it is done; ``load(folder)`` is called when the product is first used.

        A product is always what was read back from the folder, so a run that is resumed computes with the same arrays
        as one that is not. ``facts`` is JSON-able; what it holds of ``COUNTED`` goes to the ledger.
        Seconds of interrupted tries are counted too.

        Raises:
          RunError: when the disk is full or closed to us. Earlier stages and checkpoints are as they were.
        """
        # By an exception: nothing that stands between this stage and the end of the block may run either.
        if self._reached:
            raise _Reached
        folder = self.folder / "stages" / name

        def read_mark() -> dict[str, Any] | None:
            # Not only when the run is opened: a study links finished stages of one run into another that is open.
            return read_json(folder / MARK) if (folder / MARK).exists() else None

        facts = processes.once(read_mark, f"look whether {name} is done")
        if facts is None:
            self._make(name, make, folder)
            # Read back like the product, so that they are in every process and every try what JSON made of them.
            facts = processes.once(read_mark, f"finish {name}")
        self.facts[name] = facts
        self._reached = name == self._last
        return Product(lambda: load(folder), name, facts)

    @contextlib.contextmanager
    def stop_after(self, stage: str) -> Iterator[None]:
        """Leaves the block at the stage that would follow ``stage``; an empty name lets it run to its end.

        Raises:
          RunError: when the block ends and never came to that stage.
        """
        self._last = stage
        with contextlib.suppress(_Reached):
            yield
        reached, self._last, self._reached = self._reached, "", False
        if stage and not reached:
            raise RunError(f"{self.folder}: with these settings no stage is called {stage!r}, which should be last.")

    def _make(self, name: str, make: Callable[[pathlib.Path], Mapping[str, Any]], folder: pathlib.Path) -> None:
        with _explained(folder, f"{name} cannot go on"):
            self._keep()
            folder.mkdir(parents=True, exist_ok=True)
            tried = folder / "tried.json"
            # Tries that were interrupted have cost their seconds too.
            before = read_json(tried)["seconds"] if tried.exists() else 0.0
            processes.say(f"== {name}")
            self.before_stage()
            begin, around_s, self._inside_s = time.perf_counter(), self._inside_s, 0.0
            try:
                facts = dict(make(folder))
                seconds = before + time.perf_counter() - begin - self._inside_s
                self._keep()
                # The mark comes last: until it is there the stage counts as not made, whatever lies in its folder.
                write_json(folder / MARK, facts | {"seconds": seconds})
            except BaseException:
                seconds = before + time.perf_counter() - begin - self._inside_s
                with contextlib.suppress(OSError):  # what stopped the stage is worth more than its seconds
                    write_json(tried, {"seconds": seconds})
                raise
            finally:
                self._inside_s = around_s + time.perf_counter() - begin

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Returns what every finished stage consumed: true episodes and simulator steps, frames, seconds.

        With a robot there are ``robot_minutes`` too, from its steps and ``recorded.hz``.
        ``pretrained_frames`` are those that parts from outside were trained on before the run.

        The claim "the learner used no true simulator step" is ``ledger()["grpo-1"]["true_steps"] == 0``.
        """
        # Of stages that another command finished too: a result has cost what all tries together have cost.
        costs: dict[str, dict[str, Any]] = {}
        for name, facts in self.facts.items():
            cost = costs[name] = {count: facts.get(count, 0) for count in COUNTED}
            if robot := self.settings.get("recorded"):  # whose steps are a person's time as well
                cost["robot_minutes"] = round(cost["true_steps"] / robot["hz"] / 60, 3)
            cost["seconds"] = facts["seconds"]
        return costs


@contextlib.contextmanager
def _explained(folder: pathlib.Path, what: str) -> Iterator[None]:
    """A disk that is full or closed to us, in words."""
    try:
        yield
    except OSError as error:
        if not (why := not_written(error, folder)):
            raise
        raise RunError(
            f"{what}: {why} Finished stages and checkpoints are as they were; the same command goes on from them."
        ) from error
