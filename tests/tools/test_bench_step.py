"""The step benchmark, as far as it goes without torch. With it, the tool itself checks that both losses are equal."""

import sys

import bench_step


def test_without_torch_it_names_the_extra(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  assert bench_step.main([]) == 2
  assert capsys.readouterr().err == "error: torch is not installed here; install the extra `hf`: pip install -e '.[hf]'\n"


def test_report():
  report = {
    'threads': 2, 'load': 0.1, 'machine': 'x', 'versions': {'jax': '0'}, 'command': 'c', 'batch': 4, 'seq_len': 256,
    'repeats': 3, 'rows': [{'arch': 'hybrid', 'parameters': 1_645_000, 'losses': [5.0, 5.0], 'chunk': 64,
                            'seconds': {'lmscale': 0.1, 'transformers': 0.25}, 'samples': {}}],
  }  # fmt: skip
  assert bench_step.markdown(report).splitlines()[-1] == '| tiny hybrid | 1,645,000 | 100.0 | 250.0 (64) | 2.50x as fast |'


def test_the_recipe_fits_one_device():
  config = bench_step.our_config('hybrid', 4, 256)
  assert (config.mesh.size, config.train.batch, config.train.microbatch) == (1, 4, 4)
  assert config.model.pattern == 'M-M-M--*M-M-M-'
