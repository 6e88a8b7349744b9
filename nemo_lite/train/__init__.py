"""Training: loss, optimizer, schedule, loop, checkpoints, metrics and the report."""
