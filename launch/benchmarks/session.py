"""One sitting of measurements: what came out is on the disk after every part, and what fails is written down too."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from launch.benchmarks import rendering
from launch.benchmarks.components import Maker
from launch.benchmarks.timing import Bench, Compiled, Part, lower, measure_matrix, repeat, spread
from wovr_jax.core import config
from wovr_jax.core.disk import replace_file, write_json
from wovr_jax.core.machine import device_name, versions
from wovr_jax.run.recipe import Recipe

SCHEMA = "wovr_jax benchmark 1"
Wanted = tuple[str, int | None]
"""Name and batch of a part; None where the settings give the size."""


class Session:
    """Measures parts and pairs, prints a line for each and keeps the file.

    Attributes:
      results: what is in the file.

    Args:
      settings: of the config file.
      out: folder of the results.
      title: of the command, in the file and above the table.
      file: stem of the files.
      repeats, seconds: see ``timing.repeat``.
      frozen: see ``components.Maker``.
      threads: programs that are compiled at once.
      deadline: seconds from now after which no further part is begun; None for no end.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        out: pathlib.Path,
        *,
        title: str,
        file: str = "parts",
        repeats: int = 5,
        seconds: float = 20.0,
        frozen: str = "compute",
        threads: int = 1,
        deadline: float | None = None,
    ):
        self.settings, self.out, self.file = settings, out, file
        self.repeats, self.seconds, self.frozen, self.threads = repeats, seconds, frozen, threads
        self.store: dict[Any, Any] = {}
        self.began, self.deadline = time.perf_counter(), deadline
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "title": title,
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device_name(),
            "versions": versions(),
            # Other work on the machine: figures of a busy one are worth no more than their ratios.
            "load": os.getloadavg()[0],
            # A program that is found there is read in no time, and its compile time says nothing.
            "compile_cache": bool(jax.config.jax_compilation_cache_dir),  # pyright: ignore[reportAttributeAccessIssue]
            "frozen_weights": frozen,
            "matrix": {},
            "parts": [],
            "pairs": [],
            "notes": [],
        }

    def maker(self, changes: dict[str, Any] | None = None) -> Maker:
        """Returns the parts of these settings with ``changes`` by dotted path.

        The change ``weights`` is no setting of a run: "compute" or "float32" for what is frozen.

        Raises:
          ConfigError: settings that do not fit.
        """
        changes = dict(changes or {})
        frozen = changes.pop("weights", self.frozen)
        settings: Any = config.to_dict(self.settings)
        for path, value in changes.items():
            *groups, name = path.split(".")
            group = settings
            for part in groups:
                group = group.setdefault(part, {})
            group[name] = value
        return Maker(config.from_dict(Recipe, settings), self.store, frozen)

    def measure_matrix(self, sizes: Sequence[int] | None = None) -> None:
        """Measures what the device's matrix products reach, in both dtypes that networks here compute in."""
        for dtype in ("bfloat16", "float32"):
            try:
                self.results["matrix"][dtype] = found = measure_matrix(dtype, sizes)
                print(f"matrix products, {dtype}: {found['rate'] / 1e12:.4g} TFLOP/s at {found['size']}", flush=True)
            except Exception as error:  # whatever the backend raises
                self.note(f"matrix products, {dtype}: {first_line(error)}")
        self.save()

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return float("inf") if self.deadline is None else self.deadline - (time.perf_counter() - self.began)

    def measure(self, maker: Maker, wanted: Sequence[Wanted]) -> None:
        """Measures parts one after the other; one that fails is written down with the reason, and the rest goes on."""
        for (name, batch), make in zip(wanted, self._prepare([(maker, *one) for one in wanted]), strict=True):
            row: dict[str, Any] = {"part": name, "batch": batch}
            try:
                bench = Bench(*make())
                row |= self._describe(bench, repeat([bench], self.repeats, self.seconds)[0])
            except Exception as error:  # out of memory, an operation that the device lacks: whatever the backend raises
                row["error"] = first_line(error)
            self.results["parts"].append(row)
            print(rendering.part_line(row), flush=True)
            self.save()

    def compare(self, setting: str, values: tuple[Any, Any], wanted: Sequence[Wanted]) -> None:
        """Measures parts with two values of a setting in turn; the ratio is the second's time by the first's.

        Raises:
          ConfigError: a value that the setting does not take.
        """
        makers = [self.maker({setting: value}) for value in values]
        prepared = self._prepare([(maker, *one) for one in wanted for maker in makers])
        for (name, batch), makes in zip(wanted, zip(prepared[::2], prepared[1::2], strict=True), strict=True):
            row: dict[str, Any] = {"setting": setting, "values": list(values), "part": name, "batch": batch}
            try:
                benches = [Bench(*make()) for make in makes]
                times = repeat(benches, self.repeats, self.seconds)
                pairs = [b / a for a, b in zip(*times, strict=True)]
                rows = [self._describe(bench, own) for bench, own in zip(benches, times, strict=True)]
                row |= {"seconds": times, "ratio": spread(pairs), "rows": rows}
            except Exception as error:
                row["error"] = first_line(error)
            self.results["pairs"].append(row)
            print(rendering.pair_line(row), flush=True)
            self.save()

    def note(self, text: str) -> None:
        """Prints a line that belongs to the results and keeps it."""
        self.results["notes"].append(text)
        print(text, flush=True)
        self.save()

    def save(self) -> None:
        """Writes the results as JSON, Markdown and a picture, each whole or not at all."""
        self.results["seconds"] = round(time.perf_counter() - self.began, 1)
        write_json(self.out / f"{self.file}.json", self.results)
        for suffix, text in (("md", rendering.markdown(self.results)), ("html", rendering.page(self.results))):
            with replace_file(self.out / f"{self.file}.{suffix}") as fresh:
                fresh.write_text(text, encoding="utf-8")

    def forget(self) -> None:
        """Lets go of the weights, before a part that needs the memory."""
        self.store.clear()

    def _prepare(self, wanted: Sequence[tuple[Maker, str, int | None]]) -> list[Callable[[], tuple[Part, Compiled]]]:
        """Returns for each part a function that gives it compiled, or raises what went wrong on the way.

        With several threads all of them are compiled before the first is measured: a compiler that tries kernels on the
        device would disturb what is timed there. With one, each is made when it is asked for, and gone afterwards.
        """

        def make(maker: Maker, name: str, batch: int | None) -> tuple[Part, Callable[[], Compiled]]:
            if self.left <= 0:
                raise TimeoutError("no time was left")
            part = maker.make(name, batch)
            return part, lower(part)

        def make_now(maker: Maker, name: str, batch: int | None) -> tuple[Part, Compiled]:
            part, compile_now = make(maker, name, batch)
            return part, compile_now()

        if self.threads == 1:
            return [functools.partial(make_now, *one) for one in wanted]
        ready: list[Callable[[], tuple[Part, Compiled]]] = []
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            for one in wanted:
                try:
                    part, compile_now = make(*one)
                    ready.append(functools.partial(_join, part, pool.submit(compile_now)))
                except Exception as error:  # told where the part's turn comes
                    ready.append(functools.partial(_fail, error))
        return ready

    def _describe(self, bench: Bench, times: Sequence[float]) -> dict[str, Any]:
        """Returns what the tables show of measured times."""
        part, compiled = bench.part, bench.compiled
        own = {field.name: getattr(compiled, field.name) for field in dataclasses.fields(compiled)}
        del own["executable"]
        seconds = spread(times)
        rate = compiled.flops / seconds["median"]
        peak = self.results["matrix"].get(part.dtype, {}).get("rate")
        return own | {
            "dtype": part.dtype,
            "seconds": seconds,
            "repeats": len(times),
            "calls": bench.calls,
            "rate": rate,
            # Not the compiler's count, which has the body of a loop once: blocks and Euler steps are loops.
            "rate_from": "trace",
            "share": rate / peak if peak else None,
            "bytes": bench.peak or compiled.bytes,
            "bytes_from": "device" if bench.peak else "compiler",
            "frames": part.frames,
            "frames_per_second": part.frames / seconds["median"] if part.frames else None,
        }


def _join(part: Part, compiled: concurrent.futures.Future[Compiled]) -> tuple[Part, Compiled]:
    return part, compiled.result()


def _fail(error: Exception) -> NoReturn:
    raise error


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
