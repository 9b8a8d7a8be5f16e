"""Servers under a name, which `conch serve` starts, restarts, swaps, shows and stops."""
