"""Servers under a name: started, restarted, swapped and looked at by `conch serve`."""
