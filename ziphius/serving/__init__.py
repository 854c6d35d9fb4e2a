"""The HTTP server: OpenAI's and Anthropic's routes, the chat page, and the engine's own process.

worker.py, wire.py      the engine's process, and what it and the server say to each other
link.py, engine.py      the server's end: requests and their streams; start, watch, restart
answers.py              a request's way from checked fields to pieces of an answer
api/                    a file a route: shapes in, shapes out
app.py, server.py       everything together; listening, signals, draining
page/                   the chat page
"""
