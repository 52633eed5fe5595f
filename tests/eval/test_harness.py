"""lm-evaluation-harness with a model of ours: request by request it gets what our own scorer gets from the same files."""

import sys

import numpy as np
import pytest
from eval.made import write_docs, write_run

from lmscale.errors import ConfigError
from lmscale.eval import evaluate
from lmscale.jobs import harness

PIQA = [{'goal': f'Open box {i}.', 'sol1': 'Turn it ' * i, 'sol2': 'Eat it. ', 'label': i % 2} for i in range(1, 6)]
NQ = [{'question': f'who wrote book {i} ', 'answer': ['Ann']} for i in range(3)]
TEXTS = [{'text': text} for text in ('x', 'To be, or not to be. ' * 5, 'é' * 20)]
YAML = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{file}.jsonl}}}}
test_split: test
task: ours_{file}
"""
TASKS = {  # in the words of lmscale/eval/tasks
  'piqa': """
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  'nq_open': """
output_type: generate_until
doc_to_text: "Question: {{question.strip()}}\\nAnswer:"
doc_to_target: "{{answer[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: exact_match}]
""",
  'text': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.setitem(sys.modules, 'lm_eval.models', None)
  assert harness.main() == 2
  assert capsys.readouterr().err == "error: the package lm_eval is not installed; install it with: pip install -e '.[eval]'\n"


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  pytest.importorskip('lm_eval')
  folder = tmp_path_factory.mktemp('harness')
  write_run(folder)
  for name, docs in (('piqa', PIQA), ('nq_open', NQ), ('text', TEXTS)):
    write_docs(folder / f'{name}.jsonl', docs)
    (folder / f'{name}.yaml').write_text(YAML.format(folder=folder, file=name) + TASKS[name])
  harness.register()
  return folder


def test_the_same_numbers_request_by_request(folder):
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  from lmscale.jobs.eval import open_scorer
  from lmscale.train.model_folder import folder_config

  found = simple_evaluate(
    model='lmscale', model_args=f'workdir={folder / "run"},context=64', batch_size=16, tasks=[f'ours_{name}' for name in TASKS],
    task_manager=TaskManager(include_defaults=False, include_path=str(folder)), bootstrap_iters=0,
  )  # fmt: skip
  model, _ = open_scorer(folder_config(folder / 'run'), folder / 'run', 64)
  for name in TASKS:
    asked = evaluate.prepare(name, model.tokenizer, evaluate.Options(folder))
    results = found['results'][f'ours_{name}']
    scores = evaluate.summarise(name, asked, evaluate.score_samples(model, asked))
    for theirs, ours in {'acc': 'acc', 'acc_norm': 'acc_norm', 'exact_match': 'em', 'bits_per_byte': 'bits_per_byte'}.items():
      assert f'{theirs},none' not in results or results[f'{theirs},none'] == pytest.approx(scores[ours], rel=1e-5)
    samples = sorted(found['samples'][f'ours_{name}'], key=lambda sample: sample['doc_id'])
    for sample, own in zip(samples, asked.samples, strict=True):
      answers = evaluate.ask(model, own.requests)
      for request, (got,), answer in zip(own.requests, sample['resps'], answers, strict=True):
        if name == 'nq_open':
          assert got == answer and sample['arguments'][0][0] == request.context
        else:
          assert np.ravel(got)[0] == pytest.approx(answer.logp, abs=1e-4)
      texts = [list(arguments) for arguments in sample['arguments']]
      if name == 'piqa':
        assert texts == [[request.context, request.text] for request in own.requests]
        assert [greedy for ((_, greedy),) in sample['resps']] == [answer.greedy for answer in answers]
  assert found['results']['ours_piqa']['acc,none'] in np.arange(6) / 5


def test_the_command_is_the_harness_s_with_one_more_model(folder, monkeypatch, capsys):
  from lm_eval import __main__ as theirs
  from lm_eval.api.registry import get_model, model_registry

  from lmscale.jobs.harness_model import HarnessModel

  ran = []
  monkeypatch.setattr(theirs, 'cli_evaluate', lambda: ran.append(get_model('lmscale')))
  assert harness.main() == 0 and ran == [HarnessModel] and 'hf' in model_registry
  for argument, message in (('', 'give workdir=RUN'), (f'workdir={folder}', 'has no checkpoints'), ('workdr=x', 'workdr unknown')):
    with pytest.raises(ConfigError, match=message):
      HarnessModel.create_from_arg_string(argument, {'device': 'cuda:0'})
  monkeypatch.setattr(theirs, 'cli_evaluate', lambda: HarnessModel(str(folder)))
  assert harness.main() == 2 and capsys.readouterr().err.startswith('error: ')


def test_texts_are_greedy():
  pytest.importorskip('lm_eval')
  from lmscale.jobs.harness_model import _writing

  assert _writing('a', {'until': 'x'}).until == ('x',) and _writing('a', {'do_sample': True, 'temperature': 0.0}).tokens == 256
  with pytest.raises(ConfigError, match='only greedy ones are compared'):
    _writing('a', {'do_sample': True, 'temperature': 0.5})
