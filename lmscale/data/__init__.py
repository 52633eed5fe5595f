"""From text to batches: sample i is a function of (seed, data identity, sequence length, i).

`sources/` turns what an entry of data.sources names into documents (`document.py`), and notes what was odd about them
(`reading_notes.py`). `token_cache.py` tokenises them once (`tokenizer.py`, `tokenizer_files.py`, `special.py`; `losses.py` counts what
a tokenizer loses) into flat arrays in folders that are whole or not there (`atomic_folder.py`) and whose content is checked
(`file_digest.py`). `split.py` holds documents out, `sampler.py` cuts an epoch of one source into windows, `blend.py` says which
source sample i comes from (`same_content.py` which sources are the same), and `loader.py` puts the rows of a batch together.
`entropy.py` gives the bigram baseline that a trained model must beat.
"""
