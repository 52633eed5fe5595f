"""From text to batches: sample i is a function of (seed, data identity, sequence length, i).

`text.py` and `stdlib.py` turn a source into documents (`document.py`). `cache.py` tokenises each source once
(`tokenizer.py`) into flat arrays on disk. `sampler.py` cuts an epoch of one source into windows, `blend.py` says
which source sample i comes from, and `loader.py` puts the rows of a batch together. `entropy.py` gives the bigram
baseline that a trained model must beat.
"""
