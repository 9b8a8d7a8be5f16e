"""`python -m conch.plots`, which is `conch plot`."""
