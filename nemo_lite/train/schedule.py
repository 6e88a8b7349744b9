"""The learning rate over a run."""

import math

from nemo_lite.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """The rate of step 0, 1, .. steps-1: linear warmup, then the schedule's kind.

    wsd: stable, then over the last decay_steps from the peak to min_lr as 1 - sqrt(progress) (minus_sqrt), linearly, or
    as half a cosine. cosine: half a cosine over everything after the warmup.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "wsd":
        length, shape = schedule.decay_steps, schedule.decay_shape
    else:
        length, shape = (steps - schedule.warmup_steps if schedule.kind == "cosine" else 0), "cosine"
    done = step + 1 - (steps - length)  # the last step ends at min_lr
    if done <= 0 or length == 0:
        return optim.lr
    progress = min(done / length, 1.0)
    remaining = {
        "minus_sqrt": 1 - math.sqrt(progress),
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[shape]
    return schedule.min_lr + (optim.lr - schedule.min_lr) * remaining
