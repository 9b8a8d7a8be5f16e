"""One HTML page of one or more runs, which needs no network, and a server that keeps such a page up to date.

`collect.py` makes of run folders what the page shows, `settings.py` compares their configurations, `page.py`
puts data, charts (plotly) and the files of `assets/` together, `live.py` serves them on loopback.
"""
