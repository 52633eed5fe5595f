"""The command line: what people mistype, and what they get."""

import json
import pathlib

import pytest

import run
from lmscale import config as config_lib
from lmscale.exit_codes import USER_ERROR
from lmscale.jobs import train as train_job

QUICK = str(run.DEFAULT_CONFIG)
STUDY = str(run.DEFAULT_CONFIG.with_name('mamba_study.py'))
GPT = str(run.DEFAULT_CONFIG.with_name('megatron_gpt.py'))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  """Runs in an empty folder, so that whatever is created is seen."""
  folder = tmp_path / 'empty'
  folder.mkdir()
  monkeypatch.chdir(folder)
  return folder


def listing(folder: pathlib.Path) -> list[str]:
  return sorted(str(p) for p in folder.rglob('*'))


@pytest.mark.parametrize(
  ('argv', 'details'),
  [
    # row 1: unknown or misspelt keys, wrong types
    (['--config.train.stpes=3'], ['train.stpes', 'train.steps']),
    (['--config.steps=3'], ['steps', 'train.steps']),
    (['--config.model.mamba2.groops=3'], ['model.mamba2.groops', 'model.mamba2.groups']),
    (['--config.train.steps=3.5'], ['train.steps', 'an integer', '3.5']),
    (['--config.train.steps=64.0'], ['train.steps', 'an integer']),
    (['--config.train.steps=ten'], ['train.steps', 'an integer']),
    (['--config.train.steps='], ['train.steps', 'an integer']),
    (['--config.train.steps=1_0'], ['train.steps', 'an integer', '1_0']),
    (['--config.train.steps= 10'], ['train.steps', 'an integer', "' 10'"]),
    (['--config.train.steps=+10'], ['train.steps', 'an integer', '+10']),
    (['--config.train.steps=\uff11\uff10'], ['train.steps', 'an integer', '\uff11\uff10']),
    (['--config.train.steps=0x10'], ['train.steps', 'an integer', '0x10']),
    (['--config.train.steps=1e3'], ['train.steps', 'an integer', '1e3']),
    (['--config.train.steps=' + '9' * 5000], ['train.steps', '999']),
    (['--config.optimizer.learning_rate=1_0e-3'], ['optimizer.learning_rate', 'a number', '1_0e-3']),
    (['--config.optimizer.learning_rate=3e-4 '], ['optimizer.learning_rate', 'a number', "'3e-4 '"]),
    (['--config.optimizer.learning_rate=\u0663'], ['optimizer.learning_rate', 'a number']),
    (['--config.optimizer.learning_rate=infinity'], ['optimizer.learning_rate', 'a number', 'infinity']),
    (['--config.optimizer.learning_rate=fast'], ['optimizer.learning_rate', 'a number']),
    (['--config.mesh.sequence_parallel=yes'], ['mesh.sequence_parallel', 'true or false']),
    (['--config.train=3'], ['train', 'a group of fields']),
    (['--config.train.steps.more=3'], ['train.steps.more', 'no such field']),
    (['--config.data.sources=code'], ['data.sources', 'JSON list']),
    (['--config.data.sources.5.weight=1'], ['data.sources.5', 'there are 2']),
    (['--config.train.steps'], ['--config.train.steps', 'no value']),
    # row 2: stray words and flags
    (['train.steps=3'], ['train.steps=3', '--config.train.steps=3']),
    (['configs/quickstart.py'], ['configs/quickstart.py', 'flags']),
    (['--confg=x.py'], ['--confg', '--config']),
    (['--jsn'], ['--jsn', '--json']),
    (['--job=pln'], ['--job', 'plan']),
    (['--json'], ['--json', '--job=plan']),
    (['--svg=a.svg'], ['--svg', '--job=plan']),
    (['--job=plan', '--svg=a.svg'], ['--svg', 'mesh.pipe is 1']),
    (['--job=plan', '--svg=nowhere/a.svg', '--config.mesh.pipe=2'], ['--svg', 'nowhere/a.svg', 'No such file']),
    (['--workdir'], ['--workdir']),
    # row 3: negative, zero, not finite, beyond the run
    (['--config.train.steps=-5'], ['train.steps', '-5']),
    (['--config.train.steps', '-5'], ['train.steps', '-5']),
    (['--config.train.batch=0'], ['train.batch', '0']),
    (['--config.train.seq_len=-1'], ['train.seq_len', '-1']),
    (['--config.model.vocab=0'], ['model.vocab', '0']),
    (['--job=plan', '--config.model.d_model=99999999999999999999'], ['model.d_model', 'more than 67108864']),
    (['--job=plan', '--config.model.mamba2.head_dim=1000000007'], ['model.mamba2.head_dim', 'more than 67108864']),
    (['--job=plan', '--config.train.seq_len=99999999999999999999'], ['train.seq_len', 'more than 67108864']),
    (['--config.optimizer.learning_rate=nan'], ['optimizer.learning_rate', 'nan']),
    (['--config.optimizer.learning_rate=inf'], ['optimizer.learning_rate', 'inf']),
    (['--config.optimizer.learning_rate=-1'], ['optimizer.learning_rate', '-1']),
    (['--config.optimizer.warmup_tokens=999999999'], ['optimizer.warmup_tokens', '999999999', 'train.steps']),
    (['--config.train.steps=1', '--config.optimizer.warmup_tokens=4097'], ['optimizer.warmup_tokens', '4097', 'train.steps 1']),
    (['--config.train.steps=1', '--config.mesh.data=-2'], ['mesh.data', '-2']),
    # row 4: the model's arithmetic
    (['--config.model.pattern=M-X'], ['model.pattern', "'X' at position 2"]),
    (['--config.model.attention.kv_heads=3'], ['model.attention.kv_heads', '3', '4']),
    (['--config.model.mamba2.groups=3'], ['model.mamba2.groups', '3', '8']),
    (['--config.model.vocab=256'], ['model.vocab', '257', 'bytes']),
    # row 5: the mesh and the batch
    (['--config.mesh.data=3'], ['mesh', '3 * tensor 2 = 6', '8 devices', 'mesh.data=4']),
    (['--config.mesh.tensor=3', '--config.mesh.data=-1'], ['mesh', '8 devices', 'mesh.tensor=2']),
    (['--config.mesh.pipe=2'], ['pipe 2', '8 devices', 'mesh.data=2']),
    (['--config.train.batch=24', '--config.train.microbatch=4'], ['train.batch', '24', '4 * mesh.data 4 = 16', '16 or 32']),
    ([f'--config={GPT}:size=1t'], ['mesh.pipe', '64']),
    (['--job=plan', '--config.mesh.tensor=16'], ['mesh.tensor', '16', 'model.attention.heads 4']),
    # files
    (['--config=nowhere.py'], ['nowhere.py', 'no file']),
    (['--config=nowhere.json'], ['nowhere.json', 'no file']),
    ([f'--config={STUDY[:-4]}e.py'], ['mamba_stude.py', 'mamba_study.py']),
    (['--config=.'], ['folder']),
    (['--config=/dev/null'], ['/dev/null']),
    ([f'--config={STUDY}:arch=rnn'], ['arch', 'rnn', 'hybrid, transformer']),
    ([f'--config={QUICK}:small'], ['no argument', 'small']),
    ([f'--config={STUDY}:arch=mamba2', '--config.mesh.tensor=8'], ['data', 'path', 'empty']),
    (['--compile'], ['--compile', '--job=plan']),
    (['--job=plan', '--compile=H300'], ['--compile', 'H300', 'cpu, A100, H100, H200, v5p']),
    (['--suggest=8'], ['--suggest', '--job=plan']),
    (['--job=plan', '--suggest=8'], ['--suggest', 'float32', 'bfloat16']),
    (['--job=plan', '--suggest=0'], ['--suggest', '0 devices']),
    (['--job=plan', '--hardware=V100'], ['--hardware', 'V100', 'A100, H100, H200, v5p, all']),
    (['--config.data.sources.0.kind=text', '--config.data.sources.0.path=no.txt'], ['data.sources.0', 'no.txt']),
  ],
)
def test_a_mistake_is_one_line_and_nothing_is_created(argv, details, capsys, empty_folder):
  assert run.main([*argv, '--config.data.cache=cache'] if 'no.txt' in str(argv) else argv) == 2
  out, err = capsys.readouterr()
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  for detail in details:
    assert detail in err
  assert 'Traceback' not in out + err
  assert not listing(empty_folder)


