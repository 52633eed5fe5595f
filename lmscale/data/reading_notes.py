"""What was odd about the texts of a source: kept with its tokens, and told at every start."""

import dataclasses

SHOWN = 10  # skipped lines


@dataclasses.dataclass
class Notes:
  """Filled while documents are read. Bytes are those of UTF-8, damage included."""

  skipped: list[str] = dataclasses.field(default_factory=list)  # 'file:line: reason' of what gave no text
  replaced: int = 0  # pieces of invalid UTF-8, UTF-16 or UTF-32, and lone surrogates, that became U+FFFD
  first_replaced: str = ''
  decoded: int = 0  # texts in another encoding by their byte order mark
  first_decoded: str = ''
  size: int = 0  # bytes
  bad: int = 0  # of them NUL or replaced
  first_bad: str = ''

  def note_replaced(self, count: int, place: object) -> None:
    """`count` pieces at `place` became U+FFFD."""
    self.first_replaced = self.first_replaced or (str(place) if count else '')
    self.replaced += count

  def note_bad(self, count: int, place: object) -> None:
    """`count` bytes at `place` are NUL or were replaced."""
    self.first_bad = self.first_bad or (str(place) if count else '')
    self.bad += count

  def note_decoded(self, place: object) -> None:
    """The text at `place` was not UTF-8 but in the encoding that its byte order mark names."""
    self.first_decoded = self.first_decoded or str(place)
    self.decoded += 1

  def lines(self) -> list[str]:
    """What the user should know, a line each; none where all was as it should be."""
    found = []
    if self.decoded:
      found.append(f'{self.decoded} texts were decoded by their byte order mark, the first in {self.first_decoded}')
    if self.replaced:
      found.append(f'{self.replaced} pieces of invalid UTF-8 became U+FFFD, the first in {self.first_replaced}')
    if self.skipped:
      shown = '; '.join(self.skipped[:SHOWN]) + (', …' if len(self.skipped) > SHOWN else '')
      found.append(f'{len(self.skipped)} lines give no text and are skipped: {shown}')
    return found
