"""A server that answers questions about scans, with the OpenAI API, and what the app shares with it.

    python -m photon.serving --model . --port 8000

`incoming.py` reads what came over the network, `engine.py` answers in batches in one thread, `chat.py` turns requests
into prompts, `server.py` is the HTTP side, `ray_app.py` puts a worker on each GPU.
"""