RECIPE = 'from lmscale import config as c\ndef get_config():\n  x = c.to_config_dict(c.Config())\n'


@pytest.mark.parametrize(
  ('name', 'text', 'details'),
  [
    ('typo.py', RECIPE + '  x.train.stpes = 3\n  return x\n', ['typo.py:4', 'stpes', 'steps']),
    ('type.py', RECIPE + '  x.train.steps = 3.5\n  return x\n', ['type.py:4', 'steps']),
    ('syntax.py', 'def get_config(:\n', ['syntax.py:1', 'SyntaxError']),
    ('import.py', 'import not_a_package\n', ['import.py:1', 'not_a_package']),
    ('bug.py', RECIPE + '  return x / 0\n', ['bug.py:4', 'TypeError']),
    ('none.py', 'x = 1\n', ['none.py', 'get_config']),
    ('number.py', 'def get_config():\n  return 3\n', ['number.py', 'int']),
    ('zero.py', RECIPE + '  x.train.steps = 0\n  return x\n', ['train.steps', '0']),
    ('broken.json', '{"seed": ', ['broken.json', 'JSON']),
    ('list.json', '[1]', ['list.json', 'list']),
    ('key.json', '{"sed": 1}', ['sed', 'seed']),
    ('deep.json', '[' * 100_000, ['deep.json']),
    ('binary.json', '\x00\x01', ['binary.json']),
    ('nan.json', '{"optimizer": {"learning_rate": NaN}}', ['optimizer.learning_rate', 'nan']),
    ('recipe.txt', 'hello', ['recipe.txt', '.json']),
  ],
)
def test_a_bad_file_is_named(name, text, details, capsys, tmp_path, empty_folder):
  (tmp_path / name).write_text(text)
  assert run.main([f'--config={tmp_path / name}']) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  for detail in details:
    assert detail in err
  assert not listing(empty_folder)


