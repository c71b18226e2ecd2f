"""Time that only moves when every thread sleeps, and engines that take some of it."""

from __future__ import annotations

import heapq
import itertools
import threading

import numpy as np

from ztp_deploy.evidence import clients

IMAGES = np.zeros((2, 3, 4, 4), dtype=np.float32)


class Simulated(clients.Timer):
    """Time that moves on, to whoever sleeps shortest, when every thread sleeps: real threads in simulated seconds."""

    def __init__(self):
        self.moment = 0.0
        self.running = 0
        self.sleeping = []
        self.woken = set()
        self.numbers = itertools.count()
        self.changed = threading.Condition()

    def now(self):
        return self.moment

    def wait(self, stop, seconds):
        self.sleep(seconds)

    def sleep(self, seconds):
        with self.changed:
            ticket = next(self.numbers)
            heapq.heappush(self.sleeping, (self.moment + seconds, ticket))
            self.rest()
            assert self.changed.wait_for(lambda: ticket in self.woken, 20)

    def rest(self, leaving=1):
        """A running thread no longer is; the last one wakes the next sleeper."""
        self.running -= leaving
        if not self.running and self.sleeping:
            self.moment, ticket = heapq.heappop(self.sleeping)
            self.woken.add(ticket)
            self.running += 1
            self.changed.notify_all()

    def thread(self, target):
        self.running += 1

        def whole():
            target()
            with self.changed:
                self.rest()

        return threading.Thread(target=whole, daemon=True)

    def barrier(self, count, action):
        return SimulatedBarrier(self, count, action)


class SimulatedBarrier:
    def __init__(self, timer, count, action):
        self.timer, self.count, self.action = timer, count, action
        self.there = 0
        self.open = self.broken = False

    def wait(self):
        with self.timer.changed:
            if self.broken:
                raise threading.BrokenBarrierError
            self.there += 1
            if self.there == self.count:
                self.action()
                self.open = True
                self.timer.running += self.count - 1
                self.timer.changed.notify_all()
                return
            self.timer.rest()
            assert self.timer.changed.wait_for(lambda: self.open or self.broken, 20)
            if not self.open:
                raise threading.BrokenBarrierError

    def abort(self):
        with self.timer.changed:
            if not self.open and not self.broken:
                self.timer.running += self.there
            self.broken = True
            self.timer.changed.notify_all()


class Engine:
    """Takes so many simulated seconds a run: one number for all, or one a run after the first `untimed`."""

    def __init__(self, timer, seconds, untimed=0, serial=False):
        self.timer = timer
        self.seconds = itertools.chain([0.0] * untimed, [seconds] * 100000 if np.isscalar(seconds) else seconds)
        self.serial = serial
        self.free = 0.0
        self.runs = 0

    def run(self, images):
        assert images is IMAGES
        self.runs += 1
        begin = max(self.timer.now(), self.free) if self.serial else self.timer.now()
        self.free = begin + next(self.seconds)
        self.timer.sleep(self.free - self.timer.now())
