"""The server: an OpenAI-compatible API over HTTP for models that people own, on the machine they already have.

`formary.serve.app` has the routes, `worker` the thread that owns a model's engine; nothing here is imported by other
rooms than the command line.
"""
