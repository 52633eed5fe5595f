"""Every recipe is complete, documented, and says what the papers say."""

import ast
import itertools
import json
import math
import pathlib

import pytest

from lmscale import config as config_lib
from lmscale.config import Config, ConfigError, recipes, resolve_mesh, run_tokens
from lmscale.plan.parameters import parameter_count
from lmscale.train.schedule import Schedule

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
ARCHITECTURES = ('transformer', 'mamba', 'mamba2', 'hybrid')
STUDY = [
  f'mamba_study.py:arch={arch},size={size},context={context},recipe={recipe}'
  for arch, size, context, recipe in itertools.product(
    ARCHITECTURES, ('tiny', '130m', '800m', '8b'), ('4k', '16k', '32k', '128k'), ('1.1t', '3.5t')
  )
]
SIZES = ['1.7b', '3.6b', '7.5b', '18b', '39b', '76b', '145b', '310b', '530b', '1t', '22b', '175b', 'mtnlg']
GPT = [f'megatron_gpt.py:size={size}' for size in SIZES]


def load(spec: str) -> Config:
  return recipes.load(f'{CONFIGS}/{spec}')


def study(arch: str, size: str = '8b', context: str = '4k', recipe: str = '1.1t') -> Config:
  return load(f'mamba_study.py:arch={arch},size={size},context={context},recipe={recipe}')


@pytest.mark.parametrize('spec', ['quickstart.py', 'mamba_study.py', 'megatron_gpt.py', *GPT])
def test_recipes_validate(spec):
  assert load(spec).name.startswith(spec.partition('.')[0])


def test_every_combination_of_the_study_validates_under_its_own_name():
  assert len({load(spec).name for spec in STUDY}) == len(STUDY)


def warmup(spec: str, **changes: object) -> tuple[int, int]:
  """(warm-up, tokens of the run) of a recipe with the fields {section_field: value} set on the command line."""
  config = recipes.load(f'{CONFIGS}/{spec}', [(name.replace('__', '.'), str(value)) for name, value in changes.items()])
  return config.optimizer.warmup_tokens, run_tokens(config.train)


