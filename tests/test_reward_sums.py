"""`reward.function`: its forms, and weighted sums of rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts import group_of
from tests.workspace import settings_of
from tic_megatron.config import RewardSettings, RewardTerm, SettingsError
from tic_megatron.rewards import GradeReport, RewardWorkers, is_dense, read_terms
from tic_megatron.rewards.background import BackgroundGrader

STYLE = """
def concise(response):
    return -len(response) / 10

def length(response, answer):
    if response == "raise":
        raise ValueError("too odd")
    return "long" if response == "text" else float(len(response))

def per_token(tokens):
    return [float(len(token)) for token in tokens]
"""


@pytest.fixture
def style(tmp_path: Path) -> Path:
    path = tmp_path / "style.py"
    path.write_text(STYLE)
    return path


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("math", [(1.0, "math")]),
        ("0.9*math + 0.1*rewards.py:concise", [(0.9, "math"), (0.1, "rewards.py:concise")]),
        (" -2 * math  +  1e-3*exact", [(-2.0, "math"), (1e-3, "exact")]),
        ("0*math + exact", [(0.0, "math"), (1.0, "exact")]),
        ("https://host:8/a*b?c=d+e", [(1.0, "https://host:8/a*b?c=d+e")]),
        ("0.5*http://host/p + a+b.py:f", [(0.5, "http://host/p"), (1.0, "a+b.py:f")]),
        ("/a/b.c/my rewards.py:f", [(1.0, "/a/b.c/my rewards.py:f")]),
    ],
)
def test_what_a_sum_says(text: str, terms: list[tuple[float, str]]) -> None:
    assert RewardSettings(function=text).terms == [RewardTerm(*term) for term in terms]
    again = " + ".join(map(str, RewardSettings(function=text).terms))
    assert RewardSettings(function=again).terms == [RewardTerm(*term) for term in terms]


def test_means_do_not_depend_on_which_were_graded_together() -> None:
    rewards = [0.1, 0.2, 0.3, 1e16, -1e16, 0.7, 0.1]
    whole = GradeReport(graded=7, terms={"math": rewards})
    parts = GradeReport()
    for part in (rewards[4:], rewards[:3], rewards[3:4]):
        parts.add(GradeReport(graded=len(part), terms={"math": part}))
    assert parts.metrics() == whole.metrics() and whole.metrics()["reward/math_mean"] == pytest.approx(0.2)


def test_kinds_of_terms() -> None:
    assert RewardTerm(1.0, "x/rewards.py:f").function == ("x/rewards.py", "f")
    assert (
        RewardTerm(1.0, "http://host/rewards.py:f").function is None and RewardTerm(1.0, "http://host/rewards.py:f").is_endpoint
    )
    assert RewardTerm(1.0, "math").function is None and not RewardTerm(1.0, "math").is_endpoint


def test_files_are_found_from_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of("--reward.function=0.5*math + sub/rewards.py:f").resolve()
    assert settings.reward.function == f"0.5*math + {tmp_path}/sub/rewards.py:f"
    assert settings.resolve().reward.function == settings.reward.function


def test_terms_of_like_names_are_all_graded(tmp_path: Path) -> None:
    """Also where one is called as another would be for being the second of its name."""
    for name, functions in {
        "a": {"judge": 0.25, "judge_2": 0.5, "overlong": 4.0},
        "b": {"judge": 8.0, "overlong_2": 16.0},
    }.items():
        lines = [f"def {function}(response):\n    return {value}\n" for function, value in functions.items()]
        (tmp_path / f"{name}.py").write_text("".join(lines))
    places = ("a.py:judge", "b.py:judge", "a.py:judge_2", "a.py:overlong", "b.py:overlong_2")
    settings = RewardSettings(function=" + ".join(f"{tmp_path}/{place}" for place in places))
    names = [term.name for term in read_terms(settings)]
    assert names == ["judge", "judge_2", "judge_2_2", "overlong_2", "overlong_2_2"]
    with RewardWorkers(settings) as workers:
        group = group_of(0, "", ["x"])
        assert workers.grade_groups([group]).faults == []
    assert group.trajectories[0].reward == 28.75


def test_a_sum_is_the_weighted_sum(style: Path, tmp_path: Path) -> None:
    """Against its terms alone; a term may be there twice, and a weight of 0 only measures."""
    function = f"2*math + -0.5*exact + 0.25*{style}:concise + 0*{style}:length + exact"
    groups = [group_of(n, "7", ["7", r"\boxed{7}", "8", "seven"]) for n in range(3)]
    with RewardWorkers(RewardSettings(function=function, timeout_s=60), tmp_path / "rewards.log") as rewards:
        grader = BackgroundGrader(rewards)
        for group in groups:
            grader.add([group])
        report = grader.finish()
    expected = [2 - 0.5 + 1 - 0.25 * 0.1, 2 - 0.25 * 0.9, -0.25 * 0.1, -0.25 * 0.5]
    for group in groups:
        assert [t.reward for t in group.trajectories] == pytest.approx(expected)
    assert report.metrics() == pytest.approx(
        {
            **{"reward/timed_out": 0, "reward/failed": 0, "reward/invalid": 0},
            **{"reward/math_mean": 0.5, "reward/exact_mean": 0.25, "reward/exact_2_mean": 0.25},
            **{"reward/concise_mean": -(1 + 9 + 1 + 5) / 40, "reward/length_mean": (1 + 9 + 1 + 5) / 4},
        }
    )


def test_a_fault_in_one_term_costs_the_response(style: Path) -> None:
    function = f"exact + 0.5*{style}:length"
    with RewardWorkers(RewardSettings(function=function, timeout_s=60)) as rewards:
        group = group_of(0, "text", ["abcd", "raise", "text", "ab"])
        report = rewards.grade_groups([group])
    assert [t.reward for t in group.trajectories] == [2.0, 0.0, 0.0, 1.0]
    assert (report.failed, report.invalid, report.timed_out, report.graded) == (1, 1, 0, 4)
    assert report.faults == [
        "prompt p:0, response 1: length: grading failed: ValueError: too odd; it counts 0",
        "prompt p:0, response 2: length: the reward is 'long' (str), not a finite number; it counts 0",
    ]
    assert report.metrics()["reward/length_mean"] == 6 / 4 and report.metrics()["reward/exact_mean"] == 1 / 4


def test_one_term_alone_has_no_mean_of_its_own(style: Path) -> None:
    with RewardWorkers(RewardSettings(function="3*exact")) as rewards:
        assert rewards.grade([("7", "7"), ("8", "7")])[0] == [3.0, 0.0]
        assert rewards.grade([("7", "7")])[1].metrics().keys() == {"reward/timed_out", "reward/failed", "reward/invalid"}


def test_dense_rewards_stand_alone(style: Path) -> None:
    assert is_dense(RewardSettings(function="exact_dense")) and is_dense(RewardSettings(function=f"{style}:per_token"))
    assert not is_dense(RewardSettings(function=f"exact + {style}:concise"))
    for function in (f"exact + {style}:per_token", "0.5*exact_dense + 0.5*exact_dense"):
        with pytest.raises(SettingsError, match=r"reward.function: \w+ gives a reward per token, .*give it alone"):
            read_terms(RewardSettings(function=function))
    group = group_of(0, "", ["ab"])
    text = {5: "a", 6: "bcd"}
    with RewardWorkers(RewardSettings(function=f"-0.5*{style}:per_token"), token_text=text.__getitem__) as rewards:
        rewards.grade_groups([group])
    assert group.trajectories[0].token_rewards == [-0.5, -1.5] and group.trajectories[0].reward == -2.0
