"""What the tool reads from the compiler's output, its bounds, and (with the CUDA compiler) a real compilation."""

import importlib.util
import json

import pytest

from tools import compile_kernels as tool

# Recorded from ptxas 13.5 for a Triton and a Mosaic kernel; the second file's warning from its documentation.
TRITON = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'ssd_forward' for 'sm_90a'
ptxas info    : Function properties for ssd_forward
    216 bytes stack frame, 220 bytes spill stores, 232 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 216 bytes cumulative stack size, 96 bytes smem
ptxas info    : Compile time = 801.958 ms
ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
SERIALISED = (
  'ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to '
  "insufficient register resources for the wgmma pipeline in the function 'loop_fusion'\n"
)
LAUNCH = '001: kCustomKernel [source | sink ] {} grid: [9, 1, 1] threads: [128, 1, 1]  shared_memory: {} bytes'
LAUNCHES = [('ssd_forward', 16384), ('ssd_forward__1', 512), ('ssd_forward', 20480)]
SEQUENCE = '\n'.join(LAUNCH.format(*launch) for launch in LAUNCHES)


def _row(**kernel):
  report = {'kernel': 'ssd_forward', 'registers': 168, 'spill': 0, 'smem': 1000, 'serialised': False} | kernel
  return {'case': 'ssd pallas_x', 'shape': '8b-b1', 'compile_seconds': 1.25, 'temp_bytes': 2_500_000, 'launches': 3,
          'kernels': [report]}  # fmt: skip


def test_reads_ptxas():
  assert tool.parse_ptxas(SERIALISED + TRITON, 'ssd_forward') == {
    'kernel': 'ssd_forward', 'registers': 255, 'spill': 232, 'smem': 96, 'serialised': False,
  }  # fmt: skip
  other = tool.parse_ptxas(SERIALISED + TRITON, 'loop_fusion')
  assert other['registers'] == 8 and other['spill'] == 0 and other['smem'] == 0 and other['serialised']
  with pytest.raises(ValueError, match='ptxas did not report on walk: ptxas fatal'):
    tool.parse_ptxas('ptxas fatal   : Ptx assembly aborted due to errors', 'walk')


def test_reads_shared_memory_of_xlas_launches():
  assert tool.parse_smem(SEQUENCE, 'ssd_forward') == 20480
  assert tool.parse_smem(SEQUENCE, 'ssd_forward__1') == 512
  assert tool.parse_smem(SEQUENCE, 'absent') == 0


def test_bounds():
  bounds = {
    'ssd': tool.Bound(spill=8), 'ssd_forward': tool.Bound(spill=100, smem=900), 'walk': tool.Bound(serialised=True),
  }  # fmt: skip
  assert tool.bound_of('ssd_forward__1', bounds).spill == 100 and tool.bound_of('ssd_x', bounds).spill == 8
  assert tool.bound_of('other', bounds) == tool.Bound() == tool.Bound(0, 232_448, False)
  assert tool.violations(_row(spill=100, smem=900), bounds) == []
  assert tool.violations(_row(spill=101, smem=901, serialised=True), bounds) == [
    'ssd pallas_x at 8b-b1: ssd_forward spills 101 B, 100 are allowed',
    'ssd pallas_x at 8b-b1: ssd_forward needs 901 B of shared memory, 900 are allowed',
    'ssd pallas_x at 8b-b1: ptxas serialises the wgmma instructions of ssd_forward',
  ]
  assert tool.violations(_row(kernel='walk', serialised=True), bounds) == []
  assert 'no Pallas kernel was found' in tool.violations(_row() | {'kernels': []}, bounds)[0]
  failed = {'case': 'ssd pallas_x', 'shape': '8b-b1', 'error': 'ValueError: no'}
  assert tool.violations(failed, bounds) == ['ssd pallas_x at 8b-b1 did not compile: ValueError: no']


def test_table():
  xla = _row() | {'case': 'ssd xla', 'kernels': []}
  failed = {'case': 'ssd pallas_y', 'shape': '8b-b1', 'error': 'ValueError: no'}
  lines = tool.table([_row(smem=152608), xla, failed]).splitlines()
  assert lines[2] == '| ssd pallas_x | 8b-b1 | `ssd_forward` | 168 | 0 | 152,608 | 3 | 2 | 1.2 |'
  assert lines[3] == '| ssd xla | 8b-b1 | - | - | - | - | 3 | 2 | 1.2 |'
  assert lines[4].startswith('| ssd pallas_y | 8b-b1 | does not compile |')
  assert {line.count('|') for line in lines} == {10}


def test_exit_codes(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(tool, 'find_ptxas', lambda: None)
  assert tool.main(['ssd xla']) == 2
  assert 'pip install --no-deps jax-cuda13-plugin==' in capsys.readouterr().err
  monkeypatch.setattr(tool, 'missing', lambda: None)
  assert tool.main(['nonsense']) == 2
  assert "no case starts with 'nonsense'" in capsys.readouterr().err
  monkeypatch.setattr(tool, 'measure', lambda case, shape, ptxas: _row() | {'case': case, 'shape': shape})
  report = tmp_path / 'rows.json'
  assert tool.main(['ssd xla forward', '--shape=8b-b1', f'--json={report}']) == 0
  assert [row['case'] for row in json.loads(report.read_text())] == ['ssd xla forward']
  monkeypatch.setattr(tool, 'BOUNDS', {'ssd_forward': tool.Bound(smem=999)})
  assert tool.main(['ssd xla forward', '--shape=8b-b1']) == 1
  assert 'ssd_forward needs 1000 B of shared memory, 999 are allowed' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('case', ['ssd pallas_triton forward', 'ssd pallas_mosaic forward'])
def test_compiles_for_a_gpu_that_is_not_there(case):
  if importlib.util.find_spec('jax_cuda13_plugin') is None or tool.find_ptxas() is None:
    pytest.skip(tool.missing())
  row = tool.measure(case, '8b-b1', tool.find_ptxas())
  assert tool.violations(row, tool.BOUNDS) == []
  assert row['kernels'][0]['registers'] > 64 and row['kernels'][0]['smem'] > 10_000
