"""The training loop: resume or start, then step, log, evaluate, sample, save, score tasks.

The same command again goes on where the last checkpoint was taken, and what it computes and logs is what an
uninterrupted run would have: plans and batches are functions of the step number, and metrics.jsonl is on disk up to a
checkpoint before the checkpoint commits, and cut back to it on resume.

`train` returns the process's exit code. One SIGINT or SIGTERM finishes the step, saves and ends; a second one ends at once, and
so does, before the first step, the first (`processes/interrupt.py`).

Of several processes each runs this same loop, in step with the others: whatever touches the state is done by all, and what
is done next follows from the step number, the metrics or `processes.stop_after`, which all see alike. The first alone
prints and writes.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from lmscale import processes
from lmscale.config import Config
from lmscale.data.prefetch import prefetch
from lmscale.exit_codes import AGAIN, DIVERGED, DONE, KILLED
from lmscale.plan.devices import device_peak_flops
from lmscale.processes.interrupt import Interrupt
from lmscale.train import resume
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.console import Console, printable, quantity
from lmscale.train.goodput import Goodput
from lmscale.train.metrics import MetricsWriter, plot_loss, read_metrics
from lmscale.train.schedule import Schedule, StepInputs
from lmscale.train.scores import Schedule as Evaluations
from lmscale.train.spikes import TIMES
from lmscale.train.workdir import Workdir

SKIPPED = {  # why a step may be skipped, as counted in metrics: (the field of `train` that is the budget, what such steps were)
  'skipped': ('nonfinite_budget', 'were not finite'),
  'spikes': ('spike_budget', 'had a gradient norm far above the usual'),
}


def train(
  config: Config,
  program: Any,
  loader: Any,
  val_loader: Any,
  workdir: Workdir,
  flops_per_token: float,
  tokenizer: Any = None,
  reference: float | None = None,
  began: float | None = None,
  evaluations: Evaluations | None = None,
) -> int:
  """Trains to config.train.steps and returns an exit code (`exit_codes.py`).

  program: see `train.program.Program`. loader, val_loader: rows by sample number; `loader.identity` (JSON) says which
  data they are. tokenizer: for samples; None where loop.sample_every is 0. reference: a loss to compare
  with, in nats per token (the order-1 entropy). began: when the process started, on the clock of `time.monotonic`.
  evaluations: of config.eval; None where eval.every is 0.

  Raises:
    ConfigError: the run may not go on, or not start from train.init_from: see `train.resume`.
  """
  schedule, goodput = Schedule(config), Goodput(began)
  peak = device_peak_flops(jax.devices()[0].device_kind, config.train.compute_dtype)
  peak = peak and peak * jax.device_count()
  with processes.interrupts() as interrupt, Checkpointer(workdir.checkpoints, config.loop.keep) as checkpoints:
    with goodput.spent_on('startup' if checkpoints.latest() is None else 'restore'):
      state, start, notes = resume.begin(config, program, loader.identity, workdir, checkpoints)
    complete = start >= schedule.steps
    if complete:
      interrupt.begin()
    first = processes.is_first()
    if first:
      workdir.record()
      goodput.resume(workdir.path, start)
    with (
      MetricsWriter(workdir.path, start) if first else contextlib.nullcontext() as writer,
      open(os.devnull, 'w') as nowhere,
      Console(
        schedule.steps, min(start, schedule.steps), flops_per_token, peak, stream=None if first else nowhere
      ) as console,
    ):
      for note in notes:
        console.say(note)
      if start:
        more = ', beyond train.steps: nothing is left to do' if start > schedule.steps else ''
        console.say(f'{"complete" if complete else "going on"}: {workdir.path} is at step {start} of {schedule.steps}{more}')
      run = Run(config, program, loader, val_loader, tokenizer, schedule, checkpoints, writer, console, goodput, interrupt,
                workdir.path, evaluations)  # fmt: skip
      with goodput.spent_on('steps'):
        code = run.steps(state, start)
      with goodput.spent_on('saving'):
        checkpoints.wait()
      if code == DONE and first:
        with goodput.spent_on('other'):
          _finish(console, workdir, reference)
      if first:
        goodput.record(workdir.path, checkpoints.latest() or 0)
        console.end()
        console.say(goodput.describe())
  return code


class Stopped(Exception):
  """The run is told to stop while it scores tasks."""


@dataclasses.dataclass
class Run:
  """The loop with what it reads from and writes to."""

  config: Config
  program: Any
  loader: Any
  val_loader: Any
  tokenizer: Any
  schedule: Schedule
  checkpoints: Checkpointer
  writer: MetricsWriter | None  # on the first process
  console: Console
  goodput: Goodput
  interrupt: Interrupt
  path: pathlib.Path
  evaluations: Evaluations | None
  moments: int = 0  # at which it was asked whether to stop: a clock that all processes share
  clock: 'Clock' = dataclasses.field(default_factory=lambda: Clock())
  unlabelled: int = 0  # steps of this start in which no label counted

  def steps(self, state: Any, start: int) -> int:
    """Steps from `start` to the end; returns an exit code. What an earlier start did not get to score comes first.

    The order matters. A step's metrics are read after the next step is dispatched, so that the device does not wait for
    the host (unless they are there at once: then reading them now times the step right); but before anything else is
    done with the state, they are read, checked and logged. When they are read differs from process to process; whether
    they end the run is acted on at one place in all: after the next step is dispatched, or before something else is done.
    """
    if start and not self.score(state, start):
      return self.stopped(start)
    if start >= self.schedule.steps:
      return DONE
    unread, going_on = None, True
    self.console.say('compiling the step')
    batches = _batches(self.program, self.loader, self.schedule, start)
    for inputs, batch in self.goodput.waiting(batches):
      state, metrics = self.program.step(state, batch)
      self.interrupt.begin()
      if unread:
        going_on = self.log(*unread)
      if not going_on:
        return DIVERGED
      unread = inputs, metrics
      done = inputs.step + 1
      stop = self.told_to_stop()
      due = stop or done == self.schedule.steps or any(self.due(every, done) for every in self.intervals)
      if not due and not metrics['loss'].is_ready():
        continue
      going_on = self.log(*unread, state if self.due(self.config.loop.eval_every, done) else None)
      unread = None
      if not due:
        continue
      if not going_on:
        return DIVERGED
      if self.due(self.config.loop.sample_every, done):
        self.sample(state, done)
      if self.config.loop.checkpoint_every and (stop or self.due(self.config.loop.checkpoint_every, done)):
        self.save(state, inputs, wait=stop)
      if stop and done < self.schedule.steps:
        return self.stopped(done)
      if not self.score(state, done):
        if self.config.loop.checkpoint_every:
          self.save(state, inputs, wait=True)
        return self.stopped(done)
      self.clock.restart()
    return DONE

  @property
  def intervals(self) -> tuple[int, ...]:
    """How often something other than logging is done with the state."""
    loop = self.config.loop
    return loop.eval_every, loop.sample_every, loop.checkpoint_every, self.config.eval.every

  def told_to_stop(self) -> bool:
    """Whether to stop here. Of several processes all ask at the same places, and stop at the same one."""
    self.moments += 1
    return processes.stop_after(self.moments, self.interrupt.requested)

  def due(self, every: int, done: int) -> bool:
    """Whether something done `every` steps (0: never) and at the end is due after `done` steps."""
    return bool(every) and (done % every == 0 or done == self.schedule.steps)

  def log(self, inputs: StepInputs, metrics: dict[str, jax.Array], evaluated: Any = None) -> bool:
    """Reads and writes a step's metrics, with the validation loss of state `evaluated`; False if the run must stop."""
    values = jax.device_get(metrics)
    tokens = inputs.batch * self.config.train.seq_len
    self.clock.add(tokens)
    done, ok = inputs.step + 1, bool(values['ok'])
    learned = bool(values['tokens'])  # otherwise loss and norm are sums of nothing
    loss, norm = (float(values[name]) if learned else math.nan for name in ('loss', 'grad_norm'))
    line = {'step': done, 'tokens': inputs.tokens + tokens, 'loss': loss, 'grad_norm': norm, 'learning_rate': inputs.learning_rate}
    left = self.schedule.total_tokens - line['tokens']
    self.console.step(done, line, self.clock.rate, left / self.clock.rate if self.clock.rate else None)
    within_budget = self.judge(inputs, line, values) if learned else self.pass_over(inputs, line)
    if evaluated is not None and within_budget:
      with self.goodput.spent_on('evaluation'):
        line |= self.evaluate(evaluated, done)
    if self.writer and (self.due(self.config.loop.log_every, done) or evaluated is not None or not ok):
      line |= {'tokens_per_second': self.clock.interval(), 'data_wait': self.goodput.since_last('data_wait')}
      self.writer.write({**line, 'seconds': {kind: round(s, 3) for kind, s in self.goodput.seconds().items()}})
    return within_budget

  def judge(self, inputs: StepInputs, line: dict[str, Any], values: dict[str, Any]) -> bool:
    """Reports a step that was skipped, in `line` too, or that is a spike; False once a budget of skipped steps is used up."""
    norm, usual = line['grad_norm'], float(values['usual_norm'])
    samples = f'its samples are {inputs.first_sample}..{inputs.first_sample + inputs.batch - 1}'
    spike = f'step {inputs.step + 1}: gradient norm {norm:.3g} is {norm / usual if usual else 0:.3g} times the median of the steps before'
    if values['ok']:
      if usual and norm > TIMES * usual:
        clip = self.config.optimizer.clip
        bounds = f'optimizer.clip {clip:g} bounds it' if clip else 'optimizer.clip 0 does not bound it'
        self.console.say(f'{spike}; {samples} ({bounds}, train.spike_skip can skip such steps)')
      return True
    finite = math.isfinite(line['loss']) and math.isfinite(norm)
    kind = 'spikes' if finite else 'skipped'
    why = spike if finite else f'step {inputs.step + 1}: loss or gradient is not finite'
    count, (field, were) = int(values[kind]), SKIPPED[kind]
    given = getattr(self.config.train, field)
    budget = max(1, given)
    line |= {kind: count, 'first_sample': inputs.first_sample, 'batch': inputs.batch}
    self.console.say(f'{why}, step skipped ({count} of at most {budget}); {samples}')
    if count < budget:
      return True
    at = self.checkpoints.latest()
    kept = 'there is no checkpoint' if at is None else f'the last checkpoint is of step {at}'
    self.console.say(
      f'stopped: {count} steps {were} (train.{field} {given}); {kept}. A lower optimizer.learning_rate or a longer warm-up usually helps'
    )
    return False

  def pass_over(self, inputs: StepInputs, line: dict[str, Any]) -> bool:
    """Reports, in `line` too, a step in which no label counts; the run goes on. The more there are, the rarer it is said."""
    line |= {'first_sample': inputs.first_sample, 'batch': inputs.batch}
    self.unlabelled += 1
    if self.unlabelled.bit_count() == 1:
      self.console.say(
        f'step {inputs.step + 1}: no label counts (documents of one token have none), so there is no loss and nothing changes '
        f'({self.unlabelled} such steps so far); its samples are {inputs.first_sample}..{inputs.first_sample + inputs.batch - 1}'
      )
    return True

  def evaluate(self, state: Any, done: int) -> dict[str, float | None]:
    """The validation loss in nats per token, and in bits per byte of text where the texts are known; None where no label counts."""
    loss, labels = self.program.evaluate(state, self.val_loader, self.config.loop.eval_samples)
    if not labels:
      self.console.say(f'step {done}: no label of the validation samples counts, so there is no validation loss')
      return {'val_loss': None, 'val_bits_per_byte': None}
    per_token = self.val_loader.bytes_per_token(self.config.loop.eval_samples) if processes.is_first() else None
    bits = loss / math.log(2) / per_token if per_token else None
    self.console.say(f'step {done}: validation loss {loss:.4f}' + (f', {bits:.4f} bits per byte' if bits is not None else ''))
    return {'val_loss': loss, 'val_bits_per_byte': bits}

  def score(self, state: Any, done: int) -> bool:
    """Sees to it that the tasks which are due after `done` steps are scored; False where it is told to stop before they are.

    It comes after the save, and takes a batch at a time: what a killed run has not scored the next start does, from `steps`.
    """
    if self.evaluations is None or not self.due(self.config.eval.every, done):
      return True

    def between() -> None:
      if self.told_to_stop():
        raise Stopped

    with self.goodput.spent_on('evaluation'):
      try:
        self.evaluations.score(self.program, state, self.path / 'eval' / str(done), between, self.console.say)
      except Stopped:
        return False
    return True

  def sample(self, state: Any, done: int) -> None:
    """Writes a sampled text to samples.txt and shows it."""
    loop = self.config.loop
    prompt = [int(i) for i in self.tokenizer.encode(loop.sample_prompt)] or [self.tokenizer.end]
    with self.goodput.spent_on('other'):
      tokens = self.program.generate(
        state, prompt, loop.sample_tokens, loop.temperature, self.config.seed + done, self.tokenizer.size
      )
    text = printable(loop.sample_prompt + self.tokenizer.decode(tokens))
    if self.writer:
      self.writer.sample(done, text)
    self.console.say(f'step {done}: sample\n{text}\n')

  def save(self, state: Any, inputs: StepInputs, wait: bool) -> None:
    """Starts a checkpoint; the log up to this step is on disk first."""
    if self.writer:
      self.writer.flush()
    meta = resume.about(self.config, inputs, self.loader.identity)
    with self.goodput.spent_on('saving'):
      self.checkpoints.save(inputs.step + 1, self.program.stored(state), meta, wait, self.program.index)

  def stopped(self, done: int) -> int:
    """Says how an interrupted run ended."""
    if self.config.loop.checkpoint_every:
      self.console.say(f'stopped and saved at step {done}: run the same command again to go on')
      return AGAIN
    self.console.say(f'stopped at step {done}; nothing is saved because loop.checkpoint_every is 0')
    return KILLED


