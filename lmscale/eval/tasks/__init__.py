"""What is asked. `standard.py`: data sets of single questions; `long.py`: of long texts; `synthetic.py`: made here, of any length.

All are read as JSON lines in the columns in which they are published; `files.py` finds and checks them. The wording around a question
is ours, but for the usual `Question:` and `Answer:`.
"""
