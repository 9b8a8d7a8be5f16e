"""Remote training: the model on one machine, what gives its rewards on another."""
