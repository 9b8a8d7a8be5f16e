"""What all trainers share: the loop, checkpoints, reward shaping, evaluation set-up."""
