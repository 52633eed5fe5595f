"""The files a run leaves: lines, the cut on resume, samples, the picture."""

import json
import re
from xml.etree import ElementTree

import pytest
from tensorboardX.proto.event_pb2 import Event

from lmscale.train.metrics import MetricsWriter, cut_metrics, cut_samples, plot_loss, read_metrics, smooth


def line(step, **more):
  return {'step': step, 'tokens': 64 * step, 'loss': 3.0 / step, 'grad_norm': 1.0, 'learning_rate': 0.1, **more}


def events(folder):
  """Every (step, tag, value) of the TensorBoard files, oldest file first: length, crc, payload, crc."""
  found = []
  for path in sorted(folder.glob('events*'), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      event = Event.FromString(data[12 : 12 + size])
      found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
      found += [('start', event.step)] if event.HasField('session_log') else []
      data = data[16 + size :]
  return found


def test_lines_and_events(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    writer.write(line(1))
    writer.write(line(2, val_loss=2.5))
    writer.flush()
    assert read_metrics(tmp_path / 'metrics.jsonl') == [line(1), line(2, val_loss=2.5)]
  found = events(tmp_path / 'tensorboard')
  assert (1, 'loss', 3.0) in found and (2, 'val_loss', 2.5) in found


def test_numbers_that_are_not_finite_become_null(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    writer.write(line(1, loss=float('nan'), grad_norm=float('inf'), skipped=1))
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text, parse_constant=pytest.fail) == line(1, loss=None, grad_norm=None, skipped=1)


def test_resume_cuts_later_lines_and_samples(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    for step in (1, 2, 3, 4):
      writer.write(line(step))
      writer.sample(step, f'text {step}\n=== step\n')
  before = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
  with MetricsWriter(tmp_path, 2) as writer:
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(before[:2])
    writer.write(line(3, loss=9.0))
    writer.sample(3, 'new')
  assert [entry['loss'] for entry in read_metrics(tmp_path / 'metrics.jsonl')] == [3.0, 1.5, 9.0]
  samples = (tmp_path / 'samples.txt').read_text()
  assert 'text 2' in samples and 'text 3' not in samples and 'text 4' not in samples and 'new' in samples
  assert ('start', 3) in events(tmp_path / 'tensorboard')  # tells TensorBoard to drop what it has from step 3 on


HEADINGS = ['=== step 9 ===', '\\=== step 9 ===', '\\\\=== step 1 ===', 'a\n=== step 99 ===\nb', '=== step 9 ===\n', 'x\r=== step 9 ===\r\n=== step 3 ===',
            f'=== step {"9" * 5000} ===', '\u2028=== step 9 ===\u2028', '']  # fmt: skip


@pytest.mark.parametrize('text', HEADINGS)
def test_a_sample_that_looks_like_a_heading_is_a_sample(tmp_path, text):
  path = tmp_path / 'samples.txt'
  with MetricsWriter(tmp_path, 0) as writer:
    for step in (2, 4, 6):
      writer.sample(step, text)
  before = path.read_bytes()
  assert len([found for found in before.decode().split('\n') if re.fullmatch('=== step [246] ===', found)]) == 3
  for last in (5, 4, 3, 2, 1):
    cut_samples(path, last)
    assert path.read_bytes() == before[: len(before) // 3 * (last // 2)]
  path.write_bytes(before)
  first = before.decode().split('=== step 2 ===\n')[1].split('\n\n=== step 4 ===\n')[0]
  assert re.sub(r'(?m)^\\(?=\\*=== step \d{1,18} ===$)', '', first) == text


def test_samples_of_an_older_version_are_read(tmp_path):
  """There a text's line could look like a heading; what was sampled up to the step is kept whatever it holds."""
  path = tmp_path / 'samples.txt'
  old = '=== step 2 ===\na\n=== step 9 ===\nb\n\n=== step 4 ===\nc\n\n=== step 6 ===\nd\n\n'
  for last, kept in ((6, old), (5, old[: old.index('=== step 6')]), (3, old[: old.index('=== step 9')])):
    path.write_text(old)
    cut_samples(path, last)
    assert path.read_text() == kept


@pytest.mark.parametrize('torn', ['=', '=== st', '=== step ', '=== step 1', '=== step 12 ==', '=== step 12 ===', '=== step 12 ===\nhalf a te'])
def test_a_torn_sample_is_cut(tmp_path, torn):
  path = tmp_path / 'samples.txt'
  whole = '=== step 2 ===\na\n\n'
  path.write_text(whole + torn)
  cut_samples(path, 10)
  assert path.read_text() == whole


def test_resume_from_nothing_starts_an_empty_file(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line(1)) + '\n')
  MetricsWriter(tmp_path, 0).close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


@pytest.mark.parametrize('torn', ['{"step": 3, "lo', '{"step": 3}garbage', '\x00\x00', '[]', '{"loss": 1}', '"x"', '[' * 100_000])
def test_torn_line_is_cut(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  whole = json.dumps(line(1)) + '\n' + json.dumps(line(2)) + '\n'
  path.write_text(whole + torn)
  cut_metrics(path, 5)
  assert path.read_text() == whole


def test_plot_reads_at_a_glance(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    for step in range(1, 60):
      writer.write(line(step, **({'val_loss': 3.1 / step} if step % 20 == 0 else {})))
    writer.write(line(60, loss=None))
  path = plot_loss(tmp_path, reference=1.234, unit='byte')
  texts = ' '.join(e.text or '' for e in ElementTree.parse(path).iter('{http://www.w3.org/2000/svg}text'))
  for words in ('training tokens', 'loss (nats / byte)', 'validation', 'order-1 entropy 1.234', tmp_path.name):
    assert words in texts
  assert not list(tmp_path.glob('*.tmp*'))


def test_plot_of_a_run_without_lines(tmp_path):
  assert plot_loss(tmp_path).exists()


def test_smooth_is_centred():
  ramp = [float(i) for i in range(200)]
  assert smooth(ramp) == pytest.approx(ramp)
  assert smooth([5.0]) == [5.0] and smooth([]) == []
  assert max(smooth([0.0, 1.0] * 100)[5:-5]) < 0.6
