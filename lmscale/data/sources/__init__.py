"""What an entry of data.sources can be: files of text or JSON lines, the standard library, TFDS or Megatron data sets."""
