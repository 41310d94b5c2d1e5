"""A batch of pictures on many workers, simulated event by event, and the closed forms that it is held to.

A worker reads the model from a place that all share, then takes micro-batches from the driver, draws them, encodes the
pictures and writes them and one part of the manifest to the storage. The place of the model, the driver and the storage
each serve one request after the other in the order of arrival. Workers fail at random (exponentially), also while they
load; a micro-batch whose part of the manifest is not written is made again from its beginning, by whichever worker is
free. What a dying worker had asked for is still served, and a worker that has nothing to do does not fail.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy

FOREVER = math.inf


@dataclass(frozen=True)
class Cluster:
    """A run and what it runs on. Times in seconds, sizes in bytes."""

    pictures: int
    workers: int
    draw: float
    """What the card takes for a picture."""
    batch: int = 1
    """Pictures of a micro-batch."""
    spread: tuple[float, ...] = (1.0,)
    """How long micro-batches take to draw, relative to the usual one; each is as likely."""
    encode: float = 0.0
    """What a processor core takes to make a picture's file."""
    beside: bool = False
    """Whether files are made and waited for while the next micro-batch is drawn, not after it."""
    size: float = 0.0
    """Of a picture's file."""
    dispatch: float = 0.0
    """What the driver takes for a micro-batch."""
    bandwidth: float = FOREVER
    """Of the storage that is written to, in bytes a second, for all workers together."""
    besides: int = 1
    """Files of a micro-batch that are no pictures: its part of the manifest."""
    puts: float = FOREVER
    """Files that the storage takes in a second."""
    latency: float = 0.0
    """What a worker waits for a file to be stored besides."""
    reading: float = 0.0
    """What the place of the model takes to give it to one worker."""
    load: float = 0.0
    """What a worker takes to begin besides reading the model."""
    mean_life: float = FOREVER
    """Until a worker fails, on average."""
    replace: float = 0.0
    """Until a failed worker's successor begins to read the model."""

    @property
    def tasks(self) -> int:
        """Returns the number of micro-batches."""
        return math.ceil(self.pictures / self.batch)

    def work(self, factor: float = 1.0) -> float:
        """Returns what a worker does at a micro-batch before it asks the storage."""
        drawing, files = self.draw * self.batch * factor, self.encode * self.batch
        return max(drawing, files + self._answers) if self.beside else drawing + files

    @property
    def stored(self) -> float:
        """Returns how long a micro-batch keeps the storage busy: by its bytes or its files, whichever is longer."""
        return max(self.size * self.batch / self.bandwidth, (self.batch + self.besides) / self.puts)

    @property
    def _answers(self) -> float:
        return self.latency * (self.batch + self.besides)

    @property
    def waiting(self) -> float:
        """Returns how long a worker does nothing but wait for the storage's answers at a micro-batch."""
        return 0.0 if self.beside else self._answers

    @property
    def usual(self) -> float:
        """Returns what a worker takes for a micro-batch where nobody is in its way and nothing fails."""
        work = sum(map(self.work, self.spread)) / len(self.spread)
        return self.dispatch + work + self.stored + self.waiting


@dataclass
class Outcome:
    """What a simulated run took. Seconds; those of workers are added up over all of them."""

    seconds: float = 0.0
    made: int = 0
    failures: int = 0
    lost: float = 0.0
    """Spent on micro-batches that had to be made again."""
    loading: float = 0.0
    drawing: float = 0.0
    """Of micro-batches that were kept."""
    driver: float = 0.0
    storage: float = 0.0


@dataclass
class _Worker:
    dies: float = FOREVER
    began: float = 0.0
    factor: float = 1.0
    busy: bool = False


