"""A language model as a judge: any OpenAI-compatible endpoint whose answers are read as scores.

rollout -> `template.py`, what is asked -> `client.py`, retries, replicas, limits and costs -> `endpoint.py`,
one request -> `parsers.py` or `ranking.py`, what the answer says -> `source.py`, votes into a result
"""
