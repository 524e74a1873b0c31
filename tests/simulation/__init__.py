"""Laneway's protocol in one process and virtual time: one seed is one run, the same every time.

Clients, APIs, workers, schedulers and couriers are generators, and each `yield` is a place where their
process may be killed, stopped or overtaken. What they decide is decided by the engine's own functions, and
what a row may become by its own moves (`store.py`); only the talking and the waiting is written anew here.
`design.py` lists what the protocol does, and the mutants that leave one of it out.
"""
