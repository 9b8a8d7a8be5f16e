"""Remote training: the model trains here, what gives its rewards runs elsewhere and drives it over HTTP.

    client: /completions -> `Exchange.ask` -> the trainer samples -> leased samples -> client
    client: /rewards     -> `Exchange.reward` -> `Ledger` -> a group is whole -> the trainer's next step

`conch.service.client` is the other side.
"""
