"""Texts that ask for something in them: retrieval, tracing, counting and copying, at any length, for evaluation and training.

`tasks.py` lists them by name. `needles.py`, `chains.py`, `counting.py` and `questions.py` have the thirteen tasks of RULER (arXiv
2404.06654) under its names, in words of our own; `phonebook.py` the phone book of arXiv 2406.07887, `recall.py` the token tasks of
the literature on state space models. `sizing.py` fits each into a number of tokens; `dice.py` draws, the same on every machine.
"""
