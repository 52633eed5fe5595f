"""The kernel benchmark: its floors, its timing, its report, and the speed that it has to show on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import bench_kernels
import bench_ops
import bench_timing
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_floors_of_the_8b_layer():
  """The arithmetic for an H200 at 4.3 TB/s and 790 TFLOP/s; bytes and FLOPs by hand for batch 1, length 4096."""
  op, shape = bench_ops.OPS['ssd'], bench_ops.LAYER
  costs = bench_ops.costs(op, shape, bench_ops.make_inputs(op, shape, 'bfloat16'))
  tokens = 4096
  x, bc, dt = tokens * 128 * 64 * 2, tokens * 8 * 128 * 2, tokens * 128 * 4
  decay = 128 * 4
  assert costs['forward'] == (2 * x + 2 * bc + dt + decay, tokens * 128 * 57_344)
  assert costs['backward'] == (3 * x + 4 * bc + 2 * (dt + decay), tokens * 128 * 147_456)
  peaks = bench_ops.Peaks(4.3e12, 790e12)
  assert bench_ops.floor(costs, 'forward', peaks) == pytest.approx(38.06e-6, rel=1e-3)  # FLOPs; by bytes 35.6
  assert bench_ops.floor(costs, 'forward+backward', peaks) == pytest.approx(135.9e-6, rel=1e-3)
  slow_memory = bench_ops.Peaks(1e12, 790e12)
  assert bench_ops.floor(costs, 'forward', slow_memory) == pytest.approx(153.1e-6, rel=1e-2)


def test_a_peer_set_of_twenty_shapes():
  assert len(set(bench_ops.OPS['ssd'].shapes['peers'])) == 20


@pytest.mark.parametrize('op', sorted(bench_ops.OPS))
def test_every_operation_is_timed(op, tmp_path):
  length = 1 if op == 'ssd_update' else 16
  shape = bench_ops.Shape(2, length, 4, 8, 2 if op != 'selective_scan' else 1, 16)
  names = [name for name in bench_ops.OPS[op].implementations if name in ('scan', 'xla')]
  rows = json.loads(json.dumps(bench_kernels.time_shape(op, shape, 'float32', 2, names)))
  timed = {(row['candidate'], row['pass']): row for row in rows if 'seconds' in row}
  passes = ('forward', 'forward+backward') if op != 'ssd_update' else ('forward',)
  assert set(timed) == {(name, part) for name in names for part in passes}
  for row in timed.values():
    assert row['seconds'] > 0
    assert row['memory'] >= row['cost']['forward'][0]  # inputs and outputs are part of it


REPORT = {
  'op': 'ssd', 'repeats': 3, 'command': 'x', 'device': 'CPU', 'cores': 2, 'load': 0.5, 'versions': {'jax': '0'},
  'xla_flags': '', 'dtype': 'float32', 'peaks': [1e9, 1e12], 'platform': 'cpu', 'rows': [
    {'shape': [1, 8, 2, 4, 1, 4], 'candidate': name, 'pass': part, 'seconds': seconds, 'quartiles': [0.5, 2.0],
     'cost': {'forward': [1e6, 2e9], 'backward': [3e6, 0.0]} if '+' in part else {'forward': [1e6, 2e9]}, 'memory': 5e6}
    for name, part, seconds in (('scan', 'forward', 1.0), ('xla', 'forward', 0.5), ('scan', 'forward+backward', 12.0),
                                ('xla', 'forward+backward', 2.0))
  ] + [{'shape': [b, 8, 2, 4, 1, 4], 'candidate': 'peer', 'refused': 'wrong: x'} for b in (1, 2)],
}  # fmt: skip


def test_report(tmp_path):
  lines = bench_kernels.markdown(REPORT).splitlines()
  shape = '1 x 8, h 2 p 4 g 1 n 4'
  assert lines[7] == f'| {shape} | xla | forward | 500 | 500 to 2000 | 2 | 0.002 | 0.004 | 5.0 | 1.0 |'
  assert f'{shape}: xla against scan: forward 2.00x, forward+backward 6.00x as fast' in lines
  assert lines[-1] == f'Not timed: peer: wrong: x ({shape}; 2 x 8, h 2 p 4 g 1 n 4)'
  bench_kernels.draw(REPORT, tmp_path / 'x.svg')
  picture = (tmp_path / 'x.svg').read_text()
  assert '>floor<' in picture and '>xla<' in picture and f'>{shape}<' in picture


def test_the_time_of_the_flush_is_taken_off(monkeypatch):
  """Fake work of 1 and 10 ms, as a fake accelerator runs it: in the order of the calls, when waited for."""
  clock, queue = [0.0], [0.0]

  def candidate(seconds):
    def call():
      queue[0] += seconds

    def wait(_):
      clock[0] += queue[0]
      queue[0] = 0.0

    return bench_timing.Candidate(call, wait, None)

  monkeypatch.setattr(bench_timing.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(bench_timing, '_flush_candidate', lambda: candidate(0.3))
  work = {'short': candidate(1e-3), 'long': candidate(1e-2)}
  for flush in (True, False):
    samples = bench_timing.measure(work, 4, flush)
    assert samples['short'] == pytest.approx([1e-3] * 4)
    assert samples['long'] == pytest.approx([1e-2] * 4)


def test_what_does_not_fit_is_not_run(monkeypatch):
  monkeypatch.setattr(bench_timing, 'memory_limit', lambda: 1000)
  rows = bench_kernels.time_shape('ssd', (1, 16, 2, 8, 1, 8), 'float32', 2, ['xla'])
  assert [row['refused'] for row in rows if row['candidate'] == 'xla'] == ['needs 0 MB of 0 MB'] * 2


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--shapes=huge'], '--shapes: huge unknown; ssd has small, 8b, wide, peers'),
    (['--implementations=cuda'], '--implementations: cuda unknown; ssd has scan, xla, pallas_triton, pallas_mosaic'),
    (['--op=ssd_update', '--lengths=5'], '--lengths: ssd_update is one decoding step, of one token'),
  ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys):
  assert bench_kernels.main(flags) == 2
  assert capsys.readouterr().err == f'error: {message}\n'


@pytest.mark.slow
def test_xla_against_scan_on_a_cpu_at_length_4096(tmp_path):
  """In the tool's own processes, which the tests' XLA flags must not slow down."""
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'} | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, str(ROOT / 'tools/bench_kernels.py'), '--implementations=scan,xla', f'--out={tmp_path / "x"}']
  subprocess.run(command, check=True, env=environment)
  rows = json.loads((tmp_path / 'x.json').read_text())['rows']
  assert {tuple(row['shape'])[1] for row in rows} == {4096}
  seconds = {(row['candidate'], row['pass']): row['seconds'] for row in rows if 'seconds' in row}
  assert seconds['xla', 'forward'] <= seconds['scan', 'forward']
  assert 5 * seconds['xla', 'forward+backward'] <= seconds['scan', 'forward+backward']
  assert (tmp_path / 'x.md').exists() and (tmp_path / 'x.svg').exists()
