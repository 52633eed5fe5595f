"""How much of a text a tokenizer loses: characters that do not come back out of the tokens.

Every text is checked. Where the bytes that its tokens stand for add up to the text's, nothing is lost and that is all. Only
other texts are decoded, and their characters counted before and after. A character that comes back in another form (lower
case, without its accent, as its compatible form, one kind of space for another) is changed, not lost.
"""

import collections
import functools
import logging
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError

MOST = 0.05  # share of a source's characters that may be lost
ENOUGH, HOPELESS = 1 << 24, 0.5  # after so many characters a source that loses this share is given up
SHOWN = 20  # characters of an example
ADVICE = 'give data.tokenizer a tokenizer that knows them: bytes and those that tools/train_tokenizer.py makes keep every text'

log = logging.getLogger(__name__)


class Losses:
  """What one tokenizer loses of the texts of one source."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.lost, self.characters = 0, 0
    self.example, self.changed = '', ''  # of a text that lost characters, of one that came back otherwise

  def add(self, texts: Sequence[bytes], ids: Sequence[np.ndarray]) -> None:
    """Counts the UTF-8 `texts` and their ids. Raises ConfigError where too much is lost to go on."""
    suspects = [i for i, text in enumerate(texts) if self.tokenizer.text_bytes(ids[i]) != len(text)]
    self.characters += sum(map(_characters, texts))
    if suspects:
      before = [texts[i].decode('utf-8', 'replace') for i in suspects]
      after = self.tokenizer.decode_batch([ids[i] for i in suspects])
      lost = lost_characters(text := ''.join(before), ''.join(after))
      self.lost += sum(lost.values())
      if lost and not self.example:
        at = min(text.index(c) for c, count in lost.items() if 2 * count >= max(lost.values()))
        self.example = f'for example in {text[at:at + SHOWN]!r}'
      self._note_change(zip(before, after, strict=True))
    if self.characters > ENOUGH and self.lost > HOPELESS * self.characters:
      self.finish()

  def probe(self, texts: Sequence[bytes]) -> None:
    """Looks whether texts come back changed where their lengths do not tell."""
    if not self.changed:
      before = [text.decode('utf-8', 'ignore') for text in texts]
      after = self.tokenizer.decode_batch(self.tokenizer.encode_batch([text.encode() for text in before]))
      self._note_change(zip(before, after, strict=True))

  def _note_change(self, pairs: Iterable[tuple[str, str]]) -> None:
    self.changed = self.changed or next((_shown(a, b) for a, b in pairs if a != b), '')

  def counts(self) -> tuple[int, int, str, str]:
    """(characters lost, all characters, an example of a loss, an example of a change)."""
    return self.lost, self.characters, self.example, self.changed

  def finish(self) -> None:
    """See `report`."""
    report(*self.counts())


def total(parts: Iterable[Sequence]) -> tuple[int, int, str, str]:
  """The counts of all parts together."""
  lost, characters, examples, changes = zip(*parts, strict=True)
  return sum(lost), sum(characters), next(filter(None, examples), ''), next(filter(None, changes), '')


def report(lost: int, characters: int, example: str, changed: str) -> None:
  """Logs what was lost or changed. Raises ConfigError if more than `MOST` of the characters are lost."""
  if found := notice_of(lost, characters, example, changed):
    log.warning('%s', found)


def notice_of(lost: int, characters: int, example: str, changed: str) -> str:
  """What was lost or changed, in a line; empty where nothing was. Raises ConfigError if more than `MOST` of the characters
  are lost."""
  said = f'the tokenizer loses {lost / max(characters, 1):.2%} of the text, {lost:,} of {characters:,} characters, {example}'
  if lost > MOST * characters:
    raise ConfigError(f'{said}; at most {MOST:.0%} may be lost: {ADVICE}')
  if lost:
    return f'{said}; bits per byte count the original bytes'
  return f'the tokenizer does not keep every text: {changed}; bits per byte count the original bytes' if changed else ''


def lost_characters(before: str, after: str) -> dict[str, int]:
  """How many of which characters of `before` are not in `after`, wherever they are and in whatever form."""
  counts = [np.bincount(_codes(text)) for text in (before, after)]
  difference = np.zeros(max(map(len, counts)), np.int64)
  for sign, count in zip((1, -1), counts, strict=True):
    difference[:len(count)] += sign * count
  missing, extra = np.flatnonzero(difference > 0), np.flatnonzero(difference < 0)
  left = collections.Counter()
  for code in extra:
    for form in _forms(int(code)):
      left[form] -= int(difference[code])
  lost = {}
  for code in missing:
    count, forms = int(difference[code]), _forms(int(code))
    found = min([count, *(left[form] // forms.count(form) for form in forms)])
    for form in forms:
      left[form] -= found
    if count > found:
      lost[chr(code)] = count - found
  return lost


def _codes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4').astype(np.int64)


@functools.lru_cache(1 << 16)
def _forms(code: int) -> str:
  """What is left of a character when case, accents and compatibility do not count; every space is one."""
  if chr(code).isspace():
    return ' '
  forms = unicodedata.normalize('NFKD', unicodedata.normalize('NFKD', chr(code)).casefold())
  return ''.join(form for form in forms if not '\u0300' <= form <= '\u036f' and not form.isspace())


def _characters(text: bytes) -> int:
  """Characters of UTF-8: the bytes that continue none."""
  return len(text) if text.isascii() else int(np.count_nonzero(np.frombuffer(text, np.int8) >= -64))


def _shown(before: str, after: str) -> str:
  at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
  return f'{before[at:at + SHOWN]!r} came back as {after[at:at + SHOWN]!r}'
