"""Servers under a name: started, restarted, swapped and looked at by `python -m conch.serving`."""
