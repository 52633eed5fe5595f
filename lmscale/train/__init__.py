"""The training loop and what it needs: state, schedule, optimizer, checkpoints, metrics."""
