"""The run of a profile's samples: those on disk are read, the others measured and written one by one, shared by processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.manifest import Manifest
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import read_sample, write_sample
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.progress import Progress
from moacompress.core.ranks import rank, work_shard, world_size
from moacompress.models.processes import broadcast, gathered, shared
from moacompress.models.source import SourceModel
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule_table import RuleTable

logger = logging.getLogger(__name__)

MAX_SKIPPED = 0.05
"""Share of the samples that may be left out because a number in them is not finite."""


def check_skipped(skipped: Collection[int], samples: Mapping[int, Sample], total: int) -> None:
    """Refuses a profile that too many samples are left out of, by their numbers.

    Where `samples`, those that are here by number, are not all of the profile's `total`, those of a length may be elsewhere.

    Raises:
        DataError: says how many.
    """
    left = {sample.length for index, sample in samples.items() if index not in skipped}
    lost = sorted({sample.length for sample in samples.values()} - left) if len(samples) == total else []
    if len(skipped) > MAX_SKIPPED * total or lost:
        where = f", and none of length {lost[0]:,} is left" if lost else ""
        raise DataError(
            f"{len(skipped)} of {total} samples have activations or gradients that are not finite (at most "
            f"{MAX_SKIPPED:.0%} may){where}; profile with --dtype float32, and check that the model is sound"
        )


@dataclass
class SampleRun:
    """The statistics of a profile's samples, which the first process collects.

    Attributes:
        out: the folder of the profile.
        source: the model.
        manifest: of the profile.
        samples: those that are here, by their number in the profile.
        gates: what rules that select choose by, or None.
        progress: told of every sample.
        finished: statistics and seconds of the samples that are done, by number; in the first process alone.
        skipped: numbers of those that have a number that is not finite.
    """

    out: Path
    source: SourceModel
    manifest: Manifest
    samples: Mapping[int, Sample]
    gates: GateWeights | None
    progress: Progress
    finished: dict[int, tuple[Statistics, float]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    @cached_property
    def _table(self) -> RuleTable:
        return RuleTable.of(self.manifest.rules, self.manifest.recipe.profile.min_window)

    def run(self) -> tuple[list[Statistics], Manifest]:
        """Returns the statistics of every sample, in the first process, and the manifest with what was skipped.

        Raises:
            DataError: too many samples are skipped.
            ArtefactError: a sample's file cannot be written, or is gone from the machine of the process that ran it.
        """
        self.progress.start("profiling", len(self.samples))
        for index in self.samples if not rank() else ():
            found = self._read(index)
            if found is not None:
                self.finished[index] = found
                self._count(index, found[0].not_finite())
        missing: list[int] = broadcast([index for index in self.samples if index not in self.finished])
        # where machines share no disk, a sample that was finished before is on that of the process that ran it
        holders: dict[int, int] = gathered(
            {index: rank() for index in missing if rank() and self._read(index) is not None}
        )
        left = [index for index in missing if index not in holders]
        if world_size() > 1:
            left.sort(key=lambda index: -len(self.samples[index].input_ids))

        def ran(index: int, result: tuple[int, str]) -> None:
            holders[index], not_finite = result
            self._count(index, not_finite)

        shared(left, self._measure, ran)
        self._collect(missing, holders, left)
        self.progress.done()
        numbers = sorted(self.finished)
        seconds = sum(self.finished[index][1] for index in numbers)
        manifest = replace(self.manifest, skipped=tuple(sorted(self.skipped)), seconds=round(seconds, 3))
        return [self.finished[index][0] for index in numbers], manifest

    def _read(self, index: int) -> tuple[Statistics, float] | None:
        return read_sample(self.out, index, self.manifest.owner, self.manifest.array_shapes)

    def _count(self, index: int, not_finite: str) -> None:
        """Counts a sample that is done, with the first of its statistics that is not finite, if one is."""
        self.progress.step(f"{self.samples[index].length} tokens")
        if not_finite:
            self.skipped.append(index)
            logger.warning(
                "sample %d (%s) is left out: %s is not finite", index, self.samples[index].source, not_finite
            )
            shard = self.manifest.shard
            check_skipped(self.skipped, self.samples, len(self.samples) if shard is None else shard.totals[0])

    def _measure(self, index: int) -> tuple[int, str]:
        """Runs a sample; returns the rank that has its statistics, and what in them is not finite."""
        begin, recipe = time.perf_counter(), self.manifest.recipe
        statistics = sample_statistics(
            self.source.model,
            self.source.shape,
            self._table,
            self.samples[index],
            recipe.profile,
            recipe.seed,
            index,
            self.gates,
            self.manifest.centres,
        )
        seconds = time.perf_counter() - begin
        if work_shard()[0] == rank():
            write_sample(self.out, index, statistics, self.manifest.owner, seconds)
        if not rank():
            self.finished[index] = statistics, seconds
        return rank(), statistics.not_finite()

    def _collect(self, missing: list[int], holders: Mapping[int, int], left: list[int]) -> None:
        """Gets what other processes have to the first one, from its disk or else from the process that has it."""
        for index in missing if not rank() else ():
            found = self.finished.get(index) or self._read(index)
            if found is not None:
                self.finished[index] = found
        for index in broadcast([index for index in missing if index not in self.finished]):
            found = broadcast(self._read(index) if rank() == holders[index] else None, of=holders[index])
            if found is None:
                raise ArtefactError(
                    f"rank {holders[index]} ran sample {index}, and its file is gone; start the same run again"
                )
            if not rank():
                self.finished[index] = found
                write_sample(self.out, index, found[0], self.manifest.owner, found[1])
                if index not in left:
                    self._count(index, found[0].not_finite())
