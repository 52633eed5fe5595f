"""A trained model as lm-evaluation-harness asks it. Imported by the harness, by the name that `harness.py` registers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from lmscale.errors import ConfigError
from lmscale.eval.requests import Continuation, Rolling, Writing
from lmscale.jobs.eval import open_scorer
from lmscale.train.model_folder import folder_config

TOKENS = 256  # that are generated where a task does not say how many


class HarnessModel(LM):
  """The model in the folder of a run, or of an import.

  workdir, context (tokens read at most; 0: train.seq_len): from --model_args. batch_size: the harness's, whose default is 1; that and
  `auto` stand for the config's generate.batch. Nothing but speed depends on it. The harness also gives a device (cuda:0 unless told
  otherwise) and max_batch_size: the model is on all devices that JAX sees, and nothing is tuned.

  Raises:
    ConfigError: as the job eval does.
  """

  def __init__(self, workdir: str = '', context: int = 0, batch_size: int | str = 1, **harness: Any):
    super().__init__()
    if unknown := harness.keys() - {'device', 'max_batch_size'}:
      raise ConfigError(f'--model_args: {", ".join(sorted(unknown))} unknown; there are workdir and context')
    if not workdir:
      raise ConfigError('--model_args: give workdir=RUN, the folder of a run')
    config = folder_config(workdir)
    if str(batch_size).isdecimal() and int(batch_size) > 1:
      config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, batch=int(batch_size)))
    self._model = open_scorer(config, workdir, context or config.train.seq_len)[0]

  @property
  def max_length(self) -> int:
    """Tokens that the model reads at most; tasks that make texts of a length ask for it."""
    return self._model.context

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether it is what would be generated) of (context, continuation)."""
    answers = self._model.continuations([Continuation(*request.args) for request in requests])
    return self._kept('loglikelihood', requests, [(answer.logp, answer.greedy) for answer in answers])

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Log-probability in nats of a text, each token predicted once."""
    answers = self._model.rolling([Rolling(*request.args) for request in requests])
    return self._kept('loglikelihood_rolling', requests, [answer.logp for answer in answers])

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """What is written behind a context, up to a stop string, which is left out."""
    return self._kept('generate_until', requests, self._model.write([_writing(*request.args) for request in requests]))

  def _kept(self, method: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
    """The answers, after the harness's cache has them (--use_cache)."""
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial(method, request.args, answer)
    return answers


def _writing(context: str, options: dict[str, Any]) -> Writing:
  """Raises ConfigError for what is not greedy."""
  if options.get('do_sample') and options.get('temperature', 1.0) != 0:
    raise ConfigError(f'a task asks for texts that are drawn ({options}); only greedy ones are compared: set do_sample=False by --gen_kwargs')
  until = options.get('until') or ()
  return Writing(context, (until,) if isinstance(until, str) else tuple(until), int(options.get('max_gen_toks', TOKENS)))
