"""From training checkpoints to served models, and the proof that both score alike.

to_triton.py    the command and its function
ensemble.py     the command that joins models
options.py      the settings, what comes out
pipeline.py     read, write, prove, publish
parts.py        the models of the store that one conversion writes
checkpoints/    a checkpoint's files, network, tokenizer and scoring rules, and what is refused
backends/       writers of versions: python, ONNX, TorchScript, ensembles
parity/         the samples that are compared, both sides' scores, the report
triton_models/  the `model.py` that versions carry, and the files beside it
"""