def _batches(program: Any, loader: Any, schedule: Schedule, start: int) -> Iterator[tuple[StepInputs, Any]]:
  """The plans from step `start` with their device batches, which a thread prepares ahead."""
  plans = map(schedule.inputs, range(start, schedule.steps))
  return prefetch((inputs, program.batch(inputs, loader)) for inputs in plans)


def _finish(console: Console, workdir: Workdir, reference: float | None) -> None:
  """Draws the loss and says how the run went and where its files are."""
  console.end()
  lines = read_metrics(workdir.path / 'metrics.jsonl')
  plot_loss(workdir.path, reference)
  if lines:
    loss = 'no training loss' if lines[-1]['loss'] is None else f'training loss {lines[-1]["loss"]:.4f}'
    console.say(f'finished: step {lines[-1]["step"]}, {quantity(lines[-1]["tokens"])}tokens, {loss}')
  if validation := [line for line in lines if line.get('val_loss') is not None]:
    loss, bits = validation[-1]['val_loss'], validation[-1]['val_bits_per_byte']
    per_byte = f', {bits:.4f} bits per byte' if bits is not None else ''
    console.say(f'validation loss {loss:.4f} nats per token{per_byte}')
    if reference is not None:
      side = 'below' if loss < reference else 'above'
      console.say(f'that is {abs(reference - loss):.4f} {side} the order-1 entropy of {reference:.4f} nats per token')
  names = ('loss.svg', 'metrics.jsonl', 'samples.txt', 'tensorboard', 'checkpoints', 'eval', 'config.json')
  console.say(f'files in {workdir.path}: ' + ', '.join(n for n in names if (workdir.path / n).exists()))


class Clock:
  """Tokens per second, from the moments when steps' metrics arrive."""

  def __init__(self) -> None:
    self._steps = 0
    self._tokens = self._seconds = 0.0  # without the first step, which compiles
    self._line_tokens = self._line_seconds = 0.0  # since the last line
    self.restart()

  def restart(self) -> None:
    """Leaves out the time since the last step: it went into something else."""
    self._last = time.monotonic()

  def add(self, tokens: int) -> None:
    """Another step's metrics have arrived."""
    now = time.monotonic()
    seconds, self._last = now - self._last, now
    self._line_tokens, self._line_seconds = self._line_tokens + tokens, self._line_seconds + seconds
    if self._steps:
      self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
    self._steps += 1

  @property
  def rate(self) -> float | None:
    """Tokens per second of all steps but the first; None before the second."""
    return self._tokens / self._seconds if self._seconds else None

  def interval(self) -> float:
    """Tokens per second since the last call."""
    rate = self._line_tokens / max(self._line_seconds, 1e-9)
    self._line_tokens = self._line_seconds = 0.0
    return rate
