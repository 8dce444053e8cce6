"""Which step goes where, on machines of a virtual clock: how close to the best schedule, and what is lost when
machines are."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.virtual import VirtualMachines
from workbench.cluster.node import Told
from workbench.cluster.run import Driver, chosen, run
from workbench.cluster.schedule import Place, Schedule, Step
from workbench.cluster.steps import Wanted
from workbench.errors import UserError
from workbench.recipe.load import load

JOBS, MACHINES = 2000, 16


def places(count: int, kind: str = "desk", gpus: int = 0) -> list[Place]:
    return [Place(f"{kind}{number}", kind, gpus, name=f"{kind}-{number}") for number in range(count)]


def jobs(count: int = JOBS, seed: int = 0) -> tuple[list[Step], dict[str, float]]:
    """Steps as a night has them: most take minutes, some an hour, and what is expected of each is off by a fifth."""
    chance = random.Random(seed)
    seconds = {f"job {number}": chance.lognormvariate(5.0, 1.0) for number in range(count)}
    return [Step(name, cost=took * chance.uniform(0.8, 1.2)) for name, took in seconds.items()], seconds


def seen_through(machines: VirtualMachines, steps: list[Step]) -> tuple[Driver, Counter[str], dict[str, str]]:
    """The driver at its end, how often each step was answered, and what was lost for good."""
    answers: Counter[str] = Counter()
    lost: dict[str, str] = {}
    driver = Driver(steps, machines, Told(), machines.clock)

    def answered(name: str, text: str, place: Place) -> None:
        answers[name] += 1

    driver.run(machines.places, lambda name: "", answered, lost.__setitem__)
    return driver, answers, lost


@pytest.mark.parametrize("seed", range(3))
def test_two_thousand_jobs_on_sixteen_machines_take_hardly_longer_than_the_best_schedule(seed: int) -> None:
    steps, seconds = jobs(seed=seed)
    machines = VirtualMachines(places(MACHINES), seconds)
    _, answers, lost = seen_through(machines, steps)
    # No schedule is shorter than all of the work on all machines, or than its longest step.
    best = max(sum(seconds.values()) / MACHINES, max(seconds.values()))
    assert set(answers.values()) == {1} and len(answers) == JOBS and not lost
    assert machines.now / best < 1.02


def test_the_drivers_memory_does_not_grow_with_what_was_done() -> None:
    steps, seconds = jobs()
    machines = VirtualMachines(places(MACHINES), seconds)
    used: list[int] = []
    driver = Driver(steps, machines, Told(), machines.clock)

    def answered(name: str, text: str, place: Place) -> None:
        if driver.schedule.left in (JOBS * 3 // 4, JOBS // 4):
            own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/workbench/cluster/*")])
            used.append(sum(trace.size for trace in own.traces))

    tracemalloc.start()
    driver.run(machines.places, lambda name: "", answered, lambda name, why: None)
    tracemalloc.stop()
    early, late = used
    # A thousand jobs later: which of them ended, and nothing of what they said.
    assert late - early < 128 * JOBS // 2


def test_a_machine_that_dies_loses_nothing_and_nothing_is_done_twice() -> None:
    steps, seconds = jobs(200)
    machines = VirtualMachines(places(4), seconds)
    machines.at(1000.0, lambda: machines.leave("desk1"))
    machines.at(2000.0, lambda: machines.leave("desk3"))
    driver, answers, lost = seen_through(machines, steps)
    assert len(answers) == 200 and set(answers.values()) == {1} and not lost
    # What ran there, and nothing else, was begun again; at once nothing more went to where it would be lost.
    assert driver.schedule.retries == sum(machines.begun.values()) - 200 == 2


def test_what_kills_every_machine_it_comes_to_is_given_up_and_the_rest_is_done() -> None:
    steps, seconds = jobs(40)
    machines = VirtualMachines(places(4), seconds)
    machines.poison = {"job 7"}
    driver, answers, lost = seen_through(machines, steps)
    assert lost == {"job 7": "killed (3 tries)"} and machines.begun["job 7"] == 3
    assert set(answers) == set(seconds) - {"job 7"}


def test_without_any_machine_of_a_kind_its_steps_are_given_up_and_said_so() -> None:
    steps = [Step("here", kind="desk"), Step("there", kind="h100"), Step("after", frozenset({"there"}), kind="desk")]
    machines = VirtualMachines(places(1), dict.fromkeys(("here", "there", "after"), 1.0))
    _, answers, lost = seen_through(machines, steps)
    assert lost == {"there": "no machine of kind h100 is left for it"} and set(answers) == {"here", "after"}


def test_what_takes_too_long_is_ended_and_tried_again() -> None:
    steps = [Step("quick"), Step("hangs")]
    machines = VirtualMachines(places(2), {"quick": 5.0, "hangs": 1e9})
    lost: dict[str, str] = {}
    driver = Driver(steps, machines, Told(), machines.clock)
    for moment in range(0, 400, 10):
        machines.at(float(moment), lambda: None)
    driver.run(
        machines.places,
        lambda name: "",
        lambda name, text, place: None,
        lost.__setitem__,
        limit_s=lambda name: 100.0,
    )
    assert list(lost) == ["hangs"] and machines.begun["hangs"] == 3 and machines.now < 400


def test_a_gpu_is_one_steps_alone_and_the_others_work_beside_it() -> None:
    steps = [Step(f"job {number}", gpus=2 if number == 3 else 1) for number in range(20)]
    machines = VirtualMachines(places(1, gpus=4), {step.name: 10.0 for step in steps})
    seen_through(machines, steps)
    assert machines.most_at_once["desk0"] == 4
    # 21 GPUs' worth of 10 s on four.
    assert machines.now == 60.0


def test_a_machine_without_gpus_does_one_step_at_a_time() -> None:
    steps = [Step(f"job {number}") for number in range(5)]
    machines = VirtualMachines(places(2), {step.name: 10.0 for step in steps})
    seen_through(machines, steps)
    assert set(machines.most_at_once.values()) == {1} and machines.now == 30.0


def test_what_others_wait_for_goes_first() -> None:
    schedule = Schedule([Step("job"), Step("tokens", cost=1e9), Step("late", frozenset({"tokens"}), cost=5.0)])
    schedule.join(places(1))
    assert [step.name for step, _ in schedule.begin()] == ["tokens"]
    schedule.ended("tokens")
    assert [step.name for step, _ in schedule.begin()] == ["late"]


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.yaml").write_text("base: {path: x}\nvariants: [{gguf: Q8_0}]\n")
    recipes = [load(tmp_path / name / "r.yaml") for name in "ab"]
    with pytest.raises(UserError, match="two recipes are called r: give each a `name` of its own"):
        run(recipes, Wanted(), VirtualMachines(places(1), {}), str(tmp_path), Told())
    with pytest.raises(UserError, match="several machines: name the store they share"):
        run(recipes[:1], Wanted(), VirtualMachines(places(2), {}), str(tmp_path), Told())


def test_machines_are_chosen_by_kind_and_label() -> None:
    here = [
        *places(2),
        Place("a", "8x-h100", 8, labels={"ray.io/accelerator-type": "H100"}),
        Place("b", "4x-l40s", 4, labels={"ray.io/accelerator-type": "L40S", "room": "b"}),
    ]
    assert [place.id for place in chosen(here, [])] == ["desk0", "desk1"]
    assert [place.id for place in chosen(here, ["h100", "l40s"])] == ["a", "b"]
    assert [place.id for place in chosen(here, ["room=b", "DESK"])] == ["b", "desk0", "desk1"]
    with pytest.raises(UserError, match=r"--machines a100: no machine of that kind or label. There are: .*h100"):
        chosen(here, ["a100"])
    with pytest.raises(UserError, match="no machine of the cluster answers"):
        chosen([], [])
