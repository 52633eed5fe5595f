"""The Colab notebook runs from top to bottom, on the code of this clone, and nothing of anybody's machine is stored in it."""

import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'colab.ipynb'


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs_and_paths(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    assert not cell.get('outputs') and cell.get('execution_count') is None
    assert not re.search(r'''['" (](/|~/|[A-Z]:\\)\w''', cell.source), cell.source
  assert set(notebook.metadata) <= {'kernelspec', 'language_info', 'colab'}
  text = NOTEBOOK.read_text(encoding='utf-8')
  assert 'lmscale' in text and str(ROOT) not in text and str(pathlib.Path.home()) + '/' not in text


def test_it_copies_nothing(notebook):
  code = '\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'code')
  assert 'from lmscale.train.program import Program' in code and 'run.main(' in code
  assert 'flax' not in code and 'optax' not in code


def test_it_runs(notebook, tmp_path, monkeypatch):
  for cell in notebook.cells:
    cell.source = cell.source.replace('STEPS = 60', 'STEPS = 4')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('LMSCALE_CACHE', str(ROOT / '.cache' / 'lmscale'))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', jax.config.jax_compilation_cache_dir)
  monkeypatch.delenv('JAX_PLATFORMS')  # the notebook chooses for itself
  client = NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}})
  client.execute()
  text = [''.join(out.get('text', '') for out in cell.get('outputs', ())) for cell in notebook.cells]
  whole = '\n'.join(text)
  assert 'exit code 0' in whole and 'Traceback' not in whole
  assert "axes: {'pipe': 1, 'data': 4, 'tensor': 2}" in whole and 'tensor 1 = cpu:7' in whole
  assert re.search(r"layers/0/\S+ +\(.*\) +\(.*\) +\S*\(.*'data'", whole)
  pictures = [kind for cell in notebook.cells for out in cell.get('outputs', ()) for kind in out.get('data', ())]
  assert 'image/svg+xml' in pictures and 'image/png' in pictures
  sizes = [int(n.replace(',', '')) for n in re.findall(r'ZeRO \d: +([\d,]+) bytes', whole)]
  assert sizes[0] > 3 * sizes[1]
  assert {p.name for p in tmp_path.iterdir()} <= {'runs', 'ipython', '.ipython'}
  assert (tmp_path / 'runs' / 'notebook' / 'samples.txt').exists()
