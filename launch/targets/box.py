"""A machine with a shell, a time limit and a price, and nothing else."""

import dataclasses
from collections.abc import Iterator, Sequence

from launch.cloud.request import Request
from launch.cloud.session import Aws
from launch.targets.attempt import Attempt, Figures, Noted, Phase, State
from launch.targets.base import RUN, Spec, fit
from launch.targets.ec2 import Ec2
from launch.targets.ec2_request import Ec2Config, run_instances
from launch.targets.inventory import Inventory
from launch.targets.rented import Rented
from launch.targets.script import fill
from trainer.common.errors import UserError
from trainer.settings.config import Config


class Box(Ec2):
    trains = False

    def run_id(self, config: Config, placed: Config, overrides: Sequence[str]) -> str:
        """Return the given name, else "box": most users need only one."""
        return fit(config.name, RUN) if config.name is not None else "box"

    def check(self, target: Ec2Config) -> None:
        super().check(target)
        if target.instances > 1:
            raise UserError(
                f"target.instances={target.instances}: a box is one machine; give each a name=..."
            )

        if target.wheels:
            raise UserError(
                f"target.wheels={target.wheels}: nothing is installed on a box; leave it out"
            )

    def requests(self, spec: Spec) -> list[Request]:
        return [run_instances(spec, script(spec))]

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        """Return its state: a box that ended without a message has not failed."""
        return _without_failure(super().observe(aws, attempt))

    def listed(self, inventory: Inventory, noted: Noted) -> State | None:
        state = super().listed(inventory, noted)
        return None if state is None else _without_failure(state)

    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        """Terminate it: no program on it checks for a request to stop."""
        super().stop_running(aws, attempt, state, at_once=True)

    def results(self, aws: Aws, attempt: Attempt) -> str:
        raise UserError(
            f"{attempt.run}: a box leaves no model; name a run: python -m launch status"
        )

    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        return Figures()

    @classmethod
    def overdue(cls, inventory: Inventory) -> Iterator[tuple[Attempt, State]]:
        """Yield nothing: `Ec2.overdue` yields boxes too."""
        yield from ()

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        """Yield nothing: `Ec2.rented` yields boxes too."""
        yield from ()


TARGETS = (Box("box"),)


def _without_failure(state: State) -> State:
    """Return a box's state, with "stopped" for "failed": a box has nothing to fail at."""
    if state.phase is not Phase.FAILED:
        return state
    return dataclasses.replace(state, phase=Phase.STOPPED, is_sure=True)


def script(spec: Spec) -> str:
    """Return the script that the machine runs at each boot."""
    return fill(
        "box.sh",
        project=spec.project,
        bucket=spec.uri(),
        region=spec.region,
        source_sha256=spec.source,
        limit=round(3600 * spec.hours),
    )
