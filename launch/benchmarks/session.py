"""One sitting of measurements: what came out is on the disk after every part, and what fails is written down too."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    ):
        self.settings, self.out, self.file = settings, out, file
        self.repeats, self.seconds, self.frozen, self.threads = repeats, seconds, frozen, threads
        self.store: dict[Any, Any] = {}
        self.began = time.perf_counter()
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

    def measure(self, maker: Maker, wanted: Sequence[Wanted]) -> None:
        """Measures parts one after the other; one that fails is written down with the reason, and the rest goes on."""
        for name, batch, made in self._prepare(maker, wanted):
            row: dict[str, Any] = {"part": name, "batch": batch}
            try:
                part, compiled = made()
                bench = Bench(part, compiled)
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
        for name, batch in wanted:
            row: dict[str, Any] = {"setting": setting, "values": list(values), "part": name, "batch": batch}
            try:
                benches = []
                for maker in makers:
                    part = maker.make(name, batch)
                    benches.append(Bench(part, lower(part)()))
                times = repeat(benches, self.repeats, self.seconds)
                pairs = [b / a for a, b in zip(*times, strict=True)]
                row |= {"seconds": times, "ratio": spread(pairs), "rows": []}
                row["rows"] = [self._describe(bench, own) for bench, own in zip(benches, times, strict=True)]
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

    def _prepare(
        self, maker: Maker, wanted: Sequence[Wanted]
    ) -> Iterator[tuple[str, int | None, Callable[[], tuple[Part, Compiled]]]]:
        """Yields each part with a function that gives it compiled, or raises what went wrong on the way.

        With several threads all of them are compiled before the first is measured: a compiler that tries kernels on the
        device would disturb what is timed there.
        """
        if self.threads == 1:
            for name, batch in wanted:

                def make(name: str = name, batch: int | None = batch) -> tuple[Part, Compiled]:
                    part = maker.make(name, batch)
                    return part, lower(part)()

                yield name, batch, make
            return
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            ready = []
            for name, batch in wanted:
                try:
                    part = maker.make(name, batch)
                    ready.append((part, pool.submit(lower(part))))
                except Exception as error:
                    ready.append((None, error))
            concurrent.futures.wait([future for _, future in ready if isinstance(future, concurrent.futures.Future)])
        for (name, batch), (part, future) in zip(wanted, ready, strict=True):

            def give(part: Any = part, future: Any = future) -> tuple[Part, Compiled]:
                if part is None:
                    raise future
                return part, future.result()

            yield name, batch, give

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
            # Of the trace and not of the compiler, which counts the body of a loop once, and blocks and steps are loops.
            "rate_from": "trace",
            "share": rate / peak if peak else None,
            "bytes": bench.peak or compiled.bytes,
            "bytes_from": "device" if bench.peak else "compiler",
            "frames": part.frames,
            "frames_per_second": part.frames / seconds["median"] if part.frames else None,
        }


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")
