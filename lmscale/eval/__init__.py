"""How good a model is at tasks: its scores on data sets that lie on this machine, and on synthetic ones of any length.

`tasks/` says what is asked and what counts; `requests.py` what a model can be asked; `scorer.py` asks a model of ours; `metrics.py`
makes numbers of the answers; `evaluate.py` brings them together.
"""