def test_debug_shows_the_traceback(capsys):
  assert run.main(['--config.seed=-1', '--debug']) == 2
  err = capsys.readouterr().err
  assert 'Traceback' in err
  assert err.splitlines()[-1] == 'error: seed: -1 is less than 0'


def test_control_characters_do_not_reach_the_terminal(capsys):
  assert run.main(['--config.name=a\x1b[31m\nb']) == 2
  err = capsys.readouterr().err
  assert '\x1b' not in err
  assert err.count('\n') == 1


def test_several_lines_of_an_error_become_one(capsys, monkeypatch):
  def refuse(*args: object) -> int:
    raise config_lib.ConfigError('other settings:\n  seed: 0 -> 1\n  name: a -> b')

  monkeypatch.setattr(train_job, 'run', refuse)
  assert run.main([]) == 2
  assert capsys.readouterr().err == 'error: other settings: seed: 0 -> 1; name: a -> b\n'


@pytest.mark.parametrize(
  ('package', 'advice'), [('lm_eval', '.[eval]'), ('torch', '.[hf]'), ('optax', 'make install')]
)
def test_a_missing_package_names_its_extra(package, advice, capsys, monkeypatch):
  def missing(*args: object) -> int:
    raise ModuleNotFoundError(f'No module named {package!r}', name=f'{package}.models')

  monkeypatch.setattr(train_job, 'run', missing)
  assert run.main([]) == 2
  err = capsys.readouterr().err
  assert package in err
  assert advice in err


def test_an_interruption_before_the_loop_shows_no_traceback(capsys, monkeypatch):
  def interrupt(*args: object) -> int:
    raise KeyboardInterrupt

  monkeypatch.setattr(train_job, 'run', interrupt)
  assert run.main([]) == 75
  err = capsys.readouterr().err
  assert 'run the same command again' in err and err.count('\n') == 1


def test_our_own_missing_module_is_a_bug_not_a_user_error(monkeypatch):
  def missing(*args: object) -> int:
    raise ModuleNotFoundError('No module named lmscale.nothing', name='lmscale.nothing')

  monkeypatch.setattr(train_job, 'run', missing)
  with pytest.raises(ModuleNotFoundError):
    run.main([])


@pytest.mark.parametrize('workdir', ['file', 'file/below'])
def test_a_workdir_that_cannot_be_a_folder(workdir, capsys, tmp_path):
  (tmp_path / 'file').write_text('')
  assert run.main([f'--workdir={tmp_path / workdir}']) == 2
  assert 'file, not a folder' in capsys.readouterr().err


def test_a_wrong_init_from_makes_no_folder(capsys, tmp_path):
  argv = [f'--workdir={tmp_path / "new"}', f'--config.train.init_from={tmp_path}', f'--config.data.cache={tmp_path}']
  assert run.main(argv) == USER_ERROR
  assert 'train.init_from' in capsys.readouterr().err and not (tmp_path / 'new').exists()


@pytest.mark.parametrize(('argv', 'folder'), [([], 'runs/quickstart'), (['--workdir='], 'runs/quickstart'),
                                              (['--config.name=mine'], 'runs/mine'), (['--workdir=here'], 'here')])  # fmt: skip
