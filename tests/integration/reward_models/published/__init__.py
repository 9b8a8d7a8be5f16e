"""Code of public checkpoints in words of our own: class names, signatures and tensors are those published."""
