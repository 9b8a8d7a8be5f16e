"""From training checkpoints to served models, and the proof that both score alike.

to_triton.py    the command and its function          pipeline.py     the steps, in order
conversion.py   what is asked for and what comes out  checkpoint.py   read and judge a reward-model checkpoint
cases.py        the samples that are compared         reference.py    the original model's scores
parity.py       the report                            served_form.py  the written model.py in a fresh process
"""
