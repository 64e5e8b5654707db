"""Running a stateful model, and what its runs came to: a model whose rules never apply agrees with everything."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def explore(
    model: type[RuleBasedStateMachine], *, examples: int, steps: int, quick: bool, **given: Any
) -> Counter[str]:
    """Runs a model; its rules and invariants raise where the store and the reference differ.

    Args:
        quick: the same every time, and a failure is not made small, which takes minutes.
        given: class attributes of the model.
    Returns: what the model's `teardown` counted in `reached`, over all runs.
    """
    reached: Counter[str] = Counter()
    machine = type("Machine", (model,), {"reached": reached, **given})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=quick,
            phases=[phase for phase in Phase if not (quick and phase is Phase.shrink)],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return reached