@pytest.mark.parametrize('spec', ['quickstart.py', 'mamba_study.py:size=tiny', 'megatron_gpt.py:size=1.7b', 'megatron_gpt.py:size=mtnlg'])
def test_a_shorter_run_has_a_shorter_warm_up_in_proportion(spec):
  whole, tokens = warmup(spec)
  steps = load(spec).train.steps
  assert warmup(spec, train__steps=steps, seed=1) == (whole, tokens)
  for fewer in (steps - 1, steps // 3, 12, 1):
    got, length = warmup(spec, train__steps=fewer)
    assert got == whole * length // tokens and got <= length
  assert warmup(spec, train__steps=2 * steps)[0] == whole  # as it is in the recipe: a share of it at most
  assert warmup(spec, train__steps=12, optimizer__warmup_tokens=1000)[0] == 1000
  assert warmup(spec, optimizer__warmup_tokens=0, train__steps=12)[0] == 0
  with pytest.raises(ConfigError, match='optimizer.warmup_tokens'):
    warmup(spec, train__steps=12, optimizer__warmup_tokens=10**12)


def test_what_shortens_a_run_beside_its_steps():
  assert warmup('quickstart.py', train__batch=8) == (10 * 16 * 256, 160 * 8 * 256)
  assert warmup('quickstart.py', train__seq_len=512)[0] == 20 * 16 * 256  # a longer run


def test_a_saved_config_is_a_recipe_too(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config_lib.to_dict(load('quickstart.py'))))
  config = recipes.load(str(tmp_path / 'config.json'), [('train.steps', '80')])
  assert config.optimizer.warmup_tokens == 10 * 16 * 256


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.name)
def test_docstrings_give_command_and_expectation(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert f'python run.py --config=configs/{path.name}' in text
  assert 'Expected' in text
  assert 'ours' in text


def test_quickstart():
  config = load('quickstart.py')
  assert 1e6 < parameter_count(config.model) < 3e6
  assert set(config.model.pattern) == {'M', '*', '-'}
  assert resolve_mesh(config, config.emulate).mesh.size == 8
  assert config.loop.checkpoint_every <= 10
  assert config.loop.eval_every and config.loop.sample_every
  assert {(s.kind, s.path) for s in config.data.sources} == {('stdlib', 'code'), ('stdlib', 'prose')}


@pytest.mark.parametrize(('path', 'name', 'kind'), [
  ('my.txt', 'my', 'text'), ('/a b/Über Land.2.txt', 'Über_Land', 'text'), ('books/', 'books', 'text'), ('c/*.txt.gz', 'text', 'text'),
  ('d.jsonl', 'd', 'jsonl'), ('e/f.jsonl.zst', 'f', 'jsonl'), ('x:y=1,2.txt', 'x_y_1_2', 'text'),
])  # fmt: skip
def test_own_text(path, name, kind):
  config = load(f'own_text.py:{path}')
  source, = config.data.sources
  assert (config.name, source.name, source.kind, source.path) == (name, name, kind, path)
  assert not config.emulate and config.loop.eval_every and 0 < config.data.validation < 0.2


def test_own_text_asks_for_the_text():
  with pytest.raises(ConfigError, match='which text.*--config=configs/own_text.py:my.txt'):
    load('own_text.py')


def test_architectures_of_the_study():
  """arXiv 2406.07887, section 2 and the public 8B scripts."""
  transformer, mamba, mamba2, hybrid = (study(arch).model for arch in ARCHITECTURES)
  assert transformer.pattern == '*-' * 32
  assert (transformer.attention.heads, transformer.attention.kv_heads) == (32, 32)
  assert (transformer.norm, transformer.mlp.activation) == ('layernorm1p', 'relu2')
  assert (transformer.positions, transformer.rope_fraction) == ('rope', 0.5)
  assert (mamba.pattern, mamba.mamba.state, mamba.mamba.dt_rank) == ('m' * 56, 128, 256)
  assert (mamba2.pattern, mamba2.mamba2.heads, mamba2.mamba2.groups) == ('M' * 56, 128, 8)
  assert hybrid.pattern == 'M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-'
  assert (hybrid.attention.kv_heads, hybrid.mlp.activation, hybrid.positions) == (8, 'gelu', 'none')
  for model in (mamba, mamba2, hybrid):
    assert (model.norm, model.positions) == ('rmsnorm', 'none')
  for model in (transformer, mamba, mamba2, hybrid):
    assert (model.d_model, model.vocab, model.tied, model.bias) == (4096, 256_000, False, False)
  assert study('hybrid', '800m').model.pattern == 'M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-'


@pytest.mark.parametrize(
  ('recipe', 'batch', 'rate', 'tokens'), [('1.1t', 256, 1e-4, 1.1e12), ('3.5t', 1024, 3e-4, 3.5e12)]
)
def test_recipe_of_the_study(recipe, batch, rate, tokens):
  config = study('hybrid', recipe=recipe)
  schedule = Schedule(config)
  assert (config.train.batch, config.train.seq_len) == (batch, 4096)
  assert schedule.total_tokens == pytest.approx(tokens, rel=1e-5)
  assert config.optimizer.warmup_tokens == 122_000 * 4096
  warm = 122_000 // batch
  assert schedule.inputs(warm).learning_rate == pytest.approx(rate, rel=1e-5)
  assert schedule.inputs(warm // 2).learning_rate == pytest.approx(rate / 2, rel=0.01)
  assert schedule.inputs(config.train.steps - 1).learning_rate == pytest.approx(rate / 10, rel=1e-6)
  o = config.optimizer
  assert (o.beta1, o.beta2, o.weight_decay, o.clip) == (0.9, 0.95, 0.1, 1.0)
  assert config.train.compute_dtype == 'bfloat16'


@pytest.mark.parametrize(('context', 'length'), [('16k', 16384), ('32k', 32768), ('128k', 131072)])
def test_long_context_is_50b_tokens_of_continued_training(context, length):
  config = study('hybrid', context=context)
  assert config.train.seq_len == length
  assert config.train.batch * length == 256 * 4096
  assert Schedule(config).total_tokens == pytest.approx(50e9, rel=1e-4)
  assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate) == pytest.approx((3e-5, 3e-6))


@pytest.mark.parametrize('size', ['tiny', '130m', '800m'])
def test_small_architectures_match_in_size_and_recipe(size):
  configs = [study(arch, size) for arch in ARCHITECTURES]
  counts = [parameter_count(config.model) for config in configs]
  assert max(counts) / min(counts) < (1.07 if size == 'tiny' else 1.01)
  assert len({(c.optimizer, c.train, c.data) for c in configs}) == 1
  if size == 'tiny':
    assert all(1e6 < count < 2e6 for count in counts)
    assert all(config.data.sources[0].kind == 'stdlib' for config in configs)


def test_mtnlg_recipe():
  """arXiv 2201.11990: 32 -> 1920 over 12B tokens, warm-up 1B, cosine to 10 % over 340B, 270B trained."""
  config = load('megatron_gpt.py:size=mtnlg')
  schedule = Schedule(config)
  assert schedule.total_tokens == pytest.approx(270e9, rel=1e-4)
  assert schedule.inputs(0).batch == 32
  steps = range(0, 30_000, 50)
  plans = [schedule.inputs(step) for step in steps]
  assert {plan.batch % 32 for plan in plans} == {0}
  before = [plan for plan in plans if plan.tokens < 11.9e9]
  after = [plan for plan in plans if plan.tokens > 12.1e9]
  assert before and max(plan.batch for plan in before) < 1920
  assert after and {plan.batch for plan in after} == {1920}
  assert max(plan.learning_rate for plan in plans) == pytest.approx(5e-5, rel=1e-3)
  assert config.optimizer.min_learning_rate == pytest.approx(5e-6)
  assert config.optimizer.decay_tokens == 340_000_000_000
  assert config.optimizer.warmup_tokens == 1_000_000_000
  last = schedule.inputs(config.train.steps - 1).learning_rate
  assert last == pytest.approx(5e-6 + 4.5e-5 * (1 + math.cos(math.pi * 269 / 339)) / 2, rel=1e-3)
  assert config.model.init_std == pytest.approx(0.00403, abs=1e-5)
  assert config.optimizer.beta2 == 0.95


def test_gpt_architecture():
  for spec in GPT:
    model = load(spec).model
    assert (model.norm, model.positions, model.max_positions) == ('layernorm', 'learned', 2048)
    assert (model.mlp.activation, model.bias, model.tied, model.vocab) == ('gelu_tanh', True, True, 51_200)
    assert model.mlp.d_ff == 4 * model.d_model
    assert model.attention.heads * model.attention.head_dim == model.d_model


@pytest.mark.parametrize(
  ('spec', 'detail'),
  [
    ('mamba_study.py:arch=mamba3', "arch: 'mamba3' is not one of hybrid, transformer, mamba, mamba2"),
    ('mamba_study.py:size=9b', "size: '9b' is not one of 8b"),
    ('mamba_study.py:context=8k', '4k, 16k, 32k, 128k'),
    ('mamba_study.py:tiny', "'tiny': not of the form key=value"),
    ('mamba_study.py:archi=mamba', 'known: arch=hybrid|transformer'),
    ('mamba_study.py:size=8b,size=tiny', 'size: given twice'),
    ('megatron_gpt.py:size=2t', '1.7b, 3.6b'),
    ('quickstart.py:fast', 'takes no argument'),
  ],
)
def test_wrong_arguments_name_what_is_allowed(spec, detail):
  with pytest.raises(ConfigError) as caught:
    load(spec)
  assert detail in str(caught.value)
