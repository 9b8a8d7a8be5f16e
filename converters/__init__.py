"""From training checkpoints to served models, and the proof that both score alike.

to_triton.py    the command and its function
ensemble.py     the command that joins models
options.py      what is asked for, what comes out
pipeline.py     read, write, prove, publish
checkpoints/    where a checkpoint's files are, its architecture, what is refused
backends/       writers of versions: python, ONNX, TorchScript, ensembles
parity/         the samples that are compared, both sides' scores, the report
triton_models/  the `model.py` that versions carry
"""
