"""Tokenizer files and a TFDS data set, made where a test wants them."""

import io

import numpy as np
import sentencepiece
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmscale.data.sources import tfds_source

CORPUS = ['def encode(self, text):\n  return self.encode_batch([text])[0]\n', 'the quick brown fox jumps\tover  the dog\n'] * 20


def make_bpe(path, change=lambda tokenizer: None):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=['<pad>', '<|endoftext|>'], show_progress=False,
                                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.train_from_iterator(CORPUS, trainer)
  change(tokenizer)
  tokenizer.save(str(path))
  return str(path)


def make_sentencepiece(path, **changes):
  out = io.BytesIO()
  options = {'model_type': 'bpe', 'vocab_size': 320, 'byte_fallback': True, 'normalization_rule_name': 'identity',
             'remove_extra_whitespaces': False, 'add_dummy_prefix': False, 'minloglevel': 2, **changes}
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, **options)
  path.write_bytes(out.getvalue())
  return str(path)


TEXTS = [f'text number {i} é' for i in range(30)]


class Small(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.2.0')
  url_infos = {}  # noqa: RUF012

  def _info(self):
    features = {'text': tfds.features.Text(), 'tokens': tfds.features.Tensor(shape=(None,), dtype=np.int32),
                'label': tfds.features.Scalar(dtype=np.int64)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(TEXTS), 'test': self._generate_examples(['held out', ''])}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {'text': text, 'tokens': np.frombuffer(text.encode(), np.uint8).astype(np.int32), 'label': i}


def prepare(folder, shards=2):
  """The data set `small` below `folder`."""
  with tfds_source.quiet():
    builder = Small(data_dir=folder, file_format='array_record')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return folder
