"""Which implementation of an operation runs: the one that is named, or the best one here."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax

_target: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar('target', default=None)


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
  """Within it programs are traced for devices like `device`, which need not be here (ahead-of-time compilation)."""
  token = _target.set(device)
  try:
    yield
  finally:
    _target.reset(token)


def backend() -> str:
  """What programs run on: 'cpu', 'gpu' or 'tpu'."""
  device = _target.get()
  return jax.default_backend() if device is None else {'cuda': 'gpu'}.get(device.platform, device.platform)


def nvidia() -> bool:
  """Whether programs run on an NVIDIA GPU; those before Ampere have other names and no kernels of ours."""
  return backend() == 'gpu' and (_target.get() or jax.devices()[0]).device_kind.startswith('NVIDIA')


def choose(
  op: str,
  name: str | None,
  known: Sequence[str],
  preferred: Sequence[str],
  unsupported: Callable[[str], str | None],
  interpret: bool = False,
) -> str:
  """The implementation of `op` to run.

  Args:
    op: the operation, for messages.
    name: the implementation that the caller names, which then runs or is refused; None chooses.
    known: all names.
    preferred: those to choose from, the best first; the last can do everything.
    unsupported: name -> why it cannot do what is asked, or None.
    interpret: whether the caller asks for interpretation, which only 'pallas_triton' has.

  Raises:
    ValueError: a name that is unknown or cannot do what is asked.
  """
  if interpret and name != 'pallas_triton':
    raise ValueError(f"{op}: interpret=True is for implementation 'pallas_triton', not {name!r}")
  if name is None:
    return next(name for name in preferred if name == preferred[-1] or unsupported(name) is None)
  if name not in known:
    raise ValueError(f"{op}: implementation '{name}' is unknown; choose one of {', '.join(known)}")
  reason = unsupported(name)
  if reason is not None:
    raise ValueError(f"{op}: implementation '{name}' cannot do this: {reason}; '{preferred[-1]}' can")
  return name
