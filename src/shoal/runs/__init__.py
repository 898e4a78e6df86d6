"""What drives a training run on one device: its port, the group's agreement, exchanges, transfers, checkpoints. No torch."""
