"""What an entry of data.sources can be.

`opening.py` opens one. `text_files.py` reads text and JSON lines: `find_files.py` says from which files, `file_streams.py` unpacks
them and cuts them into lines, `encoding.py` makes UTF-8 of them. `stdlib_source.py` gives the standard library (`stdlib.py`, stored by
`stdlib_dataset.py`), `tfds_source.py` TFDS data sets. `synthetic_source.py` makes its texts
(`data/synthetic/`). `megatron_source.py` maps Megatron's files (`megatron.py`) where they lie.
"""
