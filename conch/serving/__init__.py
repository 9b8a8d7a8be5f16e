"""Serving reward models with Triton Inference Server: the model store, its configs, and servers.

The model store
    spec.py        the contract of a served model      pbtxt.py      spec <-> config.pbtxt
    manifest.py    what stands in a version folder     store.py      read, verify and publish versions
    members.py     what an ensemble needs beside it    ensemble_manifest.py   what it is made of
    triton_warmup.py   requests before a version counts as loaded
One server
    launcher.py    start it, know when it is ready, stop it          guard.py    lets none outlive its parent
    runtime.py     what it runs in: binary or container image        bundle.py   the bundled binary
    flags.py       tritonserver's flags                              ports.py, tls.py   checked at the start
    triton_repository.py   the versions it is to serve, and no other
Deployments: `python -m conch.serving`
    up.py, commands.py   the subcommands               deployment.py      what is noted down under a name
    supervisor.py        restarts and swaps            triton_watchdog.py heals models
    triton_swap.py       tries new versions out, then takes them up
Talking to a server
    triton_channel.py    TLS and secret                triton_health.py   ready = golden samples score right
    triton_statistics.py what it did                   triton_status.py   the same for people
    triton_ask.py        scores, plainly
python_backend/          what runs inside the server: model.py, graph.py, tokenizer.py, ensemble.py
"""
