"""Conch's rewards as the functions that other projects' trainers call: TRL, verl, OpenRLHF.

    trl.py, verl.py, openrlhf.py    a function in the form that this trainer calls
    samples.py                      what trainers hand to such a function -> rollouts
    local.py                        a reward that opens its connections in each process where it is used
    trlx.py, trlx_keys.py           a configuration of trlX as one of ours

None of them imports torch, or the trainer that it is for.
"""
