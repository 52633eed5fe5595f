"""Trains, scores and draws the small study: four architectures and their variants, several seeds, docs/study.md.

  python tools/study.py                    # `make study`: all of it; the same command again goes on where it was
  python tools/study.py --draw             # the page and its pictures again, from what is there
  python tools/study.py --list             # what is done and what is not

Each arm of the study is a run of configs/small_study.py in a folder of its own (`run.py`, then `run.py --job=eval`), --jobs of them at a
time, each on its share of the processor's cores. First the four architectures are trained at every learning rate with one seed; the
best rate of each, by validation loss, is then trained with the other seeds, and the variants of the hybrid at the hybrid's rate.
What is done is read from the folders. A folder that was made with another recipe is refused, not mixed.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import study_page
from study_results import Arm, Plan, StudyError, check_recipe, is_scored, is_trained, validation_loss

from lmscale.errors import ConfigError
from lmscale.exit_codes import AGAIN, DIVERGED, DONE, USER_ERROR

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLANS = {
  'small': Plan('small', seeds=3),
  'test': Plan('test', seeds=1, architectures=('hybrid',), variants=(), rates=1),
}


class Stopped(Exception):
  """Somebody ended the study; what is done is kept."""


class Runner:
  """Runs commands beside each other, each on cores of its own, and ends them all when one has to."""

  def __init__(self, plan: Plan, jobs: int):
    self.plan, self.jobs = plan, jobs
    self.children: set[subprocess.Popen] = set()
    self.over = threading.Event()
    self.environment = {'JAX_COMPILATION_CACHE_DIR': str(plan.folder.absolute() / 'compiled'), **os.environ}

  def all(self, arms: Iterable[Arm], score: bool) -> None:
    """Trains (and scores) those of the arms that are not done. Raises StudyError for the first that fails, Stopped."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    shares: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(self.jobs):
      shares.put(cores[i :: self.jobs] or cores)

    def pin() -> None:
      if cores:
        os.sched_setaffinity(0, shares.get())  # of this thread, and of what it starts

    with concurrent.futures.ThreadPoolExecutor(self.jobs, initializer=pin) as pool:
      futures = [pool.submit(self.arm, arm, score) for arm in arms]
      try:
        for future in concurrent.futures.as_completed(futures):
          future.result()
      except BaseException:
        self.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        raise

  def stop(self) -> None:
    """Asks every command to save and end."""
    self.over.set()
    for child in list(self.children):
      child.send_signal(signal.SIGTERM)

  def arm(self, arm: Arm, score: bool) -> None:
    """Trains an arm where it is not trained, and scores it where it has to be and is not."""
    check_recipe(self.plan, arm)
    if not is_trained(self.plan, arm):
      code = self.command(arm, 'trained', [f'--config={arm.spec(self.plan)}', f'--config.seed={arm.seed}'], may=(DONE, DIVERGED))
      if code == DIVERGED:
        print(f'{arm.name}: diverged; its learning rate is out', flush=True)
        return
    if score and not is_scored(self.plan, arm):
      asked = self.plan.asked
      lengths = ','.join(map(str, asked.lengths))
      self.command(arm, 'scored', ['--job=eval', f'--tasks={",".join(asked.tasks)}', f'--lengths={lengths}', f'--samples={asked.samples}'])

  def command(self, arm: Arm, what: str, flags: list[str], may: tuple[int, ...] = (DONE,)) -> int:
    """run.py in the arm's folder, its output in a file beside it; its exit code, one of `may`."""
    if self.over.is_set():
      raise Stopped
    began, log = time.monotonic(), self.plan.folder / f'{arm.name}.{what}.txt'
    with log.open('w') as out:
      child = subprocess.Popen([sys.executable, ROOT / 'run.py', f'--workdir={arm.folder(self.plan)}', *flags], cwd=ROOT, stdout=out,
                               stderr=subprocess.STDOUT, env=self.environment)
      self.children.add(child)
      code = child.wait()
      self.children.discard(child)
    if code in (AGAIN, -signal.SIGTERM, -signal.SIGINT) or self.over.is_set():
      raise Stopped
    if code not in may:
      lines = log.read_text(errors='replace').strip().splitlines() or ['']
      raise StudyError(f'{arm.name}: exit code {code}: {lines[-1]} (all of it in {log})')
    print(f'{arm.name}: {what} in {time.monotonic() - began:.0f} s', flush=True)
    return code


def prepare(plan: Plan) -> None:
  """Makes the tokenizer that the recipe names, where it is not there."""
  recipe = runpy.run_path(str(plan.recipe))
  if plan.size == 'test' or (path := ROOT / recipe['TOKENIZER']).exists():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  inputs = [f'--input={text}' for text in recipe['TOKENIZER_INPUT']]
  argv = [sys.executable, ROOT / 'tools' / 'train_tokenizer.py', *inputs, f'--vocab={recipe["VOCAB"]}', f'--out={path}']
  done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
  if done.returncode:
    raise StudyError(done.stderr.strip().splitlines()[-1].removeprefix('error: '))


def study(plan: Plan, jobs: int) -> None:
  """All arms, those with nothing to wait for first."""
  runner = Runner(plan, jobs)
  runner.all(plan.grid(), score=False)
  for name in plan.architectures:
    print(f'{name}: ' + ', '.join(f'{arm.rate} {validation_loss(plan, arm):.4f}' for arm in plan.grid() if arm.architecture == name))
  runner.all(plan.chosen(), score=True)


def show(plan: Plan) -> None:
  """One line for each arm that is known by now."""
  known = list(dict.fromkeys([*plan.grid(), *(plan.chosen() if all(is_trained(plan, arm) for arm in plan.grid()) else [])]))
  for arm in known:
    print(f'{arm.name:32} {"trained" if is_trained(plan, arm) else "-":8} {"scored" if is_scored(plan, arm) else "-"}')


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for a mistake of the user's or a run that failed, 75 where the same command goes on."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument('--runs', type=pathlib.Path, default=ROOT / 'runs' / 'study', help='folder of the runs')
  parser.add_argument('--page', type=pathlib.Path, default=ROOT / 'docs' / 'study.md', help='whose tables are written, pictures beside it')
  parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time (default: %(default)s)')
  parser.add_argument('--size', choices=PLANS, default='small')
  parser.add_argument('--prepare', action='store_true', help='only make the tokenizer')
  parser.add_argument('--draw', action='store_true', help='only draw and write the tables')
  parser.add_argument('--list', action='store_true', help='only say what is done')
  flags = parser.parse_args(argv)
  plan = dataclasses.replace(PLANS[flags.size], folder=flags.runs)
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    if flags.jobs < 1:
      raise StudyError(f'--jobs: {flags.jobs}; give at least 1')
    if flags.list:
      show(plan)
      return DONE
    if not flags.draw:
      plan.folder.mkdir(parents=True, exist_ok=True)
      prepare(plan)
    if flags.prepare:
      return DONE
    if not flags.draw:
      study(plan, flags.jobs)
    print('\n'.join(map(str, study_page.write(plan, flags.page))))
  except (StudyError, ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
  except (Stopped, KeyboardInterrupt):
    print('stopped: run the same command again to go on', file=sys.stderr)
    return AGAIN
  return DONE


if __name__ == '__main__':
  sys.exit(main())
