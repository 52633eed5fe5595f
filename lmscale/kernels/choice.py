"""Which implementation of an operation runs: the one that is named, or the best one here."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from lmscale.kernels import proof

FASTER = 0.9  # of the time of the kernel before it: so much less a kernel has to take to be chosen instead


class Choice(NamedTuple):
  """What runs an operation, in which dtype, whether it was named, of those that would come before it why not, and on what it is to run."""

  op: str
  name: str
  dtype: str
  named: bool
  passed_over: tuple[tuple[str, str], ...] = ()
  on: str = ''


_recorded: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar('recorded', default=None)
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


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
  """Within it the choices are written down that tracing makes."""
  found: list[Choice] = []
  token = _recorded.set(found)
  try:
    yield found
  finally:
    _recorded.reset(token)


def choose(
  op: str,
  name: str | None,
  known: Sequence[str],
  preferred: Sequence[str],
  unsupported: Callable[[str], str | None],
  dtype: jax.typing.DTypeLike,
  interpret: bool = False,
) -> str:
  """The implementation of `op` to run.

  Args:
    op: the operation, for messages.
    name: the implementation that the caller names, which then runs or is refused; None chooses.
    known: all names.
    preferred: those to choose from, the best first; the last can do everything.
    unsupported: name -> why it cannot do what is asked, or None.
    dtype: of the main operand. But for the last, what is not named has to be proved in it on this device, see `proof`.
    interpret: whether the caller asks for interpretation, which only 'pallas_triton' has.

  Raises:
    ValueError: a name that is unknown or cannot do what is asked.
  """
  if interpret and name != 'pallas_triton':
    raise ValueError(f"{op}: interpret=True is for implementation 'pallas_triton', not {name!r}")
  if name is None:
    return _best(op, preferred, unsupported, str(jax.numpy.dtype(dtype)))
  if name not in known:
    raise ValueError(f"{op}: implementation '{name}' is unknown; choose one of {', '.join(known)}")
  reason = unsupported(name)
  if reason is not None:
    raise ValueError(f"{op}: implementation '{name}' cannot do this: {reason}; '{preferred[-1]}' can")
  _record(Choice(op, name, str(jax.numpy.dtype(dtype)), True))
  return name


def _best(op: str, preferred: Sequence[str], unsupported: Callable[[str], str | None], dtype: str) -> str:
  found, reasons = [], []
  for name in preferred[:-1]:
    reason = unsupported(name) or _unproved(op, name, dtype)
    if reason:
      reasons.append((name, reason))
    else:
      found.append(name)
  best = _fastest(op, found, dtype) if found else preferred[-1]
  _record(Choice(op, best, dtype, False, tuple(reasons)))
  return best


def _unproved(op: str, name: str, dtype: str) -> str:
  """Why a kernel is not to be trusted on this device; of one that is not here nothing is known."""
  return '' if _target.get() else proof.verdict(op, name, dtype).why_not


def _fastest(op: str, names: Sequence[str], dtype: str) -> str:
  best = names[0]
  for name in names[1:] if _target.get() is None else ():
    if 0 < proof.verdict(op, name, dtype).seconds < FASTER * proof.verdict(op, best, dtype).seconds:
      best = name
  return best


def _record(choice: Choice) -> None:
  choice = choice._replace(on=backend())
  if (found := _recorded.get()) is not None and choice not in found:
    found.append(choice)
