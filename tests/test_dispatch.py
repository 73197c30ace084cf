"""Every prompt is answered once, or set aside; who gets it, and when the tail is cut: without engines."""

from __future__ import annotations

import collections
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tic_megatron.remote import WorkerError
from tic_megatron.rollout.dispatch import Ledger
from tic_megatron.rollout.generation import MOST_FAILURES, Dispatch, Generation
from tic_megatron.rollout.pool import Engine
from tic_megatron.rollout.requests import Sample, SampleRequest, SampleResponse, problem_of


def test_every_prompt_is_answered_once_whatever_fails():
    """A random history of takes, answers, refusals and losses, against a count of what came of every prompt."""
    for seed in range(200):
        draw = random.Random(seed)
        n, engines = draw.randint(1, 12), range(draw.randint(1, 3))
        dealt = {e: list(range(n))[e :: len(engines)] for e in engines} if draw.random() < 0.3 else None
        ledger = Ledger([] if dealt else range(n), dealt)
        held: dict[int, set[int]] = {e: set() for e in engines}
        answers = collections.Counter()
        for _ in range(10_000):
            if not ledger.open:
                break
            engine = draw.choice(engines)
            taken = ledger.take(engine, draw.choice([1, 2, None]))
            assert not any(prompt in others for prompt in taken for others in held.values())
            held[engine] |= set(taken)
            assert ledger.in_flight(engine) == len(held[engine])
            event = draw.random()
            if event < 0.15:
                again = ledger.lose(engine)
                assert set(again) == held[engine] - set(ledger.set_aside)
                held[engine] = set()
            elif held[engine]:
                prompt = draw.choice(sorted(held[engine]))
                held[engine].remove(prompt)
                if event < 0.2:
                    ledger.refuse(engine, prompt, "too long")
                else:
                    ledger.finish(engine, prompt)
                    answers[prompt] += 1
        assert not ledger.open and not any(held.values())
        assert set(answers) | set(ledger.set_aside) == set(range(n))
        assert not set(answers) & set(ledger.set_aside) and set(answers.values()) <= {1}


def test_the_innocent_are_kept_and_the_culprit_is_set_aside():
    ledger = Ledger(range(6))
    for _ in range(2):
        assert ledger.take(0, 3) == [0, 1, 2]  # first in line again
        assert ledger.lose(0, "died") == [0, 1, 2]
    assert ledger.take(1, None) == [3, 4, 5]
    assert ledger.take(0, None) == [2]  # alone from now on
    assert ledger.take(0, None) == []
    ledger.finish(0, 2)
    assert ledger.take(1, None) == []  # it still has others
    (suspect,) = ledger.take(0, None)
    assert ledger.lose(0, "died") == [] and ledger.set_aside == {suspect: "died"}
    for prompt in (3, 4, 5):
        ledger.finish(1, prompt)
    (last,) = ledger.take(1, None)
    assert {suspect, last} == {0, 1}
    ledger.finish(1, last)
    assert not ledger.open


def test_a_prompt_that_fails_alone_twice_in_a_row_is_set_aside():
    ledger = Ledger([7])
    ledger.take(0, None)
    assert ledger.lose(0) == [7]
    ledger.take(1, None)
    assert ledger.lose(1, "hung") == [] and ledger.set_aside == {7: "hung"} and not ledger.open


def test_dealt_prompts_of_a_lost_engine_go_to_the_others():
    ledger = Ledger([], {0: [0, 2], 1: [1, 3]})
    assert ledger.take(0, None) == [0, 2]
    ledger.lose(1)  # before it had begun
    assert sorted(ledger.take(0, None)) == [1, 3]


