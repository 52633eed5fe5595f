"""From text to batches: sample i is a function of (seed, data identity, sequence length, i).

`source.py` opens what an entry of data.sources names. `text.py` (whose `files.py` finds, unpacks and cuts files into lines),
`stdlib.py` and `tfds_source.py` turn it into documents (`document.py`); `cache.py` tokenises them once (`tokenizer.py`,
`pretrained.py`) into flat arrays on disk. `megatron_store.py` maps Megatron's files (`megatron.py`) where they lie. `sampler.py`
cuts an epoch of one source into windows, `blend.py` says which source sample i comes from, and `loader.py` puts the rows of a
batch together. `entropy.py` gives the bigram baseline that a trained model must beat.
"""
