"""Programs drawn by Hypothesis: none raises an alarm, and one that does shrinks to a few steps that one can read."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.sim_order_mutants import ORDER_MUTANTS
from tests.support.sim_program import SimFaultError, run_script, run_seed
from tests.support.sim_script import NUM_STEPS, REST, Choices, Script, Step, random_script, scripts, shortened
from tests.support.sim_steps import STEPS, WEIGHTS

pytestmark = pytest.mark.usefixtures("quiet_simulation")

DRAWN = settings(
    max_examples=80,
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
MAX_WITNESS = 8  # steps of a minimal program, letting go of everything not counted
MUTANTS = {mutant.title: mutant for mutant in ORDER_MUTANTS}


def break_it(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[title]
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.replacement([]))


@DRAWN
@given(scripts(WEIGHTS))
def test_drawn_programs_raise_no_alarm(script: Script) -> None:
    run_script(script)


def test_drawn_programs_are_long() -> None:
    lengths: list[int] = []

    @DRAWN
    @given(scripts(WEIGHTS))
    def look(script: Script) -> None:
        lengths.append(len(script.effective))

    look()
    assert sum(length >= 40 for length in lengths) >= 0.9 * len(lengths)


@pytest.mark.parametrize("title", ["no quarantine", pytest.param("a slot guarded by nothing", marks=pytest.mark.slow)])
def test_a_fault_in_a_drawn_program_shrinks_to_a_short_witness(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(title, monkeypatch)
    failed: list[Script] = []

    @DRAWN
    @given(scripts(WEIGHTS))
    def play(script: Script) -> None:
        try:
            run_script(script)
        except SimFaultError:
            failed.append(script)
            raise

    with pytest.raises(SimFaultError, match=r"^step \d+\nrace at .*\n(get|share|prefetch|put) \[?shard-\d") as caught:
        play()
    print("", f"{title}, after {len(failed)} programs that fail:", caught.value, failed[-1], sep="\n")
    assert len(failed[0].effective) >= 40
    assert len(failed[-1].effective) <= MAX_WITNESS


def test_a_fault_in_a_seeds_program_comes_with_a_short_witness(monkeypatch: pytest.MonkeyPatch) -> None:
    break_it("no quarantine", monkeypatch)
    with pytest.raises(SimFaultError) as caught:
        run_seed(1)
    _, fault, *_, witness = str(caught.value).split("\n")
    assert "race at" in fault
    assert len(witness.split(";")) <= 2 * MAX_WITNESS


def test_a_script_is_replayed_by_what_its_repr_says() -> None:
    script = random_script(5, WEIGHTS)
    assert eval(repr(script), {"Script": Script}) == script
    assert repr(Script([Step("get", bytes([1, 0, 2, 0])), Step(REST), Step("drop")])) == "Script.of('get 1 0 2; drop')"


def test_scripts_name_steps_that_there_are() -> None:
    script = random_script(1, WEIGHTS)
    assert len(script) == NUM_STEPS
    assert {step.name for step in script} <= STEPS.keys()


def test_choices_that_no_number_makes_are_the_simplest() -> None:
    choices = Choices(bytes([7, 1, 99]))
    assert (choices.choice("abc"), choices.sample("abc", 1), choices.happens(1)) == ("b", ["b"], True)
    assert (choices.choice("abc"), choices.sample("abc", 2), choices.happens(99)) == ("a", ["a", "b"], False)


def test_a_shortened_script_keeps_its_failing_steps() -> None:
    script = Script.of("get 1; drop; read 2; drop; clear 3")
    shorter = shortened(script, lambda one: {"get", "clear"} <= {step.name for step in one})
    assert repr(shorter) == "Script.of('get 1; clear 3')"
    assert len(shorter) == len(script)