def test_rubbish_is_told_from_answers():
    def problem(*samples, version=3):
        request = SampleRequest((1, 2), 2, 1.0, 1.0, 4, 0)
        return problem_of(SampleResponse(list(samples), version), request, vocabulary=100, weight_version=3)

    good = Sample([0, 99, 5, 7], [-0.5, -1.0, 0.0, float("nan")], truncated=True)  # NaN is for the trainer to judge
    assert problem(good, good) is None
    assert problem(good, good, version=2) == "a response was made by weights of version 2, not 3"
    assert problem(good) == "1 responses came back instead of 2"
    for ids, logprobs, reason in (
        ([], [], "a response has 0 tokens, not 1 to 4"),
        ([1] * 5, [-0.5] * 5, "a response has 5 tokens, not 1 to 4"),
        ([1, 2], [-0.5], "a response has 2 tokens and 1 log-probs"),
        ([1, 100], [-0.5] * 2, "a response has a token outside of the vocabulary of 100"),
        ([-1, 1], [-0.5] * 2, "a response has a token outside of the vocabulary of 100"),
    ):
        assert problem(good, Sample(ids, logprobs, truncated=False)) == reason


def generation(*, prompts, n, engines, concurrent, cut_tail_fraction=None):
    """A rollout that has not begun, and its engines, which do nothing."""
    places = [Engine(index, f"engine_{index}.log") for index in range(engines)]
    pool: Any = SimpleNamespace(engines=places, fail=lambda *failure: None)
    return Generation(
        pool,
        [SampleRequest((number,), n, 1.0, 1.0, 16, number) for number in range(prompts)],
        Dispatch(concurrent, False, cut_tail_fraction, heartbeat_s=60.0, vocabulary=100),
        order=list(range(prompts)),
        answered=lambda number, response: None,
        serving=lambda: places,
        revive=lambda: None,
    ), places


def test_few_prompts_are_spread_over_all_engines():
    """Though one engine could take them all. Longest first, so each begins with a long one."""
    work, engines = generation(prompts=7, n=4, engines=3, concurrent=256)
    assert work._deal(engines) == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}
    assert work._deal(engines) == {0: [], 1: [], 2: []}


def test_an_engine_gets_one_prompt_more_than_it_has_room_for():
    work, engines = generation(prompts=20, n=4, engines=2, concurrent=8)
    assert work._deal(engines) == {0: [0, 2, 4], 1: [1, 3, 5]}
    work._lines[0].left, work._lines[1].left = 12, 7  # the first is still full, the other has room for one
    assert work._deal(engines) == {0: [], 1: [6, 7]}


def test_the_tail_is_not_cut_before_all_responses_have_begun():
    """One engine is given everything at once, and begins with what it has room for: the others would be of a single token."""
    work, engines = generation(prompts=20, n=4, engines=1, concurrent=8, cut_tail_fraction=0.5)
    assert work._deal(engines) == {0: list(range(20))}
    due = {left: setattr(work._lines[0], "left", left) or work._cut_is_due() for left in (80, 40, 9, 8, 1)}
    assert due == {80: False, 40: False, 9: False, 8: True, 1: True}


def test_prompts_that_are_issued_again_are_not_cut():
    """They begin when most of the others have ended: as the tail, they would be cut at their first tokens."""
    work, engines = generation(prompts=20, n=4, engines=2, concurrent=64, cut_tail_fraction=0.9)
    work._deal(engines)
    for number in range(1, 20):
        work._ledger.finish(number % 2, number)
    work._lines[0].left = 4
    assert work._cut_is_due()
    work._lose(engines[0], "died")
    assert work._deal(engines[1:]) == {1: [0]}
    work._lines[1].left = 4
    assert not work._cut_is_due()


def test_an_engine_that_fails_whatever_it_is_asked_ends_the_run():
    """Instead of setting the step's prompts aside one by one, each at the price of an engine's start."""
    work, engines = generation(prompts=40, n=1, engines=1, concurrent=8)
    with pytest.raises(WorkerError, match=r"engine 0 failed in generation: died .*engine_0\.log.*8 failures") as error:
        for _ in range(MOST_FAILURES):
            work._deal(engines)
            work._lose(engines[0], "died")
    assert error.value.may_pass and len(work._ledger.set_aside) == MOST_FAILURES - 3