def test_a_run_is_kept_in_a_folder_of_its_own(argv, folder, monkeypatch, capsys):
  def seen(where: pathlib.Path) -> None:
    raise config_lib.ConfigError(f'seen {where}')

  monkeypatch.setattr(train_job, 'check_folder', seen)
  assert run.main(argv) == 2 and capsys.readouterr().err == f'error: seen {folder}\n'


def test_plan_prints_json(capsys, empty_folder):
  argv = ['--job=plan', '--json', f'--config={STUDY}:arch=hybrid', '--config.mesh.data=16', '--config.mesh.zero=2']
  assert run.main(argv) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['parameters']['total'] == 8_654_517_248
  assert report['devices'] == 16 * 4
  assert report['mesh']['zero'] == 2
  assert not listing(empty_folder)


def test_plan_counts_an_open_data_axis_as_one(capsys):
  assert run.main(['--job=plan', f'--config={GPT}:size=530b']) == 0
  out = capsys.readouterr().out
  assert '529,600,' in out
  assert 'pipe 35 * data 1 * tensor 8' in out


def test_a_saved_config_is_read_back_and_overridden(capsys, tmp_path):
  saved = tmp_path / 'config.json'
  run.main(['--job=plan', '--json'])
  quick = json.loads(capsys.readouterr().out)
  saved.write_text(json.dumps(config_lib.to_dict(run.recipes.load(QUICK))))
  assert run.main(['--job=plan', '--json', f'--config={saved}']) == 0
  assert json.loads(capsys.readouterr().out) == quick
  argv = ['--config.train.steps', '40', '--config.data.sources.1.weight=0.5', '--config.mesh.sequence_parallel=True']
  flags, overrides = run.parse_flags([f'--config={saved}', *argv])
  config = run.recipes.load(flags.config, overrides)
  assert (config.train.steps, config.data.sources[1].weight, config.mesh.sequence_parallel) == (40, 0.5, True)


@pytest.mark.parametrize(('text', 'value'), [('false', False), ('False', False), ('true', True)])
def test_booleans(text, value):
  assert run.recipes.load(QUICK, [('mesh.sequence_parallel', text)]).mesh.sequence_parallel is value


@pytest.mark.parametrize(('text', 'value'), [('3e-4', 3e-4), ('1', 1.0), ('.5', 0.5), ('2.', 2.0), ('1E-3', 1e-3), ('0010', 10.0)])
def test_numbers(text, value):
  assert run.recipes.load(QUICK, [('optimizer.learning_rate', text), ('optimizer.min_learning_rate', '0')]).optimizer.learning_rate == value
  if value == 10:
    assert run.recipes.load(QUICK, [('train.steps', text)]).train.steps == 10


def test_sources_can_be_given_as_json():
  text = '[{"name": "mine", "kind": "text", "path": "a.txt"}]'
  config = run.recipes.load(QUICK, [('data.sources', text)])
  assert [(s.name, s.weight) for s in config.data.sources] == [('mine', 1.0)]


def test_help_is_readable(capsys):
  with pytest.raises(SystemExit) as stopped:
    run.main(['--help'])
  assert stopped.value.code == 0
  out = capsys.readouterr().out
  for flag in ('--config', '--job', '--workdir', '--json', '--debug'):
    assert flag in out
  assert max(map(len, out.splitlines())) < 120


def test_train_hands_the_loop_what_it_needs(capsys, monkeypatch, tmp_path):
  """The whole path to the first step, with the loop and the program replaced."""
  from lmscale.train import loop, program

  seen = {}

  def train(config, made, loader, held_out, workdir, flops, tokenizer, reference, began, evaluations):
    workdir.record()
    assert evaluations.score
    seen.update(config=config, flops=flops, reference=reference, rows=loader.batch(0, range(2))['tokens'].shape)
    return 75

  monkeypatch.setattr(loop, 'train', train)
  monkeypatch.setattr(program, 'Program', lambda config: config.mesh)
  text = tmp_path / 'a.txt'
  text.write_text('the quick brown fox\n' * 2000)
  source = json.dumps([{'name': 'fox', 'kind': 'text', 'path': str(text)}])
  argv = [
    f'--config.data.sources={source}',
    f'--config.data.cache={tmp_path / "cache"}',
    '--config.loop.eval_every=0',
    '--config.eval.every=9',
    '--config.eval.tasks=["copy"]',
  ]
  assert run.main([*argv, f'--workdir={tmp_path / "run"}']) == 75
  assert seen['config'].mesh.size == 8
  assert seen['rows'] == (2, 256)
  assert 0 < seen['reference'] < 5
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['seed'] == 0
  out = capsys.readouterr().out
  for word in ('parameters', 'FLOPs per token', 'bytes per device', 'data fox', 'workdir'):
    assert word in out
