"""What to change in a config that needs more memory than there is."""

from lmscale.config import Config

OUT_OF_MEMORY = ('RESOURCE_EXHAUSTED', 'out of memory', 'OUT_OF_MEMORY')  # as XLA and the drivers say it


def is_out_of_memory(error: BaseException) -> bool:
  """Whether a host or a device had too little memory."""
  return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(w in str(error) for w in OUT_OF_MEMORY)


def generation_advice(config: Config) -> str:
  """The settings that would make generation smaller; one line."""
  generate = config.generate
  steps = [f'lower generate.batch (now {generate.batch})'] if generate.batch > 1 else []
  steps += [f'lower generate.prefill_chunk (now {generate.prefill_chunk})'] if generate.prefill_chunk > 64 else []
  steps += ['set train.compute_dtype=bfloat16'] if config.train.compute_dtype != 'bfloat16' else []
  return '; or '.join([*steps, f'raise mesh.tensor (now {config.mesh.tensor}) on more devices', 'give shorter prompts'])


def memory_advice(config: Config) -> str:
  """The settings that would make a step smaller, those first that cost no speed; one line."""
  train, mesh = config.train, config.mesh
  steps = []
  if train.microbatch > 1:
    steps.append(f'lower train.microbatch (now {train.microbatch}; the batch stays as it is)')
  if train.loss_chunk > 256:
    steps.append(f'lower train.loss_chunk (now {train.loss_chunk})')
  if train.remat != 'full':
    steps.append(f'set train.remat={"full" if train.remat == "selective" else "selective or full"} (now {train.remat})')
  if mesh.zero < 3 and mesh.data != 1:
    steps.append(f'raise mesh.zero (now {mesh.zero}, up to 3)')
  if mesh.tensor > 1 and not mesh.sequence_parallel:
    steps.append('set mesh.sequence_parallel=true')
  if train.compute_dtype != 'bfloat16':
    steps.append(f'set train.compute_dtype=bfloat16 (now {train.compute_dtype})')
  steps.append('use more devices or a shorter train.seq_len')
  return f'{"; or ".join(steps)}. --job=plan shows where the bytes go'
