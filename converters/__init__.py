"""From training checkpoints to served models, and the proof that both score alike.

to_triton.py    the command and its function        pipeline.py        the steps, in order
conversion.py   what is asked for, what comes out   checkpoint.py      read and judge a checkpoint
source.py       where a checkpoint's files are      kinds.py           classifier, value head, adapter, steps
network.py      the model in it, found complete     full_precision.py  half precision run in float32
python_form.py  a version for the python back end   torchao_int8.py    its weights in eight bits
cases.py        the samples that are compared       reference.py       the original model's scores
comparison.py   both held against each other        parity.py          the report on it
served_form.py  the written model in a new process  verify.py          a running server against a checkpoint
version_files.py  golden samples, report, manifest
graph.py        a model as one graph                graph_form.py      versions of onnx and torchscript
onnx_export.py, torchscript_export.py  write it     onnx_text.py       a tokenizer before an ONNX model
ensemble.py     the command that joins models       ensemble_*.py      what is asked, expected and written
"""
