"""Grading while generation goes on."""

from __future__ import annotations

import queue
import threading

from tic_megatron.rewards.workers import GradeReport, RewardWorkers
from tic_megatron.trajectory import Group


class BackgroundGrader:
    """Grades the groups that it is given, in a thread, with the workers that it is lent until `finish` or `abandon`.

    Example:

        grader = BackgroundGrader(rewards)
        grader.add([group])             # as often as there are groups
        report = grader.finish()        # waits; every trajectory has its reward
    """

    def __init__(self, rewards: RewardWorkers) -> None:
        self._rewards = rewards
        self._groups: queue.SimpleQueue[list[Group] | None] = queue.SimpleQueue()
        self._report = GradeReport()
        self._error: BaseException | None = None
        self._abandoned = False
        self._ended = threading.Event()  # not a `join`: see `rollout.source`
        threading.Thread(target=self._work, name="grader", daemon=True).start()

    def add(self, groups: list[Group]) -> None:
        """Grade these next, together."""
        self._groups.put(groups)

    def finish(self) -> GradeReport:
        """Wait for the rewards of all groups. Raises what grading raised."""
        self._groups.put(None)
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._report

    @property
    def finished(self) -> bool:
        """Whether `finish` has been called, and there is a report."""
        return self._ended.is_set() and self._error is None

    def abandon(self) -> None:
        """Nobody wants the rewards any more: end after the groups that are under way."""
        self._abandoned = True
        self._groups.put(None)

    def _work(self) -> None:
        try:
            while not self._abandoned:
                waiting = [self._groups.get()]
                while not self._groups.empty():
                    waiting.append(self._groups.get())
                groups = [group for groups in waiting if groups is not None for group in groups]
                self._report.add(self._rewards.grade_groups(groups))
                if None in waiting:
                    return
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()
