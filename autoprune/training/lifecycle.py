"""Which calls of pruning hooks may follow which: their phases, and one table of transitions."""

from __future__ import annotations

from enum import Enum, auto

from autoprune.errors import AutopruneError


class Phase(Enum):
    """Where hooks are between their start and their end."""

    NEW = auto()
    BETWEEN_STEPS = auto()
    IN_CLOSURE = auto()  # the method has seen this step's gradients, inside the optimizer's step
    COMPLETE = auto()  # all steps were taken: the masks are final


class Event(Enum):
    """What happens to hooks."""

    START = auto()
    GRADIENTS = auto()  # come into being in a closure that the optimizer calls
    STEP = auto()  # the optimizer has taken one
    LAST_STEP = auto()  # and this was the last
    FINISH = auto()
    READ = auto()  # signals, states


TRANSITIONS: dict[Event, dict[Phase, Phase]] = {
    Event.START: {Phase.NEW: Phase.BETWEEN_STEPS},
    Event.GRADIENTS: {Phase.BETWEEN_STEPS: Phase.IN_CLOSURE, Phase.COMPLETE: Phase.COMPLETE},
    Event.STEP: dict.fromkeys((Phase.BETWEEN_STEPS, Phase.IN_CLOSURE), Phase.BETWEEN_STEPS),
    Event.LAST_STEP: dict.fromkeys((Phase.BETWEEN_STEPS, Phase.IN_CLOSURE), Phase.COMPLETE),
    Event.FINISH: {Phase.COMPLETE: Phase.COMPLETE},
    Event.READ: {phase: phase for phase in Phase if phase is not Phase.NEW},
}
NOT_STARTED = "call start(optimizer, total_steps) first."
REFUSALS = {  # where the table has no row, of hooks that were started
    Event.START: "start was called already: make new hooks for another training.",
    Event.GRADIENTS: "{optimizer} computes the loss several times a step, which pruning methods do not support: use an "
    "optimizer such as SGD or AdamW.",
    Event.STEP: "all {total} steps were taken: start with the number of optimizer steps you will take.",
    Event.FINISH: "{step} of {total} steps were taken: the model is not as sparse as asked yet. Train on, or start "
    "with the number of optimizer steps that you will take.",
}


class Lifecycle:
    """How far hooks have come, and what may happen next.

    Attributes:
        phase: the present one.
        step: optimizer steps taken.
        total: steps that will be taken; 0 before the start.
        optimizer: its class's name, for messages.
    """

    def __init__(self) -> None:
        self.phase = Phase.NEW
        self.step = self.total = 0
        self.optimizer = ""

    def check(self, event: Event) -> Phase:
        """The phase that `event` leads to; raises AutopruneError where it may not happen now."""
        following = TRANSITIONS[event].get(self.phase)
        if following is None and self.phase is Phase.NEW:
            raise AutopruneError(NOT_STARTED)
        if following is None:
            raise AutopruneError(REFUSALS[event].format_map(vars(self)))
        return following

    def take(self, event: Event) -> None:
        """Moves on; raises like `check`."""
        self.phase = self.check(event)

    def start(self, optimizer: str, total: int) -> None:
        """Begins a training of `total` steps."""
        self.take(Event.START)
        self.optimizer, self.total = optimizer, total

    def count(self) -> int:
        """One more step; returns its number, from 1."""
        self.check(Event.STEP)
        self.step += 1
        self.take(Event.STEP if self.step < self.total else Event.LAST_STEP)
        return self.step

    def go_to(self, step: int) -> None:
        """As if `step` steps had been taken."""
        self.step = step
        self.phase = Phase.BETWEEN_STEPS if step < self.total else Phase.COMPLETE
