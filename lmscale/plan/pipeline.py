"""The pipeline of a config: which layers are in which stage, its timetable, and how much of the time devices wait."""

from typing import Any

from lmscale.config import Config
from lmscale.parallel.pipeline.layout import stage_layers, step_flops, step_table
from lmscale.parallel.pipeline.replay import in_flight, simulate
from lmscale.parallel.pipeline.stages import cut_text
from lmscale.plan.timetable import timetable


def pipeline_report(config: Config) -> dict[str, Any]:
  """What the plan says of a pipeline (mesh.pipe > 1), JSON-able. Bubbles are overhead over the ideal time.

  bubble: with a forward pass of 1 and a backward one of 2 for every stage, each tick waiting for the slowest device;
  bubble_async: the bound when no tick is waited for. bubble_flops: like `bubble`, with the FLOPs that each stage executes,
  the head in the last. in_flight: the most (microbatch, stage)s between forward and backward pass, by device. layers: of
  each stage.
  """
  table, stages = step_table(config), stage_layers(config)
  even = simulate(table, [1] * table.stages, [2] * table.stages)
  forward, backward = _stage_flops(config, stages)
  return {
    'schedule': table.schedule,
    'stages': table.pipe,
    'virtual_stages': table.virtual,
    'microbatches': table.microbatches,
    'ticks': table.ticks,
    'bubble': even.lockstep,
    'bubble_async': even.asynchronous,
    'bubble_flops': simulate(table, forward, backward).lockstep,
    'in_flight': in_flight(table).tolist(),
    'cut': cut_text(config.model.pattern, table.stages),
    'layers': [config.model.layers[part.start : part.stop] for part in stages],
    'picture': timetable(table),
  }


def _stage_flops(config: Config, stages: list[range]) -> tuple[list[float], list[float]]:
  """Of the forward and of the backward pass of each stage, per token."""
  layers, head = step_flops(config)
  forward, backward = ([sum(layers[i][phase] for i in part) for part in stages] for phase in (0, 1))
  if config.mesh.vocab_on_pipe:  # in each tick of the last stage all devices do their part
    return [f + head[0] / len(stages) for f in forward], [b + head[1] / len(stages) for b in backward]
  forward[-1], backward[-1] = forward[-1] + head[0], backward[-1] + head[1]
  return forward, backward
