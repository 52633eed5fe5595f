"""The tables and pictures of the small study's page (`study.py`)."""

import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from study_results import Estimate, Plan, Results, StudyError, read_results, validation_loss

from lmscale.config import Config
from lmscale.data.synthetic.example import Material
from lmscale.data.synthetic.tasks import make_example
from lmscale.data.tokenizer import get_tokenizer
from lmscale.eval.plots import COLOURS, save

PLACE = re.compile(r'(<!-- study: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)  # what is between is written here
SHOWN = {'attention0': 'attention 0 %', 'attention50': 'attention 50 %', 'mlp0': 'MLP 0 %', 'rope': 'hybrid with RoPE'}
ENTRIES_OF = 20  # books whose entries are counted
COLOUR = {name: i for i, name in enumerate(('transformer', 'mamba', 'mamba2', 'hybrid', 'rope'))}
Entries = dict[str, dict[int, float]]


def write(plan: Plan, page: pathlib.Path) -> list[pathlib.Path]:
  """Writes the parts into their places in the page and the pictures beside it; the files. Raises StudyError where something is not done."""
  results = {name: read_results(plan, name) for name in (*plan.architectures, *plan.variants)}
  entries = entries_of(plan, results[plan.architectures[0]])
  found = parts(plan, results, entries)
  text = page.read_text(encoding='utf-8') if page.exists() else '\n'.join(f'<!-- study: {name} -->\n<!-- end -->\n' for name in found)
  places = [name for _, name, _ in PLACE.findall(text)]
  if wrong := set(places) ^ set(found):
    raise StudyError(f'{page}: <!-- study: {min(wrong)} --> ... <!-- end --> is {"no part" if min(wrong) in places else "missing"}')
  pictures = draw(plan, results, entries, page.parent)
  temporary = page.with_name(f'.{page.name}')
  temporary.write_text(PLACE.sub(lambda match: f'{match[1]}\n{found[match[2]]}\n\n{match[3]}', text), encoding='utf-8')
  temporary.replace(page)
  return [page, *pictures]


def entries_of(plan: Plan, results: Results) -> Entries:
  """{task: {length in tokens: entries of its phone book of that length, on average}}."""
  name = results.config.data.tokenizer
  tokenizer = get_tokenizer(name if name == 'bytes' else str(plan.recipe.parents[1] / name))

  def entries(task: str, length: int, i: int) -> int:
    return make_example(task, 0, i, length, lambda text: len(tokenizer.encode(text)), Material()).facts['entries']

  return {task: {n: sum(entries(task, n, i) for i in range(ENTRIES_OF)) / ENTRIES_OF for n in plan.asked.lengths} for task in plan.asked.tasks}


def entries_trained(config: Config) -> int:
  """Of the longest phone book that was trained."""
  found = [0]
  for source in config.data.sources:
    task, _, rest = source.path.partition(':')
    if source.kind == 'synthetic' and task.startswith('phonebook'):
      size = int(rest.partition(':')[0].rpartition('-')[2])
      found += [make_example(task, 0, i, size, lambda text: len(text.encode()), Material()).facts['entries'] for i in range(ENTRIES_OF)]
  return max(found)


def parts(plan: Plan, results: dict[str, Results], entries: Entries) -> dict[str, str]:
  """{place in the page: Markdown}."""
  four, asked = list(plan.architectures), plan.asked
  found = {
    'arms': _arms(plan, results), 'rates': _rates(plan), 'losses': _picture('study_loss.svg', 'Validation loss against tokens and FLOPs'),
    'books': _picture('study_phonebook.svg', 'Numbers that are right against the entries of the phone book')
    + ''.join(f'\n\n`{task}`, share of the {what} that are right:\n\n{_by_entries(plan, results, four, of, task, entries)}'
              for task in asked.tasks for what, of in (('numbers', 'accuracy'), ('digits', 'digits'))),
  }  # fmt: skip
  if plan.variants:
    shares = [name for name in results if name.startswith('attention') or name in ('hybrid', 'mlp0')]
    found |= {
      'shares': _picture('study_shares.svg', 'Loss, phone books and speed by the share of attention and of MLPs')
      + f'\n\n`{asked.tasks[0]}`, share of the numbers that are right:\n\n{_by_entries(plan, results, shares, "accuracy", asked.tasks[0], entries)}',
      'rope': _picture('study_rope.svg', 'A hybrid without positions and one with RoPE')
      + ''.join(f'\n\n`{task}`:\n\n{_by_entries(plan, results, ["hybrid", "rope"], "accuracy", task, entries)}' for task in asked.tasks),
    }  # fmt: skip
  return found


def _picture(name: str, what: str) -> str:
  return f'![{what}]({name})'


def _arms(plan: Plan, results: dict[str, Results]) -> str:
  rows = [
    [SHOWN.get(name, name), f'`{r.config.model.pattern}`', f'{r.parameters:,}', f'{r.flops:,}', r.rate, str(r.loss),
     f'{r.tokens_per_second.value:,.0f}{_plus_minus(r.tokens_per_second.error)}'] for name, r in results.items()
  ]  # fmt: skip
  head = ['', 'pattern', 'parameters', 'FLOPs per token', 'learning rate', 'validation loss', 'tokens per second']
  tokens = max(results[plan.architectures[0]].losses)
  return f'Means over {plan.seeds} seeds with their standard errors, {tokens:,} tokens a run:\n\n{_markdown(head, rows)}'


def _rates(plan: Plan) -> str:
  rates = sorted({arm.rate for arm in plan.grid()}, key=float)
  return _markdown(['', *rates], [[name, *(f'{_loss_at(plan, name, rate):.4f}' for rate in rates)] for name in plan.architectures])


def _by_entries(plan: Plan, results: dict[str, Results], names: Sequence[str], of: str, task: str, entries: Entries) -> str:
  head = ['entries (tokens)', *(f'{entries[task][n]:.0f} ({n})' for n in plan.asked.lengths)]
  return _markdown(head, [[SHOWN.get(name, name), *(str(getattr(results[name], of)[task][n]) for n in plan.asked.lengths)] for name in names])


def _loss_at(plan: Plan, name: str, rate: str) -> float:
  return next(validation_loss(plan, arm) for arm in plan.grid() if (arm.architecture, arm.rate) == (name, rate))


def _plus_minus(error: float) -> str:
  return '' if math.isnan(error) else f' ± {error:,.0f}'


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def draw(plan: Plan, results: dict[str, Results], entries: Entries, folder: pathlib.Path) -> list[pathlib.Path]:
  """The pictures, each point a mean over seeds with its standard error."""
  four = {name: results[name] for name in plan.architectures}
  pictures: dict[str, Callable[[Any], Any]] = {
    'study_loss.svg': lambda pyplot: _losses(pyplot, four),
    'study_phonebook.svg': lambda pyplot: _books(pyplot, plan, four, entries),
  }
  if plan.variants:
    pictures |= {
      'study_shares.svg': lambda pyplot: _shares(pyplot, plan, results, entries),
      'study_rope.svg': lambda pyplot: _books(pyplot, plan, {name: results[name] for name in ('hybrid', 'rope')}, entries),
    }
  for name, picture in pictures.items():
    save(picture, folder / name)
  return [folder / name for name in pictures]


def _line(axes: Any, i: int, xs: Sequence[float], values: Sequence[Estimate], label: str) -> None:
  errors = [0.0 if math.isnan(e.error) else e.error for e in values]
  axes.errorbar(xs, [e.value for e in values], errors, label=label, color=COLOURS[i], marker='.', capsize=2, linewidth=1.3)


def _losses(pyplot: Any, four: dict[str, Results]) -> Any:
  figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout='constrained')
  for name, r in four.items():
    for axes, by in zip(panels, (1, r.flops), strict=True):
      _line(axes, COLOUR[name], [tokens * by for tokens in r.losses], list(r.losses.values()), name)
  panels[0].set(xlabel='tokens', ylabel='validation loss, nats per token')
  panels[1].set(xlabel='FLOPs')
  panels[1].legend(frameon=False)
  return figure


