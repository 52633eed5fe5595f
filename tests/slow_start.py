"""run.py with a small model, as a program whose start stands still where PAUSE says: tokenise or step. It then prints HERE.

It stands still in a call of C that no signal interrupts, as a compilation does.
"""

import ctypes
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).parents[1]


def stand_still(*args: object) -> None:
  print('HERE', file=sys.stderr, flush=True)
  lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
  while True:
    libc.pthread_mutex_lock(lock)  # the second time it never returns


if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  import test_wrong_inputs

  from lmscale.data.tokenizer import ByteTokenizer

  test_wrong_inputs.program.Program = test_wrong_inputs.Small
  pause = os.environ['PAUSE']
  if pause == 'tokenise':
    ByteTokenizer.encode_batch = stand_still
  if pause == 'step':
    test_wrong_inputs.Small.step = stand_still
  sys.argv[0] = str(ROOT / 'run.py')
  runpy.run_path(sys.argv[0], run_name='__main__')
