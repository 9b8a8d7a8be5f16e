"""Serving reward models with Triton Inference Server: the model store, its configs, and a local server.

spec.py        the contract of a served model      pbtxt.py      spec <-> config.pbtxt
manifest.py    what stands in a version folder     store.py      read, verify and publish versions
bundle.py      the bundled tritonserver binary     launcher.py   start it, know when it is ready, stop it
guard.py       lets no server outlive its parent   triton_health.py   ready = golden samples score right
members.py     what an ensemble needs beside it    ensemble_manifest.py   what it is made of
python_backend/           what runs inside the server: model.py, graph.py, tokenizer.py, ensemble.py
"""
