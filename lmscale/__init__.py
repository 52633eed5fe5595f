"""lmscale: train Transformer, Mamba, Mamba-2 and hybrid language models under one recipe, sharded over a named mesh."""

__version__ = '0.1.0'
