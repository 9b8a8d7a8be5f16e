"""GPU memory of a run: `conch size`."""