@dataclass
class _Run:
    cluster: Cluster
    chances: Iterator[tuple[float, float]]
    outcome: Outcome = field(default_factory=Outcome)
    events: list = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    model_free: float = 0.0
    driver_free: float = 0.0
    storage_free: float = 0.0
    todo: int = 0
    order: int = 0

    def plan(self, at: float, what: str, number: int, worker: _Worker) -> None:
        """Notes what happens next to a worker: this, or its end if that comes first."""
        if worker.dies < at:
            at, what = worker.dies, "fail"
        self.order += 1
        heapq.heappush(self.events, (at, self.order, what, number))

    def life(self, now: float) -> float:
        """Returns when a worker that is alive now dies."""
        return now + next(self.chances)[0] * self.cluster.mean_life

    def begin(self, now: float, number: int, worker: _Worker) -> None:
        worker.dies, worker.began = self.life(now), now
        self.model_free = max(now, self.model_free) + self.cluster.reading
        self.plan(self.model_free + self.cluster.load, "up", number, worker)

    def up(self, now: float, number: int, worker: _Worker) -> None:
        self.outcome.loading += now - worker.began
        self.take(now, number, worker)

    def take(self, now: float, number: int, worker: _Worker) -> None:
        if not self.todo:
            self.idle.append(number)
            return
        self.todo -= 1
        self.driver_free = max(now, self.driver_free) + self.cluster.dispatch
        self.outcome.driver += self.cluster.dispatch
        worker.began, worker.busy, worker.factor = now, True, next(self.chances)[1]
        self.plan(self.driver_free + self.cluster.work(worker.factor), "write", number, worker)

    def write(self, now: float, number: int, worker: _Worker) -> None:
        self.storage_free = max(now, self.storage_free) + self.cluster.stored
        self.outcome.storage += self.cluster.stored
        self.plan(self.storage_free + self.cluster.waiting, "kept", number, worker)

    def kept(self, now: float, number: int, worker: _Worker) -> None:
        self.outcome.made += 1
        self.outcome.drawing += self.cluster.draw * self.cluster.batch * worker.factor
        worker.busy = False
        self.take(now, number, worker)

    def fail(self, now: float, number: int, worker: _Worker) -> None:
        self.outcome.failures += 1
        if worker.busy:
            self.outcome.lost += now - worker.began
            self.todo, worker.busy = self.todo + 1, False
        else:
            self.outcome.loading += now - worker.began
        worker.dies = FOREVER
        self.plan(now + self.cluster.replace, "begin", number, worker)


def _chances(cluster: Cluster, seed: int) -> Iterator[tuple[float, float]]:
    """Yields how long a worker lives, relative to the mean, and how long a micro-batch takes, relative to the usual."""
    random = numpy.random.default_rng(seed)
    while True:
        lives, factors = random.exponential(size=4096).tolist(), random.choice(cluster.spread, 4096).tolist()
        yield from zip(lives, factors, strict=True)


def simulate(cluster: Cluster, seed: int = 0) -> Outcome:
    """Returns what a run takes until its last micro-batch is kept; the same seed gives the same run.

    Raises ValueError if there are no workers or no pictures.
    """
    if cluster.workers < 1 or cluster.pictures < 1:
        raise ValueError(f"{cluster.workers} workers and {cluster.pictures} pictures; at least one of each expected")
    run = _Run(cluster, _chances(cluster, seed), todo=cluster.tasks)
    workers = [_Worker() for _ in range(cluster.workers)]
    for number, worker in enumerate(workers):
        run.plan(0.0, "begin", number, worker)
    now = 0.0
    while run.outcome.made < cluster.tasks:
        now, _, what, number = heapq.heappop(run.events)
        getattr(run, what)(now, number, workers[number])
        while run.todo and run.idle:
            again = run.idle.pop()
            workers[again].dies = run.life(now)
            run.take(now, again, workers[again])
    run.outcome.seconds = now
    return run.outcome


def expected_attempts(work: float, mean_life: float, replace: float) -> float:
    """Returns what a piece of work takes on average if it begins anew after each failure.

    Failures come at random, `mean_life` apart on average; each costs `replace` more. All in seconds.
    """
    return work if mean_life == FOREVER else math.expm1(work / mean_life) * (mean_life + replace)


def rates(cluster: Cluster) -> dict[str, float]:
    """Returns micro-batches a second that one worker, the driver and the storage could do, were each alone."""
    revived = cluster.replace + cluster.load + cluster.reading
    seconds = {
        "worker": expected_attempts(cluster.usual, cluster.mean_life, revived),
        "driver": cluster.dispatch,
        "storage": cluster.stored,
    }
    return {name: 1 / each if each else FOREVER for name, each in seconds.items()}


def expected(cluster: Cluster) -> float:
    """Returns the seconds of a run in closed form.

    That is what workers take that begin one after the other as they have read the model, or what driver or storage
    take, whichever is more. The idle ends of a run, and queues that fill and empty, are not in it.
    """
    each = rates(cluster)
    ready = cluster.load + cluster.reading * numpy.arange(1, cluster.workers + 1)
    among = (cluster.tasks / each["worker"] + numpy.cumsum(ready)) / numpy.arange(1, cluster.workers + 1)
    return max(float(among.min()), float(ready[0]) + cluster.tasks / min(each["driver"], each["storage"]))


def most_workers(cluster: Cluster) -> dict[str, float]:
    """Returns with how many workers the driver and the storage have no time left; more add nothing."""
    each = rates(cluster)
    return {name: each[name] / each["worker"] for name in ("driver", "storage")}