def _books(pyplot: Any, plan: Plan, some: dict[str, Results], entries: Entries) -> Any:
  """Accuracy against entries; a line at the longest book that was trained."""
  figure, panels = pyplot.subplots(1, len(plan.asked.tasks), figsize=(9, 3.4), sharey=True, layout='constrained')
  ends = entries_trained(next(iter(some.values())).config)
  for axes, task in zip(panels, plan.asked.tasks, strict=True):
    for name, r in some.items():
      _line(axes, COLOUR[name], [entries[task][n] for n in plan.asked.lengths], [r.accuracy[task][n] for n in plan.asked.lengths], SHOWN.get(name, name))
    axes.axvline(ends, color='#999999', linestyle=':', linewidth=1)
    axes.set(title=task, xlabel='entries', ylim=(-0.03, 1.03), xscale='log')
    ticks = [round(entries[task][n]) for n in plan.asked.lengths]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
  panels[0].set_ylabel('numbers that are right')
  panels[-1].legend(frameon=False)
  return figure


def _shares(pyplot: Any, plan: Plan, results: dict[str, Results], entries: Entries) -> Any:
  """Loss and accuracy by the share of attention; loss and speed by the share of MLPs."""
  figure, panels = pyplot.subplots(1, 4, figsize=(12, 3), layout='constrained')
  trained = entries_trained(results['hybrid'].config)
  inside = max((n for n in plan.asked.lengths if entries['phonebook'][n] <= trained), default=plan.asked.lengths[0])
  beyond = min((n for n in plan.asked.lengths if entries['phonebook'][n] >= 2 * trained), default=plan.asked.lengths[-1])
  attention = [results[name] for name in ('attention0', 'hybrid', 'attention50')]
  share = [100 * r.config.model.layers.count('*') / len(r.config.model.layers) for r in attention]
  _line(panels[0], 0, share, [r.loss for r in attention], '')
  for i, n in enumerate(dict.fromkeys((inside, beyond))):
    _line(panels[1], i, share, [r.accuracy['phonebook'][n] for r in attention], f'{entries["phonebook"][n]:.0f} entries')
  panels[1].legend(frameon=False)
  mlp = [results[name] for name in ('mlp0', 'hybrid')]
  share = [100 * r.config.model.layers.count('-') / len(r.config.model.layers) for r in mlp]
  _line(panels[2], 0, share, [r.loss for r in mlp], '')
  _line(panels[3], 0, share, [r.tokens_per_second for r in mlp], '')
  for axes, x, y in zip(panels, ('attention', 'attention', 'MLP', 'MLP'), ('validation loss', 'phonebook', 'validation loss', 'tokens per second'), strict=True):
    axes.set(xlabel=f'{x} layers, %', ylabel=y)
  return figure
