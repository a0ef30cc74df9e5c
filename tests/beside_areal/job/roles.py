"""Steps of a trainer with all of AReaL's roles: `roles.py '{role: address, ...}' steps rows tokens`.

The roles read and return what they do in AReaL's trainer, and its controllers clear as there: the teacher's is never
asked to. "reward" reads each batch too, owns nothing, and no controller knows of it. Prints what is left after each
step, by role, as one line of JSON.
"""

from __future__ import annotations

import json
import sys

from controller import call, controller, create
from engine import Engine


def step(at: dict[str, str], number: int, size: tuple[int, int]) -> None:
    batch = call(at["rollout"], "make", number, *size)
    call(at["reward"], "touch", batch)
    for role, name in (("ref", "ref_logp"), ("teacher", "teacher_logp"), ("critic", "returns"), ("actor", "prox_logp")):
        for trajectory, result in zip(batch, call(at[role], "score", batch), strict=True):
            trajectory[name] = result
    advantages = call(at["actor"], "advantages", batch)
    for role in ("actor", "critic"):
        call(at[role], "touch", advantages)
    for role, targets in (("actor", (batch, advantages)), ("critic", (batch, advantages)), ("ref", (batch,))):
        controller([at[role]], role).clear_batches(*targets)


def main(at: dict[str, str], num_steps: int, size: tuple[int, int]) -> None:
    for address in at.values():
        create(address)
    for number in range(num_steps):
        step(at, number, size)
        facts = {role: call(address, "facts") for role, address in at.items()} | {"controller": Engine.facts(None)}
        print(json.dumps(facts), flush=True)
    print("DONE", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])))
