"""Decoding: caches and sampling."""
